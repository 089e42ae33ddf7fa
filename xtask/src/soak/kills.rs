//! The server is killed while clients write: nothing flushed is lost, no dirty bit is missed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::blocks::{BLOCK, Blocks, Step};
use super::judge::{Judge, Round};
use super::random::Random;
use super::served::{Served, check_image, output_of};
use super::wire::Wire;

/// Size of the disk, in bytes.
pub(super) const SIZE: u64 = 24 << 20;
const KILLS: u64 = 4;
/// The name of the dirty bitmap.
const BITMAP: &str = "changes";

#[derive(Debug)]
pub(super) struct Kills;

impl Judge for Kills {
    fn name(&self) -> &'static str {
        "kills"
    }

    fn description(&self) -> &'static str {
        "serve is killed while clients write: flushed data and dirty bits survive"
    }

    fn unit(&self) -> &'static str {
        "kills"
    }

    fn round(&self, round: &Round<'_>) -> Result<u64> {
        let mut random = Random::new(round.seed);
        let disk = Disk::make(round, &mut random)?;
        let clients = random.below(4) + 1;
        let share = SIZE / BLOCK / clients;
        let mut parts: Vec<Blocks> =
            (0..clients).map(|client| Blocks::new(client * share, share, true)).collect();
        for _ in 0..KILLS {
            let server = disk.serve()?;
            for part in &mut parts {
                part.check(&mut Wire::connect(&disk.socket, "")?).context("after a kill")?;
            }
            check_bits(&disk, &parts)?;
            kill_while_written(server, &disk.socket, &mut parts, &mut random)?;
            check_image(&disk.image)?;
        }
        let server = disk.serve()?;
        for part in &mut parts {
            part.check(&mut Wire::connect(&disk.socket, "")?).context("after the last kill")?;
        }
        check_bits(&disk, &parts)?;
        server.end()?;
        check_image(&disk.image)?;
        Ok(KILLS)
    }
}

/// An image with a dirty bitmap.
pub(super) struct Disk<'a> {
    pub(super) round: &'a Round<'a>,
    pub(super) image: PathBuf,
    pub(super) socket: PathBuf,
    durability: &'static str,
}

impl<'a> Disk<'a> {
    pub(super) fn make(round: &'a Round<'a>, random: &mut Random) -> Result<Self> {
        let image = round.directory.join("disk.qcow2");
        let options = *random.choose(&[
            "cluster_size=65536",
            "cluster_size=4096",
            "cluster_size=512",
            "cluster_size=65536,extended_l2=on",
            "cluster_size=16384,extended_l2=on,lazy_refcounts=on",
            "cluster_size=65536,preallocation=metadata",
            "cluster_size=4096,refcount_bits=1",
        ]);
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o", options]).arg(&image);
        output_of(create.arg(SIZE.to_string()))?;
        let mut add = Command::new(&round.programs.cli);
        output_of(add.args(["bitmap", "add"]).arg(&image).arg(BITMAP))?;
        let durability = *random.choose(&["process", "power"]);
        Ok(Self { round, image, socket: round.directory.join("socket"), durability })
    }

    /// The server, to which options can be added.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(&self.round.programs.cli);
        command
            .args(["serve", "--format", "qcow2", "--bitmap", BITMAP])
            .args(["--bitmap-durability", self.durability, "--socket"])
            .arg(&self.socket)
            .arg(&self.image);
        command
    }

    fn serve(&self) -> Result<Served> {
        Served::start(&mut self.command(), self.round.directory, &self.socket)
    }
}

/// Lets every client write for a moment, and kills the server in the meantime.
pub(super) fn kill_while_written(
    mut server: Served,
    socket: &Path,
    parts: &mut [Blocks],
    random: &mut Random,
) -> Result<()> {
    let moment = Duration::from_micros(random.below(400_000) + 1);
    let is_killed = AtomicBool::new(false);
    thread::scope(|scope| {
        let clients: Vec<_> = parts
            .iter_mut()
            .map(|part| {
                let mut random = random.fork();
                let is_killed = &is_killed;
                scope.spawn(move || write(socket, part, &mut random, is_killed))
            })
            .collect();
        thread::sleep(moment);
        is_killed.store(true, Ordering::SeqCst);
        server.kill();
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(())
    })
}

/// Writes until the server has ended, which is an error unless it was killed.
pub(super) fn write(
    socket: &Path,
    part: &mut Blocks,
    random: &mut Random,
    is_killed: &AtomicBool,
) -> Result<()> {
    let connected = Wire::connect(socket, "");
    let mut outcome = connected.and_then(|mut wire| {
        loop {
            if let Step::Refused(error) = part.step(&mut wire, random)? {
                bail!("a request is answered with error {error}");
            }
        }
    });
    if is_killed.load(Ordering::SeqCst) {
        outcome = outcome.or_else(|error| {
            if error.is::<std::io::Error>() || format!("{error:#}").contains("connect") {
                return Ok(());
            }
            Err(error)
        });
    }
    outcome
}

/// Checks that every written block is dirty.
pub(super) fn check_bits(disk: &Disk<'_>, parts: &[Blocks]) -> Result<()> {
    let uri = format!("nbd+unix:///?socket={}", disk.socket.display());
    let context = format!("qemu:dirty-bitmap:{BITMAP}");
    let mut map = Command::new(&disk.round.programs.cli);
    let map = output_of(map.args(["map", "--json", "--context", &context, &uri]))?;
    let dirty = dirty_parts(&map)?;
    for block in parts.iter().flat_map(Blocks::changed) {
        let offset = block * BLOCK;
        let covering = dirty.partition_point(|(start, _)| *start <= offset).checked_sub(1);
        if covering.is_none_or(|index| offset >= dirty[index].0 + dirty[index].1) {
            bail!("block {block} was written and is not dirty");
        }
    }
    Ok(())
}

/// The dirty parts of a map in JSON: offset and length, in order.
pub(super) fn dirty_parts(map: &str) -> Result<Vec<(u64, u64)>> {
    let extents: Value = serde_json::from_str(map).context("the map is not JSON")?;
    let extents = extents.as_array().context("the map is not a list")?;
    let mut parts = Vec::new();
    for extent in extents {
        let number = |name: &str| extent.get(name).and_then(Value::as_u64);
        let (offset, length) = (number("offset"), number("length"));
        let (offset, length) = offset.zip(length).context("an extent has no offset or length")?;
        if number("type") == Some(1) {
            parts.push((offset, length));
        }
    }
    Ok(parts)
}
