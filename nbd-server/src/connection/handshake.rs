//! The handshake: the machine of `nbd-proto` between the socket and the registry.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::task::Poll;

use bytes::{Buf, BytesMut};
use nbd_proto::handshake::server::{
    GoAnswer, Handshake, HandshakeStep, PendingTls, ServerConfig as Negotiation, TlsPolicy,
};
use nbd_proto::handshake::{Negotiated, RefusalReason};
use nbd_proto::limits::MAX_OPTION_KEPT_LEN;
use tokio::sync::OwnedSemaphorePermit;

use super::catalog::{Catalog, Found, Granted};
use super::effort::Effort;
use super::error::ConnectionError;
#[cfg(feature = "tls")]
use super::error::TlsFailure;
use super::plain::{Channel, More};
use super::shared::Shared;
use super::socket::Socket;
use super::turn::{BARREN_COST, REQUEST_COST, Thread};
use crate::budget::Permit;
use crate::config::ServerConfig;
use crate::queue::GroupId;
#[cfg(feature = "tls")]
use crate::tls::TlsMode;

/// Bytes read at a time.
const READ_LEN: usize = 16 * 1024;

/// Answers are sent when there are this many bytes of them.
const SEND_LEN: usize = 64 * 1024;
/// The cost of each byte of an answer, in bytes moved: it comes from the registry.
const ANSWER_COST: usize = 8;
/// The cost of reading and refusing a byte of an option, in bytes moved.
const RECEIVED_COST: usize = 16;

/// Longer options are answered by the scheduler, and their memory comes from a budget. In bytes.
const SHORT_OPTION_LEN: usize = 64 * 1024;
/// Long options of all clients share one place in the scheduler's queue. No export has this name.
const LONG_OPTIONS: GroupId = 1;
/// The expected time for a long option, in nanoseconds.
const LONG_OPTION_TIME: u64 = 1_000_000;

/// A client that has chosen its export.
pub(super) struct Established {
    pub(super) socket: Socket,
    pub(super) negotiated: Negotiated,
    /// The export, and the client's place among the clients of it.
    pub(super) granted: Granted,
    /// The bytes after the client's last option: its first requests.
    pub(super) received: BytesMut,
    /// The number of bytes at the start that are the payload of a refused request.
    pub(super) discard: u64,
    /// Whether the client still has to be told that data may be lost.
    pub(super) owes_failure: bool,
}

impl Established {
    /// A client whose first request comes next.
    fn new(socket: Socket, negotiated: Negotiated, granted: Granted, received: BytesMut) -> Self {
        Self { socket, negotiated, granted, received, discard: 0, owes_failure: false }
    }
}

/// The received bytes and those to be sent.
#[derive(Default)]
struct Buffers {
    input: BytesMut,
    output: BytesMut,
    /// For the memory of a long option.
    long: Option<Permit>,
}

