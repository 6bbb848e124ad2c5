//! Intervals of fetches, and what is served when responses of the node's service change, on a paused clock.

use std::{
    collections::BTreeMap,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use anyhow::anyhow;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use super::{
    NodeMetadata,
    groups::{Allowed, Group, MAC},
    source::{FetchError, Source},
};

const SPOT: &str = "meta-data/spot/instance-action";
const REGION: &str = "meta-data/placement/region";
const PRIMARY: &str = "0e:49:61:0f:c3:11";
const OTHER: &str = "0e:49:61:0f:c3:12";
const MACS: &str = "meta-data/network/interfaces/macs";
const TAGS: &str = "meta-data/tags/instance";

#[derive(Debug, Clone)]
enum Response {
    Value(String),
    Fails,
    Hangs,
    NoService,
}

/// A node's metadata service. Paths that are not set do not exist.
#[derive(Debug, Clone, Default)]
struct Node {
    responses: Arc<Mutex<BTreeMap<String, Response>>>,
    requests: Arc<Mutex<Vec<(String, Instant)>>>,
}

impl Node {
    fn set(&self, path: &str, response: Response) {
        self.responses.lock().insert(path.to_owned(), response);
    }

    fn value(&self, path: &str, value: &str) {
        self.set(path, Response::Value(value.to_owned()));
    }

    fn remove(&self, path: &str) {
        self.responses.lock().remove(path);
    }

    /// Returns how often a path was requested.
    fn count(&self, path: &str) -> usize {
        self.requests.lock().iter().filter(|(requested, _)| requested == path).count()
    }
}

impl Source for Node {
    async fn get(&self, path: &str) -> Result<Option<Bytes>, FetchError> {
        self.requests.lock().push((path.to_owned(), Instant::now()));
        let response = self.responses.lock().get(path).cloned();
        match response {
            None => Ok(None),
            Some(Response::Value(value)) => Ok(Some(value.into())),
            Some(Response::Fails) => Err(FetchError::Failed(anyhow!("503"))),
            Some(Response::NoService) => Err(FetchError::NoService(anyhow!("connection refused"))),
            Some(Response::Hangs) => {
                sleep(Duration::from_secs(2)).await;
                Err(FetchError::Failed(anyhow!("deadline has elapsed")))
            }
        }
    }
}

fn start(node: &Node, allowed: &[&str], groups: &[Group]) -> Arc<NodeMetadata> {
    let paths = allowed.iter().map(|path| (*path).to_owned()).collect();
    let metadata = NodeMetadata::new([], Allowed { paths, groups: groups.to_vec() });
    let (polled, node) = (metadata.clone(), node.clone());
    tokio::spawn(async move { polled.poll_from(&node).await });
    metadata
}

async fn seconds(seconds: u64) {
    sleep(Duration::from_secs(seconds)).await;
    // Let schedules that are due at the same instant run.
    sleep(Duration::from_millis(10)).await;
}

/// Returns what a request finds now: a value, nothing, or `None` if it would have to wait.
async fn served(metadata: &NodeMetadata, path: &str) -> Option<Option<String>> {
    let value = || metadata.value(path).map(|value| String::from_utf8(value.to_vec()).unwrap());
    match value() {
        Some(value) => Some(Some(value)),
        None => metadata.wait_fetched(path, Instant::now()).await.then(value),
    }
}

#[tokio::test(start_paused = true)]
async fn notices_come_and_vanish_within_seconds() {
    let node = Node::default();
    let metadata = start(&node, &[], &[Group::Lifecycle]);
    assert_eq!(served(&metadata, SPOT).await, None, "not fetched yet");
    seconds(0).await;
    assert_eq!(served(&metadata, SPOT).await, Some(None));
    assert_eq!(metadata.entries("meta-data/spot"), Vec::<String>::new());
    node.value(SPOT, r#"{"action": "terminate"}"#);
    seconds(3).await;
    assert!(metadata.value(SPOT).is_some());
    assert_eq!(metadata.entries("meta-data/spot"), ["instance-action"]);
    node.remove(SPOT);
    seconds(3).await;
    assert_eq!(served(&metadata, SPOT).await, Some(None));
    assert_eq!(metadata.entries("meta-data"), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn each_group_has_its_own_interval() {
    let node = Node::default();
    node.value(REGION, "mars-1");
    node.value(MAC, PRIMARY);
    start(&node, &[REGION], &[Group::Vpc, Group::Tags, Group::Lifecycle]);
    seconds(3_590).await;
    assert_eq!(node.count(REGION), 1, "hourly");
    assert_eq!((node.count(MAC), node.count(&format!("{MACS}/"))), (12, 12), "every five minutes");
    assert_eq!(node.count(&format!("{TAGS}/")), 60, "every minute");
    let polls = node.count(SPOT);
    assert!((1_190..=1_200).contains(&polls), "every three seconds: {polls}");
    seconds(20).await;
    assert_eq!(node.count(REGION), 2);
}

#[tokio::test(start_paused = true)]
async fn hanging_path_delays_no_other() {
    let node = Node::default();
    for path in ["meta-data/spot/termination-time", "meta-data/ami-id", MAC] {
        node.set(path, Response::Hangs);
    }
    node.value(REGION, "mars-1");
    node.value(SPOT, "{}");
    node.value("meta-data/block-device-mapping/", "ami\nroot");
    let metadata = start(&node, &["meta-data/ami-id", REGION], &[Group::Vpc, Group::Lifecycle]);
    seconds(0).await;
    for path in [REGION, SPOT] {
        assert!(metadata.value(path).is_some(), "{path}");
    }
    assert_eq!(metadata.entries("meta-data/block-device-mapping"), ["ami", "root"]);
    node.remove(SPOT);
    seconds(3).await;
    assert_eq!(served(&metadata, SPOT).await, Some(None));
    for path in ["meta-data/spot/termination-time", "meta-data/ami-id", MAC, &format!("{MACS}/{PRIMARY}/vpc-id")] {
        assert_eq!(served(&metadata, path).await, None, "{path} may be there");
    }
    node.value("meta-data/ami-id", "ami-7");
    seconds(10).await;
    assert_eq!(
        (node.count(REGION), metadata.value("meta-data/ami-id").is_some()),
        (1, true),
        "only the path that failed is retried"
    );
}

/// After a failure the last value is kept, and a path without one may exist.
#[tokio::test(start_paused = true)]
async fn refresh_failure_keeps_values() {
    let node = Node::default();
    node.value(SPOT, "{}");
    node.value(&format!("{TAGS}/"), "Name");
    node.value(&format!("{TAGS}/Name"), "shop");
    let metadata = start(&node, &[], &[Group::Lifecycle, Group::Tags]);
    seconds(1).await;
    node.set(SPOT, Response::Fails);
    node.set(&format!("{TAGS}/"), Response::Fails);
    node.set("meta-data/events/recommendations/rebalance", Response::Fails);
    seconds(70).await;
    assert_eq!(served(&metadata, SPOT).await, Some(Some("{}".into())));
    assert_eq!(served(&metadata, &format!("{TAGS}/Name")).await, Some(Some("shop".into())));
    assert_eq!(served(&metadata, "meta-data/events/recommendations/rebalance").await, None);
    node.remove("meta-data/events/recommendations/rebalance");
    seconds(15).await;
    assert_eq!(served(&metadata, "meta-data/events/recommendations/rebalance").await, Some(None), "the retry is soon");
}

#[tokio::test(start_paused = true)]
async fn tags_follow_their_listing() {
    let node = Node::default();
    let listing = format!("{TAGS}/");
    node.value(&listing, "Name\nteam");
    node.value(&format!("{TAGS}/Name"), "a value: ä, with spaces");
    node.set(&format!("{TAGS}/team"), Response::Fails);
    let metadata = start(&node, &[], &[Group::Tags]);
    assert_eq!(served(&metadata, &format!("{TAGS}/Name")).await, None, "not fetched yet");
    seconds(0).await;
    assert_eq!(metadata.entries("meta-data/tags"), ["instance/"]);
    assert_eq!(metadata.entries(TAGS), ["Name", "team"]);
    assert_eq!(served(&metadata, &format!("{TAGS}/Name")).await, Some(Some("a value: ä, with spaces".into())));
    assert_eq!(served(&metadata, &format!("{TAGS}/team")).await, None);
    assert_eq!(served(&metadata, &format!("{TAGS}/other")).await, Some(None));
    node.value(&listing, "team");
    node.value(&format!("{TAGS}/team"), "x");
    seconds(60).await;
    assert_eq!(metadata.entries(TAGS), ["team"]);
    assert_eq!(served(&metadata, &format!("{TAGS}/Name")).await, Some(None));
    node.remove(&listing);
    seconds(60).await;
    assert_eq!(served(&metadata, &format!("{TAGS}/team")).await, Some(None), "tags were turned off");
    assert_eq!(metadata.entries("meta-data"), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn names_and_values_are_bounded() {
    let node = Node::default();
    let many: Vec<_> = (0..1_000).map(|n| format!("key-{n:04}")).collect();
    let bad = ["../../iam", "a/b", "with space", "a%2fb", "..", "long"];
    node.value(&format!("{TAGS}/"), &format!("long\ncontrol\nä\n{}\n{}", bad[..5].join("\n"), many.join("\n")));
    node.value(&format!("{TAGS}/long"), &"v".repeat(1_025));
    node.value(&format!("{TAGS}/control"), "two\nlines");
    for key in &many {
        node.value(&format!("{TAGS}/{key}"), "v");
    }
    node.value(MAC, PRIMARY);
    node.value(&format!("{MACS}/"), "../../\nnot-a-mac/");
    node.value("meta-data/block-device-mapping/", "ebs1\n../x");
    let metadata = start(&node, &[], &[Group::Tags, Group::Vpc]);
    seconds(5).await;
    assert_eq!(metadata.entries(TAGS).len(), 126, "128 names, two of them with invalid values");
    let requests = node.requests.lock().clone();
    assert!(
        requests.iter().all(|(path, _)| !path.contains("..") && !path.contains(' ') && !path.contains('%')),
        "{requests:?}"
    );
    for key in ["long", "control"] {
        assert_eq!(served(&metadata, &format!("{TAGS}/{key}")).await, Some(None), "{key}");
    }
    assert_eq!(served(&metadata, MACS).await, Some(None));
    assert_eq!(metadata.entries("meta-data/block-device-mapping"), ["ebs1"]);
    node.value(MAC, "no mac");
    seconds(300).await;
    assert_eq!(served(&metadata, MAC).await, Some(Some(PRIMARY.into())), "an invalid MAC address is ignored");
}

#[tokio::test(start_paused = true)]
async fn only_the_primary_interface_has_values() {
    let node = Node::default();
    node.value(MAC, PRIMARY);
    node.value(&format!("{MACS}/"), &format!("{PRIMARY}/\n{OTHER}/"));
    for mac in [PRIMARY, OTHER] {
        node.value(&format!("{MACS}/{mac}/vpc-id"), "vpc-7");
        node.value(&format!("{MACS}/{mac}/public-ipv4s"), "192.0.2.1");
    }
    let metadata = start(&node, &[], &[Group::Vpc]);
    seconds(0).await;
    assert_eq!(metadata.entries(MACS), [format!("{PRIMARY}/"), format!("{OTHER}/")]);
    assert_eq!(metadata.entries(&format!("{MACS}/{PRIMARY}")), ["vpc-id"]);
    assert_eq!(served(&metadata, &format!("{MACS}/{PRIMARY}/vpc-id")).await, Some(Some("vpc-7".into())));
    for path in [format!("{MACS}/{OTHER}"), format!("{MACS}/{OTHER}/vpc-id"), format!("{MACS}/{PRIMARY}/public-ipv4s")]
    {
        assert_eq!(served(&metadata, &path).await, Some(None), "{path}");
        assert_eq!(metadata.entries(&path), Vec::<String>::new(), "{path}");
    }
    node.value(&format!("{MACS}/"), &format!("{PRIMARY}/"));
    seconds(300).await;
    assert_eq!(metadata.entries(MACS), [format!("{PRIMARY}/")], "an interface was detached");
    assert_eq!(served(&metadata, &format!("{MACS}/{PRIMARY}/vpc-id")).await, Some(Some("vpc-7".into())));
}

/// Outside EC2 a group is empty at once, and polling it causes few requests.
#[tokio::test(start_paused = true)]
async fn without_service_requests_do_not_wait() {
    let node = Node::default();
    let listings = [MACS, TAGS, "meta-data/block-device-mapping"].map(|folder| format!("{folder}/"));
    for path in [SPOT, REGION, MAC].into_iter().chain(listings.iter().map(String::as_str)) {
        node.set(path, Response::NoService);
    }
    let metadata = start(&node, &[REGION], &[Group::Vpc, Group::Tags, Group::Lifecycle]);
    seconds(0).await;
    for path in [SPOT, REGION, MAC, MACS, TAGS, "meta-data", &format!("{MACS}/{PRIMARY}/vpc-id"), &format!("{TAGS}/x")]
    {
        assert_eq!(served(&metadata, path).await, Some(None), "{path}");
    }
    seconds(3_600).await;
    assert!(
        node.count(TAGS.trim_end_matches('/')) == 0 && node.count(&listings[1]) < 40,
        "{}",
        node.count(&listings[1])
    );
    node.value(&listings[1], "Name");
    node.set(MAC, Response::Fails);
    seconds(300).await;
    assert_eq!(metadata.entries(TAGS), Vec::<String>::new(), "the value does not exist");
    assert_eq!(served(&metadata, &format!("{MACS}/{PRIMARY}/vpc-id")).await, None, "there is a service after all");
}

/// A listing and a refresh deadlocked when a listing took the read lock twice.
#[test]
fn listing_during_refresh_does_not_deadlock() {
    let metadata = NodeMetadata::new([], Allowed { paths: vec![REGION.to_owned()], groups: Vec::new() });
    let (ended, end) = mpsc::channel();
    let work: [fn(&NodeMetadata); 2] = [
        |metadata| drop(metadata.store(SPOT, Ok(Some(Bytes::from_static(b"{}"))))),
        |metadata| drop(metadata.entries("meta-data")),
    ];
    for step in work {
        let (metadata, ended) = (metadata.clone(), ended.clone());
        thread::spawn(move || {
            (0..100_000).for_each(|_| step(&metadata));
            ended.send(())
        });
    }
    for _ in work {
        end.recv_timeout(Duration::from_secs(60)).unwrap();
    }
}
