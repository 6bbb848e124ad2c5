//! Responses of STS, parsed by the SDK and then by kirsa. The first byte selects the status.

use std::sync::LazyLock;

use tokio::runtime::Runtime;

use crate::{
    attribute::Workload,
    authorize::Grant,
    exchange::{
        credential::Secret,
        sts::{Sts, canned::CannedResponse},
    },
    observe::Metrics,
};

const STATUSES: [u16; 8] = [200, 400, 403, 429, 500, 503, 204, 302];
/// Each part is too long to occur by chance.
const TOKEN: [&str; 3] = ["eyJhbGciOiJSUzI1NiJ9", "eyJzdWIiOiJmdXp6ZXIifQ", "c2lnbmF0dXJlLW9mLXRoZS1mdXp6ZXI"];
/// The secret access key in the corpus.
const SECRET: &str = "SECRETSECRETSECRET";

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap());
static STS: LazyLock<(CannedResponse, Sts)> = LazyLock::new(|| {
    let response = CannedResponse::default();
    (response.clone(), Sts::canned(response, Metrics::new("fuzz").unwrap()))
});
static GRANT: LazyLock<Grant> =
    LazyLock::new(|| Grant::sample(Workload::sample("a", "uid-a", "reader"), "arn:aws:iam::111122223333:role/reader"));

pub fn check(data: &[u8]) {
    let Some((choice, body)) = data.split_first() else { return };
    let status = STATUSES[usize::from(*choice) % STATUSES.len()];
    let (response, sts) = &*STS;
    response.set(status, body);
    let token = Secret::new(TOKEN.join("."));
    match RUNTIME.block_on(sts.assume_role(&GRANT, &token)) {
        Ok(credential) => {
            assert!((200..300).contains(&status), "{status}");
            assert!(body.trim_ascii_end().ends_with(b"</AssumeRoleWithWebIdentityResponse>"), "cut short");
            let document: serde_json::Value = serde_json::from_slice(&credential.document()).unwrap();
            for member in ["AccessKeyId", "SecretAccessKey", "Token", "Expiration", "LastUpdated"] {
                let value = document[member].as_str().unwrap();
                assert!(!value.is_empty() && value.bytes().all(|byte| byte.is_ascii_graphic()), "{document}");
            }
            let left = credential.expires_at().duration_since(credential.issued_at()).as_secs();
            assert!((120..=3_600).contains(&left), "{left} s");
            assert!(document["Expiration"].as_str().unwrap().len() == 20, "{document}");
            assert!(!format!("{credential:?}").contains(SECRET) || credential.access_key_id().contains(SECRET));
        }
        Err(refusal) => {
            let text = refusal.to_string();
            assert!(!TOKEN.iter().any(|part| text.contains(part)), "{text}");
            // Only the text of the error element is quoted.
            let quotes = body.windows(4).any(|word| word == b"Code" || word == b"Mess");
            assert!(quotes || !text.contains(SECRET), "{text}");
        }
    }
}
