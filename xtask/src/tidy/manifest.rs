//! Every dependency has its purpose beside it in the manifest.

/// The crates of this workspace need no comment.
const OWN_CRATES: &[&str] =
    &["nbd-proto", "nbd-server", "nbd-client", "imgfmt", "nbd-jobs", "nbd-objects", "nbd-cli"];

/// Finds dependencies without a comment on their own line or on the one above.
pub(crate) fn check(path: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let mut is_in_dependencies = false;
    let mut previous = "";
    for (index, line) in text.lines().map(str::trim).enumerate() {
        let mut dependency = None;
        if let Some(header) = line.strip_prefix('[') {
            let header = header.split(']').next().unwrap_or_default();
            is_in_dependencies = header.ends_with("dependencies");
            // `[dependencies.name]` is a table of its own.
            dependency = header
                .split_once("dependencies.")
                .map(|(_, name)| name)
                .filter(|name| !name.contains('.'));
        } else if is_in_dependencies && !line.starts_with('#') {
            dependency = line.split(['.', '=', ' ']).next().filter(|name| is_name(name));
        }
        if let Some(name) = dependency
            && !OWN_CRATES.contains(&name)
            && !line.contains('#')
            && !previous.starts_with('#')
        {
            findings.push(format!("{path}:{}: no comment says what {name} is for", index + 1));
        }
        previous = line;
    }
    findings
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependency_without_a_reason_is_found() {
        let text = "[package]\nname = \"x\"\n[dependencies]\nbytes.workspace = true\n";
        assert_eq!(
            check("x/Cargo.toml", text),
            ["x/Cargo.toml:4: no comment says what bytes is for"]
        );
        let text = "[dev-dependencies]\ntempfile = { workspace = true }\n";
        assert_eq!(check("x/Cargo.toml", text).len(), 1);
        let text = "[dependencies.bytes]\nversion = \"1\"\n";
        assert_eq!(check("x/Cargo.toml", text).len(), 1);
    }

    #[test]
    fn reason_stands_beside_or_above() {
        let text = "[dependencies]\nnbd-proto.workspace = true\n# buffers\nbytes = \"1\"\n\
                    rustix = { workspace = true } # files\n\n[features]\na = []\n";
        assert_eq!(check("x/Cargo.toml", text), Vec::<String>::new());
    }
}
