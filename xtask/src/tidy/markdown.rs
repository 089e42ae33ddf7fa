//! The width of lines in documents.

/// Most columns of a line, counted in characters.
const MAXIMUM_COLUMNS: usize = 100;

/// Finds lines that are too long. Tables, code blocks and unbreakable text (an address, a span of
/// code) may be longer.
pub(crate) fn check(path: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let mut is_in_block = false;
    for (index, line) in text.lines().enumerate() {
        let content = line.trim_start();
        if content.starts_with("```") {
            is_in_block = !is_in_block;
            continue;
        }
        let columns = line.chars().count();
        if is_in_block || content.starts_with('|') || columns <= MAXIMUM_COLUMNS {
            continue;
        }
        if can_be_broken(line) {
            findings.push(format!(
                "{path}:{}: {columns} columns, more than {MAXIMUM_COLUMNS}",
                index + 1
            ));
        }
    }
    findings
}

/// Returns whether there is a blank outside code spans and addresses within the limit, after the
/// first word.
fn can_be_broken(line: &str) -> bool {
    let indent = line.chars().take_while(|character| *character == ' ').count();
    let mut is_code = false;
    let mut has_word = false;
    for (column, character) in line.chars().enumerate().skip(indent).take(MAXIMUM_COLUMNS) {
        match character {
            '`' => is_code = !is_code,
            // The marker of a list item is not a word that can stand alone.
            ' ' if !is_code && column > indent + 2 && has_word => return true,
            ' ' => continue,
            _ => {}
        }
        has_word |= column > indent + 1;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_over_the_limit_is_found_and_one_at_the_limit_passes() {
        let at = format!("ab {}\n", "é".repeat(97));
        assert!(check("A.md", &at).is_empty());
        let findings = check("A.md", &format!("\n- ab {}\n", "é".repeat(97)));
        assert_eq!(findings, ["A.md:2: 102 columns, more than 100"]);
    }

    #[test]
    fn tables_code_blocks_and_addresses_pass() {
        let words = "word ".repeat(30);
        for text in [
            format!("| {words} |\n"),
            format!("```sh\n{words}\n```\n"),
            format!("- https://example.invalid/{}\n", "a".repeat(100)),
            format!("- `{words}`\n"),
        ] {
            assert!(check("A.md", &text).is_empty(), "{text}");
        }
        let after = format!("```\n```\n{words}\n");
        assert_eq!(check("A.md", &after).len(), 1, "the block has ended");
    }
}
