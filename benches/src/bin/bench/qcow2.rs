//! qcow2 exports beside `qemu-nbd -f qcow2`.
//!
//! Reads and in-place writes go to an image all of whose clusters are allocated. Rows that allocate
//! get a fresh image for every block and a fixed number of writes, so that a faster server does not
//! find more of the image allocated.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::bars::Limit;
use super::contest::{Against, Contender, Contest, ContestBar, OURS};
use super::data::DataFile;
use super::group::Group;
use super::lab::Lab;
use super::options::Options;
use super::workload::{Job, Length, Pattern, Unit};
use super::{load, process};
use crate::command::output_of;

pub(crate) const GROUP: Group = Group { name: "qcow2", contests, bars, prepare };

/// Our export of the same bytes as a raw file.
const OURS_RAW: &str = "ours-raw";
const FULL: &str = "full.qcow2";
const RAW: &str = "full.img";
const FRESH: &str = "fresh.qcow2";
/// The unit of allocation in an overlay.
const WHOLE_CLUSTERS: &str = "extended_l2=off";
const SUBCLUSTERS: &str = "extended_l2=on";
const SMALL_BYTES: u64 = 4 << 10;
const LARGE_BYTES: u64 = 256 << 10;
/// Disk size of the empty image: large, so that most writes go to an unallocated cluster.
const EMPTY_BYTES: u64 = 64 << 30;
/// Number of writes of one block into the empty image, and into an overlay of a disk of 2 GiB, a
/// fifth of whose clusters they touch.
const EMPTY_WRITES: u64 = 32_768;
const OVERLAY_WRITES: u64 = 8192;

/// The contents of the image before the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Disk {
    /// All clusters, and always the same image.
    Full,
    /// Nothing.
    Empty,
    /// Nothing, over a full base of this format; `options` in qemu-img's syntax.
    Overlay { base: &'static str, options: &'static str },
}

#[derive(Debug, Clone, Copy)]
struct Work {
    name: &'static str,
    disk: Disk,
    pattern: Pattern,
    block_size: u64,
    depth: u32,
    connections: u32,
}

const WORKS: &[Work] = &[
    in_place("qcow2-randread-4k-qd1", Pattern::RandomRead, 1),
    in_place("qcow2-randread-4k-qd16", Pattern::RandomRead, 16),
    in_place("qcow2-randread-4k-qd64", Pattern::RandomRead, 64),
    four(in_place("qcow2-randread-4k-qd16-c4", Pattern::RandomRead, 16)),
    in_place("qcow2-randwrite-4k-qd1", Pattern::RandomWrite, 1),
    in_place("qcow2-randwrite-4k-qd16", Pattern::RandomWrite, 16),
    in_place("qcow2-randwrite-4k-qd64", Pattern::RandomWrite, 64),
    four(in_place("qcow2-randwrite-4k-qd16-c4", Pattern::RandomWrite, 16)),
    large(in_place("qcow2-read-256k-qd16", Pattern::SequentialRead, 16)),
    large(in_place("qcow2-write-256k-qd16", Pattern::SequentialWrite, 16)),
    allocating("qcow2-allocate-4k-qd16", Disk::Empty, 16),
    allocating("qcow2-allocate-4k-qd64", Disk::Empty, 64),
    four(allocating("qcow2-allocate-4k-qd16-c4", Disk::Empty, 16)),
    allocating("qcow2-over-raw-4k-qd16", over("raw", WHOLE_CLUSTERS), 16),
    allocating("qcow2-over-raw-4k-qd64", over("raw", WHOLE_CLUSTERS), 64),
    allocating("qcow2-over-qcow2-4k-qd16", over("qcow2", WHOLE_CLUSTERS), 16),
    allocating("qcow2-subclusters-over-raw-4k-qd16", over("raw", SUBCLUSTERS), 16),
    allocating("qcow2-subclusters-over-raw-4k-qd64", over("raw", SUBCLUSTERS), 64),
];

const fn in_place(name: &'static str, pattern: Pattern, depth: u32) -> Work {
    Work { name, disk: Disk::Full, pattern, block_size: SMALL_BYTES, depth, connections: 1 }
}

const fn allocating(name: &'static str, disk: Disk, depth: u32) -> Work {
    let pattern = Pattern::RandomWrite;
    Work { name, disk, pattern, block_size: SMALL_BYTES, depth, connections: 1 }
}

const fn over(base: &'static str, options: &'static str) -> Disk {
    Disk::Overlay { base, options }
}

const fn large(work: Work) -> Work {
    Work { block_size: LARGE_BYTES, ..work }
}

const fn four(work: Work) -> Work {
    Work { connections: 4, ..work }
}

