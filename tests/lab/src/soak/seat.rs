//! A place on the node: one address, one pod after the other, each of which asks as its SDK does.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpSocket;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

use super::fleet::{Fleet, Judge};
use super::pattern::{self, CREDENTIALS, LIST, Pattern, REGION, TOKEN};
use super::report::Tally;
use crate::http::{self as imds, CREDENTIALS_PATH};
use crate::net::METADATA;

/// After its record was written, until a pod's first instruction, at least.
const BEGINS: Duration = Duration::from_millis(400);
/// As often does an SDK try before it gives up, with so long between the tries.
const TRIES: usize = 3;
const BETWEEN: Duration = Duration::from_millis(500);
/// Longer than the agent may ever hold a request.
const TIMEOUT: Duration = Duration::from_secs(6);

pub(super) enum Order {
    /// A pod of this account starts.
    Come(Guest),
    /// It has ended when this is answered: no packet of it is on its way any more.
    Leave(oneshot::Sender<()>),
}

#[derive(Clone, Debug)]
pub(super) struct Guest {
    /// The account's number, which is also its role's.
    pub(super) account: usize,
    /// Of all pods so far.
    pub(super) number: usize,
}

pub(super) struct Seat {
    address: Ipv4Addr,
    host: usize,
    orders: mpsc::UnboundedReceiver<Order>,
    judge: Judge,
    tally: Arc<Mutex<Tally>>,
}

/// All of one network namespace, until nobody gives orders any more.
pub(super) fn serve(seats: Vec<Seat>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut running: tokio::task::JoinSet<()> = seats.into_iter().map(Seat::run).collect();
        while running.join_next().await.is_some() {}
    });
}

impl Seat {
    pub(super) fn new(
        fleet: &Fleet,
        number: usize,
        orders: mpsc::UnboundedReceiver<Order>,
        tally: Arc<Mutex<Tally>>,
    ) -> Self {
        let (host, address) = fleet.place(number);
        Self { address: address.v4, host, orders, judge: fleet.judge(), tally }
    }

    pub(super) fn host(&self) -> usize {
        self.host
    }

    async fn run(mut self) {
        let mut order = self.orders.recv().await;
        loop {
            let guest = match order {
                None => return,
                Some(Order::Come(guest)) => Some(guest),
                Some(Order::Leave(left)) => {
                    let _ = left.send(());
                    None
                }
            };
            order = match guest {
                None => self.orders.recv().await,
                Some(guest) => {
                    let (caller, orders) = (
                        Caller { address: self.address, guest, judge: &self.judge, tally: &self.tally },
                        &mut self.orders,
                    );
                    tokio::select! {
                        order = orders.recv() => order,
                        () = caller.live() => None,
                    }
                }
            };
        }
    }
}

/// The one pod that is there now.
struct Caller<'a> {
    address: Ipv4Addr,
    guest: Guest,
    judge: &'a Judge,
    tally: &'a Mutex<Tally>,
}

impl Caller<'_> {
    async fn live(&self) {
        let pattern = pattern::of(self.guest.number);
        sleep(BEGINS).await;
        loop {
            let mut failed = None;
            for attempt in 0..TRIES {
                if attempt > 0 {
                    sleep(BETWEEN).await;
                }
                failed = self.call(&pattern).await.err();
                if failed.is_none() {
                    break;
                }
            }
            self.tally().call(failed);
            sleep(pattern.every.mul_f64(0.8 + 0.4 * self.judge.random())).await;
        }
    }

    async fn call(&self, pattern: &Pattern) -> Result<()> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((self.address, 0).into())?;
        let stream = timeout(TIMEOUT, socket.connect((METADATA, 80).into())).await??;
        stream.set_nodelay(true)?;
        let (mut connection, driver) = handshake(TokioIo::new(stream)).await?;
        let _driver = tokio::task::JoinSet::from_iter([driver]);
        let mut token = None;
        for &route in pattern.requests {
            let path = match route {
                TOKEN => "/latest/api/token".to_owned(),
                LIST => CREDENTIALS_PATH.to_owned(),
                REGION => "/latest/meta-data/placement/region".to_owned(),
                _ => format!("{CREDENTIALS_PATH}{}", self.judge.role(&self.guest)),
            };
            let (status, body) = self.ask(&mut connection, route, &path, token.as_deref()).await?;
            self.tally().status(route, status);
            if status != 200 {
                bail!("{route}: {status}");
            }
            match route {
                TOKEN => token = Some(body),
                LIST if body != self.judge.role(&self.guest) => self.wrong(route, &body),
                CREDENTIALS => {
                    if let Err(error) = self.judge.is_own(&self.guest, &body) {
                        self.wrong(route, &format!("{error:#}"));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn ask(
        &self,
        connection: &mut SendRequest<Empty<Bytes>>,
        route: &'static str,
        path: &str,
        token: Option<&str>,
    ) -> Result<(u16, String)> {
        let method = if route == TOKEN { Method::PUT } else { Method::GET };
        let mut request = Request::builder().method(method).uri(path).header("host", METADATA.to_string());
        if route == TOKEN {
            request = request.header(imds::TOKEN_TTL, "21600");
        } else if let Some(token) = token {
            request = request.header(imds::TOKEN, token);
        }
        let request = request.body(Empty::new())?;
        let began = Instant::now();
        let answer = timeout(TIMEOUT, async {
            let answer = connection.send_request(request).await?;
            let status = answer.status().as_u16();
            let body = answer.into_body().collect().await?.to_bytes();
            Ok::<_, hyper::Error>((status, String::from_utf8_lossy(&body).into_owned()))
        });
        let answer = answer.await??;
        self.tally().latency(route, began.elapsed());
        Ok(answer)
    }

    fn wrong(&self, route: &str, what: &str) {
        self.tally().wrong(format!("{route} of account {}: {what}", self.guest.account));
    }

    fn tally(&self) -> std::sync::MutexGuard<'_, Tally> {
        self.tally.lock().expect("no panic while held")
    }
}
