//! The server's end.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use nbd_proto::transmission::{Command, Durability, Fragmentation};
use nbd_proto::wire::{CommandType, ReplyMode};
use nbd_server::export::{Export, ExportEntry, ExportError, ExportInfo, MemoryExport};
use nbd_server::{ExportRegistry, ListenAddress, ServeError, Server, ServerConfig};

use crate::support::{Client, Script, Scripted, TestServer, header, wait_until};

#[test]
fn what_is_in_flight_is_finished_and_every_export_flushed() {
    let gated = Script { gated: Some(0..1), ..Script::default() };
    let (slow, idle) = (Scripted::new(1 << 20, gated), Scripted::new(1 << 20, Script::default()));
    let exports = ExportRegistry::new();
    exports.add("", ExportEntry::new(slow.clone())).unwrap();
    exports.add("idle", ExportEntry::new(idle.clone()).hidden()).unwrap();
    let mut server = TestServer::start(ServerConfig::default(), exports);
    let path = server.path().to_path_buf();

    let mut busy = Client::connect(&server, ReplyMode::Extended);
    let mut bystander = Client::open(&server, ReplyMode::Simple, "idle", &[]);
    let negotiating = server.connect();
    let write = busy.submit(0, 4096, &Command::Write(Durability::Cached), &[7; 4096]);
    wait_until("the write has begun", || slow.gate.arrived() == 1);

    server.begin_stop();
    // The socket goes when the server has stopped to accept.
    wait_until("the socket is gone", || !path.exists());
    bystander.expect_end();
    drop(negotiating);
    assert_eq!(slow.flushes.load(Ordering::SeqCst), 0, "flushing comes after the last write");
    slow.gate.open();
    let (finished, outcome) = busy.next_finished();
    assert_eq!((finished, outcome.result), (write, Ok(())));
    busy.expect_end();

    assert!(server.stop().is_ok());
    assert_eq!(slow.flushes.load(Ordering::SeqCst), 1);
    assert_eq!(idle.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn a_client_that_does_not_take_its_replies_is_cut_after_the_drain_deadline() {
    let mut config = ServerConfig::default();
    config.drain_timeout = Duration::from_millis(100);
    let disk = Scripted::new(64 << 20, Script::default());
    let server = TestServer::with(config, disk.clone());
    let mut client = Client::connect(&server, ReplyMode::Simple);
    let total = 32 << 20;
    client.submit(0, total, &Command::Read(Fragmentation::Allowed), &[]);
    wait_until("the read has begun", || disk.reads.load(Ordering::SeqCst) > 0);
    // Without the deadline this would wait for the client, which waits for it.
    assert!(server.stop().is_ok());
    assert!((client.read_to_end().len() as u64) < total);
}

#[test]
fn a_request_that_has_not_arrived_whole_is_not_waited_for() {
    let mut config = ServerConfig::default();
    config.drain_timeout = Duration::from_secs(3600);
    let disk = Scripted::new(64 << 20, Script::default());
    let mut server = TestServer::with(config, disk.clone());
    for (mode, sent) in [(ReplyMode::Simple, 20_000), (ReplyMode::Extended, 700_000)] {
        let mut client = Client::connect(&server, mode);
        assert_eq!(client.read(0, 1), [0]);
        let mut bytes = client.encode(&header(CommandType::WRITE, 0, 1 << 20));
        bytes.resize(bytes.len() + sent, 1);
        client.send(bytes);
        std::mem::forget(client);
    }
    server.begin_stop();
    wait_until("the server has ended", || server.has_ended());
    assert!(server.stop().is_ok());
    assert_eq!(disk.writes.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_that_is_dropped_cuts_its_clients_and_leaves_no_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let exports = ExportRegistry::new();
    exports.add("", ExportEntry::new(Arc::new(MemoryExport::new(4096)))).unwrap();
    let mut server = Server::new(ServerConfig::default(), exports);
    server.listen(&ListenAddress::Unix(path.clone())).await.unwrap();
    let serving = tokio::spawn(server.serve(std::future::pending()));
    let address = path.clone();
    let mut client = tokio::task::spawn_blocking(move || {
        let mut client = UnixStream::connect(address).unwrap();
        client.set_read_timeout(Some(crate::support::LONG)).unwrap();
        client.read_exact(&mut [0; 18]).unwrap();
        client
    })
    .await
    .unwrap();
    serving.abort();
    assert!(serving.await.unwrap_err().is_cancelled());
    let rest = tokio::task::spawn_blocking(move || client.read(&mut [0]).unwrap());
    assert_eq!(rest.await.unwrap(), 0);
    wait_until("the socket is gone", || !path.exists());
}

#[test]
fn an_export_that_cannot_be_flushed_is_named_and_the_others_are_flushed() {
    /// Cannot keep what it promised.
    struct Lossy;
    impl Export for Lossy {
        fn info(&self) -> ExportInfo {
            ExportInfo::new(4096)
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), ExportError> {
            Ok(())
        }
        fn flush(&self) -> Result<(), ExportError> {
            Err(ExportError::new(nbd_proto::wire::Errno::EIO, "the disk is gone"))
        }
    }
    /// Fails worse.
    struct Broken;
    impl Export for Broken {
        fn info(&self) -> ExportInfo {
            ExportInfo::new(4096)
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), ExportError> {
            Ok(())
        }
        fn flush(&self) -> Result<(), ExportError> {
            panic!("the script says so")
        }
    }
    for (export, text) in [
        (Arc::new(Lossy) as Arc<dyn Export>, "the disk is gone"),
        (Arc::new(Broken) as Arc<dyn Export>, "panicked"),
    ] {
        let good = Scripted::new(4096, Script::default());
        let exports = ExportRegistry::new();
        exports.add("a", ExportEntry::new(export)).unwrap();
        exports.add("b", ExportEntry::new(good.clone())).unwrap();
        let server = TestServer::start(ServerConfig::default(), exports);
        let error = server.stop().unwrap_err();
        assert!(matches!(&error, ServeError::Flush { export, .. } if export == "a"), "{error:?}");
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(good.flushes.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn an_export_whose_flush_hangs_does_not_keep_the_others_from_being_flushed() {
    /// Is flushed when it may be.
    struct Hanging(Mutex<mpsc::Receiver<()>>);
    impl Export for Hanging {
        fn info(&self) -> ExportInfo {
            ExportInfo::new(4096)
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), ExportError> {
            Ok(())
        }
        fn flush(&self) -> Result<(), ExportError> {
            let _ = self.0.lock().unwrap().recv();
            Ok(())
        }
    }
    let (release, released) = mpsc::channel();
    let good = Scripted::new(4096, Script::default());
    let exports = ExportRegistry::new();
    exports.add("a", ExportEntry::new(Arc::new(Hanging(Mutex::new(released))))).unwrap();
    exports.add("b", ExportEntry::new(good.clone())).unwrap();
    let server = TestServer::start(ServerConfig::default(), exports);
    let ending = std::thread::spawn(move || server.stop());
    wait_until("the other one is flushed", || good.flushes.load(Ordering::SeqCst) == 1);
    assert!(!ending.is_finished());
    release.send(()).unwrap();
    assert!(ending.join().unwrap().is_ok());
}

#[test]
fn an_export_that_was_replaced_or_removed_is_flushed_while_clients_use_it() {
    /// Counts its flushes where they can be seen when only clients have it.
    struct Counted(Arc<AtomicUsize>);
    impl Export for Counted {
        fn info(&self) -> ExportInfo {
            ExportInfo::new(4096)
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), ExportError> {
            Ok(())
        }
        fn flush(&self) -> Result<(), ExportError> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }
    let counters: [Arc<AtomicUsize>; 3] = std::array::from_fn(|_| Arc::default());
    let entry = |index: usize| ExportEntry::new(Arc::new(Counted(Arc::clone(&counters[index]))));
    let exports = ExportRegistry::new();
    exports.add("replaced", entry(0)).unwrap();
    exports.add("removed", entry(1)).unwrap();
    let server = TestServer::start(ServerConfig::default(), exports.clone());
    let _clients =
        ["replaced", "removed"].map(|name| Client::open(&server, ReplyMode::Simple, name, &[]));
    exports.replace("replaced", entry(2)).unwrap();
    drop(exports.remove("removed").unwrap());
    assert!(server.stop().is_ok());
    assert_eq!(counters.map(|counter| counter.load(Ordering::SeqCst)), [1, 1, 1]);
}

#[test]
fn a_server_that_nobody_visited_ends_as_well() {
    let server = TestServer::of(MemoryExport::new(4096));
    let path = server.path().to_path_buf();
    assert!(path.exists());
    assert!(server.stop().is_ok());
    assert!(!path.exists());
}