/// Negotiates until the client has chosen an export; `None` if it left. `ungreeted` is released
/// with the greeting.
pub(super) async fn negotiate(
    mut socket: Socket,
    mut ungreeted: Option<OwnedSemaphorePermit>,
    shared: &Shared,
    thread: &Thread,
) -> Result<Option<Established>, ConnectionError> {
    let mut effort = Effort::new(thread.clone(), shared.pauses.clone());
    let mut buffers = Buffers::default();
    let negotiation = Negotiation::new()
        .tls(tls_policy(&shared.config))
        .best_reply_mode(shared.config.best_reply_mode);
    let mut catalog = Catalog::for_client(&socket, shared)?;
    let mut handshake = Handshake::start(negotiation, &mut buffers.output);
    loop {
        let before = buffers.output.len();
        let step = advance_fairly(handshake, &mut buffers, shared, &catalog).await;
        // The answers from before the error still help the client.
        let step = match step {
            Ok(step) => step,
            Err(error) => {
                effort.rest();
                let _ = send(&mut socket, &mut buffers.output).await;
                return Err(error);
            }
        };
        match step {
            Step::NeedsInput(next) => {
                handshake = next;
                effort.rest();
                send(&mut socket, &mut buffers.output).await?;
                drop(ungreeted.take());
                buffers.make_room(shared)?;
                if !receive(&mut socket, &mut buffers.input, &mut effort).await? {
                    return Ok(None);
                }
                effort.next().await;
            }
            Step::StartTls(pending) => {
                effort.rest();
                let begun = start_tls(pending, socket, shared, &mut buffers, &mut catalog);
                (handshake, socket) = begun.await?;
                catalog.channel = socket.channel();
            }
            Step::Answered(next) => {
                handshake = next;
                let length = buffers.output.len() - before;
                effort.spend(REQUEST_COST.saturating_add(length.saturating_mul(ANSWER_COST)));
                if effort.is_over() || buffers.output.len() >= SEND_LEN {
                    effort.rest();
                    send(&mut socket, &mut buffers.output).await?;
                    effort.next().await;
                }
            }
            Step::Transmission(negotiated, granted) => {
                effort.rest();
                let Buffers { input: received, mut output, .. } = buffers;
                send(&mut socket, &mut output).await?;
                return Ok(Some(Established::new(socket, *negotiated, granted, received)));
            }
            Step::Aborted => {
                effort.rest();
                send(&mut socket, &mut buffers.output).await?;
                return Ok(None);
            }
        }
    }
}

impl Buffers {
    /// Called before receiving more: takes memory for a long option, or returns it.
    fn make_room(&mut self, shared: &Shared) -> Result<(), ConnectionError> {
        if self.input.len() <= SHORT_OPTION_LEN {
            if self.long.is_some() {
                self.input = BytesMut::from(&*self.input);
                self.long = None;
            }
        } else if self.long.is_none() {
            let permit = shared.options.try_take(MAX_OPTION_KEPT_LEN);
            self.long = Some(permit.ok_or(ConnectionError::LongOptions)?);
        }
        Ok(())
    }
}

/// The result of the next bytes of a client.
enum Step {
    NeedsInput(Handshake),
    StartTls(PendingTls),
    Answered(Handshake),
    Transmission(Box<Negotiated>, Granted),
    Aborted,
}

/// Processes received bytes, on the connection's thread if that is quick.
async fn advance_fairly(
    handshake: Handshake,
    buffers: &mut Buffers,
    shared: &Shared,
    catalog: &Catalog,
) -> Result<Step, ConnectionError> {
    if buffers.input.len() <= SHORT_OPTION_LEN {
        return advance(handshake, buffers, catalog);
    }
    let mut taken = std::mem::take(buffers);
    let catalog = catalog.clone();
    let work = move || {
        let step = advance(handshake, &mut taken, &catalog);
        (taken, step)
    };
    let done = shared.scheduler.compute(LONG_OPTIONS, LONG_OPTION_TIME, work).await;
    let (taken, step) = done.ok_or(ConnectionError::Panicked)?;
    *buffers = taken;
    step
}

fn advance(
    handshake: Handshake,
    buffers: &mut Buffers,
    catalog: &Catalog,
) -> Result<Step, ConnectionError> {
    let step = handshake.advance(&mut buffers.input, &mut buffers.output)?;
    answer(step, catalog, &mut buffers.output)
}

