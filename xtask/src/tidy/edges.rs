//! The allowed dependencies between the crates of the workspace.

use anyhow::{Context, Result};
use serde_json::Value;

use super::lexer::{Source, line_at, word_offsets};

/// The crates of this workspace that one crate may name in its manifest.
struct Allowed {
    name: &'static str,
    /// Dependencies, and dependencies of its tests.
    dependencies: &'static [&'static str],
    /// Dependencies that must be optional.
    optional: &'static [&'static str],
    /// Dependencies of its tests only.
    tests: &'static [&'static str],
}

const LIBRARIES: &[&str] = &["nbd-proto", "nbd-server", "nbd-client", "imgfmt"];

const TABLE: &[Allowed] = &[
    Allowed { name: "nbd-proto", dependencies: &[], optional: &[], tests: &[] },
    // Its tests enable its own feature `test-util`.
    Allowed { name: "imgfmt", dependencies: &[], optional: &[], tests: &["imgfmt"] },
    // Only one of the two network crates may use the other in its tests; otherwise neither could be
    // published.
    Allowed {
        name: "nbd-client",
        dependencies: &["nbd-proto"],
        optional: &["imgfmt"],
        tests: &["nbd-server"],
    },
    Allowed {
        name: "nbd-server",
        dependencies: &["nbd-proto"],
        optional: &["imgfmt"],
        tests: &["imgfmt"],
    },
    Allowed {
        name: "nbd-jobs",
        dependencies: &["nbd-proto", "nbd-client", "imgfmt"],
        optional: &["nbd-server", "nbd-objects"],
        // Its tests enable its own feature `server`.
        tests: &["nbd-jobs"],
    },
    // In place of a crate of the registry, so none of the others names it.
    Allowed { name: "crc-fast", dependencies: &[], optional: &[], tests: &[] },
    // Its tests enable its own feature `test-util`.
    Allowed {
        name: "nbd-objects",
        dependencies: &["imgfmt"],
        optional: &[],
        tests: &["nbd-objects"],
    },
    Allowed {
        name: "nbd-cli",
        dependencies: &["nbd-proto", "nbd-server", "nbd-client", "imgfmt", "nbd-jobs"],
        optional: &["nbd-objects"],
        // Its tests start the store of the feature `test-util`.
        tests: &["nbd-objects"],
    },
    Allowed { name: "benches", dependencies: LIBRARIES, optional: &[], tests: &[] },
    Allowed { name: "xtask", dependencies: &[], optional: &[], tests: &[] },
];

/// Crates for command lines: the libraries neither parse arguments nor draw nor print.
const FOR_PROGRAMS: &[&str] =
    &["clap", "clap_complete", "indicatif", "tracing-subscriber", "anyhow"];

/// The library crates.
const QUIET: &[&str] =
    &["nbd-proto", "nbd-server", "nbd-client", "imgfmt", "nbd-jobs", "nbd-objects"];

/// The sources of each network crate, and its one file that may use images.
const IMAGE_ADAPTERS: [(&str, &str); 2] = [
    ("nbd-server/src/", "nbd-server/src/export/image.rs"),
    ("nbd-client/src/", "nbd-client/src/storage.rs"),
];

/// Checks the output of `cargo metadata --no-deps` against the table.
///
/// # Errors
///
/// `metadata` is not in cargo's format.
pub(crate) fn check(metadata: &str) -> Result<Vec<String>> {
    let metadata: Value = serde_json::from_str(metadata).context("cargo metadata is not JSON")?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let mut findings = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(allowed) = TABLE.iter().find(|allowed| allowed.name == name) else {
            findings.push(format!("{name}: this crate is not in the table of allowed edges"));
            continue;
        };
        let dependencies = package["dependencies"].as_array().map_or(&[][..], Vec::as_slice);
        for dependency in dependencies {
            findings.extend(check_dependency(allowed, dependency));
        }
    }
    Ok(findings)
}

