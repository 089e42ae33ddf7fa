//! A server is paused, and another one goes on with its listeners and connections.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nbd_proto::transmission::{Command, Durability, ExtentLimit, SavedConnection};
use nbd_proto::wire::{CommandFlags, CommandType, Errno, MetaContextName, ReplyMode};
use nbd_server::export::{Export, ExportEntry, MemoryExport};
use nbd_server::{
    AccessRules, ClientRule, ExportRegistry, ListenAddress, Paused, PausedConnection,
    RunningServer, Server, ServerConfig,
};
use tokio::runtime::Runtime;

use crate::support::{Client, LONG, MODES, Script, Scripted, header, wait_until};

/// Servers of one disk, one after the other.
struct Relay {
    runtime: Runtime,
    directory: tempfile::TempDir,
    server: Option<RunningServer>,
    config: ServerConfig,
}

impl Relay {
    fn start(export: Arc<dyn Export>) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let (runtime, directory) = (runtime.unwrap(), tempfile::tempdir().unwrap());
        let config = ServerConfig::default();
        let mut relay = Self { runtime, directory, server: None, config };
        relay.serve(export, None);
        relay
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn connect(&self, mode: ReplyMode) -> Client {
        let stream = UnixStream::connect(self.path()).unwrap();
        Client::on(stream, mode, "").expect("a server")
    }

    /// A server goes on with what another one has left.
    fn serve(&mut self, export: Arc<dyn Export>, paused: Option<Paused>) {
        self.serve_entry(ExportEntry::new(export), paused);
    }

    fn serve_entry(&mut self, entry: ExportEntry, paused: Option<Paused>) {
        let exports = ExportRegistry::new();
        exports.add("", entry).unwrap();
        let address = ListenAddress::Unix(self.path());
        let config = self.config.clone();
        let running = self.runtime.block_on(async move {
            let mut server = Server::new(config, exports);
            if let Some(Paused { listeners, connections, .. }) = paused {
                // The state travels as bytes.
                let connections =
                    connections.into_iter().map(|PausedConnection { socket, state, .. }| {
                        let state = SavedConnection::decode(&state.encode().unwrap()).unwrap();
                        PausedConnection::new(socket, state)
                    });
                server.adopt(listeners, connections.collect()).unwrap();
            }
            server.listen(&address).await.unwrap();
            server.start()
        });
        self.server = Some(running);
    }

    /// A server of these exports goes on with what it had itself before its pause, if anything.
    fn go_on(&mut self, exports: ExportRegistry, paused: Option<Paused>) {
        let mut server = Server::new(self.config.clone(), exports);
        let address = ListenAddress::Unix(self.path());
        self.server = Some(self.runtime.block_on(async move {
            if let Some(Paused { listeners, connections, .. }) = paused {
                server.go_on(listeners, connections).unwrap();
            }
            server.listen(&address).await.unwrap();
            server.start()
        }));
    }

    fn pause(&mut self) -> Paused {
        let paused = self.runtime.block_on(self.server.take().unwrap().pause()).unwrap();
        assert!(paused.flushed.is_ok());
        paused
    }

    fn relay(&mut self, export: Arc<dyn Export>) -> usize {
        let paused = self.pause();
        let connections = paused.connections.len();
        self.serve(export, Some(paused));
        connections
    }
}

fn memory() -> Arc<dyn Export> {
    Arc::new(MemoryExport::new(1 << 20))
}

