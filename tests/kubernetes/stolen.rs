//! What a stolen agent credential is worth, request by request, on the real API server, for both ways of minting.

mod requests;
mod tokens;

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use lab::apiserver::{ApiServer, ISSUER};
use serde_json::{Value, json};

use crate::rights::{Way, granted};
use crate::site::{AUDIENCE, blocking};
use crate::thief::{Attempt, Thief};

/// Two nodes with a pod each, one of kube-system on the second, and the agent's own on the first; UIDs.
struct Loot {
    api: &'static ApiServer,
    thief: Thief,
    way: Way,
    namespace: String,
    mine: String,
    theirs: String,
    system: String,
    agent: String,
}

/// What is tried, by what request, and the status by impersonation and by direct minting.
struct Row(&'static str, Attempt, [u16; 2]);

impl Loot {
    fn new(way: Way, name: &str) -> Result<Self> {
        let api = granted()?;
        let namespace = format!("{name}-{}", way.namespace());
        let (node, other) = (format!("{namespace}-mine"), format!("{namespace}-theirs"));
        let thief = Thief::of(api, way, &node)?;
        let place = |namespace: &str, name: &str, node: &str| {
            blocking(async {
                api.node(node).await?;
                api.service_account(namespace, name, &[]).await?;
                api.pod(namespace, name, name, node).await
            })
        };
        let agent = blocking(api.read::<Pod>(way.namespace(), &format!("kirsa-{node}")))?;
        Ok(Self {
            mine: place(&namespace, "mine", &node)?,
            theirs: place(&namespace, "theirs", &other)?,
            system: place("kube-system", &namespace, &other)?,
            agent: agent.and_then(|pod| pod.metadata.uid).context("the agent's pod")?,
            api,
            thief,
            way,
            namespace,
        })
    }

    fn node(&self) -> String {
        format!("{}-mine", self.namespace)
    }

    /// In the name that the agent uses to mint.
    fn as_agent(&self, attempt: Attempt) -> Attempt {
        if self.way == Way::Impersonate { attempt.in_name_of_node(&self.node()) } else { attempt }
    }

    fn judge(&self, rows: &[Row]) -> Result<()> {
        let mut wrong = Vec::new();
        for Row(what, attempt, expected) in rows {
            let expected = expected[usize::from(self.way == Way::Direct)];
            let (status, said) = self.thief.try_to(attempt)?;
            if status != expected {
                let said: String = said.chars().take(300).collect();
                wrong.push(format!("{what}: {status}, not {expected}: {said}"));
            }
        }
        ensure!(wrong.is_empty(), "{:?}\n{}", self.way, wrong.join("\n"));
        Ok(())
    }
}

#[test]
fn tokens_are_minted_for_pods_of_the_node_and_for_sts_alone() -> Result<()> {
    for way in Way::BOTH {
        let loot = Loot::new(way, "tokens")?;
        // The Node authorizer may not have seen the pod yet.
        loot.thief.wait_until(&tokens::of_its_own_pod(&loot), 201)?;
        loot.judge(&tokens::rows(&loot)?)?;
    }
    Ok(())
}

#[test]
fn nothing_is_read_but_pods_of_the_node_and_service_accounts_and_nothing_is_changed() -> Result<()> {
    for way in Way::BOTH {
        let loot = Loot::new(way, "requests")?;
        loot.judge(&requests::pods(&loot))?;
        loot.judge(&requests::forbidden(&loot))?;
    }
    Ok(())
}

/// By the API server's own account of them, beside what every service account may.
#[test]
fn the_rights_are_these_and_no_others() -> Result<()> {
    let common: &[&str] = &["serviceaccounts: get list watch"];
    for (way, own) in [
        (
            Way::Impersonate,
            &[
                "nodes: impersonate:associated-node",
                "pods: impersonate-on:associated-node:list impersonate-on:associated-node:watch",
                "serviceaccounts/token: impersonate-on:associated-node:create",
            ][..],
        ),
        (Way::Direct, &["pods: list watch", "serviceaccounts/token: create"][..]),
        (Way::Neither, &[][..]),
    ] {
        let of_anybody = rules(&nobody()?)?;
        let thief = Thief::of(granted()?, way, &format!("rights-{}", way.namespace()))?;
        let rules: BTreeSet<String> = rules(&thief)?.difference(&of_anybody).cloned().collect();
        let expected = common.iter().chain(own).map(|rule| (*rule).to_owned()).collect();
        ensure!(rules == expected, "{way:?}: {rules:#?}");
    }
    Ok(())
}

/// The token that the agent's pod finds in its volume names its node; one that does not is worth less still.
#[test]
fn a_token_of_the_agents_account_that_is_bound_to_no_node_mints_nothing() -> Result<()> {
    for way in Way::BOTH {
        let loot = Loot::new(way, "unbound")?;
        let admin = Thief::with(loot.api.admin_kubeconfig())?;
        let spec = json!({"audiences": [], "expirationSeconds": 600});
        let token = token_in(&admin.try_to(&Attempt::token_with(way.namespace(), "kirsa", spec))?)?;
        let kubeconfig = loot.api.token_kubeconfig(&loot.namespace, &token)?;
        let thief = Thief::with(&kubeconfig)?;
        let attempt = tokens::of_its_own_pod(&loot);
        let (status, said) = thief.try_to(&attempt)?;
        ensure!(status == 403, "{way:?}: {status} {said}");
        loot.thief.wait_until(&attempt, 201)?;
    }
    Ok(())
}

/// Not even for the account that it names.
#[test]
fn what_was_minted_opens_nothing_in_the_cluster() -> Result<()> {
    for way in Way::BOTH {
        let loot = Loot::new(way, "minted")?;
        let attempt = tokens::of_its_own_pod(&loot);
        loot.thief.wait_until(&attempt, 201)?;
        let token = token_in(&loot.thief.try_to(&attempt)?)?;
        let kubeconfig = loot.api.token_kubeconfig(&loot.namespace, &token)?;
        let (status, said) = Thief::with(&kubeconfig)?.try_to(&Attempt::get("/api"))?;
        ensure!(status == 401, "{way:?}: {status} {said}");
    }
    Ok(())
}

/// A service account without a role or a binding.
fn nobody() -> Result<Thief> {
    let api = granted()?;
    let uid = blocking(async {
        api.node("nobody").await?;
        api.service_account("nobody", "nobody", &[]).await?;
        match api.read::<Pod>("nobody", "nobody").await? {
            Some(pod) => pod.metadata.uid.context("a UID"),
            None => api.pod("nobody", "nobody", "nobody", "nobody").await,
        }
    })?;
    let token = blocking(api.token("nobody", "nobody", ("nobody", &uid), None))?;
    Thief::with(&api.token_kubeconfig("nobody", &token)?)
}

/// `resource: verb verb …`
fn rules(thief: &Thief) -> Result<BTreeSet<String>> {
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": "default"},
    });
    let (status, said) =
        thief.try_to(&Attempt::post("/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", review))?;
    ensure!(status == 201, "{said}");
    let said: Value = serde_json::from_str(&said)?;
    let words = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let rules = said["status"]["resourceRules"].as_array().context("rules")?;
    Ok(rules
        .iter()
        .map(|rule| format!("{}: {}", words(&rule["resources"]).join(" "), words(&rule["verbs"]).join(" ")))
        .collect())
}

fn token_in((status, said): &(u16, String)) -> Result<String> {
    ensure!(*status == 201, "{status} {said}");
    let answer: Value = serde_json::from_str(said)?;
    Ok(answer["status"]["token"].as_str().context("a token")?.into())
}
