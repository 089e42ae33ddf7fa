//! This workspace's server, over TCP and a unix socket, with everything that it has.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nbd_client::{
    ApiMisuse, Bytes, Client, Connector, Durability, Error, ExtentLimit, MetaContextName,
    ReplyMode, Scope, Speed, TransmissionFlags, ZeroMode,
};
use nbd_server::export::{ExportEntry, MemoryExport};
use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::common::span;

const MIB: usize = 1 << 20;

struct Serving {
    connector: Connector,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

async fn serve(address: &ListenAddress) -> Serving {
    let exports = ExportRegistry::new();
    let disk = ExportEntry::new(Arc::new(MemoryExport::new(4 << 20)));
    exports.add("disk", disk.description("four mebibytes")).unwrap();
    exports.add("other", ExportEntry::new(Arc::new(MemoryExport::new(512)))).unwrap();
    let mut server = Server::new(ServerConfig::default(), exports);
    let bound = server.listen(address).await.unwrap().remove(0);
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        server.serve(async { stopped.await.unwrap_or(()) }).await.unwrap();
    });
    Serving { connector: Connector::new(bound.uri("disk")), stop, task }
}

impl Serving {
    async fn end(self) {
        self.stop.send(()).unwrap();
        self.task.await.unwrap();
    }
}

