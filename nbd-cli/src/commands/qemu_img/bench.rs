//! `qemu-img bench`.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::thread::{self, available_parallelism};
use std::time::Instant;

use imgfmt::{Durability, GuestOffset, Image};
use nbd_jobs::qemu_numbers::parse_integer;
use nbd_jobs::text::printable;

use super::arguments::Arguments;
use super::known::Opt;
use super::options::size_argument;
use super::place::{Place, parse_cache};
use super::refusal::Refusal;
use super::text;
use crate::signals;

/// Limit of counts and lengths, as in QEMU.
const MOST: u64 = i32::MAX as u64;
/// Most memory for the data of requests in parallel, in bytes.
const MEMORY_MAX: u64 = 256 << 20;
/// Most threads.
const THREADS_MAX: u64 = 64;

/// What is measured. Sizes are in bytes.
struct Load {
    is_write: bool,
    count: u64,
    depth: u64,
    offset: u64,
    size: u64,
    step: u64,
    pattern: u8,
    /// 0 is never.
    flush_interval: u64,
    /// Whether nothing else is done during a flush.
    drains: bool,
}

impl Load {
    fn parse(arguments: &Arguments) -> Result<Self, Refusal> {
        let number = |option, what: &str, default, range: (u64, u64)| {
            let Some(text) = arguments.text(option)? else { return Ok(default) };
            let found = parse_integer(&text);
            in_range(found, what, &text, range)
        };
        let size = |option, what: &str, default, range: (u64, u64)| {
            let Some(text) = arguments.text(option)? else { return Ok(default) };
            in_range(Some(size_argument(what, &text)?), what, &text, range)
        };
        let count = number(Opt::Count, "request count", 75_000, (1, MOST))?;
        let depth = number(Opt::Depth, "queue depth", 64, (1, MOST))?;
        let offset = match arguments.text(Opt::Offset)? {
            Some(text) => size_argument("offset", &text)?,
            None => 0,
        };
        let length = size(Opt::BufferSize, "buffer size", 4096, (1, MOST))?;
        let step = size(Opt::StepSize, "step size", 0, (0, MOST))?;
        let pattern = number(Opt::Pattern, "pattern byte", 0, (0, 255))?;
        let flush_interval = number(Opt::FlushInterval, "flush interval", 0, (0, MOST))?;
        let is_write = arguments.has(Opt::Write);
        if !is_write && flush_interval > 0 {
            return Err(Refusal::new("--flush-interval is only available in write tests"));
        }
        if flush_interval > 0 && flush_interval < depth {
            return Err(Refusal::new("Flush interval can't be smaller than depth"));
        }
        Ok(Self {
            is_write,
            count,
            depth,
            offset,
            size: length,
            // As in QEMU, 0 is the size of a request.
            step: if step == 0 { length } else { step },
            pattern: u8::try_from(pattern).unwrap_or_default(),
            flush_interval,
            drains: !arguments.has(Opt::NoDrain),
        })
    }

    /// The lines that QEMU prints first.
    fn announcement(&self) -> String {
        let kind = if self.is_write { "write" } else { "read" };
        let mut text = format!(
            "Sending {} {kind} requests, {} bytes each, {} in parallel (starting at offset {}, step \
             size {})\n",
            self.count, self.size, self.depth, self.offset, self.step
        );
        if self.flush_interval > 0 {
            text += &format!("Sending flush every {} requests\n", self.flush_interval);
        }
        text
    }

    /// How many requests are carried out at the same time.
    fn threads(&self) -> Result<u64, Refusal> {
        if self.size > MEMORY_MAX {
            return Err(Refusal::new(format!(
                "requests of more than {MEMORY_MAX} bytes are not supported"
            )));
        }
        let cores = available_parallelism().map_or(1, NonZeroUsize::get) as u64;
        let most = (8 * cores).min(THREADS_MAX).min(MEMORY_MAX / self.size);
        Ok(most.min(self.depth).min(self.count).max(1))
    }

    /// The place of a request: as in QEMU, beyond the end of the disk the places start again at its
    /// start, and a request that goes beyond the end fails.
    fn place(&self, number: u64, disk: u64) -> u64 {
        let place = u128::from(self.offset) + u128::from(number) * u128::from(self.step);
        let place = match disk {
            0 if number > 0 => 0,
            1.. if number > 0 => place % u128::from(disk),
            _ => place,
        };
        // Sizes of disks and the offset are far below the limit.
        u64::try_from(place).unwrap_or(u64::MAX)
    }

