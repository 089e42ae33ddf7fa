//! Clients of a disk, above which everything happens that a server can go through: it is killed, ended,
//! taken over and reconfigured, and its image is streamed into, resized and given snapshots. Backups by
//! its bitmap are the disk, whatever has happened since the one before.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use super::blocks::{BLOCK, Blocks};
use super::judge::{Judge, Round};
use super::kills::dirty_parts;
use super::random::Random;
use super::served::{Served, check_image, output_of};
use super::stage::{End, Stage};
use super::wire::Wire;

/// Size of the disk at first, in bytes, and of the file below it.
const SIZE: u64 = 12 << 20;
const SIZE_BELOW: u64 = 9 << 20;
const CLIENTS: u64 = 3;
const EVENTS: u64 = 24;
/// The names of the export and of its bitmap.
const EXPORT: &str = "vm";
const BITMAP: &str = "changes";
/// A request, or a stream, that takes longer is considered hung.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug)]
pub(super) struct Sessions;

impl Judge for Sessions {
    fn name(&self) -> &'static str {
        "sessions"
    }

    fn description(&self) -> &'static str {
        "backups, streams, takeovers, kills and resizes of one disk below three clients"
    }

    fn unit(&self) -> &'static str {
        "events"
    }

    fn round(&self, round: &Round<'_>) -> Result<u64> {
        let mut random = Random::new(round.seed);
        let (mut session, mut parts) = Session::make(round, &mut random)?;
        let stage = Stage::new(session.path("socket"), EXPORT);
        let mut server = session.start(false)?;
        let mut history = Vec::new();
        thread::scope(|scope| {
            let clients: Vec<_> = parts
                .iter_mut()
                .map(|part| {
                    let (stage, mut random) = (&stage, random.fork());
                    scope.spawn(move || stage.run(part, &mut random))
                })
                .collect();
            let outcome: Result<()> = (0..EVENTS).try_for_each(|_| {
                if stage.has_failed.load(Ordering::SeqCst) {
                    return Ok(());
                }
                thread::sleep(Duration::from_micros(random.below(80_000)));
                let event = *random.choose(Event::ALL);
                history.push(event);
                session.go_through(event, &mut server, &stage, &mut random)
            });
            stage.is_over.store(true, Ordering::SeqCst);
            let mut ended = Vec::new();
            for client in clients {
                ended.push(client.join().map_err(|_| anyhow!("a client panicked"))?);
            }
            // First: there may be no server, and then the clients fail too.
            outcome?;
            ended.into_iter().collect::<Result<()>>()
        })
        .and_then(|()| session.finish(server, &mut random))
        .with_context(|| format!("after {history:?}"))?;
        Ok(EVENTS)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Backup,
    BackupCutOff,
    Kill,
    Takeover,
    Reload,
    Stream,
    StreamCutOff,
    Restart,
    Map,
}

impl Event {
    /// Each as often as it is to happen.
    const ALL: &'static [Self] = &[
        Self::Backup,
        Self::Backup,
        Self::Backup,
        Self::BackupCutOff,
        Self::Kill,
        Self::Kill,
        Self::Takeover,
        Self::Takeover,
        Self::Reload,
        Self::Stream,
        Self::StreamCutOff,
        Self::Restart,
        Self::Map,
    ];
}

/// A disk, its image and its last backup.
struct Session<'a> {
    round: &'a Round<'a>,
    size: u64,
    durability: &'static str,
    cache: &'static str,
    has_side: bool,
    has_snapshot: bool,
    has_backing: bool,
    backup: Vec<u8>,
}

