//! `cargo xtask tidy`: the project rules that rustfmt and clippy do not check.
//!
//! Every check is a function from text to findings, so that its own tests can show that it fails
//! when it should. This file walks the workspace and runs the checks.

mod architecture;
mod columns;
mod edges;
mod engines;
mod functions;
mod lexer;
mod locks;
mod manifest;
mod order;
mod protocol;
mod source;
mod supply;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{cargo, output_of, workspace_root};

/// Checks the whole workspace and prints what it finds.
///
/// # Errors
///
/// There is at least one finding, or a file cannot be read.
pub(crate) fn run() -> Result<()> {
    println!("==> tidy");
    let findings = check(&workspace_root())?;
    for finding in &findings {
        println!("tidy: {finding}");
    }
    if !findings.is_empty() {
        bail!("step `tidy` failed: {} findings", findings.len());
    }
    println!("<== tidy: ok");
    Ok(())
}

/// Returns all findings in the workspace at `root`: `file:line: what`, in the order of files.
fn check(root: &Path) -> Result<Vec<String>> {
    let mut metadata = cargo();
    metadata.args(["metadata", "--no-deps", "--format-version", "1"]);
    let mut findings = edges::check(&output_of(&mut metadata)?)?;
    findings.extend(check_trees()?);
    findings.extend(check_supply(root)?);
    let mut files = Vec::new();
    collect_text_files(root, &mut files)?;
    files.sort();
    let is_somewhere = |name: &str| files.iter().any(|file| file.ends_with(name));
    for file in &files {
        let text = fs::read_to_string(file)
            .with_context(|| format!("cannot read {} as text", file.display()))?;
        let path = file.strip_prefix(root).unwrap_or(file).to_string_lossy().into_owned();
        findings.extend(check_file(&path, &text));
        let is_document = path.starts_with("docs/") || !path.contains('/');
        if path.ends_with(".md") && is_document || path == "imgfmt/DESIGN.md" {
            findings.extend(architecture::check(&path, &text, |named| match named.contains('/') {
                true => exists(root, named),
                false => is_somewhere(named),
            }));
        }
        if path == "ARCHITECTURE.md" {
            findings.extend(architecture::check_answers(&path, &text));
        }
    }
    findings.extend(engines::check_lists(|path| root.join(path).exists()));
    findings.extend(order::check(root, order::CRATES, order::LIST)?);
    Ok(findings)
}

/// Checks what the libraries depend on, directly or not, with all features.
fn check_trees() -> Result<Vec<String>> {
    let mut findings = Vec::new();
    for name in edges::libraries() {
        let mut tree = cargo();
        tree.args(["tree", "--locked", "--package", name, "--edges", "normal"]);
        tree.args(["--all-features", "--prefix", "none"]);
        findings.extend(edges::check_tree(name, &output_of(&mut tree)?));
    }
    Ok(findings)
}

/// Checks third-party crates, as far as they are compiled on this machine.
fn check_supply(root: &Path) -> Result<Vec<String>> {
    let read = |name: &str| {
        fs::read_to_string(root.join(name)).with_context(|| format!("cannot read {name}"))
    };
    let mut metadata = cargo();
    metadata.args(["metadata", "--locked", "--format-version", "1"]);
    // Without a platform cargo would fetch the crates of all.
    metadata.args(["--filter-platform", &host_platform()?]);
    let mut findings = supply::check_licences(&output_of(&mut metadata)?, &read("deny.toml")?)?;
    findings.extend(supply::check_sources(&read("Cargo.lock")?));
    Ok(findings)
}

/// The host platform of this workspace's compiler, in rustc's notation.
fn host_platform() -> Result<String> {
    let mut rustc = Command::new("rustc");
    rustc.arg("-vV").current_dir(workspace_root());
    let version = output_of(&mut rustc)?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}

/// Every check of a single file. `path` is relative to the workspace and selects the checks.
fn check_file(path: &str, text: &str) -> Vec<String> {
    let mut findings = source::check_text(path, text);
    if path.ends_with("Cargo.toml") && path != "Cargo.toml" {
        findings.extend(manifest::check(path, text));
    }
    if path.ends_with(".md") {
        findings.extend(columns::check(path, text));
    }
    if path.ends_with(".toml") {
        findings.extend(columns::check_toml(path, text));
    }
    if path.ends_with(".rs") {
        let source = lexer::Source::new(text);
        findings.extend(source::check_code(path, text, &source));
        findings.extend(columns::check_comments(path, text, &source));
        findings.extend(functions::check(path, &source));
        findings.extend(protocol::check(path, &source));
        findings.extend(edges::check_image_adapter(path, &source));
        findings.extend(engines::check(path, &source));
        findings.extend(locks::check(path, &source));
    }
    findings
}

/// Hand-written files: not corpora, golden images or build output.
fn collect_text_files(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && !path.is_symlink() {
            if !["target", ".git", "corpus", "artifacts"].contains(&name.as_str()) {
                collect_text_files(&path, files)?;
            }
        } else if name.ends_with(".rs")
            || name.ends_with(".toml")
            || name.ends_with(".md")
            || path.ends_with(".ci/run")
        {
            files.push(path);
        }
    }
    Ok(())
}

/// Returns whether a path in a document exists, relative to the workspace or to a crate.
fn exists(root: &Path, path: &str) -> bool {
    const CRATES: &[&str] = &[
        "",
        "nbd-proto",
        "nbd-server",
        "nbd-client",
        "imgfmt",
        "nbd-cli",
        "nbd-cli/jobs",
        "nbd-cli/objects",
        "benches",
        "xtask",
    ];
    CRATES.iter().any(|name| {
        root.join(name).join(path).exists() || root.join(name).join("src").join(path).exists()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_is_tidy() {
        let findings = check(&workspace_root()).expect("the workspace can be read");
        assert!(findings.is_empty(), "{}", findings.join("\n"));
    }

    #[test]
    fn one_file_goes_through_every_check_that_fits_it() {
        let code = "use std::fs;\nuse imgfmt::Image;\nfn f() {\n    todo!();\t\n}\n";
        let findings = check_file("nbd-proto/src/lib.rs", code).join("\n");
        assert!(findings.contains("lib.rs:1: the protocol crate"), "{findings}");
        assert!(findings.contains("lib.rs:4: unfinished code"), "{findings}");
        assert!(findings.contains("lib.rs:4: tab"), "{findings}");
        let findings = check_file("nbd-server/src/export/memory.rs", code).join("\n");
        assert!(findings.contains("memory.rs:2: names imgfmt"), "{findings}");
    }
}
