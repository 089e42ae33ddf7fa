//! Backups of a disk in use: a checkpoint is started, copied and ended through the control socket.

use std::path::Path;
use std::time::Duration;

use imgfmt::Uuid;
use nbd_proto::NbdUri;
use serde_json::Value;

use super::chain::Base;
use super::job::{BackedUp, Issued, run};
use super::options::{BackupJob, UnknownBase};
use super::partial;
use crate::cancellation::Cancellation;
use crate::connect::ConnectOptions;
use crate::control::{
    CheckpointStarted, Conversation, IfMissing, IfUnusable, Lifetime, Listing, Outcome, Request,
};
use crate::error::{JobError, JobErrorKind};
use crate::observer::{JobContext, Observer};
use crate::tasks;
use crate::text::printable;

/// Time limit of each request of the control socket before the copy, unless the user gives one.
/// They may wait for those of others, and the server may flush the disk.
const PATIENCE: Duration = Duration::from_secs(300);

/// The control socket, the export of the disk, and the address of the server.
#[derive(Clone, Copy)]
pub(crate) struct Server<'a> {
    pub(crate) socket: &'a Path,
    pub(crate) export: &'a str,
    pub(crate) uri: Option<&'a NbdUri>,
}

/// Starts a checkpoint, copies it, and ends it with the result.
pub(super) async fn backup(
    work: BackupJob<'_>,
    server: Server<'_>,
    base: Option<&Base>,
) -> Result<BackedUp, JobError> {
    let export = server.export.to_owned();
    let options = work.options;
    let id = base.and_then(Base::id);
    let begin = Request::CheckpointStart {
        export: export.clone(),
        bitmap: options.bitmap.clone(),
        if_missing: if options.base.is_none() { IfMissing::Add } else { IfMissing::Fail },
        // A full backup does not need the recorded changes.
        if_unusable: match options.base {
            None => IfUnusable::Restart,
            Some(_) => IfUnusable::Fail,
        },
        view: None,
        base: id.map(|id| id.to_string()),
        trust_base: options.unknown_base == UnknownBase::Trust && id.is_some(),
        // If this process is killed, no other process ends the checkpoint.
        lifetime: Lifetime::Connection,
    };
    let mut socket = Socket::open(server.socket, &options.connect).await?;
    // Checked before the bitmap restarts.
    if let Some(base) = base {
        refuse_wrong(work, base, &export, &mut socket).await?;
    }
    let started = socket.call(begin).await?;
    let told = (&options.connect, &*work.context.observer, options.bitmap.as_deref());
    let result = match uri_of_view(told, server, started) {
        Ok((uri, issued)) => unless_cancelled(work, &uri, base, issued).await,
        Err(error) => Err(error),
    };
    let outcome = if result.is_ok() { Outcome::Success } else { Outcome::Failure };
    // A server that answers late would have ended the checkpoint of a backup that is then
    // discarded.
    socket.wait_without_limit();
    let ended = socket.call(Request::CheckpointEnd { export, outcome }).await;
    match (result, ended) {
        (Ok(_), Err(error)) => Err(error.in_words(format!(
            "'{}' may not be used: {error}; make another backup",
            work.target.display()
        ))),
        (Err(error), Err(second)) => {
            work.context.observer.warning(&format!(
                "the checkpoint could not be ended: {second}; end it with `nbd-cli control`"
            ));
            Err(error)
        }
        (result, Ok(_)) => result,
    }
}

/// Copies the view; cancelling the job abandons the copy as a whole.
async fn unless_cancelled(
    work: BackupJob<'_>,
    uri: &NbdUri,
    base: Option<&Base>,
    issued: Issued,
) -> Result<BackedUp, JobError> {
    let context = JobContext { cancellation: Cancellation::new(), ..work.context.clone() };
    let reason = tokio::select! {
        result = run(BackupJob { context: &context, ..work }, uri, base, issued) => return result,
        reason = work.context.cancellation.cancelled() => reason,
    };
    let ended = reason.in_words(format!("the backup of {uri} failed: {reason}"));
    Err(match work.is_on_device() {
        true => partial::lost(work.target, &ended),
        false => ended.in_words(format!("{ended}; begin again with --restart")),
    })
}

/// A control connection that blocks no task. If it is dropped, the server ends the checkpoint.
pub(crate) struct Socket(Option<Conversation>);

impl Socket {
    pub(crate) async fn open(path: &Path, connect: &ConnectOptions) -> Result<Self, JobError> {
        let (path, limit) = (path.to_owned(), connect.timeout.unwrap_or(PATIENCE));
        let opened = tasks::spawn_blocking(move || Conversation::begin(&path, limit)).await;
        opened.map_err(|error| JobError::given_up("request", &error))?.map(|it| Self(Some(it)))
    }

