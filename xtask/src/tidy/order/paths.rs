//! The paths that a source file names: in its imports and in its code.

use std::collections::BTreeMap;

use crate::tidy::lexer::{find, is_name_byte, matching_close, word_offsets};

/// The declarations, imports and paths of one file.
#[derive(Debug, Default)]
pub(super) struct Paths {
    /// The modules declared with `mod name;`.
    pub(super) modules: Vec<String>,
    /// The meaning of the file's own names, as far as imports define them: name to path.
    pub(super) imports: BTreeMap<String, Vec<String>>,
    /// Every path of imports and of code, except for re-exports.
    pub(super) named: Vec<Named>,
    /// The paths of `pub use`.
    pub(super) reexported: Vec<Named>,
}

/// A path and its position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    /// The offset in the code.
    pub(super) offset: usize,
    pub(super) segments: Vec<String>,
}

impl Paths {
    /// Reads `code`, which has neither comments nor tests.
    pub(super) fn new(code: &str) -> Self {
        let mut paths = Self::default();
        let nested = inline_modules(code.as_bytes());
        let mut rest = code.as_bytes().to_vec();
        for offset in word_offsets(code, "use") {
            let end = find(code.as_bytes(), b";", offset).unwrap_or(code.len());
            paths.read_import(code, offset, &nested);
            rest[offset..end].fill(b' ');
        }
        for offset in word_offsets(code, "mod") {
            let name = name_at(code.as_bytes(), skip_blanks(code.as_bytes(), offset + 3));
            let after = skip_blanks(code.as_bytes(), offset + 3) + name.len();
            let after = skip_blanks(code.as_bytes(), after);
            if !name.is_empty() && code.as_bytes().get(after) == Some(&b';') {
                paths.modules.push(name);
            }
        }
        paths.read_code(&rest, &nested);
        paths
    }

    fn read_import(&mut self, code: &str, offset: usize, nested: &[(usize, usize)]) {
        let bytes = code.as_bytes();
        let mut tree = Vec::new();
        expand(bytes, offset + 3, &mut Vec::new(), &mut tree);
        let before = code[..offset].trim_end();
        let is_reexport = before.ends_with("pub")
            || (before.ends_with(')')
                && before.rfind('(').is_some_and(|open| before[..open].ends_with("pub")));
        let depth = depth_at(nested, offset);
        let is_of_the_file = depth == 0 && brace_depth(bytes, offset) == 0;
        for (name, segments) in tree {
            let Some(segments) = leave_inline_modules(segments, depth) else { continue };
            if is_of_the_file {
                self.imports.insert(name, segments.clone());
            }
            let named = Named { offset, segments };
            if is_reexport { &mut self.reexported } else { &mut self.named }.push(named);
        }
    }

    /// Adds the paths outside of imports, given code without imports.
    fn read_code(&mut self, code: &[u8], nested: &[(usize, usize)]) {
        let mut at = 0;
        while at < code.len() {
            let name = name_at(code, at);
            if name.is_empty() {
                at += 1;
                continue;
            }
            let start = at;
            let mut segments = vec![name];
            at += segments[0].len();
            while code.get(at..at + 2) == Some(b"::") {
                let next = name_at(code, at + 2);
                if next.is_empty() {
                    break;
                }
                at += 2 + next.len();
                segments.push(next);
            }
            let before = code[..start].trim_ascii_end();
            // The middle of a path whose beginning is not a name, and `pub(in path)`.
            let is_part = before.ends_with(b"::") || before.ends_with(b"(in");
            if segments.len() > 1
                && !is_part
                && let Some(segments) = leave_inline_modules(segments, depth_at(nested, start))
            {
                self.named.push(Named { offset: start, segments });
            }
        }
    }
}

/// The spans of modules with a body in the file.
fn inline_modules(code: &[u8]) -> Vec<(usize, usize)> {
    let text = String::from_utf8_lossy(code);
    let mut spans = Vec::new();
    for offset in word_offsets(&text, "mod") {
        let name_start = skip_blanks(code, offset + 3);
        let open = skip_blanks(code, name_start + name_at(code, name_start).len());
        if code.get(open) == Some(&b'{')
            && let Some(close) = matching_close(code, open)
        {
            spans.push((open, close));
        }
    }
    spans
}

fn depth_at(spans: &[(usize, usize)], offset: usize) -> usize {
    spans.iter().filter(|(open, close)| (*open..*close).contains(&offset)).count()
}

