//! Network faults between the agent and STS, and wrong servers at its address. The endpoint uses HTTPS, as with AWS.

use std::net::{SocketAddr, TcpListener};
use std::ops::RangeInclusive;

use anyhow::{Context, Result, ensure};
use lab::agent::Options;
use lab::issuer::subject;
use lab::namespace::BASE;
use lab::poll::{poll, poll_every};
use lab::site::Site;
use lab::sts::{Config, Keys, Provider, Role, StandIn, Tls};

use super::{Credentials, INTERVAL, LIFETIME, TIMEOUT, credentials, failed_calls, for_each, list};
use super::{site, wait_for_refusal};

const COLD: &str = "cold";
const WARM: &str = "warm";

#[derive(Debug)]
enum Fault {
    /// No process listens there.
    Refused,
    /// Packets to STS are dropped.
    Dropped,
    /// The server accepts connections and never responds.
    Mute,
    /// The certificate is for another name.
    WrongName,
    /// No trusted authority signed the certificate.
    UnknownAuthority,
    /// The server does not use TLS.
    Plain,
}

/// One fault and its effects.
struct Row {
    fault: Fault,
    /// Reason and part of the logged detail of the first exchange that fails.
    cold: (&'static str, &'static str),
    /// Reason and part of the logged detail of the refresh, which starts after a kept connection was abandoned.
    refresh: (&'static str, &'static str),
    /// Number of attempts until a pod's first list and first credentials were answered.
    cold_tries: RangeInclusive<u32>,
}

fn table() -> Vec<Row> {
    let row = |fault, detail, cold_tries| {
        let expected = ("sts_unavailable", detail);
        Row { fault, cold: expected, refresh: expected, cold_tries }
    };
    let kept = ("exchange_timeout", "timed out after 4 s waiting for STS");
    vec![
        row(Fault::Refused, "refused", 3..=30),
        // The exchange reuses the connection of the previous one, which is now silent.
        Row { cold: kept, ..row(Fault::Dropped, "timed out", 1..=2) },
        row(Fault::Mute, "timed out", 1..=3),
        row(Fault::WrongName, "not valid for name", 3..=30),
        row(Fault::UnknownAuthority, "invalid peer certificate", 3..=30),
        row(Fault::Plain, "corrupt message", 3..=30),
    ]
}

/// A node of its own for each fault, with the STS address of its agent.
struct Endpoint<'a> {
    row: &'a Row,
    site: Site,
    trusted: Tls,
    /// A certificate for another name, by an authority that is trusted too.
    misnamed: Tls,
    address: SocketAddr,
}

impl<'a> Endpoint<'a> {
    /// Starts a healthy STS at the address.
    fn new(row: &'a Row) -> Result<(Self, StandIn)> {
        Self::over(row, false)
    }

    fn over(row: &'a Row, http2: bool) -> Result<(Self, StandIn)> {
        let (trusted, misnamed) = (Tls::for_names(&[&BASE.to_string()])?, Tls::for_names(&["sts.example"])?);
        let trusted = if http2 { trusted.http2() } else { trusted };
        let mut site = site()?;
        let listener = TcpListener::bind((BASE, 0))?;
        let address = listener.local_addr()?;
        let authorities = site.node.state().join("authorities.pem");
        std::fs::write(&authorities, trusted.authority_pem().to_owned() + misnamed.authority_pem())?;
        site.options = Options::new(env!("CARGO_BIN_EXE_kirsa"))
            .flag("--workloads", site.workloads())
            .flag("--sts-endpoint-url", format!("https://{address}"))
            .env("SSL_CERT_FILE", authorities);
        let place = Self { row, site, trusted, misnamed, address };
        let sts = place.stand_in(listener, Some(&place.trusted))?;
        Ok((place, sts))
    }

    fn stand_in(&self, listener: TcpListener, tls: Option<&Tls>) -> Result<StandIn> {
        let issuer = &self.site.issuer;
        let role = |name: &str| Role::trusting(&self.site.arn(name), issuer.url(), &subject("default", name));
        let providers = vec![Provider::new(issuer.url(), Keys::Given(issuer.jwks()?))];
        let roles = [COLD, WARM].map(role).into();
        let sts = StandIn::start(listener, Config { providers, roles, tls: tls.cloned(), ..Config::default() })?;
        sts.configure(|settings| settings.session_seconds = Some(LIFETIME));
        Ok(sts)
    }

    /// Listens on the same address again, once it is free.
    fn listen(&self) -> Result<TcpListener> {
        poll("the address of STS to be free", TIMEOUT, || TcpListener::bind(self.address).ok())
    }

