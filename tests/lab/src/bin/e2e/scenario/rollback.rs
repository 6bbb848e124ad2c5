//! Back to the former version, and forward again: what one version signed the other one takes.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::{ASK, Scale};
use crate::{
    cluster::{Cluster, NAMESPACE},
    pods::Job,
};

const OVERLAY: &str = "tests/cluster/overlay";
/// `tests/e2e.sh` imports it from `FORMER`; without that it is the same build by another name.
const FORMER: &str = "localhost/kirsa:former";

/// Takes a session token of each version, and uses it under the next one.
fn script() -> String {
    format!(
        r#"{ASK}
        take() {{
          request='PUT /latest/api/token HTTP/1.1\r\nHost: imds\r\nConnection: close\r\nX-aws-ec2-metadata-token-ttl-seconds: 21600\r\n\r\n'
          token=$(printf "$request" | timeout 5 nc 169.254.169.254 80 | tail -n 1 | tr -d '\r')
          [ "$token" ] || {{ say "no session token came"; exit 1; }}
        }}
        use() {{ answer=$(timeout 5 wget -q -O - --header "X-aws-ec2-metadata-token: $1" $imds 2>&1); }}
        use nonsense && {{ say "any token is taken"; exit 1; }}
        take; first=$token
        for version in former current; do
          touch /before-$version
          until [ -e /$version ]; do sleep 0.2; done
          use $first || {{ say "under the $version version: $answer"; exit 1; }}
          use $token || {{ say "under the $version version, the last one's: $answer"; exit 1; }}
          take
        done"#
    )
}

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    let images = cluster.on("node1", &["ctr", "-n", "k8s.io", "images", "ls", "-q"])?;
    let another = images.lines().any(|image| image == FORMER);
    if !another {
        let current = images.lines().find(|image| image.starts_with("localhost/kirsa:")).context("no image")?;
        cluster.on("node1", &["ctr", "-n", "k8s.io", "images", "tag", current, FORMER])?;
    }
    cluster.identities(&["keeper".to_owned()])?;
    cluster.start(&[Job::new("keeper", "keeper", &script())])?;
    let outcome = back_and_forth(cluster);
    cluster.kubectl(&["apply", "-k", &cluster.manifests(OVERLAY)])?;
    cluster.agent_ready()?;
    if !another {
        cluster.on("node1", &["ctr", "-n", "k8s.io", "images", "rm", FORMER])?;
    }
    cluster.clear()?;
    outcome?;
    let which = if another { "the former version" } else { "the same version by another name" };
    Ok(format!("session tokens outlive the way back to {which}, and forward again"))
}

fn back_and_forth(cluster: &Cluster) -> anyhow::Result<()> {
    let exec = |what: &[&str]| cluster.kubectl(&[&["-n", NAMESPACE, "exec", "keeper", "--"], what].concat());
    let before = |version: &str| {
        let ended = || cluster.pods.wait("its end", Duration::ZERO, |seen| seen.get("keeper")?.ended.clone());
        cluster.until("a session token", Duration::from_secs(60), || {
            // Exits early only with something to say.
            if let Ok((message, _)) = ended() {
                return Ok(Some(Err(anyhow::anyhow!("{message}"))));
            }
            Ok(exec(&["ls", &format!("/before-{version}")]).ok().map(|_| Ok(())))
        })?
    };
    before("former")?;
    cluster.kubectl(&["-n", "kirsa", "set", "image", "daemonset/kirsa", &format!("kirsa={FORMER}")])?;
    cluster.agent_ready()?;
    let image = cluster.agent_pod("node1")?["spec"]["containers"][0]["image"].clone();
    ensure!(image == FORMER, "{image} runs");
    exec(&["touch", "/former"])?;
    before("current")?;
    cluster.kubectl(&["-n", "kirsa", "rollout", "undo", "daemonset/kirsa"])?;
    cluster.agent_ready()?;
    exec(&["touch", "/current"])?;
    let ended = cluster.pods.ended(&["keeper".to_owned()], Duration::from_secs(60))?;
    let (_, message, code) = ended.first().context("a pod")?;
    ensure!(*code == 0, "{message}");
    Ok(())
}
