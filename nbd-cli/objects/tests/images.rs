//! Images of a store that fails in every way.
#![allow(clippy::unwrap_used)] // A test may fail.

use std::io::{BufRead as _, BufReader, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use imgfmt::storage::TryRead;
use imgfmt::{HostOffset, Storage as _};
use nbd_objects::testing::{Fault, Seen, TestStore};
use nbd_objects::{
    BLOCK_LEN, CacheSettings, Environment, Interrupted, ObjectCache, ObjectStorage, Reads,
    StoreError, StoreSettings, StoreUrl, Timeouts,
};

const KEY: &str = "/bucket/disk.img";

/// Bytes that differ in each block.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index / 7 + index / BLOCK_LEN * 31) as u8).collect()
}

fn settings(store: &TestStore) -> StoreSettings {
    let variables = [("AWS_ACCESS_KEY_ID", "AKIAKEY"), ("AWS_SECRET_ACCESS_KEY", "s3cr3t")];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    StoreSettings {
        endpoint: Some(store.endpoint()),
        environment: Environment::new(variables),
        timeouts: Timeouts {
            connect: Duration::from_secs(20),
            idle: Duration::from_millis(400),
            request: Duration::from_secs(20),
            total: Duration::from_secs(3),
        },
        ..StoreSettings::default()
    }
}

fn never() -> Interrupted {
    Arc::new(|| false)
}

struct Bench {
    store: TestStore,
    directory: tempfile::TempDir,
    data: Vec<u8>,
}

impl Bench {
    fn new(length: usize) -> Self {
        let store = TestStore::start().unwrap();
        let data = pattern(length);
        store.put(KEY, data.clone());
        Self { store, directory: tempfile::tempdir().unwrap(), data }
    }

    fn cache(&self) -> ObjectCache {
        self.cache_for(Reads::Again)
    }

    fn cache_for(&self, reads: Reads) -> ObjectCache {
        let directory = Some(self.directory.path().to_owned());
        let settings = CacheSettings { directory, is_optional: false, reads, size: 64 << 20 };
        ObjectCache::open(&settings).unwrap()
    }

    /// Bytes that were fetched.
    fn fetched(&self) -> u64 {
        let length = |seen: Seen| {
            let range = seen.range.unwrap();
            let (first, last) = range.trim_start_matches("bytes=").split_once('-').unwrap();
            last.parse::<u64>().unwrap() - first.parse::<u64>().unwrap() + 1
        };
        self.gets().into_iter().map(length).sum()
    }

    /// A task that has brought the last block may have the cache a moment longer than its reader.
    fn wait_for_end_of_cache(&self) {
        std::fs::File::open(self.directory.path().join("index")).unwrap().lock().unwrap();
    }

    fn open_with(&self, cache: &ObjectCache) -> Result<ObjectStorage, StoreError> {
        let url: StoreUrl = "s3://bucket/disk.img".parse().unwrap();
        ObjectStorage::open(&url, &settings(&self.store), cache, never())
    }

    fn open(&self) -> Result<ObjectStorage, StoreError> {
        self.open_with(&self.cache())
    }

    fn is_right(&self, storage: &ObjectStorage, offset: usize, length: usize) -> bool {
        let mut buffer = vec![0; length];
        let read = storage.read_at(HostOffset::new(offset as u64), &mut buffer).unwrap();
        let end = (offset + length).min(self.data.len());
        buffer[..read] == self.data[offset..end]
    }

    fn gets(&self) -> Vec<Seen> {
        self.store.take_seen()
    }
}

fn read_error(storage: &ObjectStorage, offset: usize) -> String {
    let mut buffer = [0; 512];
    storage.read_at(HostOffset::new(offset as u64), &mut buffer).unwrap_err().to_string()
}

#[test]
fn any_range_reads_as_the_object_and_again_from_the_cache() {
    let bench = Bench::new(5 * BLOCK_LEN + 1234);
    let storage = bench.open().unwrap();
    assert_eq!(storage.len().unwrap(), bench.data.len() as u64);
    let len = bench.data.len();
    let ranges = [(0, 1), (5, BLOCK_LEN), (BLOCK_LEN - 3, 7), (0, len), (len - 5, 100)];
    for (offset, length) in ranges {
        assert!(bench.is_right(&storage, offset, length), "{offset}+{length}");
    }
    assert!(bench.gets().iter().all(|seen| seen.is_signed && seen.range.is_some()));
    for (offset, length) in ranges {
        assert!(bench.is_right(&storage, offset, length), "{offset}+{length}");
    }
    assert_eq!(bench.gets().len(), 0, "everything is in the cache");
    let mut buffer = vec![0; 8192];
    let read = storage.try_read_at(HostOffset::new(BLOCK_LEN as u64 - 4096), &mut buffer);
    assert_eq!(read.unwrap(), TryRead::Complete);
    assert_eq!(buffer, bench.data[BLOCK_LEN - 4096..BLOCK_LEN + 4096]);
    let end = HostOffset::new(len as u64);
    assert_eq!(storage.read_at(end, &mut buffer).unwrap(), 0);
}

