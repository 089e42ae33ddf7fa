//! The options that a client sends.

use bytes::{BufMut, BytesMut};

use super::answer::{
    Abort, Answer, ExtendedHeaders, Go, Info, List, ListMetaContext, SetMetaContext, StartTls,
    StructuredReply,
};
use super::awaiting::{Awaiting, AwaitingExport};
use super::phase::{OptionPhase, check_string};
use crate::error::ApiMisuse;
use crate::limits::MAX_META_CONTEXTS;
use crate::wire::{InfoType, MetaContextName, OptionHeader, OptionType, ReplyMode};

/// The information that INFO and GO request besides size and flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct InfoRequest {
    /// The canonical name.
    pub name: bool,
    /// The description.
    pub description: bool,
    /// The block size constraints. A client that requests them promises to obey them (section "Size
    /// constraints").
    pub block_size: bool,
}

impl Default for InfoRequest {
    /// Requests the information that transmission needs: the block sizes.
    fn default() -> Self {
        Self { name: false, description: false, block_size: true }
    }
}

impl InfoRequest {
    /// All information.
    pub const ALL: Self = Self { name: true, description: true, block_size: true };

    fn items(self) -> impl Iterator<Item = InfoType> {
        [
            (self.name, InfoType::NAME),
            (self.description, InfoType::DESCRIPTION),
            (self.block_size, InfoType::BLOCK_SIZE),
        ]
        .into_iter()
        .filter_map(|(wanted, info)| wanted.then_some(info))
    }
}

impl OptionPhase {
    /// Requests TLS (NBD_OPT_STARTTLS).
    ///
    /// # Errors
    ///
    /// [`ApiMisuse::NotNegotiated`] if the server is not fixed newstyle, as for every method here.
    pub fn start_tls(self, out: &mut BytesMut) -> Result<Awaiting<StartTls>, ApiMisuse> {
        self.send(OptionType::STARTTLS, StartTls::default(), &[], out)
    }

    /// Requests extended headers (NBD_OPT_EXTENDED_HEADERS).
    ///
    /// # Errors
    ///
    /// As for [`OptionPhase::start_tls`].
    pub fn extended_headers(
        self,
        out: &mut BytesMut,
    ) -> Result<Awaiting<ExtendedHeaders>, ApiMisuse> {
        self.send(OptionType::EXTENDED_HEADERS, ExtendedHeaders::default(), &[], out)
    }

    /// Requests structured replies (NBD_OPT_STRUCTURED_REPLY).
    ///
    /// # Errors
    ///
    /// As for [`OptionPhase::start_tls`].
    pub fn structured_reply(
        self,
        out: &mut BytesMut,
    ) -> Result<Awaiting<StructuredReply>, ApiMisuse> {
        self.send(OptionType::STRUCTURED_REPLY, StructuredReply::default(), &[], out)
    }

    /// Requests the names of all exports (NBD_OPT_LIST).
    ///
    /// # Errors
    ///
    /// As for [`OptionPhase::start_tls`].
    pub fn list(self, out: &mut BytesMut) -> Result<Awaiting<List>, ApiMisuse> {
        self.send(OptionType::LIST, List::default(), &[], out)
    }

    /// Requests information about an export without using it (NBD_OPT_INFO).
    ///
    /// # Errors
    ///
    /// As for [`OptionPhase::start_tls`], and [`ApiMisuse::BadString`] for the name.
    pub fn info(
        self,
        name: &str,
        request: InfoRequest,
        out: &mut BytesMut,
    ) -> Result<Awaiting<Info>, ApiMisuse> {
        let payload = info_payload(name, request)?;
        self.send(OptionType::INFO, Info::default(), &payload, out)
    }

    /// Requests an export and, if the server agrees, begins transmission (NBD_OPT_GO). A server
    /// that answers ERR_UNSUP may still support [`OptionPhase::export_name`].
    ///
    /// # Errors
    ///
    /// As for [`OptionPhase::info`].
    pub fn go(
        self,
        name: &str,
        request: InfoRequest,
        out: &mut BytesMut,
    ) -> Result<Awaiting<Go>, ApiMisuse> {
        let payload = info_payload(name, request)?;
        self.send(OptionType::GO, Go::new(name), &payload, out)
    }

    /// Requests the metadata contexts of an export (NBD_OPT_LIST_META_CONTEXT). A query is a full
    /// name or a wildcard such as `qemu:`; an empty list of queries requests all contexts.
    ///
    /// # Errors
    ///
    /// As for [`OptionPhase::info`], [`ApiMisuse::BadString`] also for a query.
    pub fn list_meta_context(
        self,
        name: &str,
        queries: &[&str],
        out: &mut BytesMut,
    ) -> Result<Awaiting<ListMetaContext>, ApiMisuse> {
        let payload = meta_payload(name, queries)?;
        self.send(OptionType::LIST_META_CONTEXT, ListMetaContext::default(), &payload, out)
    }

