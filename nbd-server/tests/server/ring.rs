//! Reads that have to wait for a disk: by io_uring, and by threads where it is not to be used.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use imgfmt::{Access, CacheMode, CreateOptions, ErrorKind, Format, Image, OpenOptions};
use nbd_proto::transmission::{Command, Fragmentation};
use nbd_proto::wire::Cookie;
use nbd_server::ServerConfig;
use nbd_server::export::ImageExport;

use crate::support::{Client, MODES, Random, TestServer, disk_file, skip, wait_until};

const READ: Command = Command::Read(Fragmentation::Allowed);

/// With io_uring if the system has it, and without.
fn configs() -> [ServerConfig; 2] {
    [true, false].map(|io_uring| {
        let mut config = ServerConfig::default();
        config.io_uring = io_uring;
        config
    })
}

/// The image in `path`, which the server before this one may not have let go yet.
pub(crate) fn open(path: &Path, format: Format, cache: CacheMode) -> imgfmt::Result<Image> {
    let options = OpenOptions::new().format(format).access(Access::ReadWrite).cache(cache);
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match Image::open(path, &options) {
            Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            opened => return opened,
        }
    }
}

/// The image in `path`, past the page cache; `None` where the file system has no direct I/O.
fn direct(path: &Path, format: Format) -> Option<Arc<ImageExport>> {
    match open(path, format, CacheMode::None) {
        Ok(image) => Some(Arc::new(ImageExport::new(image))),
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            skip("this file system has no direct I/O");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Has everything of a file dropped from the page cache.
fn drop_cache(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// Reads ranges of any alignment, many at a time, and compares them with `content`.
fn read_and_compare(client: &mut Client, content: &[u8], random: &mut Random) {
    let mut expected = HashMap::new();
    for round in 0..200 {
        let longest = [512, 4096, 70_000, 300_000][round % 4];
        let length = 1 + random.below(longest);
        let mut offset = random.below(content.len() as u64 - length);
        if round % 3 == 0 {
            offset -= offset % 4096;
        }
        if round % 50 == 0 {
            offset = content.len() as u64 - length;
        }
        expected.insert(client.submit(offset, length, &READ, &[]), (offset, length));
        if expected.len() == 32 {
            finish_one(client, &mut expected, content);
        }
    }
    while !expected.is_empty() {
        finish_one(client, &mut expected, content);
    }
}

fn finish_one(client: &mut Client, expected: &mut HashMap<Cookie, (u64, u64)>, content: &[u8]) {
    let (cookie, outcome) = client.next_finished();
    let (offset, length) = expected.remove(&cookie).unwrap();
    assert_eq!(outcome.result, Ok(()));
    let wanted = &content[offset as usize..(offset + length) as usize];
    assert!(outcome.data == wanted, "{length} bytes from {offset} on");
}

#[test]
fn raw_images_are_read_exactly_past_the_page_cache_and_into_it() {
    let mut random = Random::new();
    // The file ends within a block.
    let content = random.bytes((3 << 20) + 1234);
    let file = disk_file(&content);
    for config in configs() {
        let Some(export) = direct(file.path(), Format::Raw) else { return };
        let server = TestServer::with(config.clone(), export);
        for mode in MODES {
            read_and_compare(&mut Client::connect(&server, mode), &content, &mut random);
        }
        drop(server);
        let image = open(file.path(), Format::Raw, CacheMode::Writeback).unwrap();
        let server = TestServer::with(config, Arc::new(ImageExport::new(image)));
        for mode in MODES {
            drop_cache(file.path());
            read_and_compare(&mut Client::connect(&server, mode), &content, &mut random);
        }
    }
}

#[test]
fn sparse_raw_images_are_read_exactly_past_the_page_cache() {
    use std::os::unix::fs::FileExt;
    let mut random = Random::new();
    let mut content = vec![0; 4 << 20];
    let file = disk_file(&[]);
    file.as_file().set_len(content.len() as u64).unwrap();
    for place in [0, 100_000, 1 << 20, (4 << 20) - 5000] {
        let data = random.bytes(5000);
        content[place..place + 5000].copy_from_slice(&data);
        file.as_file().write_all_at(&data, place as u64).unwrap();
    }
    for config in configs() {
        let Some(export) = direct(file.path(), Format::Raw) else { return };
        let server = TestServer::with(config, export);
        for mode in MODES {
            read_and_compare(&mut Client::connect(&server, mode), &content, &mut random);
        }
    }
}

/// An overlay over a raw file, both written in part, and what it holds.
fn chain(directory: &Path, random: &mut Random) -> Vec<u8> {
    let mut content = random.bytes(3 << 20);
    std::fs::write(directory.join("base.raw"), &content).unwrap();
    content.resize(4 << 20, 0);
    let mut create = CreateOptions::overlay("base.raw", Format::Raw);
    (create.size, create.cluster_size) = (Some(4 << 20), 1 << 16);
    let path = directory.join("top.qcow2");
    Image::create(&path, &create).unwrap();
    let options = OpenOptions::new().format(Format::Qcow2).access(Access::ReadWrite);
    let image = Image::open(&path, &options).unwrap();
    for _ in 0..40 {
        let length = 1 + random.below(100_000) as usize;
        let data = random.bytes(length);
        let offset = random.below((4 << 20) - data.len() as u64);
        content[offset as usize..][..data.len()].copy_from_slice(&data);
        let offset = imgfmt::GuestOffset::new(offset);
        image.write_at(offset, &data, imgfmt::Durability::Cached).unwrap();
    }
    image.close().unwrap();
    content
}

#[test]
fn qcow2_images_and_their_backing_files_are_read_exactly_past_the_page_cache() {
    let mut random = Random::new();
    let directory = tempfile::tempdir().unwrap();
    let content = chain(directory.path(), &mut random);
    for config in configs() {
        let Some(export) = direct(&directory.path().join("top.qcow2"), Format::Qcow2) else {
            return;
        };
        let server = TestServer::with(config, export);
        for mode in MODES {
            read_and_compare(&mut Client::connect(&server, mode), &content, &mut random);
        }
    }
}

#[test]
fn reads_and_writes_of_one_image_do_not_disturb_each_other_past_the_page_cache() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    Image::create(&path, &CreateOptions::new(Format::Qcow2, 8 << 20)).unwrap();
    let Some(export) = direct(&path, Format::Qcow2) else { return };
    let server = TestServer::with(ServerConfig::default(), export);
    let mut random = Random::new();
    std::thread::scope(|scope| {
        for part in 0..3 {
            let (server, mut random) = (&server, random.fork());
            scope.spawn(move || {
                let mut client = Client::connect(server, MODES[part as usize]);
                let mut content = vec![0; 2 << 20];
                for _ in 0..100 {
                    let length = 512 * (1 + random.below(200));
                    let offset = random.below((2 << 20) - length);
                    let place = (part * (2 << 20) + offset, &mut content[offset as usize..]);
                    if random.below(3) > 0 {
                        let data = random.bytes(length as usize);
                        client.write(place.0, &data).unwrap();
                        place.1[..data.len()].copy_from_slice(&data);
                    } else if random.below(2) > 0 {
                        // The clusters are free for the other clients.
                        let trim = Command::Trim(nbd_proto::transmission::Durability::Cached);
                        client.request(place.0, length, &trim).result.unwrap();
                        let now = client.read(place.0, length);
                        let was = &mut place.1[..now.len()];
                        assert!(now.iter().zip(&*was).all(|(now, was)| now == was || *now == 0));
                        was.copy_from_slice(&now);
                    }
                    assert!(client.read(part * (2 << 20), 2 << 20) == content);
                }
            });
        }
    });
}

#[test]
fn a_file_that_has_become_shorter_is_an_error_and_the_rest_is_read() {
    let content = Random::new().bytes(1 << 20);
    for config in configs() {
        let file = disk_file(&content);
        let Some(export) = direct(file.path(), Format::Raw) else { return };
        let server = TestServer::with(config, export);
        for mode in MODES {
            file.as_file().set_len((1 << 20) - 6000).unwrap();
            let mut client = Client::connect(&server, mode);
            for length in [4096, 65536] {
                let cut = client.request((1 << 20) - length, length, &READ);
                assert!(cut.result.is_err(), "{mode:?} {length}");
                assert!(client.read((1 << 20) - 8192, 2000) == content[(1 << 20) - 8192..][..2000]);
            }
        }
    }
}

#[test]
fn a_client_that_leaves_with_reads_in_flight_harms_no_other() {
    let content = Random::new().bytes(4 << 20);
    let file = disk_file(&content);
    for config in configs() {
        let Some(export) = direct(file.path(), Format::Raw) else { return };
        let server = TestServer::with(config, export.clone());
        for round in 0..50 {
            let mut client = Client::connect(&server, MODES[round % 3]);
            // More than are started at a time.
            for place in 0..100 {
                client.submit((place % 64) << 16, 1 << 16, &READ, &[]);
            }
            drop(client);
        }
        wait_until("they are gone", || server.handle().clients().is_empty());
        let mut client = Client::connect(&server, MODES[1]);
        assert!(client.read(4096, 4096) == content[4096..8192]);
        for place in 0..64 {
            client.submit(place << 16, 1 << 16, &READ, &[]);
        }
        // The server ends with reads in flight.
        drop(server);
        drop(client);
        wait_until("nothing has the image any more", || Arc::strong_count(&export) == 1);
    }
}

#[test]
fn more_reads_than_the_ring_has_room_for_are_all_answered() {
    let content = Random::new().bytes(2 << 20);
    let file = disk_file(&content);
    for mut config in configs() {
        config.workers = std::num::NonZeroUsize::MIN;
        config.max_requests = 1000;
        let Some(export) = direct(file.path(), Format::Raw) else { return };
        let server = TestServer::with(config, export);
        let mut clients = [0; 4].map(|_| Client::connect(&server, MODES[2]));
        for client in &mut clients {
            for place in 0..400 {
                client.submit(place * 4096, 4096, &READ, &[]);
            }
        }
        for client in &mut clients {
            for _ in 0..400 {
                assert_eq!(client.next_finished().1.result, Ok(()));
            }
        }
    }
}
