//! Bitmaps as plain vectors of bits.

use imgfmt::{Image, OpenOptions};

use super::range;

/// A bitmap that a test keeps itself.
#[derive(Clone, Debug)]
pub struct Model {
    pub granularity: u64,
    pub bits: Vec<bool>,
    pub size: u64,
}

impl Model {
    pub fn new(size: u64, granularity: u64) -> Self {
        let count = size.div_ceil(granularity) as usize;
        Self { granularity, bits: vec![false; count], size }
    }

    pub fn set(&mut self, offset: u64, length: u64) {
        if length > 0 {
            let last = (offset + length - 1) / self.granularity;
            (offset / self.granularity..=last).for_each(|bit| self.bits[bit as usize] = true);
        }
    }

    pub fn resize(&mut self, size: u64) {
        self.size = size;
        self.bits.resize(size.div_ceil(self.granularity) as usize, false);
    }

    /// The dirty parts: offset and length.
    pub fn dirty(&self) -> Vec<(u64, u64)> {
        let mut parts: Vec<(u64, u64)> = Vec::new();
        for (index, _) in self.bits.iter().enumerate().filter(|(_, bit)| **bit) {
            let start = index as u64 * self.granularity;
            let end = (start + self.granularity).min(self.size);
            match parts.last_mut() {
                Some(last) if last.0 + last.1 == start => last.1 = end - last.0,
                _ => parts.push((start, end - start)),
            }
        }
        parts
    }
}

/// What a bitmap says, joined: the dirty parts, offset and length. Asked for in pieces of at most
/// seven extents.
pub fn dirty(image: &Image, name: &str) -> Vec<(u64, u64)> {
    let mut parts: Vec<(u64, u64)> = Vec::new();
    let mut position = 0;
    while position < image.size() {
        let rest = range(position, image.size() - position);
        let extents = image.dirty_extents(name, rest, 7).unwrap();
        for extent in extents {
            assert_eq!(extent.range.offset().bytes(), position);
            position = extent.range.end().bytes();
            let (offset, length) = (extent.range.offset().bytes(), extent.range.length());
            match parts.last_mut() {
                _ if !extent.is_dirty => {}
                Some(last) if last.0 + last.1 == offset => last.1 += length,
                _ => parts.push((offset, length)),
            }
        }
    }
    parts
}

/// As [`dirty`], of the image in a file.
pub fn dirty_in(path: &std::path::Path, name: &str) -> Vec<(u64, u64)> {
    dirty(&Image::open(path, &OpenOptions::new()).unwrap(), name)
}
