//! Our commands against a server that lies: they end, report the cause and use no invented data.

use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};

use super::judge::{Judge, Round};
use super::liar::{self, Liar, Lied};
use super::random::Random;
use super::served::{self, Ended};

/// Commands per liar.
const COMMANDS: u64 = 10;
/// A command that runs longer is considered hung: its time limit is 3 s per request.
const LONGEST: Duration = Duration::from_secs(90);
/// Memory limit of a command, in bytes of address space.
const ADDRESS_SPACE: u64 = 4 << 30;

#[derive(Debug)]
pub(super) struct Lies;

impl Judge for Lies {
    fn name(&self) -> &'static str {
        "lies"
    }

    fn description(&self) -> &'static str {
        "servers that lie: our commands neither panic nor hang, and copy nothing wrong with status 0"
    }

    fn unit(&self) -> &'static str {
        "commands"
    }

    fn round(&self, round: &Round<'_>) -> Result<u64> {
        let mut random = Random::new(round.seed);
        let socket = round.directory.join("socket");
        let listener = UnixListener::bind(&socket)?;
        listener.set_nonblocking(true)?;
        let rarity = *random.choose(&[0, 4, 20, 100]);
        let lied = Lied::default();
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let mut liars = random.fork();
            let (lied, over) = (&lied, &is_over);
            scope.spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    let Ok((stream, _)) = listener.accept() else {
                        thread::sleep(Duration::from_millis(2));
                        continue;
                    };
                    stream.set_nonblocking(false).ok();
                    let liar = Liar::new(stream, liars.fork(), rarity, lied);
                    scope.spawn(move || liar.serve());
                }
            });
            let outcome = (0..COMMANDS).try_for_each(|_| {
                lied.at_all.store(false, Ordering::SeqCst);
                meet(round, &socket, &mut random, lied)
            });
            is_over.store(true, Ordering::SeqCst);
            outcome
        })?;
        Ok(COMMANDS)
    }
}

/// Runs one command against the liar.
fn meet(round: &Round<'_>, socket: &Path, random: &mut Random, lied: &Lied) -> Result<()> {
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let copied = round.directory.join("copy.img");
    std::fs::remove_file(&copied).ok();
    let copied_name = copied.display().to_string();
    let commands: [&[&str]; 8] = [
        &["info", &uri],
        &["info", "--list", &uri],
        &["list-meta", &uri],
        &["map", &uri],
        &["copy", &uri, &copied_name],
        &["copy", &uri, "null:"],
        &["image", "convert", "-O", "raw", &uri, &copied_name],
        &["image", "map", &uri],
    ];
    let arguments = *random.choose(&commands);
    let mut command = Command::new("prlimit");
    command.arg(format!("--as={ADDRESS_SPACE}"));
    command.arg(&round.programs.cli).args(arguments).args(["--timeout", "3"]);
    let ended = served::run(&mut command, &round.directory.join("said.txt"), LONGEST)?;
    judge(arguments, &ended)?;
    let is_copy = arguments.last() == Some(&copied_name.as_str());
    if is_copy && ended.is_success() && !lied.at_all.load(Ordering::SeqCst) {
        let bytes = std::fs::read(&copied)?;
        if bytes != liar::content(0, liar::SIZE as usize) {
            bail!("{arguments:?} ends with 0 and its copy differs from what was sent");
        }
    }
    if !ended.is_success() && !lied.at_all.load(Ordering::SeqCst) {
        bail!("{arguments:?} fails where nobody lied: {}", ended.said);
    }
    Ok(())
}

fn judge(arguments: &[&str], ended: &Ended) -> Result<()> {
    let Some(status) = ended.status else {
        bail!("{arguments:?} hangs: {}", ended.said);
    };
    if status.signal().is_some() || status.code() == Some(101) || ended.said.contains("panicked") {
        bail!("{arguments:?}: {status}: {}", ended.said);
    }
    if !status.success() && ended.said.trim().is_empty() {
        bail!("{arguments:?}: {status} without a word");
    }
    Ok(())
}