#[test]
fn next_process_finds_the_blocks_and_asks_once_for_the_tag() {
    let bench = Bench::new(3 * BLOCK_LEN);
    assert!(bench.is_right(&bench.open().unwrap(), 0, 3 * BLOCK_LEN));
    bench.gets();
    bench.wait_for_end_of_cache();
    let storage = bench.open().unwrap();
    assert!(bench.is_right(&storage, 0, 3 * BLOCK_LEN));
    assert_eq!(bench.gets().len(), 1, "only the opening asks the store");
}

#[test]
fn what_is_read_once_is_fetched_once_and_not_written_to_the_disk() {
    // More than is read ahead, so that the first blocks give way whatever is faster.
    let bench = Bench::new(300 * BLOCK_LEN + 777);
    let cache = bench.cache_for(Reads::Once);
    let one = bench.open_with(&cache).unwrap();
    // Another reader of the same object is a little behind.
    let other = bench.open_with(&cache).unwrap();
    bench.gets();
    for offset in (0..bench.data.len()).step_by(100_000) {
        assert!(bench.is_right(&one, offset, 100_000), "{offset}");
        assert!(bench.is_right(&other, offset.saturating_sub(BLOCK_LEN), 100_000), "{offset}");
    }
    // The first one came when the object was opened.
    assert_eq!(bench.fetched(), (bench.data.len() - BLOCK_LEN) as u64);
    let blocks = std::fs::metadata(bench.directory.path().join("blocks")).unwrap();
    assert_eq!(blocks.len(), BLOCK_LEN as u64);
    // What is wanted once more is fetched once more.
    assert!(bench.is_right(&one, 2 * BLOCK_LEN, 4096));
    assert_eq!(bench.gets().len(), 1);
}

#[test]
fn parts_that_are_read_later_are_fetched_once_even_if_they_are_many() {
    let count = 300;
    let bench = Bench::new(count * BLOCK_LEN);
    let storage = bench.open_with(&bench.cache_for(Reads::Once)).unwrap();
    // More than is held in memory.
    for part in [0, 1, 3, 2] {
        for block in 0..count {
            let (offset, length) = (block * BLOCK_LEN + part * BLOCK_LEN / 4, BLOCK_LEN / 4);
            assert!(bench.is_right(&storage, offset, length), "{block} {part}");
        }
    }
    assert_eq!(bench.fetched(), bench.data.len() as u64);
}

#[test]
fn many_readers_of_a_block_make_one_request() {
    let bench = Bench::new(8 * BLOCK_LEN);
    let cache = bench.cache();
    let storages = [bench.open_with(&cache).unwrap(), bench.open_with(&cache).unwrap()];
    bench.gets();
    bench.store.fail(|_| Fault::Late(100));
    std::thread::scope(|scope| {
        for index in 0..16 {
            let storage = &storages[index % 2];
            scope.spawn(|| assert!(bench.is_right(storage, 5 * BLOCK_LEN + 100, 4096)));
        }
    });
    assert_eq!(bench.gets().len(), 1);
}

#[test]
fn sequential_reads_are_fetched_in_long_ranges() {
    let blocks = 160;
    let bench = Bench::new(blocks * BLOCK_LEN);
    let storage = bench.open().unwrap();
    for offset in (0..bench.data.len()).step_by(64 << 10) {
        assert!(bench.is_right(&storage, offset, 64 << 10));
    }
    let count = bench.gets().len();
    assert!(count <= 20, "{count} requests for {blocks} blocks");
}

