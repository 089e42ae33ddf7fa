//! Object stores: backups beside restic, and an image that is read by its URL beside QEMU's curl
//! driver and nbdkit's.
//!
//! The store is a SeaweedFS on loopback; rows with a time in their name have a proxy before it that
//! holds each reply back for so long. Client CPU is counted, that of the store and the proxy is
//! not. `restic`, QEMU's module and nbdkit's plugin are optional: rows without them have a note.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::bars::Limit;
use super::contest::{Against, Contender, Contest, ContestBar, Measure, OURS};
use super::files_disk::fill_with_files;
use super::group::Group;
use super::image_tools::{fill, timed};
use super::lab::Lab;
use super::object_store::ObjectStore;
use super::options::Options;
use super::sample::Sample;
use super::workload::{Job, Length, Pattern, Unit};
use super::{load, process};

pub(crate) const GROUP: Group = Group { name: "objects", contests, bars, prepare };

/// Milliseconds that the distant store is late.
const FAR: u32 = 25;
/// The disk that is backed up: 2 GiB with at most 742 MiB of files.
const DISK: &str = "disk.img";
const DISK_BYTES: u64 = 2 << 30;
const FILES_BYTES: u64 = 742 << 20;
const FILES: &str = "/usr";
/// The disk of the image that is read.
const PLAIN: &str = "plain.img";
const IMAGE: &str = "disk.qcow2";
const RESTORED: &str = "restored";
/// The data of the store with the backups and the image.
const KEPT: &str = "kept";
/// The data of the store of a block that backs up.
const FRESH: &str = "fresh";
const REPOSITORY: &str = "s3://bucket/repository";
const LOCAL: &str = "image-randread-local";
const CACHED: &str = "image-randread-cached";

/// The name of a row with this delay.
fn row(name: &str, delay: u32) -> String {
    if delay == 0 { name.to_owned() } else { format!("{name}-{delay}ms") }
}

fn bars() -> Vec<ContestBar> {
    let bar =
        |row: String, against, least| ContestBar { row, against, limit: Limit::AtLeast(least) };
    let mut bars = vec![
        bar(row("object-backup", 0), Against::Contender("restic"), 2.5),
        bar(row("object-backup", 0), Against::BestPeerPerCore, 2.0),
        bar(CACHED.to_owned(), Against::OursInRow(LOCAL.to_owned()), 0.8),
    ];
    for delay in [0, FAR] {
        bars.push(bar(row("object-restore", delay), Against::Contender("restic"), 1.0));
        bars.push(bar(row("object-read", delay), Against::BestPeer, 1.5));
    }
    bars
}

fn contests(_: &Options) -> Vec<Contest> {
    let mut contests = Vec::new();
    for delay in [0, FAR] {
        contests.push(contest(
            row("object-backup", delay),
            vec![
                (OURS, Box::new(move |lab| back_up(lab, delay, our_backup))),
                ("restic", Box::new(move |lab| back_up(lab, delay, restic_backup))),
            ],
        ));
        contests.push(contest(
            row("object-restore", delay),
            vec![
                (OURS, Box::new(move |lab| restore(lab, delay, our_restore))),
                ("restic", Box::new(move |lab| restore(lab, delay, restic_restore))),
            ],
        ));
        contests.push(contest(
            row("object-read", delay),
            vec![
                (OURS, Box::new(move |lab| read(lab, delay, our_read))),
                ("qemu-curl", Box::new(move |lab| read(lab, delay, qemu_read))),
                ("nbdkit-curl", Box::new(move |lab| read(lab, delay, nbdkit_read))),
            ],
        ));
    }
    let random = |name: &str, measure: Measure| Contest {
        name: name.to_owned(),
        throughput_unit: "IOPS",
        work_name: "request",
        contenders: vec![Contender { name: OURS, measure }],
    };
    contests.push(random(LOCAL, Box::new(read_local)));
    contests.push(random(CACHED, Box::new(read_cached)));
    contests
}

