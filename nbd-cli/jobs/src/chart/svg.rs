//! The chart as a picture: SVG without references to anything outside.

use std::fmt::Write as _;

use super::class::{Class, Scheme};
use super::{CELLS_PER_PICTURE_ROW, Chart, Legend};
use crate::size::{exact, rounded};
use crate::text::printable;

/// Cells of a row.
const COLUMNS: usize = CELLS_PER_PICTURE_ROW as usize;
/// Lengths in units of the picture, which are pixels by default.
const MARGIN: usize = 16;
const LABEL_WIDTH: usize = 64;
const CELL: usize = 12;
const LINE: usize = 20;
const WIDTH: usize = 2 * MARGIN + LABEL_WIDTH + CELL * COLUMNS;
/// Least width of a part of a cell: what is little has to be seen as well.
const LEAST_PART: f64 = 0.12;

/// Colours besides those of the classes: of text, lines and background.
const PLAIN: [(&str, &str); 3] = [
    ("text{fill:#1f2328}", "text{fill:#e6edf3}"),
    (".key{stroke:#59636e}", ".key{stroke:#9198a1}"),
    (".back{fill:#ffffff}", ".back{fill:#0d1117}"),
];

impl Chart {
    /// Returns the chart as an SVG document: the `title`, the cells in rows of 64, and a legend. It
    /// follows the reader's choice of light or dark, and has a description in words.
    pub fn svg(&self, title: &str) -> String {
        let legend = Legend::of(self);
        let rows = self.cells.len().div_ceil(COLUMNS);
        let top = 2 * MARGIN + LINE;
        let bottom = top + rows * CELL + MARGIN;
        let height = bottom + (legend.classes.len() + 1) * LINE + MARGIN;
        let title = escaped(&printable(title));
        let description = self.description(&legend);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
             viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
             aria-labelledby=\"map-title map-description\">\n\
             <title id=\"map-title\">{title}</title>\n\
             <desc id=\"map-description\">{description}</desc>\n\
             <style>{}</style>\n\
             <rect class=\"back\" width=\"{WIDTH}\" height=\"{height}\"/>\n\
             <text class=\"title\" x=\"{MARGIN}\" y=\"{}\">{title}</text>\n",
            style(&legend),
            MARGIN + LINE,
        );
        self.rows(&mut svg, rows, top);
        self.cells(&mut svg, &legend, top);
        self.keys(&mut svg, &legend, bottom);
        svg.push_str("</svg>\n");
        svg
    }

    fn description(&self, legend: &Legend) -> String {
        let mut text = format!("Disk of {}", rounded(self.size));
        for (index, (class, total, percent)) in legend.classes.iter().enumerate() {
            let separator = if index == 0 { ": " } else { ", " };
            let (label, total) = (class.label(), rounded(*total));
            // Writing to a string does not fail; this holds for the others as well.
            let _ = write!(text, "{separator}{label} {total} ({percent:.1} %)");
        }
        text + ". " + &self.scale("cell", "row")
    }

    /// The offsets of the rows.
    fn rows(&self, svg: &mut String, rows: usize, top: usize) {
        let row_length = self.cell_length.saturating_mul(self.cells_per_row);
        for (row, index) in (0..rows).zip(0_u64..) {
            let (x, y) = (MARGIN + LABEL_WIDTH - 8, top + row * CELL + CELL - 2);
            let offset = exact(index.saturating_mul(row_length));
            let _ = writeln!(svg, "<text class=\"offset\" x=\"{x}\" y=\"{y}\">{offset}</text>");
        }
    }

    /// The cells, as one path for each class.
    fn cells(&self, svg: &mut String, legend: &Legend, top: usize) {
        let mut paths = vec![String::new(); Class::COUNT];
        for (index, cell) in self.cells.iter().enumerate() {
            let (row, column) = (index / COLUMNS, index % COLUMNS);
            let (left, y) = (MARGIN + LABEL_WIDTH + column * CELL, top + row * CELL);
            for (path, (start, width)) in paths.iter_mut().zip(parts_of(cell)) {
                if width > 0.0 {
                    let side = (CELL - 1) as f64;
                    let (x, width) = (left as f64 + start * side, width * side);
                    let _ = write!(path, "M{x:.1} {y}h{width:.1}v{side}h-{width:.1}z");
                }
            }
        }
        for (class, ..) in &legend.classes {
            let (name, path) = (class.name(), &paths[class.index()]);
            let _ = writeln!(svg, "<path class=\"{name}\" d=\"{path}\"/>");
        }
    }

    fn keys(&self, svg: &mut String, legend: &Legend, bottom: usize) {
        let (x, text_x) = (MARGIN + LABEL_WIDTH, MARGIN + LABEL_WIDTH + LINE);
        let mut y = bottom;
        for (class, total, percent) in &legend.classes {
            let (name, label, total) = (class.name(), class.label(), rounded(*total));
            let text_y = y + CELL - 1;
            let _ = writeln!(
                svg,
                "<rect class=\"key {name}\" x=\"{x}\" y=\"{y}\" width=\"{CELL}\" \
                 height=\"{CELL}\"/><text x=\"{text_x}\" y=\"{text_y}\">{label}: {total} \
                 ({percent:.1} %)</text>"
            );
            y += LINE;
        }
        let (scale, y) = (self.scale("cell", "row"), y + CELL - 1);
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\">{scale}</text>");
    }
}

