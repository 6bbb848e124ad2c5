//! The switches from another process.

use serde_json::{Value, json};

use super::*;

fn start_controlled() -> (StandIn, SocketAddr) {
    let sts = start_with(Config { control: Some(listener()), ..Config::default() });
    let control = sts.control_address().expect("a control listener");
    (sts, control)
}

fn ask(control: SocketAddr, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let (head, body) = exchange(control, method, &format!("/_control/{path}"), &body);
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, serde_json::from_str(&body).unwrap_or(Value::String(body)))
}

#[tokio::test]
async fn faults_and_settings_are_set_and_taken_back() {
    let (sts, control) = start_controlled();
    let fault = json!({ "role": READER, "effect": { "error": { "code": "Throttling" } }, "when": { "next": 1 } });
    assert_eq!(ask(control, "POST", "faults", &fault).0, 200);
    refuse(&sts, |ask| ask).await.is(400, "Throttling", "");
    assume(&sts, |ask| ask).await.expect("a session");
    assert_eq!(ask(control, "POST", "faults", &json!({ "effect": "no-answer" })).0, 200);
    assert_eq!(ask(control, "DELETE", "faults", &Value::Null).0, 200);
    assume(&sts, |ask| ask).await.expect("a session");

    assert_eq!(ask(control, "PUT", "settings", &json!({ "dialect": "minio", "session_seconds": 60 })).0, 200);
    assert_eq!(ask(control, "GET", "settings", &Value::Null).1["session_seconds"], 60);
    refuse(&sts, |ask| ask.duration_seconds(1)).await.is(400, "InvalidParameterValue", "durationSeconds");
}

#[tokio::test]
async fn roles_come_and_go() {
    let (sts, control) = start_controlled();
    let arn = "arn:aws:iam::111122223333:role/late";
    refuse(&sts, |ask| ask.role_arn(arn)).await.is(403, "AccessDenied", "");
    let role = serde_json::to_value(Role::trusting(arn, ISSUER.url(), "system:serviceaccount:default:*"));
    assert_eq!(ask(control, "PUT", "roles", &role.expect("JSON")).0, 200);
    assume(&sts, |ask| ask.role_arn(arn)).await.expect("a session");
    assert_eq!(ask(control, "DELETE", &format!("roles?role={arn}"), &Value::Null).0, 200);
    refuse(&sts, |ask| ask.role_arn(arn)).await.is(403, "AccessDenied", "");
}

#[tokio::test]
async fn calls_can_be_waited_for() {
    let (sts, control) = start_controlled();
    let path = format!("calls?role={READER}&count=1&seconds=5");
    let waiting = tokio::task::spawn_blocking(move || ask(control, "GET", &path, &Value::Null));
    assume(&sts, |ask| ask).await.expect("a session");
    let (status, calls) = waiting.await.expect("an answer");
    assert_eq!((status, &calls[0]["session_name"]), (200, &json!("default.reader")));
    assert_eq!(calls[0]["claims"]["kubernetes.io"]["pod"]["uid"], "uid-0");
    assert_eq!(ask(control, "GET", "calls?role=other&count=1&seconds=0", &Value::Null).0, 408);
    assert_eq!(ask(control, "DELETE", "calls", &Value::Null).0, 200);
    assert_eq!(ask(control, "GET", "calls", &Value::Null).1, json!([]));
}

#[tokio::test]
async fn sessions_are_listed_without_secrets_and_end_on_request() {
    let (sts, control) = start_controlled();
    let issued = credentials(&assume(&sts, |ask| ask).await.expect("a session"));
    let (_, sessions) = ask(control, "GET", "sessions", &Value::Null);
    assert_eq!(sessions[0]["access_key_id"], issued.access_key_id());
    let shown = sessions.to_string();
    assert!(!shown.contains(issued.secret_access_key()) && !shown.contains(issued.session_token().expect("a token")));
    assert_eq!(ask(control, "DELETE", "sessions", &Value::Null).0, 200);
    identity(&sts, issued).await.expect_err("a refusal").is(403, "ExpiredToken", "");
}

#[test]
fn what_is_not_understood_is_refused() {
    let (_sts, control) = start_controlled();
    assert_eq!(ask(control, "POST", "faults", &json!({ "effect": "explode" })).0, 400);
    assert_eq!(ask(control, "PUT", "settings", &json!({ "clock": 1 })).0, 400);
    assert_eq!(ask(control, "GET", "nothing", &Value::Null).0, 404);
}