fn contest(name: String, contenders: Vec<(&'static str, Measure)>) -> Contest {
    let contenders = contenders.into_iter().map(|(name, measure)| Contender { name, measure });
    Contest { name, throughput_unit: "MiB/s", work_name: "MiB", contenders: contenders.collect() }
}

fn prepare(lab: &Lab<'_>) -> Result<()> {
    fill_with_files(&lab.file(DISK), DISK_BYTES, FILES_BYTES, FILES.as_ref())
        .context("cannot write the disk of files")?;
    fill(&lab.file(PLAIN), lab.options.size).context("cannot write the disk")?;
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(lab.file(PLAIN)).arg(lab.file(IMAGE));
    process::run_to_end(&mut convert)?;
    let store = ObjectStore::start(lab, KEPT, 0)?;
    let mut push = lab.nbd_cli();
    push.args(["image", "push", "-q"]).arg(lab.file(IMAGE)).arg(format!("s3://bucket/{IMAGE}"));
    store.allow(lab, &mut push);
    process::run_to_end(&mut push)?;
    our_backup(lab, &store)?;
    // It is optional.
    drop(restic_backup(lab, &store));
    Ok(())
}

/// Starts the store that has the backups and the image.
fn start_kept(lab: &Lab<'_>, delay: u32) -> Result<ObjectStore> {
    let store = ObjectStore::start(lab, KEPT, delay)?;
    store.wait_for(IMAGE)?;
    Ok(store)
}

type Run = fn(&Lab<'_>, &ObjectStore) -> Result<Sample>;

/// Backs up into an empty store.
fn back_up(lab: &Lab<'_>, delay: u32, run: Run) -> Result<Sample> {
    lab.settle(DISK)?;
    let store = ObjectStore::start(lab, FRESH, delay)?;
    let sample = run(lab, &store);
    drop(store);
    fs::remove_dir_all(lab.file(FRESH)).context("cannot remove the data of the store")?;
    sample
}

fn our_backup(lab: &Lab<'_>, store: &ObjectStore) -> Result<Sample> {
    let mut init = lab.nbd_cli();
    store.allow(lab, init.args(["repo", "init", REPOSITORY]));
    process::run_to_end(&mut init)?;
    let mut command = lab.nbd_cli();
    command.args(["backup", "-q", "--name", "vm"]).arg(lab.file(DISK)).arg(REPOSITORY);
    store.allow(lab, &mut command);
    timed(&mut command, DISK_BYTES)
}

fn restic(lab: &Lab<'_>, store: &ObjectStore) -> Command {
    let mut command = Command::new("restic");
    command.args(["-q", "-r", &format!("s3:http://{}/bucket/restic", store.address())]);
    store.allow(lab, command.env("RESTIC_PASSWORD", "restic"));
    command
}

fn restic_backup(lab: &Lab<'_>, store: &ObjectStore) -> Result<Sample> {
    process::run_to_end(restic(lab, store).arg("init"))?;
    let mut command = restic(lab, store);
    timed(command.current_dir(lab.directory).args(["backup", DISK]), DISK_BYTES)
}

fn restore(lab: &Lab<'_>, delay: u32, run: Run) -> Result<Sample> {
    let store = start_kept(lab, delay)?;
    drop(fs::remove_dir_all(lab.file(RESTORED)));
    fs::create_dir(lab.file(RESTORED))?;
    let sample = run(lab, &store)?;
    let restored = fs::metadata(lab.file(RESTORED).join(DISK)).context("what was restored")?;
    ensure!(restored.len() == DISK_BYTES, "it has {} bytes", restored.len());
    fs::remove_dir_all(lab.file(RESTORED))?;
    Ok(sample)
}

fn our_restore(lab: &Lab<'_>, store: &ObjectStore) -> Result<Sample> {
    let mut command = lab.nbd_cli();
    command.args(["restore", "-q", &format!("backup:{REPOSITORY}/vm")]);
    command.arg(lab.file(RESTORED).join(DISK));
    store.allow(lab, &mut command);
    timed(&mut command, DISK_BYTES)
}

fn restic_restore(lab: &Lab<'_>, store: &ObjectStore) -> Result<Sample> {
    let mut command = restic(lab, store);
    command.args(["restore", "latest", "--target"]).arg(lab.file(RESTORED));
    // Restic leaves zeroes out since 0.15.
    let help = Command::new("restic").args(["restore", "--help"]).output()?;
    if String::from_utf8_lossy(&help.stdout).contains("--sparse") {
        command.arg("--sparse");
    }
    timed(&mut command, DISK_BYTES)
}

/// Reads the whole image by its URL.
fn read(lab: &Lab<'_>, delay: u32, run: Run) -> Result<Sample> {
    run(lab, &start_kept(lab, delay)?)
}

fn url(store: &ObjectStore) -> String {
    format!("http://{}/bucket/{IMAGE}", store.address())
}

fn our_read(lab: &Lab<'_>, store: &ObjectStore) -> Result<Sample> {
    let mut command = lab.nbd_cli();
    store.allow(lab, command.args(["copy", "-q", &url(store), "null:"]));
    timed(&mut command, lab.options.size)
}

/// Converts into nothing.
const INTO_NOTHING: &str = "driver=raw,file.driver=null-co,file.size=";

fn qemu_read(lab: &Lab<'_>, store: &ObjectStore) -> Result<Sample> {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-n", "-W", "-m", "16", "-f", "qcow2", "--target-image-opts"]);
    command.arg(url(store)).arg(format!("{INTO_NOTHING}{}", lab.options.size));
    timed(&mut command, lab.options.size)
}

fn nbdkit_read(lab: &Lab<'_>, store: &ObjectStore) -> Result<Sample> {
    let mut command = Command::new("nbdkit");
    let plugin = std::env::var("NBDKIT_CURL_PLUGIN").unwrap_or_else(|_| "curl".to_owned());
    let target = format!("{INTO_NOTHING}{}", lab.options.size);
    let client = "qemu-img convert -n -W -m 16 -f qcow2 --target-image-opts \"$uri\"";
    command.args(["-U", "-", "-r", &plugin, &format!("url={}", url(store))]);
    command.args(["--run", &format!("{client} {target}")]);
    timed(&mut command, lab.options.size)
}

fn server(lab: &Lab<'_>, source: &std::ffi::OsStr) -> Command {
    let mut command = lab.nbd_cli();
    command.args(["serve", "--read-only", "--socket"]).arg(lab.socket()).arg(source);
    command
}

fn random_reads(lab: &Lab<'_>, server: Command) -> Result<Sample> {
    let job = Job {
        pattern: Pattern::RandomRead,
        block_size: 4 << 10,
        depth: 16,
        connections: 1,
        length: Length::Seconds(lab.options.seconds),
        unit: Unit::Requests,
    };
    let fill = |uri: &str| {
        let mut copy = lab.nbd_cli();
        process::run_to_end(copy.args(["copy", "-q", uri, "null:"])).map(drop)
    };
    lab.serve_and_run_after(server, fill, |uri| {
        load::run(&job, uri, lab.options.size, lab.nbd_cli())
    })
}

fn read_local(lab: &Lab<'_>) -> Result<Sample> {
    lab.settle(IMAGE)?;
    random_reads(lab, server(lab, lab.file(IMAGE).as_os_str()))
}

fn read_cached(lab: &Lab<'_>) -> Result<Sample> {
    let store = start_kept(lab, 0)?;
    let mut command = server(lab, url(&store).as_ref());
    store.allow(lab, &mut command);
    random_reads(lab, command)
}
