//! Random commands of ours on one image and of qemu-img on another: both disks must be equal.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::judge::{Judge, Round};
use super::random::Random;
use super::served::output_of;

const STEPS: u64 = 14;
const MIB: u64 = 1 << 20;

#[derive(Debug)]
pub(super) struct Commands;

impl Judge for Commands {
    fn name(&self) -> &'static str {
        "commands"
    }

    fn description(&self) -> &'static str {
        "image commands in random order beside qemu-img's: both produce the same disks"
    }

    fn unit(&self) -> &'static str {
        "commands"
    }

    fn round(&self, round: &Round<'_>) -> Result<u64> {
        let mut random = Random::new(round.seed);
        let mut pair = Pair::make(round, &mut random)?;
        for _ in 0..STEPS {
            let step = pair.step(&mut random)?;
            pair.compare()
                .with_context(|| format!("after {step}; before it: {}", pair.history.join("; ")))?;
            pair.history.push(step);
        }
        Ok(STEPS)
    }
}

/// The same image twice: our commands change `ours`, and QEMU's change `theirs`.
struct Pair<'a> {
    round: &'a Round<'a>,
    ours: PathBuf,
    theirs: PathBuf,
    size: u64,
    snapshots: Vec<String>,
    /// Snapshots of such images do not record the size of their disk, so the size never changes.
    is_version_2: bool,
    /// Overlays above the first image.
    depth: u64,
    history: Vec<String>,
}

impl<'a> Pair<'a> {
    fn make(round: &'a Round<'a>, random: &mut Random) -> Result<Self> {
        let directories = ["ours", "theirs"].map(|name| round.directory.join(name));
        for directory in &directories {
            std::fs::create_dir(directory)?;
        }
        let [ours, theirs] = directories.map(|directory| directory.join("0.qcow2"));
        let size = random.below(8) * MIB + MIB + random.below(3) * 512;
        let options = *random.choose(&[
            "cluster_size=65536",
            "cluster_size=4096",
            "cluster_size=512,refcount_bits=64",
            "cluster_size=16384,extended_l2=on",
            "compat=0.10,cluster_size=4096",
        ]);
        for image in [&ours, &theirs] {
            qemu_img(&["create", "-q", "-f", "qcow2", "-o", options], image, &size.to_string())?;
        }
        let (snapshots, history) = (Vec::new(), vec![format!("create {options} {size}")]);
        let is_version_2 = options.contains("compat=0.10");
        Ok(Self { round, ours, theirs, size, snapshots, is_version_2, depth: 0, history })
    }

    /// Runs one command on both.
    fn step(&mut self, random: &mut Random) -> Result<String> {
        match random.below(10) {
            0..=3 => self.write(random),
            4 => self.snapshot(random),
            5 => self.apply(random),
            6 => self.resize(random),
            7 => self.overlay(),
            8 => self.convert(random),
            _ => self.flatten(random),
        }
    }

    /// Lets QEMU write the same data to both.
    fn write(&self, random: &mut Random) -> Result<String> {
        let mut commands = Vec::new();
        for _ in 0..random.below(12) + 1 {
            let offset = random.below(self.size / 512) * 512;
            let length = ((random.below(400) + 1) * 512).min(self.size - offset);
            commands.push(match random.below(6) {
                0 => format!("write -q -z {offset} {length}"),
                1 => format!("discard -q {offset} {length}"),
                _ => format!("write -q -P {} {offset} {length}", random.below(255) + 1),
            });
        }
        for image in [&self.ours, &self.theirs] {
            let mut io = Command::new("qemu-io");
            io.args(["-f", "qcow2", "-d", "unmap"]);
            commands.iter().for_each(|command| {
                io.args(["-c", command]);
            });
            output_of(io.arg(image))?;
        }
        Ok(format!("qemu-io {commands:?}"))
    }

    fn ours(&self, arguments: &[&str]) -> Result<String> {
        let directory = self.ours.parent().context("a directory")?;
        let mut command = Command::new(&self.round.programs.cli);
        output_of(command.current_dir(directory).arg("image").args(arguments))
    }

    fn theirs(&self, arguments: &[&str]) -> Result<String> {
        let directory = self.theirs.parent().context("a directory")?;
        output_of(Command::new("qemu-img").current_dir(directory).args(arguments))
    }

    fn snapshot(&mut self, random: &mut Random) -> Result<String> {
        let name = name_of(&self.ours)?;
        if self.snapshots.len() > 2 {
            let index = random.below(self.snapshots.len() as u64) as usize;
            let snapshot = self.snapshots.remove(index);
            self.ours(&["snapshot", "delete", &name, &snapshot])?;
            self.theirs(&["snapshot", "-d", &snapshot, &name])?;
            return Ok(format!("delete snapshot {snapshot}"));
        }
        let snapshot = format!("s{}", random.below(1 << 30));
        self.ours(&["snapshot", "create", &name, &snapshot])?;
        self.theirs(&["snapshot", "-c", &snapshot, &name])?;
        self.snapshots.push(snapshot.clone());
        Ok(format!("snapshot {snapshot}"))
    }