/// Answers one option from the registry, if possible.
fn answer(
    step: HandshakeStep,
    catalog: &Catalog,
    out: &mut BytesMut,
) -> Result<Step, ConnectionError> {
    let next = match step {
        HandshakeStep::NeedsInput(handshake) => return Ok(Step::NeedsInput(handshake)),
        HandshakeStep::Go(pending) => match catalog.grant(pending.export_name()) {
            Ok((description, granted)) => match pending.accept(&description, out) {
                GoAnswer::Transmission(negotiated) => {
                    return Ok(Step::Transmission(negotiated, granted));
                }
                GoAnswer::BlockSizesRequired(handshake) => handshake,
            },
            Err((reason, message)) => pending.reject(reason, message, out),
        },
        HandshakeStep::Info(pending) => match catalog.find(pending.export_name()) {
            Ok(found) => pending.accept(&found.describe(), out),
            Err((reason, message)) => pending.reject(reason, message, out),
        },
        HandshakeStep::ExportName(pending) => match catalog.grant(pending.export_name()) {
            Ok((description, granted)) => {
                let negotiated = pending.accept(&description, out);
                return Ok(Step::Transmission(Box::new(negotiated), granted));
            }
            Err(_) => return Err(pending.reject().into()),
        },
        HandshakeStep::List(pending) => {
            let is_clear = catalog.channel == Channel::Clear;
            pending.accept(&catalog.exports.listed(is_clear, &catalog.client), out)
        }
        HandshakeStep::MetaContext(pending) => {
            match catalog.find(pending.export_name()) {
                Ok(Found { entry, .. }) => {
                    pending.accept(&entry.export().info().meta_contexts, out)
                }
                // Where TLS is optional, ERR_TLS_REQD answers INFO and GO only.
                Err((RefusalReason::TlsRequired, message)) => {
                    pending.reject(RefusalReason::Policy, message, out)
                }
                Err((reason, message)) => pending.reject(reason, message, out),
            }
        }
        HandshakeStep::StartTls(pending) => return Ok(Step::StartTls(pending)),
        HandshakeStep::Aborted => return Ok(Step::Aborted),
    };
    Ok(Step::Answered(next))
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
    shared: &Shared,
    buffers: &mut Buffers,
    catalog: &mut Catalog,
) -> Result<(Handshake, Socket), ConnectionError> {
    let Buffers { input, output, .. } = buffers;
    let Some(credentials) = shared.config.tls.credentials() else {
        return Ok((refuse_tls(pending, output), socket));
    };
    // Fails if bytes arrived in the clear after STARTTLS.
    let before = pending.accept(input, output)?;
    send(&mut socket, output).await?;
    let Socket::Plain(socket) = socket else {
        let detail = "the connection is encrypted already".to_owned();
        return Err(TlsFailure::Handshake(detail).into());
    };
    let (tls, identity) = super::tls::accept(socket, credentials, &shared.scheduler).await?;
    tracing::info!(client = %identity, tls = tls.describe(), "TLS established");
    tracing::Span::current().record("tls", tracing::field::display(&identity));
    catalog.client.tls = Some(identity);
    shared.access.admit(&catalog.client).map_err(ConnectionError::Refused)?;
    Ok((before.resume_after_tls(), Socket::Tls(Box::new(tls))))
}

#[cfg(not(feature = "tls"))]
async fn start_tls(
    pending: PendingTls,
    socket: Socket,
    _: &Shared,
    buffers: &mut Buffers,
    _: &mut Catalog,
) -> Result<(Handshake, Socket), ConnectionError> {
    Ok((refuse_tls(pending, &mut buffers.output), socket))
}

async fn send(socket: &mut Socket, output: &mut BytesMut) -> io::Result<()> {
    while !output.is_empty() {
        let sent = poll_fn(|cx| socket.poll_send(cx, &[IoSlice::new(output)], More::No)).await?;
        output.advance(sent);
    }
    poll_fn(|cx| socket.poll_flush(cx)).await
}

/// Reads once; false at the end of the stream.
async fn receive(
    socket: &mut Socket,
    input: &mut BytesMut,
    effort: &mut Effort,
) -> io::Result<bool> {
    let before = input.len();
    loop {
        input.resize(before + READ_LEN, 0);
        let mut barren = 0;
        let read = poll_fn(|cx| {
            let read = socket.poll_read(cx, &mut input[before..]);
            barren = socket.take_barren();
            match read {
                Poll::Pending if barren > 0 => Poll::Ready(None),
                read => read.map(Some),
            }
        });
        let read = read.await.transpose();
        let length = read.as_ref().map_or(0, |read| read.unwrap_or(0));
        input.truncate(before + length);
        effort.spend(length * RECEIVED_COST + barren * BARREN_COST);
        if let Some(length) = read? {
            return Ok(length > 0);
        }
        effort.next().await;
        // The server waits for the client again.
        effort.rest();
    }
}
