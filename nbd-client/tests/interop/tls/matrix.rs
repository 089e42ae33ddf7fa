//! Valid credentials: every kind with every version and every server, and data in both directions
//! at once.

use std::num::NonZeroUsize;

use nbd_client::{Bytes, Client, Durability, LocalFiles, Protocol, Scope};
use tokio::task::JoinSet;

use super::credentials::Maker;
use super::{Kind, NAME, Program, Site, Version};
use crate::common::{Peer, have, pattern, span};

const MIB: usize = 1 << 20;

/// Writes the second half of the disk while the first half is read, over several connections, in
/// pieces of every size; then compares everything, also in the server's file.
async fn exchange(client: &Client, peer: &Peer, size: usize) {
    let half = size / 2;
    let expected = pattern(size);
    let mut tasks = JoinSet::new();
    let mut offset = 0;
    for length in [1, 511, 4096, 16_384, 16_385, 65_536, 300_001, 1_000_000].into_iter().cycle() {
        if offset >= half {
            break;
        }
        let range = offset..(offset + length).min(half);
        offset = range.end;
        let data = Bytes::copy_from_slice(&expected[half..][range.clone()]);
        let writer = client.clone();
        let at = (half + range.start) as u64;
        tasks.spawn(async move { writer.write(at, data, Durability::Cached).await.unwrap() });
        let (reader, wanted) = (client.clone(), expected[range.clone()].to_vec());
        tasks.spawn(async move {
            let got = reader.read(span(range.start as u64, wanted.len())).await.unwrap();
            assert!(got == wanted, "the data at {range:?}");
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    client.flush().await.unwrap();
    assert!(client.read(span(0, size)).await.unwrap() == expected, "one large READ");
    assert!(std::fs::read(peer.directory().join("disk")).unwrap() == expected, "the server's file");
}

async fn every_program(maker: Maker, kind: Kind, version: Version) {
    let Some(site) = Site::new(maker) else { return };
    for program in Program::ALL {
        if !have(program.name()) {
            continue;
        }
        let directory = if kind == Kind::X509 { "server" } else { "keys" };
        let size = 6 * MIB;
        let mut contents = pattern(size);
        contents[size / 2..].fill(0);
        let peer = site.serve(program, kind, version, directory, &contents).await;
        let connector = site.connector(&peer, kind).connections(NonZeroUsize::new(3).unwrap());
        let client = connector.connect().await.unwrap();
        assert!(client.is_encrypted());
        assert_eq!(client.connections(), 3, "{program:?}");
        exchange(&client, &peer, size).await;
        client.disconnect().await.unwrap();

        let server = connector.inspect(Scope::AllExports).await.unwrap();
        assert!(server.tls, "{program:?}");
        assert_eq!(server.protocol, Protocol::NewstyleFixed);
        assert_eq!(server.exports[0].size, size as u64);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_of_certtool_with_tls_1_3() {
    every_program(Maker::Certtool, Kind::X509, Version::Tls13).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_of_openssl_with_tls_1_2() {
    every_program(Maker::Openssl, Kind::X509, Version::Tls12).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pre_shared_keys_with_tls_1_3() {
    every_program(Maker::Openssl, Kind::PreSharedKey, Version::Tls13).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pre_shared_keys_with_tls_1_2() {
    every_program(Maker::Openssl, Kind::PreSharedKey, Version::Tls12).await;
}

#[tokio::test]
async fn a_uri_says_it_all_if_it_may_name_files() {
    if !have("nbdkit") {
        return;
    }
    let Some(site) = Site::new(Maker::Openssl) else { return };
    let contents = pattern(MIB);
    for (kind, directory) in [(Kind::X509, "server"), (Kind::PreSharedKey, "keys")] {
        let peer = site.serve(Program::Nbdkit, kind, Version::Tls13, directory, &contents).await;
        let socket = peer.socket();
        let uri = match kind {
            Kind::X509 => format!(
                "nbds+unix:///?socket={}&tls-certificates={}&tls-hostname={NAME}",
                socket.display(),
                site.path("client").display()
            ),
            Kind::PreSharedKey => format!(
                "nbds+unix://bob%3Abuilder@/?socket={}&tls-psk-file={}",
                socket.display(),
                site.path("keys/keys.psk").display()
            ),
        };
        let connector: nbd_client::Connector = uri.parse().unwrap();
        let client = connector.local_files(LocalFiles::Allowed).connect().await.unwrap();
        assert!(client.is_encrypted());
        assert!(client.read(span(0, MIB)).await.unwrap() == contents);
    }
}