fn check_dependency(allowed: &Allowed, dependency: &Value) -> Option<String> {
    let name = dependency["name"].as_str().unwrap_or_default();
    let is_for_tests = dependency["kind"].as_str() == Some("dev");
    if QUIET.contains(&allowed.name) && FOR_PROGRAMS.contains(&name) && !is_for_tests {
        return Some(format!("{}: a library may not depend on {name}", allowed.name));
    }
    if !TABLE.iter().any(|known| known.name == name) {
        return None;
    }
    let is_optional = dependency["optional"].as_bool() == Some(true);
    // A crate's tests may enable other features of the crate than its users do.
    if allowed.dependencies.contains(&name)
        || (is_for_tests && allowed.name == name)
        || (is_for_tests && allowed.tests.contains(&name))
        || (is_optional && allowed.optional.contains(&name))
    {
        return None;
    }
    Some(if allowed.optional.contains(&name) {
        format!("{}: the dependency on {name} has to be optional", allowed.name)
    } else {
        format!("{}: may not depend on {name}", allowed.name)
    })
}

/// Returns the library crates.
pub(crate) fn libraries() -> &'static [&'static str] {
    QUIET
}

/// Checks the output of `cargo tree --edges normal --prefix none` for a library, with all its
/// features: indirect dependencies count too.
pub(crate) fn check_tree(name: &str, tree: &str) -> Vec<String> {
    let allowed = TABLE.iter().find(|allowed| allowed.name == name);
    let knows_others = allowed.is_some_and(|allowed| !allowed.dependencies.is_empty());
    let mut findings = Vec::new();
    for line in tree.lines() {
        let Some(dependency) = line.split(' ').next().filter(|found| *found != name) else {
            continue;
        };
        let is_ours = TABLE.iter().any(|known| known.name == dependency);
        let why = if FOR_PROGRAMS.contains(&dependency) {
            "its tree has"
        } else if is_ours && !knows_others {
            "it may know no other crate, and its tree has"
        } else {
            continue;
        };
        let finding = format!("{name}: {why} {dependency}");
        if !findings.contains(&finding) {
            findings.push(finding);
        }
    }
    findings
}

