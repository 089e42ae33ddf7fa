//! SIGINT and SIGTERM.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::CommandError;

/// The signals that ask a program to end.
pub(crate) struct EndSignals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Option<Signal>,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EndSignal(i32);

impl EndSignal {
    /// Its number.
    pub(crate) fn number(self) -> i32 {
        self.0
    }

    /// The exit status of a program that it ended.
    pub(crate) fn exit_status(self) -> i32 {
        128 + self.0
    }
}

impl EndSignals {
    /// Begins to catch them; from here on they no longer end the process by themselves.
    pub(crate) fn new() -> Result<Self, CommandError> {
        let failed = |error: io::Error| CommandError::new(format!("cannot catch signals: {error}"));
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            hangup: None,
        })
    }

    /// Begins to catch SIGHUP as well.
    pub(crate) fn with_hangup(mut self) -> Result<Self, CommandError> {
        self.hangup = Some(
            signal(SignalKind::hangup())
                .map_err(|error| CommandError::new(format!("cannot catch signals: {error}")))?,
        );
        Ok(self)
    }

    /// Waits for the next one.
    ///
    /// # Cancel safety
    ///
    /// Safe: a signal that arrives while nobody waits is reported by the next call.
    pub(crate) async fn next(&mut self) -> EndSignal {
        let kind = tokio::select! {
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.terminate.recv() => SignalKind::terminate(),
            () = received(self.hangup.as_mut()) => SignalKind::hangup(),
        };
        EndSignal(kind.as_raw_value())
    }
}

async fn received(signal: Option<&mut Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}