#[test]
fn a_client_goes_on_wherever_its_request_was_cut() {
    let payload: Vec<u8> = (0..200_000_u32).map(|index| (index / 7) as u8).collect();
    let mut handed_over = 0;
    for mode in MODES {
        let disk = memory();
        let mut relay = Relay::start(Arc::clone(&disk));
        let mut client = relay.connect(mode);
        for (place, cut) in
            [0, 1, 27, 28, 31, 32, 33, 5000, 70_000, 150_000].into_iter().enumerate()
        {
            let mut header = header(CommandType::WRITE, place as u64 * 512, 200_000);
            header.flags = CommandFlags::FUA;
            if mode == ReplyMode::Extended {
                header.flags |= CommandFlags::PAYLOAD_LEN;
            }
            let mut bytes = client.encode(&header);
            bytes.extend_from_slice(&payload);
            let rest = bytes.split_off(cut);
            client.send(bytes);
            let paused = relay.pause();
            let [connection] = &paused.connections[..] else { panic!("{mode:?}, {cut}") };
            handed_over += connection.state.received.len();
            relay.serve(Arc::clone(&disk), Some(paused));
            client.send(rest);
            assert_eq!(client.raw_reply(), (header.cookie, Errno(0)), "{mode:?}, {cut}");
            assert!(client.read(place as u64 * 512, 200_000) == payload, "{mode:?}, {cut}");
        }
    }
    assert!(handed_over > 0, "some of it had been received");
}

#[test]
fn a_refused_payload_is_discarded_across_a_pause() {
    for mode in MODES {
        let disk = memory();
        let mut relay = Relay::start(Arc::clone(&disk));
        let mut client = relay.connect(mode);
        let mut past_end = header(CommandType::WRITE, 1 << 20, 300_000);
        if mode == ReplyMode::Extended {
            past_end.flags = CommandFlags::PAYLOAD_LEN;
        }
        let mut bytes = client.encode(&past_end);
        bytes.extend_from_slice(&[0x25; 100_000]);
        client.send(bytes);
        // It is answered when the server is paused, if not earlier.
        assert_eq!(relay.relay(Arc::clone(&disk)), 1);
        client.send(vec![0x25; 200_000]);
        assert_eq!(client.raw_reply(), (past_end.cookie, Errno::ENOSPC), "{mode:?}");
        assert_eq!(client.write(0, b"next"), Ok(()));
        assert_eq!(client.read(0, 4), b"next");
    }
}

#[test]
fn many_clients_with_requests_in_flight_lose_nothing_over_many_pauses() {
    let disk = memory();
    let mut relay = Relay::start(Arc::clone(&disk));
    let clients: Vec<_> = (0..4).map(|_| relay.connect(ReplyMode::Extended)).collect();
    let threads: Vec<_> = clients
        .into_iter()
        .enumerate()
        .map(|(number, mut client)| {
            std::thread::spawn(move || {
                let start = number as u64 * (256 << 10);
                for round in 0..80_u64 {
                    let data = vec![(round + 1) as u8; 3000];
                    let offset = start + round % 64 * 4096;
                    let write = Command::Write(Durability::Cached);
                    for part in 0..8 {
                        client.submit(offset + part, 3000, &write, &data);
                    }
                    for _ in 0..8 {
                        assert_eq!(client.next_finished().1.result, Ok(()));
                    }
                    assert!(client.read(offset, 3000) == data, "client {number}, round {round}");
                }
            })
        })
        .collect();
    let mut pauses = 0;
    while !threads.iter().all(std::thread::JoinHandle::is_finished) {
        relay.relay(Arc::clone(&disk));
        pauses += 1;
    }
    assert!(pauses > 2, "the clients were done before it began");
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn requests_that_have_begun_are_answered_before_the_pause() {
    let script = Script { gated: Some(0..512), ..Script::default() };
    let disk = Scripted::new(1 << 20, script);
    let mut relay = Relay::start(Arc::clone(&disk) as _);
    let mut client = relay.connect(ReplyMode::Structured);
    client.submit(0, 512, &Command::Write(Durability::Cached), &[1; 512]);
    wait_until("the write is under way", || disk.gate.arrived() == 1);
    let gate = Arc::clone(&disk);
    let opener = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        gate.gate.open();
    });
    let paused = relay.pause();
    opener.join().unwrap();
    client.stream().set_read_timeout(Some(LONG)).unwrap();
    assert_eq!(client.next_finished().1.result, Ok(()), "its reply was sent");
    assert_eq!(paused.connections.len(), 1);
    assert!(paused.connections[0].state.received.is_empty());
}