impl<'a> Session<'a> {
    fn make(round: &'a Round<'a>, random: &mut Random) -> Result<(Self, Vec<Blocks>)> {
        let session = Self {
            round,
            size: SIZE,
            durability: *random.choose(&["process", "power"]),
            cache: *random.choose(&["writeback", "none", "writethrough"]),
            has_side: false,
            has_snapshot: false,
            has_backing: true,
            backup: Vec::new(),
        };
        let below = session.path("below.raw");
        let file = File::create(&below)?;
        file.set_len(SIZE_BELOW)?;
        let share = SIZE / BLOCK / CLIENTS;
        let parts = (0..CLIENTS)
            .map(|client| Blocks::above(client * share, share, &file, SIZE_BELOW / BLOCK))
            .collect::<std::io::Result<Vec<_>>>()?;
        let mut backup = fs::read(&below)?;
        backup.resize(SIZE as usize, 0);
        File::create(session.path("side.raw"))?.set_len(1 << 20)?;
        let options = *random.choose(&[
            "cluster_size=65536",
            "cluster_size=4096",
            "cluster_size=512",
            "cluster_size=65536,extended_l2=on",
            "cluster_size=16384,extended_l2=on,lazy_refcounts=on",
        ]);
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-b", "below.raw", "-F", "raw", "-o", options]);
        output_of(create.arg(session.image()).arg(SIZE.to_string()))?;
        session.cli(&["bitmap", "add"], &[BITMAP])?;
        Ok((Self { backup, ..session }, parts))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.round.directory.join(name)
    }

    fn image(&self) -> PathBuf {
        self.path("disk.qcow2")
    }

