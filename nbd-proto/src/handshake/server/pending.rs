//! Options that need an answer from the owner of the exports, the caller. Each value is one
//! question; the answer consumes it and returns the handshake.

use bytes::{BufMut, Bytes, BytesMut};

use super::machine::Handshake;
use super::reply::{self, WantedInfo};
use super::session::Session;
use crate::codec::Reader;
use crate::error::ProtocolError;
use crate::handshake::meta_context::{self, MetaContextQuestion, Selection, contexts_for};
use crate::handshake::{ExportDescription, ListedExport, Negotiated, RefusalReason};
use crate::limits::{EXPORT_NAME_PADDING_LEN, MAX_META_CONTEXTS, MAX_STRING_LEN};
use crate::wire::{
    ClientFlags, InfoType, MetaContextName, OptionReplyType, OptionType, TransmissionFlags,
};

/// Ends the handshake with the negotiated values.
fn negotiated(session: Session, name: String, export: &ExportDescription) -> Negotiated {
    Negotiated {
        size: export.size,
        flags: transmission_flags(&session, &name, export),
        meta_contexts: contexts_for(session.selection, &name),
        export_name: name,
        block_sizes: export.enforced_block_sizes(),
        reply_mode: session.reply_mode,
    }
}

/// The flags at the start of the transmission phase: a block status payload is offered only to a
/// client that has selected contexts (section "Transmission flags").
fn transmission_flags(
    session: &Session,
    name: &str,
    export: &ExportDescription,
) -> TransmissionFlags {
    let mut flags = export.flags_in(session.reply_mode);
    let selected = session
        .selection
        .as_ref()
        .is_some_and(|selection| selection.export_name == name && !selection.contexts.is_empty());
    if !selected {
        flags.remove(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
    }
    flags
}

/// The payload of INFO and GO.
///
/// ```text
/// | name length u32 | name | number of requests u16 | request u16 | ...
/// ```
#[derive(Debug)]
pub(super) struct InfoQuestion {
    name: String,
    wanted: WantedInfo,
}

impl InfoQuestion {
    pub(super) fn parse(payload: &Bytes) -> Result<Self, (OptionReplyType, &'static str)> {
        const INVALID: OptionReplyType = OptionReplyType::ERR_INVALID;
        let mut reader = Reader::new(payload);
        let name = meta_context::export_name(&mut reader)?;
        let count =
            reader.u16().ok_or((INVALID, "the option has no number of information requests"))?;
        if reader.rest().len() != usize::from(count) * 2 {
            return Err((INVALID, "the number of information requests does not fit the length"));
        }
        let mut wanted = WantedInfo::default();
        while let Some(info) = reader.u16() {
            wanted.add(InfoType(info));
        }
        Ok(Self { name, wanted })
    }

    /// Writes the items. Returns true if the client has to request block sizes first and was told
    /// so.
    fn answer(
        &self,
        option: OptionType,
        session: &Session,
        export: &ExportDescription,
        out: &mut BytesMut,
    ) -> bool {
        let flags = if option == OptionType::GO {
            transmission_flags(session, &self.name, export)
        } else {
            export.flags_in(session.reply_mode)
        };
        reply::put_info(out, option, export, flags, self.wanted);
        let refused = export.enforced_block_sizes().minimum() > 1 && !self.wanted.block_size;
        if refused {
            let message = "this export has a minimum block size: ask for BLOCK_SIZE and obey it";
            reply::put_error(out, option, OptionReplyType::ERR_BLOCK_SIZE_REQD, message);
        } else {
            reply::put_ack(out, option);
        }
        refused
    }
}

/// The outcome of a GO that the server accepted.
#[derive(Debug)]
pub enum GoAnswer {
    /// The handshake is complete.
    Transmission(Box<Negotiated>),
    /// The client did not request block sizes, which this export requires. It was answered with
    /// ERR_BLOCK_SIZE_REQD and may try again.
    BlockSizesRequired(Handshake),
}

/// A GO that needs an answer (section "Option types", NBD_OPT_GO).
#[derive(Debug)]
pub struct PendingGo {
    pub(super) session: Session,
    pub(super) question: InfoQuestion,
}

impl PendingGo {
    /// Returns the name of the requested export; empty means the default export.
    #[must_use]
    pub fn export_name(&self) -> &str {
        &self.question.name
    }

    /// Sends the description of the export and, unless block sizes have to be requested first, ends
    /// the handshake.
    #[must_use]
    pub fn accept(self, export: &ExportDescription, out: &mut BytesMut) -> GoAnswer {
        if self.question.answer(OptionType::GO, &self.session, export, out) {
            return GoAnswer::BlockSizesRequired(Handshake::go_on(self.session));
        }
        GoAnswer::Transmission(Box::new(negotiated(self.session, self.question.name, export)))
    }

    /// Refuses; the handshake continues.
    #[must_use]
    pub fn reject(self, reason: RefusalReason, message: &str, out: &mut BytesMut) -> Handshake {
        Handshake::refuse(self.session, OptionType::GO, reason, message, out)
    }
}

/// An INFO that needs an answer (section "Option types", NBD_OPT_INFO).
#[derive(Debug)]
pub struct PendingInfo {
    pub(super) session: Session,
    pub(super) question: InfoQuestion,
}

impl PendingInfo {
    /// Returns the name of the requested export; empty means the default export.
    #[must_use]
    pub fn export_name(&self) -> &str {
        &self.question.name
    }

    /// Sends the description of the export; the handshake continues.
    #[must_use]
    pub fn accept(self, export: &ExportDescription, out: &mut BytesMut) -> Handshake {
        self.question.answer(OptionType::INFO, &self.session, export, out);
        Handshake::go_on(self.session)
    }

    /// Refuses; the handshake continues.
    #[must_use]
    pub fn reject(self, reason: RefusalReason, message: &str, out: &mut BytesMut) -> Handshake {
        Handshake::refuse(self.session, OptionType::INFO, reason, message, out)
    }
}

/// An EXPORT_NAME that needs an answer (section "Option types", NBD_OPT_EXPORT_NAME).
///
/// The option cannot report an error: to refuse it, drop this value and close the connection.
#[derive(Debug)]
pub struct PendingExportName {
    pub(super) session: Session,
    pub(super) name: String,
}

impl PendingExportName {
    /// Returns the name of the requested export; empty means the default export.
    #[must_use]
    pub fn export_name(&self) -> &str {
        &self.name
    }

    /// Sends the description of the export and ends the handshake.
    #[must_use]
    pub fn accept(self, export: &ExportDescription, out: &mut BytesMut) -> Negotiated {
        out.put_u64(export.size);
        out.put_u16(transmission_flags(&self.session, &self.name, export).bits());
        if !self.session.client_flags.contains(ClientFlags::NO_ZEROES) {
            out.put_bytes(0, EXPORT_NAME_PADDING_LEN);
        }
        negotiated(self.session, self.name, export)
    }

    /// Refuses by consuming the value: EXPORT_NAME has no error reply. Returns the reason for the
    /// server's log. Close the connection.
    #[must_use]
    pub fn reject(self) -> ProtocolError {
        ProtocolError::Unexpected {
            what: "EXPORT_NAME",
            why: "the export is refused, and EXPORT_NAME has no error reply",
        }
    }
}

/// A LIST that needs an answer (section "Option types", NBD_OPT_LIST).
#[derive(Debug)]
pub struct PendingList {
    pub(super) session: Session,
}

impl PendingList {
    /// Lists `exports`. Names that the protocol cannot express (over 4096 bytes, or with a NUL
    /// byte) are left out: no client could request them.
    #[must_use]
    pub fn accept<'a>(
        self,
        exports: impl IntoIterator<Item = &'a ListedExport>,
        out: &mut BytesMut,
    ) -> Handshake {
        for export in exports {
            if export.name.len() <= MAX_STRING_LEN && !export.name.contains('\0') {
                reply::put_export(out, &export.name, &export.description);
            }
        }
        reply::put_ack(out, OptionType::LIST);
        Handshake::go_on(self.session)
    }

    /// Refuses; the handshake continues.
    #[must_use]
    pub fn reject(self, reason: RefusalReason, message: &str, out: &mut BytesMut) -> Handshake {
        Handshake::refuse(self.session, OptionType::LIST, reason, message, out)
    }
}

