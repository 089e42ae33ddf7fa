//! Limits of data and requests in flight.

use std::num::NonZeroUsize;

use nbd_client::{Client, Connector, ReplyMode};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use crate::script::{Offer, Script, connector, data_at, guarded, span};

/// Connects to a server that holds back its answers until no further request comes, and gives the
/// largest number of requests it ever held.
async fn most_held(connector: Connector, length: usize) -> usize {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = tokio::spawn(async move {
        let mut server = Script::over(theirs);
        server.handshake(&Offer::new(ReplyMode::Simple)).await.unwrap();
        let (mut held, mut most) = (Vec::new(), 0);
        loop {
            let quiet = std::time::Duration::from_millis(100);
            match tokio::time::timeout(quiet, server.request()).await {
                Ok(Ok(request)) if request.command == 0 => {
                    held.push(request);
                    most = most.max(held.len());
                }
                Ok(_) => return most,
                Err(_) if held.is_empty() => {}
                // Last in, first out: order does not matter.
                Err(_) => server.answer_read(&held.pop().unwrap()).await.unwrap(),
            }
        }
    });
    let client = guarded(connector.connect_over(ours)).await.unwrap();
    let mut reads = JoinSet::new();
    for index in 0..10_u64 {
        let client: Client = client.clone();
        reads.spawn(async move {
            let offset = index * 1000;
            assert_eq!(client.read(span(offset, length)).await.unwrap(), data_at(offset, length));
        });
    }
    guarded(async {
        while let Some(read) = reads.join_next().await {
            read.unwrap();
        }
    })
    .await;
    guarded(client.disconnect()).await.unwrap();
    server.await.unwrap()
}

#[tokio::test]
async fn no_more_requests_are_in_flight_than_the_caller_allows() {
    let three = NonZeroUsize::new(3).unwrap();
    assert_eq!(most_held(connector().max_in_flight(three), 100).await, 3);
}

#[tokio::test]
async fn no_more_data_is_in_flight_than_the_caller_allows() {
    let bytes = NonZeroUsize::new(450).unwrap();
    assert_eq!(most_held(connector().max_bytes_in_flight(bytes), 100).await, 4);
}

#[tokio::test]
async fn a_request_over_the_limit_is_sent_alone() {
    let bytes = NonZeroUsize::new(50).unwrap();
    assert_eq!(most_held(connector().max_bytes_in_flight(bytes), 100).await, 1);
}
