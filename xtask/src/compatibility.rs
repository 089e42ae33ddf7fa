//! The builds of users: each crate alone, with few and with all features, with an older compiler.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::{cargo, is_installed, output_of, run_step, workspace_root};

/// One crate with a choice of features.
struct Choice {
    package: &'static str,
    arguments: &'static [&'static str],
    /// Whether it links the OpenSSL of the system.
    needs_openssl: bool,
}

/// Every crate is built alone, so that features enabled by another crate do not help. The OpenSSL
/// that the rest of the workspace has built already is used where possible.
const CHOICES: &[Choice] = &[
    alone("nbd-proto", &["--no-default-features"]),
    alone("nbd-proto", &["--all-features"]),
    alone("imgfmt", &["--no-default-features"]),
    alone("imgfmt", &["--all-features", "--features", "openssl/vendored"]),
    alone("nbd-client", &["--no-default-features"]),
    alone("nbd-client", &["--all-features", "--features", "openssl/vendored"]),
    alone("nbd-server", &["--no-default-features"]),
    alone("nbd-server", &["--all-features", "--features", "openssl/vendored"]),
    Choice { package: "nbd-jobs", arguments: &["--no-default-features"], needs_openssl: true },
    Choice { package: "nbd-jobs", arguments: &["--all-features"], needs_openssl: true },
    Choice { package: "nbd-objects", arguments: &["--no-default-features"], needs_openssl: true },
    Choice { package: "nbd-objects", arguments: &["--all-features"], needs_openssl: true },
    Choice { package: "nbd-cli", arguments: &["--no-default-features"], needs_openssl: true },
    alone("nbd-cli", &["--all-features"]),
];

const fn alone(package: &'static str, arguments: &'static [&'static str]) -> Choice {
    Choice { package, arguments, needs_openssl: false }
}

/// Lints each library crate with no default features and with all.
///
/// # Errors
///
/// A crate does not compile or has warnings.
pub(crate) fn check_features() -> Result<()> {
    let has_openssl = output_of(Command::new("pkg-config").args(["--exists", "openssl"])).is_ok();
    for choice in CHOICES {
        if choice.needs_openssl && !has_openssl {
            println!("==> features: {} needs the system's OpenSSL: skipped", choice.package);
            continue;
        }
        let mut command = cargo();
        command.args(["clippy", "--quiet", "--locked", "-p", choice.package]);
        command.args(choice.arguments).args(["--", "-D", "warnings"]);
        run_step("features", &mut command)?;
    }
    Ok(())
}

/// Compiles everything with the compiler of `rust-version`, if rustup has it installed; without
/// that compiler, clippy finds newer items of the standard library.
///
/// # Errors
///
/// That compiler refuses something.
pub(crate) fn check_oldest_compiler() -> Result<()> {
    let manifest = std::fs::read_to_string(workspace_root().join("Cargo.toml"))?;
    let version = rust_version(&manifest).context("Cargo.toml names no rust-version")?;
    let installed = output_of(Command::new("rustup").args(["toolchain", "list"]));
    let toolchain = installed.ok().and_then(|list| toolchain_of(&list, version));
    let Some(toolchain) = toolchain else {
        println!("==> oldest compiler: Rust {version} is not installed: skipped");
        return Ok(());
    };
    let mut command = Command::new("rustup");
    command.args(["run", &toolchain, "cargo", "check", "--workspace", "--locked"]);
    command.arg("--target-dir").arg(target_directory().join("oldest-compiler"));
    command.current_dir(workspace_root());
    // These name the compiler that runs this command.
    for name in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN"] {
        command.env_remove(name);
    }
    run_step("oldest compiler", &mut command).map(drop)
}

/// Runs cargo-deny if it is installed; `cargo xtask tidy` has checked licences and sources.
/// Advisories need a database that not every machine can fetch.
///
/// # Errors
///
/// It finds something.
pub(crate) fn check_dependencies() -> Result<()> {
    if !is_installed("cargo-deny") {
        println!("==> dependencies: cargo-deny is not installed: skipped");
        return Ok(());
    }
    let mut command = cargo();
    command.args(["deny", "check", "licenses", "bans", "sources"]);
    run_step("dependencies", &mut command).map(drop)
}

/// The target directory of the separate checks: inside cargo's usual one.
pub(crate) fn target_directory() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace_root().join("target"), PathBuf::from)
}

/// The value of `rust-version` in the workspace's manifest.
fn rust_version(manifest: &str) -> Option<&str> {
    let line = manifest.lines().find(|line| line.starts_with("rust-version"))?;
    line.split('"').nth(1)
}

/// The first toolchain in rustup's list that is of this version, any patch release of it.
fn toolchain_of(list: &str, version: &str) -> Option<String> {
    let names = list.lines().filter_map(|line| line.split_ascii_whitespace().next());
    let is_of = |name: &&str| {
        name.strip_prefix(version)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '.']))
    };
    names.filter(is_of).map(str::to_owned).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn toolchain_of_the_version_is_found_among_others() {
        let list = "stable-x86_64-unknown-linux-gnu (active, default)\n\
                    1.8-x86_64-unknown-linux-gnu\n1.89.0-x86_64-unknown-linux-gnu\n";
        let expected = Some("1.89.0-x86_64-unknown-linux-gnu".to_owned());
        assert_eq!(toolchain_of(list, "1.89"), expected);
        assert_eq!(toolchain_of(list, "1.9"), None);
        assert_eq!(toolchain_of("", "1.89"), None);
    }

    #[test]
    fn every_crate_takes_its_oldest_compiler_from_the_workspace() {
        let root = workspace_root();
        let manifest = std::fs::read_to_string(root.join("Cargo.toml")).expect("the manifest");
        assert!(rust_version(&manifest).is_some());
        let members = manifest.lines().find(|line| line.starts_with("members")).expect("members");
        for member in members.split('"').skip(1).step_by(2) {
            let path = root.join(member).join("Cargo.toml");
            let text = std::fs::read_to_string(&path).expect("a member's manifest");
            assert!(text.contains("rust-version.workspace = true"), "{member}");
        }
    }

    #[test]
    fn every_library_and_the_program_are_compiled_both_ways() {
        for package in [
            "nbd-proto",
            "imgfmt",
            "nbd-client",
            "nbd-server",
            "nbd-jobs",
            "nbd-objects",
            "nbd-cli",
        ] {
            for features in ["--no-default-features", "--all-features"] {
                let is_there = CHOICES.iter().any(|choice| {
                    choice.package == package && choice.arguments.contains(&features)
                });
                assert!(is_there, "{package} {features}");
            }
        }
    }
}