    /// Replaces the healthy STS with the fault.
    fn fail(&self, healthy: StandIn) -> Result<Replacement> {
        if matches!(self.row.fault, Fault::Dropped) {
            let port = self.address.port();
            self.site.node.netns().shell(&format!(
                "nft 'table inet cut {{ \
                 chain there {{ type filter hook output priority 0; ip daddr {BASE} tcp dport {port} drop; }}; \
                 chain back {{ type filter hook input priority 0; ip saddr {BASE} tcp sport {port} drop; }}; }}'"
            ))?;
        }
        drop(healthy);
        Ok(match self.row.fault {
            Fault::Refused | Fault::Dropped => Replacement::Nothing,
            Fault::Mute => Replacement::Mute(self.listen()?),
            Fault::WrongName => Replacement::Other(self.stand_in(self.listen()?, Some(&self.misnamed))?),
            Fault::UnknownAuthority => {
                Replacement::Other(self.stand_in(self.listen()?, Some(&Tls::for_names(&[&BASE.to_string()])?))?)
            }
            Fault::Plain => Replacement::Other(self.stand_in(self.listen()?, None)?),
        })
    }

    fn heal(&self, replacement: Replacement) -> Result<StandIn> {
        drop(replacement);
        if matches!(self.row.fault, Fault::Dropped) {
            self.site.node.netns().shell("nft delete table inet cut")?;
        }
        self.stand_in(self.listen()?, Some(&self.trusted))
    }
}

/// The listener at the address of STS, which closes when dropped.
#[allow(dead_code, reason = "held to keep it listening")]
enum Replacement {
    Nothing,
    Mute(TcpListener),
    Other(StandIn),
}

/// IMDS-22, IMDS-27
fn refuses_cold_pods_and_hides_from_warm_ones(row: &Row) -> Result<()> {
    let (endpoint, healthy) = Endpoint::new(row)?;
    let site = &endpoint.site;
    let (cold, warm) = (site.pod(COLD)?, site.pod_with_role(WARM)?);
    let agent = site.start()?;
    let first = Credentials::of(&warm)?;
    site.give_role(&cold)?;
    let replacement = endpoint.fail(healthy)?;

    let answers = [list(&cold)?, credentials(&cold)?];
    let tried = failed_calls(&agent, row.cold.0)?;
    ensure!([200, 503].contains(&answers[0].status) && answers[1].status == 503, "{answers:?}");
    ensure!(row.cold_tries.contains(&(tried as u32)), "{tried} tries");
    wait_for_refusal(&agent, &cold, row.cold)?;
    ensure!(list(&cold)?.status == 503);

    first.survives_failed_refresh(&warm, &agent, row.refresh)?;
    let (document, list) = first.is_served_until_last_minute(&warm)?;
    ensure!(document.status == 503 && list.status == 503, "{document:?} {list:?}");

    let healthy = endpoint.heal(replacement)?;
    for pod in [&cold, &warm] {
        let answer = poll_every(INTERVAL, "credentials", TIMEOUT, || Credentials::of(pod).ok())?;
        let session = healthy.session(&answer.access_key_id).context("a session of the new STS")?;
        ensure!(session.role_arn == site.arn(pod.name()), "{session:?}");
    }
    site.no_pod_got_outside()?;
    agent.stop()
}

#[test]
fn network_faults_refuse_only_cold_pods() -> Result<()> {
    for_each(&table(), |row| {
        refuses_cold_pods_and_hides_from_warm_ones(row).with_context(|| format!("{:?}", row.fault))
    })
}

/// A firewall or load balancer drops the state of a connection without a reset. HTTP/2 uses one connection for all
/// requests, and would use it until TCP gives up after 15 minutes.
#[test]
fn silent_sts_connection_costs_one_exchange() -> Result<()> {
    let row = Row { fault: Fault::Dropped, cold: ("", ""), refresh: ("", ""), cold_tries: 0..=0 };
    for http2 in [false, true] {
        let (endpoint, sts) = Endpoint::over(&row, http2)?;
        let site = &endpoint.site;
        let (cold, warm) = (site.pod(COLD)?, site.pod_with_role(WARM)?);
        let agent = site.start()?;
        Credentials::of(&warm)?;
        let netns = site.node.netns();
        let port = endpoint.address.port();
        let open = netns.shell(&format!("ss -Htn state established dst {BASE}:{port}"))?;
        let local: Vec<_> = open.lines().filter_map(|line| line.split_whitespace().nth(2)?.rsplit_once(':')).collect();
        let local: Vec<_> = local.into_iter().map(|(_, port)| port).collect();
        ensure!(local.len() == 1, "one connection, which is kept: {open}");
        netns.shell(&format!(
            "nft 'table inet cut {{ chain there {{ type filter hook output priority 0; \
             tcp dport {port} tcp sport {0} drop; }}; chain back {{ type filter hook input priority 0; \
             tcp sport {port} tcp dport {0} drop; }}; }}'",
            local[0]
        ))?;
        site.give_role(&cold)?;
        let answer =
            poll_every(INTERVAL, "credentials over another connection", TIMEOUT, || Credentials::of(&cold).ok())?;
        ensure!(sts.session(&answer.access_key_id).is_some(), "{answer:?}");
        ensure!(failed_calls(&agent, "exchange_timeout")? == 1.0, "one exchange met the dead connection");
        agent.stop()?;
    }
    Ok(())
}
