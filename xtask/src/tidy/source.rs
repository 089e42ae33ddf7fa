//! Rules about single lines and files.

use super::lexer::{Source, line_at, matching_close, word_offsets};

/// Most lines of a source file, unless one of its first lines gives a reason for more.
const MAXIMUM_LINES: usize = 600;
const EXCUSE: &str = "Over 600 lines because";

/// This directory contains the words that it searches for.
const OWN_DIRECTORY: &str = "xtask/src/tidy/";

/// Directories that exist on one machine only.
const MACHINE_DIRECTORIES: &[&str] = &["/work/", "/home/", "/root/", "/Users/"];

/// Rules for every text file: blanks and paths.
pub(crate) fn check_text(path: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        if line.contains('\t') {
            findings.push(format!("{path}:{number}: tab"));
        }
        if line.ends_with([' ', '\t']) {
            findings.push(format!("{path}:{number}: blanks at the end of the line"));
        }
        if !path.starts_with(OWN_DIRECTORY)
            && let Some(directory) =
                MACHINE_DIRECTORIES.iter().find(|directory| names_directory(line, directory))
        {
            findings.push(format!("{path}:{number}: a path of one machine ({directory})"));
        }
    }
    findings
}

/// Rules for Rust source.
pub(crate) fn check_code(path: &str, text: &str, source: &Source) -> Vec<String> {
    let mut findings = Vec::new();
    let lines = text.lines().count();
    if lines > MAXIMUM_LINES && !text.lines().take(5).any(|line| line.contains(EXCUSE)) {
        findings.push(format!("{path}: {lines} lines, more than {MAXIMUM_LINES}"));
    }
    let code = &source.code;
    for (offset, _) in code.match_indices("#[ignore") {
        findings.push(format!("{path}:{}: an ignored test", line_at(code, offset)));
    }
    for word in ["todo", "unimplemented"] {
        for offset in word_offsets(code, word) {
            if code[offset + word.len()..].starts_with('!') {
                findings.push(format!("{path}:{}: unfinished code", line_at(code, offset)));
            }
        }
    }
    if !path.starts_with(OWN_DIRECTORY) {
        for word in ["TODO", "FIXME", "XXX"] {
            for offset in word_offsets(&source.comments, word) {
                let line = line_at(&source.comments, offset);
                findings.push(format!("{path}:{line}: a {word} comment"));
            }
        }
    }
    findings.extend(unused_matches(path, code));
    findings.extend(undocumented_unsafe(path, source));
    findings
}

fn names_directory(line: &str, directory: &str) -> bool {
    line.match_indices(directory).any(|(offset, _)| {
        // Inside a longer path or an address it is not the root's directory.
        !line[..offset].ends_with(|c: char| c.is_alphanumeric() || "._-~}*/".contains(c))
    })
}

/// Finds every `matches!` whose value is unused: it tests nothing.
fn unused_matches(path: &str, code: &str) -> Vec<String> {
    let mut findings = Vec::new();
    for (offset, found) in code.match_indices("matches!(") {
        let before = code[..offset].trim_end().chars().next_back();
        let is_statement = matches!(before, None | Some(';' | '{' | '}'));
        let close = matching_close(code.as_bytes(), offset + found.len() - 1);
        let is_dropped = close.is_some_and(|close| code[close + 1..].trim_start().starts_with(';'));
        if is_statement && is_dropped {
            let line = line_at(code, offset);
            findings.push(format!("{path}:{line}: the value of this matches! is not used"));
        }
    }
    findings
}

fn undocumented_unsafe(path: &str, source: &Source) -> Vec<String> {
    let mut findings = Vec::new();
    let comments: Vec<&str> = source.comments.lines().collect();
    let code: Vec<&str> = source.code.lines().collect();
    for offset in word_offsets(&source.code, "unsafe") {
        if !source.code[offset + "unsafe".len()..].trim_start().starts_with('{') {
            continue;
        }
        let line = line_at(&source.code, offset);
        // The reason is above the statement, which can begin some lines before the block.
        let is_documented = (0..line)
            .rev()
            .take(12)
            .take_while(|&index| {
                index + 1 == line || !code[index].trim_end().ends_with([';', '{', '}'])
            })
            .any(|index| comments[index].contains("SAFETY:"));
        if !is_documented {
            findings.push(format!("{path}:{line}: unsafe block without a SAFETY comment"));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code_findings(text: &str) -> Vec<String> {
        check_code("a/src/lib.rs", text, &Source::new(text))
    }

    #[test]
    fn blanks_and_machine_paths_are_found() {
        let findings = check_text("README.md", "a \n\tb\ncd /home/me/x\n`/work/main`\n");
        assert_eq!(findings.len(), 4, "{findings:?}");
        assert!(findings[2].starts_with("README.md:3:"));
    }

    #[test]
    fn directories_inside_other_paths_pass() {
        let text = "https://example.invalid/home/x\ntarget/work/x\n~/root/x\n$HOME/work/x\n";
        assert_eq!(check_text("README.md", text), Vec::<String>::new());
    }

    #[test]
    fn long_file_needs_an_excuse() {
        let long = "fn f() {}\n".repeat(601);
        assert_eq!(code_findings(&long).len(), 1);
        let excused = format!("//! Over 600 lines because it is one table.\n{long}");
        assert!(code_findings(&excused).is_empty());
        assert!(code_findings(&"fn f() {}\n".repeat(600)).is_empty());
    }

    #[test]
    fn unfinished_code_and_ignored_tests_are_found() {
        assert_eq!(code_findings("fn f() { todo!() }").len(), 1);
        assert_eq!(code_findings("fn f() { unimplemented!(\"x\") }").len(), 1);
        assert_eq!(code_findings("// TODO: later\n").len(), 1);
        assert_eq!(code_findings("/* FIXME */\n").len(), 1);
        assert_eq!(code_findings("#[ignore = \"slow\"]\nfn f() {}").len(), 1);
        assert!(code_findings("const A: &str = \"todo!() // TODO\";").is_empty());
    }

    #[test]
    fn unused_matches_is_found_and_used_ones_pass() {
        assert_eq!(code_findings("fn f() { matches!(a, Some(_)); }").len(), 1);
        assert_eq!(code_findings("fn f() { g();\n    matches!(\n a,\n Some(_)\n ) ; }").len(), 1);
        assert!(code_findings("fn f() -> bool { matches!(a, Some(_)) }").is_empty());
        assert!(code_findings("fn f() { let b = matches!(a, Some(_)); }").is_empty());
        assert!(code_findings("fn f() { assert!(matches!(a, Some(_))); }").is_empty());
    }

    #[test]
    fn unsafe_block_needs_its_reason() {
        assert_eq!(code_findings("fn f() {\n    unsafe { g() }\n}").len(), 1);
        assert!(code_findings("fn f() {\n    // SAFETY: why\n    unsafe { g() }\n}").is_empty());
        let split = "fn f() {\n    // SAFETY: why\n    let a =\n        unsafe { g() };\n}";
        assert!(code_findings(split).is_empty());
        let stale = "fn f() {\n    // SAFETY: why\n    h();\n    unsafe { g() }\n}";
        assert_eq!(code_findings(stale).len(), 1);
        assert!(code_findings("unsafe fn f() {}").is_empty());
    }
}
