//! The order of what a server writes, with io_uring too: when the power fails, the image is sound
//! and holds what was acknowledged as durable. `NBD_CRASH_ROUNDS` sets how many instants are tried
//! for each image.

mod bitmaps;

use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use imgfmt::{Format, GuestOffset, Image, OpenOptions};
use nbd_client::{Bytes, Client, Connector, Durability, Speed, ZeroMode};
use tokio::runtime::Runtime;

use crate::support::http::get;
use crate::support::mount::can_mount;
use crate::support::random::Random;
use crate::support::recording::{Log, Loss, Recording, SECTOR};
use crate::support::{Server, peer, run, tool};
use crate::tools;

const SIZE: u64 = 2 << 20;
/// The size of each file.
const ROOM: u64 = 6 << 20;
const CONNECTIONS: u64 = 3;
/// Requests in flight on each connection, each of which has a part of the disk, in sectors.
const WRITERS: u64 = 6;
const PART: u64 = SIZE / (CONNECTIONS * WRITERS) / 4096 * 4096 / SECTOR;
const OPERATIONS: u64 = 30;

/// The instants of a request: numbers of a clock, and positions in the recording.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    sent: (u64, usize),
    acknowledged: (u64, usize),
}

/// A change of some sectors. Each of them then has this number, or is zero if that is zero.
#[derive(Clone, Debug)]
struct Change {
    sectors: Range<u64>,
    number: u64,
    is_durable: bool,
    span: Span,
}

/// What the clients have done.
#[derive(Debug, Default)]
struct History {
    /// In the order of each writer; no two of these write to the same sectors.
    changes: Vec<Change>,
    flushes: Vec<Span>,
}

impl History {
    /// The numbers that each sector may have after a crash at this position.
    fn possible(&self, position: usize, sectors: usize) -> Vec<Vec<u64>> {
        let has_ended = |span: Span| span.acknowledged.1 <= position;
        let flushes: Vec<&Span> = self.flushes.iter().filter(|span| has_ended(**span)).collect();
        let mut possible = vec![vec![0]; sectors];
        for Change { sectors, number, is_durable, span } in &self.changes {
            let is_kept = *is_durable && has_ended(*span)
                || flushes.iter().any(|flush| flush.sent.0 > span.acknowledged.0);
            for sector in sectors.clone() {
                let possible = &mut possible[sector as usize];
                if is_kept {
                    possible.clear();
                }
                if span.sent.1 <= position {
                    possible.push(*number);
                }
            }
        }
        possible
    }
}

/// The clock of a load, and the recording.
struct Clock {
    now: AtomicU64,
    log: Log,
}

impl Clock {
    fn now(&self) -> (u64, usize) {
        // A position that is too low for what is sent, and too high for what has ended, is right.
        (self.now.fetch_add(1, SeqCst), self.log.lock().expect("no panic").len())
    }
}

/// The content of a sector.
fn content(sector: u64, number: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    for word in bytes.chunks_exact_mut(8).filter(|_| number > 0) {
        word.copy_from_slice(&((sector << 32) | number).to_le_bytes());
    }
    bytes
}

/// The requests of one of the writers.
#[derive(Clone, Copy)]
struct Writer {
    number: u64,
    /// The first sector of its part of the disk.
    first: u64,
    all_durable: bool,
}

/// Sends requests one after the other, all to one part of the disk.
async fn write(client: Arc<Client>, clock: Arc<Clock>, writer: Writer) -> History {
    let Writer { number: writer, first, all_durable } = writer;
    let mut random = Random::new((writer << 32) | (u64::from(std::process::id()) << 8) | 1);
    let mut history = History::default();
    for operation in 0..OPERATIONS {
        if random.below(12) == 0 {
            let sent = clock.now();
            client.flush().await.expect("a flush");
            history.flushes.push(Span { sent, acknowledged: clock.now() });
            continue;
        }
        let unit = [1, 8, 8][random.below(3) as usize];
        let most = [2, 10][random.below(2) as usize];
        let count = unit * (1 + random.below(most));
        let start = random.below(PART - count) / unit * unit + first;
        let sectors = start..start + count;
        let durability = match random.below(4) {
            0 => Durability::Fua,
            _ => Durability::Cached,
        };
        let is_durable = all_durable || durability == Durability::Fua;
        let is_zero = random.below(10) == 0;
        let number = if is_zero { 0 } else { (writer << 16) | (operation + 1) };
        let (from, to) = (sectors.start * SECTOR, sectors.end * SECTOR);
        let sent = clock.now();
        if is_zero {
            let mode = [ZeroMode::MayUnmap, ZeroMode::KeepAllocated][random.below(2) as usize];
            client.write_zeroes(from..to, mode, Speed::Any, durability).await.expect("zeroes");
        } else {
            let bytes = sectors.clone().flat_map(|sector| content(sector, number)).collect();
            client
                .write(from, Bytes::from_owner::<Vec<u8>>(bytes), durability)
                .await
                .expect("room");
        }
        let span = Span { sent, acknowledged: clock.now() };
        history.changes.push(Change { sectors, number, is_durable, span });
    }
    history
}

