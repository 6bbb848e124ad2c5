//! `AssumeRoleWithWebIdentity`: the order of the checks is AWS's, from the form of the request to the
//! role's own trust.

use jiff::{SignedDuration, Timestamp};

use super::{
    ask::Ask,
    policy,
    protocol::{Node, element, text},
    refusal::Refusal,
    role::{self, RoleArn},
    session::{self, Session},
    token::{self, Claims},
    world::{Dialect, Registered, Shared},
};

/// Issues a session, or says why not.
pub(super) async fn assume(shared: &Shared, ask: &Ask) -> Result<(Session, Vec<Node>), Refusal> {
    let valid = ask.validate()?;
    let dialect = shared.world().settings.dialect;
    let arn = RoleArn::parse(valid.role_arn)
        .ok()
        .filter(|arn| dialect != Dialect::Aws || !arn.account.is_empty())
        .ok_or_else(|| Refusal::validation("Request ARN is invalid"))?;
    let packed = policy::check(ask.policy.as_deref(), &ask.policy_arns)?;
    let claims = authenticate(shared, valid.token).await?;
    let provider_arn = arn.provider(role::host_path(&claims.issuer));

    let mut world = shared.world();
    // A role that does not exist and one that does not trust the caller look the same from outside.
    let role = world.roles.get(valid.role_arn).filter(|role| role.trusts(&provider_arn, &claims));
    let role = role.ok_or_else(|| Refusal::by_code("AccessDenied"))?;
    if valid.duration > role.max_session_duration {
        let message = "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.";
        return Err(Refusal::validation(message));
    }
    let seconds = i64::from(world.settings.session_seconds.unwrap_or(valid.duration));
    // As MinIO's updateClaimsExpiry does.
    let is_capped = dialect == Dialect::Minio;
    let seconds = if is_capped { seconds.min(claims.expires - Timestamp::now().as_second()) } else { seconds };
    let session = Session {
        access_key_id: session::access_key_id(),
        secret_access_key: session::secret_access_key(),
        session_token: session::session_token(),
        // Whole seconds, as on the wire.
        expiration: Timestamp::from_second(world.now().as_second()).unwrap_or(Timestamp::MAX)
            + SignedDuration::from_secs(seconds),
        role_arn: valid.role_arn.to_owned(),
        arn: arn.session(valid.session_name),
        account: arn.account.clone(),
        user_id: format!("{}:{}", session::role_id(valid.role_arn), valid.session_name),
        claims,
    };
    world.sessions.keep(session.clone());
    let result = result(&session, &provider_arn, packed, dialect);
    Ok((session, result))
}

/// Reads the token and believes it, or not.
async fn authenticate(shared: &Shared, token: &str) -> Result<Claims, Refusal> {
    const NOT_A_TOKEN: &str =
        "The ID Token provided is not a valid JWT. (You may see this error if you sent an Access Token)";
    let claims = Claims::read(token).map_err(|_| Refusal::invalid_identity_token(NOT_A_TOKEN))?;
    let provider: Option<Registered> = shared.world().providers.get(&claims.issuer).cloned();
    let provider = provider.ok_or_else(|| {
        let message = format!("No OpenIDConnect provider found in your account for {}", claims.issuer);
        Refusal::invalid_identity_token(message)
    })?;
    // What the provider's answer was stays with the operator of the lab; AWS does not tell it either.
    let key = provider.keys.key_of(token).await.map_err(|error| {
        eprintln!("sts: {error:#}");
        Refusal::by_code("IDPCommunicationError")
    })?;
    let key = key.ok_or_else(Refusal::no_key)?;
    if !token::is_signed_by(token, &key).unwrap_or(false) {
        return Err(Refusal::invalid_identity_token("The signature of the ID Token is not valid"));
    }
    let now = Timestamp::now().as_second();
    if claims.expires <= now {
        let expires = claims.expires;
        let message =
            format!("Token expired: current date/time {now} must be before the expiration date/time {expires}");
        return Err(Refusal::new("ExpiredTokenException", message));
    }
    if claims.is_from_the_future(now) {
        return Err(Refusal::invalid_identity_token("The ID Token was issued in the future"));
    }
    if !claims.audience.iter().any(|audience| provider.client_ids.contains(audience)) {
        return Err(Refusal::invalid_identity_token("Incorrect token audience"));
    }
    Ok(claims)
}

fn result(session: &Session, provider_arn: &str, packed: Option<usize>, dialect: Dialect) -> Vec<Node> {
    let assumed = match dialect {
        Dialect::Aws | Dialect::Ceph => vec![text("AssumedRoleId", &session.user_id), text("Arn", &session.arn)],
        Dialect::Minio => vec![text("Arn", ""), text("AssumeRoleId", "")],
    };
    let key = text("AccessKeyId", &session.access_key_id);
    let secret = text("SecretAccessKey", &session.secret_access_key);
    let token = text("SessionToken", &session.session_token);
    let credentials = match dialect {
        Dialect::Aws | Dialect::Minio => {
            vec![key, secret, token, text("Expiration", session.expiration.to_string())]
        }
        Dialect::Ceph => vec![key, text("Expiration", format!("{:.6}", session.expiration)), secret, token],
    };
    let mut result = vec![
        element("AssumedRoleUser", assumed),
        element("Credentials", credentials),
        text("SubjectFromWebIdentityToken", &session.claims.subject),
    ];
    if dialect != Dialect::Minio {
        let audience = session.claims.audience.first().cloned();
        result.push(text("Provider", provider_arn));
        result.push(text("Audience", audience.unwrap_or_default()));
    }
    result.extend(packed.map(|percent| text("PackedPolicySize", percent.to_string())));
    result
}
