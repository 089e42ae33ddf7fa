//! Writes option replies.

use bytes::{BufMut, BytesMut};

use crate::codec::truncate_text;
use crate::handshake::ExportDescription;
use crate::limits::{MAX_ERROR_MESSAGE_LEN, MAX_STRING_LEN};
use crate::wire::{
    InfoType, MetaContextId, MetaContextName, OptionReplyHeader, OptionReplyType, OptionType,
    TransmissionFlags,
};

/// Appends a reply whose payload is the concatenation of `parts`. Every part is bounded by a string
/// limit, so the length always fits.
fn put_reply(out: &mut BytesMut, option: OptionType, reply: OptionReplyType, parts: &[&[u8]]) {
    let length = parts.iter().map(|part| part.len()).sum::<usize>() as u32;
    OptionReplyHeader { option, reply, length }.encode(out);
    for part in parts {
        out.put_slice(part);
    }
}

pub(super) fn put_ack(out: &mut BytesMut, option: OptionType) {
    put_reply(out, option, OptionReplyType::ACK, &[]);
}

/// Appends an error with a message, which is truncated and cleaned of NUL bytes.
pub(super) fn put_error(
    out: &mut BytesMut,
    option: OptionType,
    reply: OptionReplyType,
    message: &str,
) {
    let message = message.split('\0').next().unwrap_or("");
    let message = truncate_text(message, MAX_ERROR_MESSAGE_LEN);
    put_reply(out, option, reply, &[message.as_bytes()]);
}

pub(super) fn put_export(out: &mut BytesMut, name: &str, description: &str) {
    let length = (name.len() as u32).to_be_bytes();
    let description = truncate_text(description, MAX_STRING_LEN);
    let parts: [&[u8]; 3] = [&length, name.as_bytes(), description.as_bytes()];
    put_reply(out, OptionType::LIST, OptionReplyType::SERVER, &parts);
}

pub(super) fn put_meta_context(
    out: &mut BytesMut,
    option: OptionType,
    id: MetaContextId,
    name: &MetaContextName,
) {
    let parts: [&[u8]; 2] = [&id.0.to_be_bytes(), name.as_str().as_bytes()];
    put_reply(out, option, OptionReplyType::META_CONTEXT, &parts);
}

/// The optional items that a client requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct WantedInfo {
    pub(super) name: bool,
    pub(super) description: bool,
    pub(super) block_size: bool,
}

impl WantedInfo {
    /// Records one request; unknown ones are ignored (section "Option types", NBD_OPT_INFO).
    pub(super) const fn add(&mut self, info: InfoType) {
        match info {
            InfoType::NAME => self.name = true,
            InfoType::DESCRIPTION => self.description = true,
            InfoType::BLOCK_SIZE => self.block_size = true,
            _ => {}
        }
    }
}

/// Appends the information items of `export`: EXPORT and BLOCK_SIZE always, the strings on request.
pub(super) fn put_info(
    out: &mut BytesMut,
    option: OptionType,
    export: &ExportDescription,
    flags: TransmissionFlags,
    wanted: WantedInfo,
) {
    let mut put_item = |info: InfoType, content: &[u8]| {
        let parts: [&[u8]; 2] = [&info.0.to_be_bytes(), content];
        put_reply(out, option, OptionReplyType::INFO, &parts);
    };
    if wanted.name {
        put_item(InfoType::NAME, truncate_text(&export.name, MAX_STRING_LEN).as_bytes());
    }
    if let (true, Some(description)) = (wanted.description, &export.description) {
        put_item(InfoType::DESCRIPTION, truncate_text(description, MAX_STRING_LEN).as_bytes());
    }
    let told = if wanted.block_size { export.block_sizes } else { export.enforced_block_sizes() };
    let mut sizes = Vec::with_capacity(12);
    sizes.put_u32(told.minimum());
    sizes.put_u32(told.preferred());
    sizes.put_u32(told.maximum_payload());
    put_item(InfoType::BLOCK_SIZE, &sizes);
    let mut content = Vec::with_capacity(10);
    content.put_u64(export.size);
    content.put_u16(flags.bits());
    put_item(InfoType::EXPORT, &content);
}
