//! The exports that one client may see and use.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nbd_proto::handshake::{ExportDescription, Negotiated, RefusalReason};

use super::error::ConnectionError;
use super::plain::Channel;
use super::shared::Shared;
use super::socket::Socket;
use crate::access::Access;
use crate::client::ClientInfo;
use crate::export::{ExportEntry, ExportRegistry};
use crate::log_limit::may_warn;
use crate::quota::Admission;
use crate::rules::Permission;

const UNKNOWN: &str = "there is no export of this name";
const NEEDS_TLS: &str = "this export is served over TLS only";

/// The source of the answers to one client.
#[derive(Clone)]
pub(super) struct Catalog {
    pub(super) exports: ExportRegistry,
    access: Access,
    pub(super) client: ClientInfo,
    pub(super) channel: Channel,
    /// Whether a warning about this connection was logged; clones share it.
    has_warned: Arc<AtomicBool>,
}

impl Catalog {
    /// Creates the catalog of an admitted client.
    pub(super) fn for_client(socket: &Socket, shared: &Shared) -> Result<Self, ConnectionError> {
        let catalog = Self::for_known_client(socket, shared);
        shared.access.admit(&catalog.client).map_err(ConnectionError::Refused)?;
        Ok(catalog)
    }

    /// For a client that was let in before.
    pub(super) fn for_known_client(socket: &Socket, shared: &Shared) -> Self {
        let client = client_info(socket);
        let (exports, access) = (shared.exports.clone(), shared.access.clone());
        let (channel, has_warned) = (socket.channel(), Arc::default());
        Self { exports, access, client, channel, has_warned }
    }

    /// Finds the export that the client asks for, unless it may not see it, or only over TLS.
    pub(super) fn find(&self, name: &str) -> Result<Found, Rejection> {
        let found = self.exports.find(name).or_else(|| {
            let entry = self.access.resolve(name, &self.client)?;
            Some((name.to_owned(), entry))
        });
        match found {
            Some((name, entry)) if entry.is_tls_required() && self.channel == Channel::Clear => {
                if entry.may_permit_with_tls(&self.client) {
                    Err((RefusalReason::TlsRequired, NEEDS_TLS))
                } else {
                    Err(self.denied(&name))
                }
            }
            Some((name, entry)) => match entry.permission(&self.client) {
                Permission::Denied => Err(self.denied(&name)),
                permission => Ok(Found { name, entry, permission }),
            },
            None => Err((RefusalReason::UnknownExport, UNKNOWN)),
        }
    }

    /// The answer to a client that may not use an export: it cannot find out that there is one.
    fn denied(&self, name: &str) -> Rejection {
        self.report(name, "the rules of the export deny a client");
        (RefusalReason::UnknownExport, UNKNOWN)
    }

    /// Finds the export that the client selects, and counts the client there.
    pub(super) fn grant(&self, name: &str) -> Result<(ExportDescription, Granted), Rejection> {
        let found = self.find(name)?;
        let admission = found.entry.quotas().admit(&self.client).map_err(|used_up| {
            self.report(&found.name, used_up.event());
            (RefusalReason::Policy, used_up.answer())
        })?;
        Ok((found.describe(), Granted::new(found.entry, admission)))
    }

    /// Gives a client of this process what it used before, whatever the rules are by now: the
    /// export that is `unregistered`, or else that of the name. The default export may be another
    /// disk.
    pub(super) fn grant_again(
        &self,
        negotiated: &Negotiated,
        unregistered: Option<ExportEntry>,
    ) -> Result<(ExportDescription, Granted), Rejection> {
        let name = &negotiated.export_name;
        let named = || self.exports.find(name).filter(|(found, _)| found == name);
        let entry = unregistered.or_else(|| named().map(|(_, entry)| entry));
        let entry = entry.ok_or((RefusalReason::UnknownExport, UNKNOWN))?;
        let admission = entry.quotas().admit_again(&self.client);
        // What was read-only for the client remains so by what was negotiated.
        let description = entry.describe(name, Permission::Full);
        Ok((description, Granted::new(entry, admission)))
    }

    /// Logs the refusal of an export. A client can ask repeatedly, so only the first time is a
    /// warning.
    fn report(&self, export: &str, why: &'static str) {
        let client = &self.client;
        if self.has_warned.swap(true, Ordering::Relaxed) || !may_warn() {
            tracing::debug!(?export, %client, "{why}");
        } else {
            tracing::warn!(?export, %client, "{why}");
        }
    }
}

pub(super) type Rejection = (RefusalReason, &'static str);

/// An export that a client may use.
pub(super) struct Found {
    name: String,
    pub(super) entry: ExportEntry,
    permission: Permission,
}

impl Found {
    pub(super) fn describe(&self) -> ExportDescription {
        self.entry.describe(&self.name, self.permission)
    }
}

/// An export that a client uses.
pub(super) struct Granted {
    pub(super) entry: ExportEntry,
    pub(super) admission: Admission,
    /// The number of failed flushes before the client received the export.
    pub(super) failures: u64,
}

impl Granted {
    /// The failures are counted before the client is answered: from the answer on, a FLUSH of this
    /// connection covers what the client writes on its others.
    fn new(entry: ExportEntry, admission: Admission) -> Self {
        let failures = entry.failures().count();
        Self { entry, admission, failures }
    }
}

fn client_info(socket: &Socket) -> ClientInfo {
    ClientInfo {
        address: socket.client_address(),
        #[cfg(feature = "tls")]
        tls: None,
    }
}
