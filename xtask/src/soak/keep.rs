//! Keeps failed rounds for repetition.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

/// Larger directories are not kept: the seed reproduces them.
const LARGEST: u64 = 32 << 20;

/// A failed round.
#[derive(Debug)]
pub(super) struct Case<'a> {
    pub(super) judge: &'a str,
    pub(super) seed: u64,
    pub(super) profile: &'a str,
    pub(super) takeovers: u64,
}

impl Case<'_> {
    /// Writes the error, the command that repeats it, and the files of the round if they are small.
    ///
    /// # Errors
    ///
    /// A file cannot be written.
    pub(super) fn keep(&self, keep: &Path, directory: &Path, what: &str) -> Result<()> {
        let name = format!("{}-{}", self.judge, self.seed);
        let text = format!(
            "cargo xtask soak --profile {} --takeovers {} --repeat {}:{}\n\n{what}\n",
            self.profile, self.takeovers, self.judge, self.seed
        );
        let path = keep.join(format!("{name}.txt"));
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        if allocated(directory)? <= LARGEST {
            let archive = keep.join(format!("{name}.tar.gz"));
            let status = Command::new("tar")
                .args(["--ignore-failed-read", "-czSf"])
                .arg(&archive)
                .arg("-C")
                .arg(directory)
                .arg(".")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .context("cannot start tar")?;
            // Sockets are not archived; tar reports that with a special status.
            if !status.success() && !archive.is_file() {
                anyhow::bail!("tar: {status}");
            }
        }
        Ok(())
    }
}

/// The space that the files of a directory take up, in bytes.
fn allocated(directory: &Path) -> Result<u64> {
    let mut sum = 0_u64;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            sum = sum.saturating_add(allocated(&entry.path())?);
        } else {
            sum = sum.saturating_add(metadata.blocks().saturating_mul(512));
        }
    }
    Ok(sum)
}

/// The beginning of a text, for the terminal.
pub(super) fn first_lines(text: &str, count: usize) -> String {
    text.lines().take(count).collect::<Vec<_>>().join("\n      ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_case_says_how_to_repeat_it_and_holds_its_files() {
        let keep = tempfile::tempdir().expect("directory");
        let directory = tempfile::tempdir().expect("directory");
        fs::write(directory.path().join("image"), "bytes").expect("file");
        let case = Case { judge: "kills", seed: 7, profile: "dev", takeovers: 20 };
        case.keep(keep.path(), directory.path(), "two words differ").expect("kept");
        let text = fs::read_to_string(keep.path().join("kills-7.txt")).expect("text");
        assert!(
            text.starts_with("cargo xtask soak --profile dev --takeovers 20 --repeat kills:7\n"),
            "{text}"
        );
        assert!(text.contains("two words differ"), "{text}");
        assert!(keep.path().join("kills-7.tar.gz").is_file());
    }
}