#[test]
fn contexts_and_their_numbers_survive() {
    let disk = memory();
    let mut relay = Relay::start(Arc::clone(&disk));
    for mode in [ReplyMode::Structured, ReplyMode::Extended] {
        let stream = UnixStream::connect(relay.path()).unwrap();
        let mut client = Client::with_contexts(stream, mode, &[MetaContextName::base_allocation()]);
        let ask = Command::BlockStatus(ExtentLimit::Many, None);
        let before = client.request(0, 1 << 20, &ask);
        relay.relay(Arc::clone(&disk));
        let after = client.request(0, 1 << 20, &ask);
        assert_eq!(before, after);
        assert_eq!(after.statuses.len(), 1);
    }
}

#[test]
fn a_promise_that_cannot_be_kept_ends_its_connection_only() {
    let mut relay = Relay::start(memory());
    let mut client = relay.connect(ReplyMode::Simple);
    relay.relay(Arc::new(MemoryExport::new(2 << 20)));
    client.expect_end();
    let mut next = relay.connect(ReplyMode::Simple);
    assert_eq!(next.negotiated.size, 2 << 20);
    assert_eq!(next.read(0, 1), [0]);
}

/// A server is paused and goes on itself, after `change`.
fn goes_on_after(change: impl FnOnce(&ExportRegistry)) -> (Relay, ExportRegistry, Client) {
    let mut relay = Relay::start(memory());
    let exports = relay.server.as_ref().unwrap().handle().exports().clone();
    let mut client = relay.connect(ReplyMode::Extended);
    assert_eq!(client.write(0, b"before"), Ok(()));
    change(&exports);
    let paused = relay.pause();
    relay.go_on(exports.clone(), Some(paused));
    assert_eq!(client.read(0, 6), b"before");
    assert_eq!(client.write(0, b"after "), Ok(()));
    assert_eq!(client.request(0, 0, &Command::Flush).result, Ok(()));
    (relay, exports, client)
}

#[test]
fn a_server_that_goes_on_keeps_the_clients_of_a_removed_export() {
    let (mut relay, exports, mut client) = goes_on_after(|exports| {
        exports.remove("").unwrap();
    });
    assert_eq!(exports.removed_in_use(), [""]);
    let refused = Client::on(UnixStream::connect(relay.path()).unwrap(), ReplyMode::Simple, "");
    assert!(refused.is_none(), "it is removed");
    let paused = relay.pause();
    assert_eq!(paused.unregistered().collect::<Vec<_>>(), [""]);
    assert_eq!(exports.removed_in_use(), [""], "it is not closed while it may be needed");
    drop(paused);
    assert!(exports.removed_in_use().is_empty());
    client.expect_end();
}

#[test]
fn a_server_that_goes_on_keeps_the_clients_of_a_replaced_export() {
    let (relay, _, _) = goes_on_after(|exports| {
        exports.replace("", ExportEntry::new(memory())).unwrap();
    });
    assert_eq!(relay.connect(ReplyMode::Simple).read(0, 6), [0; 6], "it is another disk");
}

#[test]
fn a_server_that_goes_on_keeps_clients_that_the_rules_would_not_let_in_any_more() {
    let (relay, ..) = goes_on_after(|exports| {
        let rules = AccessRules::new().allow(ClientRule::User(u32::MAX));
        let (_, entry) = exports.find("").unwrap();
        exports.replace("", entry.access(rules)).unwrap();
    });
    let refused = Client::on(UnixStream::connect(relay.path()).unwrap(), ReplyMode::Simple, "");
    assert!(refused.is_none());
}

#[test]
fn clients_of_the_default_export_go_on_by_its_name() {
    let (mut relay, exports, _client) = goes_on_after(|exports| {
        let entry = exports.remove("").unwrap();
        exports.add("disk", entry).unwrap();
        exports.add("other", ExportEntry::new(memory())).unwrap();
        exports.set_default("other");
    });
    let paused = relay.pause();
    assert_eq!(paused.connections[0].state.negotiated.export_name, "disk");
    assert_eq!((paused.unregistered().count(), exports.entries().len()), (0, 2));
}

