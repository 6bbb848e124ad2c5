//! Which of the node's metadata can be allowed: single paths, and groups of paths that belong together.

use std::time::Duration;

use super::{
    ALLOWABLE, DEFAULT,
    follow::{Reads, Schedule},
};

/// A group of `--node-metadata`. `docs/node-metadata.md` says who asks for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Where the instance is in the network: its VPC, its subnet, how many interfaces and volumes it has.
    Vpc,
    /// The instance's tags.
    Tags,
    /// What is about to happen to the instance: spot notices, maintenance, the state in its auto scaling group.
    Lifecycle,
}

pub const GROUPS: [(&str, Group); 3] = [("vpc", Group::Vpc), ("tags", Group::Tags), ("lifecycle", Group::Lifecycle)];

pub(super) const MAC: &str = "meta-data/mac";
/// Folders have a slash at their end.
pub(super) const INTERFACES: &str = "meta-data/network/interfaces/macs/";
pub(super) const DEVICES: &str = "meta-data/block-device-mapping/";
pub(super) const TAGS: &str = "meta-data/tags/instance/";
/// Served of the primary interface, and of no other.
pub(super) const OF_INTERFACE: [&str; 7] =
    ["device-number", "interface-id", "owner-id", "subnet-id", "vpc-id", "vpc-ipv4-cidr-block", "vpc-ipv4-cidr-blocks"];

/// The node has none of these until there is something to say, and again when that is over.
const NOTICES: [&str; 5] = [
    "meta-data/autoscaling/target-lifecycle-state",
    "meta-data/events/maintenance/scheduled",
    "meta-data/events/recommendations/rebalance",
    "meta-data/spot/instance-action",
    "meta-data/spot/termination-time",
];

/// `on-demand` or `spot`: does not change, so it is read with the single paths.
const LIFE_CYCLE: &str = "meta-data/instance-life-cycle";

/// None of it changes while the node runs, but for a resize.
pub(super) const STATIC: Duration = Duration::from_secs(3_600);
const VPC: Duration = Duration::from_secs(300);
const TAG: Duration = Duration::from_secs(60);
/// aws-node-termination-handler asks every 2 s; AWS says to look every 5 s. A spot notice comes 2 minutes ahead.
const NOTICE: Duration = Duration::from_secs(3);
const HISTORY: Duration = Duration::from_secs(60);

impl Group {
    /// One schedule for each part that must not wait for another one.
    pub(super) fn schedules(self) -> Vec<Schedule> {
        let values = |paths: &[&str], every| {
            Schedule::new(Reads::Values(paths.iter().map(|path| (*path).to_owned()).collect()), every)
        };
        match self {
            Self::Vpc => vec![
                Schedule::new(Reads::Interfaces, VPC),
                Schedule::new(Reads::Devices, VPC),
                values(&["meta-data/outpost-arn"], VPC),
            ],
            Self::Tags => vec![Schedule::new(Reads::Tags, TAG)],
            Self::Lifecycle => NOTICES
                .iter()
                .map(|path| values(&[path], NOTICE))
                .chain([values(&["meta-data/events/maintenance/history"], HISTORY)])
                .collect(),
        }
    }
}

/// What pods may read of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed {
    pub paths: Vec<String>,
    pub groups: Vec<Group>,
}

impl Allowed {
    /// Reads the words of `--node-metadata`: paths, groups, `default` for its default, or `none` by itself.
    ///
    /// # Errors
    /// The word that is neither, and what would be right.
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

/// Whether a path can be allowed, or given, by itself.
///
/// # Errors
/// Why it cannot, and what can: one of the paths, or what `or_else` names.
pub fn check(path: &str, or_else: &str) -> Result<(), String> {
    if ALLOWABLE.contains(&path) {
        return Ok(());
    }
    Err(match never(path) {
        Some(holds) => format!("is never served by any setting: it holds {holds}"),
        None => format!("must be {or_else}one of {}", ALLOWABLE.join(", ")),
    })
}

/// What a path holds that no pod may read, whatever is configured.
fn never(path: &str) -> Option<&'static str> {
    let segments: Vec<_> = path.split('/').filter(|segment| !segment.is_empty() && *segment != "latest").collect();
    let below = segments.strip_prefix(&["meta-data"]).unwrap_or(&segments);
    match (below.first().copied()?, segments.last().copied()?) {
        ("iam", _) => Some("the node's own role, and its credentials; pods are served their own role there"),
        (first, _) if first.starts_with("iam-eks") => Some("IAM data of the node"),
        ("identity-credentials", _) => Some("credentials of the instance's identity role"),
        ("user-data", _) => Some("bootstrap scripts, often with secrets"),
        ("public-keys", _) => Some("the node's SSH keys"),
        (_, "pkcs7" | "rsa2048" | "signature") => Some("a signature that proves to others who the node is"),
        _ => None,
    }
}

/// Six pairs of hexadecimal digits with colons between, as EC2 writes them.
pub(super) fn is_mac(text: &str) -> bool {
    let pair = |pair: &str| pair.len() == 2 && pair.bytes().all(|byte| byte.is_ascii_hexdigit());
    text.split(':').count() == 6 && text.split(':').all(pair)
}

/// EC2 serves no tag whose key has a space or a slash, nor `.`, `..` and `_index` (EC2 User Guide, "View tags for your EC2
/// instances using instance metadata").
pub(super) fn is_tag_key(key: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"+-=.,_:@".contains(&byte);
    (1..=128).contains(&key.len()) && key.bytes().all(plain) && !matches!(key, "." | ".." | "_index")
}

/// `ami`, `ebs1`, `ephemeral0`, `root` and the like.
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
    fn names_from_outside_are_checked() {
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
