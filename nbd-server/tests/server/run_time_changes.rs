//! Exports that come and go while the server runs.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nbd_proto::wire::ReplyMode;
use nbd_server::export::{ExportEntry, MemoryExport};
use nbd_server::{ExportRegistry, InUse, RemoveError, ServerConfig};

use crate::support::{Client, Script, Scripted, TestServer, wait_until};

fn entry() -> ExportEntry {
    ExportEntry::new(Arc::new(MemoryExport::new(1 << 20)))
}

fn remove(server: &TestServer, name: &str, in_use: InUse) -> Result<(), RemoveError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(server.handle().remove_export(name, in_use)).map(drop)
}

#[test]
fn an_export_in_use_is_removed_only_together_with_its_clients() {
    let exports = ExportRegistry::new();
    exports.add("", entry()).unwrap();
    exports.add("other", entry()).unwrap();
    let server = TestServer::start(ServerConfig::default(), exports);
    let mut client = Client::connect(&server, ReplyMode::Extended);
    assert_eq!(client.read(0, 4), [0; 4]);
    let present = server.handle().clients();
    assert_eq!(present.len(), 1);
    assert_eq!(present[0].export, "");

    let refused = remove(&server, "", InUse::Refuse);
    assert_eq!(refused, Err(RemoveError::InUse { name: String::new(), clients: 1 }));
    assert_eq!(client.read(0, 4), [0; 4], "the client notices nothing");
    assert_eq!(remove(&server, "x", InUse::Refuse), Err(RemoveError::NotFound("x".into())));
    assert_eq!(remove(&server, "other", InUse::Refuse), Ok(()), "nobody uses it");

    assert_eq!(remove(&server, "", InUse::Disconnect), Ok(()));
    assert_eq!(server.handle().clients(), []);
    client.expect_end();
    server.handle().exports().add("", entry()).unwrap();
    assert_eq!(Client::connect(&server, ReplyMode::Extended).read(0, 4), [0; 4]);
}

#[test]
fn a_removed_export_is_flushed_and_closed_when_its_last_client_leaves() {
    for is_removed in [true, false] {
        let disk = Scripted::new(1 << 20, Script::default());
        let server = TestServer::with(ServerConfig::default(), disk.clone());
        let mut clients = [(); 2].map(|()| Client::connect(&server, ReplyMode::Extended));
        if is_removed {
            drop(server.handle().exports().remove("").unwrap());
        }
        for client in &mut clients {
            client.write(0, &[1; 512]).unwrap();
        }
        let [first, second] = clients;
        drop(first);
        wait_until("it has left", || server.handle().clients().len() == 1);
        assert_eq!(disk.flushes.load(Ordering::SeqCst), 0);
        drop(second);
        wait_until("it has left", || server.handle().clients().is_empty());
        if is_removed {
            wait_until("the disk is flushed and closed", || {
                disk.flushes.load(Ordering::SeqCst) == 1 && Arc::strong_count(&disk) == 1
            });
        }
        let before = disk.flushes.load(Ordering::SeqCst);
        assert_eq!(before, usize::from(is_removed));
        server.stop().unwrap();
        assert_eq!(disk.flushes.load(Ordering::SeqCst), before + 1, "at the end");
    }
}
