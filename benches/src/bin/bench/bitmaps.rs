//! The cost of dirty bitmaps that survive a crash.
//!
//! 4 KiB random writes, 16 in flight, into an image all of whose clusters are allocated: without a
//! bitmap, with one that records changes at each level, and qemu-nbd with an enabled persistent
//! bitmap, which a crash makes unusable. All write the same file, because the kernel's treatment of
//! two files would differ by more than the measured effect. The disk fits into the hot extents of
//! the activity log (1200 of 4 MiB), and every block begins with all of them cold.

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

pub(crate) const GROUP: Group = Group { name: "bitmaps", contests, bars, prepare };

const DISK: &str = "disk.qcow2";
const BITMAP: &str = "backup";
const RAW: &str = "source.img";
/// Ours without a bitmap.
const OURS_PLAIN: &str = "ours-no-bitmap";
const PROCESS: &str = "bitmap-process-randwrite-4k-qd16";
const POWER: &str = "bitmap-power-randwrite-4k-qd16";

/// The state of the image when the server starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bitmap {
    None,
    Enabled,
}

fn contests(_: &Options) -> Vec<Contest> {
    [(PROCESS, "process"), (POWER, "power")]
        .into_iter()
        .map(|(name, level)| Contest {
            name: name.to_owned(),
            throughput_unit: Unit::Requests.suffix(),
            work_name: "request",
            contenders: vec![
                contender(OURS, Bitmap::Enabled, move |lab, disk| ours(lab, level, disk)),
                contender(OURS_PLAIN, Bitmap::None, move |lab, disk| ours(lab, level, disk)),
                contender("qemu-nbd", Bitmap::Enabled, |lab, disk| qemu_nbd(lab, &[], disk)),
                contender("qemu-nbd-io-uring", Bitmap::Enabled, |lab, disk| {
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
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]);
    convert.arg(lab.file(RAW)).arg(lab.file(DISK));
    process::run_to_end(&mut convert).map(drop)?;
    fs::remove_file(lab.file(RAW))?;
    provide(&lab.file(DISK), Bitmap::Enabled)
}

fn contender(
    name: &'static str,
    bitmap: Bitmap,
    server: impl Fn(&Lab<'_>, &Path) -> Command + 'static,
) -> Contender {
    let measure = move |lab: &Lab<'_>| {
        let disk = lab.file(DISK);
        provide(&disk, bitmap)?;
        lab.settle(DISK)?;
        let job = Job {
            pattern: Pattern::RandomWrite,
            block_size: 4 << 10,
            depth: 16,
            connections: 1,
            length: Length::Seconds(lab.options.seconds),
            unit: Unit::Requests,
        };
        lab.serve_and_run(server(lab, &disk), |uri| {
            load::run(&job, uri, lab.options.size, lab.nbd_cli())
        })
    };
    Contender { name, measure: Box::new(measure) }
}

/// Removes the bitmap, in whatever state the last server left it (servers are killed). Then creates
/// a new one if the row needs one.
fn provide(disk: &Path, bitmap: Bitmap) -> Result<()> {
    let change =
        |what| output_of(Command::new("qemu-img").args(["bitmap", what]).arg(disk).arg(BITMAP));
    let description = output_of(Command::new("qemu-img").arg("info").arg(disk))?;
    if description.contains(&format!("name: {BITMAP}\n")) {
        change("--remove")?;
    }
    if bitmap == Bitmap::Enabled {
        change("--add")?;
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
