//! The allow-list for the node's metadata (`--node-metadata`): single paths, and groups of related paths.

use std::time::Duration;

use super::{
    ALLOWABLE, DEFAULT,
    fetch::{FetchTarget, Schedule},
};

/// A group of paths. `docs/node-metadata.md` lists the programs that request them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// The instance's VPC and subnet, and the number of its interfaces and volumes.
    Vpc,
    /// The instance's tags.
    Tags,
    /// Spot notices, maintenance events, and the state in the Auto Scaling group.
    Lifecycle,
}

pub const GROUPS: [(&str, Group); 3] = [("vpc", Group::Vpc), ("tags", Group::Tags), ("lifecycle", Group::Lifecycle)];

pub(super) const MAC: &str = "meta-data/mac";
/// Folders have a trailing slash.
pub(super) const INTERFACES: &str = "meta-data/network/interfaces/macs/";
pub(super) const DEVICES: &str = "meta-data/block-device-mapping/";
pub(super) const TAGS: &str = "meta-data/tags/instance/";
/// Entries of the primary interface. Other interfaces are only listed.
pub(super) const INTERFACE_ENTRIES: [&str; 7] =
    ["device-number", "interface-id", "owner-id", "subnet-id", "vpc-id", "vpc-ipv4-cidr-block", "vpc-ipv4-cidr-blocks"];

/// Paths that exist only while the notice is current.
const NOTICES: [&str; 5] = [
    "meta-data/autoscaling/target-lifecycle-state",
    "meta-data/events/maintenance/scheduled",
    "meta-data/events/recommendations/rebalance",
    "meta-data/spot/instance-action",
    "meta-data/spot/termination-time",
];

/// `on-demand` or `spot`. It never changes, so it is fetched with the single paths.
const LIFE_CYCLE: &str = "meta-data/instance-life-cycle";

/// Interval for values that do not change while the node runs, except at a resize.
pub(super) const STATIC_INTERVAL: Duration = Duration::from_secs(3_600);
const VPC_INTERVAL: Duration = Duration::from_secs(300);
const TAG_INTERVAL: Duration = Duration::from_secs(60);
/// aws-node-termination-handler polls every 2 s; AWS recommends 5 s. A spot notice comes 2 minutes before the
/// interruption.
const NOTICE_INTERVAL: Duration = Duration::from_secs(3);
const HISTORY_INTERVAL: Duration = Duration::from_secs(60);

impl Group {
    /// Returns one schedule for each part, so that no part waits for another.
    pub(super) fn schedules(self) -> Vec<Schedule> {
        let values = |paths: &[&str], interval| {
            Schedule::new(FetchTarget::Values(paths.iter().map(|path| (*path).to_owned()).collect()), interval)
        };
        match self {
            Self::Vpc => vec![
                Schedule::new(FetchTarget::Interfaces, VPC_INTERVAL),
                Schedule::new(FetchTarget::Devices, VPC_INTERVAL),
                values(&["meta-data/outpost-arn"], VPC_INTERVAL),
            ],
            Self::Tags => vec![Schedule::new(FetchTarget::Tags, TAG_INTERVAL)],
            Self::Lifecycle => NOTICES
                .iter()
                .map(|path| values(&[path], NOTICE_INTERVAL))
                .chain([values(&["meta-data/events/maintenance/history"], HISTORY_INTERVAL)])
                .collect(),
        }
    }
}

/// The node's metadata that pods may read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed {
    pub paths: Vec<String>,
    pub groups: Vec<Group>,
}

impl Allowed {
    /// Parses the words of `--node-metadata`: paths, groups, `default`, or `none` by itself.
    ///
    /// # Errors
    /// The first invalid word, and what is valid instead.
    pub fn parse(words: &[String]) -> Result<Self, (&str, String)> {
        let (mut paths, mut groups) = (Vec::new(), Vec::new());
        for word in words.iter().filter(|_| words != ["none"]) {
            if word == "default" {
                paths.extend(DEFAULT.split(',').map(str::to_owned));
            } else if let Some((_, group)) = GROUPS.iter().find(|(name, _)| name == word) {
                groups.push(*group);
            } else {
                check(word, "default, vpc, tags, lifecycle, or none by itself, or ")
                    .map_err(|right| (&**word, right))?;
                paths.push(word.clone());
            }
        }
        if groups.contains(&Group::Lifecycle) {
            paths.push(LIFE_CYCLE.to_owned());
        }
        paths.sort_unstable();
        paths.dedup();
        groups.sort_unstable_by_key(|group| *group as u8);
        groups.dedup();
        Ok(Self { paths, groups })
    }
}

/// Checks that a path can be allowed, or configured, individually.
///
/// # Errors
/// Why it cannot, and the valid paths with the alternatives in `or_else`.
pub fn check(path: &str, or_else: &str) -> Result<(), String> {
    if ALLOWABLE.contains(&path) {
        return Ok(());
    }
    Err(match forbidden_content(path) {
        Some(holds) => format!("is never served by any setting: it holds {holds}"),
        None => format!("must be {or_else}one of {}", ALLOWABLE.join(", ")),
    })
}

