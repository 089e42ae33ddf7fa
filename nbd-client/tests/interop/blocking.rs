//! The blocking client, against this workspace's server, nbdkit and qemu-nbd.

use std::net::TcpListener;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nbd_client::blocking::{self, Client, Interrupter};
use nbd_client::{
    Bytes, Connector, Durability, Error, ExtentLimit, LostConnection, MetaContextName, ReadChunk,
    Scope, Speed, ZeroMode,
};
use nbd_server::export::{ExportEntry, MemoryExport};
use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};
use tokio::runtime::Runtime;

use crate::common::{have, nbdkit, pattern, qemu_nbd};

const MIB: usize = 1 << 20;

/// This workspace's server with a disk in memory. It ends with the runtime.
fn serve(address: &ListenAddress) -> (Runtime, Connector) {
    let runtime = Runtime::new().unwrap();
    let exports = ExportRegistry::new();
    let disk = ExportEntry::new(Arc::new(MemoryExport::new(4 << 20)));
    exports.add("disk", disk.description("four mebibytes")).unwrap();
    let mut server = Server::new(ServerConfig::default(), exports);
    let bound = runtime.block_on(server.listen(address)).unwrap().remove(0);
    runtime.spawn(server.serve(std::future::pending::<()>()));
    (runtime, Connector::new(bound.uri("disk")))
}

fn every_command_works(connector: &Connector) {
    let allocation = MetaContextName::base_allocation();
    let connector = connector.clone().meta_contexts([allocation.clone()]);
    let client = Client::connect(&connector).unwrap();
    assert_eq!(client.info().size, 4 << 20);
    assert_eq!(client.info().description.as_deref(), Some("four mebibytes"));
    assert_eq!(client.meta_contexts(), std::slice::from_ref(&allocation));
    let data = pattern(64 << 10);
    client.write(MIB as u64, data.clone().into(), Durability::Fua).unwrap();
    assert_eq!(client.read(0..2 << 20).unwrap()[MIB..][..64 << 10], data);
    let mut part = vec![1; 100];
    client.read_into(MIB as u64 + 8, &mut part).unwrap();
    assert_eq!(part, data[8..108]);
    client.flush().unwrap();
    client.cache(0..4096).unwrap();
    let extents: Vec<_> =
        client.extents(&allocation, 0..4 << 20).map(|extent| extent.unwrap()).collect();
    assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), 4 << 20);
    let is_zero = |at: u64| {
        let found = extents.iter().find(|it| it.offset <= at && at < it.offset + it.length);
        found.unwrap().allocation().contains(nbd_client::AllocationFlags::STATE_ZERO)
    };
    assert!(is_zero(0) && !is_zero(MIB as u64) && is_zero(3 << 20));
    let status = client.block_status(0..4096, ExtentLimit::One).unwrap();
    assert_eq!(status[0].1.len(), 1);
    let chunks = client.read_chunks(0..2 << 20).unwrap();
    assert_eq!(chunks.iter().map(ReadChunk::length).sum::<u64>(), 2 << 20);
    let (mode, speed) = (ZeroMode::MayUnmap, Speed::Any);
    client.write_zeroes(MIB as u64..(MIB + 4096) as u64, mode, speed, Durability::Cached).unwrap();
    client.trim((MIB + 4096) as u64..2 << 20, Durability::Cached).unwrap();
    assert_eq!(client.read(MIB as u64..(MIB + 4096) as u64).unwrap(), vec![0; 4096]);
    assert!(matches!(client.read(0..5 << 20), Err(Error::Misuse(_))));
    let other = client.clone();
    client.disconnect().unwrap();
    assert!(matches!(other.read(0..1), Err(Error::Closed)));
}

#[test]
fn every_command_works_without_a_runtime_of_the_caller() {
    let directory = tempfile::tempdir().unwrap();
    let unix = ListenAddress::Unix(directory.path().join("s"));
    let tcp: ListenAddress = ListenAddress::Tcp("127.0.0.1:0".parse().unwrap());
    for address in [unix, tcp] {
        let (_runtime, connector) = serve(&address);
        every_command_works(&connector);
        let names = blocking::list(&connector).unwrap();
        assert_eq!(names[0].name, "disk");
        let seen = blocking::inspect(&connector, Scope::ThisExport).unwrap();
        assert_eq!(seen.exports[0].size, 4 << 20);
        let contexts = blocking::list_meta_contexts(&connector, &[]).unwrap();
        assert!(contexts.contains(&MetaContextName::base_allocation()));
    }
}

