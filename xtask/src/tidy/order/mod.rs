//! The allowed imports between modules of a crate: only from modules below in `order.txt`.

mod list;
mod paths;
mod tree;

use std::path::Path;

use anyhow::{Context, Result};

use list::{OWN_FILE, Order};
use tree::{Module, Tree};

/// The order of this workspace.
pub(crate) const LIST: &str = include_str!("order.txt");

/// Its name in findings.
const LIST_NAME: &str = "xtask/src/tidy/order/order.txt";

/// The crates whose modules have an order, and the directories of their root files.
pub(crate) const CRATES: &[(&str, &str)] = &[
    ("nbd-proto", "nbd-proto/src"),
    ("nbd-client", "nbd-client/src"),
    ("nbd-server", "nbd-server/src"),
    ("imgfmt", "imgfmt/src"),
    ("nbd-jobs", "nbd-cli/jobs/src"),
    ("nbd-objects", "nbd-cli/objects/src"),
    ("nbd-cli", "nbd-cli/src"),
    ("benches", "benches/src/bin/bench"),
    ("xtask", "xtask/src"),
];

/// Checks the modules of `crates` in the workspace at `root` against the list.
///
/// # Errors
///
/// A source file cannot be read.
pub(crate) fn check(root: &Path, crates: &[(&str, &str)], list: &str) -> Result<Vec<String>> {
    let order = match Order::parse(list) {
        Ok(order) => order,
        Err(error) => return Ok(vec![format!("{LIST_NAME}: {error}")]),
    };
    let mut findings = Vec::new();
    for package in order.packages() {
        if !crates.iter().any(|(name, _)| *name == package) {
            findings.push(format!("{LIST_NAME}: {package} is not a crate of this workspace"));
        }
    }
    for (package, directory) in crates {
        let tree = Tree::read(&root.join(directory)).with_context(|| format!("crate {package}"))?;
        findings.extend(check_names(package, &tree, &order));
        findings.extend(check_uses(root, package, &tree, &order));
    }
    findings.dedup();
    Ok(findings)
}

/// Checks that the list names every module of its sections, and no others.
fn check_names(package: &str, tree: &Tree, order: &Order) -> Vec<String> {
    let mut findings = Vec::new();
    if !order.sections(package).any(|(directory, _)| directory.is_empty()) {
        findings.push(format!("{LIST_NAME}: there is no section [{package}]"));
    }
    for (directory, names) in order.sections(package) {
        let section = show(package, directory);
        if !tree.contains(directory) {
            findings.push(format!("{LIST_NAME}: [{section}] is not a module"));
            continue;
        }
        for name in
            names.iter().filter(|name| *name != OWN_FILE && !tree.has_child(directory, name))
        {
            findings.push(format!("{LIST_NAME}: [{section}] has no module {name}"));
        }
        let own_file = OWN_FILE.to_owned();
        let children = tree.children(directory);
        for name in children.into_iter().chain([&own_file]).filter(|name| !names.contains(name)) {
            findings.push(format!(
                "{LIST_NAME}: [{section}] does not say where {name} stands; add it above all \
                 that it uses and below all that use it"
            ));
        }
    }
    findings
}

/// Checks that every use points down or is an exception, and that every exception is needed.
fn check_uses(root: &Path, package: &str, tree: &Tree, order: &Order) -> Vec<String> {
    let mut findings = Vec::new();
    let exceptions = order.exceptions.iter().filter(|exception| exception.package == package);
    let mut unneeded: Vec<_> = exceptions.clone().collect();
    for found in tree.uses() {
        let file = found.file.strip_prefix(root).unwrap_or(&found.file).display();
        if found.is_through_root {
            let (line, path, to) = (found.line, &found.path, show("crate", &found.to));
            findings.push(format!(
                "{file}:{line}: {path} is named by the root of its crate; name it by {to}"
            ));
        }
        let Some(step) = order.points_up(package, &found.from, &found.to) else { continue };
        unneeded.retain(|exception| exception.from != found.from || exception.to != found.to);
        let is_excepted = exceptions
            .clone()
            .any(|exception| exception.from == found.from && exception.to == found.to);
        if !is_excepted {
            findings.push(format!(
                "{file}:{}: {} points up: in [{}] of {LIST_NAME} {} stands below {}",
                found.line,
                found.path,
                show(package, &step.directory),
                step.lower,
                step.upper,
            ));
        }
    }
    findings.extend(unneeded.into_iter().map(|exception| {
        let (from, to) = (show(package, &exception.from), show(package, &exception.to));
        format!("{LIST_NAME}: the exception {from} -> {to} is not needed any more; remove it")
    }));
    findings
}

