//! The programs of other projects that tests and benchmarks use.

use std::env;
use std::process::Stdio;

use anyhow::{Result, bail};

use crate::apt::{self, Sources, apt_get, can_install};
use crate::command::{is_installed, run_step};
use crate::{machine, seaweedfs};

/// A program that the tests use, and the Debian package that contains it.
struct Peer {
    program: &'static str,
    package: &'static str,
}

const PEERS: &[Peer] = &[
    Peer { program: "qemu-img", package: "qemu-utils" },
    Peer { program: "qemu-io", package: "qemu-utils" },
    Peer { program: "qemu-nbd", package: "qemu-utils" },
    Peer { program: "nbdkit", package: "nbdkit" },
    Peer { program: "nbdinfo", package: "libnbd-bin" },
    Peer { program: "nbdcopy", package: "libnbd-bin" },
    Peer { program: "nbdsh", package: "python3-libnbd" },
    Peer { program: "nbd-server", package: "nbd-server" },
    Peer { program: "fio", package: "fio" },
    Peer { program: "certtool", package: "gnutls-bin" },
    Peer { program: "psktool", package: "gnutls-bin" },
    Peer { program: "openssl", package: "openssl" },
    Peer { program: "mandoc", package: "mandoc" },
    // A module of Python: the path is absolute.
    Peer {
        program: "/usr/lib/python3/dist-packages/prometheus_client/parser.py",
        package: "python3-prometheus-client",
    },
    Peer { program: "chromium", package: "chromium" },
    Peer { program: "fusermount3", package: "fuse3" },
    Peer { program: "sfdisk", package: "fdisk" },
    Peer { program: "mkfs.vfat", package: "dosfstools" },
    Peer { program: "mcopy", package: "mtools" },
    Peer { program: "zsh", package: "zsh" },
    Peer { program: "fish", package: "fish" },
    Peer { program: "busybox", package: "busybox-static" },
    Peer { program: "script", package: "bsdutils" },
    Peer { program: "ldd", package: "libc-bin" },
    // Installs the object store of the tests.
    Peer { program: "pip3", package: "python3-pip" },
    // Single crates and fuzz targets link the system's OpenSSL.
    Peer { program: "pkg-config", package: "pkg-config" },
    Peer { program: "/usr/include/openssl/ssl.h", package: "libssl-dev" },
    // In directories that are not on every user's search path.
    Peer { program: "/usr/sbin/cryptsetup", package: "cryptsetup-bin" },
    Peer { program: "/sbin/mke2fs", package: "e2fsprogs" },
];

/// Installs the missing peers if possible, and reports those that are still missing.
///
/// Tests skip cases that need a missing peer, except in continuous integration (`CI` is set).
///
/// # Errors
///
/// A peer is still missing and `CI` is set.
pub(crate) fn ensure_installed() -> Result<()> {
    ensure_programs()?;
    machine::ensure();
    seaweedfs::ensure();
    Ok(())
}

fn ensure_programs() -> Result<()> {
    let missing = missing_packages(is_installed);
    if missing.is_empty() {
        println!("==> peers: all installed");
        return Ok(());
    }
    println!("==> peers: missing Debian packages: {}", missing.join(" "));
    if can_install() {
        if let Err(error) = install(&missing) {
            println!("peers: installation failed: {error:#}");
        }
    } else {
        println!("peers: cannot install them (that takes root and apt-get)");
    }
    let still_missing = missing_packages(is_installed);
    if still_missing.is_empty() {
        return Ok(());
    }
    let packages = still_missing.join(" ");
    if env::var_os("CI").is_some() {
        bail!("step `peers` failed: CI is set and these packages are missing: {packages}");
    }
    println!("peers: tests that need {packages} will be skipped; to run them all:");
    println!("peers:     sudo apt-get install {packages}");
    Ok(())
}

/// The packages, each once, of the peers for which `is_present` returns false.
fn missing_packages(is_present: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let mut packages = Vec::new();
    for peer in PEERS {
        if !is_present(peer.program) && !packages.contains(&peer.package) {
            packages.push(peer.package);
        }
    }
    packages
}

fn install(packages: &[&str]) -> Result<()> {
    // An outdated index may still have the packages.
    if let Err(error) = run_step("peers", apt_get().arg("update").stdout(Stdio::null())) {
        println!("peers: {error:#}");
    }
    apt::install(packages, &Sources::Usual)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_of_several_missing_programs_is_named_once() {
        let missing = missing_packages(|program| !program.starts_with("qemu-"));
        assert_eq!(missing, ["qemu-utils"]);
    }

    #[test]
    fn nothing_is_missing_when_every_program_is_present() {
        assert!(missing_packages(|_| true).is_empty());
    }
}
