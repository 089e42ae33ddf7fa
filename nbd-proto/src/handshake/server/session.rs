//! What a server knows about a connection that negotiates, and the rules for each option.

use bytes::{Bytes, BytesMut};

use super::pending::{
    InfoQuestion, MetaContextAction, PendingExportName, PendingGo, PendingInfo, PendingList,
    PendingMetaContext, PendingTls,
};
use super::{Handshake, HandshakeStep, ServerConfig, TlsPolicy, reply};
use crate::ProtocolError;
use crate::codec::protocol_string;
use crate::handshake::meta_context::{MetaContextQuestion, Selection};
use crate::handshake::{RefusalReason, options};
use crate::limits::{MAX_OPTION_KEPT_LEN, MAX_OPTIONS_PER_HANDSHAKE, MAX_STRING_LEN};
use crate::wire::{ClientFlags, OptionHeader, OptionReplyType, OptionType, ReplyMode};

/// What is known about the connection so far.
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

    /// STARTTLS drops all that came before it (section "TLS support"): an attacker could have
    /// negotiated it.
    pub(super) fn reset_for_tls(self) -> Self {
        Self { tls_established: true, reply_mode: ReplyMode::Simple, selection: None, ..self }
    }

    pub(super) fn refuse(
        self,
        option: OptionType,
        reason: RefusalReason,
        message: &str,
        out: &mut BytesMut,
    ) -> Handshake {
        reply::put_error(out, option, reason.reply_type(), message);
        Handshake::go_on(self)
    }
}

/// What became of one option.
pub(super) enum Handled {
    /// It is answered; look at the next one.
    Answered(Session),
    /// The driver has to do something.
    Step(HandshakeStep),
}

impl Session {
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

    const fn is_tls_missing(&self) -> bool {
        matches!(self.config.tls, TlsPolicy::Require) && !self.tls_established
    }

    /// Looks at a header before its payload is there: the answer to give without reading the
    /// payload, if it is too big to be kept.
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

    /// EXPORT_NAME cannot be told about an error, so these end the connection.
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

    pub(super) fn handle(
        mut self,
        option: OptionType,
        payload: Bytes,
        out: &mut BytesMut,
    ) -> Result<Handled, ProtocolError> {
        match option {
            OptionType::ABORT => {
                reply::put_ack(out, option);
                return Ok(Handled::Step(HandshakeStep::Aborted));
            }
            OptionType::EXPORT_NAME => {
                // The header was checked with `check_export_name_allowed`.
                let name = protocol_string("export name", &payload)?.to_owned();
                let pending = PendingExportName { session: self, name };
                return Ok(Handled::Step(HandshakeStep::ExportName(pending)));
            }
            _ => {}
        }
        let refusal = match option {
            OptionType::STARTTLS => self.refusal_of_starttls(&payload),
            _ if self.is_tls_missing() => {
                Some((OptionReplyType::ERR_TLS_REQD, "this server requires TLS first"))
            }
            OptionType::LIST => unwanted_payload(&payload),
            OptionType::STRUCTURED_REPLY => self.grant_structured(&payload),
            OptionType::EXTENDED_HEADERS => self.grant_extended(&payload),
            OptionType::INFO
            | OptionType::GO
            | OptionType::LIST_META_CONTEXT
            | OptionType::SET_META_CONTEXT => None,
            _ => Some((OptionReplyType::ERR_UNSUP, "this server does not know the option")),
        };
        if let Some((reply, message)) = refusal {
            reply::put_error(out, option, reply, message);
            return Ok(Handled::Answered(self));
        }
        Ok(self.ask(option, &payload, out))
    }

    /// Turns an option that is legal now into a question, or answers it.
    fn ask(mut self, option: OptionType, payload: &Bytes, out: &mut BytesMut) -> Handled {
        let step = match option {
            OptionType::STARTTLS => Ok(HandshakeStep::StartTls(PendingTls { session: self })),
            OptionType::LIST => Ok(HandshakeStep::List(PendingList { session: self })),
            OptionType::INFO => match InfoQuestion::parse(payload) {
                Ok(question) => Ok(HandshakeStep::Info(PendingInfo { session: self, question })),
                Err(answer) => Err((self, answer)),
            },
            OptionType::GO => match InfoQuestion::parse(payload) {
                Ok(question) => Ok(HandshakeStep::Go(PendingGo { session: self, question })),
                Err(answer) => Err((self, answer)),
            },
            OptionType::LIST_META_CONTEXT => self.ask_meta(MetaContextAction::List, payload),
            OptionType::SET_META_CONTEXT => {
                // Whatever becomes of this option, the former selection is gone.
                self.selection = None;
                self.ask_meta(MetaContextAction::Select, payload)
            }
            _ => {
                reply::put_ack(out, option);
                return Handled::Answered(self);
            }
        };
        match step {
            Ok(step) => Handled::Step(step),
            Err((session, (reply, message))) => {
                reply::put_error(out, option, reply, message);
                Handled::Answered(session)
            }
        }
    }

    fn ask_meta(
        self,
        action: MetaContextAction,
        payload: &Bytes,
    ) -> Result<HandshakeStep, (Self, options::Answer)> {
        if action == MetaContextAction::Select && self.reply_mode == ReplyMode::Simple {
            let message = "SET_META_CONTEXT needs STRUCTURED_REPLY or EXTENDED_HEADERS first";
            return Err((self, (OptionReplyType::ERR_INVALID, message)));
        }
        match MetaContextQuestion::parse(payload) {
            Ok(question) => {
                let pending = PendingMetaContext { session: self, action, question };
                Ok(HandshakeStep::MetaContext(pending))
            }
            Err(answer) => Err((self, answer)),
        }
    }

    fn refusal_of_starttls(&self, payload: &Bytes) -> Option<options::Answer> {
        if self.tls_established {
            return Some((OptionReplyType::ERR_INVALID, "TLS is in use already"));
        }
        if self.config.tls == TlsPolicy::Off {
            return Some((OptionReplyType::ERR_POLICY, "TLS is not configured on this server"));
        }
        unwanted_payload(payload)
    }

    fn grant_structured(&mut self, payload: &Bytes) -> Option<options::Answer> {
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

    fn grant_extended(&mut self, payload: &Bytes) -> Option<options::Answer> {
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

fn unwanted_payload(payload: &Bytes) -> Option<options::Answer> {
    (!payload.is_empty()).then_some((OptionReplyType::ERR_INVALID, "this option has no payload"))
}
