//! Reads and writes that bypass the page cache, and writes that are durable.
//!
//! `direct`: servers with `--cache none`, beside qemu-nbd's `none` with both kinds of asynchronous
//! I/O. Nothing of the files is in the page cache. `durable`: writes with FUA, and with a FLUSH
//! after every 16, through the page cache and with `--cache none`, beside qemu-nbd with and without
//! the page cache. Rows in place go to a file without holes, rows that allocate get a fresh image
//! for each block. The floor serves the same file, but for rows that allocate the raw one, with one
//! thread and one ring, and knows no other requests than these.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::bars::Limit;
use super::contest::{Against, Contender, Contest, ContestBar, FLOOR, OURS};
use super::data::DataFile;
use super::group::Group;
use super::lab::Lab;
use super::load::{self, Durable};
use super::options::Options;
use super::process;
use super::workload::{Job, Length, Pattern, Unit};
use crate::command::output_of;

pub(crate) const DIRECT: Group =
    Group { name: "direct", contests: direct_contests, bars: direct_bars, prepare };
pub(crate) const DURABLE: Group =
    Group { name: "durable", contests: durable_contests, bars: durable_bars, prepare };

const RAW: &str = "full.img";
const FULL: &str = "full.qcow2";
const FRESH: &str = "fresh.qcow2";
const EMPTY_BYTES: u64 = 64 << 30;
/// Number of writes of one block into the empty image. They are few because they may go to the disk
/// one by one.
const EMPTY_WRITES: u64 = 4096;

/// Our server's options and the peers'.
const OURS_NONE: &[&str] = &["--cache", "none"];
const PEERS_NONE: [(&str, &[&str]); 2] = [
    ("qemu-nbd-io-uring", &["--cache=none", "--aio=io_uring"]),
    ("qemu-nbd-native", &["--cache=none", "--aio=native"]),
];
const PEERS_DURABLE: [(&str, &[&str]); 4] = [
    ("qemu-nbd", &["--cache=writeback"]),
    ("qemu-nbd-io-uring", &["--cache=writeback", "--aio=io_uring"]),
    ("qemu-nbd-direct", &["--cache=none", "--aio=io_uring"]),
    ("qemu-nbd-direct-native", &["--cache=none", "--aio=native"]),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Disk {
    Raw,
    Qcow2,
    /// An image without data.
    Empty,
}

#[derive(Debug, Clone, Copy)]
struct Work {
    disk: Disk,
    pattern: Pattern,
    depth: u32,
    durable: Durable,
    /// Our server bypasses the page cache.
    is_uncached: bool,
}

fn direct_works() -> impl Iterator<Item = Work> {
    let kinds = [
        (Disk::Raw, Pattern::RandomRead),
        (Disk::Raw, Pattern::RandomWrite),
        (Disk::Qcow2, Pattern::RandomRead),
        (Disk::Qcow2, Pattern::RandomWrite),
        (Disk::Empty, Pattern::RandomWrite),
    ];
    kinds.into_iter().flat_map(|(disk, pattern)| {
        let (durable, is_uncached) = (Durable::No, true);
        [1, 16, 64].map(|depth| Work { disk, pattern, depth, durable, is_uncached })
    })
}

fn durable_works() -> impl Iterator<Item = Work> {
    let disks = [Disk::Raw, Disk::Qcow2, Disk::Empty];
    let disks = [false, true].into_iter().flat_map(move |none| disks.map(|disk| (disk, none)));
    disks.flat_map(|(disk, is_uncached)| {
        [Durable::Fua, Durable::FlushEvery(16)].map(|durable| Work {
            disk,
            pattern: Pattern::RandomWrite,
            depth: 16,
            durable,
            is_uncached,
        })
    })
}

fn direct_contests(_: &Options) -> Vec<Contest> {
    direct_works().map(|work| work.contest(OURS_NONE, &PEERS_NONE)).collect()
}

fn durable_contests(_: &Options) -> Vec<Contest> {
    let ours = |work: Work| if work.is_uncached { OURS_NONE } else { &[] };
    durable_works().map(|work| work.contest(ours(work), &PEERS_DURABLE)).collect()
}

fn direct_bars() -> Vec<ContestBar> {
    direct_works()
        .flat_map(|work| {
            let (least, least_work) = match (work.disk, work.pattern) {
                _ if work.depth == 1 => (1.1, 2.0),
                (Disk::Raw, _) => (1.5, 2.0),
                (Disk::Qcow2, Pattern::RandomRead) => (3.5, 3.3),
                (Disk::Qcow2, _) => (2.0, 2.0),
                (Disk::Empty, _) => (3.0, 2.0),
            };
            work.bars(least, least_work)
        })
        .collect()
}

fn durable_bars() -> Vec<ContestBar> {
    durable_works().flat_map(|work| work.bars(1.2, 1.43)).collect()
}

fn prepare(lab: &Lab<'_>) -> Result<()> {
    DataFile::create(lab.file(RAW), lab.options.size, lab.options.page_cache)?;
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]);
    convert.arg(lab.file(RAW)).arg(lab.file(FULL));
    process::run_to_end(&mut convert).map(drop)
}

impl Work {
    fn is_direct(self) -> bool {
        self.durable == Durable::No
    }