/// Several clients write, with several requests in flight each. Their parts of the disk begin so
/// many sectors after each other.
fn load(uri: &str, log: &Log, all_durable: bool, stride: u64) -> History {
    let runtime = Runtime::new().expect("a runtime");
    let clock = Arc::new(Clock { now: AtomicU64::new(0), log: Arc::clone(log) });
    runtime.block_on(async {
        let mut writers = Vec::new();
        for connection in 0..CONNECTIONS {
            let client = Connector::new(uri.parse().expect("a URI")).connect().await;
            let client = Arc::new(client.expect("a connection"));
            for number in connection * WRITERS..(connection + 1) * WRITERS {
                let (client, clock) = (Arc::clone(&client), Arc::clone(&clock));
                let writer = Writer { number, first: number * stride, all_durable };
                writers.push(tokio::spawn(write(client, clock, writer)));
            }
        }
        let mut history = History::default();
        for writer in writers {
            let its = writer.await.expect("no panic");
            history.changes.extend(its.changes);
            history.flushes.extend(its.flushes);
        }
        history
    })
}

/// Checks an image after a crash at this position, and returns its content.
fn judge(path: &Path, format: Format, history: &History, position: usize, what: &str) -> Vec<u8> {
    if format == Format::Qcow2 {
        // Leaks are allowed. QEMU looks for the data file in the present directory.
        let qemu_img = tool("qemu-img").expect("it was there");
        let directory = path.parent().expect("a directory");
        let check = ["check".as_ref(), "-q".as_ref(), path.as_os_str()];
        let check = run(Command::new(qemu_img).args(check).current_dir(directory));
        assert!(matches!(check.code, Some(0 | 3)), "{what}: {check:?}");
    }
    let image = Image::open(path, &OpenOptions::new().format(format)).expect(what);
    let mut bytes = vec![0; image.size() as usize];
    image.read_at(GuestOffset::new(0), &mut bytes).expect(what);
    let sectors = bytes.chunks_exact(SECTOR as usize);
    let possible = history.possible(position, sectors.len());
    for ((sector, possible), bytes) in (0..).zip(possible).zip(sectors) {
        let is_possible = possible.iter().any(|number| *bytes == content(sector, *number));
        let changes = history.changes.iter().filter(|change| change.sectors.contains(&sector));
        assert!(
            is_possible,
            "{what}: sector {sector} begins with {:x?}, not one of {possible:x?}: {:#?}",
            &bytes[..8],
            changes.collect::<Vec<_>>()
        );
    }
    bytes
}

