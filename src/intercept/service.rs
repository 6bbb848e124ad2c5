//! The two services that pods' connections may be meant for, told apart by the address that they were sent to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Where SDKs send their requests (EC2 User Guide, "Instance metadata and user data").
pub const METADATA_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// Where those send theirs that were told of container credentials (Amazon EKS User Guide, "How EKS Pod Identity
/// works").
pub const CONTAINER_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 170, 23);
pub const CONTAINER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23);
/// Of both.
pub const METADATA_PORT: u16 = 80;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    Metadata,
    Container,
}

impl Service {
    /// `None`: no service of ours has that address.
    pub(super) fn at(destination: SocketAddr) -> Option<Self> {
        let at = |service: &Self| service.v4() == destination.ip() || service.v6() == destination.ip();
        [Self::Metadata, Self::Container].into_iter().find(at).filter(|_| destination.port() == METADATA_PORT)
    }

    /// Its address of the family that this one is of.
    pub fn of_family(self, of: IpAddr) -> IpAddr {
        if of.is_ipv4() { self.v4() } else { self.v6() }
    }

    pub fn v4(self) -> IpAddr {
        match self {
            Self::Metadata => METADATA_V4.into(),
            Self::Container => CONTAINER_V4.into(),
        }
    }

    pub fn v6(self) -> IpAddr {
        match self {
            Self::Metadata => METADATA_V6.into(),
            Self::Container => CONTAINER_V6.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_an_address_and_port_80() {
        let at = |text: &str| Service::at(text.parse().unwrap());
        assert_eq!(at("169.254.169.254:80"), Some(Service::Metadata));
        assert_eq!(at("[fd00:ec2::254]:80"), Some(Service::Metadata));
        assert_eq!(at("169.254.170.23:80"), Some(Service::Container));
        assert_eq!(at("[fd00:ec2::23]:80"), Some(Service::Container));
        for other in ["169.254.169.254:8080", "169.254.170.23:443", "169.254.170.2:80", "[fd00:ec2::2]:80"] {
            assert_eq!(at(other), None, "{other}");
        }
    }
}
