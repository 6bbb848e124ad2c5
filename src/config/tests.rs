use super::{check::sts, *};

fn run(extra: &[&str]) -> Result<Config, String> {
    let base = ["kirsa", "run", "--node-name=n1", "--host-ip=10.0.0.1", "--region=eu-central-1"];
    match parse_from(base.iter().chain(extra).map(Into::into)) {
        Ok(Command::Run(config)) => Ok(*config),
        Ok(other) => panic!("{other:?}"),
        Err(error) => {
            assert_eq!(error.exit_code(), 2);
            Err(error.to_string())
        }
    }
}

#[test]
fn a_plain_start_has_the_documented_defaults() {
    let config = run(&[]).unwrap();
    assert_eq!((config.port, config.session_duration, config.audience.as_str()), (338, 3600, "sts.amazonaws.com"));
    assert!(matches!(config.source, Source::Kubernetes { cni_results: Some(_), .. }));
    assert!(matches!(run(&["--cni-results=none"]).unwrap().source, Source::Kubernetes { cni_results: None, .. }));
}

/// IMDS-20: the refusal says why.
#[test]
fn short_sessions_are_refused_with_the_reason() {
    let message = run(&["--session-duration=900"]).unwrap_err();
    assert!(message.contains("--session-duration 900") && message.contains("expired keys"), "{message}");
}

#[test]
fn wrong_values_name_the_flag_the_value_and_the_right_form() {
    for (flag, named) in [
        ("--host-ip=10.0.0.2", "10.0.0.2: is the second of its family"),
        ("--host-ip=127.0.0.1", "--host-ip 127.0.0.1"),
        ("--host-ip=node1", "node1"),
        ("--port=0", "--port 0"),
        ("--max-connections-per-source=0", "--max-connections-per-source 0: must be 1 at least"),
        ("--max-requests-per-source=0", "--max-requests-per-source 0"),
        ("--exchange-burst=0", "--exchange-burst 0"),
        ("--require-imdsv2-namespaces=a,B", "--require-imdsv2-namespaces \"B\": must be the name of a namespace"),
        ("--start-window=901", "--start-window 901: must be from 0 to 900"),
        ("--region=EU", "--region EU"),
        ("--log-level=verbose", "--log-level verbose: must be off, error"),
        ("--log-level=info,kirsa=loud", "--log-level info,kirsa=loud"),
        ("--log-level=", "--log-level ''"),
        ("--startup-taint=kirsa.dev/not-ready:NoSchedule", "must be the taint's key alone"),
        ("--max-connections=18446744073709551615", "must be 1048576 at most"),
        ("--audience=a b", "--audience"),
        ("--container-audience=", "--container-audience"),
        ("--annotation-prefix=a/b", "--annotation-prefix"),
        ("--node-metadata=meta-data/iam/info", "--node-metadata meta-data/iam/info: is never served by any setting"),
        ("--node-metadata=vpc,network", "--node-metadata network: must be default, vpc, tags, lifecycle, or none"),
        ("--node-metadata-value=user-data=x", "--node-metadata-value user-data: is never served by any setting"),
        ("--node-metadata-value=tags=x", "--node-metadata-value tags: must be one of"),
        ("--node-metadata-value=meta-data/mac", "must be PATH=VALUE"),
        ("--intercept=ebpf", "'ebpf'"),
        ("--mint=magic", "'magic'"),
    ] {
        let message = parse_from(
            ["kirsa", "run", "--node-name=n", "--sts-endpoint-url=http://sts", "--host-ip=10.0.0.1", flag]
                .iter()
                .map(Into::into),
        )
        .unwrap_err()
        .to_string();
        assert!(message.contains(named), "{flag}: {message}");
    }
}

#[test]
fn an_endpoint_must_be_a_url_and_without_one_the_region_must_be_known() {
    let message = run(&["--sts-endpoint-url=minio:9000"]).unwrap_err();
    assert!(message.contains("--sts-endpoint-url minio:9000: must be"), "{message}");
    assert!(sts([None, None], None).unwrap_err().contains("--region"));
}

/// The label that the DaemonSet takes it from is copied to pods by Kubernetes >= 1.35 alone.
#[test]
fn a_region_that_is_given_wins_over_the_nodes_and_an_empty_one_is_none() {
    let region = |given: &str, nodes: &str| sts([given, nodes].map(|region| Some(region.into())), None);
    assert_eq!(region("eu-west-1", "eu-central-1").unwrap().region, "eu-west-1");
    assert_eq!(region("", "eu-central-1").unwrap().region, "eu-central-1");
    assert_eq!(region("eu-west-1", "").unwrap().region, "eu-west-1");
    assert!(region("", "").unwrap_err().contains("KIRSA_REGION"));
    let wrong = region("", "RegionOne").unwrap_err();
    assert!(wrong.contains("--node-region RegionOne") && wrong.contains("KIRSA_REGION"), "{wrong}");
    let store = sts([None, Some("RegionOne".into())], Some("http://minio:9000".into())).unwrap();
    assert_eq!(store.region, "us-east-1", "a store has no regions");
}

#[test]
fn a_log_level_is_a_level_or_directives() {
    for level in ["warn", "INFO", "off", "warn,kirsa=debug", "kirsa::cache=trace, info", "kirsa[span]=debug"] {
        assert_eq!(run(&["--log-level", level]).unwrap().log_level, level);
    }
}

#[test]
fn doctor_is_configured_as_run_is() {
    let args = ["kirsa", "doctor", "--host-ip=10.0.0.1", "--region=eu-central-1", "--node-name=n", "--port=9000"];
    let Ok(Command::Doctor(config, options)) = parse_from(args.iter().map(Into::into)) else { panic!() };
    assert_eq!((config.port, options.output, options.exchange), (9_000, doctor::Output::Text, true));
}

#[test]
fn container_credentials_are_off_unless_asked_for_and_need_kubernetes() {
    assert_eq!(run(&[]).unwrap().container_audience, None);
    let on = run(&["--container-credentials"]).unwrap();
    assert_eq!(on.container_audience.as_deref(), Some("pods.eks.amazonaws.com"));
    let message = run(&["--container-credentials", "--workloads=w.yaml"]).unwrap_err();
    assert!(message.contains("--container-credentials with --workloads: needs Kubernetes"), "{message}");
}

#[test]
fn without_kubernetes_no_node_name_is_needed() {
    let args = ["kirsa", "run", "--host-ip=10.0.0.1", "--sts-endpoint-url=http://minio:9000", "--workloads=w.yaml"];
    let Ok(Command::Run(config)) = parse_from(args.iter().map(Into::into)) else { panic!() };
    assert!(matches!(config.source, Source::File(_)));
}
