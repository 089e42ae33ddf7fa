//! The length of functions.

use super::lexer::{Source, is_name_byte, line_at, matching_close, word_offsets};

/// Most lines of a function, from its `fn` to its closing brace.
const MAXIMUM_LINES: usize = 70;

/// Finds functions that are too long, except in tests.
pub(crate) fn check(path: &str, source: &Source) -> Vec<String> {
    let is_test = path.contains("/tests/") || path.ends_with("/tests.rs");
    if is_test {
        return Vec::new();
    }
    let code = source.code_without_tests();
    let mut findings = Vec::new();
    for offset in word_offsets(&code, "fn") {
        let Some((name, close)) = function_at(&code, offset) else { continue };
        let first = line_at(&code, offset);
        let lines = line_at(&code, close) - first + 1;
        if lines > MAXIMUM_LINES {
            findings.push(format!(
                "{path}:{first}: function {name} has {lines} lines, more than {MAXIMUM_LINES}"
            ));
        }
    }
    findings
}

/// The name and the closing brace of the function whose `fn` is at `offset`, if it has a body.
fn function_at(code: &str, offset: usize) -> Option<(String, usize)> {
    let bytes = code.as_bytes();
    let tail = code.get(offset + 2..)?.trim_start();
    let name: String =
        tail.chars().take_while(|c| u8::try_from(*c).is_ok_and(is_name_byte)).collect();
    if name.is_empty() {
        return None; // the type of a function pointer
    }
    let mut at = offset;
    loop {
        match bytes.get(at)? {
            b'(' | b'[' => at = matching_close(bytes, at)? + 1,
            b'{' => return Some((name, matching_close(bytes, at)?)),
            b';' => return None, // a declaration in a trait
            _ => at += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(name: &str, lines: usize) -> String {
        format!("fn {name}(a: [u8; 4], f: fn(u8)) {{\n{}}}\n", "    a();\n".repeat(lines - 2))
    }

    #[test]
    fn function_over_the_limit_is_found_and_one_at_the_limit_passes() {
        let code = format!("{}{}", function("short", 70), function("long", 71));
        let findings = check("a/src/lib.rs", &Source::new(&code));
        assert_eq!(findings.len(), 1);
        assert!(findings[0].starts_with("a/src/lib.rs:71: function long has 71 lines"));
    }

    #[test]
    fn tests_and_declarations_do_not_count() {
        let code = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", function("long", 90));
        assert!(check("a/src/lib.rs", &Source::new(&code)).is_empty());
        assert!(check("a/tests/x.rs", &Source::new(&function("long", 90))).is_empty());
        let declaration = format!("trait T {{ fn f(&self);\n{} }}", "\n".repeat(90));
        assert!(check("a/src/lib.rs", &Source::new(&declaration)).is_empty());
    }
}
