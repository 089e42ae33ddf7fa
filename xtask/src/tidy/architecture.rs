//! Checks that the paths in the documents of the workspace exist, and that ARCHITECTURE.md answers
//! the questions of a newcomer.

use std::collections::BTreeSet;

/// Endings of the names that are checked.
const ENDINGS: [&str; 4] = [".rs", ".md", ".txt", ".toml"];

/// The questions that ARCHITECTURE.md answers with names of files.
const QUESTIONS: [&str; 6] = [
    "Where does a WRITE into a shared cluster go?",
    "Who clears `in_use`?",
    "What happens to a READ of a hole?",
    "How do I add a format?",
    "How do I add a filter?",
    "How do I add a command?",
];

/// An answer names files of fewer directories than this.
const DIRECTORIES_MAX: usize = 10;

/// Finds questions without an answer, and answers that name files of too many directories.
pub(crate) fn check_answers(document: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    for question in QUESTIONS {
        let Some((_, rest)) = text.split_once(&format!("**{question}**")) else {
            findings.push(format!("{document}: does not answer '{question}'"));
            continue;
        };
        let end = ["\n**", "\n## "].iter().filter_map(|next| rest.find(next)).min();
        let answer = &rest[..end.unwrap_or(rest.len())];
        let paths = answer.split('`').skip(1).step_by(2).filter(|span| is_path(span));
        let directories: BTreeSet<&str> = paths
            .filter_map(|path| path.rsplit_once('/'))
            .map(|(directory, _)| directory)
            .collect();
        if directories.is_empty() || directories.len() >= DIRECTORIES_MAX {
            let count = directories.len();
            findings.push(format!("{document}: '{question}' leads through {count} directories"));
        }
    }
    findings
}

/// Whether code in a document is the path of a file or directory, or the name of a source file.
fn is_path(span: &str) -> bool {
    let is_pattern = span.contains(['*', '{', '<', ' ', ':', '…']) || span.starts_with('/');
    let is_file = ENDINGS.iter().any(|ending| span.ends_with(ending) && span.len() > ending.len());
    !is_pattern && (is_file && (span.contains('/') || span.ends_with(".rs")) || is_directory(span))
}

fn is_directory(span: &str) -> bool {
    span.ends_with('/') && span.len() > 1
}

/// Finds paths in backticks for which `exists` returns false: directories, which end in `/`, files
/// with a `/`, and source files by their name alone.
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
            if is_path(span) && !exists(span) {
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
    fn source_file_is_found_by_its_name_and_other_files_by_their_paths() {
        let text = "`gone.rs`, `docs/gone.md`, `order/gone.txt`, `README.md`, `.rs`\n";
        assert_eq!(check("A.md", text, |_| false).len(), 3);
    }

    #[test]
    fn drawings_words_and_addresses_are_no_paths() {
        let text = "```\n`a/b.rs`\n```\n`read/write` `nbd://host/` `/etc/x.md`\n";
        assert!(check("A.md", text, |_| false).is_empty());
    }

    #[test]
    fn question_needs_an_answer_that_names_files_of_few_directories() {
        let answered = |answer: &str| {
            let sections = QUESTIONS.map(|question| format!("**{question}** {answer}\n\n"));
            check_answers("A.md", &sections.concat()).len()
        };
        assert_eq!(answered("In `a/src/lib.rs`."), 0);
        assert_eq!(answered("Somewhere."), 6);
        let many: String = (0..10).map(|number| format!("`a/{number}/b.rs` ")).collect();
        assert_eq!(answered(&many), 6);
        assert_eq!(check_answers("A.md", "# Nothing\n").len(), 6);
    }
}
