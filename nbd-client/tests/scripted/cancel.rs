//! Futures that are dropped while their requests are in flight.

use std::task::Poll;

use nbd_client::{Bytes, Durability, ReplyMode};
use tokio::sync::oneshot;

use crate::script::{DATA, bytes, connected, data_at, guarded, span};

/// Polls a future once and drops it.
async fn poll_once<F: Future>(future: F) {
    let mut future = Box::pin(future);
    std::future::poll_fn(|cx| {
        assert!(future.as_mut().poll(cx).is_pending(), "it cannot be done already");
        Poll::Ready(())
    })
    .await;
}

#[tokio::test]
async fn a_read_dropped_in_the_middle_of_its_reply_keeps_the_stream_in_step() {
    for mode in [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended] {
        const LENGTH: usize = 300_000;
        let (half_sent, half) = oneshot::channel();
        let (dropped, go_on) = oneshot::channel();
        let client = connected(mode, move |mut server| async move {
            let first = server.request().await?;
            let data = data_at(first.offset, LENGTH);
            let header = match mode {
                ReplyMode::Simple => crate::script::simple(0, first.cookie),
                _ => {
                    let body = bytes![first.offset.to_be_bytes(), data];
                    let whole =
                        crate::script::chunk(mode, true, DATA, first.cookie, first.offset, &body);
                    whole[..whole.len() - LENGTH].to_vec()
                }
            };
            server.send(&header).await?;
            server.send(&data[..LENGTH / 2]).await?;
            half_sent.send(()).unwrap();
            go_on.await.unwrap();
            server.send(&data[LENGTH / 2..]).await?;
            let second = server.request().await?;
            server.answer_read(&second).await?;
            server.goodbye().await;
            Ok(())
        })
        .await;
        {
            let mut read = Box::pin(client.read(span(100, LENGTH)));
            tokio::select! {
                _ = &mut read => panic!("half of the reply is missing"),
                sent = half => sent.unwrap(),
            }
        }
        dropped.send(()).unwrap();
        let data = guarded(client.read(5000..6000)).await.unwrap();
        assert_eq!(data, data_at(5000, 1000), "{mode:?}");
        guarded(client.disconnect()).await.unwrap();
    }
}

#[tokio::test]
async fn a_request_dropped_before_it_is_sent_is_never_sent() {
    let client = connected(ReplyMode::Structured, |mut server| async move {
        let only = server.request().await?;
        assert_eq!((only.command, only.offset), (0, 42), "the write was dropped");
        server.answer_read(&only).await?;
        server.goodbye().await;
        Ok(())
    })
    .await;
    // On this single-threaded runtime the connection's task runs only after the drop.
    poll_once(client.write(0, Bytes::from_static(b"never"), Durability::Cached)).await;
    assert_eq!(guarded(client.read(42..45)).await.unwrap(), data_at(42, 3));
    guarded(client.disconnect()).await.unwrap();
}

#[tokio::test]
async fn callers_that_come_and_go_do_not_use_up_the_connection() {
    let client = connected(ReplyMode::Simple, |mut server| async move {
        loop {
            let request = server.request().await?;
            match request.command {
                0 => server.answer_read(&request).await?,
                _ => return Ok(()),
            }
        }
    })
    .await;
    for round in 0..2000_u64 {
        poll_once(client.read(span(round, 64))).await;
        if round % 3 == 0 {
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(guarded(client.read(7..71)).await.unwrap(), data_at(7, 64));
    guarded(client.disconnect()).await.unwrap();
}