    fn apply(&mut self, random: &mut Random) -> Result<String> {
        if self.snapshots.is_empty() {
            return self.snapshot(random);
        }
        let name = name_of(&self.ours)?;
        let snapshot = random.choose(&self.snapshots).clone();
        self.ours(&["snapshot", "apply", &name, &snapshot])?;
        self.theirs(&["snapshot", "-a", &snapshot, &name])?;
        self.size = virtual_size(&self.theirs)?;
        Ok(format!("apply {snapshot}"))
    }

    fn resize(&mut self, random: &mut Random) -> Result<String> {
        let name = name_of(&self.ours)?;
        let size = match self.snapshots.is_empty() {
            // Whole clusters when shrinking: QEMU shows the rest of a cut cluster again when the
            // disk grows.
            true => (random.below(10) + 1) * MIB,
            false if self.is_version_2 => return self.write(random),
            false => self.size + random.below(4) * MIB,
        };
        let text = size.to_string();
        self.ours(&["resize", "--shrink", &name, &text])?;
        self.theirs(&["resize", "-q", "--shrink", "-f", "qcow2", &name, &text])?;
        self.size = size;
        Ok(format!("resize {size}"))
    }

    fn overlay(&mut self) -> Result<String> {
        let below = name_of(&self.ours)?;
        self.depth += 1;
        let name = format!("{}.qcow2", self.depth);
        self.ours(&["create", "-f", "qcow2", "-b", &below, "-F", "qcow2", &name])?;
        self.theirs(&["create", "-q", "-f", "qcow2", "-b", &below, "-F", "qcow2", &name])?;
        self.move_to(&name)?;
        Ok(format!("overlay {name}"))
    }

    fn move_to(&mut self, name: &str) -> Result<()> {
        self.ours = self.ours.parent().context("a directory")?.join(name);
        self.theirs = self.theirs.parent().context("a directory")?.join(name);
        self.snapshots.clear();
        self.is_version_2 = false;
        self.size = virtual_size(&self.theirs)?;
        Ok(())
    }

    fn convert(&mut self, random: &mut Random) -> Result<String> {
        let from = name_of(&self.ours)?;
        self.depth += 1;
        let name = format!("{}.qcow2", self.depth);
        let is_compressed = random.one_in(2);
        let (ours, theirs): (&[&str], &[&str]) =
            if is_compressed { (&["--compress"], &["-c"]) } else { (&[], &[]) };
        self.ours(&[&["convert", "-O", "qcow2"], ours, &[&from, &name]].concat())?;
        self.theirs(&[&["convert", "-O", "qcow2"], theirs, &[&from, &name]].concat())?;
        self.move_to(&name)?;
        Ok(format!("convert to {name}, compressed: {is_compressed}"))
    }

    /// Commits into the image below, or makes the overlay independent.
    fn flatten(&mut self, random: &mut Random) -> Result<String> {
        let name = name_of(&self.ours)?;
        if !has_backing(&self.theirs)? {
            return self.write(random);
        }
        if !self.snapshots.is_empty() {
            // QEMU goes on, and changes what the snapshots show.
            let refused = self.ours(&["rebase", "--no-backing", &name]);
            ensure!(refused.is_err(), "a rebase changed what internal snapshots show");
            return Ok("refused rebase".to_owned());
        }
        if random.one_in(2) {
            self.ours(&["commit", &name])?;
            self.theirs(&["commit", "-q", &name])?;
            return Ok("commit".to_owned());
        }
        self.ours(&["rebase", "--no-backing", &name])?;
        self.theirs(&["rebase", "-b", "", &name])?;
        Ok("rebase onto nothing".to_owned())
    }

    /// Checks that the disks are equal, and that both programs find both images clean.
    fn compare(&self) -> Result<()> {
        qemu_img(&["compare", "-f", "qcow2", "-F", "qcow2"], &self.ours, path(&self.theirs)?)?;
        for image in [&self.ours, &self.theirs] {
            output_of(Command::new("qemu-img").args(["check", "-q"]).arg(image))?;
            let mut check = Command::new(&self.round.programs.cli);
            output_of(check.args(["image", "check"]).arg(image))?;
        }
        Ok(())
    }
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

fn name_of(image: &Path) -> Result<String> {
    let name = image.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).context("an image without a name")
}

fn qemu_img(arguments: &[&str], image: &Path, last: &str) -> Result<String> {
    output_of(Command::new("qemu-img").args(arguments).arg(image).arg(last))
}

fn information(image: &Path) -> Result<serde_json::Value> {
    let text = output_of(Command::new("qemu-img").args(["info", "--output=json"]).arg(image))?;
    serde_json::from_str(&text).context("qemu-img info")
}

fn virtual_size(image: &Path) -> Result<u64> {
    let size = information(image)?.get("virtual-size").and_then(serde_json::Value::as_u64);
    size.context("an image without a size")
}

fn has_backing(image: &Path) -> Result<bool> {
    Ok(information(image)?.get("backing-filename").is_some())
}
