//! What stands where STS should be, or between here and there. The endpoint is HTTPS, as it is with AWS.

use std::net::{SocketAddr, TcpListener};
use std::ops::RangeInclusive;

use anyhow::{Context, Result, ensure};
use lab::agent::Options;
use lab::issuer::subject;
use lab::namespace::BASE;
use lab::poll::{poll, poll_every};
use lab::site::Site;
use lab::sts::{Config, Keys, Provider, Role, StandIn, Tls};

use super::{Held, LIFETIME, LOOK, PATIENCE, credentials, each, failed_calls, list};
use super::{refusal, site};

const COLD: &str = "cold";
const WARM: &str = "warm";

#[derive(Debug)]
enum Fault {
    /// Nobody listens there.
    Refused,
    /// Packets to it are dropped.
    Dropped,
    /// Connections are taken, and nothing is ever said.
    Mute,
    /// The certificate is for another name.
    WrongName,
    /// Nobody that is trusted has signed the certificate.
    UnknownAuthority,
    /// Something else listens there: it speaks no TLS.
    Plain,
}

/// One fault, and what it comes to.
struct Row {
    fault: Fault,
    /// Of the first exchange that fails, and part of what the log says of it.
    cold: (&'static str, &'static str),
    /// The same of the refresh, by when a connection that was kept has been given up.
    refresh: (&'static str, &'static str),
    /// Tries by the time that a pod's first list and first credentials have been answered.
    cold_tries: RangeInclusive<u32>,
}

fn table() -> Vec<Row> {
    let row = |fault, said, cold_tries| {
        let told = ("sts_unavailable", said);
        Row { fault, cold: told, refresh: told, cold_tries }
    };
    let kept = ("exchange_timeout", "timed out after 4 s waiting for STS");
    vec![
        row(Fault::Refused, "refused", 3..=30),
        // The connection of the exchange before is used again, and silent.
        Row { cold: kept, ..row(Fault::Dropped, "timed out", 1..=2) },
        row(Fault::Mute, "timed out", 1..=3),
        row(Fault::WrongName, "not valid for name", 3..=30),
        row(Fault::UnknownAuthority, "invalid peer certificate", 3..=30),
        row(Fault::Plain, "corrupt message", 3..=30),
    ]
}

/// A node of its own for each fault, and the one address that its agent knows for STS.
struct Place<'a> {
    row: &'a Row,
    site: Site,
    trusted: Tls,
    /// By an authority that is trusted too.
    misnamed: Tls,
    address: SocketAddr,
}

impl<'a> Place<'a> {
    /// With a good STS.
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

    /// On the same address again, once it is free.
    fn listen(&self) -> Result<TcpListener> {
        poll("the address of STS to be free", PATIENCE, || TcpListener::bind(self.address).ok())
    }

    /// What is in the place of `good` now.
    fn fail(&self, good: StandIn) -> Result<Instead> {
        if matches!(self.row.fault, Fault::Dropped) {
            let port = self.address.port();
            self.site.node.netns().shell(&format!(
                "nft 'table inet cut {{ \
                 chain there {{ type filter hook output priority 0; ip daddr {BASE} tcp dport {port} drop; }}; \
                 chain back {{ type filter hook input priority 0; ip saddr {BASE} tcp sport {port} drop; }}; }}'"
            ))?;
        }
        drop(good);
        Ok(match self.row.fault {
            Fault::Refused | Fault::Dropped => Instead::Nobody,
            Fault::Mute => Instead::Mute(self.listen()?),
            Fault::WrongName => Instead::Other(self.stand_in(self.listen()?, Some(&self.misnamed))?),
            Fault::UnknownAuthority => {
                Instead::Other(self.stand_in(self.listen()?, Some(&Tls::for_names(&[&BASE.to_string()])?))?)
            }
            Fault::Plain => Instead::Other(self.stand_in(self.listen()?, None)?),
        })
    }

    fn heal(&self, instead: Instead) -> Result<StandIn> {
        drop(instead);
        if matches!(self.row.fault, Fault::Dropped) {
            self.site.node.netns().shell("nft delete table inet cut")?;
        }
        self.stand_in(self.listen()?, Some(&self.trusted))
    }
}

/// What is where STS was; dropped, nobody is.
#[allow(dead_code, reason = "held for as long as it is to listen")]
enum Instead {
    Nobody,
    Mute(TcpListener),
    Other(StandIn),
}

/// IMDS-22, IMDS-27
fn is_told_to_cold_pods_and_hidden_from_warm_ones(row: &Row) -> Result<()> {
    let (place, good) = Place::new(row)?;
    let site = &place.site;
    let (cold, warm) = (site.pod(COLD)?, site.pod_with_role(WARM)?);
    let agent = site.start()?;
    let first = Held::by(&warm)?;
    site.give_role(&cold)?;
    let instead = place.fail(good)?;

    let answers = [list(&cold)?, credentials(&cold)?];
    let tried = failed_calls(&agent, row.cold.0)?;
    ensure!([200, 503].contains(&answers[0].status) && answers[1].status == 503, "{answers:?}");
    ensure!(row.cold_tries.contains(&(tried as u32)), "{tried} tries");
    refusal(&agent, &cold, row.cold)?;
    ensure!(list(&cold)?.status == 503);

    first.is_served_while_its_refresh_fails(&warm, &agent, row.refresh)?;
    let (document, list) = first.is_served_until_a_minute_before_its_end(&warm)?;
    ensure!(document.status == 503 && list.status == 503, "{document:?} {list:?}");

    let good = place.heal(instead)?;
    for pod in [&cold, &warm] {
        let answer = poll_every(LOOK, "credentials", PATIENCE, || Held::by(pod).ok())?;
        let session = good.session(&answer.access_key_id).context("a session of the new one")?;
        ensure!(session.role_arn == site.arn(pod.name()), "{session:?}");
    }
    site.no_pod_got_outside()?;
    agent.stop()
}

#[test]
fn whatever_stands_in_place_of_sts_is_told_to_cold_pods_and_hidden_from_warm_ones() -> Result<()> {
    each(&table(), |row| {
        is_told_to_cold_pods_and_hidden_from_warm_ones(row).with_context(|| format!("{:?}", row.fault))
    })
}

/// What is between forgets a connection without a word, as firewalls and load balancers do. HTTP/2 has one for all
/// requests, and would be asked on it until TCP gives up, a quarter of an hour later.
#[test]
fn a_silent_connection_to_sts_costs_one_exchange_and_no_more() -> Result<()> {
    let row = Row { fault: Fault::Dropped, cold: ("", ""), refresh: ("", ""), cold_tries: 0..=0 };
    for http2 in [false, true] {
        let (place, sts) = Place::over(&row, http2)?;
        let site = &place.site;
        let (cold, warm) = (site.pod(COLD)?, site.pod_with_role(WARM)?);
        let agent = site.start()?;
        Held::by(&warm)?;
        let netns = site.node.netns();
        let port = place.address.port();
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
        let answer = poll_every(LOOK, "credentials over another connection", PATIENCE, || Held::by(&cold).ok())?;
        ensure!(sts.session(&answer.access_key_id).is_some(), "{answer:?}");
        ensure!(failed_calls(&agent, "exchange_timeout")? == 1.0, "one exchange met the dead connection");
        agent.stop()?;
    }
    Ok(())
}
