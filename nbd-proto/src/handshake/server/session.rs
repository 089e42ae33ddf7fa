//! The state of a connection during negotiation, and the options it allows.

use bytes::Bytes;

use super::config::{ServerConfig, TlsPolicy};
use crate::error::ProtocolError;
use crate::handshake::meta_context::Selection;
use crate::handshake::options;
use crate::limits::{MAX_OPTION_KEPT_LEN, MAX_OPTIONS_PER_HANDSHAKE, MAX_STRING_LEN};
use crate::wire::{ClientFlags, OptionHeader, OptionReplyType, OptionType, ReplyMode};

/// The negotiated state of the connection.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) config: ServerConfig,
    pub(super) client_flags: ClientFlags,
    pub(super) tls_established: bool,
    pub(super) reply_mode: ReplyMode,
    pub(super) selection: Option<Selection>,
    options_seen: u32,
}

impl Session {
    pub(super) const fn new(config: ServerConfig) -> Self {
        Self {
            config,
            client_flags: ClientFlags::empty(),
            tls_established: false,
            reply_mode: ReplyMode::Simple,
            selection: None,
            options_seen: 0,
        }
    }

    /// Drops all earlier state (section "TLS support"): an attacker could have negotiated it.
    pub(super) fn reset_for_tls(self) -> Self {
        Self { tls_established: true, reply_mode: ReplyMode::Simple, selection: None, ..self }
    }

    pub(super) fn count_option(&mut self) -> Result<(), ProtocolError> {
        self.options_seen = self.options_seen.saturating_add(1);
        if self.options_seen > MAX_OPTIONS_PER_HANDSHAKE {
            return Err(ProtocolError::TooLong {
                what: "options in one handshake",
                length: u64::from(self.options_seen),
                limit: u64::from(MAX_OPTIONS_PER_HANDSHAKE),
            });
        }
        Ok(())
    }

    pub(super) const fn is_tls_missing(&self) -> bool {
        matches!(self.config.tls, TlsPolicy::Require) && !self.tls_established
    }

    /// Checks a header before its payload has arrived. Returns the answer to send without reading
    /// the payload if the payload is too big to be kept.
    pub(super) fn unread_answer(
        &self,
        header: OptionHeader,
    ) -> Result<Option<OptionReplyType>, ProtocolError> {
        let length = header.length as usize;
        if header.option == OptionType::EXPORT_NAME {
            self.check_export_name_allowed()?;
            if length > MAX_STRING_LEN {
                return Err(ProtocolError::TooLong {
                    what: "export name",
                    length: u64::from(header.length),
                    limit: MAX_STRING_LEN as u64,
                });
            }
        } else if !self.client_flags.contains(ClientFlags::FIXED_NEWSTYLE) {
            return Err(ProtocolError::Unexpected {
                what: "an option other than EXPORT_NAME",
                why: "the client did not agree to fixed newstyle",
            });
        }
        if length <= MAX_OPTION_KEPT_LEN {
            return Ok(None);
        }
        Ok(Some(match header.option {
            option if self.is_tls_missing() && option != OptionType::STARTTLS => {
                OptionReplyType::ERR_TLS_REQD
            }
            OptionType::STARTTLS
            | OptionType::LIST
            | OptionType::STRUCTURED_REPLY
            | OptionType::EXTENDED_HEADERS => OptionReplyType::ERR_INVALID,
            OptionType::INFO
            | OptionType::GO
            | OptionType::LIST_META_CONTEXT
            | OptionType::SET_META_CONTEXT => OptionReplyType::ERR_TOO_BIG,
            _ => OptionReplyType::ERR_UNSUP,
        }))
    }

    /// EXPORT_NAME has no error reply, so these errors end the connection.
    fn check_export_name_allowed(&self) -> Result<(), ProtocolError> {
        let why = if self.is_tls_missing() {
            "this server requires TLS first"
        } else if self.reply_mode == ReplyMode::Extended {
            "extended headers require GO"
        } else {
            return Ok(());
        };
        Err(ProtocolError::Unexpected { what: "EXPORT_NAME", why })
    }

    pub(super) fn refusal_of_starttls(&self, payload: &Bytes) -> Option<options::Answer> {
        if self.tls_established {
            return Some((OptionReplyType::ERR_INVALID, "TLS is in use already"));
        }
        if self.config.tls == TlsPolicy::Off {
            return Some((OptionReplyType::ERR_POLICY, "TLS is not configured on this server"));
        }
        unwanted_payload(payload)
    }

    pub(super) fn grant_structured(&mut self, payload: &Bytes) -> Option<options::Answer> {
        if let Some(answer) = unwanted_payload(payload) {
            return Some(answer);
        }
        if self.config.best_reply_mode == ReplyMode::Simple {
            return Some((OptionReplyType::ERR_UNSUP, "structured replies are switched off"));
        }
        match self.reply_mode {
            ReplyMode::Simple => {
                self.reply_mode = ReplyMode::Structured;
                None
            }
            ReplyMode::Structured => {
                Some((OptionReplyType::ERR_INVALID, "structured replies are in use already"))
            }
            ReplyMode::Extended => {
                Some((OptionReplyType::ERR_EXT_HEADER_REQD, "extended headers are in use already"))
            }
        }
    }

    pub(super) fn grant_extended(&mut self, payload: &Bytes) -> Option<options::Answer> {
        if let Some(answer) = unwanted_payload(payload) {
            return Some(answer);
        }
        if self.config.best_reply_mode != ReplyMode::Extended {
            return Some((OptionReplyType::ERR_UNSUP, "extended headers are switched off"));
        }
        if self.reply_mode == ReplyMode::Extended {
            return Some((OptionReplyType::ERR_INVALID, "extended headers are in use already"));
        }
        self.reply_mode = ReplyMode::Extended;
        None
    }
}

pub(super) fn unwanted_payload(payload: &Bytes) -> Option<options::Answer> {
    (!payload.is_empty()).then_some((OptionReplyType::ERR_INVALID, "this option has no payload"))
}
