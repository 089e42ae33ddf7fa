//! [`ExportEntry`]: an export with its rules, quotas and counters.

use std::sync::Arc;

use nbd_proto::codec::protocol_string;
use nbd_proto::handshake::ExportDescription;
use nbd_proto::limits::MAX_EXPORT_SIZE;
use nbd_proto::wire::TransmissionFlags;

use super::Export;
use super::flushes::{DurabilityFailures, Flushes};
use crate::RegistryError;
use crate::client::ClientInfo;
use crate::quota::{Quota, Quotas};
use crate::rules::{AccessRules, Permission};
use crate::statistics::{ExportRecord, ExportStatistics};

/// An export and its visibility.
#[derive(Clone)]
pub struct ExportEntry {
    pub(super) export: Arc<dyn Export>,
    pub(super) description: Option<String>,
    pub(super) visibility: Visibility,
    security: Security,
    failures: DurabilityFailures,
    flushes: Flushes,
    access: Arc<AccessRules>,
    pub(super) quotas: Arc<Quotas>,
    record: ExportRecord,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Security {
    /// Served with and without TLS.
    Any,
    /// Served over TLS only.
    Tls,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Visibility {
    Listed,
    Hidden,
}

impl ExportEntry {
    /// Creates an entry without a description, shown in lists.
    #[must_use]
    pub fn new(export: Arc<dyn Export>) -> Self {
        Self {
            export,
            description: None,
            visibility: Visibility::Listed,
            security: Security::Any,
            failures: DurabilityFailures::default(),
            flushes: Flushes::default(),
            access: Arc::default(),
            quotas: Arc::default(),
            record: ExportRecord::default(),
        }
    }

    /// Sets a human-readable description, at most 4096 bytes.
    #[must_use]
    pub fn description(mut self, text: impl Into<String>) -> Self {
        self.description = Some(text.into());
        self
    }

    /// Hides it from lists; clients that know the name can use it.
    #[must_use]
    pub fn hidden(mut self) -> Self {
        self.visibility = Visibility::Hidden;
        self
    }

    /// Restricts it to TLS, for a server with optional TLS (the specification's SELECTIVETLS).
    /// Lists show it over TLS only, too.
    #[must_use]
    pub fn tls_required(mut self) -> Self {
        self.security = Security::Tls;
        self
    }

    /// Returns whether this is served over TLS only.
    #[must_use]
    pub fn is_tls_required(&self) -> bool {
        self.security == Security::Tls
    }

    /// Sets the rules for who may use it. To a client that may not, it does not exist: lists do not
    /// show it, and a request for its name is answered like that for an unknown name.
    #[must_use]
    pub fn access(mut self, rules: AccessRules) -> Self {
        self.access = Arc::new(rules);
        self
    }

    /// Sets the limits of the export, for all its clients together. They apply at once, also to
    /// clients that use the export.
    #[must_use]
    pub fn quota(self, quota: Quota) -> Self {
        self.quotas.set_total(quota);
        self
    }

    /// Sets the limits of each client. All connections that are authenticated by one TLS name,
    /// come from one address or, on unix sockets, belong to one user are one client's. They apply
    /// at once, also to clients that use the export.
    #[must_use]
    pub fn client_quota(self, quota: Quota) -> Self {
        self.quotas.set_of_clients(quota);
        self
    }

    /// The same export for the same clients, with the properties of a new entry: shown in lists,
    /// without a description, with and without TLS, for everyone. Limits stay.
    #[must_use]
    pub fn with_default_properties(&self) -> Self {
        let (visibility, security) = (Visibility::Listed, Security::Any);
        let access = Arc::default();
        Self { description: None, visibility, security, access, ..self.clone() }
    }

    /// Replaces the export and keeps its visibility, rules and limits: the same clients see and use
    /// it. Of the limits nothing is used yet.
    #[must_use]
    pub fn with_export(&self, export: Arc<dyn Export>) -> Self {
        let (failures, flushes) = (DurabilityFailures::default(), Flushes::default());
        let (quotas, record) = (Arc::new(self.quotas.unused()), ExportRecord::default());
        Self { export, failures, flushes, quotas, record, ..self.clone() }
    }

    /// As [`with_export`](Self::with_export), for an export of the same open disk: a failure to make
    /// data durable that becomes known through either of them is told to the clients of both.
    #[must_use]
    pub fn same_disk(&self, export: Arc<dyn Export>) -> Self {
        let (failures, flushes) = (self.failures.clone(), self.flushes.clone());
        Self { failures, flushes, ..self.with_export(export) }
    }

    /// Returns the export.
    #[must_use]
    pub fn export(&self) -> &Arc<dyn Export> {
        &self.export
    }

    /// Returns what clients have done with this entry, under whatever names.
    #[must_use]
    pub fn statistics(&self) -> ExportStatistics {
        let (last_flush, failed) = (self.flushes.last_success(), self.failures.count());
        self.record.statistics(self.export.info().size, last_flush, failed)
    }

    /// Where connections count what they do.
    pub(crate) const fn record(&self) -> &ExportRecord {
        &self.record
    }

    /// Whether the protocol can carry the export under `name`.
    pub(crate) fn check(&self, name: &str) -> Result<(), RegistryError> {
        let bad = |what, error: nbd_proto::ProtocolError| RegistryError::BadString {
            what,
            why: error.to_string(),
        };
        protocol_string("export name", name.as_bytes())
            .map_err(|error| bad("this export name", error))?;
        if let Some(text) = &self.description {
            protocol_string("description", text.as_bytes())
                .map_err(|error| bad("this description", error))?;
        }
        let size = self.export.info().size;
        if size > MAX_EXPORT_SIZE {
            let why = format!("it has {size} bytes, the protocol ends at 2^63-1");
            return Err(RegistryError::BadExport { name: name.to_owned(), why });
        }
        Ok(())
    }

    /// What connections tell each other about the export.
    pub(crate) fn failures(&self) -> &DurabilityFailures {
        &self.failures
    }

    /// The flushes that connections share.
    pub(crate) fn flushes(&self) -> &Flushes {
        &self.flushes
    }

    /// Whether a client may do anything with the export, as soon as it uses TLS.
    pub(crate) fn may_permit_with_tls(&self, client: &ClientInfo) -> bool {
        self.access.may_permit_with_tls(client)
    }

    /// What a client may do with the export.
    pub(crate) fn permission(&self, client: &ClientInfo) -> Permission {
        self.access.permission(client)
    }

    /// What clients have used of the limits.
    pub(crate) fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// What the handshake tells about this export under the name `name`, to a client that may do so
    /// much.
    pub(crate) fn describe(&self, name: &str, permission: Permission) -> ExportDescription {
        let info = self.export.info();
        let mut description = ExportDescription::new(name, info.size);
        description.description.clone_from(&self.description);
        description.flags = info.flags
            | TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_DF
            | TransmissionFlags::BLOCK_STATUS_PAYLOAD;
        if permission != Permission::Full {
            description.flags |= TransmissionFlags::READ_ONLY;
        }
        description.block_sizes = info.block_sizes;
        description.minimum_block_size = info.minimum_block_size;
        description.meta_contexts = info.meta_contexts;
        description
    }
}

impl std::fmt::Debug for ExportEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExportEntry")
            .field("description", &self.description)
            .field("info", &self.export.info())
            .finish_non_exhaustive()
    }
}
