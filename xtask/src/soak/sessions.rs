//! Clients of a disk, above which everything happens that a server can go through: it is killed,
//! ended, taken over and reconfigured, and its image is streamed into, resized and given snapshots.
//! Backups by its bitmap are the disk, whatever has happened since the one before.

mod events;
mod session;

use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use self::session::Session;
use super::judge::{Judge, Round};
use super::random::Random;
use super::stage::Stage;

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
