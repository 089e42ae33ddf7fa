//! The engines of the program must not use the command line parser.

use super::lexer::{Source, line_at, word_offsets};

/// Directories (with a slash at the end) and files of the engines.
const ENGINES: &[&str] = &["nbd-cli/jobs/src/", "nbd-cli/objects/src/", "imgfmt/src/jobs/"];

/// Finds engines that name clap.
pub(crate) fn check(path: &str, source: &Source) -> Vec<String> {
    let is_engine = ENGINES
        .iter()
        .any(|engine| path == *engine || (engine.ends_with('/') && path.starts_with(engine)));
    if !is_engine {
        return Vec::new();
    }
    let code = source.code_without_tests();
    let named = word_offsets(&code, "clap");
    named
        .into_iter()
        .map(|offset| {
            let line = line_at(&code, offset);
            format!("{path}:{line}: an engine names clap; arguments are parsed by the commands")
        })
        .collect()
}

/// Finds list entries that no longer exist, so that no rule loses its effect unnoticed.
pub(crate) fn check_lists(exists: impl Fn(&str) -> bool) -> Vec<String> {
    let gone = ENGINES.iter().filter(|path| !exists(path));
    gone.map(|path| {
        format!("xtask/src/tidy/engines.rs: {path} is gone; name where these engines are now")
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engine_that_names_clap_is_found_and_a_command_may() {
        let source = Source::new("//! No clap.\nuse clap::Args;\n");
        let findings = check("nbd-cli/jobs/src/copy/engine.rs", &source);
        assert_eq!(findings.len(), 1);
        assert!(findings[0].contains("engine.rs:2: an engine names clap"), "{findings:?}");
        assert!(check("nbd-cli/src/commands/copy.rs", &source).is_empty());
        assert!(check("imgfmt/src/jobs/mod.rs", &source).len() == 1);
    }

    #[test]
    fn entry_of_a_list_that_is_gone_is_found() {
        assert!(check_lists(|_| true).is_empty());
        let findings = check_lists(|path| path != ENGINES[0]);
        assert_eq!(findings.len(), 1, "{findings:?}");
    }
}
