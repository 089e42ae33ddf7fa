//! Reads the answer to one option.

use bytes::{Buf, BytesMut};

use super::answer::Answer;
use super::phase::OptionPhase;
use super::{checked_size, known_flags};
use crate::codec::{Reader, truncate_text};
use crate::error::ProtocolError;
use crate::handshake::meta_context::contexts_for;
use crate::handshake::{Negotiated, OptionError};
use crate::limits::{EXPORT_NAME_PADDING_LEN, MAX_OPTION_KEPT_LEN, MAX_STRING_LEN};
use crate::wire::{BlockSizes, ClientFlags, OptionReplyHeader, OptionReplyType, OptionType};

/// An option was sent; its answer is outstanding.
#[derive(Debug)]
pub struct Awaiting<A> {
    pub(super) phase: OptionPhase,
    pub(super) option: OptionType,
    pub(super) answer: A,
}

/// The progress of an option.
#[derive(Debug)]
#[must_use]
pub enum AwaitStep<A: Answer> {
    /// More bytes of the server are needed.
    NeedsInput(Awaiting<A>),
    /// The server agreed. The value holds its information and the next state.
    Accepted(A::Accepted),
    /// The server refused; the handshake can continue.
    Refused {
        /// The server's reason.
        error: OptionError,
        /// The handshake, ready for the next option.
        next: OptionPhase,
    },
}

impl<A: Answer> Awaiting<A> {
    /// Processes the bytes in `input`; complete replies are removed from its front.
    ///
    /// # Errors
    ///
    /// [`ProtocolError`] when the server breaks the protocol: close the connection.
    pub fn advance(mut self, input: &mut BytesMut) -> Result<AwaitStep<A>, ProtocolError> {
        loop {
            let Some(header) = OptionReplyHeader::decode(input)? else {
                return Ok(AwaitStep::NeedsInput(self));
            };
            if header.option != self.option {
                return Err(ProtocolError::Unexpected {
                    what: "an option reply",
                    why: "it answers an option that was not sent",
                });
            }
            let length = header.length as usize;
            if length > MAX_OPTION_KEPT_LEN {
                return Err(ProtocolError::TooLong {
                    what: "option reply payload",
                    length: u64::from(header.length),
                    limit: MAX_OPTION_KEPT_LEN as u64,
                });
            }
            if input.len() < OptionReplyHeader::LEN + length {
                return Ok(AwaitStep::NeedsInput(self));
            }
            input.advance(OptionReplyHeader::LEN);
            let payload = input.split_to(length);
            if header.reply == OptionReplyType::ACK {
                if !payload.is_empty() {
                    return Err(ProtocolError::Malformed {
                        what: "option acknowledgement",
                        why: "it has a payload",
                    });
                }
                return Ok(AwaitStep::Accepted(self.answer.accept(self.phase, input)?));
            }
            if header.reply.is_error() {
                let error = option_error(header.reply, &payload);
                return Ok(AwaitStep::Refused { error, next: self.phase });
            }
            self.answer.add(header.reply, &payload)?;
        }
    }
}

/// An error text is for display, so an invalid one is repaired, not refused.
fn option_error(reply: OptionReplyType, payload: &[u8]) -> OptionError {
    // Truncated before the repair, so that the repair is bounded.
    let kept = payload.get(..MAX_STRING_LEN).unwrap_or(payload);
    let message = String::from_utf8_lossy(kept);
    OptionError { reply, message: truncate_text(&message, MAX_STRING_LEN).to_owned() }
}

/// EXPORT_NAME was sent; its answer, which has no header, is outstanding.
#[derive(Debug)]
pub struct AwaitingExport {
    pub(super) phase: OptionPhase,
    pub(super) name: String,
}

/// The progress of EXPORT_NAME. A server refuses by closing the connection.
#[derive(Debug)]
#[must_use]
pub enum ExportStep {
    /// More bytes of the server are needed.
    NeedsInput(AwaitingExport),
    /// The handshake is complete.
    Transmission(Box<Negotiated>),
}

impl AwaitingExport {
    /// Processes the bytes in `input`.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::ExportTooLarge`].
    pub fn advance(self, input: &mut BytesMut) -> Result<ExportStep, ProtocolError> {
        let mut reader = Reader::new(input);
        let (Some(size), Some(flags)) = (reader.u64(), reader.u16()) else {
            return Ok(ExportStep::NeedsInput(self));
        };
        let size = checked_size(size)?;
        let padding = if self.phase.client_flags.contains(ClientFlags::NO_ZEROES) {
            0
        } else {
            EXPORT_NAME_PADDING_LEN
        };
        if reader.bytes(padding).is_none() {
            return Ok(ExportStep::NeedsInput(self));
        }
        input.advance(10 + padding);
        let reply_mode = self.phase.reply_mode;
        Ok(ExportStep::Transmission(Box::new(Negotiated {
            size,
            flags: known_flags(flags, reply_mode),
            block_sizes: BlockSizes::default(),
            reply_mode,
            meta_contexts: contexts_for(self.phase.selection, &self.name),
            export_name: self.name,
        })))
    }
}
