//! The server's handling of each option.

use bytes::{Bytes, BytesMut};

use super::pending::{
    InfoQuestion, MetaContextAction, PendingExportName, PendingGo, PendingInfo, PendingList,
    PendingMetaContext, PendingTls,
};
use super::reply;
use super::session::{Session, unwanted_payload};
use super::step::HandshakeStep;
use crate::codec::protocol_string;
use crate::error::ProtocolError;
use crate::handshake::meta_context::MetaContextQuestion;
use crate::handshake::options;
use crate::wire::{OptionReplyType, OptionType, ReplyMode};

/// The outcome of one option.
pub(super) enum Handled {
    /// The option is answered; continue with the next one.
    Answered(Session),
    /// The driver has to act.
    Step(HandshakeStep),
}

impl Session {
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

    /// Turns a legal option into a pending question, or answers it.
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
                // The previous selection is dropped, even if this option fails.
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
}