fn brace_depth(code: &[u8], offset: usize) -> usize {
    let open = code[..offset].iter().filter(|byte| **byte == b'{').count();
    open.saturating_sub(code[..offset].iter().filter(|byte| **byte == b'}').count())
}

/// Returns the path relative to the file's own module; `None` if it stays in an inline module.
fn leave_inline_modules(segments: Vec<String>, depth: usize) -> Option<Vec<String>> {
    if depth == 0 || segments.first().is_some_and(|first| first == "crate") {
        return Some(segments);
    }
    let supers = segments.iter().take_while(|segment| *segment == "super").count();
    if supers < depth {
        return None;
    }
    let mut outside = vec!["self".to_owned()];
    outside.extend(segments.into_iter().skip(depth));
    Some(outside)
}

/// Adds every path of the import tree at `at` with its name, and returns the end of the tree.
fn expand(
    code: &[u8],
    at: usize,
    prefix: &mut Vec<String>,
    found: &mut Vec<(String, Vec<String>)>,
) -> usize {
    let mut at = skip_blanks(code, at);
    if code.get(at) == Some(&b'{') {
        at += 1;
        loop {
            at = skip_blanks(code, at);
            match code.get(at) {
                None => return at,
                Some(b'}') => return at + 1,
                Some(b',') => at += 1,
                Some(_) => at = expand(code, at, prefix, found),
            }
        }
    }
    let segment = match code.get(at) {
        Some(b'*') => "*".to_owned(),
        _ => name_at(code, at),
    };
    if segment.is_empty() {
        return at + 1; // not a name: step over it, so that the loop above always moves on
    }
    at = skip_blanks(code, at + segment.len());
    let length = prefix.len();
    // `a::{self}` is `a`; `self::a` begins with it.
    if segment != "self" || prefix.is_empty() {
        prefix.push(segment);
    }
    if code.get(at..at + 2) == Some(b"::") {
        at = expand(code, at + 2, prefix, found);
    } else {
        let mut name = prefix.last().cloned().unwrap_or_default();
        if name_at(code, at) == "as" {
            let start = skip_blanks(code, at + 2);
            name = name_at(code, start);
            at = start + name.len();
        }
        found.push((name, prefix.clone()));
    }
    prefix.truncate(length);
    at
}

fn name_at(code: &[u8], at: usize) -> String {
    let tail = code.get(at..).unwrap_or_default();
    tail.iter().take_while(|byte| is_name_byte(**byte)).map(|byte| char::from(*byte)).collect()
}

fn skip_blanks(code: &[u8], at: usize) -> usize {
    let blanks = code.get(at..).unwrap_or_default();
    at + blanks.iter().take_while(|byte| byte.is_ascii_whitespace()).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(code: &str) -> Vec<String> {
        Paths::new(code).named.iter().map(|named| named.segments.join("::")).collect()
    }

    #[test]
    fn imports_are_taken_apart() {
        let code = "use crate::a::{self, b::{C, D as E}, f::*};\nuse super::g;\n";
        let expected =
            ["crate::a", "crate::a::b::C", "crate::a::b::D", "crate::a::f::*", "super::g"];
        assert_eq!(named(code), expected);
        let imports = Paths::new(code).imports;
        assert_eq!(imports["E"].join("::"), "crate::a::b::D");
        assert_eq!(imports["a"].join("::"), "crate::a");
    }

    #[test]
    fn paths_in_code_are_found_and_visibilities_are_none() {
        let code = "pub(in crate::a) fn f(x: &crate::b::C) -> super::D { self::e::g::<u8>() }\n";
        assert_eq!(named(code), ["crate::b::C", "super::D", "self::e::g"]);
    }

    #[test]
    fn reexports_and_modules_stand_apart() {
        let paths = Paths::new("mod a;\npub mod b;\nmod c { fn f() {} }\npub(crate) use a::X;\n");
        assert_eq!(paths.modules, ["a", "b"]);
        assert_eq!(paths.reexported[0].segments, ["a", "X"]);
        assert!(paths.named.is_empty());
        assert_eq!(paths.imports["X"], ["a", "X"]);
    }

    #[test]
    fn inline_modules_are_part_of_their_file() {
        let code = "mod a {\n    use super::super::B;\n    use super::C;\n    use crate::D;\n}\n";
        assert_eq!(named(code), ["self::super::B", "self::C", "crate::D"]);
    }

    #[test]
    fn broken_code_ends() {
        for code in ["use {", "use a::{b, (", "use", "mod", "a::", "use a as", "::"] {
            Paths::new(code);
        }
    }
}
