//! Checks that the paths in the documents of the workspace exist.

/// Finds paths in backticks for which `exists` returns false: those with a `/` that end in `.rs` or
/// `/`.
pub(crate) fn check(document: &str, text: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut findings = Vec::new();
    let mut is_in_block = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            is_in_block = !is_in_block;
            continue;
        }
        if is_in_block {
            continue;
        }
        // Every second piece between backticks is code.
        for span in line.split('`').skip(1).step_by(2) {
            let is_path = span.contains('/') && (span.ends_with(".rs") || span.ends_with('/'));
            let is_pattern = span.contains(['*', '{', '<', ' ', ':', '…']) || span.starts_with('/');
            if is_path && !is_pattern && !exists(span) {
                findings.push(format!("{document}:{}: {span} does not exist", index + 1));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_that_is_gone_is_found() {
        let text = "See `nbd-proto/src/uri.rs` and `imgfmt/src/`.\n";
        assert!(check("A.md", text, |_| true).is_empty());
        assert_eq!(check("A.md", text, |path| path != "imgfmt/src/").len(), 1);
        assert_eq!(check("A.md", text, |_| false).len(), 2);
    }

    #[test]
    fn drawings_words_and_addresses_are_no_paths() {
        let text = "```\n`a/b.rs`\n```\n`lib.rs` `read/write` `nbd://host/`\n";
        assert!(check("A.md", text, |_| false).is_empty());
    }
}