/// The purpose of a metadata context option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetaContextAction {
    /// LIST_META_CONTEXT: list the available contexts.
    List,
    /// SET_META_CONTEXT: select contexts for the transmission phase.
    Select,
}

/// A LIST_META_CONTEXT or SET_META_CONTEXT that needs an answer (section "Metadata querying").
#[derive(Debug)]
pub struct PendingMetaContext {
    pub(super) session: Session,
    pub(super) action: MetaContextAction,
    pub(super) question: MetaContextQuestion,
}

impl PendingMetaContext {
    /// Returns the name of the export in question; empty means the default export.
    #[must_use]
    pub fn export_name(&self) -> &str {
        &self.question.export_name
    }

    /// Returns whether the option lists or selects.
    #[must_use]
    pub const fn action(&self) -> MetaContextAction {
        self.action
    }

    const fn option(&self) -> OptionType {
        match self.action {
            MetaContextAction::List => OptionType::LIST_META_CONTEXT,
            MetaContextAction::Select => OptionType::SET_META_CONTEXT,
        }
    }

    /// Matches the queries with `available`, all contexts of the export in its own order, and
    /// answers. A selection of more than [`MAX_META_CONTEXTS`] contexts is refused; a list is
    /// truncated there.
    #[must_use]
    pub fn accept(mut self, available: &[MetaContextName], out: &mut BytesMut) -> Handshake {
        let option = self.option();
        match self.action {
            MetaContextAction::List => {
                let listed = self.question.listed(available);
                for (id, name) in listed.into_iter().take(MAX_META_CONTEXTS) {
                    reply::put_meta_context(out, option, id, name);
                }
            }
            MetaContextAction::Select => {
                let contexts = self.question.selected(available);
                if contexts.len() > MAX_META_CONTEXTS {
                    return self.reject(RefusalReason::TooBig, "too many contexts selected", out);
                }
                for (id, name) in &contexts {
                    reply::put_meta_context(out, option, *id, name);
                }
                let export_name = self.question.export_name;
                self.session.selection = Some(Selection { export_name, contexts });
            }
        }
        reply::put_ack(out, option);
        Handshake::go_on(self.session)
    }

