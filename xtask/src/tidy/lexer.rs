//! Splits Rust source into code and comments, so that a word in a string is not mistaken for code.

/// One source file as two texts of equal length, code and comments. Each has blanks in place of the
/// other, and both keep line breaks, so offsets and line numbers agree with the file.
#[derive(Debug)]
pub(crate) struct Source {
    /// Code without comments and without the contents of string and character literals.
    pub(crate) code: String,
    /// The comments alone.
    pub(crate) comments: String,
}

impl Source {
    /// Splits `text`.
    pub(crate) fn new(text: &str) -> Self {
        Splitter::new(text.as_bytes()).split()
    }

    /// Returns the code without items that are compiled for tests only (behind `#[cfg(test)]`).
    pub(crate) fn code_without_tests(&self) -> String {
        let mut code = self.code.clone().into_bytes();
        let marker = b"#[cfg(test)]";
        let mut at = 0;
        while let Some(found) = find(&code, marker, at) {
            let mut end = found + marker.len();
            while end < code.len() && code[end] != b'{' && code[end] != b';' {
                end += 1;
            }
            if end < code.len() && code[end] == b'{' {
                end = matching_close(&code, end).unwrap_or(code.len() - 1);
            }
            let end = code.len().min(end + 1);
            blank(&mut code[found..end]);
            at = end;
        }
        String::from_utf8_lossy(&code).into_owned()
    }
}

/// The offset of `needle` in `code` at or after `from`.
pub(crate) fn find(code: &[u8], needle: &[u8], from: usize) -> Option<usize> {
    let tail = code.get(from..)?;
    tail.windows(needle.len()).position(|window| window == needle).map(|offset| from + offset)
}

/// The offsets of `word` in `code` where it is not part of a longer name.
pub(crate) fn word_offsets(code: &str, word: &str) -> Vec<usize> {
    let bytes = code.as_bytes();
    code.match_indices(word)
        .map(|(offset, _)| offset)
        .filter(|&offset| {
            let before = offset.checked_sub(1).and_then(|index| bytes.get(index));
            let after = bytes.get(offset + word.len());
            !before.is_some_and(|byte| is_name_byte(*byte))
                && !after.is_some_and(|byte| is_name_byte(*byte))
        })
        .collect()
}

/// The offset of the bracket that closes the one at `open`.
pub(crate) fn matching_close(code: &[u8], open: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (offset, byte) in code.iter().enumerate().skip(open) {
        match byte {
            b'{' | b'(' | b'[' => depth += 1,
            b'}' | b')' | b']' => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(offset);
                }
            }
            _ => {}
        }
    }
    None
}

/// The number, counted from 1, of the line that has the byte at `offset`.
pub(crate) fn line_at(text: &str, offset: usize) -> usize {
    text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1
}

/// Whether `byte` can be part of a name.
pub(crate) fn is_name_byte(byte: u8) -> bool {
    byte == b'_' || byte.is_ascii_alphanumeric()
}

fn blank(bytes: &mut [u8]) {
    for byte in bytes {
        if *byte != b'\n' {
            *byte = b' ';
        }
    }
}

struct Splitter<'a> {
    text: &'a [u8],
    code: Vec<u8>,
    comments: Vec<u8>,
    at: usize,
}

impl<'a> Splitter<'a> {
    fn new(text: &'a [u8]) -> Self {
        let mut code = text.to_vec();
        blank(&mut code);
        Self { text, comments: code.clone(), code, at: 0 }
    }

    fn split(mut self) -> Source {
        while self.at < self.text.len() {
            if self.rest().starts_with(b"//") {
                let end = find(self.text, b"\n", self.at).unwrap_or(self.text.len());
                self.take_comment(end);
            } else if self.rest().starts_with(b"/*") {
                let end = self.block_comment_end();
                self.take_comment(end);
            } else if let Some(end) = self.literal_end() {
                // The quotes stay in the code, so that an expression does not vanish.
                self.code[self.at] = b'"';
                self.code[end - 1] = b'"';
                self.at = end;
            } else {
                if self.text[self.at].is_ascii() {
                    self.code[self.at] = self.text[self.at];
                }
                self.at += 1;
            }
        }
        Source {
            code: String::from_utf8_lossy(&self.code).into_owned(),
            comments: String::from_utf8_lossy(&self.comments).into_owned(),
        }
    }

