//! Pods that do one thing and say how it went in their termination message, and what the API server shows of them.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::bail;
use futures::{StreamExt as _, future::join_all};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams, PostParams, WatchEvent, WatchParams},
};
use serde_json::json;

use crate::cluster::{Cluster, NAMESPACE, now};

/// What the watch has shown of a pod, with the time when it did (seconds since 1970).
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub uid: String,
    pub bound: Option<f64>,
    pub address: Option<(f64, String)>,
    pub running: bool,
    /// Termination message and exit code.
    pub ended: Option<(String, i32)>,
}

/// Everything in one namespace, as a watch shows it; by pod name, the last of that name.
#[derive(Clone)]
pub struct Pods {
    seen: Arc<(Mutex<HashMap<String, Seen>>, Condvar)>,
}

impl Pods {
    /// From a thread of its own: its clock must not wait for a scenario.
    pub fn watch(kubeconfig: PathBuf, namespace: &'static str) -> Self {
        let pods = Self { seen: Arc::default() };
        let watching = pods.clone();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async move {
                let client = lab::apiserver::client_of(&kubeconfig).await?;
                let api: Api<Pod> = Api::namespaced(client, namespace);
                loop {
                    let Ok(events) = api.watch(&WatchParams::default().timeout(290), "0").await else { continue };
                    let mut events = events.boxed();
                    while let Some(Ok(event)) = events.next().await {
                        watching.take(&event);
                    }
                }
                #[expect(unreachable_code, reason = "names the type")]
                anyhow::Ok(())
            })
        });
        pods
    }

    fn take(&self, event: &WatchEvent<Pod>) {
        let at = now();
        let mut seen = self.lock();
        match event {
            WatchEvent::Added(pod) | WatchEvent::Modified(pod) => {
                let uid = pod.uid().unwrap_or_default();
                let entry = seen.entry(pod.name_any()).or_default();
                if entry.uid != uid {
                    *entry = Seen { uid, ..Seen::default() };
                }
                if pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some()) {
                    entry.bound.get_or_insert(at);
                }
                let Some(status) = &pod.status else { return };
                if let Some(ip) = &status.pod_ip {
                    entry.address.get_or_insert_with(|| (at, ip.clone()));
                }
                let states = || status.container_statuses.iter().flatten().filter_map(|status| status.state.as_ref());
                entry.running = states().any(|state| state.running.is_some());
                if let Some(ended) = states().find_map(|state| state.terminated.as_ref()) {
                    entry.ended = Some((ended.message.clone().unwrap_or_default(), ended.exit_code));
                }
            }
            WatchEvent::Deleted(pod) => {
                let uid = pod.uid().unwrap_or_default();
                if seen.get(&pod.name_any()).is_some_and(|entry| entry.uid == uid) {
                    seen.remove(&pod.name_any());
                }
            }
            WatchEvent::Bookmark(_) | WatchEvent::Error(_) => {}
        }
        self.seen.1.notify_all();
    }

    /// Waits until the pods look so.
    pub fn wait<T>(
        &self,
        what: &str,
        within: Duration,
        look: impl Fn(&HashMap<String, Seen>) -> Option<T>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + within;
        let mut seen = self.lock();
        loop {
            if let Some(found) = look(&seen) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("not within {within:?}: {what}; the pods are {seen:?}");
            }
            seen = self.seen.1.wait_timeout(seen, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for the end of these.
    pub fn ended(&self, names: &[String], within: Duration) -> anyhow::Result<Vec<(Seen, String, i32)>> {
        self.wait(&format!("the end of {} pods", names.len()), within, |seen| {
            names
                .iter()
                .map(|name| {
                    let seen = seen.get(name)?;
                    let (message, code) = seen.ended.clone()?;
                    Some((seen.clone(), message, code))
                })
                .collect()
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Seen>> {
        self.seen.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pod that runs one script.
#[derive(Debug, Clone)]
pub struct Job {
    pub name: String,
    pub account: String,
    pub script: String,
    pub host_network: bool,
    /// Tolerates every taint.
    pub tolerant: bool,
}

impl Job {
    pub fn new(name: &str, account: &str, script: &str) -> Self {
        let (name, account, script) = (name.to_owned(), account.to_owned(), script.to_owned());
        Self { name, account, script, host_network: false, tolerant: true }
    }
}

impl Cluster {
    /// Creates them all at once.
    pub fn start(&self, jobs: &[Job]) -> anyhow::Result<()> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), NAMESPACE);
        let mut pods = Vec::new();
        for job in jobs {
            let tolerations = if job.tolerant { json!([{ "operator": "Exists" }]) } else { json!([]) };
            pods.push(serde_json::from_value::<Pod>(json!({
                "metadata": { "name": job.name },
                "spec": {
                    "serviceAccountName": job.account,
                    "automountServiceAccountToken": false,
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": 0,
                    "hostNetwork": job.host_network,
                    "tolerations": tolerations,
                    "containers": [{
                        "name": "job", "image": "kirsa-box:1", "imagePullPolicy": "Never",
                        "command": ["sh", "-c", job.script]
                    }]
                }
            }))?);
        }
        self.block_on(async {
            let params = PostParams::default();
            join_all(pods.iter().map(|pod| api.create(&params, pod))).await.into_iter().try_for_each(|one| {
                one?;
                anyhow::Ok(())
            })
        })
    }

    /// Deletes all pods of the scenarios and waits until they are gone.
    pub fn clear(&self) -> anyhow::Result<()> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), NAMESPACE);
        self.block_on(api.delete_collection(&DeleteParams::default().grace_period(0), &ListParams::default()))?;
        self.pods.wait("no pods", Duration::from_secs(60), |seen| seen.is_empty().then_some(()))
    }

    /// Deletes one pod and does not wait for it.
    pub fn delete(&self, name: &str) -> anyhow::Result<()> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), NAMESPACE);
        self.block_on(api.delete(name, &DeleteParams::default().grace_period(0)))?;
        Ok(())
    }

    /// Runs one pod to its end: its message and exit code.
    pub fn run(&self, job: Job) -> anyhow::Result<(String, i32)> {
        let name = job.name.clone();
        self.start(&[job])?;
        let ended = self.pods.ended(&[name], Duration::from_secs(60))?;
        self.clear()?;
        Ok(ended.into_iter().map(|(_, message, code)| (message, code)).next().unwrap_or_default())
    }
}
