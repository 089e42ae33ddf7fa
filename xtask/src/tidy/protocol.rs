//! The protocol crate does no I/O: no sockets, files, clocks, threads or runtime.

use super::lexer::{Source, is_name_byte, line_at, word_offsets};

/// Paths of the standard library that the crate may not name, with everything below them.
const FORBIDDEN_PATHS: &[&str] = &[
    "std::net",
    "std::fs",
    "std::env",
    "std::os",
    "std::process",
    "std::thread",
    "std::io::Read",
    "std::io::Write",
    "std::io::BufRead",
    "std::io::Seek",
    "std::io::prelude",
    "std::io::*",
    "std::*",
];

/// Words that the crate may not contain anywhere.
const FORBIDDEN_WORDS: &[&str] = &["tokio", "Instant", "SystemTime", "io::Read", "io::Write"];

/// Checks one file of the protocol crate; others pass.
pub(crate) fn check(path: &str, source: &Source) -> Vec<String> {
    if !path.starts_with("nbd-proto/src/") {
        return Vec::new();
    }
    let code = source.code_without_tests();
    let mut findings = Vec::new();
    for offset in word_offsets(&code, "std") {
        let mut paths = Vec::new();
        expand_path(code.as_bytes(), offset, "", &mut paths);
        for named in paths {
            if FORBIDDEN_PATHS.iter().any(|forbidden| is_at_or_below(&named, forbidden)) {
                findings.push(finding(path, &code, offset, &named));
            }
        }
    }
    for word in FORBIDDEN_WORDS {
        for offset in word_offsets(&code, word) {
            findings.push(finding(path, &code, offset, word));
        }
    }
    findings
}

fn finding(path: &str, code: &str, offset: usize, what: &str) -> String {
    format!("{path}:{}: the protocol crate does no I/O but names {what}", line_at(code, offset))
}

fn is_at_or_below(path: &str, ancestor: &str) -> bool {
    path.strip_prefix(ancestor).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// Adds every path that the path or use tree at `at` names, and returns its end.
fn expand_path(code: &[u8], at: usize, prefix: &str, paths: &mut Vec<String>) -> usize {
    let mut at = skip_blanks(code, at);
    if code.get(at) == Some(&b'{') {
        at += 1;
        loop {
            at = skip_blanks(code, at);
            match code.get(at) {
                None => return at,
                Some(b'}') => return at + 1,
                Some(b',') => at += 1,
                Some(_) => at = expand_path(code, at, prefix, paths),
            }
        }
    }
    let end = at + code[at.min(code.len())..].iter().take_while(|b| is_segment_byte(**b)).count();
    if end == at {
        // Not a name: step over it, so that a caller's loop always advances.
        return at + 1;
    }
    let segment = String::from_utf8_lossy(&code[at..end]);
    let named =
        if prefix.is_empty() { segment.into_owned() } else { format!("{prefix}::{segment}") };
    let next = skip_blanks(code, end);
    if code.get(next..).is_some_and(|rest| rest.starts_with(b"::")) {
        expand_path(code, next + 2, &named, paths)
    } else {
        paths.push(named);
        end
    }
}

fn is_segment_byte(byte: u8) -> bool {
    is_name_byte(byte) || byte == b'*'
}

fn skip_blanks(code: &[u8], at: usize) -> usize {
    let blanks = code.get(at..).unwrap_or_default();
    at + blanks.iter().take_while(|byte| byte.is_ascii_whitespace()).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(code: &str) -> Vec<String> {
        check("nbd-proto/src/lib.rs", &Source::new(code))
    }

    #[test]
    fn sockets_files_clocks_and_runtime_are_found() {
        for code in [
            "use std::net::TcpStream;",
            "use std::fs;",
            "use std::io::{self, Read};",
            "fn f<W: std::io::Write>(w: W) {}",
            "use std::{fmt, time::Instant};",
            "fn f() { let t = std::time::SystemTime::now(); }",
            "use tokio::sync::Mutex;",
            "use std::{collections::{HashMap, BTreeMap}, fs::File};",
            "use std::io; fn f(r: impl io::Read) {}",
        ] {
            assert!(!findings(code).is_empty(), "{code}");
        }
    }

    #[test]
    fn pure_code_passes() {
        let code = "//! No std::fs here.\nuse std::{fmt, str::FromStr};\nuse std::time::Duration;\n\
                    use core::net::IpAddr;\nconst HELP: &str = \"std::fs\";\n\
                    #[cfg(test)]\nmod tests { use std::fs; }\n";
        assert_eq!(findings(code), Vec::<String>::new());
    }

    #[test]
    fn other_crates_may_do_input_and_output() {
        assert!(check("imgfmt/src/lib.rs", &Source::new("use std::fs;")).is_empty());
    }

    #[test]
    fn broken_trees_end() {
        for code in ["std::{", "std::{a, (", "std::", "std"] {
            expand_path(code.as_bytes(), 0, "", &mut Vec::new());
        }
    }
}