/// Returns what a path holds if no setting may open it to pods.
fn forbidden_content(path: &str) -> Option<&'static str> {
    let segments: Vec<_> = path.split('/').filter(|segment| !segment.is_empty() && *segment != "latest").collect();
    let below = segments.strip_prefix(&["meta-data"]).unwrap_or(&segments);
    match (below.first().copied()?, segments.last().copied()?) {
        ("iam", _) => Some("the node's own role, and its credentials; pods are served their own role there"),
        (first, _) if first.starts_with("iam-eks") => Some("IAM data of the node"),
        ("identity-credentials", _) => Some("credentials of the instance's identity role"),
        ("user-data", _) => Some("bootstrap scripts, often with secrets"),
        ("public-keys", _) => Some("the node's SSH keys"),
        (_, "pkcs7" | "rsa2048" | "signature") => Some("a signature that proves the node's identity to others"),
        _ => None,
    }
}

/// Accepts six pairs of hexadecimal digits, separated by colons.
pub(super) fn is_mac(text: &str) -> bool {
    let pair = |pair: &str| pair.len() == 2 && pair.bytes().all(|byte| byte.is_ascii_hexdigit());
    text.split(':').count() == 6 && text.split(':').all(pair)
}

/// Accepts the tag keys that EC2 serves: none with a space or a slash, and not `.`, `..` or `_index`
/// (<https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/work-with-tags-in-IMDS.html>).
pub(super) fn is_tag_key(key: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"+-=.,_:@".contains(&byte);
    (1..=128).contains(&key.len()) && key.bytes().all(plain) && !matches!(key, "." | ".." | "_index")
}

/// Accepts names such as `ami`, `ebs1`, `ephemeral0` and `root`.
pub(super) fn is_device(name: &str) -> bool {
    (1..=32).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(',').map(str::to_owned).collect()
    }

    #[test]
    fn words_are_paths_groups_default_or_none() {
        let Allowed { paths, groups } =
            Allowed::parse(&words("lifecycle,default,vpc,meta-data/local-ipv4,vpc")).unwrap();
        assert_eq!(groups, [Group::Vpc, Group::Lifecycle]);
        assert_eq!(paths.len(), DEFAULT.split(',').count() + 2, "with instance-life-cycle: {paths:?}");
        assert_eq!(Allowed::parse(&words("none")).unwrap(), Allowed::default());
        for wrong in ["network", "none,tags", "meta-data", "meta-data/tags/instance", "VPC"] {
            let words = words(wrong);
            let (word, right) = Allowed::parse(&words).unwrap_err();
            assert!(wrong.starts_with(word) && right.contains("must be default, vpc, tags, lifecycle, or"), "{right}");
        }
    }

    #[test]
    fn refusal_says_why_a_path_is_never_served() {
        for (path, why) in [
            ("meta-data/iam/info", "own role"),
            ("/latest/meta-data/iam/security-credentials/", "own role"),
            ("meta-data/iam-eks-pod-identity", "IAM data"),
            ("meta-data/identity-credentials/ec2/info", "identity role"),
            ("user-data", "secrets"),
            ("meta-data/public-keys/0/openssh-key", "SSH"),
            ("dynamic/instance-identity/pkcs7", "signature"),
            ("dynamic/instance-identity/rsa2048", "signature"),
            ("dynamic/instance-identity/signature", "signature"),
        ] {
            let words = [path.to_owned()];
            let (_, right) = Allowed::parse(&words).unwrap_err();
            assert!(right.contains("never served") && right.contains(why), "{path}: {right}");
        }
    }

    #[test]
    fn names_from_the_node_are_validated() {
        for (mac, good) in [
            ("0e:49:61:0f:c3:11", true),
            ("0E:49:61:0F:C3:11", true),
            ("0e:49:61:0f:c3", false),
            ("0e:49:61:0f:c3:11:22", false),
            ("0e:49:61:0f:c3:1", false),
            ("0e:49:61:0f:c3:1/", false),
            ("../../iam/security", false),
        ] {
            assert_eq!(is_mac(mac), good, "{mac}");
        }
        for (key, good) in [
            ("Name", true),
            ("aws:autoscaling:groupName", true),
            ("a+b=c.d,e_f@g", true),
            ("kubernetes.io/cluster", false),
            ("with space", false),
            ("..", false),
            ("_index", false),
            ("a?b", false),
            ("ä", false),
            ("", false),
        ] {
            assert_eq!(is_tag_key(key), good, "{key}");
        }
        assert!(!is_tag_key(&"k".repeat(129)) && is_tag_key(&"k".repeat(128)));
        assert!(is_device("ebs1") && !is_device("ebs/1") && !is_device(""));
    }
}
