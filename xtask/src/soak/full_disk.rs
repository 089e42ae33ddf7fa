//! The image cannot grow: clients get ENOSPC, old data stays, and writes succeed once there is
//! space.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::blocks::{BLOCK, Blocks, Step};
use super::judge::{Judge, Round};
use super::random::Random;
use super::served::{Served, check_image, output_of};
use super::wire::Wire;

const SIZE: u64 = 16 << 20;
const STEPS: u64 = 400;
/// NBD_ENOSPC, and NBD_EIO of a flush that meets a full disk.
const EXPECTED: [u32; 2] = [28, 5];

#[derive(Debug)]
pub(super) struct FullDisk;

impl Judge for FullDisk {
    fn name(&self) -> &'static str {
        "full-disk"
    }

    fn description(&self) -> &'static str {
        "an image that cannot grow: clients get errors, no data is lost, and writes succeed after space is freed"
    }

    fn unit(&self) -> &'static str {
        "sessions"
    }

    fn round(&self, round: &Round<'_>) -> Result<u64> {
        let mut random = Random::new(round.seed);
        let image = round.directory.join("disk.qcow2");
        let socket = round.directory.join("socket");
        let options = *random.choose(&[
            "cluster_size=65536",
            "cluster_size=4096",
            "cluster_size=512",
            "cluster_size=32768,extended_l2=on",
            "cluster_size=8192,lazy_refcounts=on",
        ]);
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o", options]).arg(&image);
        output_of(create.arg(SIZE.to_string()))?;
        let mut blocks = Blocks::new(0, SIZE / BLOCK, true);
        let mut sessions = 0;
        for is_limited in [true, true, false] {
            let size = std::fs::metadata(&image)?.len();
            // Whole blocks, as on disks: a refused write never changes half of a block.
            let limit = is_limited.then(|| (size / BLOCK + random.below(8192)) * BLOCK);
            let server = serve(round, limit, &image, &socket)?;
            let mut wire = Wire::connect(&socket, "")?;
            blocks.check(&mut wire).context("at the start of a session")?;
            let refused = work(&mut wire, &mut blocks, &mut random)?;
            if !is_limited && refused > 0 {
                bail!("{refused} requests are refused though there is room");
            }
            // Acknowledged writes are present, whether a flush of them succeeds or not.
            blocks.clone().check(&mut wire).context("at the end of a session")?;
            let is_flushed = blocks.flush(&mut wire)? == Step::Done;
            drop(wire);
            end(server, is_flushed)?;
            check_image(&image)?;
            sessions += 1;
        }
        Ok(sessions)
    }
}

fn serve(round: &Round<'_>, limit: Option<u64>, image: &Path, socket: &Path) -> Result<Served> {
    // A limit on the size of files acts as a full disk and needs no privileges.
    let mut command = Command::new("prlimit");
    if let Some(limit) = limit {
        command.arg(format!("--fsize={limit}"));
    }
    command
        .arg(&round.programs.cli)
        .args(["serve", "--format", "qcow2", "--socket"])
        .arg(socket)
        .arg(image);
    Served::start(&mut command, round.directory, socket)
}

fn work(wire: &mut Wire, blocks: &mut Blocks, random: &mut Random) -> Result<u64> {
    let mut refused = 0;
    for _ in 0..STEPS {
        match blocks.step(wire, random)? {
            Step::Done => {}
            Step::Refused(error) if EXPECTED.contains(&error) => refused += 1,
            Step::Refused(error) => bail!("a request is answered with error {error}"),
        }
    }
    Ok(refused)
}

/// A server whose last flush failed may say so by its exit status, but not by a signal.
fn end(server: Served, is_flushed: bool) -> Result<()> {
    match server.end() {
        Err(error) if is_flushed || format!("{error:#}").contains("signal") => Err(error),
        _ => Ok(()),
    }
}
