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

/// A round that is repeated.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Repeated {
    pub(super) judge: String,
    pub(super) seed: u64,
    /// `None`: as the options say.
    pub(super) takeovers: Option<u64>,
}

impl Repeated {
    /// Parses `JUDGE:SEED`, or reads the file of a [case](Case::keep).
    ///
    /// # Errors
    ///
    /// It is neither.
    pub(super) fn parse(text: &str) -> Result<Self> {
        if let Some(round) = Self::of_round(text) {
            return Ok(round);
        }
        let kept = fs::read_to_string(text)
            .with_context(|| format!("--repeat takes JUDGE:SEED or a kept file, not {text}"))?;
        let first: Vec<&str> = kept.lines().next().unwrap_or_default().split(' ').collect();
        let after = |option| {
            let at = first.iter().position(|word| *word == option)?;
            first.get(at + 1)
        };
        let round = after("--repeat").and_then(|round| Self::of_round(round));
        let round = round.with_context(|| format!("{text} is not the file of a failed round"))?;
        let takeovers = after("--takeovers").and_then(|count| count.parse().ok());
        Ok(Self { takeovers, ..round })
    }

    fn of_round(text: &str) -> Option<Self> {
        let (judge, seed) = text.split_once(':')?;
        Some(Self { judge: judge.to_owned(), seed: seed.parse().ok()?, takeovers: None })
    }
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
        let repeated = |takeovers| Repeated { judge: "kills".into(), seed: 7, takeovers };
        let file = keep.path().join("kills-7.txt");
        let parsed = Repeated::parse(file.to_str().expect("a name")).expect("a kept file");
        assert_eq!(parsed, repeated(Some(20)));
        assert_eq!(Repeated::parse("kills:7").expect("a round"), repeated(None));
        for wrong in ["kills:x", "kills", "/etc/passwd"] {
            assert!(Repeated::parse(wrong).is_err(), "{wrong}");
        }
    }
}
