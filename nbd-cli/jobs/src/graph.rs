//! A chain of images as a drawing: a box for each file, from the image down to the last file below
//! it.

use crate::chart::CharacterSet;
use crate::size::rounded;
use crate::text::printable;

/// Least and most columns of the text in a box, and of a bar.
const LEAST_WIDTH: usize = 16;
const MOST_BAR: usize = 40;
/// Columns of a box besides its text, and of its place beside the line to the next one.
const FRAME: usize = 4;
const INDENT: usize = 4;

/// A file of a chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GraphNode {
    /// What it is to the image above it, if there is one.
    pub relation: Relation,
    /// Its name.
    pub name: String,
    /// Its format.
    pub format: String,
    /// Size of the disk, in bytes.
    pub size: Option<u64>,
    /// Space that the file takes, in bytes.
    pub allocated: Option<u64>,
    /// Other facts, a line each.
    pub facts: Vec<String>,
}

/// What a file is to the image above it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Relation {
    /// It is the image itself.
    #[default]
    Image,
    /// It has the data of the image.
    DataFile,
    /// It has what the image lacks.
    BackingFile,
}

/// The characters of the lines.
struct Strokes {
    top: [char; 2],
    bottom: [char; 2],
    across: char,
    down: char,
    /// In the lower and in the upper edge of a box.
    leaves: char,
    arrives: char,
    full: char,
    empty: char,
    cut: &'static str,
}

const UNICODE: Strokes = Strokes {
    top: ['┌', '┐'],
    bottom: ['└', '┘'],
    across: '─',
    down: '│',
    leaves: '┬',
    arrives: '┴',
    full: '█',
    empty: '░',
    cut: "…",
};

const ASCII: Strokes = Strokes {
    top: ['+', '+'],
    bottom: ['+', '+'],
    across: '-',
    down: '|',
    leaves: '+',
    arrives: '+',
    full: '#',
    empty: '.',
    cut: "...",
};

/// Draws a chain, for a terminal of that many columns. The nodes are in their order from the image
/// down; the data file of an image follows it.
pub fn graph(nodes: &[GraphNode], columns: usize, characters: CharacterSet) -> Vec<String> {
    let strokes = match characters {
        CharacterSet::Unicode => &UNICODE,
        CharacterSet::Ascii => &ASCII,
    };
    let texts: Vec<_> = nodes.iter().map(|node| node.texts(characters)).collect();
    let longest = texts.iter().flatten().map(|text| text.chars().count()).max().unwrap_or(0);
    let most = columns.saturating_sub(FRAME + INDENT).max(LEAST_WIDTH);
    let width = longest.clamp(LEAST_WIDTH, most);
    let mut lines = Vec::new();
    for (index, (node, texts)) in nodes.iter().zip(&texts).enumerate() {
        let goes_on = index + 1 < nodes.len();
        let has_backing = nodes[index + 1..].iter().any(|it| it.relation == Relation::BackingFile);
        let (is_data, down) = (node.relation == Relation::DataFile, strokes.down);
        match node.relation {
            Relation::Image => {}
            Relation::DataFile => lines.push(format!("  {down} data file")),
            Relation::BackingFile => lines.push(format!("  {down} backing file")),
        }
        let indent = match (is_data, has_backing) {
            (false, _) => String::new(),
            (true, true) => format!("  {down} "),
            (true, false) => "    ".to_owned(),
        };
        let is_first = node.relation == Relation::Image;
        let arrives = (!is_first && !is_data).then_some(strokes.arrives);
        let leaves = (goes_on && !is_data).then_some(strokes.leaves);
        let edge = |[left, right]: [char; 2], joint: Option<char>| {
            let across = |count| strokes.across.to_string().repeat(count);
            let joint = joint.unwrap_or(strokes.across);
            format!("{indent}{left}{}{joint}{}{right}", across(1), across(width))
        };
        lines.push(edge(strokes.top, arrives));
        for text in texts {
            let text = cut(text, width, strokes.cut);
            let padding = " ".repeat(width - text.chars().count());
            lines.push(format!("{indent}{down} {text}{padding} {down}"));
        }
        if let (Some(size), Some(allocated)) = (node.size.filter(|size| *size > 0), node.allocated)
        {
            let bar = bar(allocated as f64 / size as f64, width.min(MOST_BAR), strokes);
            lines.push(format!("{indent}{down} {bar:width$} {down}"));
        }
        lines.push(edge(strokes.bottom, leaves));
    }
    lines
}

