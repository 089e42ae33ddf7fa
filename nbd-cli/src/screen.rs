//! The complete terminal as a display, which is restored on every exit.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::panic;
use std::sync::{Mutex, PoisonError};

use nbd_jobs::tasks;
use rustix::fs::OFlags;
use rustix::process::{Signal, getpid, kill_process};
use rustix::termios::{
    LocalModes, OptionalActions, QueueSelector, SpecialCodeIndex, Termios, tcflush, tcgetattr,
    tcgetwinsize, tcsetattr,
};

use crate::error::CommandError;

/// The alternate screen, without a cursor and without wrapping of long lines; and back.
const ENTER: &[u8] = b"\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J";
const LEAVE: &[u8] = b"\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l";

/// The terminal, and its modes before a display changed them. Empty when there is nothing to
/// restore.
static CHANGED: Mutex<Option<(File, Termios)>> = Mutex::new(None);

/// A display on the terminal, until it is dropped.
pub(crate) struct Screen {
    terminal: File,
}

impl Screen {
    /// Takes the terminal. A panic restores it before it prints its message.
    ///
    /// # Errors
    ///
    /// If the process has no terminal.
    pub(crate) fn open() -> Result<Self, CommandError> {
        let screen = Self { terminal: File::open("/dev/tty").map_err(|error| unusable(&error))? };
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            restore();
            report(panic);
        }));
        screen.enter()?;
        Ok(screen)
    }

    fn enter(&self) -> Result<(), CommandError> {
        let failed = |error: rustix::io::Errno| unusable(&error.into());
        let before = tcgetattr(&self.terminal).map_err(failed)?;
        let mut modes = before.clone();
        // Keys arrive at once and are not shown. Those that send signals still do.
        modes.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
        modes.special_codes[SpecialCodeIndex::VMIN] = 1;
        modes.special_codes[SpecialCodeIndex::VTIME] = 0;
        let kept = self.terminal.try_clone().map_err(|error| unusable(&error))?;
        *changed() = Some((kept, before));
        tcsetattr(&self.terminal, OptionalActions::Flush, &modes).map_err(failed)?;
        write(ENTER)
    }

    /// Returns columns and rows.
    pub(crate) fn size(&self) -> (usize, usize) {
        match tcgetwinsize(&self.terminal) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
                (usize::from(size.ws_col), usize::from(size.ws_row))
            }
            _ => (80, 24),
        }
    }

    /// Shows these lines, which contain no control characters but those of colours.
    pub(crate) fn draw(&self, lines: &[String]) -> Result<(), CommandError> {
        // All at once, so that nothing flickers. Old content is overwritten or cleared.
        let text = lines.join("\x1b[K\r\n");
        write(format!("\x1b[H{text}\x1b[K\x1b[J").as_bytes())
    }

    /// Calls `pressed` with each key, from a separate thread, while that returns true, and `gone`
    /// when the terminal is closed. Keys that send several bytes are ignored.
    pub(crate) fn read_keys(
        &self,
        pressed: impl Fn(u8) -> bool + Send + 'static,
        gone: impl FnOnce() + Send + 'static,
    ) -> Result<(), CommandError> {
        let mut terminal = self.terminal.try_clone().map_err(|error| unusable(&error))?;
        let thread = tasks::start_thread("keys", move || {
            let mut keys = [0; 64];
            loop {
                match terminal.read(&mut keys) {
                    Ok(0) => break,
                    Ok(count) if !plain_keys(&keys[..count]).all(&pressed) => return,
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            gone();
        });
        thread.map(drop).map_err(|error| unusable(&error))
    }

    /// Restores the terminal, stops the process as SIGTSTP does, and takes the terminal again when
    /// it is continued.
    pub(crate) fn stop(&self) -> Result<(), CommandError> {
        restore();
        kill_process(getpid(), Signal::STOP).map_err(|error| unusable(&error.into()))?;
        self.enter()
    }
}

/// Returns the keys that are one byte each, without the sequences of the others.
fn plain_keys(bytes: &[u8]) -> impl Iterator<Item = u8> + '_ {
    let mut rest = bytes.iter().copied();
    std::iter::from_fn(move || {
        loop {
            let key = rest.next()?;
            if key != 0x1b {
                return Some(key);
            }
            // ESC and a character, or ESC [ or ESC O with parameters and a letter.
            if rest.next().is_some_and(|kind| matches!(kind, b'[' | b'O')) {
                rest.find(|byte| (0x40..0x7f).contains(byte));
            }
        }
    })
}

impl Drop for Screen {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if restore_modes() {
        // A closed terminal needs no restoring.
        let _ = write(LEAVE);
    }
}

/// Restores the terminal without waiting for it, even if another thread waits for its output (after
/// Ctrl-S). The display may then remain visible.
pub(crate) fn restore_at_once() {
    restore_modes();
    let mut options = OpenOptions::new();
    options.write(true).custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32);
    // A terminal that accepts no output is left unchanged.
    let _ = options.open("/dev/tty").and_then(|mut terminal| terminal.write_all(LEAVE));
}

/// Returns whether there was something to restore. The lock is not held while anything waits.
fn restore_modes() -> bool {
    let taken = changed().take();
    if let Some((terminal, before)) = &taken {
        // Unread keys are dropped. Neither call waits for output.
        let _ = tcflush(terminal, QueueSelector::IFlush);
        let _ = tcsetattr(terminal, OptionalActions::Now, before);
    }
    taken.is_some()
}

fn changed() -> std::sync::MutexGuard<'static, Option<(File, Termios)>> {
    CHANGED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write(bytes: &[u8]) -> Result<(), CommandError> {
    let mut output = io::stdout().lock();
    let written = output.write_all(bytes).and_then(|()| output.flush());
    written.map_err(|error| CommandError::output(&error))
}

fn unusable(error: &io::Error) -> CommandError {
    CommandError::new(format!(
        "cannot use the terminal: {error}; give --once or --json to print the numbers"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_send_several_bytes_are_left_out() {
        for (bytes, keys) in [
            (&b"sq"[..], &b"sq"[..]),
            (b"\x1b[As", b"s"),
            (b"\x1bOPq\x1b[15;2~p", b"qp"),
            (b"\x1bq\x1b", b""),
            (b"\x1b[", b""),
        ] {
            assert_eq!(plain_keys(bytes).collect::<Vec<_>>(), keys);
        }
    }
}
