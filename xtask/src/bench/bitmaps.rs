//! What dirty bitmaps cost that survive a crash.
//!
//! 4 KiB random writes, 16 in flight, into an image all of whose clusters are allocated: without a bitmap,
//! with one that notes changes at each level, and qemu-nbd with an enabled persistent bitmap,
//! which a crash makes unusable. The disk fits into the hot extents of the activity log (1200 of
//! 4 MiB), and every block begins with all of them cold.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::bars::Limit;
use super::contest::{Against, Contender, Contest, ContestBar, OURS};
use super::data::DataFile;
use super::fio::{Job, Length};
use super::group::{Group, Lab};
use super::options::Options;
use super::rows::{Pattern, Unit};
use super::{fio, process};
use crate::command::output_of;

pub(crate) const GROUP: Group = Group { name: "bitmaps", contests, bars, prepare };

const PLAIN: &str = "plain.qcow2";
const TRACKED: &str = "tracked.qcow2";
const RAW: &str = "source.img";
/// Ours without a bitmap.
const OURS_PLAIN: &str = "ours-no-bitmap";
const PROCESS: &str = "bitmap-process-randwrite-4k-qd16";
const POWER: &str = "bitmap-power-randwrite-4k-qd16";

fn contests(_: &Options) -> Vec<Contest> {
    [(PROCESS, "process"), (POWER, "power")]
        .into_iter()
        .map(|(name, level)| Contest {
            name: name.to_owned(),
            throughput_unit: Unit::Requests.suffix(),
            work_name: "request",
            contenders: vec![
                contender(OURS, TRACKED, move |lab, disk| ours(lab, level, disk)),
                contender(OURS_PLAIN, PLAIN, move |lab, disk| ours(lab, level, disk)),
                contender("qemu-nbd", TRACKED, |lab, disk| qemu_nbd(lab, &[], disk)),
                contender("qemu-nbd-io-uring", TRACKED, |lab, disk| {
                    qemu_nbd(lab, &["--cache=writeback", "--aio=io_uring"], disk)
                }),
            ],
        })
        .collect()
}

fn bars() -> Vec<ContestBar> {
    let bar = |row: &str, against, least| ContestBar {
        row: row.to_owned(),
        against,
        limit: Limit::AtLeast(least),
    };
    vec![
        bar(PROCESS, Against::Contender(OURS_PLAIN), 0.95),
        bar(PROCESS, Against::BestPeer, 1.0),
        bar(POWER, Against::Contender(OURS_PLAIN), 0.8),
        bar(POWER, Against::BestPeer, 1.0),
    ]
}

fn prepare(lab: &Lab<'_>) -> Result<()> {
    let options = lab.options;
    DataFile::create(lab.file(RAW), options.size, options.page_cache)?;
    for image in [PLAIN, TRACKED] {
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]);
        convert.arg(lab.file(RAW)).arg(lab.file(image));
        process::run_to_end(&mut convert).map(drop)?;
    }
    fs::remove_file(lab.file(RAW))?;
    let mut add = Command::new("qemu-img");
    add.args(["bitmap", "--add"]).arg(lab.file(TRACKED)).arg("backup");
    output_of(&mut add)?;
    for image in [PLAIN, TRACKED] {
        lab.settle(image)?;
        let file = fs::File::open(lab.file(image))?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        DataFile::existing(lab.file(image), options.page_cache).settle_and_warm()?;
    }
    Ok(())
}

fn contender(
    name: &'static str,
    image: &'static str,
    server: impl Fn(&Lab<'_>, &Path) -> Command + 'static,
) -> Contender {
    let measure = move |lab: &Lab<'_>| {
        let disk = lab.file(image);
        clear(&disk, image)?;
        lab.settle(image)?;
        let job = Job {
            pattern: Pattern::RandomWrite,
            block_size: 4 << 10,
            depth: 16,
            connections: 1,
            length: Length::Seconds(lab.options.seconds),
            unit: Unit::Requests,
        };
        lab.serve_and_run(server(lab, &disk), |uri| fio::run(&job, uri, lab.options.size))
    };
    Contender { name, measure: Box::new(measure) }
}

/// Makes a new bitmap, whatever the last server has left of the old one: servers are killed.
fn clear(disk: &PathBuf, image: &str) -> Result<()> {
    if image != TRACKED {
        return Ok(());
    }
    for what in ["--remove", "--add"] {
        output_of(Command::new("qemu-img").args(["bitmap", what]).arg(disk).arg("backup"))?;
    }
    Ok(())
}

fn ours(lab: &Lab<'_>, level: &str, disk: &Path) -> Command {
    let mut command = lab.nbd_cli();
    command.args(["serve", "--format", "qcow2", "--bitmap-durability", level]);
    command.arg(disk).arg("--socket").arg(lab.socket());
    command
}

fn qemu_nbd(lab: &Lab<'_>, settings: &[&str], disk: &Path) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(settings).args(["-f", "qcow2", "-t", "-e", "4", "-k"]);
    command.arg(lab.socket()).arg(disk);
    command
}
