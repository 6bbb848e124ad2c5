//! Container credentials, as the EKS Pod Identity agent serves them: for SDKs that are configured with
//! `http://169.254.170.23/v1/credentials` and a token file
//! (<https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html>).
//!
//! The caller is identified twice, and both must name the same pod: by the kernel's view of the connection, and by the
//! token, which its issuer reviews. From there on the guards are those of the metadata service.

use std::{collections::HashMap, sync::Arc, time::Duration};

use aws_lc_rs::digest::{SHA256, digest};
use bytes::Bytes;
use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use http::{HeaderMap, Response, header::AUTHORIZATION};
use http_body_util::Full;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout, timeout_at};
use zeroize::Zeroizing;

use super::{
    Server, connection_state::CachedGrant, guards::RequestContext, imds::CREDENTIALS_HOLD, response, route::Route,
};
use crate::{
    attribute::{PodUid, Workload},
    refusal::{Reason, Refusal},
};

/// Maximum duration of a review. SDKs time out the whole request after 1 or 2 s.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a review is cached: SDKs refresh every few minutes, but a pod may loop.
const ACCEPTED_TTL: Duration = Duration::from_secs(10);
/// Negative cache. Shorter, since the API server may learn of a new pod later than this agent.
const REJECTED_TTL: Duration = Duration::from_secs(2);
/// Maximum number of a pod's tokens whose review is pending or failed.
const MAX_UNACCEPTED_PER_POD: usize = 8;
/// Maximum number of a pod's accepted tokens. EKS's webhook gives a pod one token for all its containers; other setups
/// may give each container its own.
const MAX_ACCEPTED_PER_POD: usize = 32;
/// At this number of pods, those without a valid review are dropped.
const PRUNE_THRESHOLD: usize = 256;

/// Asks the issuer of a token for the UID of the pod that it is bound to.
pub type Reviewer = Box<dyn Fn(Zeroizing<String>) -> Review + Send + Sync>;
/// A pending review.
pub type Review = BoxFuture<'static, Result<Arc<str>, Refusal>>;

/// A short-lived cache of token reviews with single-flight. It holds hashes of tokens, never the tokens.
pub struct TokenReviews {
    reviewer: Reviewer,
    by_pod: Mutex<HashMap<PodUid, Vec<CachedReview>>>,
}

struct CachedReview {
    token_hash: [u8; 32],
    started: Instant,
    review: Shared<Review>,
}

impl CachedReview {
    fn is_accepted(&self) -> bool {
        matches!(self.review.peek(), Some(Ok(_)))
    }

    fn is_valid(&self) -> bool {
        let ttl = if matches!(self.review.peek(), Some(Err(_))) { REJECTED_TTL } else { ACCEPTED_TTL };
        self.started.elapsed() < ttl
    }
}

impl TokenReviews {
    pub fn new(reviewer: Reviewer) -> Self {
        Self { reviewer, by_pod: Mutex::default() }
    }

    /// Returns the UID of the pod that the token is bound to. A pod's requests are limited to one review at a time for
    /// each of a few tokens, so that a pod cannot put load on the API server.
    ///
    /// # Errors
    /// The reviewer's refusal; `ReviewUnavailable` if the review fails or `until` passes; `TooManyRequests` if the pod
    /// presents too many tokens.
    async fn bound_pod(&self, caller: &Workload, token: &str, until: Instant) -> Result<Arc<str>, Refusal> {
        let review = self.review(caller, token)?;
        let timed_out = || Err(Refusal::new(Reason::ReviewUnavailable, "the review timed out"));
        timeout_at(until, review).await.unwrap_or_else(|_| timed_out())
    }

