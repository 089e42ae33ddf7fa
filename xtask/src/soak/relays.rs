//! Servers of several disks take over from each other below the clients of others, which verify
//! what they write, over unix sockets and TCP.

mod clients;

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use self::clients::{Client, Kind};
use super::blocks::{BLOCK, Blocks};
use super::judge::{Judge, Round};
use super::kills::dirty_parts;
use super::random::Random;
use super::served::{Served, check_image, output_of};
use super::wire::Wire;

/// Size of a disk, in bytes. Each kind of client has a quarter of it.
const SIZE: u64 = 32 << 20;
const QUARTER: u64 = SIZE / 4;
const DISKS: [&str; 2] = ["raw", "qcow2"];
const BITMAP: &str = "changes";

/// Time for a server to go on.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Relays {
    /// Whether servers are killed in the middle of takeovers.
    pub(super) has_kills: bool,
}

impl Judge for Relays {
    fn name(&self) -> &'static str {
        if self.has_kills { "relays-killed" } else { "relays" }
    }

    fn description(&self) -> &'static str {
        if self.has_kills {
            "takeovers below fio, qemu-io and bench, and kills of either side"
        } else {
            "takeovers below fio, qemu-io and bench, none of which may notice"
        }
    }

    fn unit(&self) -> &'static str {
        "takeovers"
    }

    fn round(&self, round: &Round<'_>) -> Result<u64> {
        let mut random = Random::new(round.seed);
        let relay = Relay::make(round, self.has_kills, &mut random)?;
        let server = relay.start(false)?;
        let mut clients = Vec::new();
        for (disk, name) in DISKS.into_iter().enumerate() {
            for (quarter, kind) in Kind::ALL.into_iter().enumerate() {
                let first = quarter as u64 * QUARTER;
                let over_tcp = (disk + quarter) % 2 == 0;
                clients.push(Client { kind, disk: name, first, over_tcp });
            }
        }
        let mut parts = DISKS.map(|_| Blocks::new(3 * QUARTER / BLOCK, QUARTER / BLOCK, true));
        let server = relay.under_load(server, &clients, &mut parts, &mut random)?;
        relay.check(&mut parts)?;
        server.end()?;
        check_image(&relay.path("qcow2.disk"))?;
        relay.tally.print(self.name(), round.takeovers);
        Ok(round.takeovers)
    }
}

/// What happened.
#[derive(Debug, Default)]
struct Tally {
    taken_over: AtomicU64,
    successors_killed: AtomicU64,
    went_on: AtomicU64,
    predecessors_killed: AtomicU64,
    completed: AtomicU64,
    runs: AtomicU64,
}

impl Tally {
    fn print(&self, judge: &str, takeovers: u64) {
        let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        println!(
            "soak: {judge}: {takeovers} takeovers: {} undisturbed; {} successors killed, {} times the \
             old server went on; {} old servers killed, {} times the new one served; {} runs of \
             clients verified",
            count(&self.taken_over),
            count(&self.successors_killed),
            count(&self.went_on),
            count(&self.predecessors_killed),
            count(&self.completed),
            count(&self.runs),
        );
    }
}

/// Servers of the disks, one after the other.
struct Relay<'a> {
    round: &'a Round<'a>,
    has_kills: bool,
    port: u16,
    is_over: AtomicBool,
    has_failed: AtomicBool,
    /// Kills that may have cut clients.
    cuts: AtomicU64,
    /// Held from a kill until it is known whether clients were cut.
    killing: Mutex<()>,
    tally: Tally,
}

