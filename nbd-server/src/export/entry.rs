//! [`ExportEntry`]: an export with its rules, quotas and counters.

use std::sync::Arc;

use nbd_proto::codec::protocol_string;
use nbd_proto::handshake::ExportDescription;
use nbd_proto::limits::MAX_EXPORT_SIZE;
use nbd_proto::wire::TransmissionFlags;

use super::Export;
use super::flushes::{DurabilityFailures, Flushes};
use crate::client::ClientInfo;
use crate::error::RegistryError;
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

    /// Sets the access rules. For a client that the rules deny, the export does not exist: lists do
    /// not show it, and a request for its name is answered like one for an unknown name.
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

    /// Sets the limits of each client. Connections with the same authenticated TLS name, from the
    /// same address or, on unix sockets, of the same user belong to one client. The limits apply at
    /// once, also to clients that use the export.
    #[must_use]
    pub fn client_quota(self, quota: Quota) -> Self {
        self.quotas.set_of_clients(quota);
        self
    }

    /// Returns the same export for the same clients, with the properties of a new entry: shown in
    /// lists, without a description, with and without TLS, without access rules. Limits stay.
    #[must_use]
    pub fn with_default_properties(&self) -> Self {
        let (visibility, security) = (Visibility::Listed, Security::Any);
        let access = Arc::default();
        Self { description: None, visibility, security, access, ..self.clone() }
    }

    /// Returns an entry for another export with the same visibility, rules and limits. Nothing of
    /// the limits is used yet.
    #[must_use]
    pub fn with_export(&self, export: Arc<dyn Export>) -> Self {
        let (failures, flushes) = (DurabilityFailures::default(), Flushes::default());
        let (quotas, record) = (Arc::new(self.quotas.unused()), ExportRecord::default());
        Self { export, failures, flushes, quotas, record, ..self.clone() }
    }

    /// Like [`with_export`](Self::with_export), for an export of the same disk, open or opened
    /// again: if a flush fails through either of them, the clients of both are told.
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

    /// Returns the statistics of this entry's clients, under all its names.
    #[must_use]
    pub fn statistics(&self) -> ExportStatistics {
        let (last_flush, failed) = (self.flushes.last_success(), self.failures.count());
        self.record.statistics(self.export.info().size, last_flush, failed)
    }

    /// The counters for connections.
    pub(crate) const fn record(&self) -> &ExportRecord {
        &self.record
    }

    /// Checks that the protocol can express the export under `name`.
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
            let why = format!("it has {size} bytes, and the protocol's limit is 2^63-1");
            return Err(RegistryError::BadExport { name: name.to_owned(), why });
        }
        Ok(())
    }

    /// The failed flushes of the export, known to all connections.
    pub(crate) fn failures(&self) -> &DurabilityFailures {
        &self.failures
    }

    /// The flushes that connections share.
    pub(crate) fn flushes(&self) -> &Flushes {
        &self.flushes
    }

    /// Whether a client may do anything with the export once it uses TLS.
    pub(crate) fn may_permit_with_tls(&self, client: &ClientInfo) -> bool {
        self.access.may_permit_with_tls(client)
    }

    /// A client's permission for the export.
    pub(crate) fn permission(&self, client: &ClientInfo) -> Permission {
        self.access.permission(client)
    }

    /// The used parts of the limits.
    pub(crate) fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// The description of this export for the handshake, under the name `name`, for a client with
    /// this permission.
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