    /// Refuses; the handshake continues and no context is selected.
    #[must_use]
    pub fn reject(self, reason: RefusalReason, message: &str, out: &mut BytesMut) -> Handshake {
        let option = self.option();
        Handshake::refuse(self.session, option, reason, message, out)
    }
}

/// A STARTTLS that needs an answer (section "TLS support").
#[derive(Debug)]
pub struct PendingTls {
    pub(super) session: Session,
}

impl PendingTls {
    /// Accepts. `input` is the driver's buffer of bytes received and not yet consumed.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::Unexpected`] if there are bytes in `input`: they arrived in the clear after
    /// STARTTLS, when a client waits and only an attacker in the middle writes. Close the
    /// connection.
    pub fn accept(self, input: &BytesMut, out: &mut BytesMut) -> Result<BeforeTls, ProtocolError> {
        if !input.is_empty() {
            return Err(ProtocolError::Unexpected {
                what: "data in the clear",
                why: "it follows STARTTLS and could have been injected",
            });
        }
        reply::put_ack(out, OptionType::STARTTLS);
        Ok(BeforeTls { session: self.session })
    }

    /// Refuses; the handshake continues in the clear.
    #[must_use]
    pub fn reject(self, reason: RefusalReason, message: &str, out: &mut BytesMut) -> Handshake {
        Handshake::refuse(self.session, OptionType::STARTTLS, reason, message, out)
    }
}

/// The state between the answer to STARTTLS and the end of the TLS handshake. Send the output
/// buffer, perform the TLS handshake on the bare socket, and continue with a **new, empty** input
/// buffer.
#[derive(Debug)]
pub struct BeforeTls {
    session: Session,
}

impl BeforeTls {
    /// Continues after the TLS handshake. Everything negotiated in the clear is forgotten, except
    /// for the client flags, which are not negotiated again.
    #[must_use]
    pub fn resume_after_tls(self) -> Handshake {
        Handshake::go_on(self.session.reset_for_tls())
    }
}