    pub(crate) fn wait_without_limit(&mut self) {
        if let Some(conversation) = &mut self.0 {
            conversation.set_limit(Duration::ZERO);
        }
    }

    pub(crate) async fn call(&mut self, request: Request) -> Result<Value, JobError> {
        let mut conversation = self.0.take().ok_or_else(|| {
            JobError::new(JobErrorKind::ControlSocket, "a request to the server was given up")
        })?;
        let asked = tasks::spawn_blocking(move || {
            let result = conversation.call(&request);
            (conversation, result)
        });
        let (conversation, result) =
            asked.await.map_err(|error| JobError::given_up("request", &error))?;
        self.0 = Some(conversation);
        result
    }
}

/// Returns the address of the view: at the named server, or as the server reports.
pub(crate) fn uri_of_view(
    (connect, observer, bitmap): (&ConnectOptions, &dyn Observer, Option<&str>),
    server: Server<'_>,
    started: Value,
) -> Result<(NbdUri, Issued), JobError> {
    let started: CheckpointStarted =
        serde_json::from_value(started).map_err(|_| not_understood())?;
    let uuid = |text: &Option<String>| text.as_deref().and_then(|text| text.parse().ok());
    let mut issued = Issued::ours()?;
    issued.backup = uuid(&started.backup).unwrap_or(issued.backup);
    issued.disk = uuid(&started.disk);
    if let Some(reason) = &started.restart_reason {
        let bitmap = printable(bitmap.unwrap_or_default());
        observer.warning(&format!(
            "the bitmap '{bitmap}' was unreliable ({}); it restarts with this backup",
            printable(reason)
        ));
    }
    if let Some(uri) = server.uri {
        let mut uri = uri.clone();
        uri.export_name = started.view;
        return Ok((uri, issued));
    }
    let uri = started.uris.first().ok_or_else(|| {
        JobError::new(
            JobErrorKind::ControlSocket,
            "the server does not say where it listens; give the disk's URI as well",
        )
    })?;
    let uri = uri.parse().map_err(|error| {
        JobError::new(
            JobErrorKind::ControlSocket,
            format!("the server says that it listens on '{uri}': {error}"),
        )
    })?;
    connect.tls.check([&uri])?;
    Ok((uri, issued))
}

/// Refuses a base that may be the wrong one, and one that is not the start of the bitmap, and names
/// the right one. The server refuses it too, but does not know the files.
async fn refuse_wrong(
    work: BackupJob<'_>,
    base: &Base,
    export: &str,
    socket: &mut Socket,
) -> Result<(), JobError> {
    let listing: Listing = serde_json::from_value(socket.call(Request::List {}).await?)
        .map_err(|_| not_understood())?;
    let bitmap = work.options.bitmap.as_deref().unwrap_or_default();
    let export = listing.exports.iter().find(|found| found.name == export);
    if let Some(export) = export {
        base.check(export.size, work)?;
    }
    let disk = export.and_then(|it| it.disk.as_deref()?.parse::<Uuid>().ok());
    if let (Some(disk), Some(own)) = (disk, base.disk())
        && disk != own
    {
        return Err(base.of_another_disk());
    }
    let found = export.and_then(|it| it.bitmaps.iter().find(|found| found["name"] == bitmap));
    let Some(found) = found else { return Ok(()) };
    let began_after = ["began-after", "perhaps-began-after"]
        .iter()
        .find_map(|field| found[field].as_str()?.parse::<Uuid>().ok());
    match (began_after, base.id()) {
        (Some(right), Some(id)) if right != id => Err(base.wrong(bitmap, right, work.target)),
        _ => Ok(()),
    }
}

pub(crate) fn not_understood() -> JobError {
    JobError::new(
        JobErrorKind::ControlSocket,
        "the server's reply cannot be understood; are both of one version?",
    )
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn the_end_of_a_checkpoint_is_waited_for_beyond_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        let limit = Duration::from_secs(1);
        let server = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut line = String::new();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
            std::thread::sleep(limit + limit / 2);
            stream.write_all(b"{\"result\":{}}\n").unwrap();
            line
        });
        let connect = ConnectOptions { timeout: Some(limit), ..ConnectOptions::default() };
        let mut socket = Socket::open(&path, &connect).await.unwrap();
        socket.wait_without_limit();
        let end = Request::CheckpointEnd { export: String::new(), outcome: Outcome::Success };
        socket.call(end).await.unwrap();
        assert!(server.join().unwrap().contains("checkpoint-end"));
    }
}
