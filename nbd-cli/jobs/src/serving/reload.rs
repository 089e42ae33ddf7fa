//! What a new configuration of a running server changes.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;

use super::source::same_source;
use crate::error::JobError;

/// Keys with their values, as options of the command line.
pub type Settings = BTreeMap<String, Vec<String>>;

/// An export of a configuration; `options` is what the caller has made of its settings.
#[derive(Clone, Debug)]
pub struct ConfiguredExport<T> {
    /// The name.
    pub name: String,
    /// The source.
    pub source: OsString,
    /// Whether the export never changes its source.
    pub only_reads: bool,
    /// All settings, the name and the source among them.
    pub settings: Settings,
    /// The caller's.
    pub options: T,
}

/// A configuration of a server.
#[derive(Clone, Debug)]
pub struct Configuration<T> {
    /// The settings of the server.
    pub server: Settings,
    /// The exports; the first one is the default export.
    pub exports: Vec<ConfiguredExport<T>>,
}

/// The settings that can change while the server runs.
#[derive(Clone, Copy, Debug)]
pub struct LiveSettings<'a> {
    /// Those of the server.
    pub server: &'a [&'a str],
    /// Those of an export that is being served.
    pub exports: &'a [&'a str],
}

/// The changes that a new configuration requests.
#[derive(Debug)]
#[non_exhaustive]
pub struct Changes<T> {
    /// The exports that are not served yet.
    pub added: Vec<ConfiguredExport<T>>,
    /// The served exports that the new configuration does not have.
    pub removed: Vec<ConfiguredExport<T>>,
    /// The settings that cannot change while the server runs, in words.
    pub left: Vec<String>,
    /// Whether settings of the server are among them: it keeps all of its own.
    pub keeps_server: bool,
}

impl<T: Clone> Configuration<T> {
    /// Compares this configuration, which is in effect, with a new one. What cannot change while
    /// the server runs keeps its old value in `new`, so that the next comparison is with what is in
    /// effect. `served` are the names of all exports of the server, and `leaving` are exports that
    /// were removed and are not closed, because clients still use them.
    ///
    /// # Errors
    ///
    /// If a new export has the name of one that is not of a configuration, or the source of one
    /// that is removed or leaving.
    pub fn changes_to(
        &self,
        new: &mut Self,
        live: LiveSettings<'_>,
        served: &[String],
        leaving: &[ConfiguredExport<T>],
    ) -> Result<Changes<T>, JobError> {
        let mut left = differences(&self.server, &new.server, live.server);
        let keeps_server = !left.is_empty();
        if keeps_server {
            new.server.clone_from(&self.server);
        }
        let is_served = |name: &str| served.iter().any(|taken| taken == name);
        let old = |name: &str| self.exports.iter().find(|old| old.name == name);
        let mut added = Vec::new();
        for export in &mut new.exports {
            let name = export.name.clone();
            // One that was removed through the control socket is added again.
            let Some(old) = old(&name).filter(|_| is_served(&name)) else {
                if is_served(&name) {
                    return Err(JobError::invalid(format!(
                        "the new export '{name}' has the name of one that was added by the control \
                         socket"
                    )));
                }
                added.push(export.clone());
                continue;
            };
            let fixed = differences(&old.settings, &export.settings, live.exports);
            left.extend(fixed.iter().map(|key| format!("{key} of the export '{name}'")));
            // The next reload compares with what is served.
            for key in fixed {
                match old.settings.get(&key) {
                    Some(value) => export.settings.insert(key, value.clone()),
                    None => export.settings.remove(&key),
                };
            }
        }
        let gone = self.exports.iter().filter(|old| {
            is_served(&old.name) && new.exports.iter().all(|export| export.name != old.name)
        });
        let removed: Vec<_> = gone.cloned().collect();
        refuse_renaming(&added, &removed)?;
        refuse_leaving(&added, leaving)?;
        Ok(Changes { added, removed, left, keeps_server })
    }
}

/// Refuses a new export of the source of one that goes: new exports are opened first, and where
/// nothing locks, an image would have two writers.
fn refuse_renaming<T>(
    added: &[ConfiguredExport<T>],
    removed: &[ConfiguredExport<T>],
) -> Result<(), JobError> {
    let Some((new, old)) = conflict(added, removed) else { return Ok(()) };
    Err(JobError::invalid(format!(
        "the source of the new export '{}' is still that of '{}': remove '{}' in one reload and add \
         '{}' in the next",
        new.name, old.name, old.name, new.name
    )))
}

