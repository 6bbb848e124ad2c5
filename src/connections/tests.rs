use std::{
    future::poll_fn,
    io::Write,
    net::{TcpListener, TcpStream},
    pin::Pin,
    task::Poll,
};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    table::{MAX_CLOSING, MAX_CLOSING_BUSY},
    *,
};

const GRACE: Duration = Duration::from_millis(100);
const SECOND: Duration = Duration::from_secs(1);

fn limiter(total: usize, per_owner: usize) -> Arc<ConnectionLimiter> {
    ConnectionLimiter::new(Bounds { total, per_owner, grace: GRACE })
}

fn pod(name: &str) -> Owner {
    Owner::Pod(name.into())
}

fn admit(limiter: &Arc<ConnectionLimiter>, name: &str) -> Result<Arc<ConnectionPermit>, Limit> {
    limiter.try_admit(pod(name)).map(|(permit, _)| permit)
}

async fn pass(time: Duration) {
    tokio::time::advance(time).await;
}

#[tokio::test(start_paused = true)]
async fn longest_idle_of_same_owner_is_evicted() {
    let limiter = limiter(10, 2);
    let (first, second) = (admit(&limiter, "a").unwrap(), admit(&limiter, "a").unwrap());
    first.busy();
    pass(SECOND).await;
    first.idle();
    assert_eq!(limiter.try_admit(pod("b")).unwrap().1, None);
    pass(SECOND).await;
    let (_third, limit) = limiter.try_admit(pod("a")).unwrap();
    assert_eq!(limit, Some(Limit::PerOwner));
    assert_eq!((first.is_evicted(), second.is_evicted()), (false, true));
}

