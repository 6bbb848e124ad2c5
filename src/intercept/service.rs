//! The two metadata services whose addresses the agent intercepts.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Addresses of the EC2 instance metadata service
/// (<https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html>).
pub const METADATA_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// Addresses of the EKS Pod Identity agent, for SDKs with container credentials
/// (<https://docs.aws.amazon.com/eks/latest/userguide/pod-id-how-it-works.html>).
pub const CONTAINER_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 170, 23);
pub const CONTAINER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23);
/// Port of both services.
pub const METADATA_PORT: u16 = 80;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetadataService {
    /// The instance metadata service (IMDS).
    Metadata,
    /// The container credentials endpoint.
    Container,
}

impl MetadataService {
    /// Returns the service at this destination, if there is one.
    pub(super) fn at(destination: SocketAddr) -> Option<Self> {
        let at = |service: &Self| service.v4() == destination.ip() || service.v6() == destination.ip();
        [Self::Metadata, Self::Container].into_iter().find(at).filter(|_| destination.port() == METADATA_PORT)
    }

    /// Returns the service's address in the address family of `host`.
    pub fn address_for(self, host: IpAddr) -> IpAddr {
        if host.is_ipv4() { self.v4() } else { self.v6() }
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
    fn destination_selects_the_service() {
        let at = |text: &str| MetadataService::at(text.parse().unwrap());
        assert_eq!(at("169.254.169.254:80"), Some(MetadataService::Metadata));
        assert_eq!(at("[fd00:ec2::254]:80"), Some(MetadataService::Metadata));
        assert_eq!(at("169.254.170.23:80"), Some(MetadataService::Container));
        assert_eq!(at("[fd00:ec2::23]:80"), Some(MetadataService::Container));
        for other in ["169.254.169.254:8080", "169.254.170.23:443", "169.254.170.2:80", "[fd00:ec2::2]:80"] {
            assert_eq!(at(other), None, "{other}");
        }
    }
}
