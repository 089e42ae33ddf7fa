//! Clients that flood the server or stall, beside a well-behaved client.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::judge::{Judge, Round};
use super::random::Random;
use super::served::{Served, output_of};
use super::wire::{
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES,
    OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY, Wire, go, meta_context, option, request,
};

/// The size of the disk that is attacked, in bytes.
const SIZE: u64 = 64 << 20;
/// The size of the memory disk that the good client uses, in bytes.
const GOOD_SIZE: u64 = 8 << 20;
/// Time limit of one attack.
const ATTACK: Duration = Duration::from_secs(4);
/// Time limit for one answer to the good client, far above the usual latency: this is not a
/// benchmark.
const LONGEST_WAIT: Duration = Duration::from_secs(20);
/// Memory limit of the server, in KiB.
const MEMORY_KIB: u64 = 600 << 10;

#[derive(Debug)]
pub(super) struct Flood;

impl Judge for Flood {
    fn name(&self) -> &'static str {
        "floods"
    }

    fn description(&self) -> &'static str {
        "hostile clients beside a good one, which gets correct answers in time"
    }

    fn unit(&self) -> &'static str {
        "attacks"
    }

    fn round(&self, round: &Round<'_>) -> Result<u64> {
        let mut random = Random::new(round.seed);
        let socket = round.directory.join("socket");
        let image = make_fragmented(round, &mut random)?;
        let mut command = Command::new(&round.programs.cli);
        command.args(["serve", "--socket"]).arg(&socket);
        command.arg(format!("good=memory:{GOOD_SIZE}"));
        command.arg(format!("bad={}", image.display()));
        let server = Served::start(&mut command, round.directory, &socket)?;
        let attackers = random.below(48) + 1;
        let is_over = AtomicBool::new(false);
        let longest = thread::scope(|scope| {
            let good = {
                let mut random = random.fork();
                let (socket, is_over) = (&socket, &is_over);
                scope.spawn(move || behave(socket, &mut random, is_over))
            };
            let attacks: Vec<_> = (0..attackers)
                .map(|_| {
                    let mut random = random.fork();
                    let socket = &socket;
                    scope.spawn(move || attack(socket, &mut random))
                })
                .collect();
            for attack in attacks {
                attack.join().ok();
            }
            is_over.store(true, Ordering::SeqCst);
            good.join().map_err(|_| anyhow::anyhow!("the good client panicked"))?
        })?;
        let memory = server.peak_memory_kib()?;
        server.end()?;
        if longest > LONGEST_WAIT {
            bail!("the good client waited for {:.1} s", longest.as_secs_f64());
        }
        if memory > MEMORY_KIB {
            bail!("the server used {} MiB", memory >> 10);
        }
        Ok(attackers)
    }
}

/// An image in which clusters of data and holes alternate.
fn make_fragmented(round: &Round<'_>, random: &mut Random) -> Result<PathBuf> {
    let image = round.directory.join("disk.qcow2");
    let cluster = *random.choose(&[512_u64, 4096, 65536]);
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o"]).arg(format!("cluster_size={cluster}"));
    output_of(create.arg(&image).arg(SIZE.to_string()))?;
    let mut commands = Command::new("qemu-io");
    commands.args(["-f", "qcow2"]);
    let step = (cluster * 2).max(16384);
    for index in 0..(SIZE / step).min(1500) {
        let length = cluster.min(4096);
        commands.args(["-c", &format!("write -q -P 7 {} {length}", index * step)]);
    }
    output_of(commands.arg(&image))?;
    Ok(image)
}

