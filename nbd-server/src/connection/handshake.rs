//! The handshake: the machine of `nbd-proto` between the socket and the registry.

use std::future::poll_fn;
use std::io::{self, IoSlice};

use bytes::{Buf, BytesMut};
use nbd_proto::handshake::Negotiated;
use nbd_proto::handshake::RefusalReason;
use nbd_proto::handshake::server::{
    GoAnswer, Handshake, HandshakeStep, ServerConfig as Negotiation, TlsPolicy,
};

use super::socket::{More, Socket};
use super::{ConnectionError, Shared};
use crate::export::{ExportEntry, ExportRegistry};

/// Bytes read at a time.
const READ_LEN: usize = 16 * 1024;

/// A client that has chosen its export.
pub(super) struct Established {
    pub(super) negotiated: Negotiated,
    pub(super) entry: ExportEntry,
    /// What the client sent behind its last option: the first requests.
    pub(super) received: BytesMut,
}

/// Negotiates until the client has chosen an export; `None` if it left.
pub(super) async fn negotiate(
    socket: &mut Socket,
    shared: &Shared,
) -> Result<Option<Established>, ConnectionError> {
    let mut input = BytesMut::new();
    let mut output = BytesMut::new();
    let negotiation =
        Negotiation { tls: TlsPolicy::Off, best_reply_mode: shared.config.best_reply_mode };
    let mut handshake = Handshake::start(negotiation, &mut output);
    let exports = &shared.exports;
    loop {
        let step = handshake.advance(&mut input, &mut output);
        // What the machine said before it gave up still helps the client.
        let step = match step {
            Ok(HandshakeStep::NeedsInput(next)) => {
                send(socket, &mut output).await?;
                handshake = next;
                if !receive(socket, &mut input).await? {
                    return Ok(None);
                }
                continue;
            }
            Ok(step) => step,
            Err(error) => {
                let _ = send(socket, &mut output).await;
                return Err(error.into());
            }
        };
        match answer(step, exports, &mut output)? {
            Answered::Handshake(next) => handshake = next,
            Answered::Transmission(negotiated, entry) => {
                send(socket, &mut output).await?;
                return Ok(Some(Established { negotiated, entry, received: input }));
            }
            Answered::Aborted => {
                send(socket, &mut output).await?;
                return Ok(None);
            }
        }
    }
}

enum Answered {
    Handshake(Handshake),
    Transmission(Negotiated, ExportEntry),
    Aborted,
}

const UNKNOWN: &str = "there is no export of this name";

/// Answers one option from the registry.
fn answer(
    step: HandshakeStep,
    exports: &ExportRegistry,
    out: &mut BytesMut,
) -> Result<Answered, ConnectionError> {
    let next = match step {
        HandshakeStep::NeedsInput(handshake) => handshake,
        HandshakeStep::Go(pending) => match exports.find(pending.export_name()) {
            Some((name, entry)) => match pending.accept(&entry.describe(&name), out) {
                GoAnswer::Transmission(negotiated) => {
                    return Ok(Answered::Transmission(*negotiated, entry));
                }
                GoAnswer::BlockSizesRequired(handshake) => handshake,
            },
            None => pending.reject(RefusalReason::UnknownExport, UNKNOWN, out),
        },
        HandshakeStep::Info(pending) => match exports.find(pending.export_name()) {
            Some((name, entry)) => pending.accept(&entry.describe(&name), out),
            None => pending.reject(RefusalReason::UnknownExport, UNKNOWN, out),
        },
        HandshakeStep::ExportName(pending) => match exports.find(pending.export_name()) {
            Some((name, entry)) => {
                let negotiated = pending.accept(&entry.describe(&name), out);
                return Ok(Answered::Transmission(negotiated, entry));
            }
            None => return Err(pending.reject().into()),
        },
        HandshakeStep::List(pending) => pending.accept(&exports.listed(), out),
        HandshakeStep::MetaContext(pending) => match exports.find(pending.export_name()) {
            Some((_, entry)) => pending.accept(&entry.export().info().meta_contexts, out),
            None => pending.reject(RefusalReason::UnknownExport, UNKNOWN, out),
        },
        HandshakeStep::StartTls(pending) => {
            pending.reject(RefusalReason::Policy, "this server has no TLS credentials", out)
        }
        HandshakeStep::Aborted => return Ok(Answered::Aborted),
    };
    Ok(Answered::Handshake(next))
}

async fn send(socket: &Socket, output: &mut BytesMut) -> io::Result<()> {
    while !output.is_empty() {
        let sent = poll_fn(|cx| socket.poll_send(cx, &[IoSlice::new(output)], More::No)).await?;
        output.advance(sent);
    }
    Ok(())
}

/// Reads once; false at the end of the stream.
async fn receive(socket: &mut Socket, input: &mut BytesMut) -> io::Result<bool> {
    let before = input.len();
    input.resize(before + READ_LEN, 0);
    let read = poll_fn(|cx| socket.poll_read(cx, &mut input[before..])).await;
    input.truncate(before + *read.as_ref().unwrap_or(&0));
    Ok(read? > 0)
}
