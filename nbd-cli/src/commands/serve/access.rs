//! Options for the access rules and quotas of exports.

use std::num::NonZeroU64;

use clap::Args;
use nbd_jobs::serving::{AccessSettings, ExportRule};
use nbd_jobs::size::parse_rate;

/// Rules and quotas of exports.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Access")]
pub struct AccessArgs {
    /// Let only these clients use an export: the one named before '=', or all. CLIENTS is
    /// user:NAME or group:NAME (of a process that connects to a unix socket), an IP address or a
    /// range such as 192.0.2.0/24, or tls:PATTERN (the distinguished name in a certificate, or the
    /// user of a pre-shared key). To other clients the export does not exist. May be repeated.
    #[arg(long, value_name = "[EXPORT=]CLIENTS")]
    pub allow: Vec<ExportRule>,

    /// Let these clients only read, even if --allow names them; 'others' are all clients that no
    /// rule names. May be repeated.
    #[arg(long, value_name = "[EXPORT=]CLIENTS")]
    pub readonly_for: Vec<ExportRule>,

    /// Most connections of one client to an export. A client is a TLS name, an IP address, or the
    /// user of a unix socket.
    #[arg(long, value_name = "N")]
    pub client_connections: Option<NonZeroU64>,

    /// Most bytes per second that one client reads and writes.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub client_rate: Option<NonZeroU64>,

    /// Most requests per second of one client.
    #[arg(long, value_name = "N")]
    pub client_iops: Option<NonZeroU64>,

    /// Most connections to an export.
    #[arg(long, value_name = "N")]
    pub export_connections: Option<NonZeroU64>,

    /// Most bytes per second that all clients of an export read and write.
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub export_rate: Option<NonZeroU64>,

    /// Most requests per second of all clients of an export.
    #[arg(long, value_name = "N")]
    pub export_iops: Option<NonZeroU64>,
}

impl AccessArgs {
    /// Returns the rules and quotas.
    pub(super) fn settings(&self) -> AccessSettings {
        let mut settings = AccessSettings::default();
        settings.allow.clone_from(&self.allow);
        settings.read_only_for.clone_from(&self.readonly_for);
        let of_client = &mut settings.client_quota;
        of_client.connections = self.client_connections;
        of_client.bytes_per_second = self.client_rate;
        of_client.requests_per_second = self.client_iops;
        let total = &mut settings.export_quota;
        total.connections = self.export_connections;
        total.bytes_per_second = self.export_rate;
        total.requests_per_second = self.export_iops;
        settings
    }
}
