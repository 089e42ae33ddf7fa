//! Replaces a lost connection, and checks that the new one leads to the same export.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nbd_proto::handshake::Negotiated;
use nbd_proto::wire::{MetaContextId, MetaContextName, TransmissionFlags};
use tokio::time::{Instant, sleep};

use crate::dial::establish_at;
use crate::driver::Driver;
use crate::error::LostConnection;
use crate::settings::Settings;

/// Delay before the second attempt; doubled for each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// Longest delay between attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The time since a connection was lost without a request having been answered.
#[derive(Debug)]
pub(crate) struct Outage {
    began: Instant,
    /// Begin of the last attempt.
    tried: Instant,
    pause: Duration,
    first: String,
}

impl Outage {
    pub(crate) fn begin(lost: &LostConnection) -> Self {
        // A server that is shutting down still exists.
        let pause = match lost {
            LostConnection::ShuttingDown(_) => FIRST_PAUSE,
            _ => Duration::ZERO,
        };
        let now = Instant::now();
        Self { began: now, tried: now, pause, first: lost.to_string() }
    }
}

/// The settings for replacing a lost connection.
#[derive(Debug)]
pub(crate) struct Reconnect {
    pub(crate) settings: Settings,
    pub(crate) patience: Duration,
    pub(crate) export: Arc<Negotiated>,
    /// Whether the client has made a request that changes the disk.
    pub(crate) is_changed: Arc<AtomicBool>,
}

impl Reconnect {
    /// Returns whether a new connection may help. It does not help a request that has been sent
    /// repeatedly for longer than the caller's patience while others were answered.
    pub(crate) fn may_help(&self, lost: &LostConnection) -> bool {
        if self.settings.keeps_reading && !self.goes_on() {
            return false;
        }
        match lost {
            LostConnection::RequestTimeout { limit, waited, .. } => {
                waited.saturating_sub(*limit) <= self.patience
            }
            lost => lost.is_transient(),
        }
    }

    /// Returns whether further attempts are made after the caller's patience.
    pub(crate) fn goes_on(&self) -> bool {
        self.settings.keeps_reading && !self.is_changed.load(Ordering::Acquire)
    }