/// Checks that in the sources of the network crates only the adapters name `imgfmt`.
pub(crate) fn check_image_adapter(path: &str, source: &Source) -> Vec<String> {
    let adapter = IMAGE_ADAPTERS.iter().find(|(sources, _)| path.starts_with(sources));
    // Its submodules are in a directory of its name.
    let is_within = |adapter: &str| {
        path == adapter || path.starts_with(&format!("{}/", adapter.trim_end_matches(".rs")))
    };
    let Some((_, adapter)) = adapter.filter(|(_, adapter)| !is_within(adapter)) else {
        return Vec::new();
    };
    let code = source.code_without_tests();
    word_offsets(&code, "imgfmt")
        .into_iter()
        .map(|offset| {
            format!("{path}:{}: names imgfmt, which only {adapter} may", line_at(&code, offset))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(name: &str, dependency: &str, kind: &str, optional: bool) -> String {
        format!(
            r#"{{"packages":[{{"name":"{name}","dependencies":[
                {{"name":"{dependency}","kind":{kind},"optional":{optional}}},
                {{"name":"bytes","kind":null,"optional":false}}]}}]}}"#
        )
    }

    #[test]
    fn protocol_and_images_may_not_know_each_other() {
        for (name, other) in [("nbd-proto", "imgfmt"), ("imgfmt", "nbd-proto")] {
            let findings = check(&metadata(name, other, "null", false)).expect("metadata");
            assert_eq!(findings, [format!("{name}: may not depend on {other}")]);
        }
    }

    #[test]
    fn client_may_use_the_server_in_tests_only() {
        let in_tests = check(&metadata("nbd-client", "nbd-server", "\"dev\"", false));
        assert!(in_tests.expect("metadata").is_empty());
        let in_library = check(&metadata("nbd-client", "nbd-server", "null", false));
        assert_eq!(in_library.expect("metadata").len(), 1);
        let other_way = check(&metadata("nbd-server", "nbd-client", "\"dev\"", false));
        assert_eq!(other_way.expect("metadata").len(), 1, "both ways would be a circle");
    }

    #[test]
    fn server_names_images_as_an_optional_dependency() {
        let optional = check(&metadata("nbd-server", "imgfmt", "null", true)).expect("metadata");
        assert!(optional.is_empty());
        let fixed = check(&metadata("nbd-server", "imgfmt", "null", false)).expect("metadata");
        assert_eq!(fixed, ["nbd-server: the dependency on imgfmt has to be optional"]);
    }

    #[test]
    fn engines_know_no_command_line() {
        let of_jobs = |dependency, kind| {
            check(&metadata("nbd-jobs", dependency, kind, false)).expect("metadata")
        };
        assert_eq!(of_jobs("clap", "null"), ["nbd-jobs: a library may not depend on clap"]);
        assert_eq!(of_jobs("indicatif", "null").len(), 1);
        let server = of_jobs("nbd-server", "null");
        assert_eq!(server, ["nbd-jobs: the dependency on nbd-server has to be optional"]);
        let optional = check(&metadata("nbd-jobs", "nbd-server", "null", true)).expect("metadata");
        assert!(optional.is_empty(), "the feature `server` turns it on");
        assert!(of_jobs("imgfmt", "null").is_empty() && of_jobs("clap", "\"dev\"").is_empty());
        assert!(check(&metadata("nbd-cli", "clap", "null", false)).expect("metadata").is_empty());
    }

    #[test]
    fn command_line_deep_in_the_tree_of_a_library_is_found() {
        let tree = "nbd-jobs v0.1.0 (/src)\ntokio v1.0.0\nclap v4.5.0\nnbd-proto v0.1.0 (*)\nclap v4.5.0 (*)\n";
        assert_eq!(check_tree("nbd-jobs", tree), ["nbd-jobs: its tree has clap"]);
        assert!(check_tree("nbd-jobs", "nbd-jobs v0.1.0\nclap_lex v0.7.0\n").is_empty());
    }

    #[test]
    fn protocol_and_images_know_no_crate_of_ours_even_deep_in_the_tree() {
        for name in ["nbd-proto", "imgfmt"] {
            let tree = format!("{name} v0.1.0\nlibc v0.2.0\nnbd-client v0.1.0 (/src)\n");
            let finding =
                format!("{name}: it may know no other crate, and its tree has nbd-client");
            assert_eq!(check_tree(name, &tree), [finding]);
        }
        assert!(check_tree("nbd-client", "nbd-client v0.1.0\nnbd-proto v0.1.0\n").is_empty());
    }

    #[test]
    fn nobody_depends_on_the_command_line() {
        for name in ["benches", "xtask", "nbd-client"] {
            let findings = check(&metadata(name, "nbd-cli", "null", false)).expect("metadata");
            assert_eq!(findings.len(), 1, "{name}");
        }
    }

    #[test]
    fn unknown_crate_has_to_be_added_to_the_table() {
        assert_eq!(check(&metadata("nbd-new", "x", "null", false)).expect("metadata").len(), 1);
    }

    #[test]
    fn imgfmt_is_named_in_the_adapters_only() {
        let source = Source::new("//! About imgfmt.\nuse imgfmt::Image;\n");
        assert!(check_image_adapter("nbd-cli/src/lib.rs", &source).is_empty());
        for (sources, adapter) in IMAGE_ADAPTERS {
            assert!(check_image_adapter(adapter, &source).is_empty());
            let findings = check_image_adapter(&format!("{sources}lib.rs"), &source);
            assert_eq!(findings.len(), 1);
            assert!(findings[0].starts_with(&format!("{sources}lib.rs:2:")), "{findings:?}");
        }
    }
}