/// Lets the power fail at some instants: calls `judge` with the position and a text, after the
/// files have been made in the directory.
fn fail(
    recording: &Recording,
    history: &History,
    (cache, directory): (&str, &Path),
    judge: impl Fn(usize, &str),
) {
    let end = recording.log().lock().expect("no panic").len();
    let seed = (u64::from(std::process::id()) << 20) | end as u64 | 1;
    let mut random = Random::new(seed);
    let rounds = std::env::var("NBD_CRASH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok());
    for _ in 0..rounds.unwrap_or(5) {
        // The instant of an acknowledgement is the one where an order that is wrong shows most.
        let spans = history.changes.iter().map(|change| change.span);
        let ends: Vec<usize> =
            spans.chain(history.flushes.clone()).map(|span| span.acknowledged.1).collect();
        let position = match random.below(3) {
            0 => random.below(end as u64 + 1) as usize,
            _ => ends[random.below(ends.len() as u64) as usize],
        };
        let loss = Loss::ALL[random.below(4) as usize];
        recording.crash(position, loss, &mut random, directory);
        judge(position, &format!("{cache}: {loss:?} lost after {position} of {end}, seed {seed}"));
    }
}

/// Checks that io_uring has carried writes out, if it can.
fn assert_ring_was_used(metrics: &str, is_direct: bool) {
    let metrics = get(Path::new(metrics), "/metrics");
    let name = r#"nbd_ring_requests_total{command="write"} "#;
    let writes = metrics.lines().find_map(|line| line.strip_prefix(name)).expect("it is there");
    let writes: u64 = writes.parse().expect("a number");
    if !is_direct || std::env::var_os("NBD_AIO").is_some_and(|mode| mode == "threads") {
        assert_eq!(writes, 0);
    } else if writes == 0 {
        let is = |path: &str, what: &str| {
            std::fs::read_to_string(path).is_ok_and(|it| it.contains(what))
        };
        let is_allowed =
            is("/proc/sys/kernel/io_uring_disabled", "0") && is("/proc/self/status", "Seccomp:\t0");
        assert!(!is_allowed && std::env::var_os("CI").is_none(), "io_uring was not used");
        eprintln!("skipped: this system forbids io_uring");
    }
}

/// Serves the image `disk` of a directory in a mode, loads it, and lets the power fail at random
/// instants.
fn cut(directory: &Path, names: &[&'static str], format: Format, cache: &str) {
    let recording = Recording::new(directory, names, ROOM);
    let format_name = if format == Format::Raw { "raw" } else { "qcow2" };
    let path = recording.path("disk");
    let metrics = recording.path("metrics");
    let server = Server::ours(&[
        "--cache",
        cache,
        "--metrics",
        &format!("unix:{metrics}"),
        "--trust-image",
        "-f",
        format_name,
        &path,
    ]);
    let history = load(server.uri(), recording.log(), is_durable(cache), PART);
    assert_ring_was_used(&metrics, DIRECT.contains(&cache));
    server.end();
    fail(&recording, &history, (cache, directory), |position, what| {
        judge(&directory.join("disk"), format, &history, position, what);
    });
}

/// Whether a write is durable in this mode when it has been acknowledged.
fn is_durable(cache: &str) -> bool {
    matches!(cache, "directsync" | "writethrough")
}

/// Makes a new image for each mode, and lets the power fail.
fn cut_qcow2(options: &str, names: &[&'static str], bitmap: bool, caches: &[&str]) {
    tools!(qemu_img = "qemu-img");
    if !can_mount() {
        return;
    }
    for cache in caches {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk");
        let path = path.to_str().expect("a plain name");
        let create = ["create", "-q", "-f", "qcow2", "-o", options, path, "2M"];
        let made = run(Command::new(&qemu_img).args(create).current_dir(&directory));
        assert_eq!(made.code, Some(0), "{made:?}");
        if bitmap {
            peer(&qemu_img, &["bitmap", "--add", path, "changes"]);
        }
        cut(directory.path(), names, Format::Qcow2, cache);
    }
}

const DIRECT: [&str; 2] = ["none", "directsync"];
const ALL: [&str; 4] = [DIRECT[0], DIRECT[1], "writethrough", "writeback"];

#[test]
fn raw_disks_hold_what_was_acknowledged_when_the_power_fails() {
    if !can_mount() {
        return;
    }
    for cache in ALL {
        let directory = tempfile::tempdir().expect("a directory");
        let file = std::fs::File::create(directory.path().join("disk")).expect("a file");
        file.set_len(SIZE).expect("room for a hole");
        cut(directory.path(), &["disk"], Format::Raw, cache);
    }
}

#[test]
fn qcow2_images_hold_what_was_acknowledged_when_the_power_fails() {
    cut_qcow2("cluster_size=4096", &["disk"], false, &ALL);
    cut_qcow2("cluster_size=65536", &["disk"], false, &DIRECT);
    cut_qcow2("cluster_size=4096,preallocation=metadata", &["disk"], false, &DIRECT);
}

#[test]
fn qcow2_images_with_subclusters_hold_what_was_acknowledged_when_the_power_fails() {
    cut_qcow2("extended_l2=on,cluster_size=16384", &["disk"], false, &ALL);
}

#[test]
fn qcow2_images_with_bitmaps_hold_what_was_acknowledged_when_the_power_fails() {
    cut_qcow2("cluster_size=4096", &["disk"], true, &DIRECT);
}

#[test]
fn qcow2_images_with_a_data_file_hold_what_was_acknowledged_when_the_power_fails() {
    cut_qcow2("data_file=data,cluster_size=4096", &["disk", "data"], false, &ALL);
    cut_qcow2("data_file=data,data_file_raw=on", &["disk", "data"], false, &DIRECT);
}

#[test]
fn a_disk_that_loses_what_was_flushed_would_be_noticed() {
    if !can_mount() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("disk"), vec![0; SIZE as usize]).expect("room");
    let recording = Recording::new(directory.path(), &["disk"], ROOM);
    let server = Server::ours(&["--cache", "none", "-f", "raw", &recording.path("disk")]);
    let history = load(server.uri(), recording.log(), false, PART);
    server.end();
    let end = recording.log().lock().expect("no panic").len();
    let judged = |loss| {
        recording.crash(end, loss, &mut Random::new(1), directory.path());
        let path = directory.path().join("disk");
        std::panic::catch_unwind(|| {
            judge(&path, Format::Raw, &history, end, "control");
        })
    };
    judged(Loss::Everything).expect("all that matters is on the disk");
    judged(Loss::EvenWhatWasSynced).expect_err("something was flushed");
}