impl<'a> Relay<'a> {
    fn make(round: &'a Round<'a>, has_kills: bool, random: &mut Random) -> Result<Self> {
        // Free now, and most likely when the server listens.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let relay = Self {
            round,
            has_kills,
            port,
            is_over: AtomicBool::new(false),
            has_failed: AtomicBool::new(false),
            cuts: AtomicU64::new(0),
            killing: Mutex::new(()),
            tally: Tally::default(),
        };
        File::create(relay.path("raw.disk"))?.set_len(SIZE)?;
        let image = relay.path("qcow2.disk");
        let options = *random.choose(&[
            "cluster_size=65536",
            "cluster_size=4096",
            "cluster_size=16384,extended_l2=on,lazy_refcounts=on",
        ]);
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o", options]).arg(&image);
        output_of(create.arg(SIZE.to_string()))?;
        let mut add = Command::new(&round.programs.cli);
        output_of(add.args(["bitmap", "add"]).arg(&image).arg(BITMAP))?;
        let durability = *random.choose(&["process", "power"]);
        let cache = *random.choose(&["writeback", "none"]);
        let [control, socket, raw, qcow2] =
            ["control", "socket", "raw.disk", "qcow2.disk"].map(|name| relay.path(name));
        let config = format!(
            "control = {control:?}\nsocket = {socket:?}\nlisten = \"127.0.0.1:{port}\"\n\
             [[export]]\nname = \"raw\"\nsource = {raw:?}\nformat = \"raw\"\n\
             [[export]]\nname = \"qcow2\"\nsource = {qcow2:?}\nformat = \"qcow2\"\n\
             bitmap = \"{BITMAP}\"\nbitmap-durability = \"{durability}\"\ncache = \"{cache}\"\n"
        );
        fs::write(relay.path("server.toml"), config)?;
        Ok(relay)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.round.directory.join(name)
    }

    fn uri(&self, disk: &str, over_tcp: bool) -> String {
        match over_tcp {
            true => format!("nbd://127.0.0.1:{}/{disk}", self.port),
            false => format!("nbd+unix:///{disk}?socket={}", self.path("socket").display()),
        }
    }

    fn command(&self, takes_over: bool) -> Command {
        let mut command = Command::new(&self.round.programs.cli);
        command.arg("serve").arg("--config").arg(self.path("server.toml"));
        if takes_over {
            command.arg("--takeover").arg(self.path("control"));
        }
        command
    }

    fn start(&self, takes_over: bool) -> Result<Served> {
        Served::start(&mut self.command(takes_over), self.round.directory, &self.path("socket"))
    }

    fn under_load(
        &self,
        mut server: Served,
        clients: &[Client],
        parts: &mut [Blocks],
        random: &mut Random,
    ) -> Result<Served> {
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for client in clients {
                let random = random.fork();
                threads.push(scope.spawn(move || client.run_until_over(self, random)));
            }
            for (part, disk) in parts.iter_mut().zip(DISKS) {
                let random = random.fork();
                threads.push(scope.spawn(move || clients::write(self, disk, part, random)));
            }
            let outcome: Result<()> = (0..self.round.takeovers).try_for_each(|_| {
                thread::sleep(Duration::from_micros(random.below(50_000)));
                if self.has_failed.load(Ordering::SeqCst) {
                    return Ok(());
                }
                let next = match self.has_kills && random.one_in(3) {
                    true => self.kill_one(&mut server, random)?,
                    false => Some(self.take_over(&mut server)?),
                };
                if let Some(next) = next {
                    server = next;
                }
                Ok(())
            });
            self.is_over.store(true, Ordering::SeqCst);
            // First: after a failed takeover there may be no server, and then the clients fail too.
            outcome?;
            for thread in threads {
                let ended = thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
                ended.context("below takeovers")?;
            }
            Ok(server)
        })
    }

    fn take_over(&self, server: &mut Served) -> Result<Served> {
        let next = self.start(true)?;
        server.ended()?;
        self.tally.taken_over.fetch_add(1, Ordering::SeqCst);
        Ok(next)
    }

    /// Kills one of the two servers at a random moment of a takeover. Returns the server that then
    /// serves, or None if the old one goes on.
    fn kill_one(&self, server: &mut Served, random: &mut Random) -> Result<Option<Served>> {
        let mut successor = Served::spawn(&mut self.command(true), self.round.directory)?;
        thread::sleep(Duration::from_micros(random.below(250_000)));
        let killing = self.killing.lock().unwrap_or_else(PoisonError::into_inner);
        let serves = if random.one_in(2) {
            successor.kill();
            self.tally.successors_killed.fetch_add(1, Ordering::SeqCst);
            let goes_on = self.goes_on(server)?;
            self.tally.went_on.fetch_add(goes_on.into(), Ordering::SeqCst);
            if goes_on {
                // No client was to notice.
                return Ok(None);
            }
            None
        } else {
            server.kill();
            self.tally.predecessors_killed.fetch_add(1, Ordering::SeqCst);
            successor.has_started(&self.path("socket"))?.then_some(successor)
        };
        self.tally.completed.fetch_add(serves.is_some().into(), Ordering::SeqCst);
        let serves = serves.map_or_else(|| self.start(false), Ok)?;
        self.cuts.fetch_add(1, Ordering::SeqCst);
        drop(killing);
        Ok(Some(serves))
    }

    /// Whether the old server serves after its successor was killed; otherwise the successor was
    /// ready, and the old one ends.
    fn goes_on(&self, server: &mut Served) -> Result<bool> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if server.has_ended()? {
                return Ok(false);
            }
            if Wire::connect(&self.path("socket"), DISKS[0]).is_ok() {
                return Ok(true);
            }
            thread::sleep(Duration::from_millis(5));
        }
        bail!("the old server neither goes on nor ends: {}", server.complaints())
    }

    /// Whether clients were cut since `cuts` of them.
    fn were_cut_since(&self, cuts: u64) -> bool {
        drop(self.killing.lock().unwrap_or_else(PoisonError::into_inner));
        self.cuts.load(Ordering::SeqCst) != cuts
    }

    /// Reads everything: what this program wrote is there, and whatever is not zero is dirty.
    fn check(&self, parts: &mut [Blocks]) -> Result<()> {
        for (part, disk) in parts.iter_mut().zip(DISKS) {
            let mut wire = Wire::connect(&self.path("socket"), disk)?;
            part.check(&mut wire).with_context(|| format!("{disk}, after the takeovers"))?;
        }
        let context = format!("qemu:dirty-bitmap:{BITMAP}");
        let mut map = Command::new(&self.round.programs.cli);
        map.args(["map", "--json", "--context", &context, &self.uri("qcow2", false)]);
        let dirty = dirty_parts(&output_of(&mut map)?)?;
        let mut is_dirty = vec![false; (SIZE / BLOCK) as usize];
        for (offset, length) in dirty {
            let end = (offset + length).div_ceil(BLOCK);
            is_dirty[(offset / BLOCK) as usize..end as usize].fill(true);
        }
        if let Some(block) = parts[1].changed().find(|block| !is_dirty[*block as usize]) {
            bail!("block {block} was written and is not dirty");
        }
        let mut wire = Wire::connect(&self.path("socket"), "qcow2")?;
        for offset in (0..SIZE).step_by(1 << 20) {
            let bytes = wire.read(offset, 1 << 20)?;
            for (index, content) in bytes.chunks_exact(BLOCK as usize).enumerate() {
                let block = offset / BLOCK + index as u64;
                if content.iter().any(|byte| *byte != 0) && !is_dirty[block as usize] {
                    bail!("block {block} is not zero and not dirty");
                }
            }
        }
        Ok(())
    }
}
