//! The clients: programs that verify what they write, run again and again, and one of ours.

use std::fmt::Write as _;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{PATIENCE, QUARTER, Relay};
use crate::soak::blocks::{Blocks, Step};
use crate::soak::random::Random;
use crate::soak::served::{self, Ended};
use crate::soak::wire::Wire;

/// A client that runs longer is considered hung.
const LONGEST_RUN: Duration = Duration::from_secs(300);

/// What clients say of data that is not what they wrote.
const WRONG_DATA: &[&str] =
    &["verify failed", "bad header", "bad magic", "verification failed", "ARE NOT"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Fio,
    QemuIo,
    Bench,
}

impl Kind {
    pub(super) const ALL: [Self; 3] = [Self::Fio, Self::QemuIo, Self::Bench];
}

/// A program in its part of a disk.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) kind: Kind,
    pub(super) disk: &'static str,
    /// Where its part begins, in bytes.
    pub(super) first: u64,
    pub(super) over_tcp: bool,
}

impl Client {
    pub(super) fn run_until_over(&self, relay: &Relay<'_>, mut random: Random) -> Result<()> {
        let outcome = self.run_again_and_again(relay, &mut random);
        relay.has_failed.fetch_or(outcome.is_err(), Ordering::SeqCst);
        outcome
    }

    fn run_again_and_again(&self, relay: &Relay<'_>, random: &mut Random) -> Result<()> {
        let said = relay.path(&format!("{}-{:?}.txt", self.disk, self.kind));
        while !relay.is_over.load(Ordering::SeqCst) {
            let cuts = relay.cuts.load(Ordering::SeqCst);
            let ended = served::run(&mut self.command(relay, random), &said, LONGEST_RUN)?;
            let has_wrong_data = WRONG_DATA.iter().any(|words| ended.said.contains(words));
            if ended.is_success() && !has_wrong_data {
                relay.tally.runs.fetch_add(1, Ordering::SeqCst);
                continue;
            }
            // bench makes lost connections again, but fails if it cannot make its first one. The
            // other clients end when they are cut.
            let gave_up = ended.said.contains("could not be made again");
            let is_persistent =
                self.kind == Kind::Bench && (gave_up || !ended.said.contains("connect"));
            let is_excused = !is_persistent && ended.status.is_some() && !has_wrong_data;
            if !(is_excused && relay.were_cut_since(cuts)) {
                let Ended { status, said } = ended;
                bail!("{self:?}: {status:?}: {said}");
            }
        }
        Ok(())
    }

    fn command(&self, relay: &Relay<'_>, random: &mut Random) -> Command {
        let uri = relay.uri(self.disk, self.over_tcp);
        let seed = random.below(1 << 31).to_string();
        let mut command;
        match self.kind {
            Kind::Fio => {
                command = Command::new("fio");
                command.current_dir(relay.round.directory);
                command.args(["--name=verified", "--ioengine=nbd", "--rw=randwrite", "--bs=4k"]);
                command.args(["--iodepth=8", "--fsync=64", "--verify=crc32c", "--do_verify=1"]);
                command.args([
                    "--verify_fatal=1",
                    "--verify_state_save=0",
                    "--output-format=terse",
                ]);
                command.arg(format!("--randseed={seed}")).arg(format!("--uri={uri}"));
                command.arg(format!("--offset={}", self.first)).arg(format!("--size={QUARTER}"));
            }
            Kind::QemuIo => {
                command = Command::new("qemu-io");
                command.args(["-f", "raw"]);
                for line in self.qemu_io_script(random) {
                    command.args(["-c", &line]);
                }
                command.arg(uri);
            }
            Kind::Bench => {
                command = Command::new(&relay.round.programs.cli);
                command.args(["bench", "--verify", "--destroy-data", "-w", "mixed", "-q"]);
                command.args(["--depth", "8", "--flush-every", "50", "--duration", "2s"]);
                command.args(["--connections", "2", "--seed", &seed]);
                command.args(["--range", &format!("{}+{QUARTER}", self.first)]);
                if !relay.has_kills {
                    command.args(["--reconnect", "0"]);
                }
                command.arg(uri);
            }
        }
        command
    }

    /// Writes that are read again, some of them later.
    fn qemu_io_script(&self, random: &mut Random) -> Vec<String> {
        const SLOT: u64 = 64 << 10;
        let mut lines = Vec::new();
        let mut patterns = vec![None; (QUARTER / SLOT) as usize];
        for _ in 0..100 {
            let slot = random.below(QUARTER / SLOT);
            let place = self.first + slot * SLOT;
            let mut line = String::new();
            let known: &mut Option<u64> = &mut patterns[slot as usize];
            let _ = match (random.below(8), *known) {
                (0, _) => write!(line, "flush"),
                (1, _) => {
                    *known = Some(0);
                    write!(line, "write -z {place} {SLOT}")
                }
                (2..=4, Some(pattern)) => write!(line, "read -P {pattern} {place} {SLOT}"),
                _ => {
                    let pattern = random.below(255) + 1;
                    *known = Some(pattern);
                    write!(line, "write -P {pattern} {place} {SLOT}")
                }
            };
            lines.push(line);
        }
        for (slot, pattern) in patterns.iter().enumerate() {
            let place = self.first + slot as u64 * SLOT;
            lines.extend(pattern.map(|pattern| format!("read -P {pattern} {place} {SLOT}")));
        }
        lines
    }
}

/// Writes until it is over, on one connection as long as no kill ends it.
pub(super) fn write(
    relay: &Relay<'_>,
    disk: &str,
    part: &mut Blocks,
    mut random: Random,
) -> Result<()> {
    let outcome = write_on(relay, disk, part, &mut random);
    relay.has_failed.fetch_or(outcome.is_err(), Ordering::SeqCst);
    outcome.with_context(|| format!("a client of {disk}"))
}

fn write_on(relay: &Relay<'_>, disk: &str, part: &mut Blocks, random: &mut Random) -> Result<()> {
    loop {
        let cuts = relay.cuts.load(Ordering::SeqCst);
        match write_until_cut(relay, disk, part, random) {
            Err(error) if !(error.is::<std::io::Error>() && relay.were_cut_since(cuts)) => {
                return Err(error);
            }
            Err(_) => {}
            Ok(()) => return Ok(()),
        }
    }
}

fn write_until_cut(
    relay: &Relay<'_>,
    disk: &str,
    part: &mut Blocks,
    random: &mut Random,
) -> Result<()> {
    let mut wire = connect(relay, disk)?;
    part.check(&mut wire)?;
    while !relay.is_over.load(Ordering::SeqCst) {
        if let Step::Refused(error) = part.step(&mut wire, random)? {
            bail!("a request is answered with error {error}");
        }
    }
    part.flush(&mut wire)?;
    part.check(&mut wire)
}

/// Connects; after a kill another server may have to start first.
fn connect(relay: &Relay<'_>, disk: &str) -> Result<Wire> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Wire::connect(&relay.path("socket"), disk) {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
            connected => return connected,
        }
    }
}