#[test]
fn a_failed_flush_at_the_pause_is_not_told_to_the_clients_of_other_disks() {
    let bad = Scripted::new(1 << 20, Script::default());
    let entry = ExportEntry::new(Arc::clone(&bad) as _);
    let (shared, exports) = (entry.same_disk(Arc::clone(&bad) as _), ExportRegistry::new());
    exports.add("bad", entry).unwrap();
    exports.add("shared", shared).unwrap();
    exports.add("good", ExportEntry::new(memory())).unwrap();
    let mut relay = Relay::start(memory());
    drop(relay.pause());
    relay.go_on(exports.clone(), None);
    let mut clients = ["bad", "shared", "good"].map(|name| {
        let stream = UnixStream::connect(relay.path()).unwrap();
        Client::on(stream, ReplyMode::Extended, name).unwrap()
    });
    for client in &mut clients {
        assert_eq!(client.write(0, b"data"), Ok(()));
    }
    bad.bad_flushes.store(1, Ordering::SeqCst);
    let paused = relay.runtime.block_on(relay.server.take().unwrap().pause()).unwrap();
    assert!(paused.flushed.is_err());
    relay.go_on(exports, Some(paused));
    let [bad, shared, good] = &mut clients;
    for told in [bad, shared] {
        assert!(told.request(0, 0, &Command::Flush).result.is_err());
        assert_eq!(told.request(0, 0, &Command::Flush).result, Ok(()), "it was told");
    }
    assert_eq!(good.request(0, 0, &Command::Flush).result, Ok(()));
}

#[test]
fn clients_that_connect_during_a_pause_wait_and_the_socket_file_stays() {
    let disk = memory();
    let mut relay = Relay::start(Arc::clone(&disk));
    let paused = relay.pause();
    assert!(relay.path().exists());
    let stream = UnixStream::connect(relay.path()).unwrap();
    relay.serve(disk, Some(paused));
    let mut client = Client::on(stream, ReplyMode::Extended, "").unwrap();
    assert_eq!(client.read(0, 1), [0]);
    // What is given up leaves the file alone.
    drop(relay.pause());
    assert!(relay.path().exists(), "another process may use it");
}

#[test]
fn a_lost_write_is_still_told_to_the_client_that_does_not_know_of_it() {
    let disk = Scripted::new(1 << 20, Script::default());
    let mut relay = Relay::start(Arc::clone(&disk) as _);
    let (mut first, mut second) =
        (relay.connect(ReplyMode::Simple), relay.connect(ReplyMode::Simple));
    assert_eq!(second.write(0, b"lost"), Ok(()));
    disk.bad_flushes.store(1, Ordering::SeqCst);
    assert!(first.request(0, 0, &Command::Flush).result.is_err());
    relay.relay(disk);
    assert_eq!(first.request(0, 0, &Command::Flush).result, Ok(()), "it was told");
    assert!(second.request(0, 0, &Command::Flush).result.is_err(), "it was not told yet");
    assert_eq!(second.request(0, 0, &Command::Flush).result, Ok(()));
}

#[test]
fn a_flush_that_fails_during_the_pause_is_told_to_a_client_that_rests_already() {
    let script = Script { flushes_at_gate: true, ..Script::default() };
    let disk = Scripted::new(1 << 20, script);
    let mut relay = Relay::start(Arc::clone(&disk) as _);
    let (mut first, mut second) =
        (relay.connect(ReplyMode::Simple), relay.connect(ReplyMode::Simple));
    assert_eq!(second.write(0, b"lost"), Ok(()));
    disk.bad_flushes.store(1, Ordering::SeqCst);
    first.submit(0, 0, &Command::Flush, &[]);
    wait_until("the flush is under way", || disk.gate.arrived() == 1);
    let handle = relay.server.as_ref().unwrap().handle().clone();
    let gate = Arc::clone(&disk);
    let opener = std::thread::spawn(move || {
        wait_until("the second client rests", || handle.clients().len() == 1);
        gate.gate.open();
    });
    // The flush of the server itself succeeds: the error was taken.
    assert_eq!(relay.relay(disk), 2);
    opener.join().unwrap();
    assert!(first.next_finished().1.result.is_err());
    assert_eq!(first.request(0, 0, &Command::Flush).result, Ok(()), "it was told");
    assert!(second.request(0, 0, &Command::Flush).result.is_err(), "it was not told yet");
    assert_eq!(second.request(0, 0, &Command::Flush).result, Ok(()));
}