impl GraphNode {
    fn texts(&self, characters: CharacterSet) -> Vec<String> {
        let mut facts = vec![self.format.clone()];
        facts.extend(self.size.map(rounded));
        facts.extend(self.allocated.map(|bytes| format!("{} taken", rounded(bytes))));
        let facts = facts.join(", ");
        let texts = [&self.name, &facts].into_iter().chain(&self.facts);
        let shown = |text: &String| {
            let text = printable(text);
            match characters {
                CharacterSet::Unicode => text,
                CharacterSet::Ascii => text.replace(|it: char| !it.is_ascii(), "?"),
            }
        };
        texts.map(shown).collect()
    }
}

/// The end of a text tells more than its beginning: it has the name of the file.
fn cut(text: &str, width: usize, mark: &str) -> String {
    let count = text.chars().count();
    if count <= width {
        return text.to_owned();
    }
    let kept = width - mark.chars().count();
    mark.chars().chain(text.chars().skip(count - kept)).collect()
}

/// A share, which may be above 1: metadata takes space too.
fn bar(share: f64, width: usize, strokes: &Strokes) -> String {
    let full = (share.clamp(0.0, 1.0) * width as f64).round() as usize;
    let full = if share > 0.0 { full.max(1) } else { full };
    let part = |character: char, count| character.to_string().repeat(count);
    part(strokes.full, full) + &part(strokes.empty, width - full)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain() -> [GraphNode; 3] {
        let node = |relation, name: &str, allocated| GraphNode {
            relation,
            name: name.to_owned(),
            format: "qcow2".to_owned(),
            size: Some(1 << 20),
            allocated: Some(allocated),
            facts: vec!["changed today".to_owned()],
        };
        [
            node(Relation::Image, "top", 1 << 18),
            node(Relation::DataFile, "a\u{1b}é", 1),
            node(Relation::BackingFile, "base", 2 << 20),
        ]
    }

    #[test]
    fn each_file_is_a_box() {
        let lines = graph(&chain(), 80, CharacterSet::Ascii);
        let drawn = "\
+---------------------------------+
| top                             |
| qcow2, 1.0 MiB, 256.0 KiB taken |
| changed today                   |
| ########....................... |
+-+-------------------------------+
  | data file
  | +---------------------------------+
  | | a\\u{1b}?                        |
  | | qcow2, 1.0 MiB, 1 bytes taken   |
  | | changed today                   |
  | | #.............................. |
  | +---------------------------------+
  | backing file
+-+-------------------------------+
| base                            |
| qcow2, 1.0 MiB, 2.0 MiB taken   |
| changed today                   |
| ############################### |
+---------------------------------+";
        assert_eq!(lines.join("\n"), drawn);
        let unicode = graph(&chain()[..1], 80, CharacterSet::Unicode);
        assert_eq!(unicode[0], format!("┌{}┐", "─".repeat(33)));
        assert!(unicode[4].starts_with("│ ████████░"), "{unicode:?}");
    }

    #[test]
    fn names_are_cut_and_no_terminal_is_exceeded() {
        let mut nodes = chain();
        nodes[0].name = format!("{}/end.qcow2", "long".repeat(100));
        for columns in [0, 24, 40, 80, 1000] {
            for characters in [CharacterSet::Unicode, CharacterSet::Ascii] {
                let lines = graph(&nodes, columns, characters);
                let longest = lines.iter().map(|line| line.chars().count()).max();
                assert!(longest <= Some(columns.max(24)), "{columns}: {lines:?}");
                assert!(lines[1].contains("end.qcow2"), "{columns}: {lines:?}");
            }
        }
        assert!(graph(&[], 80, CharacterSet::Ascii).is_empty());
    }
}
