//! The caller's hooks: admission of clients, and exports that are not in the registry.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::client::ClientInfo;
use crate::export::{Export, ExportEntry};

/// The refusal of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    reason: String,
}

impl Refusal {
    /// Creates a refusal with a reason for the server's log. The client does not receive it.
    #[must_use]
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

type Hook = dyn Fn(&ClientInfo) -> Result<(), Refusal> + Send + Sync;
type Resolver = dyn Fn(&str, &ClientInfo) -> Option<ExportEntry> + Send + Sync;

/// An export that was resolved, and its name.
type Resolved = (String, Weak<dyn Export>);

/// The caller's hooks. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Access {
    hook: Option<Arc<Hook>>,
    resolver: Option<Arc<Resolver>>,
    /// Resolved exports in use, which are flushed at the end.
    resolved: Arc<Mutex<Vec<Resolved>>>,
}

impl Access {
    pub(crate) fn set_hook(
        &mut self,
        hook: impl Fn(&ClientInfo) -> Result<(), Refusal> + Send + Sync + 'static,
    ) {
        self.hook = Some(Arc::new(hook));
    }

    pub(crate) fn set_resolver(
        &mut self,
        resolver: impl Fn(&str, &ClientInfo) -> Option<ExportEntry> + Send + Sync + 'static,
    ) {
        self.resolver = Some(Arc::new(resolver));
    }

    /// Calls the caller's hook for the admission of a client.
    pub(crate) fn admit(&self, client: &ClientInfo) -> Result<(), Refusal> {
        self.hook.as_ref().map_or(Ok(()), |hook| hook(client))
    }

    /// The export of a name that the registry does not know.
    pub(crate) fn resolve(&self, name: &str, client: &ClientInfo) -> Option<ExportEntry> {
        let entry = self.resolver.as_ref()?(name, client)?;
        if let Err(error) = entry.check(name) {
            tracing::warn!(%error, "an export that was resolved cannot be served");
            return None;
        }
        Some(entry)
    }

    /// Records that a client uses a resolved export.
    pub(crate) fn note_use(&self, name: &str, export: &Arc<dyn Export>) {
        if self.resolver.is_none() {
            return;
        }
        let mut resolved = self.resolved.lock().unwrap_or_else(PoisonError::into_inner);
        resolved.retain(|(_, export)| export.strong_count() > 0);
        let is_known =
            |(_, known): &Resolved| std::ptr::addr_eq(known.as_ptr(), Arc::as_ptr(export));
        if !resolved.iter().any(is_known) {
            resolved.push((name.to_owned(), Arc::downgrade(export)));
        }
    }

    /// The resolved exports that still exist.
    pub(crate) fn resolved(&self) -> Vec<(String, Arc<dyn Export>)> {
        let resolved = self.resolved.lock().unwrap_or_else(PoisonError::into_inner);
        let alive =
            |(name, export): &(String, Weak<dyn Export>)| Some((name.clone(), export.upgrade()?));
        resolved.iter().filter_map(alive).collect()
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access")
            .field("hook", &self.hook.is_some())
            .field("resolver", &self.resolver.is_some())
            .finish_non_exhaustive()
    }
}
