//! Third-party crates: checks the licences and sources of all crates that are compiled.

use anyhow::{Context, Result};
use serde_json::Value;

/// The source of every third-party crate.
const SOURCE: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Checks the licences in the output of `cargo metadata` against `licenses.allow` in `deny.toml`.
///
/// # Errors
///
/// `metadata` is not in cargo's format.
pub(crate) fn check_licences(metadata: &str, deny: &str) -> Result<Vec<String>> {
    let metadata: Value = serde_json::from_str(metadata).context("cargo metadata is not JSON")?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let allowed = allowed_licences(deny);
    let mut findings = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        match package["license"].as_str() {
            Some(licence) if is_allowed(licence, &allowed) => {}
            Some(licence) => findings.push(format!("{name}: deny.toml does not allow {licence}")),
            None => findings.push(format!("{name}: its manifest names no licence")),
        }
    }
    Ok(findings)
}

/// Checks that every crate in `Cargo.lock` is in this workspace or from crates.io.
pub(crate) fn check_sources(lock: &str) -> Vec<String> {
    let mut findings = Vec::new();
    for (index, line) in lock.lines().enumerate() {
        if let Some(source) = line.strip_prefix("source = ")
            && source.trim_matches('"') != SOURCE
        {
            findings.push(format!("Cargo.lock:{}: a crate from {source}", index + 1));
        }
    }
    findings
}

/// The strings in the list `allow` of the section `[licenses]`.
fn allowed_licences(deny: &str) -> Vec<&str> {
    let section = deny.split("\n[licenses]").nth(1).unwrap_or_default();
    let section = section.split("\n[").next().unwrap_or_default();
    let list = section.split("\nallow = [").nth(1).unwrap_or_default();
    let list = list.split(']').next().unwrap_or_default();
    list.split('"').skip(1).step_by(2).collect()
}

/// Returns whether the allowed licences satisfy an SPDX expression. `/` is an old form of `OR`; a
/// licence before a WITH has to be allowed by itself.
fn is_allowed(expression: &str, allowed: &[&str]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let tokens: Vec<&str> = spaced.split_ascii_whitespace().collect();
    let mut at = 0;
    any_of(&tokens, &mut at, allowed) && at == tokens.len()
}

fn any_of(tokens: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    let mut is_met = all_of(tokens, at, allowed);
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        is_met |= all_of(tokens, at, allowed);
    }
    is_met
}

fn all_of(tokens: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    let mut is_met = one(tokens, at, allowed);
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        is_met &= one(tokens, at, allowed);
    }
    is_met
}

fn one(tokens: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    let Some(token) = tokens.get(*at) else { return false };
    *at += 1;
    if *token == "(" {
        let is_met = any_of(tokens, at, allowed);
        let is_closed = tokens.get(*at) == Some(&")");
        *at += 1;
        return is_met && is_closed;
    }
    if tokens.get(*at) == Some(&"WITH") {
        *at += 2;
    }
    allowed.contains(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DENY: &str = "[graph]\nallow = [\"X\"]\n\n[licenses]\n# why\nallow = [\n    \"MIT\",\n    \
                        \"Apache-2.0\",\n]\n\n[bans]\nallow = [\"GPL-3.0\"]\n";

    #[test]
    fn licences_are_read_from_their_section_only() {
        assert_eq!(allowed_licences(DENY), ["MIT", "Apache-2.0"]);
        assert!(allowed_licences("").is_empty());
    }

    #[test]
    fn expressions_are_met_as_spdx_says() {
        let allowed = ["MIT", "Apache-2.0", "Unicode-3.0"];
        for good in [
            "MIT",
            "GPL-2.0 OR MIT",
            "Unlicense/MIT",
            "(MIT OR GPL-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
            "GPL-2.0 AND GPL-3.0 OR MIT",
        ] {
            assert!(is_allowed(good, &allowed), "{good}");
        }
        for bad in ["", "GPL-2.0", "MIT AND GPL-2.0", "(MIT", "MIT)", "(MIT OR X) AND X", "AND"] {
            assert!(!is_allowed(bad, &allowed), "{bad}");
        }
    }

    #[test]
    fn crate_without_an_allowed_licence_is_found() {
        let metadata =
            |licence: &str| format!(r#"{{"packages":[{{"name":"a","license":{licence}}}]}}"#);
        let check = |licence| check_licences(&metadata(licence), DENY).expect("metadata");
        assert!(check(r#""MIT""#).is_empty());
        assert_eq!(check(r#""GPL-3.0""#), ["a: deny.toml does not allow GPL-3.0"]);
        assert_eq!(check("null"), ["a: its manifest names no licence"]);
    }

    #[test]
    fn crate_from_elsewhere_is_found() {
        let lock = format!("[[package]]\nsource = \"{SOURCE}\"\n");
        assert!(check_sources(&lock).is_empty());
        let lock = format!("{lock}source = \"git+https://example.invalid/a\"\n");
        let findings = check_sources(&lock);
        assert!(findings[0].starts_with("Cargo.lock:3: a crate from"), "{findings:?}");
    }
}