fn bars() -> Vec<ContestBar> {
    let mut bars = Vec::new();
    for work in WORKS {
        let least = match (work.disk, work.pattern) {
            (Disk::Full, Pattern::RandomRead) => 3.0,
            (Disk::Full, Pattern::RandomWrite) => 2.0,
            (Disk::Full, Pattern::SequentialRead | Pattern::SequentialWrite) => 1.0,
            (Disk::Empty | Disk::Overlay { .. }, _) => 2.0,
        };
        bars.push(bar(work, Against::BestPeer, least));
        if work.has_raw_beside() {
            bars.push(bar(work, Against::Contender(OURS_RAW), 0.8));
        }
        if let Some(one) = work.name.strip_suffix("-c4") {
            bars.push(bar(work, Against::OursInRow(one.to_owned()), 1.0));
        }
    }
    bars
}

fn bar(work: &Work, against: Against, least: f64) -> ContestBar {
    ContestBar { row: work.name.to_owned(), against, limit: Limit::AtLeast(least) }
}

fn contests(_: &Options) -> Vec<Contest> {
    WORKS.iter().map(|work| work.contest()).collect()
}

fn prepare(lab: &Lab<'_>) -> Result<()> {
    let options = lab.options;
    DataFile::create(lab.file(RAW), options.size, options.page_cache)?;
    convert(lab, "raw", RAW, FULL)
}

fn convert(lab: &Lab<'_>, format: &str, source: &str, target: &str) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", format, "-O", "qcow2"]);
    command.arg(lab.file(source)).arg(lab.file(target));
    process::run_to_end(&mut command).map(drop)
}

impl Work {
    /// Whether the row also shows our raw export.
    fn has_raw_beside(&self) -> bool {
        self.disk == Disk::Full && self.pattern == Pattern::RandomRead && self.connections == 1
    }

    fn unit(&self) -> Unit {
        if self.block_size == SMALL_BYTES { Unit::Requests } else { Unit::Mebibytes }
    }

    fn contest(&'static self) -> Contest {
        let mut contenders = vec![self.contender(OURS, |lab, disk| ours(lab, "qcow2", disk))];
        if self.has_raw_beside() {
            contenders.push(self.contender(OURS_RAW, |lab, _| ours(lab, "raw", &lab.file(RAW))));
        }
        contenders.push(self.contender("qemu-nbd", |lab, disk| qemu_nbd(lab, &[], disk)));
        let best: &[&str] = &["--cache=writeback", "--aio=io_uring"];
        contenders.push(self.contender("qemu-nbd-io-uring", |lab, disk| qemu_nbd(lab, best, disk)));
        Contest {
            name: self.name.to_owned(),
            throughput_unit: self.unit().suffix(),
            work_name: "request",
            contenders,
        }
    }

    fn contender(
        &'static self,
        name: &'static str,
        server: impl Fn(&Lab<'_>, &Path) -> Command + 'static,
    ) -> Contender {
        let measure = move |lab: &Lab<'_>| {
            let disk = self.make_disk(lab, name)?;
            lab.serve_and_run(server(lab, &disk), |uri| self.run(lab, uri))
        };
        Contender { name, measure: Box::new(measure) }
    }

    /// The image for one block.
    fn make_disk(&self, lab: &Lab<'_>, contender: &str) -> Result<std::path::PathBuf> {
        let fresh = lab.file(FRESH);
        drop(fs::remove_file(&fresh));
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2"]);
        match self.disk {
            Disk::Full => {
                lab.settle(if contender == OURS_RAW { RAW } else { FULL })?;
                return Ok(lab.file(FULL));
            }
            Disk::Empty => create.arg(&fresh).arg(EMPTY_BYTES.to_string()),
            Disk::Overlay { base, options } => {
                let name = if base == "raw" { RAW } else { FULL };
                lab.settle(name)?;
                create.args(["-o", options, "-b", name, "-F", base]).arg(&fresh)
            }
        };
        output_of(&mut create)?;
        Ok(fresh)
    }

    fn run(&self, lab: &Lab<'_>, uri: &str) -> Result<super::workload::ClientResult> {
        let options = lab.options;
        let (size, length) = match self.disk {
            Disk::Full => (options.size, Length::Seconds(options.seconds)),
            Disk::Empty => (EMPTY_BYTES, Length::Requests(EMPTY_WRITES)),
            Disk::Overlay { .. } => (options.size, Length::Requests(OVERLAY_WRITES)),
        };
        let &Self { pattern, block_size, depth, connections, .. } = self;
        let job = Job { pattern, block_size, depth, connections, length, unit: self.unit() };
        load::run(&job, uri, size, lab.nbd_cli())
    }
}

fn ours(lab: &Lab<'_>, format: &str, disk: &Path) -> Command {
    let mut command = lab.nbd_cli();
    command.arg("serve").args(["--format", format]).arg(disk).arg("--socket").arg(lab.socket());
    command
}

fn qemu_nbd(lab: &Lab<'_>, settings: &[&str], disk: &Path) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(settings).args(["-f", "qcow2", "-t", "-e", "4", "-k"]);
    command.arg(lab.socket()).arg(disk);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_depth_and_connections() {
        for work in WORKS {
            let suffix = if work.connections == 1 { "" } else { "-c4" };
            let end = format!("-qd{}{suffix}", work.depth);
            assert!(work.name.ends_with(&end), "{}", work.name);
        }
    }
}
