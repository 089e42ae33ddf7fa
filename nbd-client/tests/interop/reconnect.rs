//! Servers that are killed during a copy and started again.

use std::num::NonZeroUsize;
use std::time::Duration;

use nbd_client::{Bytes, Durability, TransmissionFlags};
use tokio::task::JoinSet;

use crate::common::{have, nbdkit, pattern, qemu_nbd, span};

const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_survive_a_server_that_is_killed_and_started_again() {
    if !have("qemu-nbd") {
        return;
    }
    let mut peer = qemu_nbd(&[], &vec![0; 4 * MIB]).await;
    let client = peer.connector().reconnect(PATIENCE).connect().await.unwrap();
    let expected = pattern(4 * MIB);
    let mut writers = JoinSet::new();
    for writer in 0..4_usize {
        let client = client.clone();
        let data = Bytes::from(expected.clone());
        writers.spawn(async move {
            for block in (writer..1024).step_by(4) {
                let offset = block * 4096;
                let part = data.slice(offset..offset + 4096);
                client.write(offset as u64, part, Durability::Cached).await.unwrap();
                // The kills below have to meet requests in flight.
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
    }
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        peer.restart().await;
    }
    while let Some(writer) = writers.join_next().await {
        writer.unwrap();
    }
    client.flush().await.unwrap();
    assert!(client.read(span(0, 4 * MIB)).await.unwrap() == expected);
    // Killed processes do not take the page cache with them: nothing acknowledged is missing.
    assert!(std::fs::read(peer.directory().join("disk")).unwrap() == expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_connection_comes_back() {
    if !have("nbdkit") {
        return;
    }
    let mut peer = nbdkit(&["pattern", "16M"], &[]).await;
    let four = NonZeroUsize::new(4).unwrap();
    let connector = peer.connector().connections(four).reconnect(PATIENCE);
    let client = connector.connect().await.unwrap();
    assert!(client.info().flags.contains(TransmissionFlags::CAN_MULTI_CONN));
    assert_eq!(client.connections(), 4);
    let expected = pattern(16 * MIB);
    for _ in 0..2 {
        let mut readers = JoinSet::new();
        for reader in 0..16_usize {
            let client = client.clone();
            let part = expected[reader * MIB..][..MIB].to_vec();
            readers.spawn(async move {
                for block in 0..64 {
                    let offset = (reader * MIB + block * 16_384) as u64;
                    let data = client.read(span(offset, 16_384)).await.unwrap();
                    assert!(data == part[block * 16_384..][..16_384]);
                }
            });
        }
        peer.restart().await;
        while let Some(reader) = readers.join_next().await {
            reader.unwrap();
        }
    }
}
