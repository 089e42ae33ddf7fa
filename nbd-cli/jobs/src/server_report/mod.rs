//! Reports about servers and their exports, in the shape and order of nbdinfo's.
//!
//! ```no_run
//! use nbd_client::{Connector, Scope};
//! use nbd_jobs::server_report::ServerReport;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let connector = Connector::new("nbd://localhost".parse()?);
//! let server = connector.inspect(Scope::AllExports).await?;
//! let report = ServerReport::new(&server, connector.uri());
//! println!("{}", serde_json::to_string_pretty(&report)?);
//! # Ok(())
//! # }
//! ```

mod content;

use nbd_client::{ExportInfo, ServerInfo};
use nbd_proto::NbdUri;
use nbd_proto::uri::Security;
use nbd_proto::wire::{ReplyMode, TransmissionFlags};
use serde::Serialize;

pub use self::content::content_of;
use crate::size::exact;

/// A server; serialised with the keys of nbdinfo, in their order.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ServerReport {
    /// The name of the protocol.
    pub protocol: &'static str,
    /// Whether the connection is encrypted.
    #[serde(rename = "TLS")]
    pub tls: bool,
    /// Whether replies are structured.
    pub structured: bool,
    /// Whether headers are extended.
    pub extended: bool,
    /// The exports.
    pub exports: Vec<ExportReport>,
}

/// An export; keys that do not apply are left out.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ExportReport {
    /// The name; text of the server.
    #[serde(rename = "export-name")]
    pub name: String,
    /// The description; text of the server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The kind of the content, if the caller has asked for it with [`content_of`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<&'static str>,
    /// The URI of the export.
    pub uri: String,
    /// The names of the metadata contexts; text of the server.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub contexts: Vec<String>,
    #[serde(flatten)]
    abilities: Abilities,
    /// The limits of the lengths and offsets of requests, if the server has any.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub block_sizes: Option<BlockSizesReport>,
    /// The size in bytes.
    #[serde(rename = "export-size")]
    pub size: u64,
    /// The size with the largest suffix that keeps it exact.
    #[serde(rename = "export-size-str")]
    pub size_text: String,
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

/// The block sizes of an export, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
#[non_exhaustive]
pub struct BlockSizesReport {
    /// The smallest request, and the unit of offsets and lengths.
    #[serde(rename = "block_size_minimum")]
    pub minimum: u32,
    /// The unit of efficient requests.
    #[serde(rename = "block_size_preferred")]
    pub preferred: u32,
    /// The largest payload of a request.
    #[serde(rename = "block_size_maximum")]
    pub maximum_payload: u32,
}

impl ServerReport {
    /// Returns the report about what a server has said; `uri` is its address.
    pub fn new(server: &ServerInfo, uri: &NbdUri) -> Self {
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

    /// Returns the protocol for display, as nbdinfo does.
    #[must_use]
    pub fn protocol(&self) -> String {
        let tls = if self.tls { "with TLS" } else { "without TLS" };
        let packets = match (self.extended, self.structured) {
            (true, _) => "extended",
            (false, true) => "structured",
            (false, false) => "simple",
        };
        format!("{} {tls}, using {packets} packets", self.protocol)
    }

    /// Returns the capabilities and properties of the exports, in the words of nbdinfo without
    /// `can_` and `is_`.
    #[must_use]
    pub fn abilities(&self) -> Vec<&'static str> {
        let named = self.exports.iter().flat_map(ExportReport::abilities);
        let bare = |name: &'static str| name.split_once('_').map_or(name, |(_, rest)| rest);
        named.filter(|(_, value)| *value).map(|(name, _)| bare(name)).collect()
    }

    /// Returns the metadata contexts of the exports.
    pub fn contexts(&self) -> impl Iterator<Item = &str> {
        self.exports.iter().flat_map(|export| export.contexts.iter().map(String::as_str))
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
}

impl ExportReport {
    /// Returns nbdinfo's keys of the capabilities and properties, in its order, with their values.
    #[must_use]
    pub fn abilities(&self) -> [(&'static str, bool); 11] {
        self.abilities.named()
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nbd_client::{Connector, Scope};
    use nbd_server::export::{ExportEntry, MemoryExport};
    use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};

    use super::*;

    #[tokio::test]
    async fn a_report_has_the_keys_of_nbdinfo() {
        let directory = tempfile::tempdir().unwrap();
        let registry = ExportRegistry::new();
        let disk = ExportEntry::new(Arc::new(MemoryExport::new(1 << 20)));
        registry.add("disk", disk).unwrap();
        let mut server = Server::new(ServerConfig::default(), registry);
        server.listen(&ListenAddress::Unix(directory.path().join("socket"))).await.unwrap();
        let server = server.start();
        let connector = Connector::new(server.addresses()[0].uri("disk"));
        let found = connector.inspect(Scope::ThisExport).await.unwrap();
        let mut report = ServerReport::new(&found, connector.uri());
        report.exports[0].content = content_of(&connector, "disk").await;

        let json = serde_json::to_value(&report).unwrap();
        let export = &json["exports"][0];
        assert_eq!(json["protocol"], "newstyle-fixed");
        assert_eq!(export["export-name"], "disk");
        assert_eq!(export["export-size"], 1 << 20);
        assert_eq!(export["export-size-str"], "1M");
        assert_eq!(export["content"], "data");
        assert_eq!((&export["can_flush"], &export["is_read_only"]), (&true.into(), &false.into()));
        assert!(export.get("description").is_none(), "{export}");
        assert!(report.abilities().contains(&"trim"), "{:?}", report.abilities());
        assert_eq!(report.protocol(), "newstyle-fixed without TLS, using extended packets");
    }
}