    /// Carries out all requests, with this many threads.
    fn carry_out(&self, image: &Image, threads: u64) -> Result<(), Refusal> {
        let shared = Shared { image, next: AtomicU64::new(0), flushes: RwLock::new(()) };
        thread::scope(|scope| {
            let workers: Vec<_> =
                (0..threads).map(|_| scope.spawn(|| self.work(&shared))).collect();
            let mut result = Ok(());
            for worker in workers {
                let ended = worker.join();
                let ended = ended.unwrap_or_else(|_| Err(Refusal::new("a thread has panicked")));
                result = result.and(ended);
            }
            result
        })
    }

    fn work(&self, shared: &Shared<'_>) -> Result<(), Refusal> {
        let result = self.work_until_error(shared);
        if result.is_err() {
            // The others find no more requests.
            shared.next.store(self.count, Ordering::Relaxed);
        }
        result
    }

    fn work_until_error(&self, shared: &Shared<'_>) -> Result<(), Refusal> {
        let Shared { image, next, flushes } = shared;
        let mut buffer = vec![self.pattern; self.size as usize];
        loop {
            signals::stop_if_interrupted()?;
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= self.count {
                return Ok(());
            }
            let offset = GuestOffset::new(self.place(number, image.size()));
            let carried_out = {
                // A flush that drains waits for the others.
                let _shared = flushes.read().unwrap_or_else(PoisonError::into_inner);
                match self.is_write {
                    true => image.write_at(offset, &buffer, Durability::Cached),
                    false => image.read_at(offset, &mut buffer),
                }
            };
            carried_out.map_err(failed)?;
            if self.flush_interval > 0 && (number + 1).is_multiple_of(self.flush_interval) {
                let _alone =
                    self.drains.then(|| flushes.write().unwrap_or_else(PoisonError::into_inner));
                image.flush().map_err(failed)?;
            }
        }
    }
}

/// What the threads share.
struct Shared<'a> {
    image: &'a Image,
    /// The number of the next request.
    next: AtomicU64,
    /// Written during a flush that drains, read during a request.
    flushes: RwLock<()>,
}

fn failed(error: imgfmt::Error) -> Refusal {
    Refusal::new(format!("Failed request: {error}"))
}

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let operand = arguments.only_operand()?;
    let load = Load::parse(arguments)?;
    let threads = load.threads()?;
    let mut place = Place::new(arguments, operand, Opt::Format, Opt::None)?;
    if let Some(name) = arguments.text(Opt::Cache)? {
        place.options.cache = parse_cache(&name).map_err(|_| Refusal::new("Invalid cache mode"))?;
    }
    check_aio(arguments, &place)?;
    let image = match load.is_write {
        true => place.open_to_change()?,
        false => place.open()?,
    };
    text::print(&load.announcement())?;
    let started = Instant::now();
    load.carry_out(&image, threads)?;
    let seconds = started.elapsed().as_secs_f64();
    image.close()?;
    text::print(&format!("Run completed in {seconds:.3} seconds.\n"))
}

/// `-i` and `-n` choose how QEMU waits for the disk; here they are checked, and have no effect.
fn check_aio(arguments: &Arguments, place: &Place) -> Result<(), Refusal> {
    let name = arguments.text(Opt::Aio)?;
    let is_native = match name.as_deref() {
        None => arguments.has(Opt::Native),
        Some("threads" | "io_uring") => false,
        Some("native") => true,
        Some(other) => {
            return Err(Refusal::new(format!("Invalid aio option: {}", printable(other))));
        }
    };
    match is_native && !place.options.cache.is_direct() {
        true => Err(place.not_opened(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        )),
        false => Ok(()),
    }
}

fn in_range(
    number: Option<u64>,
    what: &str,
    text: &str,
    (least, most): (u64, u64),
) -> Result<u64, Refusal> {
    match number {
        Some(number) if (least..=most).contains(&number) => Ok(number),
        Some(_) => Err(Refusal::new(format!(
            "Invalid {what} specified. Must be between {least} and {most}."
        ))),
        None if text.starts_with('-') && text.len() > 1 => Err(Refusal::new(format!(
            "Invalid {what} specified. Must be between {least} and {most}."
        ))),
        None => Err(Refusal::new(format!("Invalid {what} specified: '{}'.", printable(text)))),
    }
}
