//! The server as a part of another program.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nbd_proto::transmission::Command;
use nbd_proto::wire::ReplyMode;
use nbd_server::export::filters::Window;
use nbd_server::export::{Export, ExportEntry, MemoryExport};
use nbd_server::{
    ClientAddress, ConnectionRefused, ExportRegistry, ListenAddress, Refusal, ServeError, Server,
    ServerConfig,
};

use crate::support::{Client, Script, Scripted, output_of, run_peer};

#[path = "../../examples/filtered_export.rs"]
#[allow(dead_code)]
mod filtered_export;
#[path = "../../examples/memory_export.rs"]
#[allow(dead_code)]
mod memory_export;
#[cfg(feature = "image")]
#[path = "../../examples/serve_image.rs"]
#[allow(dead_code)]
mod serve_image;

#[test]
#[cfg(feature = "image")]
fn an_image_served_in_thirty_lines_is_read_by_others() {
    let directory = tempfile::tempdir().unwrap();
    let (disk, back) = (directory.path().join("disk.img"), directory.path().join("back"));
    let content: Vec<u8> = (0..1 << 20).map(|index: u32| (index / 7) as u8).collect();
    std::fs::write(&disk, &content).unwrap();
    let runtime = runtime();
    let socket = directory.path().join("socket");
    let mut server = runtime.block_on(serve_image::start(&disk, socket)).unwrap();
    let uri = server.addresses()[0].uri("").to_string();
    if run_peer("nbdcopy", &[&uri, back.to_str().unwrap()]).is_some() {
        assert!(std::fs::read(back).unwrap() == content);
    }
    server.shutdown();
    runtime.block_on(server.wait()).unwrap();
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn registry(export: ExportEntry) -> ExportRegistry {
    let exports = ExportRegistry::new();
    exports.add("", export).unwrap();
    exports
}

fn memory() -> ExportEntry {
    ExportEntry::new(Arc::new(MemoryExport::new(1 << 20)))
}

#[test]
fn an_export_of_thirty_lines_is_read_and_written_by_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let runtime = runtime();
    let mut server = runtime.block_on(memory_export::start(path, 3 << 20)).unwrap();
    let uri = server.addresses()[0].uri("").to_string();
    let Some(size) = run_peer("nbdinfo", &["--size", &uri]) else { return };
    assert_eq!(size.trim(), (3 << 20).to_string());
    let (source, back) = (directory.path().join("source"), directory.path().join("back"));
    let content: Vec<u8> = (0..3 << 20).map(|index: u32| (index / 7) as u8).collect();
    std::fs::write(&source, &content).unwrap();
    if run_peer("nbdcopy", &[source.to_str().unwrap(), &uri]).is_none() {
        return;
    }
    output_of("nbdcopy", &[&uri, back.to_str().unwrap()]);
    assert!(std::fs::read(back).unwrap() == content);
    server.shutdown();
    runtime.block_on(server.wait()).unwrap();
    runtime.block_on(server.wait()).unwrap();
    assert!(!directory.path().join("socket").exists(), "its socket is removed");
}

#[test]
fn a_part_of_a_disk_is_served_as_the_example_does() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let runtime = runtime();
    let disk: Arc<dyn Export> = Arc::new(MemoryExport::new(4 << 20));
    let window = Window { offset: 1 << 20, size: Some(2 << 20) };
    let started = filtered_export::start(path, Arc::clone(&disk), window);
    let mut server = runtime.block_on(started).unwrap();
    let uri = server.addresses()[0].uri("").to_string();
    let source = directory.path().join("source");
    let content = vec![7; 2 << 20];
    std::fs::write(&source, &content).unwrap();
    if run_peer("nbdcopy", &[source.to_str().unwrap(), &uri]).is_none() {
        return;
    }
    server.shutdown();
    runtime.block_on(server.wait()).unwrap();
    let mut found = vec![1; 4 << 20];
    disk.read_at(0, &mut found).unwrap();
    assert!(found[1 << 20..3 << 20] == content);
    assert!(found[..1 << 20].iter().chain(&found[3 << 20..]).all(|&byte| byte == 0));
}

#[test]
fn waiting_for_a_server_whose_runtime_was_shut_down_gives_an_error() {
    let of_server = runtime();
    let mut server = of_server
        .block_on(async { Server::new(ServerConfig::default(), registry(memory())).start() });
    of_server.shutdown_timeout(std::time::Duration::from_secs(10));
    let runtime = runtime();
    let ended = runtime.block_on(server.wait());
    assert!(matches!(ended, Err(ServeError::RuntimeShutDown)), "{ended:?}");
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let refused = runtime.block_on(server.serve_connection(ours));
    assert!(matches!(refused, Err(ConnectionRefused::ShuttingDown)), "{refused:?}");
    assert!(runtime.block_on(server.wait()).is_ok(), "it was told before");
}