/// Refuses a new export of the source of one that is gone and has clients, for the same reason.
fn refuse_leaving<T>(
    added: &[ConfiguredExport<T>],
    leaving: &[ConfiguredExport<T>],
) -> Result<(), JobError> {
    let Some((new, old)) = conflict(added, leaving) else { return Ok(()) };
    Err(JobError::invalid(format!(
        "the source of the new export '{}' is still open for clients of '{}', which was removed: add \
         it when they have disconnected",
        new.name, old.name
    )))
}

/// Two exports of one source of which one writes.
fn conflict<'a, T>(
    added: &'a [ConfiguredExport<T>],
    others: &'a [ConfiguredExport<T>],
) -> Option<(&'a ConfiguredExport<T>, &'a ConfiguredExport<T>)> {
    let mut pairs = added.iter().flat_map(|new| others.iter().map(move |old| (new, old)));
    pairs.find(|(new, old)| {
        same_source(&new.source, &old.source) && !(new.only_reads && old.only_reads)
    })
}

/// The keys whose values differ, except for those that can change.
fn differences(old: &Settings, new: &Settings, live: &[&str]) -> Vec<String> {
    let keys: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    let changed = keys.into_iter().filter(|key| {
        let value = |settings: &Settings| settings.get(*key).cloned().unwrap_or_default();
        !live.contains(&key.as_str()) && value(old) != value(new)
    });
    changed.cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIVE: LiveSettings<'static> = LiveSettings { server: &["tls-only"], exports: &["allow"] };

    fn settings(keys: &[(&str, &str)]) -> Settings {
        keys.iter().map(|(key, value)| ((*key).to_owned(), vec![(*value).to_owned()])).collect()
    }

    fn export(name: &str, source: &str, keys: &[(&str, &str)]) -> ConfiguredExport<()> {
        let (name, source, only_reads) = (name.to_owned(), source.into(), false);
        ConfiguredExport { name, source, only_reads, settings: settings(keys), options: () }
    }

    fn names(exports: &[ConfiguredExport<()>]) -> Vec<&str> {
        exports.iter().map(|export| export.name.as_str()).collect()
    }

    #[test]
    fn exports_come_and_go_and_what_is_fixed_stays() {
        let fixed = &[("cache", "--cache=none"), ("allow", "--allow=::1")];
        let old = Configuration {
            server: settings(&[("listen", "--listen=::1"), ("tls-only", "--tls-only=a")]),
            exports: vec![export("a", "memory:1M", fixed), export("b", "memory:1M", &[])],
        };
        let changed = &[("cache", "--cache=unsafe"), ("allow", "--allow=::2")];
        let mut new = Configuration {
            server: settings(&[("listen", "--listen=::2"), ("tls-only", "--tls-only=b")]),
            exports: vec![export("a", "memory:1M", changed), export("c", "memory:1M", &[])],
        };
        let served = ["a".to_owned(), "b".to_owned()];
        let changes = old.changes_to(&mut new, LIVE, &served, &[]).unwrap();
        assert_eq!((names(&changes.added), names(&changes.removed)), (vec!["c"], vec!["b"]));
        assert_eq!(changes.left, ["listen", "cache of the export 'a'"]);
        assert!(changes.keeps_server);
        assert_eq!(new.server, old.server);
        let kept = settings(&[("cache", "--cache=none"), ("allow", "--allow=::2")]);
        assert_eq!(new.exports[0].settings, kept);
    }

    #[test]
    fn an_export_of_the_control_socket_keeps_its_name_and_a_source_its_one_writer() {
        let none = Configuration { server: Settings::new(), exports: Vec::new() };
        let one = |name| Configuration {
            server: Settings::new(),
            exports: vec![export(name, "/nowhere/disk", &[])],
        };
        let served = ["a".to_owned()];
        let taken = none.changes_to(&mut one("a"), LIVE, &served, &[]).unwrap_err().to_string();
        assert!(taken.contains("added by the control socket"), "{taken}");
        let renamed =
            one("a").changes_to(&mut one("b"), LIVE, &served, &[]).unwrap_err().to_string();
        assert!(renamed.contains("remove 'a' in one reload and add 'b'"), "{renamed}");
        let leaving = one("a").exports;
        let again = none.changes_to(&mut one("b"), LIVE, &[], &leaving).unwrap_err().to_string();
        assert!(again.contains("still open for clients of 'a'"), "{again}");
        let mut readers = [one("a"), one("b")];
        readers.iter_mut().for_each(|it| it.exports[0].only_reads = true);
        let [old, mut new] = readers;
        old.changes_to(&mut new, LIVE, &served, &[]).unwrap();
    }
}
