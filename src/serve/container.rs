//! Container credentials, as the EKS Pod Identity agent serves them: for SDKs that were told of
//! `http://169.254.170.23/v1/credentials` and of a file with a token (AWS SDKs and Tools Reference Guide, "Container
//! credential provider").
//!
//! Two proofs of who is calling, and both must name the same pod: the kernel's view of the connection, and the token,
//! by the word of whoever issued it. Everything after that is the same as for the metadata service.

use std::{
    collections::HashMap,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use aws_lc_rs::digest::{SHA256, digest};
use bytes::Bytes;
use futures::{FutureExt, future::Shared};
use http::{HeaderMap, Response, header::AUTHORIZATION};
use http_body_util::Full;
use tokio::time::{Instant, timeout, timeout_at};
use zeroize::Zeroizing;

use super::{Server, answer, caller::Known, identity::Asked, imds::CREDENTIALS_HOLD, route::Route};
use crate::{
    attribute::{PodUid, Workload},
    refusal::{Reason, Refusal},
};

/// A review may take this long; SDKs give the whole request 1 or 2 s.
const REVIEW: Duration = Duration::from_secs(3);
/// How long the answer of a review holds: SDKs ask again every few minutes, a loop all the time.
const GOOD: Duration = Duration::from_secs(10);
/// Shorter, since the API server may learn of a new pod later than we do.
const BAD: Duration = Duration::from_secs(2);
/// Tokens of one pod that are under review or were refused at once, and that were found good. EKS's webhook gives a pod
/// one for all its containers; others may give each its own.
const TOKENS_OF_POD: usize = 8;
const GOOD_OF_POD: usize = 32;
/// Pods that are remembered before those without a review that holds are forgotten.
const PODS: usize = 256;

/// Asks whoever issued a token for the UID of the pod that it is bound to.
pub type Review = Box<dyn Fn(Zeroizing<String>) -> Reviewing + Send + Sync>;
/// A review under way.
pub type Reviewing = Pin<Box<dyn Future<Output = Result<Arc<str>, Refusal>> + Send>>;

/// Tokens and whose they are, for a few seconds: kept by their hashes, never themselves.
pub struct Tokens {
    review: Review,
    reviewed: Mutex<HashMap<PodUid, Vec<Reviewed>>>,
}

struct Reviewed {
    token: [u8; 32],
    asked: Instant,
    outcome: Shared<Reviewing>,
}

impl Reviewed {
    fn is_good(&self) -> bool {
        matches!(self.outcome.peek(), Some(Ok(_)))
    }

    fn holds(&self) -> bool {
        self.asked.elapsed() < if matches!(self.outcome.peek(), Some(Err(_))) { BAD } else { GOOD }
    }
}

impl Tokens {
    pub fn new(review: Review) -> Self {
        Self { review, reviewed: Mutex::default() }
    }

    /// The UID of the pod that the token is bound to, for a pod that presents it. However often it does, there is one
    /// review at a time, and one of few tokens: what a pod says must not become a load of the API server.
    async fn owner(&self, caller: &Workload, token: &str, until: Instant) -> Result<Arc<str>, Refusal> {
        let outcome = self.outcome(caller, token)?;
        let late = || Err(Refusal::new(Reason::ReviewUnavailable, "no answer in time"));
        timeout_at(until, outcome).await.unwrap_or_else(|_| late())
    }

    fn outcome(&self, caller: &Workload, token: &str) -> Result<Shared<Reviewing>, Refusal> {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
        let mut pods = self.reviewed.lock().unwrap_or_else(PoisonError::into_inner);
        if pods.len() >= PODS {
            pods.retain(|_, reviewed| reviewed.iter().any(Reviewed::holds));
        }
        let reviewed = pods.entry(caller.uid().clone()).or_default();
        reviewed.retain(Reviewed::holds);
        if let Some(known) = reviewed.iter().find(|known| known.token == hash) {
            return Ok(known.outcome.clone());
        }
        let good = reviewed.iter().filter(|known| known.is_good()).count();
        if good >= GOOD_OF_POD || reviewed.len() - good >= TOKENS_OF_POD {
            return Err(Refusal::new(Reason::TooManyRequests, format!("{caller} presents one token after the other")));
        }
        // A task of its own: whoever hangs up while it runs causes no second one.
        let review = tokio::spawn(timeout(REVIEW, (self.review)(Zeroizing::new(token.to_owned()))));
        let outcome: Reviewing = Box::pin(async move {
            let unanswered = |why: &str| Err(Refusal::new(Reason::ReviewUnavailable, why));
            match review.await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(_)) => unanswered("no answer within 3 s"),
                Err(_) => unanswered("the review ended without an answer"),
            }
        });
        let outcome = outcome.shared();
        // It is known to have failed also where nobody waits for it any more.
        tokio::spawn(outcome.clone());
        reviewed.push(Reviewed { token: hash, asked: Instant::now(), outcome: outcome.clone() });
        Ok(outcome)
    }
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokens")
    }
}

