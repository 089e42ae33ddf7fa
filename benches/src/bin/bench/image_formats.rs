//! `nbd-cli` beside `qemu-img` with images of every format: converting between each pair, and the
//! first byte of sparse disks of 1 TiB.
//!
//! As in [`super::image_tools`], both write into the page cache. The floor moves the bytes of the
//! disk from one file into another one, without a format, and leaves holes out: where it is not as
//! fast as the bar wants us to be, the kernel's copies take that time.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};

use super::bars::Limit;
use super::contest::{Against, Contender, Contest, ContestBar, FLOOR, OURS};
use super::group::Group;
use super::image_tools::{self, timed};
use super::lab::Lab;
use super::options::Options;
use super::process;
use super::sample::Sample;
use super::workload::ClientResult;

pub(crate) const GROUP: Group = Group { name: "image-formats", contests, bars, prepare };

/// As both programs name them.
const FORMATS: [&str; 6] = ["raw", "qcow2", "vmdk", "vpc", "vhdx", "vdi"];
/// Our least throughput, as a multiple of qemu-img's: both ends are local.
const LEAST: f64 = 1.5;
/// The disk is smaller than those of other groups by this factor: there are many pairs.
const SMALLER: u64 = 8;
const TARGET: &str = "target.img";

/// Formats of the sparse disks.
const SPARSE: [&str; 2] = ["vmdk", "vhdx"];
const SPARSE_BYTES: u64 = 1 << 40;
/// Of each, one block has data.
const SPARSE_DATA: &str = "write -P 7 512G 1M";
/// At least so many commands in a second have read their first byte: 50 ms for each.
const FIRST_BYTES_MIN: f64 = 20.0;

/// A conversion from one format into another.
#[derive(Clone, Copy, Debug)]
struct Pair {
    from: &'static str,
    to: &'static str,
}

fn pairs() -> impl Iterator<Item = Pair> {
    FORMATS.into_iter().flat_map(|from| FORMATS.map(|to| Pair { from, to }))
}

fn bars() -> Vec<ContestBar> {
    let conversions = pairs().map(|pair| ContestBar {
        row: pair.row(),
        against: Against::BestPeerUpToFloor,
        limit: Limit::AtLeast(LEAST),
    });
    let first_bytes = SPARSE.into_iter().map(|format| ContestBar {
        row: first_byte_row(format),
        against: Against::Nothing,
        limit: Limit::AtLeast(FIRST_BYTES_MIN),
    });
    conversions.chain(first_bytes).collect()
}

fn contests(_: &Options) -> Vec<Contest> {
    let conversions = pairs().map(|pair| Contest {
        name: pair.row(),
        throughput_unit: "MiB/s",
        work_name: "MiB",
        contenders: vec![
            Contender { name: OURS, measure: Box::new(move |lab| pair.ours(lab)) },
            Contender { name: "qemu-img", measure: Box::new(move |lab| pair.qemu_img(lab)) },
            Contender { name: FLOOR, measure: Box::new(floor) },
        ],
    });
    conversions.chain(SPARSE.into_iter().map(first_byte)).collect()
}

fn prepare(lab: &Lab<'_>) -> Result<()> {
    let raw = lab.file(&file_of("raw"));
    image_tools::fill(&raw, lab.options.size / SMALLER).context("cannot write the disk")?;
    for format in FORMATS.into_iter().filter(|format| *format != "raw") {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", format]);
        process::run_to_end(command.arg(&raw).arg(lab.file(&file_of(format))))?;
    }
    for format in SPARSE {
        let path = lab.file(&sparse_file_of(format));
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", format]).arg(&path).arg(SPARSE_BYTES.to_string());
        process::run_to_end(&mut command)?;
        let mut command = Command::new("qemu-io");
        process::run_to_end(command.args(["-f", format, "-c", SPARSE_DATA]).arg(&path))?;
    }
    Ok(())
}

fn file_of(format: &str) -> String {
    format!("disk.{format}")
}

fn sparse_file_of(format: &str) -> String {
    format!("sparse.{format}")
}

fn first_byte_row(format: &str) -> String {
    format!("first-byte-1t-{format}")
}

/// Reads one sector of a large disk, in a process that does nothing else.
fn first_byte(format: &'static str) -> Contest {
    let measure = move |mut command: Command, lab: &Lab<'_>| {
        let (source, target) = (lab.file(&sparse_file_of(format)), lab.file(TARGET));
        drop(fs::remove_file(&target));
        command.args(["dd", "-f", format, "-O", "raw", "bs=512", "count=1"]);
        command.arg(format!("if={}", source.display()));
        command.arg(format!("of={}", target.display()));
        let (elapsed, usage) = process::run_to_end(&mut command)?;
        Ok(Sample::new(ClientResult::timed(1.0, elapsed), usage))
    };
    let ours = move |lab: &Lab<'_>| {
        let mut command = lab.nbd_cli();
        command.arg("qemu-img");
        measure(command, lab)
    };
    let qemu_img = move |lab: &Lab<'_>| measure(Command::new("qemu-img"), lab);
    Contest {
        name: first_byte_row(format),
        throughput_unit: "commands/s",
        work_name: "command",
        contenders: vec![
            Contender { name: OURS, measure: Box::new(ours) },
            Contender { name: "qemu-img", measure: Box::new(qemu_img) },
        ],
    }
}

impl Pair {
    fn row(self) -> String {
        format!("convert-{}-to-{}", self.from, self.to)
    }

    fn ours(self, lab: &Lab<'_>) -> Result<Sample> {
        let mut command = lab.nbd_cli();
        command.args(["image", "convert", "--quiet", "--format", self.from]);
        command.args(["--output-format", self.to]);
        self.run(command, lab)
    }

    fn qemu_img(self, lab: &Lab<'_>) -> Result<Sample> {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-m", "16", "-W", "-f", self.from, "-O", self.to]);
        self.run(command, lab)
    }

    fn run(self, mut command: Command, lab: &Lab<'_>) -> Result<Sample> {
        let source = file_of(self.from);
        command.arg(lab.file(&source));
        convert(command, &source, lab)
    }
}

/// Moves the bytes of the disk.
fn floor(lab: &Lab<'_>) -> Result<Sample> {
    let source = file_of("raw");
    let mut command = Command::new(lab.target_directory.join("dist").join("copy_floor"));
    command.arg("file").arg(lab.file(&source)).arg("file");
    convert(command, &source, lab)
}

/// Runs a command that fills the target, whose name is its last argument.
fn convert(mut command: Command, source: &str, lab: &Lab<'_>) -> Result<Sample> {
    lab.settle(source)?;
    let target = lab.file(TARGET);
    drop(fs::remove_file(&target));
    let result = timed(command.arg(&target), lab.options.size / SMALLER);
    drop(fs::remove_file(&target));
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_formats_has_one_row_and_one_bar() {
        let mut rows: Vec<_> = pairs().map(Pair::row).collect();
        rows.sort_unstable();
        rows.dedup();
        assert_eq!(rows.len(), FORMATS.len() * FORMATS.len());
        assert_eq!(bars().len(), rows.len() + SPARSE.len());
    }
}
