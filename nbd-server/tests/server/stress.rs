//! Eight connections at once, each with random requests to a part of its own.

use std::sync::Arc;

use nbd_server::export::{Export, MemoryExport};

use crate::support::{
    Client, MODES, Random, Script, Scripted, TestServer, Workload, disk_file, image_export,
};

const PART: u64 = 4 << 20;

fn run(export: Arc<dyn Export>) {
    let server = TestServer::with(Default::default(), export);
    let mut random = Random::new();
    std::thread::scope(|scope| {
        for index in 0..8_u64 {
            let mut random = random.fork();
            let server = &server;
            scope.spawn(move || {
                let mut client = Client::connect(server, MODES[index as usize % 3]);
                let workload = Workload {
                    region: index * PART..(index + 1) * PART,
                    lengths: vec![1, 512, 4096, 4097, 20_000, 65_536, 70_000, 300_000],
                    count: 400,
                    depth: 16,
                };
                workload.run(&mut client, &mut random);
            });
        }
    });
    assert!(server.stop().is_ok());
}

#[test]
fn eight_connections_to_a_disk_in_memory_do_not_disturb_each_other() {
    run(Arc::new(MemoryExport::new(8 * PART)));
}

#[test]
fn eight_connections_through_the_pool_do_not_disturb_each_other() {
    run(Scripted::new(8 * PART, Script::default()));
}

#[test]
fn eight_connections_to_an_image_do_not_disturb_each_other() {
    let file = disk_file(&[]);
    file.as_file().set_len(8 * PART).unwrap();
    run(Arc::new(image_export(file.path())));
}