    /// A command of ours about the image.
    fn cli(&self, before: &[&str], after: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.round.programs.cli);
        output_of(command.args(before).arg(self.image()).args(after))
    }

    fn configure(&self) -> Result<()> {
        let [control, socket, side] = ["control", "socket", "side.raw"].map(|name| self.path(name));
        let (image, durability, cache) = (self.image(), self.durability, self.cache);
        let mut config = format!(
            "control = {control:?}\nsocket = {socket:?}\n\
             [[export]]\nname = \"{EXPORT}\"\nsource = {image:?}\nformat = \"qcow2\"\n\
             bitmap = \"{BITMAP}\"\nbitmap-durability = \"{durability}\"\ncache = \"{cache}\"\n"
        );
        if self.has_side {
            config +=
                &format!("[[export]]\nname = \"side\"\nsource = {side:?}\nformat = \"raw\"\n");
        }
        Ok(fs::write(self.path("server.toml"), config)?)
    }

    fn command(&self, takes_over: bool) -> Result<Command> {
        self.configure()?;
        let mut command = Command::new(&self.round.programs.cli);
        command.arg("serve").arg("--config").arg(self.path("server.toml"));
        if takes_over {
            command.arg("--takeover").arg(self.path("control"));
        }
        Ok(command)
    }

    fn start(&self, takes_over: bool) -> Result<Served> {
        let socket = self.path("socket");
        Served::start(&mut self.command(takes_over)?, self.round.directory, &socket)
    }

    /// Makes a request at the control socket.
    fn ask(&self, request: &Value) -> Result<Value> {
        let mut stream = UnixStream::connect(self.path("control"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(format!("{request}\n").as_bytes())?;
        let mut reply = String::new();
        BufReader::new(stream).read_line(&mut reply)?;
        let reply: Value =
            serde_json::from_str(&reply).with_context(|| format!("a reply to {request}"))?;
        match reply.get("result") {
            Some(result) => Ok(result.clone()),
            None => bail!("{request} is answered with {reply}"),
        }
    }

    fn go_through(
        &mut self,
        event: Event,
        server: &mut Served,
        stage: &Stage,
        random: &mut Random,
    ) -> Result<()> {
        match event {
            Event::Backup => self.back_up(server, random),
            Event::BackupCutOff => {
                self.begin_backup()?;
                thread::sleep(Duration::from_micros(random.below(30_000)));
                self.kill(server, stage)
            }
            Event::Kill => self.kill(server, stage),
            Event::Takeover => {
                let next = self.start(true)?;
                std::mem::replace(server, next).ended()
            }
            Event::Reload => {
                self.has_side = !self.has_side;
                self.configure()?;
                self.ask(&json!({ "command": "reload" }))?;
                ensure!(
                    Wire::connect(&self.path("socket"), "side").is_ok() == self.has_side,
                    "reload"
                );
                Ok(())
            }
            Event::Stream | Event::StreamCutOff => {
                let is_cut_off = event == Event::StreamCutOff;
                self.stream(is_cut_off, server, stage, random).context("a stream")
            }
            Event::Restart => self.restart(server, stage, random).context("a restart"),
            Event::Map => {
                let mut next = 0;
                for (offset, length, _) in parts_of(&self.map(EXPORT, "base:allocation")?)? {
                    ensure!(offset == next, "the map has a gap at {next}");
                    next += length;
                }
                ensure!(next == self.size, "the map ends at {next}");
                Ok(())
            }
        }
    }

    fn kill(&self, server: &mut Served, stage: &Stage) -> Result<()> {
        let mut cuts = stage.cuts();
        server.kill();
        check_image(&self.image()).context("after a kill")?;
        *server = self.start(false)?;
        cuts.push(End::Killed);
        Ok(())
    }

    /// Ends the server, changes the image, and starts another one.
    fn restart(&mut self, server: &mut Served, stage: &Stage, random: &mut Random) -> Result<()> {
        let mut cuts = stage.cuts();
        server.end_now()?;
        check_image(&self.image())?;
        match random.below(3) {
            0 => {
                self.size += (random.below(4) + 1) * 256 * 1024;
                self.cli(&["image", "resize"], &[&self.size.to_string()])?;
                self.backup.resize(self.size as usize, 0);
            }
            1 => {
                let action = if self.has_snapshot { "delete" } else { "create" };
                self.cli(&["image", "snapshot", action], &["s"])?;
                self.has_snapshot = !self.has_snapshot;
            }
            _ => {}
        }
        check_image(&self.image()).context("after a change")?;
        *server = self.start(false)?;
        cuts.push(End::Clean);
        Ok(())
    }

    fn begin_backup(&self) -> Result<String> {
        let request = json!({ "command": "checkpoint-start", "export": EXPORT, "bitmap": BITMAP });
        let view = self.ask(&request)?.get("view").and_then(Value::as_str).map(str::to_owned);
        view.context("a checkpoint without a view")
    }

    /// Makes an incremental backup, which may fail in the end.
    fn back_up(&mut self, server: &mut Served, random: &mut Random) -> Result<()> {
        let view = self.begin_backup()?;
        if random.one_in(4) {
            let (mut command, directory) = (self.command(true)?, self.round.directory);
            let started = Served::spawn(&mut command, directory)?.has_started(&self.path("socket"));
            ensure!(!started?, "a server was taken over in the middle of a checkpoint");
            ensure!(!server.has_ended()?, "a refused takeover has ended the server");
        }
        let dirty = dirty_parts(&self.map(&view, &format!("qemu:dirty-bitmap:{BITMAP}"))?)?;
        let mut wire = Wire::connect(&self.path("socket"), &view)?;
        let mut backup = self.backup.clone();
        for (offset, length) in dirty {
            let bytes = wire.read(offset, length as usize)?;
            backup[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        let disk = read_all(&mut wire, self.size)?;
        if let Some(at) = backup.iter().zip(&disk).position(|(one, other)| one != other) {
            bail!("block {} has changed since the last backup and is not dirty", at as u64 / BLOCK);
        }
        drop(wire);
        let is_success = !random.one_in(4);
        let outcome = if is_success { "success" } else { "failure" };
        self.ask(&json!({ "command": "checkpoint-end", "export": EXPORT, "outcome": outcome }))?;
        if is_success {
            self.backup = backup;
        }
        Ok(())
    }

    /// Copies the lower layer into the image, at least in part.
    fn stream(
        &mut self,
        is_cut_off: bool,
        server: &mut Served,
        stage: &Stage,
        random: &mut Random,
    ) -> Result<()> {
        let rate = if is_cut_off { 4 << 20 } else { 64 << 20 };
        let started = self.ask(&json!({ "command": "stream", "export": EXPORT, "rate": rate }));
        if self.has_snapshot || !self.has_backing {
            // It is refused, fails, or has nothing to do; the disk is the same all the same.
            if started.is_ok() {
                self.wait_for_stream()?;
            }
            return Ok(());
        }
        started?;
        if is_cut_off {
            thread::sleep(Duration::from_micros(random.below(1_500_000)));
            if random.one_in(2) {
                let cancel = json!({ "command": "stream", "export": EXPORT, "action": "cancel" });
                self.ask(&cancel)?;
            } else {
                self.kill(server, stage)?;
                let info = self.cli(&["image", "info", "--json", "-U"], &[])?;
                self.has_backing = info.contains("below.raw");
                return Ok(());
            }
        }
        let phase = self.wait_for_stream()?;
        self.has_backing = phase != "complete";
        let right: &[&str] = if is_cut_off { &["complete", "cancelled"] } else { &["complete"] };
        ensure!(right.contains(&&*phase), "it is {phase}");
        Ok(())
    }

    /// Waits for the end of a stream; returns its phase.
    fn wait_for_stream(&self) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let listing = self.ask(&json!({ "command": "list" }))?;
            let exports = listing.get("exports").and_then(Value::as_array);
            let vm = exports.and_then(|all| {
                all.iter().find(|one| one.get("name").and_then(Value::as_str) == Some(EXPORT))
            });
            let phase = vm.and_then(|vm| vm.pointer("/stream/phase")).and_then(Value::as_str);
            match phase {
                Some("running") if Instant::now() < deadline => {}
                Some(phase) => return Ok(phase.to_owned()),
                None => bail!("there is no stream in {listing}"),
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn map(&self, export: &str, context: &str) -> Result<String> {
        let uri = format!("nbd+unix:///{export}?socket={}", self.path("socket").display());
        let mut map = Command::new(&self.round.programs.cli);
        output_of(map.args(["map", "--json", "--context", context, &uri]))
    }

    /// Holds what the server says of the disk, when nobody writes to it any more, against what QEMU does.
    fn finish(mut self, mut server: Served, random: &mut Random) -> Result<()> {
        self.back_up(&mut server, random).context("at the end")?;
        let disk = read_all(&mut Wire::connect(&self.path("socket"), EXPORT)?, self.size)?;
        for (offset, length, kind) in parts_of(&self.map(EXPORT, "base:allocation")?)? {
            const ZERO: u64 = 2;
            let bytes = &disk[offset as usize..][..length as usize];
            let is_zero = bytes.iter().all(|byte| *byte == 0);
            ensure!(is_zero || kind & ZERO == 0, "data in {length} bytes of zeroes at {offset}");
        }
        server.end()?;
        check_image(&self.image()).context("at the end")?;
        self.is_disk_of_qemu(&disk)
    }

    fn is_disk_of_qemu(&self, disk: &[u8]) -> Result<()> {
        let raw = self.path("converted.raw");
        let mut convert = Command::new("qemu-img");
        output_of(convert.args(["convert", "-O", "raw"]).arg(self.image()).arg(&raw))?;
        ensure!(fs::read(&raw)? == disk, "QEMU finds another disk in the image");
        Ok(())
    }
}

fn read_all(wire: &mut Wire, size: u64) -> Result<Vec<u8>> {
    let mut disk = Vec::with_capacity(size as usize);
    while (disk.len() as u64) < size {
        let length = (size - disk.len() as u64).min(1 << 20);
        disk.extend(wire.read(disk.len() as u64, length as usize)?);
    }
    Ok(disk)
}

/// The extents of a map in JSON: offset, length and type.
fn parts_of(map: &str) -> Result<Vec<(u64, u64, u64)>> {
    let extents: Vec<Value> = serde_json::from_str(map).context("the map is no list")?;
    let number = |extent: &Value, name| extent.get(name).and_then(Value::as_u64);
    let part = |extent: &Value| {
        Some((number(extent, "offset")?, number(extent, "length")?, number(extent, "type")?))
    };
    extents.iter().map(|extent| part(extent).context("an extent is incomplete")).collect()
}
