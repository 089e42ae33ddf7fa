//! Disks whose tables are larger than a server's cache, and long backing chains.
//!
//! Random reads of a qcow2 disk of 16 TiB, whose tables take up 2 GiB: once while the page cache
//! has the tables, and once after they were dropped, so that each read first has to read a table
//! from the disk. The data is in the page cache in both rows. The floor keeps no table: it reads
//! the entry and the data for each request, and nothing else. Peers have their default cache for
//! tables, and the settings that qemu-nbd offers for such a disk.
//!
//! The rows of chains compare reads of one image with reads of the same image on top of 49 others:
//! of data, which the top has, and of ranges that no layer has. The client reads the disk once
//! before, because the depth may cost one look-up for each part.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::bars::Limit;
use super::contest::{Against, Contender, Contest, ContestBar, FLOOR, OURS};
use super::data::DataFile;
use super::group::Group;
use super::huge_image::{self, DATA_START, DISK_BYTES};
use super::lab::Lab;
use super::load;
use super::options::Options;
use super::page_caches::Kept;
use super::workload::{Job, Length, Pattern, Unit};
use crate::command::output_of;

pub(crate) const GROUP: Group = Group { name: "large", contests, bars, prepare };

const HUGE: &str = "huge.qcow2";
const WARM: &str = "large-16t-randread-4k-qd16";
const COLD: &str = "large-16t-cold-tables-randread-4k-qd16";
const RAW: &str = "source.img";
const FULL: &str = "full.qcow2";
/// Layers of a long chain, the top included.
const LAYERS: usize = 50;
/// Each layer of a chain without data has one cluster in the coverage of each L2 table.
const CLUSTER: u64 = 64 << 10;
const TABLE_COVERAGE: u64 = 512 << 20;

/// qemu-nbd's options for its cache of tables, all with io_uring, its fastest mode here. In the
/// largest cache, a miss compares the offset with those of all tables in the cache, so smaller
/// tables would make it slower still.
const QEMU_CACHES: [(&str, &str); 4] = [
    ("qemu-nbd", ""),
    ("qemu-nbd-4k-entries", ",l2-cache-entry-size=4096"),
    ("qemu-nbd-small", ",l2-cache-size=1M,l2-cache-entry-size=4096"),
    ("qemu-nbd-2g-cache", ",l2-cache-size=2G"),
];

/// A row of chains.
#[derive(Debug, Clone, Copy)]
struct ChainRow {
    layers: usize,
    data: bool,
    depth: u32,
}

fn chain_rows() -> impl Iterator<Item = ChainRow> {
    [true, false].into_iter().flat_map(|data| {
        [1, 16].into_iter().flat_map(move |depth| {
            [1, LAYERS].into_iter().map(move |layers| ChainRow { layers, data, depth })
        })
    })
}

fn contests(_: &Options) -> Vec<Contest> {
    let mut contests = vec![huge_contest(WARM, Tables::Cached), huge_contest(COLD, Tables::Cold)];
    contests.extend(chain_rows().map(ChainRow::contest));
    contests
}

fn bars() -> Vec<ContestBar> {
    let bar = |row: &str, against, least| ContestBar {
        row: row.to_owned(),
        against,
        limit: Limit::AtLeast(least),
    };
    let mut bars = vec![
        bar(WARM, Against::BestPeer, 3.0),
        bar(WARM, Against::BestPeerPerCore, 2.0),
        bar(COLD, Against::BestPeer, 1.0),
    ];
    for row in chain_rows().filter(|row| row.layers > 1) {
        // At most 1.3 times the time of a chain of one image.
        let one = ChainRow { layers: 1, ..row }.name();
        bars.push(bar(&row.name(), Against::OursInRow(one.clone()), 0.77));
        bars.push(bar(&row.name(), Against::OursInRowPerCore(one), 0.77));
    }
    bars
}

fn prepare(lab: &Lab<'_>) -> Result<()> {
    let wants = |name: &str| lab.options.wants_row(name);
    if [WARM, COLD].into_iter().any(wants) {
        let path = lab.file(HUGE);
        huge_image::create(&path).with_context(|| path.display().to_string())?;
    }
    if chain_rows().any(|row| wants(&row.name())) {
        prepare_chains(lab)?;
    }
    Ok(())
}

/// What the page cache has of the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tables {
    Cached,
    Cold,
}

fn huge_contest(name: &str, tables: Tables) -> Contest {
    let contender = |name, server: Box<dyn Fn(&Lab<'_>) -> Command>| Contender {
        name,
        measure: Box::new(move |lab: &Lab<'_>| {
            warm_huge(lab, tables)?;
            let job = reads(lab, 16);
            lab.serve_and_run(server(lab), |uri| load::run(&job, uri, DISK_BYTES, lab.nbd_cli()))
        }),
    };
    let mut contenders = vec![contender(OURS, Box::new(|lab| ours(lab, &lab.file(HUGE))))];
    contenders.extend(QEMU_CACHES.map(|(name, cache)| {
        contender(name, Box::new(move |lab| qemu_nbd(lab, &lab.file(HUGE), cache)))
    }));
    contenders.push(contender(FLOOR, Box::new(floor)));
    contest(name, contenders)
}

fn contest(name: &str, contenders: Vec<Contender>) -> Contest {
    let throughput_unit = Unit::Requests.suffix();
    Contest { name: name.to_owned(), throughput_unit, work_name: "request", contenders }
}

