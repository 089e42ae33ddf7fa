//! SIGINT and SIGTERM: the first one lets the rounds in progress finish, the second one abandons
//! them.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::thread;

use anyhow::{Context as _, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The number of signals so far.
static SIGNALS: AtomicU8 = AtomicU8::new(0);

/// Whether no round may begin any more.
pub(super) fn is_ending() -> bool {
    SIGNALS.load(Ordering::Relaxed) > 0
}

/// Whether the rounds in progress are abandoned.
pub(super) fn is_immediate() -> bool {
    SIGNALS.load(Ordering::Relaxed) > 1
}

/// Handles the signals from now on.
///
/// # Errors
///
/// The system refuses.
pub(super) fn watch() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let signals = {
        let _runtime = runtime.enter();
        let kinds = [SignalKind::interrupt(), SignalKind::terminate()];
        kinds.into_iter().map(signal).collect::<std::io::Result<Vec<_>>>()
    };
    let mut signals = signals.context("cannot handle signals")?;
    thread::spawn(move || {
        runtime.block_on(async {
            loop {
                poll_fn(|cx| poll_any(&mut signals, cx)).await;
                match SIGNALS.fetch_add(1, Ordering::Relaxed) {
                    0 => println!(
                        "soak: interrupted; the rounds in progress finish, and a second signal \
                         abandons them"
                    ),
                    _ => {
                        SIGNALS.store(2, Ordering::Relaxed);
                        println!("soak: interrupted again; the rounds in progress are abandoned");
                    }
                }
            }
        });
    });
    Ok(())
}

fn poll_any(signals: &mut [Signal], cx: &mut Context<'_>) -> Poll<()> {
    match signals.iter_mut().any(|signal| signal.poll_recv(cx).is_ready()) {
        true => Poll::Ready(()),
        false => Poll::Pending,
    }
}