    fn review(&self, caller: &Workload, token: &str) -> Result<Shared<Review>, Refusal> {
        let mut token_hash = [0; 32];
        token_hash.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
        let mut pods = self.by_pod.lock();
        if pods.len() >= PRUNE_THRESHOLD {
            pods.retain(|_, reviews| reviews.iter().any(CachedReview::is_valid));
        }
        let reviews = pods.entry(caller.uid().clone()).or_default();
        reviews.retain(CachedReview::is_valid);
        if let Some(cached) = reviews.iter().find(|cached| cached.token_hash == token_hash) {
            return Ok(cached.review.clone());
        }
        let accepted = reviews.iter().filter(|cached| cached.is_accepted()).count();
        if accepted >= MAX_ACCEPTED_PER_POD || reviews.len() - accepted >= MAX_UNACCEPTED_PER_POD {
            return Err(Refusal::new(Reason::TooManyRequests, format!("{caller} presents too many different tokens")));
        }
        // A task of its own: a client that hangs up neither cancels the review nor starts a second one.
        let task = tokio::spawn(timeout(REVIEW_TIMEOUT, (self.reviewer)(Zeroizing::new(token.to_owned()))));
        let review: Review = Box::pin(async move {
            let unavailable = |why: &str| Err(Refusal::new(Reason::ReviewUnavailable, why));
            match task.await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(_)) => unavailable("the review took longer than 3 s"),
                Err(_) => unavailable("the review panicked"),
            }
        });
        let review = review.shared();
        // Polls the shared future even if no client waits for it: otherwise a failure would be cached for too long.
        tokio::spawn(review.clone());
        reviews.push(CachedReview { token_hash, started: Instant::now(), review: review.clone() });
        Ok(review)
    }
}

impl std::fmt::Debug for TokenReviews {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenReviews")
    }
}

impl Server {
    /// Handles requests to the container credentials service.
    pub(super) async fn container_credentials(
        &self,
        context: &RequestContext<'_>,
        route: &Route<'_>,
    ) -> Result<Response<Full<Bytes>>, Refusal> {
        let reviews = self.container.as_ref().ok_or(Reason::NotRedirected)?;
        if *route != Route::ContainerCredentials {
            return Err(Reason::NotFound.into());
        }
        let generations = self.generations();
        let token = parse_authorization(context.headers)?;
        let workload = self.attribute_pod(context).await?;
        let until = context.started + CREDENTIALS_HOLD;
        let bound_to = reviews.bound_pod(&workload, token, until).await?;
        if *bound_to != *workload.uid().0 {
            let owner = if bound_to.is_empty() { "no pod".into() } else { format!("the pod with UID {bound_to}") };
            return Err(Refusal::new(
                Reason::ContainerTokenMismatch,
                format!("{workload} with UID {} presents a token that is bound to {owner}", workload.uid()),
            ));
        }
        let grant = self.authorize(&workload, until).await?;
        let granted = CachedGrant { generations, session: self.cache.handle(&grant), workload, grant };
        let credential = self.credential(&context.connection.client, &granted, until).await?;
        Ok(response::document(credential.container()))
    }
}

