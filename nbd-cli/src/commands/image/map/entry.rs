//! The entries of a map.

use nbd_jobs::chart::Class;
use serde::Serialize;

/// A range of the disk, with the keys of qemu-img.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct MapEntry {
    pub(super) start: u64,
    pub(super) length: u64,
    pub(super) depth: u32,
    pub(super) present: bool,
    pub(super) zero: bool,
    pub(super) data: bool,
    pub(super) compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) offset: Option<u64>,
}

impl MapEntry {
    /// Extends the entry by the following one if that is alike.
    pub(super) fn join(&mut self, next: &Self) -> bool {
        let follows = match (self.offset, next.offset) {
            (Some(offset), Some(next)) => offset.checked_add(self.length) == Some(next),
            (None, None) => true,
            _ => false,
        };
        let alike = |part: &Self| (part.depth, part.present, part.zero, part.data, part.compressed);
        let joins = follows && alike(self) == alike(next);
        if joins {
            self.length += next.length;
        }
        joins
    }

    /// Returns how it is drawn.
    pub(super) fn class(&self) -> Class {
        match (self.present, self.data && !self.zero, self.depth) {
            (true, true, 0) => Class::Local,
            (true, true, _) => Class::Backing,
            (true, false, _) => Class::Zero,
            (false, ..) => Class::Absent,
        }
    }

    pub(super) fn text(&self) -> String {
        let depth = if self.present { self.depth.to_string() } else { "-".into() };
        let what = match (self.compressed, self.data && !self.zero, self.present && self.zero) {
            (true, ..) => "compressed",
            (_, true, _) => "data",
            (.., true) => "zero",
            _ => "hole",
        };
        let offset = self.offset.map(|offset| format!("{offset:>12}")).unwrap_or_default();
        let line =
            format!("{:>12}  {:>12}  {depth:>3}  {what:<10}  {offset}", self.start, self.length);
        line.trim_end().to_owned()
    }
}
