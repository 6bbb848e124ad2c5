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
fn defaults_are_as_documented() {
    let config = run(&[]).unwrap();
    assert_eq!((config.port, config.session_duration, config.audience.as_str()), (338, 3600, "sts.amazonaws.com"));
    assert!(matches!(config.source, Source::Kubernetes { cni_results: Some(_), .. }));
    assert!(matches!(run(&["--cni-results=none"]).unwrap().source, Source::Kubernetes { cni_results: None, .. }));
}

/// IMDS-20: the error gives the reason.
#[test]
fn short_session_is_refused_with_reason() {
    let message = run(&["--session-duration=900"]).unwrap_err();
    assert!(message.contains("'900' for '--session-duration") && message.contains("expired keys"), "{message}");
}

#[test]
fn errors_name_flag_value_and_accepted_form() {
    for (flag, named) in [
        ("--host-ip=10.0.0.2", "10.0.0.2: is the second of its family"),
        ("--host-ip=127.0.0.1", "--host-ip 127.0.0.1"),
        ("--host-ip=node1", "node1"),
        ("--port=0", "'0' for '--port <PORT>': 0 is not in 1..=65535"),
        ("--max-connections-per-source=0", "'0' for '--max-connections-per-source"),
        ("--max-requests-per-source=0", "'0' for '--max-requests-per-source"),
        ("--exchange-burst=0", "'0' for '--exchange-burst"),
        ("--require-imdsv2-namespaces=a,B", "--require-imdsv2-namespaces \"B\": must be the name of a namespace"),
        ("--start-window=901", "'901' for '--start-window"),
        ("--region=EU", "--region EU"),
        ("--log-level=verbose", "--log-level verbose: must be off, error"),
        ("--log-level=info,kirsa=loud", "--log-level info,kirsa=loud"),
        ("--log-level=", "--log-level ''"),
        ("--startup-taint=kirsa.dev/not-ready:NoSchedule", "must be the taint's key alone"),
        ("--max-connections=18446744073709551615", "is not in 1..=1048576"),
        ("--audience=a b", "--audience"),
        ("--container-audience=", "--container-audience"),
        ("--annotation-prefix=a/b", "--annotation-prefix"),
        ("--node-metadata=meta-data/iam/info", "--node-metadata meta-data/iam/info: is never served by any setting"),
        ("--node-metadata=vpc,network", "--node-metadata network: must be default, vpc, tags, lifecycle, or none"),
        ("--node-metadata-value=user-data=x", "--node-metadata-value user-data: is never served by any setting"),
        ("--node-metadata-value=tags=x", "--node-metadata-value tags: must be one of"),
        ("--node-metadata-value=meta-data/mac", "must be PATH=VALUE"),
        ("--intercept=ebpf", "'ebpf'"),
        ("--minting=magic", "'magic'"),
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
fn endpoint_must_be_a_url() {
    let message = run(&["--sts-endpoint-url=minio:9000"]).unwrap_err();
    assert!(message.contains("--sts-endpoint-url minio:9000: must be"), "{message}");
    assert!(sts([None, None], None).unwrap_err().contains("--region"));
}

/// Only Kubernetes >= 1.35 copies the label to pods.
#[test]
fn region_overrides_node_region() {
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
fn log_level_is_a_level_or_directives() {
    for level in ["warn", "INFO", "off", "warn,kirsa=debug", "kirsa::cache=trace, info", "kirsa[span]=debug"] {
        assert_eq!(run(&["--log-level", level]).unwrap().log_level, level);
    }
}

#[test]
fn doctor_takes_the_flags_of_run() {
    let args = ["kirsa", "doctor", "--host-ip=10.0.0.1", "--region=eu-central-1", "--node-name=n", "--port=9000"];
    let Ok(Command::Doctor(config, options)) = parse_from(args.iter().map(Into::into)) else { panic!() };
    assert_eq!((config.port, options.output, options.exchange), (9_000, Output::Text, true));
}

#[test]
fn container_credentials_need_kubernetes() {
    assert_eq!(run(&[]).unwrap().container_audience, None);
    let on = run(&["--container-credentials"]).unwrap();
    assert_eq!(on.container_audience.as_deref(), Some("pods.eks.amazonaws.com"));
    let message = run(&["--container-credentials", "--workloads=w.yaml"]).unwrap_err();
    assert!(message.contains("--container-credentials with --workloads: needs Kubernetes"), "{message}");
}

#[test]
fn workloads_need_no_node_name() {
    let args = ["kirsa", "run", "--host-ip=10.0.0.1", "--sts-endpoint-url=http://minio:9000", "--workloads=w.yaml"];
    let Ok(Command::Run(config)) = parse_from(args.iter().map(Into::into)) else { panic!() };
    assert!(matches!(config.source, Source::File(_)));
}

/// Formats flags as a page: one table per help heading.
fn flags_page() -> String {
    let mut page = "# Flags of `kirsa run`\n\nGenerated from the command line's own definition; a test compares them. \
                    `kirsa run --help` prints the same. Each flag is also an environment variable.\n"
        .to_owned();
    let mut cli = Cli::command();
    cli.build();
    let run = cli.find_subcommand("run").unwrap();
    let mut heading = "";
    for arg in run.get_arguments().filter(|arg| arg.get_env().is_some()) {
        if arg.get_help_heading() != Some(heading) {
            heading = arg.get_help_heading().unwrap();
            page += &format!("\n## {heading}\n\n| flag | environment | default | |\n|---|---|---|---|\n");
        }
        let value = if arg.get_action().takes_values() {
            format!(" {}", arg.get_value_names().unwrap_or_default()[0])
        } else {
            String::new()
        };
        let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        let default = if defaults.concat().is_empty() || value.is_empty() {
            String::new()
        } else {
            format!("`{}`", defaults.join(",").replace(',', ", "))
        };
        let help = arg.get_long_help().or(arg.get_help()).unwrap().to_string();
        page += &format!(
            "| `--{}{}` | `{}` | {default} | {} |\n",
            arg.get_long().unwrap(),
            value.replace('|', "\\|"),
            arg.get_env().unwrap().to_string_lossy(),
            help.replace('|', "\\|").replace('\n', " "),
        );
    }
    page
}

/// `KIRSA_BLESS=1 cargo test --lib flags_page` writes the page.
#[test]
fn flags_page_is_up_to_date() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/flags.md");
    if std::env::var_os("KIRSA_BLESS").is_some() {
        std::fs::write(&path, flags_page()).unwrap();
    }
    assert!(std::fs::read_to_string(path).unwrap() == flags_page(), "docs/flags.md: run this test with KIRSA_BLESS=1");
}