#[test]
fn a_failure_of_the_flush_at_the_pause_is_told_to_every_client() {
    let disk = Scripted::new(1 << 20, Script::default());
    let mut relay = Relay::start(Arc::clone(&disk) as _);
    let mut clients = [relay.connect(ReplyMode::Simple), relay.connect(ReplyMode::Extended)];
    for client in &mut clients {
        assert_eq!(client.write(0, b"lost"), Ok(()));
    }
    disk.bad_flushes.store(1, Ordering::SeqCst);
    let paused = relay.runtime.block_on(relay.server.take().unwrap().pause()).unwrap();
    assert!(paused.flushed.is_err());
    relay.serve(disk, Some(paused));
    for client in &mut clients {
        assert!(client.request(0, 0, &Command::Flush).result.is_err());
        assert_eq!(client.request(0, 0, &Command::Flush).result, Ok(()), "it was told");
    }
}

#[test]
fn those_that_wait_during_a_pause_do_not_take_the_places_of_those_that_were_served() {
    let disk = memory();
    let mut relay = Relay::start(Arc::clone(&disk));
    let mut clients = [relay.connect(ReplyMode::Simple), relay.connect(ReplyMode::Simple)];
    relay.config.max_connections = clients.len();
    let paused = relay.pause();
    let waiting: Vec<_> = (0..8).map(|_| UnixStream::connect(relay.path()).unwrap()).collect();
    relay.serve(disk, Some(paused));
    for client in &mut clients {
        assert_eq!(client.read(0, 1), [0]);
    }
    drop(waiting);
}

#[test]
fn a_failure_is_told_to_the_clients_of_the_same_disk_when_its_export_comes_back() {
    let disk = Scripted::new(1 << 20, Script::default());
    let entry = ExportEntry::new(Arc::clone(&disk) as _);
    let mut relay = Relay::start(memory());
    let unused = relay.pause();
    relay.serve_entry(entry.clone(), Some(unused));
    let mut client = relay.connect(ReplyMode::Simple);
    assert_eq!(client.write(0, b"lost"), Ok(()));
    let paused = relay.pause();
    // As a request does that a thread still carries out: of a second server of the same disk.
    let mut other = Relay::start(memory());
    let unused = other.pause();
    other.serve_entry(entry.clone(), Some(unused));
    disk.bad_flushes.store(1, Ordering::SeqCst);
    assert!(other.connect(ReplyMode::Simple).request(0, 0, &Command::Flush).result.is_err());
    let back = entry.same_disk(memory()).same_disk(disk);
    relay.serve_entry(back, Some(paused));
    assert!(client.request(0, 0, &Command::Flush).result.is_err(), "it was not told yet");
    assert_eq!(client.request(0, 0, &Command::Flush).result, Ok(()));
}

#[test]
fn a_client_of_an_export_that_is_removed_during_a_pause_does_not_go_on_with_the_default_one() {
    let mut relay = Relay::start(memory());
    let exports = relay.server.as_ref().unwrap().handle().exports().clone();
    exports.add("other", ExportEntry::new(memory())).unwrap();
    exports.set_default("other");
    let mut client = relay.connect(ReplyMode::Simple);
    assert_eq!(client.write(0, b"before"), Ok(()));
    let paused = relay.pause();
    exports.remove("").unwrap();
    relay.go_on(exports, Some(paused));
    client.expect_end();
    assert_eq!(relay.connect(ReplyMode::Simple).read(0, 6), [0; 6], "it is another disk");
}
