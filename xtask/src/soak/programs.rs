//! The programs under test, built once.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::command::{cargo, output_of};

/// The paths of the programs.
#[derive(Debug)]
pub(super) struct Programs {
    /// `nbd-cli`.
    pub(super) cli: PathBuf,
    /// Integration tests by package and name, with their working directory.
    tests: HashMap<(String, String), PathBuf>,
}

impl Programs {
    /// The executable of an integration test.
    ///
    /// # Errors
    ///
    /// There is no such test.
    pub(super) fn test(&self, package: &str, name: &str) -> Result<&Path> {
        let key = (package.to_owned(), name.to_owned());
        let path = self.tests.get(&key);
        path.map(PathBuf::as_path).with_context(|| format!("{package} has no test '{name}'"))
    }
}

#[cfg(test)]
impl Programs {
    /// None, for judges that need none.
    pub(super) fn none() -> Self {
        Self { cli: PathBuf::new(), tests: HashMap::new() }
    }
}

/// Builds the program, and the test programs of these names.
///
/// # Errors
///
/// A program or test does not compile.
pub(super) fn build(profile: &str, tests: &BTreeSet<&str>) -> Result<Programs> {
    let mut command = cargo();
    command.args(["build", "--workspace", "--locked", "--profile", profile, "--bin", "nbd-cli"]);
    let built = executables(&mut command)?;
    let cli = built.into_iter().find(|(_, name, _)| name == "nbd-cli");
    let (_, _, cli) = cli.context("cargo built no nbd-cli")?;
    if tests.is_empty() {
        return Ok(Programs { cli, tests: HashMap::new() });
    }
    let mut command = cargo();
    command.args(["test", "--no-run", "--workspace", "--locked", "--profile", profile]);
    for test in tests {
        command.args(["--test", test]);
    }
    let tests = executables(&mut command)?;
    let tests = tests.into_iter().map(|(package, name, path)| ((package, name), path)).collect();
    Ok(Programs { cli, tests })
}

/// Package, target name and path of everything that a cargo command builds.
fn executables(command: &mut std::process::Command) -> Result<Vec<(String, String, PathBuf)>> {
    command.args(["--message-format", "json-render-diagnostics", "--quiet"]);
    let output = output_of(command)?;
    Ok(output.lines().filter_map(executable).collect())
}

/// Returns the executable in a line of cargo's JSON output.
fn executable(line: &str) -> Option<(String, String, PathBuf)> {
    let message: Value = serde_json::from_str(line).ok()?;
    let path = message.get("executable")?.as_str()?;
    let name = message.pointer("/target/name")?.as_str()?;
    let manifest = Path::new(message.get("manifest_path")?.as_str()?);
    let package = manifest.parent()?.file_name()?.to_str()?;
    Some((package.to_owned(), name.to_owned(), PathBuf::from(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_found_in_what_cargo_says() {
        let line = r#"{"reason":"compiler-artifact","manifest_path":"/x/imgfmt/Cargo.toml",
            "target":{"kind":["test"],"name":"crash"},"executable":"/x/target/crash-1"}"#;
        let found = executable(&line.replace('\n', ""));
        assert_eq!(found, Some(("imgfmt".into(), "crash".into(), "/x/target/crash-1".into())));
        assert_eq!(executable(r#"{"reason":"build-finished","success":true}"#), None);
    }
}