#[test]
fn threads_share_the_connections_of_a_client() {
    let directory = tempfile::tempdir().unwrap();
    let (_runtime, connector) = serve(&ListenAddress::Unix(directory.path().join("s")));
    let connector = connector.connections(NonZeroUsize::new(4).unwrap());
    let client = Client::connect(&connector).unwrap();
    assert_eq!(client.connections(), 4);
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let client = client.clone();
            scope.spawn(move || {
                for round in 0..50 {
                    let offset = (thread * 50 + round) * 4096;
                    let data = vec![(thread * 31 + round) as u8; 4096];
                    client.write(offset, data.clone().into(), Durability::Cached).unwrap();
                    assert_eq!(client.read(offset..offset + 4096).unwrap(), data);
                }
            });
        }
    });
    client.disconnect().unwrap();
}

#[test]
fn servers_of_others_are_read_and_written() {
    let runtime = Runtime::new().unwrap();
    if have("qemu-nbd") {
        let contents = pattern(MIB);
        let peer = runtime.block_on(qemu_nbd(&[], &contents));
        let client = Client::connect(&peer.connector()).unwrap();
        assert_eq!(client.read(0..MIB as u64).unwrap(), contents);
        client.write(512, Bytes::from_static(&[7; 512]), Durability::Cached).unwrap();
        client.flush().unwrap();
        client.disconnect().unwrap();
        let disk = std::fs::read(peer.directory().join("disk")).unwrap();
        assert_eq!(disk[512..1024], [7; 512]);
    }
    if have("nbdkit") {
        let peer = runtime.block_on(nbdkit(&["pattern", "1M"], &[]));
        let client = Client::connect(&peer.connector()).unwrap();
        assert_eq!(client.read(0..MIB as u64).unwrap(), pattern(MIB));
        client.disconnect().unwrap();
    }
}

fn write_key(directory: &Path) -> String {
    let file = directory.join("keys.psk");
    std::fs::write(&file, format!("alice:{}\n", "0123456789abcdef".repeat(4))).unwrap();
    file.display().to_string()
}

#[cfg(feature = "tls")]
#[test]
fn a_connection_with_tls_is_encrypted() {
    if !have("nbdkit") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let keys = write_key(directory.path());
    let runtime = Runtime::new().unwrap();
    let psk = format!("--tls-psk={keys}");
    let peer = runtime.block_on(nbdkit(&["--tls=require", &psk, "pattern", "1M"], &[]));
    let uri = format!("nbds+unix://alice@/?socket={}&tls-psk-file={keys}", peer.socket().display());
    let connector: Connector = uri.parse().unwrap();
    let client = Client::connect(&connector.local_files(nbd_client::LocalFiles::Allowed)).unwrap();
    assert!(client.is_encrypted());
    assert_eq!(client.read(0..MIB as u64).unwrap(), pattern(MIB));
    client.disconnect().unwrap();
    let plain = Client::connect(&peer.connector()).unwrap_err();
    assert!(matches!(plain, Error::Tls { .. }), "{plain}");
}