/// Reads and writes until the attacks are over; returns the longest wait for an answer.
fn behave(socket: &Path, random: &mut Random, is_over: &AtomicBool) -> Result<Duration> {
    let mut longest = Duration::ZERO;
    let mut wire = Wire::connect(socket, "good").context("the good client")?;
    let mut known = vec![0_u8; (GOOD_SIZE / 4096) as usize];
    while !is_over.load(Ordering::SeqCst) {
        let block = random.below(known.len() as u64);
        let start = Instant::now();
        if random.one_in(2) {
            let value = random.below(255) as u8 + 1;
            let error = wire.write(block * 4096, &[value; 4096]).context("the good client")?;
            if error != 0 {
                bail!("the good client's write fails with error {error}");
            }
            known[block as usize] = value;
        } else {
            let bytes = wire.read(block * 4096, 4096).context("the good client")?;
            if bytes.iter().any(|byte| *byte != known[block as usize]) {
                bail!("the good client reads something else than it wrote");
            }
        }
        if random.one_in(50) {
            wire = Wire::connect(socket, "good").context("a new good client")?;
        }
        longest = longest.max(start.elapsed());
        thread::sleep(Duration::from_millis(2));
    }
    Ok(longest)
}

/// One hostile client. It may be refused or closed at any time.
fn attack(socket: &Path, random: &mut Random) {
    let end = Instant::now() + ATTACK;
    while Instant::now() < end {
        let Ok(mut wire) = Wire::greet(socket) else {
            thread::sleep(Duration::from_millis(20));
            continue;
        };
        let bytes = match random.below(6) {
            0 => options(random),
            1 => noise(random),
            _ => {
                let is_ready = wire.negotiate(OPT_STRUCTURED_REPLY, &[]).is_ok()
                    && wire
                        .negotiate(OPT_SET_META_CONTEXT, &meta_context("bad", "base:allocation"))
                        .is_ok()
                    && wire.negotiate(OPT_GO, &go("bad")).is_ok();
                if is_ready { requests(random) } else { Vec::new() }
            }
        };
        wire.send_some(&bytes);
        if random.one_in(2) {
            thread::sleep(Duration::from_millis(random.below(1500)));
        }
    }
}

/// Thousands of options.
fn options(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..random.below(4000) + 1 {
        let (number, data) = match random.below(6) {
            0 => (OPT_LIST, Vec::new()),
            1 => (OPT_INFO, go("bad")),
            2 => (OPT_LIST_META_CONTEXT, meta_context("bad", "qemu:")),
            3 => (OPT_SET_META_CONTEXT, meta_context("bad", "base:allocation")),
            4 => (OPT_STRUCTURED_REPLY, Vec::new()),
            _ => (random.below(40) as u32, vec![0; random.below(2000) as usize]),
        };
        if number != OPT_EXPORT_NAME {
            bytes.extend(option(number, &data));
        }
    }
    bytes
}

/// Random bytes, or the beginning of a valid message.
fn noise(random: &mut Random) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..random.below(5000)).map(|_| random.next() as u8).collect();
    if random.one_in(2) {
        bytes.splice(0..0, option(OPT_GO, &go("bad")));
    }
    bytes
}

/// Thousands of requests of one kind, or of all.
fn requests(random: &mut Random) -> Vec<u8> {
    const COMMANDS: [u16; 7] =
        [CMD_READ, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS, CMD_WRITE];
    /// Length limit of a flood that carries payloads, in bytes.
    const LONGEST_FLOOD: usize = 32 << 20;
    let chosen = *random.choose(&COMMANDS);
    let is_mixed = random.one_in(3);
    // Many small requests at a time; long requests take long.
    let length = *random.choose(&[4096_u32, 128 << 10, 1 << 20]);
    let mut bytes = Vec::new();
    for cookie in 0..random.below(4000) + 1 {
        if bytes.len() > LONGEST_FLOOD {
            break;
        }
        let command = if is_mixed { *random.choose(&COMMANDS) } else { chosen };
        let (offset, length) = match command {
            CMD_FLUSH => (0, 0),
            CMD_READ | CMD_WRITE => (random.below(SIZE >> 21) << 20, length),
            CMD_WRITE_ZEROES | CMD_TRIM if random.one_in(2) => (0, length),
            _ => (0, SIZE as u32),
        };
        bytes.extend(request(command, 0, cookie, offset, length));
        if command == CMD_WRITE {
            bytes.resize(bytes.len() + length as usize, 7);
        }
    }
    if random.one_in(4) {
        // A write whose payload never arrives.
        bytes.extend(request(CMD_WRITE, 0, 1, 0, 16 << 20));
    }
    bytes
}