/// Random operations against a plain vector of bytes.
async fn compare_with_model(client: &Client, seed: u64) {
    let mut state = seed | 1;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap()
    };
    let size = usize::try_from(client.info().size).unwrap();
    let mut model = vec![0; size];
    for step in 0..400 {
        let offset = random(size);
        let length = random(size - offset).min([1, 512, 5000, 300_000][random(4)]);
        let (at, place) = (offset as u64, offset..offset + length);
        match random(4) {
            0 => {
                let data: Vec<u8> = (0..length).map(|index| (index + step) as u8).collect();
                model[place].copy_from_slice(&data);
                client.write(at, Bytes::from(data), Durability::Cached).await.unwrap();
            }
            1 => {
                model[place].fill(0);
                let (mode, speed) = (ZeroMode::MayUnmap, Speed::Any);
                let length = length as u64;
                client
                    .write_zeroes(span(at, length), mode, speed, Durability::Cached)
                    .await
                    .unwrap();
            }
            _ => {
                let data = client.read(span(at, length)).await.unwrap();
                assert!(data == model[place], "seed {seed}, step {step}: {length} at {offset}");
            }
        }
    }
    assert!(client.read(span(0, size)).await.unwrap() == model, "seed {seed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_operations_agree_with_a_model_in_every_reply_mode() {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seed = since.as_nanos() as u64;
    for mode in [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended] {
        let serving = serve(&ListenAddress::Tcp("127.0.0.1:0".into())).await;
        let client = serving.connector.clone().reply_mode(mode).connect().await.unwrap();
        assert_eq!(client.reply_mode(), mode);
        compare_with_model(&client, seed).await;
        client.disconnect().await.unwrap();
        serving.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn block_status_of_what_was_written() {
    let directory = tempfile::tempdir().unwrap();
    let serving = serve(&ListenAddress::Unix(directory.path().join("s"))).await;
    let allocation = MetaContextName::base_allocation();
    let connector = serving.connector.clone().meta_contexts([allocation.clone()]);
    let client = connector.connect().await.unwrap();
    client.write(MIB as u64, vec![1; MIB].into(), Durability::Cached).await.unwrap();
    let mut stream = client.extents(&allocation, 0..client.info().size);
    let mut extents = Vec::new();
    while let Some(extent) = stream.next().await {
        let extent = extent.unwrap();
        extents.push((extent.offset, extent.length, extent.flags));
    }
    let mib = MIB as u64;
    assert_eq!(extents, [(0, mib, 3), (mib, mib, 0), (2 * mib, 2 * mib, 3)]);
    let one = client.block_status(span(0, 4 * mib), ExtentLimit::One).await.unwrap();
    assert_eq!((one[0].1.len(), one[0].1[0].length), (1, mib));
    client.disconnect().await.unwrap();
    serving.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_connections_write_one_disk() {
    let directory = tempfile::tempdir().unwrap();
    let serving = serve(&ListenAddress::Unix(directory.path().join("s"))).await;
    let four = NonZeroUsize::new(4).unwrap();
    let client = serving.connector.clone().connections(four).connect().await.unwrap();
    assert!(client.info().flags.contains(TransmissionFlags::CAN_MULTI_CONN));
    assert_eq!(client.connections(), 4);
    let mut writers = tokio::task::JoinSet::new();
    for block in 0..1024_u64 {
        let client = client.clone();
        writers.spawn(async move {
            let data = Bytes::from(vec![block as u8; 4096]);
            client.write(block * 4096, data, Durability::Cached).await.unwrap();
        });
    }
    while let Some(writer) = writers.join_next().await {
        writer.unwrap();
    }
    client.flush().await.unwrap();
    let all = client.read(span(0, 4 * MIB)).await.unwrap();
    for (block, data) in all.chunks(4096).enumerate() {
        assert!(data.iter().all(|byte| *byte == block as u8), "block {block}");
    }
    client.disconnect().await.unwrap();
    serving.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_is_listed_and_inspected() {
    let directory = tempfile::tempdir().unwrap();
    let serving = serve(&ListenAddress::Unix(directory.path().join("s"))).await;
    let listed = serving.connector.list().await.unwrap();
    let mut names: Vec<_> = listed.iter().map(|export| &*export.name).collect();
    names.sort_unstable();
    assert_eq!(names, ["disk", "other"]);
    let server = serving.connector.inspect(Scope::AllExports).await.unwrap();
    assert_eq!(server.reply_mode, ReplyMode::Extended);
    let disk = server.exports.iter().find(|export| export.name == "disk").unwrap();
    assert_eq!(disk.description.as_deref(), Some("four mebibytes"));
    assert_eq!(disk.size, 4 << 20);
    assert!(disk.meta_contexts.contains(&MetaContextName::base_allocation()));
    assert!(disk.block_sizes.is_some());
    serving.end().await;
}

#[tokio::test]
#[allow(clippy::reversed_empty_ranges, reason = "what is refused")]
async fn a_range_that_ends_before_it_begins_is_refused_before_anything_is_sent() {
    let directory = tempfile::tempdir().unwrap();
    let serving = serve(&ListenAddress::Unix(directory.path().join("s"))).await;
    let allocation = MetaContextName::base_allocation();
    let connector = serving.connector.clone().meta_contexts([allocation.clone()]);
    let client = connector.connect().await.unwrap();
    let mut extents = client.extents(&allocation, 8..0);
    let refused = [
        client.read(8..0).await.map(drop),
        client.read_chunks(8..0).await.map(drop),
        client.trim(8..0, Durability::Cached).await,
        client.cache(8..0).await,
        client.block_status(8..0, ExtentLimit::Many).await.map(drop),
        extents.next().await.unwrap().map(drop),
    ];
    for result in refused {
        let reversed = ApiMisuse::ReversedRange { start: 8, end: 0 };
        assert!(matches!(&result, Err(Error::Misuse(why)) if *why == reversed), "{result:?}");
    }
    assert!(extents.next().await.is_none());
    client.disconnect().await.unwrap();
    serving.end().await;
}

#[tokio::test]
async fn an_empty_range_is_answered_without_a_request() {
    let directory = tempfile::tempdir().unwrap();
    let serving = serve(&ListenAddress::Unix(directory.path().join("s"))).await;
    let allocation = MetaContextName::base_allocation();
    let connector = serving.connector.clone().meta_contexts([allocation.clone()]);
    let client = connector.connect().await.unwrap();
    // The last place of the export.
    let (at, none) = (client.info().size, client.info().size..client.info().size);
    assert!(client.read(none.clone()).await.unwrap().is_empty());
    assert!(client.read_chunks(none.clone()).await.unwrap().is_empty());
    client.read_into(at, &mut []).await.unwrap();
    client.write(at, Bytes::new(), Durability::Cached).await.unwrap();
    client.trim(none.clone(), Durability::Cached).await.unwrap();
    client.cache(none.clone()).await.unwrap();
    let (mode, speed) = (ZeroMode::MayUnmap, Speed::Any);
    client.write_zeroes(none.clone(), mode, speed, Durability::Cached).await.unwrap();
    let status = client.block_status(none.clone(), ExtentLimit::Many).await.unwrap();
    assert_eq!(status, [(allocation.clone(), Vec::new())]);
    assert!(client.extents(&allocation, none).next().await.is_none());
    // What is past the end is refused even so.
    let past = client.block_status(at + 1..at + 1, ExtentLimit::Many).await;
    assert!(matches!(past, Err(Error::Misuse(ApiMisuse::OutOfBounds { .. }))), "{past:?}");
    client.disconnect().await.unwrap();
    serving.end().await;
}
