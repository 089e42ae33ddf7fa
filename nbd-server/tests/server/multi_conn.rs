//! Several connections to one export (MULTI_CONN).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nbd_proto::transmission::{Command, Durability};
use nbd_proto::wire::{Errno, TransmissionFlags};
use nbd_server::export::{Export, MemoryExport};

use crate::support::{Client, MODES, Script, Scripted, TestServer, disk_file, image_export};

#[test]
fn what_one_connection_wrote_every_other_reads() {
    let file = disk_file(&vec![0; 4 << 20]);
    let exports: [Arc<dyn Export>; 3] = [
        Arc::new(MemoryExport::new(4 << 20)),
        Scripted::new(4 << 20, Script::default()),
        Arc::new(image_export(file.path())),
    ];
    for export in exports {
        let server = TestServer::with(Default::default(), export);
        let mut clients = MODES.map(|mode| Client::connect(&server, mode));
        for round in 0..30_u8 {
            let writer = usize::from(round) % 3;
            // Lengths that take each way out: copied, gathered, from the file.
            for length in [100, 20_000, 200_000] {
                let data = vec![round + 1; length];
                assert_eq!(clients[writer].write(4096, &data), Ok(()));
                for client in &mut clients {
                    assert!(client.read(4096, length as u64) == data);
                }
            }
        }
        for client in &clients {
            assert!(client.negotiated.flags.contains(TransmissionFlags::CAN_MULTI_CONN));
        }
    }
}

#[test]
fn a_flush_on_one_connection_covers_the_writes_of_all() {
    let disk = Scripted::new(1 << 20, Script::default());
    let server = TestServer::with(Default::default(), disk.clone());
    let mut first = Client::connect(&server, MODES[2]);
    let mut second = Client::connect(&server, MODES[2]);
    assert_eq!(first.write(0, &[1; 512]), Ok(()));
    assert_eq!(second.request(0, 0, &Command::Flush).result, Ok(()));
    // One export object stands behind both, and it was flushed after the write had returned.
    assert_eq!(disk.writes.load(Ordering::SeqCst), 1);
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);
}

/// A system reports once that writes were lost, to the first that asks.
#[test]
fn a_flush_that_fails_on_one_connection_is_heard_of_on_all_and_once_on_each() {
    let disk = Scripted::new(1 << 20, Script::default());
    let server = TestServer::with(Default::default(), disk.clone());
    let [mut first, mut second, mut third] = [(); 3].map(|()| Client::connect(&server, MODES[2]));
    let flush = |client: &mut Client| {
        client.request(0, 0, &Command::Flush).result.map_err(|error| error.errno)
    };
    assert_eq!(second.write(0, &[1; 512]), Ok(()));
    disk.bad_flushes.store(1, Ordering::SeqCst);
    assert_eq!(flush(&mut first), Err(Errno::ENOSPC));
    assert_eq!(flush(&mut first), Ok(()), "it was told");
    assert_eq!(flush(&mut second), Err(Errno::EIO), "its write may be lost");
    assert_eq!(flush(&mut second), Ok(()));
    third.submit(0, 512, &Command::Write(Durability::Cached), &[2; 512]);
    assert_eq!(third.next_finished().1.result, Ok(()), "that promises nothing");
    third.submit(0, 512, &Command::Write(Durability::Fua), &[2; 512]);
    let told = third.next_finished().1.result.map_err(|error| error.errno);
    assert_eq!(told, Err(Errno::EIO), "FUA is a promise, too");
    let mut fourth = Client::connect(&server, MODES[2]);
    assert_eq!(flush(&mut fourth), Ok(()), "a later client has lost nothing");
}