impl Server {
    /// Answers what was sent to the address of container credentials.
    pub(super) async fn container(
        &self,
        asked: &Asked<'_>,
        route: &Route<'_>,
    ) -> Result<Response<Full<Bytes>>, Refusal> {
        let tokens = self.container.as_ref().ok_or(Reason::NotRedirected)?;
        if *route != Route::ContainerCredentials {
            return Err(Reason::NotFound.into());
        }
        let editions = self.editions();
        let token = token(asked.headers)?;
        let workload = self.attributed(asked).await?;
        let until = asked.at + CREDENTIALS_HOLD;
        let owner = tokens.owner(&workload, token, until).await?;
        if *owner != *workload.uid().0 {
            let whose = if owner.is_empty() { "no pod".into() } else { format!("the pod with the UID {owner}") };
            return Err(Refusal::new(
                Reason::ContainerTokenMismatch,
                format!("{workload} presents a token of {whose}; its own UID is {}", workload.uid()),
            ));
        }
        let grant = self.authorize(&workload, until).await?;
        let known = Known { editions, session: self.cache.handle(&grant), workload, grant };
        let credential = self.credential(&asked.caller.peer, &known, until).await?;
        Ok(answer::document(credential.container()))
    }
}

/// The one `Authorization` header, which is the file's content and nothing else.
fn token(headers: &HeaderMap) -> Result<&str, Refusal> {
    let mut given = headers.get_all(AUTHORIZATION).iter();
    let (Some(token), None) = (given.next(), given.next()) else {
        return Err(Reason::ContainerTokenMissing.into());
    };
    // What is no JWT need not be reviewed.
    let token = token.to_str().unwrap_or_default();
    let parts = token.split('.').filter(|part| !part.is_empty()).count();
    let word = token.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if parts == 3 && word && token.matches('.').count() == 2 {
        Ok(token)
    } else {
        Err(Refusal::new(Reason::ContainerTokenRefused, "it is no JWT"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    fn tokens(answer: Result<&'static str, Reason>) -> (Arc<Tokens>, Arc<AtomicUsize>) {
        let reviews = Arc::new(AtomicUsize::new(0));
        let counted = reviews.clone();
        let review = move |_| -> Reviewing {
            counted.fetch_add(1, SeqCst);
            Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(100)).await;
                answer.map(Into::into).map_err(Into::into)
            })
        };
        (Arc::new(Tokens::new(Box::new(review))), reviews)
    }

    fn soon() -> Instant {
        Instant::now() + CREDENTIALS_HOLD
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_costs_one_review_in_a_while() {
        let (tokens, reviews) = tokens(Ok("uid-a"));
        let pod = Workload::sample("a", "uid-a", "sa");
        let ask = || tokens.owner(&pod, "a.b.c", soon());
        let (one, two) = tokio::join!(ask(), ask());
        assert_eq!((one.unwrap(), two.unwrap()), ("uid-a".into(), "uid-a".into()));
        for _ in 0..100 {
            ask().await.unwrap();
        }
        assert_eq!(reviews.load(SeqCst), 1);
        tokio::time::advance(GOOD).await;
        ask().await.unwrap();
        assert_eq!(reviews.load(SeqCst), 2, "and then again");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_hangs_up_causes_no_second_review() {
        let (tokens, reviews) = tokens(Ok("uid-a"));
        let pod = Workload::sample("a", "uid-a", "sa");
        for _ in 0..10 {
            assert!(timeout(Duration::from_millis(5), tokens.owner(&pod, "a.b.c", soon())).await.is_err());
        }
        tokens.owner(&pod, "a.b.c", soon()).await.unwrap();
        assert_eq!(reviews.load(SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn one_token_after_the_other_is_refused_and_troubles_no_other_pod() {
        let (tokens, reviews) = tokens(Err(Reason::ContainerTokenRefused));
        let (pod, other) = (Workload::sample("a", "uid-a", "sa"), Workload::sample("b", "uid-b", "sa"));
        let mut reasons = Vec::new();
        for n in 0..100 {
            reasons.push(tokens.owner(&pod, &format!("a.b.{n}"), soon()).await.unwrap_err().reason);
        }
        assert_eq!(reviews.load(SeqCst), TOKENS_OF_POD);
        assert!(reasons[TOKENS_OF_POD..].iter().all(|reason| *reason == Reason::TooManyRequests), "{reasons:?}");
        assert_eq!(tokens.owner(&other, "a.b.c", soon()).await.unwrap_err().reason, Reason::ContainerTokenRefused);
        tokio::time::advance(BAD).await;
        assert_eq!(tokens.owner(&pod, "a.b.1", soon()).await.unwrap_err().reason, Reason::ContainerTokenRefused);
    }

    /// As where each of many containers has a token of its own.
    #[tokio::test(start_paused = true)]
    async fn good_tokens_of_one_pod_do_not_keep_each_other_out_but_are_not_endless() {
        let (tokens, reviews) = tokens(Ok("uid-a"));
        let pod = Workload::sample("a", "uid-a", "sa");
        for n in 0..GOOD_OF_POD {
            tokens.owner(&pod, &format!("a.b.{n}"), soon()).await.unwrap();
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        let refusal = tokens.owner(&pod, "a.b.more", soon()).await.unwrap_err();
        assert_eq!((refusal.reason, reviews.load(SeqCst)), (Reason::TooManyRequests, GOOD_OF_POD));
        tokio::time::advance(GOOD).await;
        tokens.owner(&pod, "a.b.more", soon()).await.unwrap();
    }

    /// Where nobody polled it, a review that failed was remembered as if it had not.
    #[tokio::test(start_paused = true)]
    async fn a_review_that_failed_after_all_hung_up_is_not_the_answer_for_long() {
        let (tokens, reviews) = tokens(Err(Reason::ReviewUnavailable));
        let pod = Workload::sample("a", "uid-a", "sa");
        assert!(timeout(Duration::from_millis(5), tokens.owner(&pod, "a.b.c", soon())).await.is_err());
        tokio::time::sleep(BAD).await;
        assert!(tokens.owner(&pod, "a.b.c", soon()).await.is_err());
        assert_eq!(reviews.load(SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_review_without_an_answer_ends() {
        let review = |_| -> Reviewing { Box::pin(std::future::pending()) };
        let tokens = Tokens::new(Box::new(review));
        let pod = Workload::sample("a", "uid-a", "sa");
        assert_eq!(tokens.owner(&pod, "a.b.c", soon()).await.unwrap_err().reason, Reason::ReviewUnavailable);
    }

    #[test]
    fn the_header_is_one_jwt_and_nothing_else() {
        let headers =
            |values: &[&str]| values.iter().map(|value| (AUTHORIZATION, value.parse().unwrap())).collect::<HeaderMap>();
        assert_eq!(token(&headers(&["e30.e30.c2ln"])).unwrap(), "e30.e30.c2ln");
        for (values, reason) in [
            (&[][..], Reason::ContainerTokenMissing),
            (&["e30.e30.c2ln", "e30.e30.c2ln"], Reason::ContainerTokenMissing),
            (&["Bearer e30.e30.c2ln"], Reason::ContainerTokenRefused),
            (&["e30.e30."], Reason::ContainerTokenRefused),
            (&["e30.e30.c2ln.c2ln"], Reason::ContainerTokenRefused),
            (&["e30.e30.c2ln "], Reason::ContainerTokenRefused),
            (&[""], Reason::ContainerTokenRefused),
        ] {
            assert_eq!(token(&headers(values)).unwrap_err().reason, reason, "{values:?}");
        }
    }
}
