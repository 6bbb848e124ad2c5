//! The running agent, as it says itself on its admin port.

use std::net::SocketAddr;

use http::StatusCode;
use tokio::net::TcpStream;

use super::{finding::Finding, http::get};

const AGENT: &str = "agent";
const REPAIRS: &str = "agent-repairs";
const WATCHES: &str = "agent-watches";
const RECORDS: &str = "agent-records";
/// Between bookmarks the API server is silent for a minute.
const SILENT: f64 = 120.0;

pub(super) async fn check(admin: SocketAddr) -> Vec<Finding> {
    let ask = async |path: &str| get(TcpStream::connect(admin).await?, path).await;
    let ready = match ask("/readyz").await {
        Ok(ready) => ready,
        Err(error) => {
            return vec![Finding::failed(
                AGENT,
                format!("nobody answers on --admin-address {admin}: {error:#}"),
                "start the agent, or give this command the same --admin-address as to it (KIRSA_ADMIN_ADDRESS)",
            )];
        }
    };
    let said = String::from_utf8_lossy(ready.body()).trim().replace('\n', ", ");
    let mut findings = vec![match ready.status() {
        StatusCode::OK => Finding::ok(AGENT, format!("{admin} says {said}")),
        StatusCode::SERVICE_UNAVAILABLE => Finding::failed(
            AGENT,
            format!("not ready; pending: {said}"),
            "redirect: see the checks of that name; pods, service accounts: see those of the API server and of rbac",
        ),
        status => Finding::failed(
            AGENT,
            format!("{admin} answers {status}: that is not the agent"),
            "give this command the same --admin-address as to the agent",
        ),
    }];
    match ask("/metrics").await {
        Ok(metrics) => findings.extend(measured(&String::from_utf8_lossy(metrics.body()))),
        Err(error) => findings.push(Finding::skipped(REPAIRS, format!("no metrics: {error:#}"))),
    }
    findings
}

fn measured(metrics: &str) -> Vec<Finding> {
    let repaired = samples(metrics, "kirsa_redirect_repaired_total").map(|(_, value)| value).sum::<f64>();
    let repairs = if repaired > 0.0 {
        Finding::warning(
            REPAIRS,
            format!("somebody removed the redirect {repaired} times since the agent started"),
            "find who flushes rule sets (a firewall service, another agent, a reloading CNI): until it is put back, \
             pods reach the node's own metadata service",
        )
    } else {
        Finding::ok(REPAIRS, "nobody removed the redirect since the agent started")
    };
    let watches: Vec<_> = samples(metrics, "kirsa_watch_silence_seconds").collect();
    let silent: Vec<String> = watches
        .iter()
        .filter(|(_, silence)| *silence > SILENT)
        .map(|(labels, silence)| format!("{labels} for {silence:.0} s"))
        .collect();
    let heard = if silent.is_empty() {
        let watches = if watches.is_empty() { "there are none" } else { "all were heard within 120 s" };
        Finding::ok(WATCHES, watches)
    } else {
        let detail = format!("nothing heard of {}: new pods and changed annotations are not seen", silent.join(", "));
        Finding::warning(WATCHES, detail, "check the API server and the way to it; the agent's log says what failed")
    };
    [Some(repairs), Some(heard), records(metrics)].into_iter().flatten().collect()
}

/// What the agent made of the CNI records, if it reads any. Files alone are no proof that it knows a pod by one.
fn records(metrics: &str) -> Option<Finding> {
    let known: Vec<_> = samples(metrics, "kirsa_cni_records").collect();
    let foreign = samples(metrics, "kirsa_cni_records_skipped_total").filter(|(labels, _)| labels.contains("foreign"));
    let (read, foreign) =
        (known.iter().map(|(_, count)| count).sum::<f64>(), foreign.map(|(_, count)| count).sum::<f64>());
    if known.is_empty() {
        return None;
    }
    Some(if read == 0.0 && foreign > 0.0 {
        Finding::warning(
            RECORDS,
            format!("none of the CNI records names a pod ({foreign} were read in vain)"),
            "the container runtime leaves no K8S_POD_UID in them, so pods are known by the API server alone: late, and \
             a reused address may be taken for its former pod's (docs/failures.md); give --cni-results the folder of \
             libcni's cache (containerd, CRI-O)",
        )
    } else {
        Finding::ok(RECORDS, format!("the agent knows pods by {read} CNI records"))
    })
}

/// The series of one metric: labels and value.
fn samples<'a>(metrics: &'a str, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
    metrics.lines().filter_map(move |line| {
        let (series, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
        // Not a longer name.
        (series.is_empty() || series.starts_with('{')).then_some((series, value.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Verdict, *};

    #[test]
    fn repairs_and_silence_are_warnings() {
        let verdicts = |metrics: &str| measured(metrics).into_iter().map(|finding| finding.verdict).collect::<Vec<_>>();
        let quiet = "# HELP kirsa_redirect_repaired_total x\nkirsa_redirect_repaired_total 0\n\
                     kirsa_watch_silence_seconds{watch=\"pods\"} 59.5\n";
        assert_eq!(verdicts(quiet), [Verdict::Ok, Verdict::Ok]);
        let loud = quiet.replace("total 0", "total 3").replace("59.5", "121");
        assert_eq!(verdicts(&loud), [Verdict::Warning, Verdict::Warning]);
    }

    /// They are files like others: only the agent knows that it has learnt nothing from them.
    #[test]
    fn records_that_name_no_pod_are_a_warning() {
        let verdict = |in_use: u32, foreign: u32| {
            let metrics = format!(
                "kirsa_cni_records{{state=\"in_use\"}} {in_use}\nkirsa_cni_records{{state=\"stale\"}} 0\n\
                 kirsa_cni_records_skipped_total{{reason=\"foreign\"}} {foreign}\n\
                 kirsa_cni_records_skipped_total{{reason=\"loopback\"}} 7\nkirsa_cni_records_followed 1\n"
            );
            records(&metrics).map(|finding| finding.verdict)
        };
        assert_eq!(verdict(0, 2), Some(Verdict::Warning));
        assert_eq!(verdict(1, 2), Some(Verdict::Ok), "other files may lie there too");
        assert_eq!(verdict(0, 0), Some(Verdict::Ok), "a node without pods");
        assert!(records("kirsa_cni_records_followed 1\n").is_none(), "where none are read");
    }
}
