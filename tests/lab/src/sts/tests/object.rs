//! The object store, asked by curl, which signs by itself.

use std::process::Command;

use super::*;

/// The status and the body of a GET that is signed with these credentials, or not at all.
fn get(store: &ObjectStore, path: &str, signer: Option<&Credentials>) -> (u16, String) {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--max-time", "20", "--write-out", "\n%{http_code}"]);
    if let Some(keys) = signer {
        curl.args(["--aws-sigv4", "aws:amz:eu-central-1:s3"]);
        curl.args(["--user", &format!("{}:{}", keys.access_key_id(), keys.secret_access_key())]);
        curl.args(["--header", &format!("x-amz-security-token: {}", keys.session_token().unwrap_or_default())]);
    }
    let output = curl.arg(format!("{}/{path}", store.url())).output().expect("curl");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let shown = String::from_utf8(output.stdout).expect("text");
    let (body, status) = shown.rsplit_once('\n').expect("a status in the last line");
    (status.parse().expect("a status"), body.to_owned())
}

#[tokio::test]
async fn the_store_knows_who_reads() {
    let sts = start();
    let store = sts.start_store(listener()).expect("a store");
    let issued = credentials(&assume(&sts, |ask| ask).await.expect("a session"));
    let (status, body) = get(&store, &format!("{BUCKET}/{KEY}"), Some(&issued));
    assert_eq!((status, body.contains("ncols 2")), (200, true), "{body}");
    let (status, body) = get(&store, &format!("{BUCKET}?list-type=2&prefix="), Some(&issued));
    assert_eq!((status, body.contains(&format!("<Key>{KEY}</Key>"))), (200, true), "{body}");
    let arns: Vec<String> = sts.acts().into_iter().map(|act| act.arn).collect();
    assert_eq!(arns, ["arn:aws:sts::111122223333:assumed-role/reader/default.reader"; 2]);
}

#[tokio::test]
async fn the_store_says_no() {
    let sts = start();
    let store = sts.start_store(listener()).expect("a store");
    let issued = credentials(&assume(&sts, |ask| ask).await.expect("a session"));
    let token = issued.session_token().map(str::to_owned);
    let forged = Credentials::new(issued.access_key_id(), "x".repeat(40), token, None, "test");
    let foreign = Credentials::new("ASIAAAAAAAAAAAAAAAAA", "x".repeat(40), None, None, "test");
    let object = format!("{BUCKET}/{KEY}");
    let say_no = |path: &str, signer, status, code: &str| {
        let answer = get(&store, path, signer);
        assert_eq!((answer.0, answer.1.contains(&format!("<Code>{code}</Code>"))), (status, true), "{answer:?}");
    };
    say_no(&object, None, 403, "AccessDenied");
    say_no(&object, Some(&forged), 403, "SignatureDoesNotMatch");
    say_no(&object, Some(&foreign), 403, "InvalidAccessKeyId");
    assert!(sts.acts().is_empty(), "none of these is anybody's act");
    say_no(&format!("{BUCKET}/other"), Some(&issued), 404, "NoSuchKey");
    say_no("other/grid.asc", Some(&issued), 404, "NoSuchBucket");
    sts.expire_sessions();
    say_no(&object, Some(&issued), 403, "ExpiredToken");
}
