//! The errors of AWS STS: code, status and the wording that AWS uses for them.

use http::StatusCode;

/// One refusal, as it goes over the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) code: String,
    pub(super) message: String,
}

impl Refusal {
    pub(super) fn new(code: &str, message: impl Into<String>) -> Self {
        Self { status: known(code).0, code: code.to_owned(), message: message.into() }
    }

    /// A refusal by its code alone, with AWS's own words where they are known.
    pub(super) fn by_code(code: &str) -> Self {
        Self::new(code, known(code).1)
    }

    pub(super) fn invalid_identity_token(message: impl Into<String>) -> Self {
        Self::new("InvalidIdentityToken", message)
    }

    /// An unknown key, as much as one that cannot be fetched just now.
    pub(super) fn no_key() -> Self {
        Self::invalid_identity_token(
            "Couldn't retrieve verification key from your identity provider,  \
             please reference AssumeRoleWithWebIdentity documentation for requirements",
        )
    }

    pub(super) fn validation(message: impl Into<String>) -> Self {
        Self::new("ValidationError", message)
    }
}

fn known(code: &str) -> (StatusCode, &'static str) {
    let (status, message) = match code {
        "AccessDenied" => (403, "Not authorized to perform sts:AssumeRoleWithWebIdentity"),
        "ExpiredToken" => (403, "The security token included in the request is expired"),
        "ExpiredTokenException" => (400, "Token expired: current date/time must be before the expiration date/time"),
        "IDPCommunicationError" => (400, "The identity provider could not be reached."),
        "IDPRejectedClaim" => (403, "The identity provider rejected the claim of the web identity token."),
        "IncompleteSignature" => (403, "Authorization header is incomplete."),
        "InternalFailure" => (500, "The request processing has failed because of an unknown error."),
        "InvalidAction" => (400, "Could not find operation for version NO_VERSION_SPECIFIED"),
        "InvalidClientTokenId" => (403, "The security token included in the request is invalid"),
        "InvalidIdentityToken" => {
            (400, "The ID Token provided is not a valid JWT. (You may see this error if you sent an Access Token)")
        }
        "MalformedPolicyDocument" => (400, "Syntax errors in policy."),
        "MissingAuthenticationToken" => (403, "Request is missing Authentication Token"),
        "PackedPolicyTooLarge" => (400, "Packed size of session policy consumes 101% of allotted space."),
        "RegionDisabledException" => (
            403,
            "STS is not activated in this region for account. \
             Your account administrator can activate STS in this region using the IAM Console.",
        ),
        "ServiceUnavailable" => (503, "Service is unable to handle request."),
        "SignatureDoesNotMatch" => (
            403,
            "The request signature we calculated does not match the signature you provided. Check your AWS Secret \
             Access Key and signing method. Consult the service documentation for details.",
        ),
        "Throttling" => (400, "Rate exceeded"),
        _ => (400, "The request was refused."),
    };
    (StatusCode::from_u16(status).expect("a literal status"), message)
}