#[test]
fn several_requests_are_on_their_way_for_one_sequential_reader() {
    let bench = Bench::new(160 * BLOCK_LEN);
    let patient = StoreSettings { timeouts: Timeouts::default(), ..settings(&bench.store) };
    let url: StoreUrl = "s3://bucket/disk.img".parse().unwrap();
    let storage = ObjectStorage::open(&url, &patient, &bench.cache(), never()).unwrap();
    let first = |seen: &Seen| {
        let range = seen.range.as_deref()?.strip_prefix("bytes=")?.split('-').next()?;
        Some(range.parse::<usize>().ok()? / BLOCK_LEN)
    };
    bench.store.fail(move |seen| match first(seen) {
        Some(64..) => Fault::Held,
        _ => Fault::None,
    });
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for offset in (0..bench.data.len()).step_by(64 << 10) {
                assert!(bench.is_right(&storage, offset, 64 << 10));
            }
        });
        let start = std::time::Instant::now();
        while bench.store.held() < 3 {
            assert!(start.elapsed() < Duration::from_secs(60), "{} requests", bench.store.held());
            std::thread::sleep(Duration::from_millis(2));
        }
        bench.store.fail(|_| Fault::None);
        bench.store.release();
    });
    let mut blocks: Vec<_> = bench.gets().iter().map(|seen| first(seen).unwrap()).collect();
    let count = blocks.len();
    blocks.sort_unstable();
    blocks.dedup();
    assert_eq!(blocks.len(), count, "each block is fetched once");
}

#[test]
fn replaced_object_is_an_error_and_never_a_mix() {
    for fault in [Fault::None, Fault::NoCondition] {
        let bench = Bench::new(4 * BLOCK_LEN);
        let storage = bench.open().unwrap();
        bench.store.put(KEY, vec![0xaa; 4 * BLOCK_LEN]);
        bench.store.fail(move |_| fault);
        let error = read_error(&storage, 2 * BLOCK_LEN);
        assert!(error.contains("was replaced"), "{error}");
        assert!(bench.is_right(&storage, 0, 512), "what is in the cache is of the old object");
        // The new object is another one.
        let again = bench.open().unwrap();
        let mut buffer = [0; 512];
        again.read_at(HostOffset::new(0), &mut buffer).unwrap();
        assert_eq!(buffer, [0xaa; 512]);
    }
}

#[test]
fn servers_that_cannot_be_relied_on_are_refused() {
    for (fault, why) in [
        (Fault::WholeObject, "ignores ranges"),
        (Fault::NoTag, "no ETag"),
        (Fault::WrongRange, "another range"),
        (Fault::Status(403), "403 Forbidden: AsWanted"),
        (Fault::Status(404), "does not exist"),
    ] {
        let bench = Bench::new(4 * BLOCK_LEN);
        bench.store.fail(move |_| fault);
        let error = bench.open().unwrap_err().to_string();
        assert!(error.contains(why), "{fault:?}: {error}");
        assert!(!error.contains("AKIAKEY"), "{error}");
    }
}

#[test]
fn failures_that_pass_are_not_noticed() {
    for fault in [
        Fault::Status(503),
        Fault::Status(500),
        Fault::Status(429),
        Fault::ReplyLost,
        Fault::Cut(0),
        Fault::Cut(100_000),
        Fault::Stall(100_000),
        Fault::Hang,
    ] {
        let bench = Bench::new(4 * BLOCK_LEN);
        let storage = bench.open().unwrap();
        let is_first = AtomicBool::new(true);
        bench.store.fail(move |_| match is_first.swap(false, Ordering::Relaxed) {
            true => fault,
            false => Fault::None,
        });
        assert!(bench.is_right(&storage, 0, 4 * BLOCK_LEN), "{fault:?}");
    }
}

#[test]
fn failures_that_last_are_errors_within_the_time_limit() {
    for (fault, why) in [
        (Fault::Status(503), "503 Service Unavailable: AsWanted"),
        (Fault::Hang, "not moved a byte"),
        (Fault::Stall(10), "sent nothing"),
        (Fault::Cut(10), "connection to the store broke"),
        (Fault::WrongRange, "another range"),
        (Fault::WholeObject, "ignores ranges"),
    ] {
        let bench = Bench::new(4 * BLOCK_LEN);
        let storage = bench.open().unwrap();
        bench.store.fail(move |_| fault);
        let error = read_error(&storage, 2 * BLOCK_LEN);
        assert!(
            error.contains("s3://bucket/disk.img") && error.contains(why),
            "{fault:?}: {error}"
        );
        bench.store.fail(|_| Fault::None);
        assert!(bench.is_right(&storage, 2 * BLOCK_LEN, 512), "the next read tries again");
    }
}

#[test]
fn interrupted_read_ends_while_the_store_hangs() {
    let bench = Bench::new(4 * BLOCK_LEN);
    let url: StoreUrl = "s3://bucket/disk.img".parse().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let is_interrupted: Interrupted = {
        let stop = Arc::clone(&stop);
        Arc::new(move || stop.load(Ordering::Relaxed))
    };
    let patient = StoreSettings { timeouts: Timeouts::default(), ..settings(&bench.store) };
    let storage = ObjectStorage::open(&url, &patient, &bench.cache(), is_interrupted).unwrap();
    bench.store.fail(|_| Fault::Hang);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_error(&storage, 2 * BLOCK_LEN));
        stop.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap().contains("interrupted"));
    });
}

