//! Clients that write to parts of one disk, and know when their server was taken away.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail};

use super::blocks::{Blocks, Step};
use super::random::Random;
use super::wire::Wire;

/// The clients of a server, and those who cut them off.
pub(super) struct Stage {
    socket: PathBuf,
    /// The name of the export.
    export: &'static str,
    pub(super) is_over: AtomicBool,
    pub(super) has_failed: AtomicBool,
    /// How each server that cut its clients off has ended. Locked until the next one serves.
    cuts: Mutex<Vec<End>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Whatever was acknowledged is there.
    Clean,
    Killed,
}

impl Stage {
    pub(super) fn new(socket: PathBuf, export: &'static str) -> Self {
        let [is_over, has_failed] = [(); 2].map(|()| AtomicBool::new(false));
        Self { socket, export, is_over, has_failed, cuts: Mutex::default() }
    }

    pub(super) fn cuts(&self) -> MutexGuard<'_, Vec<End>> {
        self.cuts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client that writes to its part and knows what may be in it.
    pub(super) fn run(&self, part: &mut Blocks, random: &mut Random) -> Result<()> {
        let mut outcome = Ok(());
        while outcome.is_ok() && !self.is_over.load(Ordering::SeqCst) {
            let cuts = self.cuts();
            let (before, wire) = (cuts.len(), Wire::connect(&self.socket, self.export));
            drop(cuts);
            let mut is_checked = false;
            outcome = wire.and_then(|mut wire| {
                part.check(&mut wire)?;
                is_checked = true;
                self.work(part, &mut wire, random)
            });
            if outcome.as_ref().is_err_and(anyhow::Error::is::<std::io::Error>)
                && let Some(end) = self.cuts().get(before)
            {
                // Before the check nobody knows what an earlier server that was killed has lost.
                if *end == End::Clean && is_checked {
                    part.keep_acknowledged();
                }
                outcome = Ok(());
            }
        }
        self.has_failed.fetch_or(outcome.is_err(), Ordering::SeqCst);
        outcome
    }

    fn work(&self, part: &mut Blocks, wire: &mut Wire, random: &mut Random) -> Result<()> {
        while !self.is_over.load(Ordering::SeqCst) {
            if let Step::Refused(error) = part.step(wire, random)? {
                bail!("a request is answered with error {error}");
            }
        }
        part.flush(wire)?;
        part.check(wire)
    }
}
