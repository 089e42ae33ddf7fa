//! What is below a disk is streamed into it while clients write, and the server is killed.

use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::blocks::{BLOCK, Blocks};
use super::judge::{Judge, Round};
use super::kills::{SIZE, kill_while_written};
use super::random::Random;
use super::served::{Served, check_image, output_if, output_of};
use super::wire::Wire;

const KILLS: u64 = 4;

/// Time limit for the last stream.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug)]
pub(super) struct Streams;

impl Judge for Streams {
    fn name(&self) -> &'static str {
        "streams"
    }

    fn description(&self) -> &'static str {
        "layers are streamed into the disk above while clients write, and the server is killed"
    }

    fn unit(&self) -> &'static str {
        "kills"
    }

    fn round(&self, round: &Round<'_>) -> Result<u64> {
        let mut random = Random::new(round.seed);
        let mut chain = Chain::make(round, &mut random)?;
        let clients = random.below(3) + 1;
        let share = SIZE / BLOCK / clients;
        let mut parts: Vec<Blocks> =
            (0..clients).map(|client| Blocks::new(client * share, share, true)).collect();
        for _ in 0..KILLS {
            let server = chain.serve()?;
            chain.check(&mut parts).context("after a kill")?;
            chain.stream(&mut random)?;
            kill_while_written(server, &chain.socket, &mut parts, &mut random)?;
            check_image(&chain.top())?;
            if random.one_in(2) {
                chain.put_overlay(&mut random)?;
            }
        }
        chain.put_overlay(&mut random)?;
        let server = chain.serve()?;
        chain.check(&mut parts).context("before the last stream")?;
        chain.control(&["stream", ""], &[0])?;
        chain.wait_for_end()?;
        chain.remove_layers()?;
        chain.check(&mut parts).context("after the last stream")?;
        server.end()?;
        check_image(&chain.top())?;
        let server = chain.serve()?;
        chain.check(&mut parts).context("without the layers")?;
        server.end()?;
        Ok(KILLS)
    }
}

/// An image and the overlays above it.
struct Chain<'a> {
    round: &'a Round<'a>,
    /// The number of the topmost one.
    top: u64,
    socket: PathBuf,
    control: PathBuf,
}

impl<'a> Chain<'a> {
    fn make(round: &'a Round<'a>, random: &mut Random) -> Result<Self> {
        let [socket, control] = ["socket", "control"].map(|name| round.directory.join(name));
        let chain = Self { round, top: 0, socket, control };
        let mut create = chain.create(random);
        output_of(create.arg(chain.top()).arg(SIZE.to_string()))?;
        Ok(chain)
    }

    fn path(&self, number: u64) -> PathBuf {
        self.round.directory.join(format!("{number}.qcow2"))
    }

    fn top(&self) -> PathBuf {
        self.path(self.top)
    }

    fn create(&self, random: &mut Random) -> Command {
        let options = *random.choose(&[
            "cluster_size=65536",
            "cluster_size=4096",
            "cluster_size=512",
            "cluster_size=16384,extended_l2=on",
            "cluster_size=65536,lazy_refcounts=on",
            "compat=0.10,cluster_size=4096",
        ]);
        let mut create = Command::new("qemu-img");
        create.current_dir(self.round.directory);
        create.args(["create", "-q", "-f", "qcow2", "-o", options]);
        create
    }

    fn put_overlay(&mut self, random: &mut Random) -> Result<()> {
        let below = format!("{}.qcow2", self.top);
        self.top += 1;
        let mut create = self.create(random);
        output_of(create.args(["-b", &below, "-F", "qcow2"]).arg(self.top())).map(drop)
    }

    fn serve(&self) -> Result<Served> {
        let mut command = Command::new(&self.round.programs.cli);
        command.args(["serve", "--format", "qcow2", "--control"]).arg(&self.control);
        command.arg("--socket").arg(&self.socket).arg(self.top());
        Served::start(&mut command, self.round.directory, &self.socket)
    }

    fn control(&self, arguments: &[&str], statuses: &[i32]) -> Result<String> {
        let mut command = Command::new(&self.round.programs.cli);
        output_if(command.arg("control").arg(&self.control).args(arguments), statuses)
    }

    /// Starts a stream; now and then, ends it and starts another one.
    fn stream(&self, random: &mut Random) -> Result<()> {
        let rate = random.choose(&["1M", "20M", "100M", "1G"]);
        let base = format!("{}.qcow2", random.below(self.top + 1));
        let mut arguments = vec!["stream", "", "--rate", rate];
        if random.one_in(3) {
            arguments.extend(["--base", &base]);
        }
        // An earlier stream may have taken the base away.
        self.control(&arguments, if arguments.len() > 4 { &[0, 1] } else { &[0] })?;
        if random.one_in(3) {
            thread::sleep(Duration::from_micros(random.below(100_000)));
            self.control(&["stream", "", "--cancel"], &[0, 1])?;
            self.control(&["stream", "", "--rate", rate], &[0])?;
        }
        Ok(())
    }

    fn wait_for_end(&self) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let listing: Value = serde_json::from_str(&self.control(&["list", "--json"], &[0])?)?;
            let stream = &listing["exports"][0]["stream"];
            let phase = stream["phase"].as_str().context("there is no stream")?;
            if phase == "complete" {
                return Ok(());
            }
            ensure!(phase == "running", "the stream is {stream}");
            ensure!(Instant::now() < end, "the stream does not end: {stream}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn remove_layers(&self) -> Result<()> {
        (0..self.top).try_for_each(|number| Ok(std::fs::remove_file(self.path(number))?))
    }

    fn check(&self, parts: &mut [Blocks]) -> Result<()> {
        parts.iter_mut().try_for_each(|part| part.check(&mut Wire::connect(&self.socket, "")?))
    }
}