#[test]
fn store_that_is_not_there_is_named() {
    let bench = Bench::new(1);
    let endpoint = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let mut nowhere = settings(&bench.store);
    nowhere.endpoint = Some(endpoint.clone());
    nowhere.timeouts.total = Duration::from_millis(100);
    let url: StoreUrl = "s3://bucket/disk.img".parse().unwrap();
    let error = ObjectStorage::open(&url, &nowhere, &bench.cache(), never()).unwrap_err();
    let host = endpoint.trim_start_matches("http://");
    let expected =
        format!("cannot open s3://bucket/disk.img: cannot connect to {host}: Connection refused");
    assert_eq!(error.to_string(), expected);
}

#[test]
fn plain_http_needs_no_credentials_and_keeps_the_query() {
    let bench = Bench::new(2 * BLOCK_LEN);
    let url = format!("{}{KEY}?signature=f00d", bench.store.endpoint());
    let url: StoreUrl = url.parse().unwrap();
    let none = StoreSettings { environment: Environment::default(), ..settings(&bench.store) };
    let storage = ObjectStorage::open(&url, &none, &bench.cache(), never()).unwrap();
    assert!(bench.is_right(&storage, 0, 2 * BLOCK_LEN));
    let seen = bench.gets();
    assert!(seen.iter().all(|seen| seen.query == "signature=f00d" && !seen.is_signed), "{seen:?}");
    bench.store.fail(|_| Fault::Status(403));
    let error = ObjectStorage::open(&url, &none, &bench.cache(), never()).unwrap_err();
    assert!(!error.to_string().contains("f00d"), "{error}");
}

/// Serves one block of the first byte of the query, always with one ETag; without a query, it leads
/// to another place in the same folder. It ends with the process.
fn serve_by_query() -> std::net::SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") && stream.read_until(b'\n', &mut head).unwrap() > 0 {
            }
            let Some(query) = head.iter().position(|byte| *byte == b'?') else {
                let moved = "HTTP/1.1 302 Found\r\nlocation: new?n\r\nconnection: close\r\n\r\n";
                stream.get_mut().write_all(moved.as_bytes()).unwrap();
                continue;
            };
            let last = BLOCK_LEN - 1;
            let mut reply = format!(
                "HTTP/1.1 206 Partial Content\r\ncontent-range: bytes 0-{last}/{BLOCK_LEN}\r\n\
                 etag: \"65f1-40000\"\r\nlast-modified: Fri, 27 Nov 2026 10:00:00 GMT\r\n\
                 content-length: {BLOCK_LEN}\r\nconnection: close\r\n\r\n"
            )
            .into_bytes();
            reply.resize(reply.len() + BLOCK_LEN, head[query + 1]);
            stream.get_mut().write_all(&reply).unwrap();
        }
    });
    address
}

/// Many servers make the ETag of the time and the size, which two disks may share.
#[test]
fn addresses_that_differ_in_their_query_share_no_block_of_the_cache() {
    let bench = Bench::new(1);
    let address = serve_by_query();
    let cache = bench.cache();
    for query in ["a", "b", "a"] {
        let url: StoreUrl = format!("http://{address}/get?{query}").parse().unwrap();
        let storage = ObjectStorage::open(&url, &settings(&bench.store), &cache, never()).unwrap();
        let mut buffer = [0; 512];
        storage.read_at(HostOffset::new(1024), &mut buffer).unwrap();
        assert_eq!(buffer, [query.as_bytes()[0]; 512]);
    }
}

#[test]
fn relative_redirect_is_followed() {
    let bench = Bench::new(1);
    let url: StoreUrl = format!("http://{}/folder/old", serve_by_query()).parse().unwrap();
    let storage =
        ObjectStorage::open(&url, &settings(&bench.store), &bench.cache(), never()).unwrap();
    let mut buffer = [0; 512];
    storage.read_at(HostOffset::new(1024), &mut buffer).unwrap();
    assert_eq!(buffer, [b'n'; 512]);
}

#[test]
fn object_of_less_than_a_block_is_one_request() {
    let bench = Bench::new(1000);
    let storage = bench.open().unwrap();
    assert!(bench.is_right(&storage, 0, 1000) && bench.is_right(&storage, 990, 100));
    assert_eq!(bench.gets().len(), 1);
    bench.store.put(KEY, "");
    assert!(bench.open().is_err(), "an empty object has no range");
}
