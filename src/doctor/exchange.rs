//! Mints a token for one of this node's pods that has a role, and exchanges it at STS.
//!
//! Pod, role and token come from the agent's own stages, so what works here works in the agent. The findings show only
//! claims of the token, and the session is dropped at once.

use std::{collections::HashSet, path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use kube::{Api, api::ListParams};
use tokio::{select, sync::mpsc::UnboundedReceiver, time::sleep};

use super::{cluster::Cluster, finding::Finding};
use crate::{
    attribute::{
        Attributor, Change, Event, Workload, file,
        pod::{self, SlimPod},
    },
    authorize::{AccountEvent, Accounts, Authorizer, Grant, accounts},
    clock::UnixTime,
    config::Config,
    exchange::{
        claims::Claims,
        sts::Sts,
        token::{TokenMinter, TokenSource},
    },
    kubernetes::Identity,
    observe::Metrics,
    refusal::{Reason, Refusal},
};

const PODS: &str = "pods";
const TOKEN: &str = "token";
const ISSUER: &str = "issuer";
const EXCHANGE: &str = "exchange";
/// Deadline for listing all service accounts of the cluster.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The issuer of kube-apiserver by default, which AWS cannot reach.
const INTERNAL_ISSUER: &str = "https://kubernetes.default.svc";

/// The grants of this node's pods, and the source of their tokens.
pub(super) struct Pods {
    pub findings: Vec<Finding>,
    grants: Vec<Grant>,
    tokens: TokenSource,
}

pub(super) async fn pods_from_file(path: &Path, config: &Config, metrics: Metrics) -> anyhow::Result<Pods> {
    let workloads = file::read(path)?;
    let (attributor, changes) = Attributor::new(metrics);
    let authorizer = Authorizer::new(Accounts::for_file(), config.defaults());
    authorizer.accounts().replace(&workloads, &config.defaults().role_annotation());
    file::apply(&workloads, &attributor);
    Ok(authorized(changes, &authorizer, TokenSource::File).await)
}

pub(super) async fn pods_from_cluster(
    cluster: &Cluster,
    node: &str,
    config: &Config,
    metrics: Metrics,
) -> anyhow::Result<Pods> {
    let identity = cluster.identity.context("the agent has no permission to mint tokens")?;
    let client = cluster.kubernetes.call_client(identity)?;
    let pods: Api<SlimPod> = Api::all(cluster.kubernetes.read_client(identity, pod::annotation_filter())?);
    let listed = pods.list(&ListParams::default().fields(&format!("spec.nodeName={node}"))).await;
    let listed = listed.context("cannot list this node's pods")?;
    let (attributor, changes) = Attributor::new(metrics.clone());
    listed.items.into_iter().filter_map(SlimPod::into_pod).for_each(|pod| attributor.apply(Event::Pod(pod)));

    let annotation = config.defaults().role_annotation();
    let keep = accounts::keep(&annotation);
    let reads = cluster.kubernetes.read_client(Identity::Agent, keep.clone())?;
    let accounts = Accounts::for_kubernetes(reads, move |name| attributor.has_pods_of(name));
    let authorizer = Authorizer::new(accounts, config.defaults());
    let reader = cluster.kubernetes.watch_client(Identity::Agent, metrics.watch("serviceaccounts"), keep)?;
    let synced = tokio::sync::Notify::new();
    let notify = |event| {
        if matches!(event, AccountEvent::Synced(_)) {
            synced.notify_one();
        }
    };
    select! {
        () = authorizer.accounts().follow(reader, &annotation, notify) => {}
        () = synced.notified() => {}
        () = sleep(TIMEOUT) => anyhow::bail!("cannot list the service accounts within {TIMEOUT:?}"),
    }
    let minter = Arc::new(TokenMinter::default());
    minter.set_client(client);
    Ok(authorized(changes, &authorizer, TokenSource::Kubernetes(minter)).await)
}

/// Authorizes one pod of each service account, as the agent does when a pod requests credentials.
async fn authorized(mut changes: UnboundedReceiver<Change>, authorizer: &Authorizer, tokens: TokenSource) -> Pods {
    let (mut accounts, mut grants, mut findings) = (HashSet::new(), Vec::new(), Vec::new());
    let mut pods = 0;
    while let Ok(change) = changes.try_recv() {
        let Change::Bound(workload) = change else { continue };
        pods += 1;
        if !accounts.insert(workload.service_account().clone()) {
            continue;
        }
        match authorizer.authorize(&workload).await {
            Ok(grant) => grants.push(grant),
            Err(refusal) if refusal.reason == Reason::NoRole => {}
            Err(refusal) => findings.push(wrong_account(&workload, &refusal)),
        }
    }
    let detail = format!("{pods} pods with {} service accounts, {} with a role", accounts.len(), grants.len());
    findings.insert(0, Finding::ok(PODS, detail));
    Pods { findings, grants, tokens }
}

fn wrong_account(workload: &Workload, refusal: &Refusal) -> Finding {
    let detail = format!("{workload} gets no credentials: {}", refusal.detail);
    Finding::warning(PODS, detail, refusal.reason.info().advice)
}

impl Pods {
    /// Checks the token of one pod, and exchanges it if `sts` is given.
    pub(super) async fn check(&self, config: &Config, sts: Option<&Sts>) -> Vec<Finding> {
        let Some(grant) = self.grants.first() else {
            return vec![Finding::skipped(TOKEN, "no pod on this node has a role, so no token was minted")];
        };
        let token = match self.tokens.token(grant).await {
            Ok(token) => token,
            Err(refusal) => return vec![failed(TOKEN, &refusal)],
        };
        let Some(claims) = Claims::decode_unverified(&token) else {
            let fix = "write a JWT to the workload's tokenFile";
            return vec![Finding::failed(TOKEN, format!("the token of {} is not a JWT", grant.workload()), fix)];
        };
        let mut findings = vec![check_token(grant, &claims)];
        let session = match sts {
            Some(sts) => Some(sts.assume_role(grant, &token).await),
            None => None,
        };
        findings.push(match &session {
            Some(Ok(_)) => Finding::ok(ISSUER, format!("STS trusts {}", claims.issuer)),
            _ => check_issuer(&claims, config.sts.endpoint.is_some()),
        });
        findings.extend(session.map(|session| match session {
            Ok(session) => Finding::ok(
                EXCHANGE,
                format!("STS returned a session of {grant} until {}", session.expiration().iso8601()),
            ),
            Err(refusal) => failed(EXCHANGE, &refusal),
        }));
        findings
    }
}

fn failed(check: &'static str, refusal: &Refusal) -> Finding {
    Finding::failed(check, refusal.detail.to_string(), refusal.reason.info().advice)
}

fn check_token(grant: &Grant, claims: &Claims) -> Finding {
    let (expected, audiences) = (&grant.key().audience, claims.audiences());
    let token = format!("the token of {} has audience {}", grant.workload(), audiences.join(", "));
    if claims.expires.is_some_and(|expires| expires <= UnixTime::now()) {
        let fix = "check the process that renews the workload's tokenFile";
        return Finding::failed(TOKEN, format!("{token} and has expired"), fix);
    }
    if audiences.contains(expected) {
        return Finding::ok(TOKEN, format!("{token}, as configured"));
    }
    Finding::warning(
        TOKEN,
        format!("{token}, not {expected}"),
        "use the same audience in --audience, in the token, and in the client IDs of the role's OIDC provider",
    )
}

fn check_issuer(claims: &Claims, custom_sts: bool) -> Finding {
    let issuer = &claims.issuer;
    if issuer.starts_with(INTERNAL_ISSUER) {
        return Finding::warning(
            ISSUER,
            format!("{issuer} is reachable only from inside the cluster"),
            "set kube-apiserver's --service-account-issuer to a public https URL that serves its discovery document, \
             or upload the issuer's keys to STS",
        );
    }
    if !issuer.starts_with("https://") {
        let (detail, fix) = (format!("{issuer:?} is not an https URL"), "use an https issuer: AWS accepts no other");
        return if custom_sts { Finding::warning(ISSUER, detail, fix) } else { Finding::failed(ISSUER, detail, fix) };
    }
    Finding::ok(ISSUER, format!("{issuer}; it must be an OIDC provider in the role's account"))
}