fn show(package: &str, module: &Module) -> String {
    std::iter::once(package).chain(module.iter().map(String::as_str)).collect::<Vec<_>>().join("::")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    const ORDER: &str = "[a]\nerror\nio\nself\n[a::io]\nfile\ncache\nself\n";

    /// A crate with `error` below `io`, which has `file` below `cache`.
    fn workspace(changed: &[(&str, &str)]) -> TempDir {
        let directory = tempfile::tempdir().expect("temporary directory");
        let source = directory.path().join("a/src");
        fs::create_dir_all(source.join("io")).expect("directory");
        let files = [
            (
                "lib.rs",
                "mod error;\npub mod io;\npub use error::Error;\n#[cfg(test)]\nmod tests;\n",
            ),
            ("error.rs", "pub struct Error;\n"),
            ("io/mod.rs", "mod cache;\nmod file;\npub use cache::Cache;\nuse file::File;\n"),
            ("io/file.rs", "use crate::error::Error;\npub struct File;\n"),
            ("io/cache.rs", "use super::File;\nuse crate::error::Error;\npub struct Cache;\n"),
        ];
        for (name, text) in files.iter().chain(changed) {
            fs::write(source.join(name), text).expect("file");
        }
        directory
    }

    fn findings(directory: &TempDir, order: &str) -> Vec<String> {
        check(directory.path(), &[("a", "a/src")], order).expect("readable")
    }

    #[test]
    fn uses_that_point_down_pass() {
        assert_eq!(findings(&workspace(&[]), ORDER), Vec::<String>::new());
    }

    #[test]
    fn planted_upward_use_is_found() {
        for (file, text, line) in [
            ("error.rs", "\nuse crate::io::Cache;\n", 2),
            ("error.rs", "fn f() {\n    let c = super::io::cache::Cache;\n}\n", 2),
            ("error.rs", "use std::fmt;\nuse crate::{\n    io::{self, Cache}\n};\n", 2),
            ("io/file.rs", "use super::cache::Cache;\n", 1),
            ("io/file.rs", "use super::Cache;\n", 1),
            ("io/file.rs", "use crate::io::*;\n", 1),
            ("io/file.rs", "\n\nmod inner {\n    use super::super::cache::Cache;\n}\n", 4),
        ] {
            let found = findings(&workspace(&[(file, text)]), ORDER);
            assert!(!found.is_empty(), "{file}: {text}");
            let place = format!("a/src/{file}:{line}: ");
            assert!(found.iter().all(|finding| finding.starts_with(&place)), "{found:?}");
            assert!(found[0].contains("points up"), "{found:?}");
        }
    }

    #[test]
    fn name_that_the_root_only_exports_is_found() {
        for text in ["use crate::{Error, error};\n", "fn f() -> super::super::Error {}\n"] {
            let found = findings(&workspace(&[("io/file.rs", text)]), ORDER);
            assert_eq!(found.len(), 1, "{text}: {found:?}");
            assert!(found[0].starts_with("a/src/io/file.rs:1: "), "{found:?}");
            assert!(found[0].ends_with("name it by crate::error"), "{found:?}");
        }
    }

    #[test]
    fn tests_comments_and_texts_may_name_what_they_like() {
        let text = "// use crate::io::Cache;\nconst A: &str = \"crate::io::Cache\";\n\
                    #[cfg(test)]\nmod tests {\n    use crate::io::Cache;\n}\n";
        assert_eq!(findings(&workspace(&[("error.rs", text)]), ORDER), Vec::<String>::new());
    }

    #[test]
    fn exception_lets_one_use_pass_and_is_found_when_it_is_stale() {
        let list = format!("{ORDER}[exceptions]\na::error -> a::io::cache\n");
        let circle = workspace(&[("error.rs", "use crate::io::Cache;\n")]);
        assert_eq!(findings(&circle, &list), Vec::<String>::new());
        let found = findings(&workspace(&[]), &list);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("a::error -> a::io::cache is not needed"), "{found:?}");
    }

    #[test]
    fn list_and_modules_name_the_same() {
        let found = findings(&workspace(&[]), &ORDER.replace("file\n", ""));
        assert!(found[0].contains("[a::io] does not say where file stands"), "{found:?}");
        let found = findings(&workspace(&[]), &ORDER.replace("file\n", "file\ngone\n"));
        assert!(found[0].contains("[a::io] has no module gone"), "{found:?}");
        let found = findings(&workspace(&[]), &format!("{ORDER}[a::gone]\nself\n[b]\nself\n"));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(!findings(&workspace(&[]), "").is_empty(), "no section for the crate");
    }
}
