//! The report about a server, in the shape and order of nbdinfo's.

use nbd_client::{ExportInfo, ServerInfo};
use nbd_proto::NbdUri;
use nbd_proto::uri::Security;
use nbd_proto::wire::{ReplyMode, TransmissionFlags};
use serde::Serialize;

use crate::error::CommandError;
use crate::output::{Output, printable};
use crate::size::exact;

/// A server; the order of the fields is the order of the keys.
#[derive(Debug, Serialize)]
pub(in crate::commands) struct ServerReport {
    protocol: &'static str,
    #[serde(rename = "TLS")]
    tls: bool,
    structured: bool,
    extended: bool,
    pub(super) exports: Vec<ExportReport>,
}

/// An export; keys that do not apply are left out.
#[derive(Debug, Serialize)]
pub(super) struct ExportReport {
    #[serde(rename = "export-name")]
    pub(super) name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) content: Option<&'static str>,
    uri: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    contexts: Vec<String>,
    #[serde(flatten)]
    abilities: Abilities,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    block_sizes: Option<BlockSizesReport>,
    #[serde(rename = "export-size")]
    size: u64,
    #[serde(rename = "export-size-str")]
    size_text: String,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Abilities {
    is_rotational: bool,
    is_read_only: bool,
    can_block_status_payload: bool,
    can_cache: bool,
    can_df: bool,
    can_fast_zero: bool,
    can_flush: bool,
    can_fua: bool,
    can_multi_conn: bool,
    can_trim: bool,
    can_zero: bool,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct BlockSizesReport {
    #[serde(rename = "block_size_minimum")]
    minimum: u32,
    #[serde(rename = "block_size_preferred")]
    preferred: u32,
    #[serde(rename = "block_size_maximum")]
    maximum_payload: u32,
}

impl ServerReport {
    pub(in crate::commands) fn new(server: &ServerInfo, uri: &NbdUri) -> Self {
        let mut uri = uri.clone();
        if server.tls {
            uri.security = Security::Tls;
        }
        Self {
            protocol: server.protocol.as_str(),
            tls: server.tls,
            structured: server.reply_mode != ReplyMode::Simple,
            extended: server.reply_mode == ReplyMode::Extended,
            exports: server.exports.iter().map(|export| ExportReport::new(export, &uri)).collect(),
        }
    }

    /// The protocol, for display.
    pub(in crate::commands) fn protocol(&self) -> String {
        let tls = if self.tls { "with TLS" } else { "without TLS" };
        let packets = match (self.extended, self.structured) {
            (true, _) => "extended",
            (false, true) => "structured",
            (false, false) => "simple",
        };
        format!("{} {tls}, using {packets} packets", self.protocol)
    }

    /// The capabilities and properties of the exports, in the words of nbdinfo without `can_` and
    /// `is_`.
    pub(in crate::commands) fn abilities(&self) -> Vec<&'static str> {
        let named = self.exports.iter().flat_map(|export| export.abilities.named());
        let bare = |name: &'static str| name.split_once('_').map_or(name, |(_, rest)| rest);
        named.filter(|(_, value)| *value).map(|(name, _)| bare(name)).collect()
    }

    /// The metadata contexts of the exports.
    pub(in crate::commands) fn contexts(&self) -> impl Iterator<Item = &str> {
        self.exports.iter().flat_map(|export| export.contexts.iter().map(String::as_str))
    }

    /// Writes the report in the format of nbdinfo.
    pub(super) fn write_text(&self, output: &mut Output) -> Result<(), CommandError> {
        output.line(&format!("protocol: {}", self.protocol()))?;
        self.exports.iter().try_for_each(|export| export.write_text(output))
    }
}

impl ExportReport {
    fn new(export: &ExportInfo, server: &NbdUri) -> Self {
        let has = |flag| export.flags.contains(flag);
        let mut uri = server.clone();
        uri.export_name.clone_from(&export.name);
        Self {
            name: export.name.clone(),
            description: export.description.clone(),
            content: None,
            uri: uri.to_string(),
            contexts: export.meta_contexts.iter().map(ToString::to_string).collect(),
            abilities: Abilities {
                is_rotational: has(TransmissionFlags::ROTATIONAL),
                is_read_only: has(TransmissionFlags::READ_ONLY),
                can_block_status_payload: has(TransmissionFlags::BLOCK_STATUS_PAYLOAD),
                can_cache: has(TransmissionFlags::SEND_CACHE),
                can_df: has(TransmissionFlags::SEND_DF),
                can_fast_zero: has(TransmissionFlags::SEND_FAST_ZERO),
                can_flush: has(TransmissionFlags::SEND_FLUSH),
                can_fua: has(TransmissionFlags::SEND_FUA),
                can_multi_conn: has(TransmissionFlags::CAN_MULTI_CONN),
                can_trim: has(TransmissionFlags::SEND_TRIM),
                can_zero: has(TransmissionFlags::SEND_WRITE_ZEROES),
            },
            block_sizes: export.block_sizes.map(|sizes| BlockSizesReport {
                minimum: sizes.minimum(),
                preferred: sizes.preferred(),
                maximum_payload: sizes.maximum_payload(),
            }),
            size: export.size,
            size_text: exact(export.size),
        }
    }

    fn write_text(&self, output: &mut Output) -> Result<(), CommandError> {
        let mut line = |text: String| output.line(&text);
        line(format!("export=\"{}\":", printable(&self.name)))?;
        if let Some(description) = &self.description {
            line(format!("\tdescription: {}", printable(description)))?;
        }
        match self.size_text.ends_with(|last: char| last.is_ascii_digit()) {
            true => line(format!("\texport-size: {}", self.size))?,
            false => line(format!("\texport-size: {} ({})", self.size, self.size_text))?,
        }
        if let Some(content) = self.content {
            line(format!("\tcontent: {content}"))?;
        }
        line(format!("\turi: {}", self.uri))?;
        if !self.contexts.is_empty() {
            line("\tcontexts:".to_owned())?;
        }
        for context in &self.contexts {
            line(format!("\t\t{}", printable(context)))?;
        }
        for (name, value) in self.abilities.named() {
            line(format!("\t{name}: {value}"))?;
        }
        if let Some(sizes) = self.block_sizes {
            line(format!("\tblock_size_minimum: {}", sizes.minimum))?;
            line(format!("\tblock_size_preferred: {}", sizes.preferred))?;
            line(format!("\tblock_size_maximum: {}", sizes.maximum_payload))?;
        }
        Ok(())
    }
}

impl Abilities {
    fn named(self) -> [(&'static str, bool); 11] {
        [
            ("is_rotational", self.is_rotational),
            ("is_read_only", self.is_read_only),
            ("can_block_status_payload", self.can_block_status_payload),
            ("can_cache", self.can_cache),
            ("can_df", self.can_df),
            ("can_fast_zero", self.can_fast_zero),
            ("can_flush", self.can_flush),
            ("can_fua", self.can_fua),
            ("can_multi_conn", self.can_multi_conn),
            ("can_trim", self.can_trim),
            ("can_zero", self.can_zero),
        ]
    }
}
