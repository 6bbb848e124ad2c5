//! A token as the agent mints it, for a pod of this node that has a role, and what STS makes of it.
//!
//! The pod, its role and the token come from the agent's own stages, so that what works here works there. Of the token
//! only claims are shown; the session is dropped at once.

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
/// For a list of all service accounts of a cluster.
const WAIT: Duration = Duration::from_secs(10);
/// What kube-apiserver calls itself unless it is told otherwise.
const INTERNAL: &str = "https://kubernetes.default.svc";

/// The pods that have roles, and where their tokens come from.
pub(super) struct Pods {
    pub findings: Vec<Finding>,
    grants: Vec<Grant>,
    tokens: TokenSource,
}

pub(super) async fn of_file(path: &Path, config: &Config, metrics: Metrics) -> anyhow::Result<Pods> {
    let workloads = file::read(path)?;
    let (attributor, changes) = Attributor::new(metrics);
    let authorizer = Authorizer::new(Accounts::for_file(), config.defaults());
    authorizer.accounts().replace(&workloads, &config.defaults().role_annotation());
    file::apply(&workloads, &attributor);
    Ok(authorized(changes, &authorizer, TokenSource::File).await)
}

pub(super) async fn of_cluster(
    cluster: &Cluster,
    node: &str,
    config: &Config,
    metrics: Metrics,
) -> anyhow::Result<Pods> {
    let identity = cluster.identity.context("the agent may not mint tokens")?;
    let client = cluster.kubernetes.call_client(identity)?;
    let pods: Api<SlimPod> = Api::all(cluster.kubernetes.read_client(identity, pod::annotation_filter())?);
    let listed = pods.list(&ListParams::default().fields(&format!("spec.nodeName={node}"))).await;
    let listed = listed.context("this node's pods cannot be listed")?;
    let (attributor, changes) = Attributor::new(metrics.clone());
    listed.items.into_iter().filter_map(SlimPod::into_pod).for_each(|pod| attributor.apply(Event::Pod(pod)));

    let annotation = config.defaults().role_annotation();
    let keep = accounts::keep(&annotation);
    let reads = cluster.kubernetes.read_client(Identity::Agent, keep.clone())?;
    let accounts = Accounts::for_kubernetes(reads, move |name| attributor.has_pods_of(name));
    let authorizer = Authorizer::new(accounts, config.defaults());
    let reader = cluster.kubernetes.watch_client(Identity::Agent, metrics.watch("serviceaccounts"), keep)?;
    let read = tokio::sync::Notify::new();
    select! {
        () = authorizer.accounts().follow(reader, &annotation, |told| if matches!(told, AccountEvent::Synced(_)) { read.notify_one() }) => {}
        () = read.notified() => {}
        () = sleep(WAIT) => anyhow::bail!("the service accounts cannot be read within {WAIT:?}"),
    }
    let minting = Arc::new(TokenMinter::default());
    minting.set_client(client);
    Ok(authorized(changes, &authorizer, TokenSource::Kubernetes(minting)).await)
}

/// Asks for each service account once what the agent would ask when its pods do.
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
    let detail =
        format!("on this node: {pods}; their service accounts: {}, with a role: {}", accounts.len(), grants.len());
    findings.insert(0, Finding::ok(PODS, detail));
    Pods { findings, grants, tokens }
}

fn wrong_account(workload: &Workload, refusal: &Refusal) -> Finding {
    Finding::warning(PODS, format!("{workload} gets nothing: {}", refusal.detail), refusal.reason.info().advice)
}

impl Pods {
    /// `sts` where a session may be asked for.
    pub(super) async fn check(&self, config: &Config, sts: Option<&Sts>) -> Vec<Finding> {
        let Some(grant) = self.grants.first() else {
            return vec![Finding::skipped(
                TOKEN,
                "no pod of this node has a role: there is nothing to mint a token for",
            )];
        };
        let token = match self.tokens.token(grant).await {
            Ok(token) => token,
            Err(refusal) => return vec![failed(TOKEN, &refusal)],
        };
        let Some(claims) = Claims::decode_unverified(&token) else {
            let fix = "what is in the workload's tokenFile must be a JWT";
            return vec![Finding::failed(TOKEN, format!("that of {} is no JWT", grant.workload()), fix)];
        };
        let mut findings = vec![about_token(grant, &claims)];
        let exchanged = match sts {
            Some(sts) => Some(sts.assume_role(grant, &token).await),
            None => None,
        };
        findings.push(match &exchanged {
            Some(Ok(_)) => Finding::ok(ISSUER, format!("{}, which STS trusts", claims.issuer)),
            _ => about_issuer(&claims, config.sts.endpoint.is_some()),
        });
        findings.extend(exchanged.map(|exchanged| match exchanged {
            Ok(session) => {
                Finding::ok(EXCHANGE, format!("a session of {grant} until {}", session.expiration().iso8601()))
            }
            Err(refusal) => failed(EXCHANGE, &refusal),
        }));
        findings
    }
}

fn failed(check: &'static str, refusal: &Refusal) -> Finding {
    Finding::failed(check, refusal.detail.to_string(), refusal.reason.info().advice)
}

fn about_token(grant: &Grant, claims: &Claims) -> Finding {
    let (wanted, audiences) = (&grant.key().audience, claims.audiences());
    let shown = format!("that of {} has audience {}", grant.workload(), audiences.join(", "));
    if claims.expires.is_some_and(|expires| expires <= UnixTime::now()) {
        return Finding::failed(TOKEN, format!("{shown} and has expired"), "see what renews the workload's tokenFile");
    }
    if audiences.contains(wanted) {
        return Finding::ok(TOKEN, format!("{shown}, as configured"));
    }
    Finding::warning(
        TOKEN,
        format!("{shown}, not {wanted}"),
        "--audience, what issues the token, and a client id of the role's OIDC provider must be the same",
    )
}

fn about_issuer(claims: &Claims, own_sts: bool) -> Finding {
    let issuer = &claims.issuer;
    if issuer.starts_with(INTERNAL) {
        return Finding::warning(
            ISSUER,
            format!("{issuer} can be reached from inside the cluster only"),
            "STS must be given the issuer's keys, or reach them: set kube-apiserver's --service-account-issuer to a \
             public https URL that serves its discovery document",
        );
    }
    if !issuer.starts_with("https://") {
        let (detail, fix) = (format!("{issuer:?} is no https URL"), "AWS takes https issuers only");
        return if own_sts { Finding::warning(ISSUER, detail, fix) } else { Finding::failed(ISSUER, detail, fix) };
    }
    Finding::ok(ISSUER, format!("{issuer}, which must be an OIDC provider of the role's account"))
}
