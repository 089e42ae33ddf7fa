//! The answers to LIST_META_CONTEXT and SET_META_CONTEXT.

use std::collections::HashSet;

use bytes::BytesMut;

use super::sealed::Sealed;
use super::{Answer, check_count, unexpected};
use crate::codec::{Reader, protocol_string};
use crate::error::ProtocolError;
use crate::handshake::client::phase::OptionPhase;
use crate::handshake::meta_context::Selection;
use crate::limits::MAX_META_CONTEXTS;
use crate::wire::{MetaContextId, MetaContextName, OptionReplyType};

/// The answer to LIST_META_CONTEXT: names in the server's order. Names that cannot be selected
/// (such as the abbreviation `base:`) are left out.
#[derive(Debug, Default)]
pub struct ListMetaContext {
    replies: usize,
    names: Vec<MetaContextName>,
}

impl Sealed for ListMetaContext {}

impl Answer for ListMetaContext {
    type Accepted = (Vec<MetaContextName>, OptionPhase);

    fn add(&mut self, reply: OptionReplyType, payload: &[u8]) -> Result<(), ProtocolError> {
        let (_, text) = meta_context_item(reply, payload)?;
        check_count("listed metadata contexts", self.replies, MAX_META_CONTEXTS)?;
        self.replies += 1;
        if let Ok(name) = MetaContextName::new(text)
            && !self.names.contains(&name)
        {
            self.names.push(name);
        }
        Ok(())
    }

    fn accept(self, phase: OptionPhase, _: &BytesMut) -> Result<Self::Accepted, ProtocolError> {
        Ok((self.names, phase))
    }
}

/// The answer to SET_META_CONTEXT: the selected contexts in the server's order.
#[derive(Debug)]
pub struct SetMetaContext {
    export_name: String,
    asked: HashSet<String>,
    contexts: Vec<(MetaContextId, MetaContextName)>,
}

impl SetMetaContext {
    pub(in crate::handshake::client) fn new(export_name: &str, asked: &[&str]) -> Self {
        Self {
            export_name: export_name.to_owned(),
            asked: asked.iter().map(|query| (*query).to_owned()).collect(),
            contexts: Vec::new(),
        }
    }
}

impl Sealed for SetMetaContext {}

impl Answer for SetMetaContext {
    type Accepted = (Vec<(MetaContextId, MetaContextName)>, OptionPhase);

    fn add(&mut self, reply: OptionReplyType, payload: &[u8]) -> Result<(), ProtocolError> {
        let (id, text) = meta_context_item(reply, payload)?;
        // Removed, so that a second answer with this name is refused. That also bounds the number
        // of answers by the number of queries.
        if !self.asked.remove(text) {
            return Err(ProtocolError::Malformed {
                what: "answer to SET_META_CONTEXT",
                why: "it selects a context that was not requested, or one twice",
            });
        }
        if self.contexts.iter().any(|(other, _)| *other == id) {
            return Err(ProtocolError::Malformed {
                what: "answer to SET_META_CONTEXT",
                why: "it gives two contexts the same identifier",
            });
        }
        self.contexts.push((id, MetaContextName::new(text)?));
        Ok(())
    }

    fn accept(self, phase: OptionPhase, _: &BytesMut) -> Result<Self::Accepted, ProtocolError> {
        let contexts = self.contexts.clone();
        let selection = Selection { export_name: self.export_name, contexts: self.contexts };
        Ok((contexts, OptionPhase { selection: Some(selection), ..phase }))
    }
}

fn meta_context_item(
    reply: OptionReplyType,
    payload: &[u8],
) -> Result<(MetaContextId, &str), ProtocolError> {
    if reply != OptionReplyType::META_CONTEXT {
        return Err(unexpected(reply));
    }
    let mut reader = Reader::new(payload);
    let id = reader.u32().ok_or(ProtocolError::Malformed {
        what: "metadata context reply",
        why: "it is shorter than its identifier",
    })?;
    Ok((MetaContextId(id), protocol_string("metadata context name", reader.rest())?))
}
