//! The side of the server that takes over.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nbd_proto::transmission::SavedConnection;
use nbd_server::{PausedConnection, PausedListener};
use rustix::net::sockopt;
use rustix::process::{Uid, geteuid};

use super::wire::{Kind, Message, decode_disk, decode_manager, decode_origin, receive, send};
use super::{ServiceManager, TakeoverError};
use crate::control::server::{DiskFiles, ServedDisks};
use crate::control::{Conversation, ErrorKind, Failure, Request};
use crate::error::{JobError, JobErrorKind};
use crate::text::{printable, without_error_numbers};

/// Time limit for each answer of the other server, which completes requests, and flushes and closes
/// its images meanwhile. It goes on if this is exceeded.
const TIME_TO_HAND_OVER: Duration = Duration::from_secs(120);

/// What was taken over, for [`nbd_server::Server::adopt`].
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct TakenOver {
    /// The listening sockets.
    pub listeners: Vec<PausedListener>,
    /// The connections.
    pub connections: Vec<PausedConnection>,
    /// The files of the disks of the other server, by the names of their exports.
    pub(crate) disks: BTreeMap<String, DiskFiles>,
    /// The service manager of the other server, if it has one.
    pub manager: Option<ServiceManager>,
    /// Its control socket, for
    /// [`ControlSocket::adopt`](crate::control::server::ControlSocket::adopt).
    pub control: Option<PausedListener>,
}

impl TakenOver {
    /// Gives the clients of an export without a name the default export of this server, if that has
    /// a name. Whether it is their disk is found out by the other checks, to be called later.
    ///
    /// # Errors
    ///
    /// If the other server has another disk of that name, or does not tell which disk a client
    /// uses.
    pub fn name_default(&mut self, exports: &[String]) -> Result<(), JobError> {
        let name_of = |it: &PausedConnection| it.state.negotiated.export_name.clone();
        let mut names = self.connections.iter().map(name_of);
        if let Some(unknown) = names.find(|name| !self.disks.contains_key(name)) {
            let message = format!("it does not tell which disk the export '{unknown}' is");
            return Err(not_the_same(Failure::new(ErrorKind::Failed, message)));
        }
        let Some(default) = exports.first() else { return Ok(()) };
        if exports.iter().any(String::is_empty) {
            return Ok(());
        }
        let Some(unnamed) = self.disks.remove("") else { return Ok(()) };
        if let Some(named) = self.disks.get(default) {
            unnamed.check_same("", named).map_err(not_the_same)?;
        }
        self.disks.insert(default.clone(), unnamed);
        for connection in &mut self.connections {
            let name = &mut connection.state.negotiated.export_name;
            if name.is_empty() {
                name.clone_from(default);
            }
        }
        Ok(())
    }

    /// Refuses files of these exports that have been renamed, removed or replaced since the other
    /// server closed them. To be called before anything is opened. Blocks.
    ///
    /// # Errors
    ///
    /// If there is one.
    pub fn check_names<'a>(
        &self,
        exports: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), JobError> {
        for name in exports {
            if let Some(files) = self.disks.get(name) {
                files.check_names(name).map_err(not_the_same)?;
            }
        }
        Ok(())
    }

    /// Refuses disks that are not those of the other server: its clients would go on with others.
    ///
    /// # Errors
    ///
    /// If there is one.
    pub fn check_same(&self, opened: &ServedDisks) -> Result<(), JobError> {
        let disks = self.disks.iter().map(|(name, files)| (&**name, files));
        opened.check_same(disks).map_err(not_the_same)
    }
}

fn not_the_same(failure: Failure) -> JobError {
    let message = format!("the running server was not taken over: {}; it goes on", failure.message);
    JobError::new(JobErrorKind::ControlSocket, message)
}

/// The server from which this one takes over. It goes on if this is dropped before
/// [`complete`](Self::complete).
#[derive(Debug)]
pub struct Predecessor {
    stream: UnixStream,
}

impl Predecessor {
    /// Asks the server with this control socket to hand over, and waits until it has: its images
    /// are closed then. Blocks, for at most two minutes between two of its answers.
    ///
    /// # Errors
    ///
    /// If no server listens or answers in time, or one of another user than this process's and
    /// root, who could have this process remove files and serve what it likes; or the server's
    /// reason not to hand over. It goes on then.
    pub fn begin(control: &Path) -> Result<(Self, TakenOver), JobError> {
        Self::begin_within(control, TIME_TO_HAND_OVER)
    }

    fn begin_within(control: &Path, limit: Duration) -> Result<(Self, TakenOver), JobError> {
        let mut conversation = Conversation::begin(control, limit)?;
        check_owner(conversation.stream(), control)?;
        conversation.call_before_descriptors(&Request::Takeover {})?;
        let limited = conversation.into_stream().and_then(|stream| {
            stream.set_read_timeout(Some(limit))?;
            stream.set_write_timeout(Some(limit))?;
            Ok(stream)
        });
        let stream = limited.map_err(|error| explained(&TakeoverError::Io(error)))?;
        let predecessor = Self { stream };
        match predecessor.receive_all() {
            Ok(taken) => Ok((predecessor, taken)),
            Err(error) => Err(explained(&error)),
        }
    }