    /// Tries until there is a connection or the caller's patience is exhausted.
    pub(crate) async fn again(
        &self,
        outage: &mut Outage,
        lost: LostConnection,
    ) -> Result<Driver, LostConnection> {
        let mut last = lost.to_string();
        loop {
            // The first attempt of most outages has no delay. The delay also grows if connections
            // are established and break before they answer anything.
            let left = self.patience.saturating_sub(outage.began.elapsed());
            sleep(outage.pause.min(left)).await;
            let left = self.patience.saturating_sub(outage.began.elapsed());
            if left.is_zero() {
                return Err(self.failed(outage, last));
            }
            outage.pause = (outage.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            match self.attempt(outage, left).await {
                Ok(connected) => return connected,
                Err(failure) => last = failure,
            }
        }
    }

    /// Tries once after the caller's patience was exhausted and `lost` was the result; not again
    /// within a second.
    pub(crate) async fn once_more(
        &self,
        outage: &mut Outage,
        lost: LostConnection,
    ) -> Result<Driver, LostConnection> {
        if outage.tried.elapsed() < LONGEST_PAUSE {
            return Err(lost);
        }
        let connected = self.attempt(outage, self.patience).await;
        connected.unwrap_or_else(|last| Err(self.failed(outage, last)))
    }

    fn failed(&self, outage: &Outage, last: String) -> LostConnection {
        let first = outage.first.clone();
        LostConnection::ReconnectFailed { first, patience: self.patience, last }
    }

    /// Makes an attempt, which takes at most `limit`. Fails with the reason if another one may
    /// help.
    async fn attempt(
        &self,
        outage: &mut Outage,
        limit: Duration,
    ) -> Result<Result<Driver, LostConnection>, String> {
        outage.tried = Instant::now();
        let handshake_timeout = self.settings.handshake_timeout.min(limit);
        let settings = Settings { handshake_timeout, ..self.settings.clone() };
        let established = establish_at(&settings).await.map_err(|error| {
            tracing::debug!(%error, "reconnect failed");
            error.to_string()
        })?;
        let contexts = same_export(&self.export, &established.negotiated);
        Ok(contexts.map_err(LostConnection::ExportChanged).map(|contexts| {
            Driver::new(established, contexts, settings.limits).replaced_for(self.patience)
        }))
    }
}

/// Checks that a further connection leads to the same export with at least the same capabilities,
/// and returns its numbers of the first connection's contexts.
pub(crate) fn same_export(
    first: &Negotiated,
    other: &Negotiated,
) -> Result<Vec<MetaContextId>, String> {
    if first.size != other.size {
        return Err(format!("its size was {} bytes and is {} now", first.size, other.size));
    }
    // Checked first, because flags depend on it.
    if other.reply_mode < first.reply_mode {
        return Err("it supports only a simpler form of replies now".to_owned());
    }
    let read_only = TransmissionFlags::READ_ONLY;
    if other.flags.contains(read_only) && !first.flags.contains(read_only) {
        return Err("it was writable and is read-only now".to_owned());
    }
    // No request relies on these two flags.
    let promises = first.flags - (read_only | TransmissionFlags::ROTATIONAL);
    let missing = promises - other.flags;
    if !missing.is_empty() {
        return Err(format!("it no longer supports {}", names(missing)));
    }
    if other.block_sizes.minimum() > first.block_sizes.minimum()
        || other.block_sizes.maximum_payload() < first.block_sizes.maximum_payload()
    {
        return Err("its block size constraints are tighter now".to_owned());
    }
    first.meta_contexts.iter().map(|(_, name)| context_id(other, name)).collect()
}

fn context_id(negotiated: &Negotiated, name: &MetaContextName) -> Result<MetaContextId, String> {
    let found = negotiated.meta_contexts.iter().find(|(_, other)| other == name);
    found.map(|(id, _)| *id).ok_or_else(|| format!("the metadata context {name} is gone"))
}

fn names(flags: TransmissionFlags) -> String {
    flags.iter_names().map(|(name, _)| name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd_proto::wire::{BlockSizes, ReplyMode};

    fn export() -> Negotiated {
        let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH;
        let mut export = Negotiated::new("disk", 1 << 20, flags, ReplyMode::Structured);
        export.meta_contexts = vec![(MetaContextId(3), MetaContextName::base_allocation())];
        export
    }

    fn changed(change: impl FnOnce(&mut Negotiated)) -> Negotiated {
        let mut export = export();
        change(&mut export);
        export
    }

    #[test]
    fn the_same_export_may_number_its_contexts_differently() {
        let other = changed(|export| {
            export.meta_contexts = vec![
                (MetaContextId(0), MetaContextName::qemu_allocation_depth()),
                (MetaContextId(9), MetaContextName::base_allocation()),
            ];
            export.flags |= TransmissionFlags::SEND_TRIM;
            export.reply_mode = ReplyMode::Extended;
        });
        assert_eq!(same_export(&export(), &other), Ok(vec![MetaContextId(9)]));
    }

    #[test]
    fn an_export_that_can_do_less_is_another_one() {
        let tight = BlockSizes::new(512, 4096, 1 << 20).unwrap();
        let cases = [
            ("size", changed(|export| export.size = 2 << 20)),
            ("read-only", changed(|export| export.flags |= TransmissionFlags::READ_ONLY)),
            ("SEND_FLUSH", changed(|export| export.flags = TransmissionFlags::HAS_FLAGS)),
            ("block size", changed(|export| export.block_sizes = tight)),
            ("replies", changed(|export| export.reply_mode = ReplyMode::Simple)),
            ("base:allocation", changed(|export| export.meta_contexts.clear())),
        ];
        for (word, other) in cases {
            let why = same_export(&export(), &other).expect_err(word);
            assert!(why.contains(word), "{why} does not say {word}");
        }
    }
}
