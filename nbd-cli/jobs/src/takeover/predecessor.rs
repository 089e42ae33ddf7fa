//! The side of the server that is taken over.

use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nbd_server::{Paused, PausedListener};
use rustix::net::sockopt;

use super::wire::{Kind, encode_disk, encode_manager, encode_origin, receive, send};
use super::{ServiceManager, TakeoverError};
use crate::control::server::ClosedDisks;

/// Time for the successor to open everything. Clients wait meanwhile.
const TIME_TO_OPEN: Duration = Duration::from_secs(60);
/// Interval of log lines while a successor that is not wanted any more has not closed everything.
const BETWEEN_REPORTS: Duration = Duration::from_secs(30);

/// The program that takes over from this one. All methods block.
#[derive(Debug)]
pub struct Successor {
    stream: UnixStream,
}

impl Successor {
    /// The program at the other end of a connection to the control socket, which has requested the
    /// takeover.
    ///
    /// # Errors
    ///
    /// If the socket cannot be used.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(TIME_TO_OPEN))?;
        stream.set_write_timeout(Some(TIME_TO_OPEN))?;
        Ok(Self { stream })
    }

    /// Returns its process id.
    #[must_use]
    pub fn process_id(&self) -> Option<u32> {
        let credentials = sockopt::socket_peercred(&self.stream).ok()?;
        u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()
    }

    /// Hands everything over, also the listening socket `control`, and waits until the successor
    /// has opened its images. Those of this process are `closed` by now.
    ///
    /// # Errors
    ///
    /// [`TakeoverError`]: then [`abandon`](Self::abandon) it.
    pub fn hand_over(
        &self,
        paused: &Paused,
        closed: &ClosedDisks,
        manager: Option<&ServiceManager>,
        control: Option<&PausedListener>,
    ) -> Result<(), TakeoverError> {
        if let Some(manager) = manager {
            send(&self.stream, Kind::Manager, &encode_manager(manager), None)?;
        }
        for (name, files) in closed.files() {
            send(&self.stream, Kind::Disk, &encode_disk(name, files), None)?;
        }
        let listeners = paused.listeners.iter().map(|listener| (Kind::Listener, listener));
        for (kind, listener) in control.map(|it| (Kind::Control, it)).into_iter().chain(listeners) {
            let (origin, socket) = (encode_origin(&listener.origin), listener.socket.as_fd());
            send(&self.stream, kind, &origin, Some(socket))?;
        }
        for connection in &paused.connections {
            // One that has received too much is closed with this process.
            let Ok(state) = connection.state.encode() else { continue };
            send(&self.stream, Kind::Connection, &state, Some(connection.socket.as_fd()))?;
        }
        send(&self.stream, Kind::Complete, &[], None)?;
        self.expect(Kind::Ready)
    }

    /// Lets the successor serve. On return it does, and this process must neither use the
    /// connections nor open the images again.
    ///
    /// # Errors
    ///
    /// [`TakeoverError`] if the successor has ended before it served: then
    /// [`abandon`](Self::abandon) it.
    pub fn confirm(&self) -> Result<(), TakeoverError> {
        // Whatever it says or does not say, only its end tells that it does not serve.
        self.stream.set_read_timeout(None)?;
        send(&self.stream, Kind::Go, &[], None)?;
        self.expect(Kind::Serving)
    }

    /// Tells the successor that this process goes on, and waits until it has closed everything,
    /// however long that takes: until then it may use the images.
    pub fn abandon(self, reason: &str) {
        // One that is gone needs not be told.
        let _ = send(&self.stream, Kind::Abandoned, reason.as_bytes(), None);
        // If this fails, the wait is only not reported.
        let _ = self.stream.set_read_timeout(Some(BETWEEN_REPORTS));
        let mut ignored = [0; 4096];
        loop {
            match (&self.stream).read(&mut ignored) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let process = self.process_id();
                    tracing::warn!(
                        ?process,
                        "the program that was to take over does not end; this server cannot go on \
                         before it has"
                    );
                }
                // It has closed the connection without reading everything.
                Err(_) => return,
            }
        }
    }

    fn expect(&self, kind: Kind) -> Result<(), TakeoverError> {
        match receive(&self.stream)? {
            Some(message) if message.kind == kind => Ok(()),
            Some(_) => Err(TakeoverError::Unexpected { what: "a message out of turn" }),
            None => Err(TakeoverError::Gone),
        }
    }
}