    fn receive_all(&self) -> Result<TakenOver, TakeoverError> {
        let unexpected = |what| Err(TakeoverError::Unexpected { what });
        let mut taken = TakenOver::default();
        loop {
            let Some(Message { kind, payload, descriptor }) = receive(&self.stream)? else {
                return Err(TakeoverError::Gone);
            };
            match (kind, descriptor) {
                (Kind::Listener, Some(socket)) => match decode_origin(&payload) {
                    Some(origin) => taken.listeners.push(PausedListener { socket, origin }),
                    None => return unexpected("a listener of unknown origin"),
                },
                (Kind::Control, Some(socket)) => match decode_origin(&payload) {
                    Some(origin) => taken.control = Some(PausedListener { socket, origin }),
                    None => return unexpected("a control socket of unknown origin"),
                },
                (Kind::Connection, Some(socket)) => match SavedConnection::decode(&payload) {
                    Ok(state) => taken.connections.push(PausedConnection::new(socket, state)),
                    Err(_) => return unexpected("the state of a connection of another version"),
                },
                (Kind::Listener | Kind::Connection | Kind::Control, None) => {
                    return unexpected(
                        "a message whose socket cannot be opened here: raise the \
                                       limit of open files (ulimit -n)",
                    );
                }
                (Kind::Manager, _) => match decode_manager(&payload) {
                    Some(manager) => taken.manager = Some(manager),
                    None => return unexpected("a service manager of another version"),
                },
                (Kind::Disk, _) => match decode_disk(&payload) {
                    Some((name, files)) => drop(taken.disks.insert(name, files)),
                    None => return unexpected("a disk of another version"),
                },
                (Kind::Complete, _) => return Ok(taken),
                (Kind::Abandoned, _) => return Err(abandoned(&payload)),
                _ => return unexpected("a message out of turn"),
            }
        }
    }

    /// Returns the connection, which the other server takes for this process having something open:
    /// as long as it is not dropped either, that server does not go on.
    ///
    /// # Errors
    ///
    /// If there are too many open files.
    pub fn connection(&self) -> std::io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// Everything is open: the other server ends, and this one serves from now on. Blocks.
    ///
    /// # Errors
    ///
    /// If the other server goes on. Nothing that was taken over must be used then.
    pub fn complete(self) -> Result<(), JobError> {
        // An error means that the other server has ended. What it has said before is still read.
        let _ = send(&self.stream, Kind::Ready, &[], None);
        match receive(&self.stream) {
            Ok(Some(Message { kind: Kind::Abandoned, payload, .. })) => {
                Err(explained(&abandoned(&payload)))
            }
            Ok(Some(Message { kind: Kind::Go, .. })) => {
                let _ = send(&self.stream, Kind::Serving, &[], None);
                Ok(())
            }
            Ok(Some(_)) => {
                Err(explained(&TakeoverError::Unexpected { what: "a message out of turn" }))
            }
            // Nobody else has the images, or the connections.
            Ok(None) | Err(TakeoverError::Gone) => Ok(()),
            Err(error) => Err(explained(&error)),
        }
    }
}

/// Refuses a server of a user whom this process need not trust.
fn check_owner(stream: &UnixStream, control: &Path) -> Result<(), JobError> {
    let refused = |why: String| {
        let control = control.display();
        let message = format!("cannot take over from the server at '{control}': {why}");
        JobError::new(JobErrorKind::ControlSocket, message)
    };
    let credentials = sockopt::socket_peercred(stream);
    let owner = credentials.map_err(|error| refused(without_error_numbers(error.to_string())))?.uid;
    if is_trusted(owner, geteuid()) {
        return Ok(());
    }
    let owner = owner.as_raw();
    Err(refused(format!("it was started by user {owner}; start this program as that user")))
}

fn is_trusted(owner: Uid, own: Uid) -> bool {
    owner == own || owner.is_root()
}

fn abandoned(payload: &[u8]) -> TakeoverError {
    TakeoverError::Abandoned { reason: printable(&String::from_utf8_lossy(payload)) }
}

fn explained(error: &TakeoverError) -> JobError {
    let kind = JobErrorKind::ControlSocket;
    let goes_on = match error {
        TakeoverError::Gone => "",
        _ => "; it goes on",
    };
    JobError::new(kind, format!("the running server was not taken over: {error}{goes_on}"))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_server_of_another_user_than_root_is_not_trusted() {
        let [root, one, other] = [Uid::ROOT, Uid::from_raw(1000), Uid::from_raw(1001)];
        assert!(is_trusted(one, one) && is_trusted(root, one) && is_trusted(root, root));
        assert!(!is_trusted(other, one) && !is_trusted(one, root));
    }

    #[test]
    fn a_server_that_hangs_before_or_after_its_first_answer_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let control = directory.path().join("control");
        let listener = UnixListener::bind(&control).unwrap();
        for (answer, limit, words) in [
            ("", Duration::from_millis(200), "has not answered for 0.2 s; it may hang"),
            // Long enough for the answer to come in time.
            (
                "{\"result\":{}}\n",
                Duration::from_secs(3),
                "the other server did not answer in time",
            ),
        ] {
            let begin = || Predecessor::begin_within(&control, limit);
            let error = std::thread::scope(|scope| {
                let begun = scope.spawn(begin);
                let (mut server, _) = listener.accept().unwrap();
                server.write_all(answer.as_bytes()).unwrap();
                begun.join().unwrap().map(drop).unwrap_err().to_string()
            });
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_server_of_this_user_is_accepted() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        check_owner(&ours, "/run/control".as_ref()).unwrap();
    }
}
