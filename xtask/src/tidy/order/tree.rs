//! The modules of a crate, without tests, and the uses between them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::paths::Paths;
use crate::tidy::lexer::{Source, line_at};

/// A module as the names from the root of the crate; the root itself is empty.
pub(super) type Module = Vec<String>;

/// Longest chain of re-exports that is followed.
const MAXIMUM_REEXPORTS: usize = 16;

/// The modules of one crate.
#[derive(Debug)]
pub(super) struct Tree {
    modules: BTreeMap<Module, Entry>,
}

#[derive(Debug)]
struct Entry {
    file: PathBuf,
    code: String,
    paths: Paths,
}

/// One module uses another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Use {
    pub(super) from: Module,
    pub(super) to: Module,
    /// The position of the use.
    pub(super) file: PathBuf,
    pub(super) line: usize,
    /// The path in the source.
    pub(super) path: String,
    /// Whether the path goes through a re-export of the crate's root.
    pub(super) is_through_root: bool,
}

impl Tree {
    /// Reads the crate whose root file is `lib.rs` or else `main.rs` in `directory`.
    ///
    /// # Errors
    ///
    /// A file cannot be read.
    pub(super) fn read(directory: &Path) -> Result<Self> {
        let mut tree = Self { modules: BTreeMap::new() };
        let library = directory.join("lib.rs");
        let root = if library.is_file() { library } else { directory.join("main.rs") };
        tree.read_module(Vec::new(), root, directory)?;
        Ok(tree)
    }

    /// Reads `file`, whose modules are in `directory`.
    fn read_module(&mut self, module: Module, file: PathBuf, directory: &Path) -> Result<()> {
        let text = fs::read_to_string(&file)
            .with_context(|| format!("cannot read {} as text", file.display()))?;
        let code = Source::new(&text).code_without_tests();
        let paths = Paths::new(&code);
        for name in paths.modules.clone() {
            let mut child = module.clone();
            child.push(name.clone());
            let below = directory.join(&name);
            let files = [directory.join(format!("{name}.rs")), below.join("mod.rs")];
            if let Some(file) = files.into_iter().find(|file| file.is_file()) {
                self.read_module(child, file, &below)?;
            } else {
                // Declared with a `path` attribute: only its name is known.
                let entry = Entry { file: below, code: String::new(), paths: Paths::default() };
                self.modules.insert(child, entry);
            }
        }
        self.modules.insert(module, Entry { file, code, paths });
        Ok(())
    }

    /// Returns whether there is a module of this name below `module`.
    pub(super) fn has_child(&self, module: &[String], name: &str) -> bool {
        let child = [module, &[name.to_owned()]].concat();
        self.modules.contains_key(&child)
    }

    /// Whether this is a module.
    pub(super) fn contains(&self, module: &Module) -> bool {
        self.modules.contains_key(module)
    }

    /// Returns the names of the direct submodules of `module`.
    pub(super) fn children(&self, module: &[String]) -> Vec<&String> {
        let is_child =
            |other: &&Module| other.len() == module.len() + 1 && other.starts_with(module);
        self.modules.keys().filter(is_child).filter_map(|child| child.last()).collect()
    }

    /// Returns every use of one module by another, except for a module's re-exports of its own
    /// submodules, which are its interface.
    pub(super) fn uses(&self) -> Vec<Use> {
        let mut uses = Vec::new();
        for (module, entry) in &self.modules {
            let is_face = !entry.paths.modules.is_empty();
            let reexported = entry.paths.reexported.iter().filter(|_| !is_face);
            for named in entry.paths.named.iter().chain(reexported) {
                let Some(to) = self.resolve(module, &named.segments, 0) else { continue };
                if to != *module {
                    uses.push(Use {
                        from: module.clone(),
                        to,
                        file: entry.file.clone(),
                        line: line_at(&entry.code, named.offset),
                        path: named.segments.join("::"),
                        is_through_root: self.is_through_root(module, &named.segments),
                    });
                }
            }
        }
        uses.sort();
        uses
    }

    /// Whether the item named by `segments` in `module` is named as one of the crate's root, which
    /// only imports it.
    fn is_through_root(&self, module: &[String], segments: &[String]) -> bool {
        let mut current = module.to_vec();
        for (index, segment) in segments.iter().enumerate() {
            match segment.as_str() {
                "crate" => current.clear(),
                "self" => {}
                "super" => drop(current.pop()),
                name if self.has_child(&current, name) => current.push(name.to_owned()),
                name => {
                    let root = self.modules.get(&current).filter(|_| current.is_empty());
                    return index > 0
                        && root.is_some_and(|root| root.paths.imports.contains_key(name));
                }
            }
        }
        false
    }

    /// Returns the module that defines the item named by `segments` in `module`, if it is in this
    /// crate.
    fn resolve(&self, module: &[String], segments: &[String], depth: usize) -> Option<Module> {
        let mut current = module.to_vec();
        for (index, segment) in segments.iter().enumerate() {
            match segment.as_str() {
                "crate" => current.clear(),
                "self" => {}
                "super" => drop(current.pop()?),
                name if self.has_child(&current, name) => current.push(name.to_owned()),
                name => {
                    let entry = self.modules.get(&current)?;
                    let Some(path) = entry.paths.imports.get(name) else {
                        // The first name is another crate's, or one of the file's own.
                        return (index > 0).then_some(current);
                    };
                    // In its own file an imported name is resolved by the import.
                    if index == 0 || depth == MAXIMUM_REEXPORTS || path == segments {
                        return None;
                    }
                    let rest = segments[index + 1..].iter().cloned();
                    let path: Vec<String> = path.iter().cloned().chain(rest).collect();
                    return self.resolve(&current, &path, depth + 1);
                }
            }
        }
        Some(current)
    }
}
