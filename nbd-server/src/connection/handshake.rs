//! The handshake: the machine of `nbd-proto` between the socket and the registry.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use nbd_proto::handshake::Negotiated;
use nbd_proto::handshake::RefusalReason;
use nbd_proto::handshake::server::{
    GoAnswer, Handshake, HandshakeStep, PendingTls, ServerConfig as Negotiation, TlsPolicy,
};

use super::socket::{Channel, More, Socket};
use super::turn::{REQUEST_COST, Thread, Turn};
use super::{ConnectionError, Shared};
use crate::ServerConfig;
use crate::export::{ExportEntry, ExportRegistry};
#[cfg(feature = "tls")]
use crate::tls::TlsMode;

/// Bytes read at a time.
const READ_LEN: usize = 16 * 1024;

/// Answers are sent when there are this many bytes of them.
const SEND_LEN: usize = 64 * 1024;
/// What an answer to an option takes, in bytes moved, for each of its bytes: they come from the registry.
const ANSWER_COST: usize = 8;

/// Options, as their cost, that are answered as fast as they come: more than any client needs but one that
/// asks about very many exports. Behind each such burst there is a pause, so that a flood of options takes
/// a small part of the thread only.
const BURST_COST: usize = 64 * REQUEST_COST;
const PAUSE: Duration = Duration::from_millis(1);
/// What a byte of an option costs to read and to refuse, in bytes moved.
const RECEIVED_COST: usize = 16;

/// A client that has chosen its export.
pub(super) struct Established {
    pub(super) socket: Socket,
    pub(super) negotiated: Negotiated,
    pub(super) entry: ExportEntry,
    /// What the client sent behind its last option: the first requests.
    pub(super) received: BytesMut,
}

/// Negotiates until the client has chosen an export; `None` if it left.
pub(super) async fn negotiate(
    mut socket: Socket,
    shared: &Shared,
    thread: &Thread,
) -> Result<Option<Established>, ConnectionError> {
    let mut turn = Turn::new(thread.clone());
    let mut burst = 0;
    let mut input = BytesMut::new();
    let mut output = BytesMut::new();
    let negotiation = Negotiation {
        tls: tls_policy(&shared.config),
        best_reply_mode: shared.config.best_reply_mode,
    };
    let mut handshake = Handshake::start(negotiation, &mut output);
    let exports = &shared.exports;
    loop {
        let step = handshake.advance(&mut input, &mut output);
        // What the machine said before it gave up still helps the client.
        let step = match step {
            Ok(HandshakeStep::NeedsInput(next)) => {
                // A turn is not kept while the client is waited for.
                turn.rest();
                send(&mut socket, &mut output).await?;
                handshake = next;
                let before = input.len();
                if !receive(&mut socket, &mut input).await? {
                    return Ok(None);
                }
                burst += (input.len() - before) * RECEIVED_COST;
                pause_after(&mut burst).await;
                continue;
            }
            Ok(HandshakeStep::StartTls(pending)) => {
                (handshake, socket) =
                    start_tls(pending, socket, &shared.config, (&mut input, &mut output)).await?;
                continue;
            }
            Ok(step) => step,
            Err(error) => {
                let _ = send(&mut socket, &mut output).await;
                return Err(error.into());
            }
        };
        let before = output.len();
        match answer(step, exports, socket.channel(), &mut output)? {
            Answered::Handshake(next) => {
                handshake = next;
                let length = output.len() - before;
                let cost = REQUEST_COST.saturating_add(length.saturating_mul(ANSWER_COST));
                turn.spend(cost);
                burst += cost;
                if turn.is_over() || burst >= BURST_COST || output.len() >= SEND_LEN {
                    turn.rest();
                    send(&mut socket, &mut output).await?;
                    pause_after(&mut burst).await;
                    turn.pass().await;
                }
            }
            Answered::Transmission(negotiated, entry) => {
                send(&mut socket, &mut output).await?;
                return Ok(Some(Established { socket, negotiated, entry, received: input }));
            }
            Answered::Aborted => {
                send(&mut socket, &mut output).await?;
                return Ok(None);
            }
        }
    }
}

/// Pauses if a burst of options is over.
async fn pause_after(burst: &mut usize) {
    if *burst >= BURST_COST {
        *burst = 0;
        tokio::time::sleep(PAUSE).await;
    }
}

enum Answered {
    Handshake(Handshake),
    Transmission(Negotiated, ExportEntry),
    Aborted,
}

const UNKNOWN: &str = "there is no export of this name";
const NEEDS_TLS: &str = "this export is served over TLS only";

/// Finds what a client asks for, unless it may not be told without TLS.
fn find(
    exports: &ExportRegistry,
    name: &str,
    channel: Channel,
) -> Result<(String, ExportEntry), (RefusalReason, &'static str)> {
    match exports.find(name) {
        Some((_, entry)) if entry.is_tls_required() && channel == Channel::Clear => {
            Err((RefusalReason::TlsRequired, NEEDS_TLS))
        }
        Some(found) => Ok(found),
        None => Err((RefusalReason::UnknownExport, UNKNOWN)),
    }
}

