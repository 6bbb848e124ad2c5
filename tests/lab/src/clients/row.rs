//! One client in every condition: a row of the matrix, on a node of its own.

use std::{net::TcpListener, path::Path, thread, time::Duration};

use anyhow::{Result, ensure};

use super::{
    cell::{Cell, Verdict},
    client::Client,
    condition::Condition,
    run::{Call, Running},
};
use crate::{
    agent::{Agent, field},
    namespace::BASE,
    net::Pod,
    poll::poll,
    site::{ACCOUNT, Site},
    sts::{Fault, ObjectStore},
    workloads::Workload,
};

/// How long ago a pod was bound when its program starts.
const SINCE_BINDING: Duration = Duration::from_secs(1);
/// Enough for anything that the agent does on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// `agent` is the binary of the agent. The conditions are met in the order of [`Condition::ALL`].
pub fn row(client: &Client, agent: &Path, wanted: &[Condition]) -> Result<Vec<(Condition, Cell)>> {
    let mut row = Row::new(client, agent, wanted)?;
    let agent = row.site.start()?;
    // A pod that is bound without a role and gets one later is not fetched ahead. The agent knows none of them from
    // its start, or it would look again at a moment of its choice.
    let mark = agent.process().mark();
    let late: Vec<_> = wanted.iter().filter(|condition| row.is_late(**condition)).collect();
    for condition in &late {
        row.site.put(Workload::new(row.pod(**condition), &row.name(**condition)))?;
    }
    if !late.is_empty() {
        agent.wait_for_log_after(mark, |entry| entry["workloads"] == late.len())?;
        // Who fetches ahead looks at pods in the order of their coming: it has looked at these once it is at the next.
        let next = row.site.pod_with_role("next")?;
        poll("a pod is fetched for ahead", PATIENCE, || (!row.site.calls(next.name()).is_empty()).then_some(()))?;
        row.pods.push(next);
    }
    row.agent = Some(agent);
    let mut cells = Vec::new();
    for condition in wanted {
        cells.push((*condition, row.cell(*condition)?));
    }
    row.site.no_pod_got_outside()?;
    if let Some(agent) = row.agent.take() {
        agent.stop()?;
    }
    Ok(cells)
}

struct Row<'a> {
    client: &'a Client,
    site: Site,
    store: ObjectStore,
    pods: Vec<Pod>,
    agent: Option<Agent>,
}

impl<'a> Row<'a> {
    fn new(client: &'a Client, agent: &Path, wanted: &[Condition]) -> Result<Self> {
        let mut site = Site::new(agent)?;
        // So that an agent that was started again fetches for hardly a pod before it asks.
        site.options = site.options.flag("--start-window", "900");
        let store = site.sts.start_store(TcpListener::bind((BASE, 0))?)?;
        let mut row = Self { client, site, store, pods: Vec::new(), agent: None };
        for condition in wanted.iter().filter(|condition| **condition != Condition::Warm) {
            row.pods.push(row.site.stranger(&row.name(*condition))?);
        }
        Ok(row)
    }

    /// That of the pod and of its service account; a second program is in the pod of the first.
    fn name(&self, condition: Condition) -> String {
        let condition = if condition == Condition::Warm { Condition::Cold(0) } else { condition };
        format!("{}-{}", self.client.name.replace('.', "-"), condition.name())
    }

    fn pod(&self, condition: Condition) -> &Pod {
        let name = self.name(condition);
        let pod = self.pods.iter().find(|pod| pod.name() == name);
        pod.expect("a pod for each condition, and what is warm was cold before")
    }

    fn is_late(&self, condition: Condition) -> bool {
        !matches!(condition, Condition::Bound(_) | Condition::Warm)
    }

    fn cell(&mut self, condition: Condition) -> Result<Cell> {
        self.prepare(condition)?;
        let agent = self.agent.take();
        let (sts, store) = (self.site.sts.url(), self.store.url());
        let mark = self.site.sts.acts().len();
        let mut running = Running::start(self.client, self.pod(condition), &sts, &store)?;
        let cell = self.judge(condition, running.call()?, mark);
        if condition != Condition::Restarted {
            drop(running);
            self.agent = agent;
            return Ok(cell);
        }
        if cell.verdict != Verdict::OwnRole {
            self.agent = agent;
            return Ok(Cell { verdict: Verdict::Wrong(format!("before the restart: {:?}", cell.verdict)), ..cell });
        }
        agent.map(Agent::stop).transpose()?;
        let agent = self.site.start()?;
        let mark = self.site.sts.acts().len();
        let cell = self.judge(condition, running.again()?, mark);
        drop(running);
        self.agent = Some(agent);
        Ok(cell)
    }

    /// Makes the condition so for its pod.
    fn prepare(&self, condition: Condition) -> Result<()> {
        if matches!(condition, Condition::Warm | Condition::NoRole) {
            return Ok(());
        }
        let pod = self.pod(condition);
        if let Some(effect) = condition.effect() {
            self.site.sts.inject(Fault::always(effect).of_role(&self.site.arn(pod.name())));
        }
        let mut workload = self.site.with_role(pod)?;
        if condition == Condition::ImdsV2Required {
            workload = workload.annotation("kirsa.dev/require-imdsv2", "true");
        }
        let agent = self.agent.as_ref().expect("an agent that runs");
        let mark = agent.process().mark();
        self.site.put(workload)?;
        agent.wait_for_log_after(mark, |entry| field(entry, "message") == Some("workloads file was read"))?;
        if matches!(condition, Condition::Bound(_)) {
            // The condition is a time.
            thread::sleep(SINCE_BINDING);
        } else {
            ensure!(self.site.calls(pod.name()).is_empty(), "{} is not cold", pod.name());
        }
        Ok(())
    }

    fn judge(&self, condition: Condition, call: Call, mark: usize) -> Cell {
        let pod = self.pod(condition);
        let name = pod.name();
        let own = format!("arn:aws:sts::{ACCOUNT}:assumed-role/{name}-role/default.{name}");
        let mut acts = self.site.sts.acts().split_off(mark);
        acts.retain(|act| act.from == pod.ip());
        Cell::new(call, &own, &acts)
    }
}
