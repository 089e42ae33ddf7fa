//! The registry of exports by name.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, Weak};

use nbd_proto::handshake::ListedExport;

use super::Export;
use super::entry::{ExportEntry, Visibility};
use crate::client::ClientInfo;
use crate::error::RegistryError;
use crate::rules::Permission;

/// The exports of a server by name. Clones share one registry; changes while the server runs affect
/// clients that connect afterwards.
#[derive(Debug, Clone, Default)]
pub struct ExportRegistry {
    inner: Arc<RwLock<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    exports: BTreeMap<String, ExportEntry>,
    default: Option<String>,
    /// Exports that were removed or replaced: clients may still use them.
    removed: Vec<(String, Weak<dyn Export>)>,
}

impl Inner {
    fn note_removed(&mut self, name: &str, entry: &ExportEntry) {
        let is_another = |known: &Weak<dyn Export>| {
            !std::ptr::addr_eq(known.as_ptr(), Arc::as_ptr(&entry.export))
        };
        self.removed.retain(|(_, known)| known.strong_count() > 0 && is_another(known));
        self.removed.push((name.to_owned(), Arc::downgrade(&entry.export)));
    }
}

impl ExportRegistry {
    /// Creates a registry without exports.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an export under `name`. The empty name is that of the default export.
    ///
    /// # Errors
    ///
    /// [`RegistryError`] if the name is taken, or name, description or size break the protocol's
    /// limits.
    pub fn add(&self, name: impl Into<String>, entry: ExportEntry) -> Result<(), RegistryError> {
        let name = name.into();
        entry.check(&name)?;
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        if inner.exports.contains_key(&name) {
            return Err(RegistryError::NameTaken(name));
        }
        inner.exports.insert(name, entry);
        Ok(())
    }

    /// Replaces the entry of an export. Clients that use the old one keep it.
    ///
    /// # Errors
    ///
    /// [`RegistryError`] if there is no export of that name, or the entry breaks the protocol's
    /// limits.
    pub fn replace(&self, name: &str, entry: ExportEntry) -> Result<(), RegistryError> {
        entry.check(name)?;
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        let Some(found) = inner.exports.get_mut(name) else {
            return Err(RegistryError::NotFound(name.to_owned()));
        };
        let old = std::mem::replace(found, entry);
        inner.note_removed(name, &old);
        // Closing an export may take long.
        drop(inner);
        Ok(())
    }

    /// Removes an export, and returns its entry, if there is one. Clients that use it keep it.
    pub fn remove(&self, name: &str) -> Option<ExportEntry> {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        let entry = inner.exports.remove(name)?;
        inner.note_removed(name, &entry);
        Some(entry)
    }

    /// Sets the export of clients that request the empty name.
    pub fn set_default(&self, name: impl Into<String>) {
        self.inner.write().unwrap_or_else(PoisonError::into_inner).default = Some(name.into());
    }

