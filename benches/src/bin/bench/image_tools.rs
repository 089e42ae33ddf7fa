//! `nbd-cli image` beside `qemu-img`: converting and checking.
//!
//! Both write into the page cache and do not wait for the disk. The files of a block are removed
//! right after it, so that the next block does not pay for their writeback.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::bars::Limit;
use super::contest::{Against, Contender, Contest, ContestBar, OURS};
use super::data::XorShift;
use super::group::Group;
use super::lab::Lab;
use super::options::Options;
use super::process;
use super::sample::Sample;
use super::workload::ClientResult;

pub(crate) const GROUP: Group = Group { name: "image-tools", contests, bars, prepare };

const MEBIBYTE: f64 = 1_048_576.0;
/// Disk size of the image that is checked.
const CHECKED_BYTES: u64 = 1 << 40;
const CHECKED: &str = "mapped.qcow2";
const TARGET: &str = "target.img";
const LARGE: Disk = Disk { raw: "large.img", qcow2: "large.qcow2" };
const SMALL: Disk = Disk { raw: "small.img", qcow2: "small.qcow2" };
/// Compressed rows use a disk that is smaller by this factor, because they are that much slower.
const SMALLER: u64 = 8;
/// The disks repeat random bytes, text and a hole, each of this many bytes.
const STRETCH_BYTES: usize = 1 << 20;

/// The same disk in both formats.
#[derive(Debug)]
struct Disk {
    raw: &'static str,
    qcow2: &'static str,
}

#[derive(Debug)]
struct Conversion {
    name: &'static str,
    from: &'static str,
    to: &'static str,
    /// The compression of the target.
    compression: Option<&'static str>,
}

const CONVERSIONS: &[Conversion] = &[
    plain("convert-raw-qcow2", "raw", "qcow2"),
    plain("convert-qcow2-raw", "qcow2", "raw"),
    plain("convert-qcow2-qcow2", "qcow2", "qcow2"),
    compressed("convert-raw-qcow2-zlib", "zlib"),
    compressed("convert-raw-qcow2-zstd", "zstd"),
];

const CHECK: &str = "check-1t";

const fn plain(name: &'static str, from: &'static str, to: &'static str) -> Conversion {
    Conversion { name, from, to, compression: None }
}

const fn compressed(name: &'static str, compression: &'static str) -> Conversion {
    Conversion { name, from: "raw", to: "qcow2", compression: Some(compression) }
}

fn bars() -> Vec<ContestBar> {
    let names = CONVERSIONS.iter().map(|conversion| conversion.name).chain([CHECK]);
    names
        .map(|name| ContestBar {
            row: name.to_owned(),
            against: Against::BestPeer,
            limit: Limit::AtLeast(1.0),
        })
        .collect()
}

fn contests(_: &Options) -> Vec<Contest> {
    let mut contests: Vec<Contest> = CONVERSIONS.iter().map(Conversion::contest).collect();
    contests.push(contest(
        CHECK,
        |lab| check(lab.nbd_cli().args(["image", "check"]), lab),
        |lab| check(Command::new("qemu-img").args(["check", "-f", "qcow2"]), lab),
    ));
    contests
}

fn contest(
    name: &str,
    ours: impl Fn(&Lab<'_>) -> Result<Sample> + 'static,
    qemu_img: impl Fn(&Lab<'_>) -> Result<Sample> + 'static,
) -> Contest {
    Contest {
        name: name.to_owned(),
        throughput_unit: "MiB/s",
        work_name: "MiB",
        contenders: vec![
            Contender { name: OURS, measure: Box::new(ours) },
            Contender { name: "qemu-img", measure: Box::new(qemu_img) },
        ],
    }
}

fn prepare(lab: &Lab<'_>) -> Result<()> {
    for (disk, size) in [(&LARGE, lab.options.size), (&SMALL, lab.options.size / SMALLER)] {
        fill(&lab.file(disk.raw), size).with_context(|| format!("cannot write {}", disk.raw))?;
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", "qcow2"]);
        command.arg(lab.file(disk.raw)).arg(lab.file(disk.qcow2));
        process::run_to_end(&mut command)?;
    }
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"]);
    command.arg(lab.file(CHECKED)).arg(CHECKED_BYTES.to_string());
    process::run_to_end(&mut command).map(drop)
}

/// Writes a sparse disk of `size` bytes.
pub(crate) fn fill(path: &Path, size: u64) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let mut random = XorShift::new();
    let mut buffer = vec![0; STRETCH_BYTES];
    let stretches = size / STRETCH_BYTES as u64;
    for stretch in 0..stretches {
        match stretch % 4 {
            0 | 1 => random.fill(&mut buffer),
            2 => {
                let text: String =
                    (0..).map(|n: u64| format!("{:016x} ", n * stretch)).take(65536).collect();
                buffer.copy_from_slice(&text.as_bytes()[..STRETCH_BYTES]);
            }
            _ => {
                file.seek(SeekFrom::Current(STRETCH_BYTES as i64))?;
                continue;
            }
        }
        file.write_all(&buffer)?;
    }
    file.set_len(size)?;
    file.sync_all()
}

fn check(command: &mut Command, lab: &Lab<'_>) -> Result<Sample> {
    lab.settle(CHECKED)?;
    timed(command.arg(lab.file(CHECKED)), CHECKED_BYTES)
}

/// Runs a tool over a disk of `size` bytes.
pub(crate) fn timed(command: &mut Command, size: u64) -> Result<Sample> {
    let (elapsed, usage) = process::run_to_end(command)?;
    Ok(Sample::new(ClientResult::timed(size as f64 / MEBIBYTE, elapsed), usage))
}

impl Conversion {
    fn contest(&'static self) -> Contest {
        contest(self.name, |lab| self.ours(lab), |lab| self.qemu_img(lab))
    }

    fn ours(&self, lab: &Lab<'_>) -> Result<Sample> {
        let mut command = lab.nbd_cli();
        command.args(["image", "convert", "--quiet", "--format", self.from]);
        command.args(["--output-format", self.to]);
        if let Some(compression) = self.compression {
            command.args(["--compress", "--compression-type", compression]);
        }
        self.run(command, lab)
    }

    fn qemu_img(&self, lab: &Lab<'_>) -> Result<Sample> {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-m", "16", "-W", "-f", self.from, "-O", self.to]);
        if let Some(compression) = self.compression {
            command.arg("-c").args(["-o", &format!("compression_type={compression}")]);
        }
        self.run(command, lab)
    }

    fn run(&self, mut command: Command, lab: &Lab<'_>) -> Result<Sample> {
        let disk = if self.compression.is_some() { &SMALL } else { &LARGE };
        let source = if self.from == "raw" { disk.raw } else { disk.qcow2 };
        lab.settle(source)?;
        let size = fs::metadata(lab.file(disk.raw)).context("the source")?.len();
        let target = lab.file(TARGET);
        drop(fs::remove_file(&target));
        let result = timed(command.arg(lab.file(source)).arg(&target), size);
        drop(fs::remove_file(&target));
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_has_data_text_and_holes() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("disk.img");
        fill(&path, 4 << 20).expect("written");
        let bytes = fs::read(&path).expect("readable");
        assert_eq!(bytes.len(), 4 << 20);
        assert!(bytes[2 << 20..3 << 20].iter().all(u8::is_ascii));
        assert!(!bytes[..2 << 20].iter().all(u8::is_ascii));
        assert!(bytes[3 << 20..].iter().all(|&byte| byte == 0));
    }
}
