//! A disk as a chart, as text and as a picture.

mod class;
mod svg;
mod text;

pub use self::class::{CharacterSet, Class, Color, Scheme};
use crate::size::{exact, rounded};

const MAX_ROWS: u64 = 16;
/// Powers of two, so that each line and each cell cover a round number of bytes.
const LEAST_CELLS_PER_ROW: u64 = 8;
const MOST_CELLS_PER_ROW: u64 = 256;
const CELLS_PER_PICTURE_ROW: u64 = 64;
/// Columns of a line besides its cells.
const LABEL_COLUMNS: usize = 12;
/// Parts smaller than a sector are not shown.
const MIN_CELL_LENGTH: u64 = 512;

/// Collects extents and draws them.
#[derive(Debug)]
pub struct Chart {
    size: u64,
    cell_length: u64,
    cells_per_row: u64,
    /// For each cell, the bytes of each class.
    cells: Vec<[u64; Class::COUNT]>,
}

impl Chart {
    /// Creates an empty chart of a disk of `size` bytes for a terminal of that many columns.
    pub fn of_columns(size: u64, columns: usize) -> Self {
        let mut cells_per_row = MOST_CELLS_PER_ROW;
        while LABEL_COLUMNS + cells_per_row as usize > columns
            && cells_per_row > LEAST_CELLS_PER_ROW
        {
            cells_per_row /= 2;
        }
        Self::new(size, cells_per_row)
    }

    /// Creates an empty chart of a disk of `size` bytes for a picture.
    pub fn of_picture(size: u64) -> Self {
        Self::new(size, CELLS_PER_PICTURE_ROW)
    }

    fn new(size: u64, cells_per_row: u64) -> Self {
        // Sizes are below 2^63, so that the next power of two exists.
        let cell_length = size
            .div_ceil(MAX_ROWS * cells_per_row)
            .checked_next_power_of_two()
            .unwrap_or(1 << 63)
            .max(MIN_CELL_LENGTH);
        // At most MAX_ROWS * cells_per_row.
        let cells = vec![[0; Class::COUNT]; size.div_ceil(cell_length) as usize];
        Self { size, cell_length, cells_per_row, cells }
    }

    /// Adds an extent; parts beyond the end of the disk are ignored.
    pub fn add(&mut self, offset: u64, length: u64, class: Class) {
        let end = offset.saturating_add(length).min(self.size);
        let mut at = offset;
        while at < end {
            let cell = at / self.cell_length;
            let cell_end = (cell + 1).saturating_mul(self.cell_length).min(end);
            if let Some(bytes) = self.cells.get_mut(cell as usize) {
                bytes[class.index()] += cell_end - at;
            }
            at = cell_end;
        }
    }

    fn scale(&self, cell: &str, row: &str) -> String {
        let row_length = self.cell_length.saturating_mul(self.cells_per_row);
        let (cell_length, row_length) = (exact(self.cell_length), exact(row_length));
        let size = rounded(self.size);
        format!("One {cell} is {cell_length}, one {row} {row_length}; the disk has {size}.")
    }
}

/// What a chart shows.
struct Legend {
    /// With the bytes of each, and their share in percent.
    classes: Vec<(Class, u64, f64)>,
    /// Whether a cell has several classes.
    is_mixed: bool,
}

impl Legend {
    fn of(chart: &Chart) -> Self {
        let mut is_mixed = false;
        let mut totals = [0_u64; Class::COUNT];
        for cell in &chart.cells {
            is_mixed |= cell.iter().filter(|&&bytes| bytes > 0).count() > 1;
            for (total, bytes) in totals.iter_mut().zip(cell) {
                *total += bytes;
            }
        }
        let present = Class::ALL.into_iter().zip(totals).filter(|(_, total)| *total > 0);
        let percent = |total| total as f64 * 100.0 / chart.size as f64;
        let classes = present.map(|(class, total)| (class, total, percent(total))).collect();
        Self { classes, is_mixed }
    }
}
