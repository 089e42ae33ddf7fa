//! The width of lines in documents and comments, which rustfmt does not wrap.

use super::lexer::Source;

/// Most columns of a line, counted in characters.
const MAXIMUM_COLUMNS: usize = 100;

/// Finds lines of a document that are too long. Tables, code blocks and unbreakable text (an
/// address, a span of code) may be longer.
pub(crate) fn check(path: &str, text: &str) -> Vec<String> {
    check_lines(path, text.lines().map(|line| Some((line, line))))
}

/// Finds comments of Rust source that are too long, by the same rules.
pub(crate) fn check_comments(path: &str, text: &str, source: &Source) -> Vec<String> {
    let comments = source.comments.lines().map(str::trim_start).map(|comment| {
        let content = comment.strip_prefix("//")?;
        Some(content.strip_prefix(['/', '!']).unwrap_or(content))
    });
    let lines = text.lines().zip(comments);
    check_lines(path, lines.map(|(line, content)| Some((line, content?))))
}

/// Finds comments of a manifest or a configuration that are too long, by the same rules.
pub(crate) fn check_toml(path: &str, text: &str) -> Vec<String> {
    let lines = text.lines().map(|line| Some((line, line.trim_start().strip_prefix('#')?)));
    check_lines(path, lines)
}

/// Checks lines and the texts at their ends, which have no marker of a comment. A line without a
/// text ends a block.
fn check_lines<'a>(
    path: &str,
    lines: impl Iterator<Item = Option<(&'a str, &'a str)>>,
) -> Vec<String> {
    let mut findings = Vec::new();
    let mut is_in_block = false;
    for (index, line) in lines.enumerate() {
        let Some((line, content)) = line else {
            is_in_block = false;
            continue;
        };
        if content.trim_start().starts_with("```") {
            is_in_block = !is_in_block;
            continue;
        }
        let columns = line.chars().count();
        let is_table = content.trim_start().starts_with('|');
        if is_in_block || is_table || columns <= MAXIMUM_COLUMNS {
            continue;
        }
        let before = columns - content.chars().count();
        if can_be_broken(content, MAXIMUM_COLUMNS.saturating_sub(before)) {
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
fn can_be_broken(content: &str, limit: usize) -> bool {
    let indent = content.chars().take_while(|character| *character == ' ').count();
    let mut is_code = false;
    let mut has_word = false;
    for (column, character) in content.chars().enumerate().skip(indent).take(limit) {
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

    fn comments(text: &str) -> Vec<String> {
        check_comments("a/src/lib.rs", text, &Source::new(text))
    }

    #[test]
    fn comment_over_the_limit_is_found_and_one_at_the_limit_passes() {
        let words = "é".repeat(45);
        for marker in ["//!", "///", "//"] {
            let line = format!("    {marker} {words} {words}");
            let missing = MAXIMUM_COLUMNS - line.chars().count();
            let at = format!("{line}{}\n", "a".repeat(missing));
            assert!(comments(&at).is_empty(), "{marker}");
            let over = format!("fn f() {{}}\n{line}{}\n", "a".repeat(missing + 1));
            assert_eq!(comments(&over), ["a/src/lib.rs:2: 101 columns, more than 100"]);
        }
        let after_code = format!("const A: u8 = 1; // {}\n", "word ".repeat(20));
        assert_eq!(comments(&after_code).len(), 1);
        let manifest = format!("[dependencies]\n# {}\n", "word ".repeat(20));
        assert_eq!(check_toml("Cargo.toml", &manifest).len(), 1);
        assert!(check_toml("Cargo.toml", &manifest.replace("# ", "a = ")).is_empty());
    }

    #[test]
    fn long_code_and_strings_tables_examples_and_addresses_in_comments_pass() {
        let words = "word ".repeat(30);
        for text in [
            format!("const A: &str = \"// {words}\";\n"),
            format!("const A: &str = \"\n// {words}\n\";\n"),
            format!("/// | {words} |\n"),
            format!("/// ```\n/// {words}\n/// ```\n"),
            format!("// https://example.invalid/{}\n", "a".repeat(100)),
            format!("/// - `{words}`\n"),
        ] {
            assert!(comments(&text).is_empty(), "{text}");
        }
        let after = format!("/// ```\nfn f() {{}}\n/// {words}\n");
        assert_eq!(comments(&after).len(), 1, "the block has ended with the comment");
    }
}
