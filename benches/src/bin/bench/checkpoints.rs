//! Checkpoints, and their cost for concurrent writes.
//!
//! The time until a checkpoint has started on a disk of 1 TiB, empty and with all its clusters
//! mapped. Then 4 KiB random writes, 16 in flight, into an image all of whose clusters are
//! allocated: without a checkpoint, right after the start of one, when nearly every write is the
//! first to its place, and while its view is read. Beside each row that reads the view, another row
//! reads the disk itself, so that the cost of reading is not attributed to the checkpoint. The read
//! rate is limited so that a machine with two processors has capacity left for the writes.
//!
//! An alternative, an internal snapshot, is `ours-snapshot`. QEMU's is a backup job in
//! qemu-storage-daemon that copies only overwritten data.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::bars::Limit;
use super::contest::{Against, Contender, Contest, ContestBar, OURS};
use super::data::DataFile;
use super::fleecing::{Fleecing, Maker};
use super::group::Group;
use super::lab::Lab;
use super::load;
use super::options::Options;
use super::process::{self, Usage, Watch};
use super::sample::Sample;
use super::workload::{ClientResult, Job, Length, Pattern, Unit};
use crate::command::output_of;

pub(crate) const GROUP: Group = Group { name: "checkpoints", contests, bars, prepare };

const HUGE_BYTES: u64 = 1 << 40;
const SPARSE: &str = "sparse-1t.qcow2";
const MAPPED: &str = "mapped-1t.qcow2";
const DISK: &str = "disk.qcow2";
const RAW: &str = "source.img";
const BITMAP: &str = "backup";
const SNAPSHOT: &str = "moment";

/// The rate at which a fast network or disk takes a backup.
const READER_RATE: &str = "--rate=200m";

const OURS_SNAPSHOT: &str = "ours-snapshot";
const QEMU: &str = "qemu-storage-daemon";

const START_SPARSE: &str = "checkpoint-start-1t";
const START_MAPPED: &str = "checkpoint-start-1t-mapped";
const END_MAPPED: &str = "checkpoint-end-1t-mapped";
const NONE: &str = "checkpoint-none-randwrite-4k-qd16";
const FRESH: &str = "checkpoint-fresh-randwrite-4k-qd16";
const NONE_READ: &str = "checkpoint-none-read-randwrite-4k-qd16";
const READ: &str = "checkpoint-read-randwrite-4k-qd16";

/// The timed part of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Timed {
    Begin,
    End,
}

/// The load beside the writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Beside {
    checkpoint: bool,
    reader: bool,
}

fn contests(_: &Options) -> Vec<Contest> {
    let write = |name, checkpoint, reader| write_contest(name, Beside { checkpoint, reader });
    vec![
        timed_contest(START_SPARSE, SPARSE, Timed::Begin),
        timed_contest(START_MAPPED, MAPPED, Timed::Begin),
        timed_contest(END_MAPPED, MAPPED, Timed::End),
        write(NONE, false, false),
        write(FRESH, true, false),
        write(NONE_READ, false, true),
        write(READ, true, true),
    ]
}

fn bars() -> Vec<ContestBar> {
    let bar = |row: &str, against, least| ContestBar {
        row: row.to_owned(),
        against,
        limit: Limit::AtLeast(least),
    };
    vec![
        // Under a second.
        bar(START_SPARSE, Against::Nothing, 60.0),
        bar(START_MAPPED, Against::Nothing, 60.0),
        bar(FRESH, Against::OursInRow(NONE.to_owned()), 0.5),
        bar(FRESH, Against::BestPeer, 1.0),
        bar(READ, Against::OursInRow(NONE_READ.to_owned()), 0.5),
        bar(READ, Against::BestPeer, 1.0),
    ]
}

fn prepare(lab: &Lab<'_>) -> Result<()> {
    let options = lab.options;
    for (image, preallocation) in [(SPARSE, "off"), (MAPPED, "metadata")] {
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o"]);
        create.arg(format!("preallocation={preallocation}"));
        output_of(create.arg(lab.file(image)).arg(HUGE_BYTES.to_string()))?;
        output_of(
            Command::new("qemu-img").args(["bitmap", "--add"]).arg(lab.file(image)).arg(BITMAP),
        )?;
    }
    DataFile::create(lab.file(RAW), options.size, options.page_cache)?;
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]);
    output_of(convert.arg(lab.file(RAW)).arg(lab.file(DISK)))?;
    Ok(fs::remove_file(lab.file(RAW))?)
}

/// The rate per minute, and the duration as latency.
fn timed_contest(name: &str, image: &'static str, timed: Timed) -> Contest {
    let contender = |name, measure: fn(&Lab<'_>, &str, Timed) -> Result<Sample>| Contender {
        name,
        measure: Box::new(move |lab| {
            lab.settle_before_change(image)?;
            measure(lab, image, timed)
        }),
    };
    let mut contenders = vec![contender(OURS, time_ours), contender(OURS_SNAPSHOT, time_snapshot)];
    if timed == Timed::Begin {
        contenders.push(contender(QEMU, |lab, image, _| {
            let server = Fleecing::start(Maker::Qemu, lab, image)?;
            server.prepare(HUGE_BYTES)?;
            time(&server, || server.begin())
        }));
    }
    Contest { name: name.to_owned(), throughput_unit: "/min", work_name: "time", contenders }
}