/// Reads the data, and the tables if the row wants them cached.
fn warm_huge(lab: &Lab<'_>, tables: Tables) -> Result<()> {
    if tables == Tables::Cached {
        return lab.settle(HUGE);
    }
    let data = DataFile::existing(lab.file(HUGE), lab.options.page_cache);
    data.settle_and_warm_from(DATA_START)?;
    let state = lab.files.add(data.path(), Kept::No)?;
    ensure!(state.cached < 0.5, "the page cache still has {} of the file", state.describe());
    Ok(())
}

impl ChainRow {
    fn name(self) -> String {
        let what = if self.data { "data" } else { "holes" };
        format!("chain-{}-{what}-randread-4k-qd{}", self.layers, self.depth)
    }

    fn contest(self) -> Contest {
        let contender = |name, server: fn(&Lab<'_>, &Path) -> Command| Contender {
            name,
            measure: Box::new(move |lab: &Lab<'_>| {
                let image = self.image(lab)?;
                let job = reads(lab, self.depth);
                let size = lab.options.size;
                let before = read_through(size);
                lab.serve_and_run_after(
                    server(lab, &image),
                    |uri| load::run(&before, uri, size, lab.nbd_cli()).map(drop),
                    |uri| load::run(&job, uri, size, lab.nbd_cli()),
                )
            }),
        };
        let peer = contender("qemu-nbd-io-uring", |lab, image| qemu_nbd(lab, image, ""));
        contest(&self.name(), vec![contender(OURS, ours), peer])
    }

    /// The top of the chain. Rows with data use the same file, so that it is cached in the same way
    /// for all.
    fn image(self, lab: &Lab<'_>) -> Result<PathBuf> {
        let name = if self.data { FULL.to_owned() } else { layer_name(self.layers - 1) };
        if self.data {
            let below = layer(lab, LAYERS - 2);
            let backing = if self.layers == 1 { Path::new("") } else { below.as_path() };
            let mut rebase = Command::new("qemu-img");
            rebase.args(["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b"]);
            output_of(rebase.arg(backing).arg(lab.file(&name)))?;
        }
        lab.settle(&name)?;
        Ok(lab.file(&name))
    }
}

fn layer(lab: &Lab<'_>, number: usize) -> PathBuf {
    lab.file(&layer_name(number))
}

fn layer_name(number: usize) -> String {
    format!("layer-{number}.qcow2")
}

/// A chain without data, but with L2 tables in each layer, and an image that has all data.
fn prepare_chains(lab: &Lab<'_>) -> Result<()> {
    let size = lab.options.size;
    for number in 0..LAYERS {
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2"]);
        if number > 0 {
            create.arg("-b").arg(layer(lab, number - 1)).args(["-F", "qcow2"]);
        }
        output_of(create.arg(layer(lab, number)).arg(size.to_string()))?;
        let mut write = Command::new("qemu-io");
        write.args(["-f", "qcow2"]);
        for table in (0..size).step_by(TABLE_COVERAGE as usize) {
            let offset = table + number as u64 * CLUSTER % (size - table).min(TABLE_COVERAGE);
            write.arg("-c").arg(format!("write {offset} {CLUSTER}"));
        }
        output_of(write.arg(layer(lab, number)))?;
    }
    DataFile::create(lab.file(RAW), size, lab.options.page_cache)?;
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]);
    output_of(convert.arg(lab.file(RAW)).arg(lab.file(FULL)))?;
    Ok(fs::remove_file(lab.file(RAW))?)
}

fn reads(lab: &Lab<'_>, depth: u32) -> Job {
    Job {
        pattern: Pattern::RandomRead,
        block_size: 4 << 10,
        depth,
        connections: 1,
        length: Length::Seconds(lab.options.seconds),
        unit: Unit::Requests,
    }
}

/// One pass over the disk. A server that remembers which layer has each part knows it afterwards.
fn read_through(size: u64) -> Job {
    const BLOCK: u64 = 256 << 10;
    Job {
        pattern: Pattern::SequentialRead,
        block_size: BLOCK,
        depth: 4,
        connections: 1,
        length: Length::Requests(size / BLOCK),
        unit: Unit::Mebibytes,
    }
}

fn ours(lab: &Lab<'_>, image: &Path) -> Command {
    let mut command = lab.nbd_cli();
    command.args(["serve", "--format", "qcow2"]).arg(image).arg("--socket").arg(lab.socket());
    command
}

/// Reads an entry and the data for each request, and keeps no table.
fn floor(lab: &Lab<'_>) -> Command {
    let mut command = Command::new(lab.target_directory.join("dist").join("floor"));
    command.arg("--socket").arg(lab.socket()).arg("--size").arg(DISK_BYTES.to_string());
    command.arg("--qcow2").arg(lab.file(HUGE));
    command
}

/// `cache` in the notation of QEMU's options of an image.
fn qemu_nbd(lab: &Lab<'_>, image: &Path, cache: &str) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(["--aio=io_uring", "-t", "-e", "4", "-k"]).arg(lab.socket());
    command.arg("--image-opts").arg(format!(
        "driver=qcow2,file.driver=file,file.aio=io_uring,file.filename={}{cache}",
        image.display()
    ));
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_long_chain_is_compared_with_a_chain_of_one() {
        let names: Vec<String> = chain_rows().map(ChainRow::name).collect();
        assert_eq!(names.len(), 8, "{names:?}");
        assert!(names.contains(&"chain-50-holes-randread-4k-qd1".to_owned()), "{names:?}");
        assert_eq!(bars().iter().filter(|bar| bar.row.starts_with("chain-50-")).count(), 8);
    }
}
