//! Turns settings into a connection that is ready for requests.

use std::sync::Arc;

use bytes::BytesMut;
use nbd_proto::handshake::client::{InfoRequest, OptionPhase};
use nbd_proto::handshake::{Negotiated, OptionError};
use nbd_proto::wire::{OptionReplyType, ReplyMode};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use crate::error::{Error, Result};
use crate::handshake::{Answered, Greeting, Tls, Wire};
use crate::info::{Details, Protocol};
use crate::settings::{Settings, Wanted};
use crate::stream::Stream;
use crate::tls::{Context, setup};
use crate::transport::Socket;

/// A connection that is ready for transmission.
#[derive(Debug)]
pub(crate) struct Established {
    pub(crate) stream: Stream,
    pub(crate) input: BytesMut,
    pub(crate) negotiated: Negotiated,
    pub(crate) details: Details,
}

/// Opens a socket to the server and performs the handshake.
pub(crate) async fn establish_at(settings: &Settings) -> Result<Established> {
    establish(dial(settings).await?, &settings.wanted).await
}

/// Like [`establish_at`], on the runtime that will drive the connection of that number: a socket
/// belongs to the runtime that opened it.
pub(crate) async fn establish_on_its_runtime(
    settings: &Settings,
    connection: usize,
) -> Result<Established> {
    let Some(runtime) = settings.runtime(connection) else {
        return establish_at(settings).await;
    };
    let settings = settings.clone();
    // A set, so that dropping this future ends the task.
    let mut task = JoinSet::new();
    task.spawn_on(async move { establish_at(&settings).await }, runtime);
    match task.join_next().await {
        Some(Ok(established)) => established,
        _ => Err(Error::Closed),
    }
}

/// Opens a socket to the server, within the time limit of the handshake.
pub(crate) async fn dial(settings: &Settings) -> Result<Wire> {
    let tls = load_tls(settings).await?;
    let (target, limit) = (settings.target(), settings.handshake_timeout);
    let deadline = Instant::now() + limit;
    match timeout_at(deadline, Socket::connect(&settings.uri.transport)).await {
        Ok(Ok(socket)) => {
            let stream = Stream::Plain(socket);
            Ok(Wire::new(stream, target, limit, tls).until(deadline))
        }
        Ok(Err(error)) => Err(Error::Connect { target, source: Arc::new(error) }),
        Err(_) => Err(Error::HandshakeTimeout { target, limit }),
    }
}

/// Reads the credentials, on a thread that may block.
pub(crate) async fn load_tls(settings: &Settings) -> Result<Option<Tls>> {
    let failed = |source| Error::Tls { target: settings.target(), source };
    let setup = setup(&settings.uri, settings.tls.as_ref(), settings.local_files);
    let Some(setup) = setup.map_err(failed)? else { return Ok(None) };
    let mode = setup.mode;
    let loading = tokio::task::spawn_blocking(move || Context::load(&setup));
    match loading.await {
        Ok(loaded) => Ok(Some(Tls { mode, context: loaded.map_err(failed)? })),
        Err(_) => Err(Error::Closed),
    }
}

/// Negotiates from the greeting to the transmission phase with everything the server supports: GO
/// falls back to EXPORT_NAME, extended headers to structured to simple replies.
pub(crate) async fn establish(mut wire: Wire, wanted: &Wanted) -> Result<Established> {
    let (negotiated, details) = match wire.greeting().await? {
        Greeting::Oldstyle(negotiated) => {
            if !wanted.export_name.is_empty() {
                let why = "it is an oldstyle server with one unnamed export; omit the name";
                return Err(wire.unsupported("exports with names", why));
            }
            (*negotiated, Details::unknown(Protocol::Oldstyle))
        }
        Greeting::Newstyle(phase) => newstyle(&mut wire, phase, wanted).await?,
    };
    let Negotiated { size, flags, reply_mode, meta_contexts, .. } = &negotiated;
    let contexts: Vec<_> = meta_contexts.iter().map(|(_, name)| name.as_str()).collect();
    tracing::debug!(target = &*wire.target, size, ?flags, ?reply_mode, ?contexts, "negotiated");
    Ok(Established { stream: wire.stream, input: wire.input, negotiated, details })
}

async fn newstyle(
    wire: &mut Wire,
    phase: OptionPhase,
    wanted: &Wanted,
) -> Result<(Negotiated, Details)> {
    let name = wanted.export_name.as_str();
    if !phase.is_fixed_newstyle() {
        let sent = phase.export_name(name, &mut wire.out);
        return Ok((wire.export(sent).await?, Details::unknown(Protocol::Newstyle)));
    }
    let mut phase = agree_on_replies(wire, phase, wanted.reply_mode).await?;
    if !wanted.meta_contexts.is_empty() && phase.reply_mode() != ReplyMode::Simple {
        let sent = phase.set_meta_context(name, &wanted.meta_contexts, &mut wire.out);
        phase = match wire.answer(sent).await? {
            Answered::Accepted((_, next)) => next,
            Answered::Refused(error, next) => {
                tracing::debug!(target = &*wire.target, %error, "no metadata contexts");
                next
            }
        };
    }
    let sent = phase.go(name, InfoRequest::ALL, &mut wire.out);
    match wire.answer(sent).await? {
        Answered::Accepted(accepted) => {
            let (negotiated, info) = *accepted;
            Ok((negotiated, Details::told(info)))
        }
        Answered::Refused(error, next)
            if error.reply == OptionReplyType::ERR_UNSUP
                && next.reply_mode() != ReplyMode::Extended =>
        {
            let sent = next.export_name(name, &mut wire.out);
            Ok((wire.export(sent).await?, Details::unknown(Protocol::NewstyleFixed)))
        }
        Answered::Refused(error, _) => Err(wire.refused(export_in_words(name), error)),
    }
}

/// Describes the export for an error message.
pub(crate) fn export_in_words(name: &str) -> String {
    if name.is_empty() { "the default export".to_owned() } else { format!("the export {name:?}") }
}

/// Negotiates the best form of replies up to `highest`.
pub(crate) async fn agree_on_replies(
    wire: &mut Wire,
    mut phase: OptionPhase,
    highest: ReplyMode,
) -> Result<OptionPhase> {
    if highest == ReplyMode::Extended {
        let sent = phase.extended_headers(&mut wire.out);
        phase = match wire.answer(sent).await? {
            Answered::Accepted(next) => return Ok(next),
            Answered::Refused(error, next) => next_unless_tls(wire, error, next)?,
        };
    }
    if highest >= ReplyMode::Structured {
        let sent = phase.structured_reply(&mut wire.out);
        phase = match wire.answer(sent).await? {
            Answered::Accepted(next) => next,
            Answered::Refused(error, next) => next_unless_tls(wire, error, next)?,
        };
    }
    Ok(phase)
}

fn next_unless_tls(wire: &Wire, error: OptionError, next: OptionPhase) -> Result<OptionPhase> {
    if error.reply == OptionReplyType::ERR_TLS_REQD {
        return Err(wire.refused("structured replies", error));
    }
    Ok(next)
}
