//! Truncated connections, and an attacker who strips TLS.

use std::path::PathBuf;
use std::time::Duration;

use nbd_client::{Bytes, Durability, Error, LostConnection, TlsMode, TlsOptions};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use super::credentials::Maker;
use super::{Kind, Program, Site, Version, plain};
use crate::common::{have, pattern, span};

const MIB: usize = 1 << 20;

/// Hands bytes on between a client and servers: the n-th connection to the n-th server, and at most
/// so many bytes of what the server says.
struct Relay {
    directory: TempDir,
}

impl Relay {
    fn start(targets: Vec<(PathBuf, usize)>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("relay")).unwrap();
        tokio::spawn(async move {
            for (target, limit) in targets {
                let (client, _) = listener.accept().await.unwrap();
                let server = UnixStream::connect(target).await.unwrap();
                tokio::spawn(relay(client, server, limit));
            }
            // A client that still waits is told that there is nothing more.
        });
        Self { directory }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.directory.path().join("relay").display())
    }
}

async fn relay(client: UnixStream, server: UnixStream, limit: usize) {
    let (mut from_client, mut to_client) = client.into_split();
    let (from_server, mut to_server) = server.into_split();
    let up = tokio::spawn(async move {
        drop(tokio::io::copy(&mut from_client, &mut to_server).await);
    });
    let mut limited = from_server.take(limit as u64);
    drop(tokio::io::copy(&mut limited, &mut to_client).await);
    // Only this direction ends: a connection that is half closed.
    drop(to_client.shutdown().await);
    drop(up.await);
}

#[tokio::test]
async fn a_connection_cut_at_any_place_ends_with_an_error_and_in_time() {
    if !have("nbdkit") {
        return;
    }
    let Some(site) = Site::new(Maker::Openssl) else { return };
    for kind in [Kind::X509, Kind::PreSharedKey] {
        let directory = if kind == Kind::X509 { "server" } else { "keys" };
        let peer =
            site.serve(Program::Nbdkit, kind, Version::Tls13, directory, &pattern(MIB)).await;
        // In the greeting, behind the answer to STARTTLS (38 bytes), in the TLS handshake, and in
        // the middle of data.
        for limit in [10, 38, 39, 43, 100, 200, 600, 1000, 2000, 50_000, 400_000] {
            let relay = Relay::start(vec![(peer.socket(), limit)]);
            let connector: nbd_client::Connector = relay.uri().parse().unwrap();
            let connector =
                connector.tls(site.options(kind)).handshake_timeout(Duration::from_secs(30));
            let attempt = async { connector.connect().await?.read(span(0, MIB)).await };
            let outcome = tokio::time::timeout(Duration::from_secs(60), attempt).await.unwrap();
            match outcome {
                Err(Error::HandshakeLost { .. } | Error::Tls { .. } | Error::Lost { .. }) => {}
                other => panic!("{kind:?}, cut after {limit}: {:?}", other.map(|data| data.len())),
            }
        }
    }
}

#[tokio::test]
async fn a_new_connection_has_tls_again_and_is_never_taken_back_to_the_clear() {
    if !have("nbdkit") {
        return;
    }
    let Some(site) = Site::new(Maker::Openssl) else { return };
    let contents = pattern(MIB);
    let peer =
        site.serve(Program::Nbdkit, Kind::PreSharedKey, Version::Tls13, "keys", &contents).await;
    let clear = plain(&contents).await;
    let options = TlsOptions::new(TlsMode::Prefer).pre_shared_keys(site.path("keys")).user("alice");
    // The first two connections break; from the third on somebody offers a server without TLS.
    let targets = vec![
        (peer.socket(), 200_000),
        (peer.socket(), 600_000),
        (clear.socket(), usize::MAX),
        (clear.socket(), usize::MAX),
    ];
    let relay = Relay::start(targets);
    let connector: nbd_client::Connector = relay.uri().parse().unwrap();
    let connector = connector.tls(options).reconnect(Duration::from_secs(3));
    let client = connector.connect().await.unwrap();
    assert!(client.is_encrypted());
    let mut reads = 0;
    let error = loop {
        match client.read(0..100_000).await {
            Ok(data) => {
                assert!(data == contents[..100_000]);
                reads += 1;
                assert!(reads < 20, "it went on in the clear");
            }
            Err(error) => break error,
        }
    };
    assert_eq!(client.reconnects(), 1, "the second connection had TLS");
    match error {
        Error::Lost { reason: LostConnection::ReconnectFailed { .. }, .. } => {}
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_survive_a_server_that_is_killed_and_started_again() {
    if !have("qemu-nbd") {
        return;
    }
    let Some(site) = Site::new(Maker::Openssl) else { return };
    let size = 2 * MIB;
    let mut peer = site
        .serve(Program::QemuNbd, Kind::PreSharedKey, Version::Tls13, "keys", &vec![0; size])
        .await;
    let connector = site.connector(&peer, Kind::PreSharedKey).reconnect(Duration::from_secs(60));
    let client = connector.connect().await.unwrap();
    let expected = pattern(size);
    let writer = {
        let (client, data) = (client.clone(), Bytes::from(expected.clone()));
        tokio::spawn(async move {
            for offset in (0..size).step_by(16 << 10) {
                let part = data.slice(offset..offset + (16 << 10));
                client.write(offset as u64, part, Durability::Cached).await.unwrap();
                // The kill below has to meet requests in flight.
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    peer.restart().await;
    writer.await.unwrap();
    assert!(client.read(span(0, size)).await.unwrap() == expected);
    assert!(client.reconnects() > 0);
}
