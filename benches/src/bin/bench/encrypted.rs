//! Encrypted disks beside qemu-nbd: a LUKS volume, and a qcow2 image with LUKS. Both are made by
//! qemu-img, and all of their clusters are allocated; AES-256 in the mode XTS, sectors of 512
//! bytes.

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

pub(crate) const GROUP: Group = Group { name: "encrypted", contests, bars, prepare };

const RAW: &str = "plain.img";
const KEY: &str = "key";
const SMALL_BYTES: u64 = 4 << 10;
const LARGE_BYTES: u64 = 256 << 10;

/// How a disk is encrypted.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// A LUKS volume.
    Luks,
    Qcow2,
}

#[derive(Debug, Clone, Copy)]
struct Work {
    kind: Kind,
    pattern: Pattern,
    depth: u32,
}

fn works() -> impl Iterator<Item = Work> {
    let patterns = [
        (Pattern::RandomRead, 1),
        (Pattern::RandomRead, 16),
        (Pattern::RandomWrite, 1),
        (Pattern::RandomWrite, 16),
        (Pattern::SequentialRead, 4),
        (Pattern::SequentialWrite, 4),
    ];
    [Kind::Luks, Kind::Qcow2]
        .into_iter()
        .flat_map(move |kind| patterns.map(|(pattern, depth)| Work { kind, pattern, depth }))
}

fn contests(_: &Options) -> Vec<Contest> {
    works().map(Work::contest).collect()
}

/// Twice as fast as qemu-nbd, with half of the CPU time.
fn bars() -> Vec<ContestBar> {
    let bar =
        |work: Work, against| ContestBar { row: work.name(), against, limit: Limit::AtLeast(2.0) };
    works()
        .flat_map(|work| [bar(work, Against::BestPeer), bar(work, Against::BestPeerPerCore)])
        .collect()
}

fn prepare(lab: &Lab<'_>) -> Result<()> {
    DataFile::create(lab.file(RAW), lab.options.size, lab.options.page_cache)?;
    fs::write(lab.file(KEY), "a passphrase of the benchmark")?;
    for kind in [Kind::Luks, Kind::Qcow2] {
        // Trying the passphrase is not measured.
        let (format, options) = match kind {
            Kind::Luks => ("luks", "key-secret=s,iter-time=10"),
            Kind::Qcow2 => {
                ("qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10")
            }
        };
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "--object", &secret(lab), "-f", "raw", "-O", format]);
        convert.args(["-o", options]).arg(lab.file(RAW)).arg(lab.file(kind.file()));
        process::run_to_end(&mut convert)?;
    }
    Ok(fs::remove_file(lab.file(RAW))?)
}

fn secret(lab: &Lab<'_>) -> String {
    format!("secret,id=s,file={}", lab.file(KEY).display())
}

impl Kind {
    fn file(self) -> &'static str {
        match self {
            Self::Luks => "disk.luks",
            Self::Qcow2 => "disk.qcow2",
        }
    }

    /// The options with which QEMU opens it.
    fn driver(self, disk: &Path) -> String {
        let driver = match self {
            Self::Luks => "driver=luks,key-secret=s",
            Self::Qcow2 => "driver=qcow2,encrypt.key-secret=s",
        };
        format!("{driver},file.filename={}", disk.display())
    }
}

impl Work {
    fn block_size(self) -> u64 {
        match self.pattern {
            Pattern::RandomRead | Pattern::RandomWrite => SMALL_BYTES,
            Pattern::SequentialRead | Pattern::SequentialWrite => LARGE_BYTES,
        }
    }

    fn name(self) -> String {
        let kind = match self.kind {
            Kind::Luks => "luks",
            Kind::Qcow2 => "qcow2",
        };
        let what = match self.pattern {
            Pattern::RandomRead => "randread-4k",
            Pattern::RandomWrite => "randwrite-4k",
            Pattern::SequentialRead => "read-256k",
            Pattern::SequentialWrite => "write-256k",
        };
        format!("encrypted-{kind}-{what}-qd{}", self.depth)
    }

    fn unit(self) -> Unit {
        if self.block_size() == SMALL_BYTES { Unit::Requests } else { Unit::Mebibytes }
    }

    fn contest(self) -> Contest {
        let best: &[&str] = &["--cache=writeback", "--aio=io_uring"];
        let contenders = vec![
            self.contender(OURS, move |lab| ours(lab, self.kind)),
            self.contender("qemu-nbd", move |lab| qemu_nbd(lab, &[], self.kind)),
            self.contender("qemu-nbd-io-uring", move |lab| qemu_nbd(lab, best, self.kind)),
        ];
        Contest {
            name: self.name(),
            throughput_unit: self.unit().suffix(),
            work_name: "request",
            contenders,
        }
    }

    fn contender(
        self,
        name: &'static str,
        server: impl Fn(&Lab<'_>) -> Command + 'static,
    ) -> Contender {
        let measure = move |lab: &Lab<'_>| {
            lab.settle(self.kind.file())?;
            lab.serve_and_run(server(lab), |uri| {
                let Self { pattern, depth, .. } = self;
                let (unit, length) = (self.unit(), Length::Seconds(lab.options.seconds));
                let block_size = self.block_size();
                let job = Job { pattern, block_size, depth, connections: 1, length, unit };
                load::run(&job, uri, lab.options.size, lab.nbd_cli())
            })
        };
        Contender { name, measure: Box::new(measure) }
    }
}

fn ours(lab: &Lab<'_>, kind: Kind) -> Command {
    let format = match kind {
        Kind::Luks => "luks",
        Kind::Qcow2 => "qcow2",
    };
    let mut command = lab.nbd_cli();
    command.arg("serve").args(["--format", format, "--key-file"]).arg(lab.file(KEY));
    command.arg(lab.file(kind.file())).arg("--socket").arg(lab.socket());
    command
}

fn qemu_nbd(lab: &Lab<'_>, settings: &[&str], kind: Kind) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(settings).args(["--object", &secret(lab), "-t", "-e", "4", "-k"]);
    command.arg(lab.socket());
    command.args(["--image-opts", &kind.driver(&lab.file(kind.file()))]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_say_what_is_encrypted_what_is_done_and_at_which_depth() {
        let names: Vec<String> = works().map(Work::name).collect();
        assert_eq!(names.len(), 12, "{names:?}");
        for name in ["encrypted-luks-randread-4k-qd16", "encrypted-qcow2-write-256k-qd4"] {
            assert!(names.iter().any(|other| other == name), "{names:?}");
        }
    }
}
