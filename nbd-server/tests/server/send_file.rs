//! Large reads that go from the page cache into the socket without a copy.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use nbd_proto::transmission::{Command, Fragmentation};
use nbd_server::export::{
    Export, ExportError, ExportInfo, FastExport, FileSpan, Holes, Lookup, Mapped, ReadMap, TryRead,
};

use crate::support::{
    Client, MODES, Random, TestServer, disk_file, image_export, skip, wait_until,
};

const READ: Command = Command::Read(Fragmentation::Allowed);

#[test]
fn large_reads_are_exact_for_a_slow_reader_and_in_any_order() {
    let mut random = Random::new();
    let content = random.bytes((36 << 20) + 123);
    let file = disk_file(&content);
    let server = TestServer::of(image_export(file.path()));
    for mode in MODES {
        let mut client = Client::connect(&server, mode);
        let mut expected = std::collections::HashMap::new();
        for number in 0..40 {
            // Short replies between the long ones: they share the queue. The longest do not fit
            // into any socket buffer and go out in parts.
            let longest = [1 << 15, 1 << 18, 4 << 20, 32 << 20][number % 4];
            let length = 1 + random.below(longest);
            let offset = random.below(content.len() as u64 - length);
            expected.insert(client.submit(offset, length, &READ, &[]), (offset, length));
        }
        while !expected.is_empty() {
            std::thread::sleep(Duration::from_millis(2));
            let (cookie, outcome) = client.next_finished();
            let (offset, length) = expected.remove(&cookie).unwrap();
            assert_eq!(outcome.result, Ok(()));
            let wanted = &content[offset as usize..][..length as usize];
            assert!(outcome.data == wanted, "{length} bytes at {offset}, {mode:?}");
        }
    }
}

/// Gives other bytes than its file has, to tell the two ways apart.
struct TwoFaced(Arc<OwnedFd>);

impl Export for TwoFaced {
    fn info(&self) -> ExportInfo {
        ExportInfo::new(4 << 20)
    }

    fn read_at(&self, _: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        buffer.fill(b'c');
        Ok(())
    }

    fn fast(&self) -> Option<&dyn FastExport> {
        Some(self)
    }
}

impl FastExport for TwoFaced {
    fn try_read_at(&self, at: u64, buffer: &mut [u8], _: Holes) -> Result<TryRead, ExportError> {
        self.read_at(at, buffer).map(|()| TryRead::Complete)
    }

    fn map_read(
        &self,
        offset: u64,
        length: usize,
        _: Holes,
        _: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        map.push_file(length, FileSpan::new(Arc::clone(&self.0), offset));
        Ok(Mapped::Complete)
    }
}

#[test]
fn large_resident_reads_are_sent_from_the_file_and_small_ones_copied() {
    let file = disk_file(&vec![b'f'; 4 << 20]);
    let server = TestServer::of(TwoFaced(Arc::new(File::open(file.path()).unwrap().into())));
    let mut client = Client::connect(&server, MODES[0]);
    assert_eq!(client.read(0, 4096), [b'c'; 4096]);
    let large = client.read(1, 1 << 20);
    if large == vec![b'c'; 1 << 20] {
        return skip("this system cannot say what is in the page cache (cachestat)");
    }
    assert!(large == vec![b'f'; 1 << 20]);
}

#[test]
fn a_file_that_shrank_is_an_error_and_the_server_lives() {
    let file = disk_file(&vec![1; 8 << 20]);
    let server = TestServer::of(image_export(file.path()));
    let mut before = Client::connect(&server, MODES[1]);
    file.as_file().set_len(4096).unwrap();
    let outcome = before.request(4 << 20, 1 << 20, &READ);
    assert!(outcome.result.is_err(), "bytes that are nowhere were answered");
    assert_eq!(before.read(0, 4096), [1; 4096]);
}

#[test]
fn a_file_that_shrinks_while_it_is_sent_ends_the_connection_and_no_other() {
    let length = 32 << 20;
    let file = disk_file(&vec![1; length]);
    let server = TestServer::of(image_export(file.path()));
    let mut client = Client::connect(&server, MODES[0]);
    client.submit(0, length as u64, &READ, &[]);
    // The reply has begun when the first byte is there; most of it does not fit into the socket.
    let stream = client.stream().try_clone().unwrap();
    wait_until("the reply begins", || {
        let mut first = [0];
        rustix::net::recv(&stream, &mut first[..], rustix::net::RecvFlags::PEEK)
            .is_ok_and(|(read, _)| read == 1)
    });
    file.as_file().set_len(4096).unwrap();
    assert!(client.read_to_end().len() < length, "the rest was made up");
    assert_eq!(Client::connect(&server, MODES[2]).read(0, 4096), [1; 4096]);
}