/// Returns the value of the only `Authorization` header, which must be a JWT, without a scheme.
fn parse_authorization(headers: &HeaderMap) -> Result<&str, Refusal> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(token), None) = (values.next(), values.next()) else {
        return Err(Reason::ContainerTokenMissing.into());
    };
    // Anything but a JWT needs no review.
    let token = token.to_str().unwrap_or_default();
    let parts = token.split('.').filter(|part| !part.is_empty()).count();
    let allowed = token.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if parts == 3 && allowed && token.matches('.').count() == 2 {
        Ok(token)
    } else {
        Err(Refusal::new(Reason::ContainerTokenRefused, "the token is not a JWT"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    fn reviews(outcome: Result<&'static str, Reason>) -> (Arc<TokenReviews>, Arc<AtomicUsize>) {
        let count = Arc::new(AtomicUsize::new(0));
        let counter = count.clone();
        let reviewer = move |_| -> Review {
            counter.fetch_add(1, SeqCst);
            Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(100)).await;
                outcome.map(Into::into).map_err(Into::into)
            })
        };
        (Arc::new(TokenReviews::new(Box::new(reviewer))), count)
    }

    fn soon() -> Instant {
        Instant::now() + CREDENTIALS_HOLD
    }

    #[tokio::test(start_paused = true)]
    async fn repeated_requests_share_one_review() {
        let (reviews, count) = reviews(Ok("uid-a"));
        let pod = Workload::sample("a", "uid-a", "sa");
        let review = || reviews.bound_pod(&pod, "a.b.c", soon());
        let (one, two) = tokio::join!(review(), review());
        assert_eq!((one.unwrap(), two.unwrap()), ("uid-a".into(), "uid-a".into()));
        for _ in 0..100 {
            review().await.unwrap();
        }
        assert_eq!(count.load(SeqCst), 1);
        tokio::time::advance(ACCEPTED_TTL).await;
        review().await.unwrap();
        assert_eq!(count.load(SeqCst), 2, "expired");
    }

    #[tokio::test(start_paused = true)]
    async fn client_that_hangs_up_causes_no_second_review() {
        let (reviews, count) = reviews(Ok("uid-a"));
        let pod = Workload::sample("a", "uid-a", "sa");
        for _ in 0..10 {
            assert!(timeout(Duration::from_millis(5), reviews.bound_pod(&pod, "a.b.c", soon())).await.is_err());
        }
        reviews.bound_pod(&pod, "a.b.c", soon()).await.unwrap();
        assert_eq!(count.load(SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_that_fail_are_limited_per_pod() {
        let (reviews, count) = reviews(Err(Reason::ContainerTokenRefused));
        let (pod, other) = (Workload::sample("a", "uid-a", "sa"), Workload::sample("b", "uid-b", "sa"));
        let mut reasons = Vec::new();
        for n in 0..100 {
            reasons.push(reviews.bound_pod(&pod, &format!("a.b.{n}"), soon()).await.unwrap_err().reason);
        }
        assert_eq!(count.load(SeqCst), MAX_UNACCEPTED_PER_POD);
        assert!(
            reasons[MAX_UNACCEPTED_PER_POD..].iter().all(|reason| *reason == Reason::TooManyRequests),
            "{reasons:?}"
        );
        assert_eq!(reviews.bound_pod(&other, "a.b.c", soon()).await.unwrap_err().reason, Reason::ContainerTokenRefused);
        tokio::time::advance(REJECTED_TTL).await;
        assert_eq!(reviews.bound_pod(&pod, "a.b.1", soon()).await.unwrap_err().reason, Reason::ContainerTokenRefused);
    }

    /// Each of many containers may have a token of its own.
    #[tokio::test(start_paused = true)]
    async fn accepted_tokens_are_limited_per_pod() {
        let (reviews, count) = reviews(Ok("uid-a"));
        let pod = Workload::sample("a", "uid-a", "sa");
        for n in 0..MAX_ACCEPTED_PER_POD {
            reviews.bound_pod(&pod, &format!("a.b.{n}"), soon()).await.unwrap();
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        let refusal = reviews.bound_pod(&pod, "a.b.more", soon()).await.unwrap_err();
        assert_eq!((refusal.reason, count.load(SeqCst)), (Reason::TooManyRequests, MAX_ACCEPTED_PER_POD));
        tokio::time::advance(ACCEPTED_TTL).await;
        reviews.bound_pod(&pod, "a.b.more", soon()).await.unwrap();
    }

    /// A failure that no client had polled was once cached like an accepted token.
    #[tokio::test(start_paused = true)]
    async fn failure_after_hang_up_expires_soon() {
        let (reviews, count) = reviews(Err(Reason::ReviewUnavailable));
        let pod = Workload::sample("a", "uid-a", "sa");
        assert!(timeout(Duration::from_millis(5), reviews.bound_pod(&pod, "a.b.c", soon())).await.is_err());
        tokio::time::sleep(REJECTED_TTL).await;
        assert!(reviews.bound_pod(&pod, "a.b.c", soon()).await.is_err());
        assert_eq!(count.load(SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn hanging_review_times_out() {
        let reviewer = |_| -> Review { Box::pin(std::future::pending()) };
        let reviews = TokenReviews::new(Box::new(reviewer));
        let pod = Workload::sample("a", "uid-a", "sa");
        assert_eq!(reviews.bound_pod(&pod, "a.b.c", soon()).await.unwrap_err().reason, Reason::ReviewUnavailable);
    }

    #[test]
    fn authorization_is_exactly_one_jwt() {
        let headers =
            |values: &[&str]| values.iter().map(|value| (AUTHORIZATION, value.parse().unwrap())).collect::<HeaderMap>();
        assert_eq!(parse_authorization(&headers(&["e30.e30.c2ln"])).unwrap(), "e30.e30.c2ln");
        for (values, reason) in [
            (&[][..], Reason::ContainerTokenMissing),
            (&["e30.e30.c2ln", "e30.e30.c2ln"], Reason::ContainerTokenMissing),
            (&["Bearer e30.e30.c2ln"], Reason::ContainerTokenRefused),
            (&["e30.e30."], Reason::ContainerTokenRefused),
            (&["e30.e30.c2ln.c2ln"], Reason::ContainerTokenRefused),
            (&["e30.e30.c2ln "], Reason::ContainerTokenRefused),
            (&[""], Reason::ContainerTokenRefused),
        ] {
            assert_eq!(parse_authorization(&headers(values)).unwrap_err().reason, reason, "{values:?}");
        }
    }
}
