//! Writes of every size around the boundaries of the server's buffers, held against a model.

use std::sync::Arc;

use nbd_server::export::{Export, MayBlock, MemoryExport};

use crate::support::{
    Client, MODES, Random, Script, Scripted, TestServer, Workload, disk_file, image_export,
};

const DISK: u64 = 80 << 20;

fn lengths() -> Vec<usize> {
    const KIB: usize = 1024;
    let mut lengths = vec![1, 2, 511, 4096, 100];
    for boundary in [16 * KIB, 32 * KIB, 64 * KIB, 256 * KIB] {
        // Off by one, and by the headers that stand in the same buffer.
        for off in [-57_isize, -56, -32, -28, -1, 0, 1, 28, 32] {
            lengths.push(boundary.saturating_add_signed(off));
        }
    }
    lengths.push((1 << 20) + 7);
    lengths.push((2 << 20) + 1);
    lengths.push(32 << 20);
    lengths
}

/// The same random requests in every mode.
fn run(export: Arc<dyn Export>) {
    let server = TestServer::with(Default::default(), export);
    let mut random = Random::new();
    let mut left = DISK;
    for mode in MODES {
        let mut client = Client::connect(&server, mode);
        // Each mode begins with a disk of zeroes.
        while left > 0 {
            let command = nbd_proto::transmission::Command::WriteZeroes(
                Default::default(),
                Default::default(),
                Default::default(),
            );
            let outcome = client.request(DISK - left, left.min(1 << 30), &command);
            assert_eq!(outcome.result, Ok(()));
            left = 0;
        }
        let workload = Workload { region: 0..DISK, lengths: lengths(), count: 300, depth: 64 };
        workload.run(&mut client, &mut random);
        left = DISK;
    }
}

#[test]
fn writes_and_reads_of_a_disk_in_memory_agree_with_the_model() {
    run(Arc::new(MemoryExport::new(DISK)));
}

#[test]
fn writes_and_reads_through_the_pool_agree_with_the_model() {
    let script = Script { prompt: Some(MayBlock::Yes), ..Script::default() };
    run(Scripted::new(DISK, script));
}

#[test]
fn writes_and_reads_of_an_image_agree_with_the_model() {
    let file = disk_file(&[]);
    file.as_file().set_len(DISK).unwrap();
    run(Arc::new(image_export(file.path())));
}