/// Answers one option from the registry.
fn answer(
    step: HandshakeStep,
    exports: &ExportRegistry,
    channel: Channel,
    out: &mut BytesMut,
) -> Result<Answered, ConnectionError> {
    let next = match step {
        HandshakeStep::NeedsInput(handshake) => handshake,
        HandshakeStep::Go(pending) => match find(exports, pending.export_name(), channel) {
            Ok((name, entry)) => match pending.accept(&entry.describe(&name), out) {
                GoAnswer::Transmission(negotiated) => {
                    return Ok(Answered::Transmission(*negotiated, entry));
                }
                GoAnswer::BlockSizesRequired(handshake) => handshake,
            },
            Err((reason, message)) => pending.reject(reason, message, out),
        },
        HandshakeStep::Info(pending) => match find(exports, pending.export_name(), channel) {
            Ok((name, entry)) => pending.accept(&entry.describe(&name), out),
            Err((reason, message)) => pending.reject(reason, message, out),
        },
        HandshakeStep::ExportName(pending) => match find(exports, pending.export_name(), channel) {
            Ok((name, entry)) => {
                let negotiated = pending.accept(&entry.describe(&name), out);
                return Ok(Answered::Transmission(negotiated, entry));
            }
            Err(_) => return Err(pending.reject().into()),
        },
        HandshakeStep::List(pending) => {
            pending.accept(&exports.listed(channel == Channel::Clear), out)
        }
        HandshakeStep::MetaContext(pending) => {
            match find(exports, pending.export_name(), channel) {
                Ok((_, entry)) => pending.accept(&entry.export().info().meta_contexts, out),
                // Where TLS is a choice, ERR_TLS_REQD answers INFO and GO only.
                Err((RefusalReason::TlsRequired, message)) => {
                    pending.reject(RefusalReason::Policy, message, out)
                }
                Err((reason, message)) => pending.reject(reason, message, out),
            }
        }
        HandshakeStep::StartTls(pending) => refuse_tls(pending, out),
        HandshakeStep::Aborted => return Ok(Answered::Aborted),
    };
    Ok(Answered::Handshake(next))
}

fn refuse_tls(pending: PendingTls, out: &mut BytesMut) -> Handshake {
    pending.reject(RefusalReason::Policy, "this server has no TLS credentials", out)
}

#[cfg(not(feature = "tls"))]
const fn tls_policy(_: &ServerConfig) -> TlsPolicy {
    TlsPolicy::Off
}

#[cfg(feature = "tls")]
const fn tls_policy(config: &ServerConfig) -> TlsPolicy {
    match config.tls {
        TlsMode::Off => TlsPolicy::Off,
        TlsMode::Allow(_) => TlsPolicy::Allow,
        TlsMode::Require(_) => TlsPolicy::Require,
    }
}

/// Answers STARTTLS and carries it out.
#[cfg(feature = "tls")]
async fn start_tls(
    pending: PendingTls,
    mut socket: Socket,
    config: &ServerConfig,
    buffers: (&mut BytesMut, &mut BytesMut),
) -> Result<(Handshake, Socket), ConnectionError> {
    let (input, output) = buffers;
    let Some(credentials) = config.tls.credentials() else {
        return Ok((refuse_tls(pending, output), socket));
    };
    // Fails if anything came in the clear behind STARTTLS.
    let before = pending.accept(input, output)?;
    send(&mut socket, output).await?;
    let (tls, identity) = super::tls::accept(socket, credentials).await?;
    tracing::info!(client = %identity, tls = tls.describe(), "TLS established");
    Ok((before.resume_after_tls(), Socket::Tls(Box::new(tls))))
}

#[cfg(not(feature = "tls"))]
async fn start_tls(
    pending: PendingTls,
    socket: Socket,
    _: &ServerConfig,
    buffers: (&mut BytesMut, &mut BytesMut),
) -> Result<(Handshake, Socket), ConnectionError> {
    Ok((refuse_tls(pending, buffers.1), socket))
}

async fn send(socket: &mut Socket, output: &mut BytesMut) -> io::Result<()> {
    while !output.is_empty() {
        let sent = poll_fn(|cx| socket.poll_send(cx, &[IoSlice::new(output)], More::No)).await?;
        output.advance(sent);
    }
    poll_fn(|cx| socket.poll_flush(cx)).await
}

/// Reads once; false at the end of the stream.
async fn receive(socket: &mut Socket, input: &mut BytesMut) -> io::Result<bool> {
    let before = input.len();
    input.resize(before + READ_LEN, 0);
    let read = poll_fn(|cx| socket.poll_read(cx, &mut input[before..])).await;
    input.truncate(before + *read.as_ref().unwrap_or(&0));
    Ok(read? > 0)
}
