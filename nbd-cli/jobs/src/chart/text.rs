//! The chart as text: one character per cell.

use super::class::{CharacterSet, Class, Color};
use super::{Chart, Legend};
use crate::size::{exact, rounded};

impl Chart {
    /// Returns the lines of the chart and its legend.
    pub fn lines(&self, characters: CharacterSet, color: Color) -> Vec<String> {
        let mut lines = Vec::new();
        for (row, cells) in (0_u64..).zip(self.cells.chunks(self.cells_per_row as usize)) {
            let offset = row * self.cells_per_row * self.cell_length;
            let mut line = format!("{:>8}  ", exact(offset));
            let mut current = "";
            for cell in cells {
                let (glyph, ansi) = draw(cell, characters);
                if color == Color::On && ansi != current {
                    line.push_str(if current.is_empty() { "" } else { "\x1b[0m" });
                    line.push_str(ansi);
                    current = ansi;
                }
                line.push(glyph);
            }
            line.push_str(if current.is_empty() { "" } else { "\x1b[0m" });
            lines.push(line);
        }
        lines.extend(self.legend(characters, color));
        lines
    }

    fn legend(&self, characters: CharacterSet, color: Color) -> Vec<String> {
        let mut lines = vec![String::new()];
        let legend = Legend::of(self);
        for (class, total, percent) in &legend.classes {
            let (glyph, ansi) = (class.glyph(characters), class.ansi());
            let shown = match color {
                Color::On => format!("{ansi}{glyph}\x1b[0m"),
                Color::Off => glyph.to_string(),
            };
            let (label, total) = (class.label(), rounded(*total));
            lines.push(format!("  {shown}  {label}: {total} ({percent:.1} %)"));
        }
        if legend.is_mixed {
            lines.push(format!("  {}  several of these", mixed(characters)));
        }
        lines.push(format!("  {}", self.scale("character", "line")));
        lines
    }
}

fn mixed(characters: CharacterSet) -> char {
    match characters {
        CharacterSet::Unicode => '▒',
        CharacterSet::Ascii => '+',
    }
}

/// Returns the character and the colour of a cell: the most prominent class determines the colour.
fn draw(cell: &[u64; Class::COUNT], characters: CharacterSet) -> (char, &'static str) {
    let mut present = Class::ALL.into_iter().filter(|class| cell[class.index()] > 0);
    match (present.next(), present.next()) {
        (None, _) => (' ', ""),
        (Some(only), None) => (only.glyph(characters), only.ansi()),
        (Some(first), Some(_)) => (mixed(characters), first.ansi()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_one_part_of_the_disk() {
        let mut chart = Chart::of_columns(1 << 20, 80);
        chart.add(0, 512 << 10, Class::Data);
        chart.add(512 << 10, 512 << 10, Class::HoleZero);
        let lines = chart.lines(CharacterSet::Ascii, Color::Off);
        assert_eq!(lines[0], format!("{:>8}  {}", "0", "#".repeat(64)));
        assert_eq!(lines[7], format!("{:>8}  {}", "448K", "#".repeat(64)));
        assert_eq!(lines[8], format!("{:>8}  {}", "512K", ".".repeat(64)));
        assert_eq!(lines[15], format!("{:>8}  {}", "960K", ".".repeat(64)));
        assert_eq!(lines[17], "  #  data: 512.0 KiB (50.0 %)");
        assert_eq!(lines[18], "  .  hole, reads as zero: 512.0 KiB (50.0 %)");
        assert_eq!(lines[19], "  One character is 1K, one line 64K; the disk has 1.0 MiB.");
        assert_eq!(lines.len(), 20);
    }

    #[test]
    fn lines_are_as_long_as_the_terminal_allows() {
        for (columns, cells) in [(20, 8), (75, 32), (76, 64), (140, 128), (1000, 256)] {
            let mut chart = Chart::of_columns(1 << 30, columns);
            chart.add(0, 1 << 30, Class::Data);
            let line = &chart.lines(CharacterSet::Ascii, Color::Off)[0];
            assert_eq!(line.matches('#').count(), cells, "{columns}");
        }
    }

    #[test]
    fn a_cell_with_a_little_data_shows_it() {
        let mut chart = Chart::of_columns(1 << 40, 80);
        chart.add(0, 5 << 30, Class::HoleZero);
        chart.add(5 << 30, 1, Class::Data);
        chart.add((5 << 30) + 1, (1 << 40) - (5 << 30) - 1, Class::HoleZero);
        let lines = chart.lines(CharacterSet::Unicode, Color::Off);
        assert_eq!(lines[0].chars().filter(|&glyph| glyph == '▒').count(), 1);
        assert_eq!(lines[0].chars().nth(10 + 5), Some('▒'));
    }

    #[test]
    fn any_size_and_any_extent_can_be_drawn() {
        for size in [0, 1, 511, 513, 1_000_001, (1 << 63) - 1, u64::MAX] {
            let mut chart = Chart::of_columns(size, 20);
            chart.add(0, u64::MAX, Class::Dirty);
            chart.add(u64::MAX, u64::MAX, Class::Clean);
            let lines = chart.lines(CharacterSet::Unicode, Color::On);
            assert!(lines.len() <= 16 + 4, "{size}: {} lines", lines.len());
        }
    }

    #[test]
    fn colours_end_with_their_line() {
        let mut chart = Chart::of_columns(4096, 80);
        chart.add(0, 4096, Class::Data);
        let line = &chart.lines(CharacterSet::Ascii, Color::On)[0];
        assert!(line.ends_with("########\x1b[0m"), "{line:?}");
        assert_eq!(line.matches("\x1b[32m").count(), 1, "{line:?}");
    }
}
