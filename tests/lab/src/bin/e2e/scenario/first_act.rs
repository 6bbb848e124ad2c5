//! Pods whose first act is a request for credentials, with one second and one attempt.

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, ensure};

use super::{ASK, Scale};
use crate::{
    cluster::Cluster,
    figures::{head, row, spread},
    pods::Job,
};

const AT_ONCE: usize = 20;
/// About what AWS's regional endpoints take.
const STS_TAKES: Duration = Duration::from_millis(120);

/// With the node's CNI records: every one of them is served.
pub fn run(cluster: &Cluster, scale: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    let figures = measure(cluster, scale)?;
    ensure!(figures.failed.is_empty(), "{}: {:?}", figures.told(), figures.failed);
    Ok(figures.told())
}

/// By what the API server shows alone: a measurement, in which not all can be served.
pub fn without_records(cluster: &Cluster, scale: &Scale) -> anyhow::Result<String> {
    let set = |variable: &str| -> anyhow::Result<()> {
        cluster.kubectl(&["-n", "kirsa", "set", "env", "daemonset/kirsa", variable])?;
        cluster.agent_ready()
    };
    set("KIRSA_CNI_RESULTS=none")?;
    let figures = measure(cluster, scale);
    set("KIRSA_CNI_RESULTS-")?;
    Ok(figures?.told())
}

fn measure(cluster: &Cluster, scale: &Scale) -> anyhow::Result<Figures> {
    cluster.sts_takes(STS_TAKES)?;
    cluster.forget_sts_calls()?;
    // An identity each: nobody can have another's by luck.
    let names: Vec<String> = (0..scale.first_act).map(|n| format!("first-{n}")).collect();
    for some in names.chunks(100) {
        cluster.identities(some)?;
    }
    let records = Records::watch(cluster.disk("node1", "/var/lib/cni/results"));
    let script = format!("start=$EPOCHREALTIME; {ASK} ask || exit 1; say $start $EPOCHREALTIME $key; sleep 2");
    let mut figures = Figures::default();
    for some in names.chunks(AT_ONCE) {
        let jobs: Vec<Job> = some.iter().map(|name| Job::new(name, name, &script)).collect();
        cluster.start(&jobs)?;
        let ended = cluster.pods.ended(some, Duration::from_secs(180))?;
        let issued = cluster.issued()?;
        for (name, (seen, message, code)) in some.iter().zip(ended) {
            if code != 0 {
                figures.failed.push(format!("{name}: {}", message.trim()));
                continue;
            }
            let mut words = message.split_whitespace();
            let mut number = || words.next().and_then(|word| word.parse::<f64>().ok()).context("a time");
            let (start, end) = (number()?, number()?);
            let role = words.next().and_then(|key| issued.get(key));
            ensure!(role == Some(&Cluster::role_arn(name)), "{name} was given credentials of {role:?}");
            figures.start.insert(name.clone(), start);
            figures.answer.push((end - start) * 1e3);
            figures.bound.extend(seen.bound.map(|at| (start - at) * 1e3));
            figures.shown.extend(seen.address.map(|(at, _)| (at - start) * 1e3));
            figures.uids.push((seen.uid, start));
        }
        cluster.clear()?;
    }
    figures.show(cluster, &records.end())?;
    Ok(figures)
}

#[derive(Default)]
struct Figures {
    failed: Vec<String>,
    start: HashMap<String, f64>,
    uids: Vec<(String, f64)>,
    answer: Vec<f64>,
    bound: Vec<f64>,
    shown: Vec<f64>,
    /// Had their credentials before they asked.
    warm: usize,
}

impl Figures {
    fn total(&self) -> usize {
        self.answer.len() + self.failed.len()
    }

    fn told(&self) -> String {
        let (served, total, warm) = (self.answer.len(), self.total(), self.warm);
        format!(
            "{served} of {total} have their own credentials, {warm} warm; answered in {}",
            spread(self.answer.clone())
        )
    }

    /// Each interval, as a table.
    fn show(&mut self, cluster: &Cluster, records: &HashMap<String, f64>) -> anyhow::Result<()> {
        let mut ready = Vec::new();
        for call in cluster.sts_calls()? {
            let name = call.role_arn.rsplit('/').next().unwrap_or_default();
            if let (Some(start), Some(decided)) = (self.start.get(name), call.decided) {
                #[expect(clippy::cast_precision_loss)]
                let done = decided.as_millisecond() as f64 / 1e3;
                ready.push((start - done) * 1e3);
            }
        }
        self.warm = ready.iter().filter(|early| **early > 0.0).count();
        let record = self.uids.iter().filter_map(|(uid, start)| Some((start - records.get(uid)?) * 1e3)).collect();
        let late = self.shown.iter().filter(|after| **after > 800.0).count();
        eprintln!("first act of {} pods, {AT_ONCE} at once; {late} were shown later than 800 ms", self.total());
        eprintln!("{}", head("ms before the first instruction"));
        eprintln!("{}", row("bound to the node", self.bound.clone()));
        eprintln!("{}", row("credentials cached", ready));
        eprintln!("{}", row("CNI record written", record));
        eprintln!("{}", head("ms after the first instruction"));
        eprintln!("{}", row("both responses received", self.answer.clone()));
        eprintln!("{}", row("address shown by the API server", self.shown.clone()));
        Ok(())
    }
}

/// When the runtime wrote the record of which pod. Records go away with their pods, so somebody has to look all along.
struct Records {
    stop: Arc<AtomicBool>,
    looking: JoinHandle<HashMap<String, f64>>,
}

impl Records {
    fn watch(folder: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let looking = thread::spawn(move || {
            let mut known: HashSet<PathBuf> = HashSet::new();
            let mut written = HashMap::new();
            while !stopped.load(Ordering::Relaxed) {
                for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                    let path = entry.path();
                    if known.contains(&path) || path.to_string_lossy().ends_with("-lo") {
                        continue;
                    }
                    let (Ok(text), Ok(about)) = (fs::read_to_string(&path), entry.metadata()) else { continue };
                    let Some((_, rest)) = text.split_once(r#""K8S_POD_UID",""#) else { continue };
                    #[expect(clippy::cast_precision_loss)]
                    let at = about.mtime() as f64 + about.mtime_nsec() as f64 / 1e9;
                    written.insert(rest.chars().take_while(|c| *c != '"').collect(), at);
                    known.insert(path);
                }
                thread::sleep(Duration::from_millis(20));
            }
            written
        });
        Self { stop, looking }
    }

    fn end(self) -> HashMap<String, f64> {
        self.stop.store(true, Ordering::Relaxed);
        self.looking.join().unwrap_or_default()
    }
}