    /// Returns the canonical name and the entry for a requested name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<(String, ExportEntry)> {
        let inner = self.read();
        if let Some(entry) = inner.exports.get(name) {
            return Some((name.to_owned(), entry.clone()));
        }
        if !name.is_empty() {
            return None;
        }
        let default = inner.default.as_ref()?;
        inner.exports.get(default).map(|entry| (default.clone(), entry.clone()))
    }

    /// Returns every name with its export, including hidden ones.
    #[must_use]
    pub fn entries(&self) -> Vec<(String, ExportEntry)> {
        let inner = self.read();
        inner.exports.iter().map(|(name, entry)| (name.clone(), entry.clone())).collect()
    }

    /// The exports that were removed or replaced and still exist, by their former names.
    pub(crate) fn removed(&self) -> Vec<(String, Arc<dyn Export>)> {
        let alive =
            |(name, export): &(String, Weak<dyn Export>)| Some((name.clone(), export.upgrade()?));
        self.read().removed.iter().filter_map(alive).collect()
    }

    /// Returns the names of removed or replaced exports that still exist, usually because a client
    /// uses them.
    #[must_use]
    pub fn removed_in_use(&self) -> Vec<String> {
        let mut removed = self.removed();
        removed.retain(|(_, export)| !self.offers(export));
        removed.into_iter().map(|(name, _)| name).collect()
    }

    /// Whether this export is registered, under any name.
    pub(crate) fn offers(&self, export: &Arc<dyn Export>) -> bool {
        self.read().exports.values().any(|entry| Arc::ptr_eq(&entry.export, export))
    }

    /// The answer to LIST for a client. Without TLS it omits exports that require TLS.
    pub(crate) fn listed(&self, is_clear: bool, client: &ClientInfo) -> Vec<ListedExport> {
        let inner = self.read();
        let listed = inner.exports.iter().filter(|(_, entry)| {
            entry.visibility == Visibility::Listed
                && !(is_clear && entry.is_tls_required())
                && entry.permission(client) != Permission::Denied
        });
        listed
            .map(|(name, entry)| {
                ListedExport::new(name, entry.description.clone().unwrap_or_default())
            })
            .collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::MemoryExport;

    fn entry() -> ExportEntry {
        ExportEntry::new(Arc::new(MemoryExport::new(1024)))
    }

    #[test]
    fn the_empty_name_finds_the_default_and_tells_its_real_name() {
        let registry = ExportRegistry::new();
        registry.add("disk", entry()).unwrap();
        assert!(registry.find("").is_none());
        registry.set_default("disk");
        assert_eq!(registry.find("").unwrap().0, "disk");
        assert!(registry.find("other").is_none(), "only the empty name falls back");
    }

    #[test]
    fn an_entry_is_replaced_with_default_properties() {
        let registry = ExportRegistry::new();
        assert!(registry.replace("disk", entry()).is_err());
        registry.add("disk", entry().hidden().tls_required().description("x")).unwrap();
        let (_, old) = registry.find("disk").unwrap();
        registry.replace("disk", old.with_default_properties()).unwrap();
        let (_, new) = registry.find("disk").unwrap();
        assert!(Arc::ptr_eq(old.export(), new.export()) && !new.is_tls_required());
        assert!(Arc::ptr_eq(&old.quotas, &new.quotas));
        assert_eq!(new.description, None);
    }

    #[test]
    fn removed_exports_are_known_as_long_as_they_are_there() {
        let registry = ExportRegistry::new();
        registry.add("disk", entry()).unwrap();
        let (_, first) = registry.find("disk").unwrap();
        registry.replace("disk", entry()).unwrap();
        registry.remove("disk").unwrap();
        for _ in 0..3 {
            registry.add("disk", first.clone()).unwrap();
            registry.remove("disk").unwrap();
        }
        assert_eq!(registry.read().removed.len(), 1, "the one that is gone is forgotten");
        assert!(Arc::ptr_eq(&registry.removed()[0].1, first.export()));
        assert_eq!(registry.removed_in_use(), ["disk"]);
        registry.add("again", first.clone()).unwrap();
        assert!(registry.removed_in_use().is_empty(), "it is registered");
        registry.remove("again").unwrap();
        drop(first);
        assert!(registry.removed().is_empty());
    }

    #[test]
    fn hidden_exports_are_found_but_not_listed() {
        let registry = ExportRegistry::new();
        registry.add("shown", entry()).unwrap();
        registry.add("secret", entry().hidden()).unwrap();
        assert!(registry.find("secret").is_some());
        let client = ClientInfo {
            address: crate::ClientAddress::Unknown,
            #[cfg(feature = "tls")]
            tls: None,
        };
        let listed = registry.listed(true, &client);
        let names: Vec<_> = listed.into_iter().map(|export| export.name).collect();
        assert_eq!(names, ["shown"]);
    }

    #[test]
    fn a_name_is_given_once_and_within_the_limits() {
        let registry = ExportRegistry::new();
        registry.add("disk", entry()).unwrap();
        assert_eq!(registry.add("disk", entry()), Err(RegistryError::NameTaken("disk".to_owned())));
        assert!(registry.add("x".repeat(4097), entry()).is_err());
        assert!(registry.add("d", entry().description("a\0b")).is_err());
        let huge = ExportEntry::new(Arc::new(MemoryExport::new(1 << 63)));
        assert!(registry.add("huge", huge).is_err());
    }
}