    fn name(self) -> String {
        let group = if self.is_direct() { "direct" } else { "durable" };
        let what = match (self.disk, self.pattern) {
            (Disk::Raw, Pattern::RandomRead) => "raw-randread",
            (Disk::Raw, _) => "raw-randwrite",
            (Disk::Qcow2, Pattern::RandomRead) => "qcow2-randread",
            (Disk::Qcow2, _) => "qcow2-randwrite",
            (Disk::Empty, _) => "qcow2-allocate",
        };
        let durable = match self.durable {
            Durable::No => String::new(),
            Durable::Fua => "-fua".to_owned(),
            Durable::FlushEvery(writes) => format!("-flush{writes}"),
        };
        let cache = if self.is_uncached && !self.is_direct() { "-none" } else { "" };
        format!("{group}{cache}-{what}{durable}-4k-qd{}", self.depth)
    }

    /// The least throughput and the least work per CPU time, relative to the best peer.
    fn bars(self, throughput: f64, work: f64) -> [ContestBar; 2] {
        let bar =
            |against, least| ContestBar { row: self.name(), against, limit: Limit::AtLeast(least) };
        [bar(Against::BestPeerUpToFloor, throughput), bar(Against::BestPeerPerCoreUpToFloor, work)]
    }

    fn contest(
        self,
        settings: &'static [&'static str],
        peers: &[(&'static str, &'static [&'static str])],
    ) -> Contest {
        let mut contenders =
            vec![self.contender(OURS, move |lab, format, disk| ours(lab, settings, format, disk))];
        contenders.extend(peers.iter().map(|&(name, settings)| {
            self.contender(name, move |lab, format, disk| qemu_nbd(lab, settings, format, disk))
        }));
        // It allocates nothing.
        let disk = if self.disk == Disk::Empty { Disk::Raw } else { self.disk };
        contenders.push(Self { disk, ..self }.contender(FLOOR, floor));
        Contest {
            name: self.name(),
            throughput_unit: Unit::Requests.suffix(),
            work_name: "request",
            contenders,
        }
    }

    fn contender(
        self,
        name: &'static str,
        server: impl Fn(&Lab<'_>, &str, &Path) -> Command + 'static,
    ) -> Contender {
        let measure = move |lab: &Lab<'_>| {
            let disk = self.disk(lab)?;
            let format = if self.disk == Disk::Raw { "raw" } else { "qcow2" };
            lab.serve_and_run(server(lab, format, &disk), |uri| {
                load::run_durable(&self.job(lab), self.durable, uri, self.size(lab), lab.nbd_cli())
            })
        };
        Contender { name, measure: Box::new(measure) }
    }

    fn size(self, lab: &Lab<'_>) -> u64 {
        if self.disk == Disk::Empty { EMPTY_BYTES } else { lab.options.size }
    }

    fn job(self, lab: &Lab<'_>) -> Job {
        let length = match self.disk {
            Disk::Empty => Length::Requests(EMPTY_WRITES),
            _ => Length::Seconds(lab.options.seconds),
        };
        let Self { pattern, depth, .. } = self;
        let unit = Unit::Requests;
        Job { pattern, block_size: 4 << 10, depth, connections: 1, length, unit }
    }

    /// The file for one block.
    fn disk(self, lab: &Lab<'_>) -> Result<PathBuf> {
        let name = match self.disk {
            Disk::Raw => RAW,
            Disk::Qcow2 => FULL,
            Disk::Empty => {
                drop(fs::remove_file(lab.file(FRESH)));
                let mut create = Command::new("qemu-img");
                create.args(["create", "-q", "-f", "qcow2"]).arg(lab.file(FRESH));
                output_of(create.arg(EMPTY_BYTES.to_string()))?;
                return Ok(lab.file(FRESH));
            }
        };
        match self.is_direct() {
            true => lab.settle_uncached(name)?,
            // Peers that bypass the page cache make it lose what they write.
            false => lab.settle_before_change(name)?,
        }
        Ok(lab.file(name))
    }
}

fn ours(lab: &Lab<'_>, settings: &[&str], format: &str, disk: &Path) -> Command {
    let mut command = lab.nbd_cli();
    command.arg("serve").args(settings).args(["--format", format]).arg(disk);
    command.arg("--socket").arg(lab.socket());
    command
}

fn floor(lab: &Lab<'_>, format: &str, disk: &Path) -> Command {
    let mut command = Command::new(lab.target_directory.join("dist").join("floor"));
    command.arg("--socket").arg(lab.socket());
    let source = if format == "raw" { "--direct" } else { "--direct-qcow2" };
    command.arg("--size").arg(lab.options.size.to_string()).arg(source).arg(disk);
    command
}

fn qemu_nbd(lab: &Lab<'_>, settings: &[&str], format: &str, disk: &Path) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(settings).args(["-f", format, "-t", "-e", "4", "-k"]);
    command.arg(lab.socket()).arg(disk);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_say_what_is_done_how_durable_and_at_which_depth() {
        let names: Vec<String> = direct_works().chain(durable_works()).map(Work::name).collect();
        assert_eq!(names.len(), 27, "{names:?}");
        for name in [
            "direct-raw-randwrite-4k-qd64",
            "durable-qcow2-allocate-flush16-4k-qd16",
            "durable-none-raw-randwrite-fua-4k-qd16",
        ] {
            assert!(names.iter().any(|other| other == name), "{names:?}");
        }
    }
}