/// For each class, where its part of a cell begins and how wide it is, in widths of a cell.
fn parts_of(cell: &[u64; Class::COUNT]) -> [(f64, f64); Class::COUNT] {
    let whole = cell.iter().sum::<u64>().max(1) as f64;
    let widths = cell.map(|bytes| match bytes {
        0 => 0.0,
        bytes => (bytes as f64 / whole).max(LEAST_PART),
    });
    let sum = widths.iter().sum::<f64>().max(1.0);
    let mut start = 0.0;
    widths.map(|width| {
        let part = (start, width / sum);
        start += width / sum;
        part
    })
}

/// The colours of the classes that are drawn; not as variables, which few programs but browsers
/// know.
fn style(legend: &Legend) -> String {
    let classes = |scheme| {
        let rules = legend.classes.iter().map(move |(class, ..)| {
            let (name, color) = (class.name(), class.rgb(scheme));
            format!(".{name}{{fill:{color}}}")
        });
        rules.collect::<String>()
    };
    let plain = |choose: fn(&(&'static str, &'static str)) -> &'static str| {
        PLAIN.iter().map(choose).collect::<String>()
    };
    format!(
        "text{{font:13px system-ui,sans-serif}}.title{{font-size:16px;font-weight:600}}\
         .offset{{font-size:10px;text-anchor:end}}{}{}\
         @media(prefers-color-scheme:dark){{{}{}}}",
        plain(|(light, _)| light),
        classes(Scheme::Light),
        plain(|(_, dark)| dark),
        classes(Scheme::Dark),
    )
}

/// Text as XML, without the characters that XML does not have.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            character => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_text_whatever_they_contain() {
        let svg = Chart::of_picture(4096).svg("a<b>&\"\u{1b}\u{ffff}é");
        let title = "<title id=\"map-title\">a&lt;b&gt;&amp;&quot;\\u{1b}\\u{ffff}é</title>";
        assert!(svg.contains(title), "{svg}");
    }

    #[test]
    fn what_is_little_is_seen_and_a_cell_is_never_exceeded() {
        let mut cell = [0; Class::COUNT];
        (cell[0], cell[3]) = (1, u64::MAX / 2);
        let parts = parts_of(&cell);
        assert!(parts[0].1 > 0.1, "{parts:?}");
        assert!((parts[3].0 + parts[3].1 - 1.0).abs() < 1e-9, "{parts:?}");
        assert_eq!(parts_of(&[0; Class::COUNT]), [(0.0, 0.0); Class::COUNT]);
        let all = parts_of(&[1; Class::COUNT]);
        assert!((all.iter().map(|part| part.1).sum::<f64>() - 1.0).abs() < 1e-9, "{all:?}");
    }

    #[test]
    fn any_size_can_be_drawn() {
        for size in [0, 1, 513, (1 << 63) - 1, u64::MAX] {
            let mut chart = Chart::of_picture(size);
            chart.add(0, u64::MAX, Class::Dirty);
            let svg = chart.svg("disk");
            assert!(svg.len() < 100_000 && svg.ends_with("</svg>\n"), "{size}");
        }
    }

    #[test]
    fn every_class_has_both_colours_and_a_key() {
        let mut chart = Chart::of_picture(1 << 20);
        for (class, offset) in Class::ALL.into_iter().zip((0..).step_by(4096)) {
            chart.add(offset, 4096, class);
        }
        let svg = chart.svg("disk");
        for class in Class::ALL {
            let name = class.name();
            assert_eq!(svg.matches(&format!(".{name}{{fill:")).count(), 2, "{name}: {svg}");
            assert_eq!(svg.matches(&format!("class=\"key {name}\"")).count(), 1, "{name}");
        }
    }
}