    /// Selects metadata contexts of an export and replaces the previous selection
    /// (NBD_OPT_SET_META_CONTEXT). The selection takes effect if [`OptionPhase::go`] names the same
    /// export.
    ///
    /// # Errors
    ///
    /// As for [`OptionPhase::info`]; [`ApiMisuse::NotNegotiated`] also without structured replies
    /// or extended headers.
    pub fn set_meta_context(
        mut self,
        name: &str,
        contexts: &[MetaContextName],
        out: &mut BytesMut,
    ) -> Result<Awaiting<SetMetaContext>, ApiMisuse> {
        if self.reply_mode == ReplyMode::Simple {
            return Err(ApiMisuse::NotNegotiated {
                what: "metadata contexts (they need structured replies)",
            });
        }
        // A server may answer a duplicate once or twice; none is sent.
        let mut queries: Vec<&str> = Vec::with_capacity(contexts.len());
        for context in contexts {
            if !queries.contains(&context.as_str()) {
                queries.push(context.as_str());
            }
        }
        let payload = meta_payload(name, &queries)?;
        self.selection = None;
        let answer = SetMetaContext::new(name, &queries);
        self.send(OptionType::SET_META_CONTEXT, answer, &payload, out)
    }

    /// Requests an export with the oldest option, which every newstyle server supports
    /// (NBD_OPT_EXPORT_NAME). A server refuses by closing the connection.
    ///
    /// # Errors
    ///
    /// [`ApiMisuse::BadString`] for the name; [`ApiMisuse::NotNegotiated`] after extended headers.
    pub fn export_name(self, name: &str, out: &mut BytesMut) -> Result<AwaitingExport, ApiMisuse> {
        Self::check_export_name(name)?;
        if self.reply_mode == ReplyMode::Extended {
            return Err(ApiMisuse::NotNegotiated {
                what: "EXPORT_NAME together with extended headers",
            });
        }
        put_option(OptionType::EXPORT_NAME, name.as_bytes(), out);
        Ok(AwaitingExport { phase: self, name: name.to_owned() })
    }

    /// Ends the handshake (NBD_OPT_ABORT). Some servers close without an answer.
    ///
    /// # Errors
    ///
    /// As for [`OptionPhase::start_tls`].
    pub fn abort(self, out: &mut BytesMut) -> Result<Awaiting<Abort>, ApiMisuse> {
        self.send(OptionType::ABORT, Abort::default(), &[], out)
    }

    fn send<A: Answer>(
        self,
        option: OptionType,
        answer: A,
        payload: &[u8],
        out: &mut BytesMut,
    ) -> Result<Awaiting<A>, ApiMisuse> {
        if !self.is_fixed_newstyle() {
            return Err(ApiMisuse::NotNegotiated { what: "options other than EXPORT_NAME" });
        }
        put_option(option, payload, out);
        Ok(Awaiting { phase: self, option, answer })
    }
}

/// Appends one option. Payloads consist of checked strings, so they are far below 4 GiB.
fn put_option(option: OptionType, payload: &[u8], out: &mut BytesMut) {
    OptionHeader { option, length: payload.len() as u32 }.encode(out);
    out.put_slice(payload);
}

fn put_name(name: &str, payload: &mut Vec<u8>) -> Result<(), ApiMisuse> {
    OptionPhase::check_export_name(name)?;
    payload.put_u32(name.len() as u32);
    payload.put_slice(name.as_bytes());
    Ok(())
}

fn info_payload(name: &str, request: InfoRequest) -> Result<Vec<u8>, ApiMisuse> {
    let mut payload = Vec::with_capacity(name.len() + 12);
    put_name(name, &mut payload)?;
    payload.put_u16(request.items().count() as u16);
    for info in request.items() {
        payload.put_u16(info.0);
    }
    Ok(payload)
}

fn meta_payload(name: &str, queries: &[&str]) -> Result<Vec<u8>, ApiMisuse> {
    let mut payload = Vec::new();
    put_name(name, &mut payload)?;
    if queries.len() > MAX_META_CONTEXTS {
        return Err(ApiMisuse::TooLong {
            length: queries.len() as u64,
            limit: MAX_META_CONTEXTS as u64,
        });
    }
    payload.put_u32(queries.len() as u32);
    for query in queries {
        check_string("the metadata context query", query)?;
        payload.put_u32(query.len() as u32);
        payload.put_slice(query.as_bytes());
    }
    Ok(payload)
}
