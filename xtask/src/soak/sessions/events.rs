//! What a session goes through, and what is checked at the end.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::session::{Session, parts_of, read_all};
use super::{BITMAP, EXPORT, Event, PATIENCE};
use crate::soak::blocks::BLOCK;
use crate::soak::kills::dirty_parts;
use crate::soak::random::Random;
use crate::soak::served::{Served, check_image, output_of};
use crate::soak::stage::{End, Stage};
use crate::soak::wire::Wire;

impl Session<'_> {
    pub(super) fn go_through(
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

    /// Holds what the server says of the disk, when nobody writes to it any more, against what QEMU
    /// does.
    pub(super) fn finish(mut self, mut server: Served, random: &mut Random) -> Result<()> {
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
