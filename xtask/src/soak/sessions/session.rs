//! A disk, its image, its last backup, and the server of them: what is asked of these.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{BITMAP, CLIENTS, EXPORT, PATIENCE, SIZE, SIZE_BELOW};
use crate::soak::blocks::{BLOCK, Blocks};
use crate::soak::judge::Round;
use crate::soak::random::Random;
use crate::soak::served::{Served, output_of};
use crate::soak::wire::Wire;

/// A disk, its image and its last backup.
pub(super) struct Session<'a> {
    pub(super) round: &'a Round<'a>,
    pub(super) size: u64,
    pub(super) durability: &'static str,
    pub(super) cache: &'static str,
    pub(super) has_side: bool,
    pub(super) has_snapshot: bool,
    pub(super) has_backing: bool,
    pub(super) backup: Vec<u8>,
}

impl<'a> Session<'a> {
    pub(super) fn make(round: &'a Round<'a>, random: &mut Random) -> Result<(Self, Vec<Blocks>)> {
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

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.round.directory.join(name)
    }

    pub(super) fn image(&self) -> PathBuf {
        self.path("disk.qcow2")
    }

    /// A command of ours about the image.
    pub(super) fn cli(&self, before: &[&str], after: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.round.programs.cli);
        output_of(command.args(before).arg(self.image()).args(after))
    }

    pub(super) fn configure(&self) -> Result<()> {
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

    pub(super) fn command(&self, takes_over: bool) -> Result<Command> {
        self.configure()?;
        let mut command = Command::new(&self.round.programs.cli);
        command.arg("serve").arg("--config").arg(self.path("server.toml"));
        if takes_over {
            command.arg("--takeover").arg(self.path("control"));
        }
        Ok(command)
    }

    pub(super) fn start(&self, takes_over: bool) -> Result<Served> {
        let socket = self.path("socket");
        Served::start(&mut self.command(takes_over)?, self.round.directory, &socket)
    }

    /// Makes a request at the control socket.
    pub(super) fn ask(&self, request: &Value) -> Result<Value> {
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

    pub(super) fn map(&self, export: &str, context: &str) -> Result<String> {
        let uri = format!("nbd+unix:///{export}?socket={}", self.path("socket").display());
        let mut map = Command::new(&self.round.programs.cli);
        output_of(map.args(["map", "--json", "--context", context, &uri]))
    }
}

pub(super) fn read_all(wire: &mut Wire, size: u64) -> Result<Vec<u8>> {
    let mut disk = Vec::with_capacity(size as usize);
    while (disk.len() as u64) < size {
        let length = (size - disk.len() as u64).min(1 << 20);
        disk.extend(wire.read(disk.len() as u64, length as usize)?);
    }
    Ok(disk)
}

/// The extents of a map in JSON: offset, length and type.
pub(super) fn parts_of(map: &str) -> Result<Vec<(u64, u64, u64)>> {
    let extents: Vec<Value> = serde_json::from_str(map).context("the map is not a list")?;
    let number = |extent: &Value, name| extent.get(name).and_then(Value::as_u64);
    let part = |extent: &Value| {
        Some((number(extent, "offset")?, number(extent, "length")?, number(extent, "type")?))
    };
    extents.iter().map(|extent| part(extent).context("an extent is incomplete")).collect()
}