    fn rest(&self) -> &'a [u8] {
        &self.text[self.at..]
    }

    fn take_comment(&mut self, end: usize) {
        self.comments[self.at..end].copy_from_slice(&self.text[self.at..end]);
        self.at = end;
    }

    fn block_comment_end(&self) -> usize {
        let mut depth = 0_usize;
        let mut at = self.at;
        while at < self.text.len() {
            let rest = &self.text[at..];
            if rest.starts_with(b"/*") {
                depth += 1;
                at += 2;
            } else if rest.starts_with(b"*/") {
                depth -= 1;
                at += 2;
                if depth == 0 {
                    return at;
                }
            } else {
                at += 1;
            }
        }
        self.text.len()
    }

    /// The end of the string or character literal that begins here, if one does.
    fn literal_end(&self) -> Option<usize> {
        match self.rest().first()? {
            b'"' => Some(self.quoted_end(self.at + 1, b'"')),
            b'\'' => self.character_end(),
            b'r' => self.raw_string_end(),
            _ => None,
        }
    }

    fn quoted_end(&self, from: usize, quote: u8) -> usize {
        let mut at = from;
        while at < self.text.len() {
            match self.text[at] {
                b'\\' => at += 2,
                byte if byte == quote => return at + 1,
                _ => at += 1,
            }
        }
        self.text.len()
    }

    fn character_end(&self) -> Option<usize> {
        let next = *self.text.get(self.at + 1)?;
        if next == b'\\' {
            return Some(self.quoted_end(self.at + 1, b'\''));
        }
        // One character and a quote is a literal; a name without a closing quote is a lifetime.
        let width = match next {
            0..0x80 => 1,
            0x80..0xE0 => 2,
            0xE0..0xF0 => 3,
            _ => 4,
        };
        let close = self.at + 1 + width;
        (self.text.get(close) == Some(&b'\'')).then_some(close + 1)
    }

    fn raw_string_end(&self) -> Option<usize> {
        // `br` and `cr` strings begin with a letter that is part of no name.
        let mut before = self.at;
        if before > 0 && matches!(self.text[before - 1], b'b' | b'c') {
            before -= 1;
        }
        if before > 0 && is_name_byte(self.text[before - 1]) {
            return None;
        }
        let hashes = self.rest()[1..].iter().take_while(|byte| **byte == b'#').count();
        let quote = self.at + 1 + hashes;
        if self.text.get(quote) != Some(&b'"') {
            return None;
        }
        let mut close = vec![b'"'];
        close.resize(1 + hashes, b'#');
        let end = find(self.text, &close, quote + 1);
        Some(end.map_or(self.text.len(), |offset| offset + close.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_in_strings_and_comments_are_not_code() {
        let source =
            Source::new("let a = \"fn x\"; // fn y\nlet b = r#\"fn \"z\"\"#; /* fn /* w */ */ 1");
        assert!(!source.code.contains("fn"), "{}", source.code);
        assert!(source.code.contains("let b") && source.code.ends_with('1'));
        assert!(source.comments.contains("fn y") && source.comments.contains("fn /* w */"));
    }

    #[test]
    fn lifetimes_and_character_literals_are_told_apart() {
        let source = Source::new("fn f<'a>(x: &'a str) { g('{', '\\'', 'é', b'}'); }");
        assert_eq!(source.code.matches('{').count(), 1);
        assert_eq!(source.code.matches('}').count(), 1);
        assert!(source.code.contains("<'a>"));
    }

    #[test]
    fn both_halves_keep_the_line_breaks() {
        let text = "a /* b\nc */ d\n\"e\nf\"\n";
        let source = Source::new(text);
        assert_eq!(source.code.len(), text.len());
        assert_eq!(source.code.matches('\n').count(), 4);
        assert_eq!(source.comments.matches('\n').count(), 4);
    }

    #[test]
    fn unterminated_literals_and_comments_end_with_the_file() {
        for text in ["\"abc", "/* abc", "r#\"abc\"", "'\\", "'", "r", "b'", "\"\\"] {
            assert_eq!(Source::new(text).code.len(), text.len(), "{text}");
        }
    }

    #[test]
    fn items_for_tests_are_left_out_on_request() {
        let source = Source::new("fn a() {}\n#[cfg(test)]\nmod tests { fn b() { {} } }\nfn c() {}");
        let code = source.code_without_tests();
        assert!(code.contains("fn a") && code.contains("fn c") && !code.contains("fn b"));
    }

    #[test]
    fn words_inside_longer_names_do_not_count() {
        assert_eq!(word_offsets("todo to_do todo_list todo", "todo"), [0, 21]);
    }

    #[test]
    fn lines_are_counted_from_one() {
        assert_eq!(line_at("a\nb\n", 0), 1);
        assert_eq!(line_at("a\nb\n", 2), 2);
    }
}