#[test]
fn time_limits_hold_without_a_runtime_of_the_caller() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("nbd://{}", silent.local_addr().unwrap());
    let connector: Connector = uri.parse().unwrap();
    let connector = connector.handshake_timeout(Duration::from_millis(50));
    let error = Client::connect(&connector).unwrap_err();
    assert!(matches!(error, Error::HandshakeTimeout { .. }), "{error}");
    if !have("nbdkit") {
        return;
    }
    let runtime = Runtime::new().unwrap();
    let peer = runtime.block_on(nbdkit(&["--filter=delay", "pattern", "1M", "rdelay=60"], &[]));
    let connector = peer.connector().request_timeout(Duration::from_millis(50));
    let client = Client::connect(&connector).unwrap();
    match client.read(0..512) {
        Err(Error::Lost { reason: LostConnection::RequestTimeout { .. }, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_interrupter_ends_a_call_that_waits_and_all_later_ones() {
    if !have("nbdkit") {
        return;
    }
    let runtime = Runtime::new().unwrap();
    let peer = runtime.block_on(nbdkit(&["--filter=delay", "pattern", "1M", "rdelay=60"], &[]));
    let interrupter = Interrupter::new();
    let client = Client::connect_interruptible(&peer.connector(), &interrupter).unwrap();
    let reader = client.clone();
    let reading = std::thread::spawn(move || reader.read(0..512));
    assert!(!interrupter.is_interrupted());
    interrupter.interrupt("stopped by the test");
    interrupter.interrupt("a second reason");
    let interrupted = |error: Error| {
        assert!(matches!(error, Error::Interrupted { .. }), "{error}");
        assert_eq!(error.to_string(), "stopped by the test");
    };
    interrupted(reading.join().unwrap().unwrap_err());
    interrupted(client.read(0..512).unwrap_err());
    interrupted(Client::connect_interruptible(&peer.connector(), &interrupter).unwrap_err());
    // A client of its own is not concerned.
    let other = Client::connect(&peer.connector()).unwrap();
    assert_eq!(other.info().size, MIB as u64);
}

#[test]
fn a_limit_of_calls_ends_those_that_hang_and_later_ones_of_their_client_alone() {
    if !have("nbdkit") {
        return;
    }
    let runtime = Runtime::new().unwrap();
    let delayed = ["--filter=delay", "pattern", "1M", "rdelay=3600"];
    let hanging = runtime.block_on(nbdkit(&delayed, &[]));
    let prompt = runtime.block_on(nbdkit(&["pattern", "1M"], &[]));
    let interrupter = Interrupter::new();
    let connect = |to: &Connector| Client::connect_interruptible(to, &interrupter).unwrap();
    let (client, other) = (connect(&hanging.connector()), connect(&prompt.connector()));
    let reader = client.clone();
    let reading = std::thread::spawn(move || reader.read(0..512));
    interrupter.limit_calls(Duration::from_secs(1), "it takes too long");
    interrupter.limit_calls(Duration::from_secs(3600), "only the first limit is kept");
    let given_up = |error: Error| {
        assert!(matches!(error, Error::Interrupted { .. }), "{error}");
        assert_eq!(error.to_string(), "it takes too long");
    };
    given_up(reading.join().unwrap().unwrap_err());
    given_up(client.read(512..1024).unwrap_err());
    assert!(!interrupter.is_interrupted());
    assert_eq!(other.read(8..16).unwrap(), 8_u64.to_be_bytes()[..]);
    assert_eq!(connect(&prompt.connector()).info().size, MIB as u64);
}

/// More calls than a task of tokio may make before it has to yield, which it cannot do here.
fn many_reads_in_one_task(connector: &Connector) {
    let client = Client::connect(connector).unwrap();
    for round in 0..500_u64 {
        let at = round * 8;
        assert_eq!(client.read(at..at + 8).unwrap(), at.to_be_bytes()[..]);
    }
    client.disconnect().unwrap();
}

#[test]
fn calls_in_an_asynchronous_task_block_its_thread_and_nothing_else() {
    if !have("nbdkit") {
        return;
    }
    let peers = Runtime::new().unwrap();
    let peer = peers.block_on(nbdkit(&["pattern", "1M"], &[]));
    let connector = peer.connector();
    // Where the only thread of a runtime is blocked.
    let single = tokio::runtime::Builder::new_current_thread().build().unwrap();
    single.block_on(async { tokio::spawn(async {}).await.unwrap() });
    let task_connector = connector.clone();
    single.block_on(async {
        let task = tokio::spawn(async move { many_reads_in_one_task(&task_connector) });
        task.await.unwrap();
    });
    // And one of several.
    let ran = Arc::new(AtomicBool::new(false));
    let others = Arc::clone(&ran);
    let several = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    several.block_on(async move {
        let blocked = tokio::spawn(async move { many_reads_in_one_task(&connector) });
        let other = tokio::spawn(async move { others.store(true, Ordering::Relaxed) });
        other.await.unwrap();
        blocked.await.unwrap();
    });
    assert!(ran.load(Ordering::Relaxed));
}

#[test]
fn a_client_that_is_dropped_says_goodbye() {
    if !have("nbdkit") {
        return;
    }
    let runtime = Runtime::new().unwrap();
    let log = "{directory}/log";
    let logfile = format!("logfile={log}");
    let peer = runtime.block_on(nbdkit(&["--filter=log", "pattern", "1M", &logfile], &[]));
    let client = Client::connect(&peer.connector()).unwrap();
    client.read(0..512).unwrap();
    let clone = client.clone();
    drop(client);
    clone.read(512..1024).unwrap();
    drop(clone);
    // The goodbye is sent in the background, and nbdkit writes its log in its own time.
    let path = peer.directory().join("log");
    let has_ended = || std::fs::read_to_string(&path).unwrap_or_default().contains("Disconnect");
    for _ in 0..2000 {
        if has_ended() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{}", std::fs::read_to_string(&path).unwrap_or_default());
}
