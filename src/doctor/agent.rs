//! Checks the running agent through its admin port.

use std::net::SocketAddr;

use http::StatusCode;
use tokio::net::TcpStream;

use super::{finding::Finding, http::get};

const AGENT: &str = "agent";
const REPAIRS: &str = "agent-repairs";
const WATCHES: &str = "agent-watches";
const RECORDS: &str = "agent-records";
/// Maximum silence of a watch in seconds. The API server sends a bookmark about every minute.
const MAX_SILENCE: f64 = 120.0;

pub(super) async fn check(admin: SocketAddr) -> Vec<Finding> {
    let fetch = async |path: &str| get(TcpStream::connect(admin).await?, path).await;
    let ready = match fetch("/readyz").await {
        Ok(ready) => ready,
        Err(error) => {
            return vec![Finding::failed(
                AGENT,
                format!("no agent answers on --admin-address {admin}: {error:#}"),
                "start the agent, or pass this command the agent's --admin-address (KIRSA_ADMIN_ADDRESS)",
            )];
        }
    };
    let body = String::from_utf8_lossy(ready.body()).trim().replace('\n', ", ");
    let mut findings = vec![match ready.status() {
        StatusCode::OK => Finding::ok(AGENT, format!("the agent on {admin} is {body}")),
        StatusCode::SERVICE_UNAVAILABLE => Finding::failed(
            AGENT,
            format!("not ready; pending: {body}"),
            "for \"redirect\", see the redirect checks; for \"pods\" and \"service accounts\", see the api-server and \
             rbac checks",
        ),
        status => Finding::failed(
            AGENT,
            format!("{admin} answers {status}, so it is not the agent"),
            "pass this command the agent's --admin-address (KIRSA_ADMIN_ADDRESS)",
        ),
    }];
    match fetch("/metrics").await {
        Ok(metrics) => findings.extend(check_metrics(&String::from_utf8_lossy(metrics.body()))),
        Err(error) => findings.push(Finding::skipped(REPAIRS, format!("the metrics cannot be read: {error:#}"))),
    }
    findings
}

fn check_metrics(metrics: &str) -> Vec<Finding> {
    let repaired = samples(metrics, "kirsa_redirect_repaired_total").map(|(_, value)| value).sum::<f64>();
    let repairs = if repaired > 0.0 {
        Finding::warning(
            REPAIRS,
            format!("the redirect was removed {repaired} times since the agent started"),
            "find what flushes rule sets (a firewall service, another agent, a reloading CNI plugin): until the agent \
             repairs the redirect, pods get no credentials",
        )
    } else {
        Finding::ok(REPAIRS, "the redirect was not removed since the agent started")
    };
    let watches: Vec<_> = samples(metrics, "kirsa_watch_silence_seconds").collect();
    let silent: Vec<String> = watches
        .iter()
        .filter(|(_, silence)| *silence > MAX_SILENCE)
        .map(|(labels, silence)| format!("{labels} for {silence:.0} s"))
        .collect();
    let activity = if silent.is_empty() {
        let detail = if watches.is_empty() { "the agent has no watch" } else { "all watches got data within 120 s" };
        Finding::ok(WATCHES, detail)
    } else {
        let detail = format!("no data on {}: the agent misses new pods and changed annotations", silent.join(", "));
        Finding::warning(WATCHES, detail, "check API-server health and connectivity; the agent's log has the error")
    };
    [Some(repairs), Some(activity), check_records(metrics)].into_iter().flatten().collect()
}

/// Checks whether the agent identifies pods by CNI records. Files in the folder alone do not prove that.
fn check_records(metrics: &str) -> Option<Finding> {
    let records: Vec<_> = samples(metrics, "kirsa_cni_records").collect();
    let foreign = samples(metrics, "kirsa_cni_records_skipped_total").filter(|(labels, _)| labels.contains("foreign"));
    let (used, foreign) =
        (records.iter().map(|(_, count)| count).sum::<f64>(), foreign.map(|(_, count)| count).sum::<f64>());
    if records.is_empty() {
        return None;
    }
    Some(if used == 0.0 && foreign > 0.0 {
        Finding::warning(
            RECORDS,
            format!("none of the CNI records names a pod ({foreign} were skipped)"),
            "the container runtime writes no K8S_POD_UID into them, so the agent knows pods only from the API server: \
             late, and a reused address may be attributed to its previous pod (docs/failures.md); set --cni-results to \
             the folder of libcni's cache (containerd, CRI-O)",
        )
    } else {
        Finding::ok(RECORDS, format!("the agent identifies pods by {used} CNI records"))
    })
}

/// Returns the series of one metric, each with its labels and value.
fn samples<'a>(metrics: &'a str, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
    metrics.lines().filter_map(move |line| {
        let (series, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
        // Skip metrics whose name is longer.
        (series.is_empty() || series.starts_with('{')).then_some((series, value.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Verdict, *};

    #[test]
    fn repairs_and_silence_are_warnings() {
        let verdicts =
            |metrics: &str| check_metrics(metrics).into_iter().map(|finding| finding.verdict).collect::<Vec<_>>();
        let quiet = "# HELP kirsa_redirect_repaired_total x\nkirsa_redirect_repaired_total 0\n\
                     kirsa_watch_silence_seconds{watch=\"pods\"} 59.5\n";
        assert_eq!(verdicts(quiet), [Verdict::Ok, Verdict::Ok]);
        let loud = quiet.replace("total 0", "total 3").replace("59.5", "121");
        assert_eq!(verdicts(&loud), [Verdict::Warning, Verdict::Warning]);
    }

    /// Only the agent's metrics show that records without a pod UID are useless.
    #[test]
    fn records_that_name_no_pod_are_a_warning() {
        let verdict = |in_use: u32, foreign: u32| {
            let metrics = format!(
                "kirsa_cni_records{{state=\"in_use\"}} {in_use}\nkirsa_cni_records{{state=\"stale\"}} 0\n\
                 kirsa_cni_records_skipped_total{{reason=\"foreign\"}} {foreign}\n\
                 kirsa_cni_records_skipped_total{{reason=\"loopback\"}} 7\nkirsa_cni_records_followed 1\n"
            );
            check_records(&metrics).map(|finding| finding.verdict)
        };
        assert_eq!(verdict(0, 2), Some(Verdict::Warning));
        assert_eq!(verdict(1, 2), Some(Verdict::Ok), "the folder may contain other files");
        assert_eq!(verdict(0, 0), Some(Verdict::Ok), "a node without pods");
        assert!(check_records("kirsa_cni_records_followed 1\n").is_none(), "the agent reads no records");
    }
}