#[tokio::test(start_paused = true)]
async fn largest_owner_loses_at_the_total_limit() {
    let limiter = limiter(3, 3);
    let small = admit(&limiter, "small").unwrap();
    pass(SECOND).await;
    let large = [admit(&limiter, "large").unwrap(), admit(&limiter, "large").unwrap()];
    pass(SECOND).await;
    let _new = admit(&limiter, "new").unwrap();
    assert!(!small.is_evicted(), "idle longest, but its owner has only one");
    assert_eq!(large.iter().filter(|permit| permit.is_evicted()).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn smaller_owner_loses_nothing() {
    let limiter = limiter(3, 3);
    let small = admit(&limiter, "small").unwrap();
    let large = [admit(&limiter, "large").unwrap(), admit(&limiter, "large").unwrap()];
    large.iter().for_each(|permit| permit.busy());
    pass(SECOND).await;
    assert_eq!(admit(&limiter, "large").unwrap_err(), Limit::Total);
    assert!(!small.is_evicted());
}

#[tokio::test(start_paused = true)]
async fn busy_and_recent_connections_stay() {
    let limiter = limiter(10, 1);
    let permit = admit(&limiter, "a").unwrap();
    assert_eq!(admit(&limiter, "a").unwrap_err(), Limit::PerOwner, "the client had no time to send a request");
    permit.busy();
    pass(SECOND).await;
    assert_eq!(admit(&limiter, "a").unwrap_err(), Limit::PerOwner);
    permit.idle();
    assert_eq!(admit(&limiter, "a").unwrap_err(), Limit::PerOwner, "between two requests");
    pass(GRACE).await;
    assert!(admit(&limiter, "a").is_ok());
}

/// An owner whose busy connections fill the limiter loses some of them after their responses.
#[tokio::test(start_paused = true)]
async fn busy_owner_makes_room_for_others() {
    let limiter = limiter(4, 4);
    let large: Vec<_> = (0..4).map(|_| admit(&limiter, "large").unwrap()).collect();
    large.iter().for_each(|permit| permit.busy());
    let others = ["b", "c"].map(|name| admit(&limiter, name).unwrap());
    assert_eq!(large.iter().filter(|permit| permit.is_evicted()).count(), 2);
    assert_eq!(limiter.table.lock().counts(), (4, 2));
    drop(large);
    assert_eq!(limiter.table.lock().counts(), (2, 0));
    drop(others);
    assert_eq!(limiter.table.lock().counts(), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn number_of_evicted_connections_is_bounded() {
    let limiter = limiter(4 * MAX_CLOSING, 4 * MAX_CLOSING);
    let large: Vec<_> = (0..4 * MAX_CLOSING).map(|_| admit(&limiter, "large").unwrap()).collect();
    pass(SECOND).await;
    let others: Vec<_> = (0..2 * MAX_CLOSING).map_while(|_| admit(&limiter, "other").ok()).collect();
    assert_eq!(others.len(), MAX_CLOSING);
    drop(large);
    assert!(admit(&limiter, "other").is_ok());
}

/// Slow requests do not prevent the eviction of idle connections.
#[tokio::test(start_paused = true)]
async fn busy_evictions_leave_room_for_idle_ones() {
    let limiter = limiter(2 * MAX_CLOSING, 2 * MAX_CLOSING);
    let large: Vec<_> = (0..2 * MAX_CLOSING).map(|_| admit(&limiter, "large").unwrap()).collect();
    large.iter().for_each(|permit| permit.busy());
    let others: Vec<_> = (0..MAX_CLOSING).map_while(|_| admit(&limiter, "other").ok()).collect();
    assert_eq!(others.len(), MAX_CLOSING_BUSY);
    large.iter().for_each(|permit| permit.idle());
    pass(GRACE).await;
    assert!(admit(&limiter, "other").is_ok());
}

async fn poll_once<F: Future>(mut future: Pin<&mut F>) -> Poll<F::Output> {
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await
}

/// Bytes in the receive buffer count, even if this process was not notified yet.
#[tokio::test]
async fn unread_request_is_not_interrupted() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    accepted.set_nonblocking(true).unwrap();
    let stream = tokio::net::TcpStream::from_std(accepted.try_clone().unwrap()).unwrap();
    let limiter = ConnectionLimiter::new(Bounds { total: 1, per_owner: 1, grace: Duration::ZERO });
    let permit = admit(&limiter, "a").unwrap();
    let mut stream = Tracked::new(stream, permit.clone());
    let mut buffer = [0; 4];
    let mut read = pin!(stream.read_exact(&mut buffer));
    assert!(poll_once(read.as_mut()).await.is_pending());
    client.write_all(b"late").unwrap();
    while accepted.peek(&mut [0; 4]).unwrap_or(0) < 4 {
        std::thread::yield_now();
    }
    let _next = admit(&limiter, "a").unwrap();
    match poll_once(read.as_mut()).await {
        Poll::Ready(read) => assert!(read.is_ok()),
        Poll::Pending => assert_eq!(read.await.unwrap(), 4),
    }
}

#[tokio::test(start_paused = true)]
async fn addresses_of_one_pod_share_a_limit() {
    let limiter = limiter(10, 2);
    let address = |last| Owner::Address([10, 0, 0, last].into());
    let permits = [1, 2].map(|last| limiter.try_admit(address(last)).unwrap().0);
    permits.iter().for_each(|permit| {
        permit.busy();
        permit.set_owner(pod("a"));
    });
    assert_eq!(admit(&limiter, "a").unwrap_err(), Limit::PerOwner);
    assert!(limiter.try_admit(address(1)).is_ok(), "the address itself has no connection any more");
    drop(permits);
    assert_eq!(limiter.table.lock().counts(), (0, 0));
}

async fn ended_after(permit: &ConnectionPermit) -> (Timeout, Duration) {
    let began = Instant::now();
    let timeout = permit.drive(std::future::pending::<()>()).await.unwrap_err();
    (timeout, began.elapsed())
}

/// IMDS-13: SDKs keep connections for a minute.
#[tokio::test(start_paused = true)]
async fn each_phase_has_its_timeout() {
    let permit = admit(&limiter(1, 1), "a").unwrap();
    let seconds = Duration::from_secs;
    assert_eq!(ended_after(&permit).await, (Timeout::Silent, seconds(5)));
    permit.busy();
    permit.idle();
    assert_eq!(ended_after(&permit).await, (Timeout::Idle, seconds(75)));
    permit.connection.received(permit.limiter.now());
    pass(seconds(3)).await;
    permit.connection.received(permit.limiter.now());
    assert_eq!(ended_after(&permit).await, (Timeout::Silent, seconds(2)), "later bytes do not extend the deadline");
    permit.busy();
    let busy = permit.drive(tokio::time::sleep(seconds(1_000))).await;
    assert!(busy.is_ok());
    permit.connection.stalled(permit.limiter.now());
    assert_eq!(ended_after(&permit).await, (Timeout::Stalled, seconds(5)));
}

#[tokio::test(start_paused = true)]
async fn evicted_stream_delivers_unread_bytes() {
    let limiter = limiter(1, 1);
    let permit = admit(&limiter, "a").unwrap();
    let (mut client, stream) = tokio::io::duplex(64);
    let mut stream = Tracked::new(stream, permit.clone());
    pass(SECOND).await;
    client.write_all(b"late").await.unwrap();
    let _next = admit(&limiter, "a").unwrap();
    let mut read = Vec::new();
    let error = permit.drive(stream.read_to_end(&mut read)).await.unwrap().unwrap_err();
    assert_eq!((error.kind(), read.as_slice()), (std::io::ErrorKind::ConnectionAborted, b"late".as_slice()));
}

#[tokio::test(start_paused = true)]
async fn stalled_client_is_evicted() {
    let limiter = limiter(1, 1);
    let permit = admit(&limiter, "a").unwrap();
    let (_client, stream) = tokio::io::duplex(1);
    let mut stream = Tracked::new(stream, permit.clone());
    permit.busy();
    let writing = permit.drive(stream.write_all(b"response"));
    let next = async {
        tokio::task::yield_now().await;
        pass(GRACE).await;
        admit(&limiter, "b").or_else(|_| admit(&limiter, "a")).map(drop)
    };
    let (written, admitted) = tokio::join!(writing, next);
    assert_eq!(written.unwrap().unwrap_err().kind(), std::io::ErrorKind::ConnectionAborted);
    assert_eq!(admitted, Ok(()));
}
