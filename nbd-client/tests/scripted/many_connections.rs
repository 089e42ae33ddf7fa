//! Several connections to one server.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nbd_client::{Client, Connector, Error, ReplyMode, TransmissionFlags};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;

use crate::script::{Offer, SIZE, Script, guarded};

/// A server that makes each connection, by its number, an offer or hangs up on it.
fn listen(offers: fn(usize) -> Option<Offer>) -> (Connector, tempfile::TempDir, Arc<AtomicUsize>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let busy = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&busy);
    tokio::spawn(async move {
        for number in 0.. {
            let (stream, _) = listener.accept().await.unwrap();
            let Some(offer) = offers(number) else { continue };
            let count = Arc::clone(&count);
            tokio::spawn(async move {
                let mut server = Script::over(stream);
                drop(server.handshake(&offer).await);
                let mut asked = false;
                while let Ok(request) = server.request().await {
                    if request.command == 0 {
                        count.fetch_add(usize::from(!asked), Ordering::Relaxed);
                        asked = true;
                        server.answer_read(&request).await.unwrap();
                    }
                }
            });
        }
    });
    let uri = format!("nbd+unix:///?socket={}", path.display());
    let connections = NonZeroUsize::new(4).unwrap();
    let connector = uri.parse::<Connector>().unwrap().connections(connections);
    (connector, directory, busy)
}

#[tokio::test]
async fn requests_made_together_use_all_connections() {
    let (connector, _directory, busy) = listen(|_| Some(Offer::new(ReplyMode::Structured)));
    let client = guarded(connector.connect()).await.unwrap();
    assert_eq!(client.connections(), 4);
    let reads = async {
        tokio::try_join!(
            client.read(0..10),
            client.read(10..20),
            client.read(20..30),
            client.read(30..40)
        )
    };
    guarded(reads).await.unwrap();
    assert_eq!(busy.load(Ordering::Relaxed), 4);
    guarded(client.disconnect()).await.unwrap();
}

#[tokio::test]
async fn a_server_without_multi_conn_gets_one_connection() {
    let (connector, _directory, _) = listen(|_| {
        let offer = Offer::new(ReplyMode::Structured);
        Some(Offer { flags: offer.flags - TransmissionFlags::CAN_MULTI_CONN, ..offer })
    });
    assert_eq!(guarded(connector.connect()).await.unwrap().connections(), 1);
}

#[tokio::test]
async fn a_server_that_admits_fewer_is_used_with_what_it_admits() {
    let (connector, _directory, _) =
        listen(|number| (number < 2).then(|| Offer::new(ReplyMode::Structured)));
    let client = guarded(connector.connect()).await.unwrap();
    assert_eq!(client.connections(), 2);
    guarded(client.read(0..10)).await.unwrap();
}

#[tokio::test]
async fn connections_that_see_different_disks_are_refused() {
    let (connector, _directory, _) = listen(|number| {
        Some(Offer { size: SIZE + number as u64, ..Offer::new(ReplyMode::Structured) })
    });
    let error = guarded(connector.connect()).await.unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error}");
    assert!(error.to_string().contains("its size was"), "{error}");
}

/// A runtime on a thread of its own.
fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(1).enable_all().build().unwrap()
}

async fn eight_reads(client: &Client) {
    let reads = (0..8).map(|number| {
        let client = client.clone();
        async move { client.read(number * 10..number * 10 + 10).await.map(drop) }
    });
    let mut reads: tokio::task::JoinSet<_> = reads.collect();
    while let Some(read) = reads.join_next().await {
        read.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_request_uses_the_connections_of_the_runtime_that_makes_it() {
    let (connector, _directory, busy) = listen(|_| Some(Offer::new(ReplyMode::Structured)));
    let runtimes = [runtime(), runtime()];
    let connector = connector.runtimes(runtimes.iter().map(|runtime| runtime.handle().clone()));
    let client = guarded(connector.connect()).await.unwrap();
    assert_eq!(client.connections(), 4);
    let on_second = client.clone();
    guarded(runtimes[1].spawn(async move { eight_reads(&on_second).await })).await.unwrap();
    assert_eq!(busy.load(Ordering::Relaxed), 2, "two of the four belong to that runtime");
    // This runtime has none.
    guarded(eight_reads(&client)).await;
    assert_eq!(busy.load(Ordering::Relaxed), 4);
    guarded(client.disconnect()).await.unwrap();
    for runtime in runtimes {
        runtime.shutdown_background();
    }
}

#[tokio::test]
async fn a_runtime_that_has_ended_is_an_error() {
    let (connector, _directory, _) = listen(|_| Some(Offer::new(ReplyMode::Structured)));
    let ended = runtime();
    let connector = connector.runtimes([ended.handle().clone()]);
    ended.shutdown_background();
    let error = guarded(connector.connect()).await.unwrap_err();
    assert!(matches!(error, Error::Closed), "{error}");
}
