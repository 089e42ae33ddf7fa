//! Disconnecting by the client.

use nbd_client::{Error, ReplyMode};
use tokio::sync::oneshot;

use crate::script::{connected, data_at, guarded};

#[tokio::test]
async fn requests_made_before_are_answered_and_disc_comes_last() {
    let client = connected(ReplyMode::Extended, |mut server| async move {
        let first = server.request().await?;
        let second = server.request().await?;
        server.answer_read(&second).await?;
        server.answer_read(&first).await?;
        server.goodbye().await;
        Ok(())
    })
    .await;
    let (reader, other) = (client.clone(), client.clone());
    let (reads, ended) = guarded(async {
        tokio::join!(
            async { tokio::join!(reader.read(0..10), reader.read(10..20)) },
            client.disconnect(),
        )
    })
    .await;
    assert_eq!(reads.0.unwrap(), data_at(0, 10));
    assert_eq!(reads.1.unwrap(), data_at(10, 10));
    ended.unwrap();
    let late = other.read(0..1).await;
    assert!(matches!(late, Err(Error::Closed)), "{late:?}");
    other.disconnect().await.unwrap();
}

#[tokio::test]
async fn dropping_the_last_clone_says_goodbye() {
    let (ended, end) = oneshot::channel();
    let client = connected(ReplyMode::Simple, |mut server| async move {
        server.goodbye().await;
        ended.send(()).unwrap();
        Ok(())
    })
    .await;
    let clone = client.clone();
    drop(client);
    drop(clone);
    guarded(end).await.unwrap();
}

#[tokio::test]
async fn a_server_that_closes_while_nothing_is_asked_is_noticed() {
    let client = connected(ReplyMode::Simple, |server| async move {
        drop(server);
        Ok(())
    })
    .await;
    let error = guarded(client.read(0..1)).await.unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error}");
    let error = guarded(client.disconnect()).await.unwrap_err();
    assert!(error.to_string().contains("was lost"), "{error}");
}

#[tokio::test]
async fn a_server_that_never_answers_does_not_hold_up_the_end_for_ever() {
    let client = connected(ReplyMode::Simple, |mut server| async move {
        server.request().await?;
        server.closed().await;
        Ok(())
    })
    .await;
    let other = client.clone();
    let (read, ended) =
        guarded(async { tokio::join!(other.read(0..1), client.disconnect()) }).await;
    for error in [read.map(drop).unwrap_err(), ended.unwrap_err()] {
        assert!(error.to_string().contains("did not answer 1 requests"), "{error}");
    }
}
