//! Servers take over from each other while clients write, and some are killed during the takeover.

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::blocks::{BLOCK, Blocks, Step};
use super::judge::{Judge, Round};
use super::kills::{Disk, SIZE, check_bits, write};
use super::random::Random;
use super::served::{Served, check_image};
use super::wire::Wire;

#[derive(Debug)]
pub(super) struct Takeovers;

impl Judge for Takeovers {
    fn name(&self) -> &'static str {
        "takeovers"
    }

    fn description(&self) -> &'static str {
        "servers take over from each other while clients write, and one is killed as it does"
    }

    fn unit(&self) -> &'static str {
        "takeovers"
    }

    fn round(&self, round: &Round<'_>) -> Result<u64> {
        let mut random = Random::new(round.seed);
        let disk = Disk::make(round, &mut random)?;
        let control = round.directory.join("control");
        let clients = random.below(4) + 1;
        let share = SIZE / BLOCK / clients;
        let mut parts: Vec<Blocks> =
            (0..clients).map(|client| Blocks::new(client * share, share, true)).collect();
        let relay = Relay { disk, control };
        let server = relay.start(false)?;
        let server = relay.take_over_under_load(server, &mut parts, &mut random)?;
        check_bits(&relay.disk, &parts).context("after the takeovers")?;
        relay.kill_one_of_two(server, &mut parts, &mut random)?;
        let server = relay.start(false)?;
        for part in &mut parts {
            let mut wire = Wire::connect(&relay.disk.socket, "")?;
            part.check(&mut wire).context("after a kill")?;
        }
        check_bits(&relay.disk, &parts).context("after a kill")?;
        server.end()?;
        check_image(&relay.disk.image)?;
        Ok(round.takeovers + 1)
    }
}

/// Servers of one disk, one after the other.
struct Relay<'a> {
    disk: Disk<'a>,
    control: PathBuf,
}

impl Relay<'_> {
    fn command(&self, takes_over: bool) -> Command {
        let mut command = self.disk.command();
        command.arg("--control").arg(&self.control);
        if takes_over {
            command.arg("--takeover").arg(&self.control);
        }
        command
    }

    fn start(&self, takes_over: bool) -> Result<Served> {
        let (directory, socket) = (self.disk.round.directory, &self.disk.socket);
        Served::start(&mut self.command(takes_over), directory, socket)
    }

    /// The clients keep their connections across all takeovers.
    fn take_over_under_load(
        &self,
        mut server: Served,
        parts: &mut [Blocks],
        random: &mut Random,
    ) -> Result<Served> {
        let is_over = AtomicBool::new(false);
        let wires = parts.iter().map(|_| Wire::connect(&self.disk.socket, ""));
        let wires = wires.collect::<Result<Vec<_>>>()?;
        thread::scope(|scope| {
            let mut clients = Vec::new();
            for (part, mut wire) in parts.iter_mut().zip(wires) {
                let (mut random, is_over) = (random.fork(), &is_over);
                clients.push(scope.spawn(move || {
                    while !is_over.load(Ordering::SeqCst) {
                        if let Step::Refused(error) = part.step(&mut wire, &mut random)? {
                            bail!("a request is answered with error {error}");
                        }
                    }
                    // Data that was read counts as durable from then on.
                    part.flush(&mut wire)?;
                    part.check(&mut wire)
                }));
            }
            let relayed: Result<()> = (0..self.disk.round.takeovers).try_for_each(|_| {
                thread::sleep(Duration::from_micros(random.below(50_000)));
                let next = self.start(true)?;
                std::mem::replace(&mut server, next).ended()
            });
            is_over.store(true, Ordering::SeqCst);
            // First: after a failed takeover there may be no server, and then the clients fail too.
            relayed?;
            for client in clients {
                let ended = client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
                ended.context("below takeovers")?;
            }
            Ok(server)
        })
    }

    /// Kills one of the two servers at a random moment of a takeover, and the other soon
    /// afterwards.
    fn kill_one_of_two(
        &self,
        mut server: Served,
        parts: &mut [Blocks],
        random: &mut Random,
    ) -> Result<()> {
        let is_killed = AtomicBool::new(false);
        thread::scope(|scope| {
            let mut clients = Vec::new();
            for part in parts {
                let (mut random, is_killed) = (random.fork(), &is_killed);
                let socket = &self.disk.socket;
                clients.push(scope.spawn(move || write(socket, part, &mut random, is_killed)));
            }
            thread::sleep(Duration::from_micros(random.below(100_000)));
            let mut command = self.command(true);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let mut successor =
                command.process_group(0).spawn().context("cannot start a successor")?;
            thread::sleep(Duration::from_micros(random.below(200_000)));
            is_killed.store(true, Ordering::SeqCst);
            let is_successor_first = random.one_in(2);
            let moment = Duration::from_micros(random.below(200_000));
            if is_successor_first {
                successor.kill()?;
                thread::sleep(moment);
                server.kill();
            } else {
                server.kill();
                thread::sleep(moment);
                successor.kill()?;
            }
            successor.wait()?;
            for client in clients {
                client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
            }
            Ok(())
        })
    }
}