#[test]
fn a_stream_of_the_callers_is_served_within_the_limits_until_shutdown() {
    let runtime = runtime();
    let _context = runtime.enter();
    let disk = Scripted::new(1 << 20, Script::default());
    let mut config = ServerConfig::default();
    config.max_connections = 1;
    let mut server = Server::new(config, registry(ExportEntry::new(disk.clone()))).start();
    assert!(server.addresses().is_empty());
    let (ours, theirs) = UnixStream::pair().unwrap();
    runtime.block_on(server.serve_connection(theirs)).unwrap();
    let mut client = Client::on(ours, ReplyMode::Extended, "").unwrap();
    client.write(4096, &[7; 4096]).unwrap();
    assert_eq!(client.read(4096, 4096), [7; 4096]);
    let (_other, refused) = UnixStream::pair().unwrap();
    let refused = runtime.block_on(server.serve_connection(refused));
    assert!(matches!(refused, Err(ConnectionRefused::LimitReached)), "{refused:?}");
    server.shutdown();
    runtime.block_on(server.wait()).unwrap();
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 1, "it is flushed at the end");
    client.expect_end();
    let (_late, refused) = UnixStream::pair().unwrap();
    let refused = runtime.block_on(server.serve_connection(refused));
    assert!(matches!(refused, Err(ConnectionRefused::ShuttingDown)), "{refused:?}");
}

#[test]
fn a_hook_sees_who_connects_and_turns_clients_away() {
    let runtime = runtime();
    let _context = runtime.enter();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    let mut server =
        Server::new(ServerConfig::default(), registry(memory())).on_connection(move |client| {
            let ClientAddress::Unix { process, .. } = client.address else {
                return Err(Refusal::new("it came from elsewhere"));
            };
            assert_eq!(process, Some(std::process::id().cast_signed()));
            match counter.fetch_add(1, Ordering::SeqCst) {
                0 => Ok(()),
                _ => Err(Refusal::new("one is enough")),
            }
        });
    runtime.block_on(server.listen(&ListenAddress::Unix(path.clone()))).unwrap();
    let _server = server.start();
    let connect = || Client::on(UnixStream::connect(&path).unwrap(), ReplyMode::Simple, "");
    let mut first = connect().unwrap();
    assert_eq!(first.read(0, 1), [0]);
    assert!(connect().is_none(), "it is disconnected");
    assert_eq!(first.read(0, 1), [0], "others are not concerned");
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

#[test]
fn exports_are_resolved_by_name_when_clients_ask_and_flushed_at_the_end() {
    let runtime = runtime();
    let _context = runtime.enter();
    let disk = Scripted::new(1 << 20, Script::default());
    let entry = ExportEntry::new(disk.clone());
    let server = Server::new(ServerConfig::default(), registry(memory()));
    let mut server = server
        .resolve_exports(move |name, _| (name == "made/on/demand").then(|| entry.clone()))
        .start();
    let connect = |name: &str| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        runtime.block_on(server.serve_connection(theirs)).unwrap();
        Client::on(ours, ReplyMode::Extended, name)
    };
    let mut client = connect("made/on/demand").unwrap();
    client.write(0, &[1; 512]).unwrap();
    assert_eq!(client.request(0, 0, &Command::Flush).result, Ok(()));
    assert_eq!(connect("made/on/demand").unwrap().read(0, 512), [1; 512], "it is the same disk");
    assert!(connect("").is_some(), "those of the registry are there");
    assert!(connect("unknown").is_none());
    let before = disk.flushes.load(Ordering::SeqCst);
    server.shutdown();
    runtime.block_on(server.wait()).unwrap();
    assert_eq!(disk.flushes.load(Ordering::SeqCst), before + 1);
}

#[test]
fn a_server_for_one_job_ends_with_its_last_client() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let runtime = runtime();
    let mut server = Server::new(ServerConfig::default(), registry(memory()));
    runtime.block_on(server.listen(&ListenAddress::Unix(path.clone()))).unwrap();
    let mut server = runtime.block_on(async { server.start() });
    let mut count = server.handle().client_count();
    let waiting = runtime.spawn(async move {
        count.wait_until_unused().await;
        (count.present(), count.total())
    });
    // One that selects no export does not count.
    drop(UnixStream::connect(&path).unwrap());
    let connect = || Client::on(UnixStream::connect(&path).unwrap(), ReplyMode::Simple, "");
    let (first, mut second) = (connect().unwrap(), connect().unwrap());
    // A client counts from when its handshake has ended on the server's side.
    assert_eq!(second.read(0, 3), [0; 3]);
    drop(first);
    assert_eq!(second.read(0, 3), [0; 3]);
    assert!(!waiting.is_finished());
    drop(second);
    assert_eq!(runtime.block_on(waiting).unwrap(), (0, 2));
    server.shutdown();
    runtime.block_on(server.wait()).unwrap();
}