fn time_ours(lab: &Lab<'_>, image: &str, timed: Timed) -> Result<Sample> {
    let server = Fleecing::start(Maker::Ours, lab, image)?;
    let begin = || server.begin_with_bitmap(BITMAP);
    match timed {
        Timed::Begin => {
            let sample = time(&server, begin)?;
            server.end()?;
            Ok(sample)
        }
        Timed::End => {
            begin()?;
            time(&server, || server.end())
        }
    }
}

fn time_snapshot(lab: &Lab<'_>, image: &str, timed: Timed) -> Result<Sample> {
    let (begun, begin) = process::run_to_end(&mut snapshot(lab, "create", image))?;
    let (ended, end) = process::run_to_end(&mut snapshot(lab, "delete", image))?;
    Ok(match timed {
        Timed::Begin => once(begun, begin),
        Timed::End => once(ended, end),
    })
}

fn snapshot(lab: &Lab<'_>, what: &str, image: &str) -> Command {
    let mut command = lab.nbd_cli();
    command.args(["image", "snapshot", what]).arg(lab.file(image)).arg(SNAPSHOT);
    command
}

fn time(server: &Fleecing, work: impl Fn() -> Result<()>) -> Result<Sample> {
    let watch = Watch::start(server.running.root_process())?;
    let start = Instant::now();
    work()?;
    let elapsed = start.elapsed();
    Ok(once(elapsed, watch.finish()?))
}

/// The sample of an operation that was done once.
fn once(elapsed: Duration, usage: Usage) -> Sample {
    let result = ClientResult {
        throughput: 60.0 / elapsed.as_secs_f64(),
        p99_us: Some(elapsed.as_secs_f64() * 1e6),
        busy: None,
        work: 1.0,
    };
    Sample::new(result, usage)
}

fn write_contest(name: &str, beside: Beside) -> Contest {
    let server = |name, maker| Contender {
        name,
        measure: Box::new(move |lab: &Lab<'_>| {
            lab.settle(DISK)?;
            write(maker, lab, beside)
        }),
    };
    let mut contenders = vec![server(OURS, Maker::Ours), server(QEMU, Maker::Qemu)];
    // A server does not allow reading a snapshot of the image that it writes.
    if beside == (Beside { checkpoint: true, reader: false }) {
        contenders.push(Contender { name: OURS_SNAPSHOT, measure: Box::new(write_after_snapshot) });
    }
    Contest {
        name: name.to_owned(),
        throughput_unit: Unit::Requests.suffix(),
        work_name: "request",
        contenders,
    }
}

fn write(maker: Maker, lab: &Lab<'_>, beside: Beside) -> Result<Sample> {
    let server = Fleecing::start(maker, lab, DISK)?;
    let mut read_uri = server.running.uri().to_owned();
    if beside.checkpoint {
        server.prepare(lab.options.size)?;
        server.begin()?;
        read_uri = server.view_uri();
    }
    let watch = Watch::start(server.running.root_process())?;
    let reader = beside.reader.then(|| Reader::start(&read_uri, lab.options.size)).transpose()?;
    let result = load::run(&job(lab), server.running.uri(), lab.options.size, lab.nbd_cli())?;
    reader.map_or(Ok(()), Reader::finish)?;
    let sample = Sample::new(result, watch.finish()?);
    if beside.checkpoint {
        // A lost view is not a backup, however fast the writes were.
        server.end()?;
    }
    Ok(sample)
}

/// The writes copy the clusters that belong to the snapshot. Afterwards the image is in its former
/// state.
fn write_after_snapshot(lab: &Lab<'_>) -> Result<Sample> {
    lab.settle_before_change(DISK)?;
    process::run_to_end(&mut snapshot(lab, "create", DISK))?;
    let sample = write(Maker::Ours, lab, Beside { checkpoint: false, reader: false });
    for what in ["apply", "delete"] {
        process::run_to_end(&mut snapshot(lab, what, DISK))?;
    }
    sample
}

fn job(lab: &Lab<'_>) -> Job {
    Job {
        pattern: Pattern::RandomWrite,
        block_size: 4 << 10,
        depth: 16,
        connections: 1,
        length: Length::Seconds(lab.options.seconds),
        unit: Unit::Requests,
    }
}

/// Reads a disk from start to end repeatedly until it is dropped.
#[derive(Debug)]
struct Reader {
    child: Child,
}

impl Reader {
    fn start(uri: &str, size: u64) -> Result<Self> {
        let mut command = Command::new("fio");
        command
            .args([
                "--name=backup",
                "--thread",
                "--ioengine=nbd",
                "--rw=read",
                "--bs=256k",
                "--iodepth=8",
            ])
            .args(["--time_based", "--runtime=3600", READER_RATE])
            .arg(format!("--uri={uri}"))
            .arg(format!("--size={size}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        Ok(Self { child: command.spawn().context("cannot start fio")? })
    }

    /// Fails if the reader ended early.
    fn finish(mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the reader ended with {status}"),
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // It may have ended, and may have been waited for.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
