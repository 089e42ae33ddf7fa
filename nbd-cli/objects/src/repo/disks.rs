//! Several disks in one backup: one behind another, each from a map page of its own on.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::name::is_name;
use super::page::{DISK_SIZE_MAX, PAGE_SPAN};

/// Longest name of a disk, in bytes: with what a restore adds, it is the name of a file.
const NAME_LEN_MAX: usize = 128;
/// Most disks of a backup.
pub const DISKS_MAX: usize = 128;
/// Room behind a disk, in bytes: as much as it has, but at least and at most this. What it needs of
/// the map is nearly nothing, and a disk that grows into it stays where it is.
const ROOM: (u64, u64) = (1 << 30, 1 << 40);

/// Where a disk comes from, and what its server knows of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOrigin {
    /// The identity that the server knows for this backup of it, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// The identity of the disk, if the server has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// The export that was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<String>,
    /// The dirty bitmap that starts with this backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<String>,
}

/// One of several disks of a backup. Unknown fields are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskHead {
    /// Its name: 1 to 128 bytes, without `/`, `@`, `#`, `=`, `:` and control characters; not `.` or
    /// `..`.
    pub name: String,
    /// Where it begins in the backup, in bytes: a multiple of 32 MiB.
    pub offset: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where it comes from.
    #[serde(flatten)]
    pub origin: DiskOrigin,
}

impl DiskHead {
    /// Returns whether another backup has the same disk at the same place, as far as that tells.
    pub fn is_same_place(&self, other: &Self) -> bool {
        (&self.name, self.offset, self.size) == (&other.name, other.offset, other.size)
    }
}

/// Sets where each disk begins, and sorts them by that; returns where the last one ends. A disk
/// that `base` has by the same name stays where it is there, if it fits: then what did not change
/// is found. `None` if all together are too large.
pub fn lay_out(disks: &mut Vec<DiskHead>, base: &[DiskHead]) -> Option<u64> {
    let (laid_out, end) = place(disks, base, ROOM).or_else(|| place(disks, &[], (0, 0)))?;
    *disks = laid_out;
    Some(end)
}

fn place(
    disks: &[DiskHead],
    base: &[DiskHead],
    (least, most): (u64, u64),
) -> Option<(Vec<DiskHead>, u64)> {
    let ends = |disk: &DiskHead| disk.offset.checked_add(disk.size);
    let (mut placed, mut others): (Vec<DiskHead>, _) = (Vec::new(), disks.to_vec());
    for before in base {
        let end = placed.last().map_or(Some(0), ends)?;
        let same = others.iter().position(|disk| disk.name == before.name);
        // What was before may have grown.
        if let Some(same) = same.filter(|_| before.offset >= end) {
            placed.push(DiskHead { offset: before.offset, ..others.remove(same) });
        }
    }
    for disk in others {
        let offset = match placed.last() {
            None => 0,
            Some(last) => ends(last)?.checked_add(last.size.clamp(least, most))?,
        };
        placed.push(DiskHead { offset: offset.checked_next_multiple_of(PAGE_SPAN)?, ..disk });
    }
    let end = placed.last().map_or(Some(0), ends)?;
    (end <= DISK_SIZE_MAX).then_some((placed, end))
}

/// Returns whether these can be the names of the disks of a backup.
pub fn are_names<'a>(names: impl IntoIterator<Item = &'a str>) -> bool {
    let mut seen = HashSet::new();
    names.into_iter().all(|name| is_name(name, NAME_LEN_MAX, "/@#=:") && seen.insert(name))
        && seen.len() <= DISKS_MAX
}

/// Returns whether these can be the disks of a backup that ends at `size`.
pub(crate) fn are_laid_out(disks: &[DiskHead], size: u64) -> bool {
    let mut end = 0u64;
    for disk in disks {
        let is_behind = disk.offset >= end && disk.offset.is_multiple_of(PAGE_SPAN);
        let Some(own_end) = disk.offset.checked_add(disk.size) else { return false };
        if !is_behind {
            return false;
        }
        end = own_end;
    }
    end == size && are_names(disks.iter().map(|disk| &*disk.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(sizes: &[u64]) -> Vec<DiskHead> {
        let disk = |(number, size): (usize, &u64)| DiskHead {
            name: format!("disk{number}"),
            size: *size,
            ..DiskHead::default()
        };
        sizes.iter().enumerate().map(disk).collect()
    }

    fn offsets(disks: &[DiskHead]) -> Vec<(&str, u64)> {
        disks.iter().map(|disk| (&*disk.name, disk.offset / PAGE_SPAN)).collect()
    }

    #[test]
    fn each_disk_begins_with_a_page_and_has_room() {
        let mut three = disks(&[1, 0, 2 << 30]);
        let room = (1 << 30) / PAGE_SPAN + 1;
        assert_eq!(lay_out(&mut three, &[]), Some((2 * room - 1) * PAGE_SPAN + (2 << 30)));
        assert_eq!(offsets(&three), [("disk0", 0), ("disk1", room), ("disk2", 2 * room - 1)]);
        assert!(are_laid_out(&three, (2 * room - 1) * PAGE_SPAN + (2 << 30)));
        assert!(!are_laid_out(&three, 2 * room * PAGE_SPAN));
        // Without room, they may fit.
        let mut two = disks(&[DISK_SIZE_MAX - PAGE_SPAN, 1]);
        assert_eq!(lay_out(&mut two, &[]), Some(DISK_SIZE_MAX - PAGE_SPAN + 1));
        assert_eq!(lay_out(&mut disks(&[DISK_SIZE_MAX, 1]), &[]), None);
        assert_eq!(lay_out(&mut disks(&[u64::MAX, 1]), &[]), None);
        assert_eq!(lay_out(&mut Vec::new(), &[]), Some(0));
    }

    #[test]
    fn a_disk_stays_where_it_was_when_others_go_come_or_grow() {
        let mut base = disks(&[100, 100, 100, 100]);
        lay_out(&mut base, &[]).unwrap();
        let at: Vec<_> = base.iter().map(|disk| disk.offset).collect();
        // The first one is gone, the second one grows within its room and the third one beyond; one
        // is new.
        let mut next = disks(&[5, 1 << 20, 3 << 30, 200]);
        next[0].name = "new".to_owned();
        let size = lay_out(&mut next, &base).unwrap();
        assert!(are_laid_out(&next, size), "{next:?}");
        let found = |name: &str| next.iter().find(|disk| disk.name == name).unwrap().offset;
        assert_eq!((found("disk1"), found("disk2")), (at[1], at[2]));
        assert!(found("disk3") > at[3], "its place was taken");
        let mut again = next.clone();
        again.reverse();
        assert_eq!(lay_out(&mut again, &next), Some(size));
        assert_eq!(again, next, "whatever the order in which they are given");
        // One that is nowhere near.
        base[1].offset = DISK_SIZE_MAX - PAGE_SPAN;
        assert!(lay_out(&mut next, &base).is_some_and(|size| are_laid_out(&next, size)));
    }

    #[test]
    fn impossible_disks_are_refused() {
        let good = || {
            let mut two = disks(&[100, 100]);
            let size = lay_out(&mut two, &[]).unwrap();
            (two, size)
        };
        let changes: [fn(&mut Vec<DiskHead>); 8] = [
            |two| two[1].offset = 0,
            |two| two[1].offset += 1,
            |two| two[1].size = u64::MAX,
            |two| two[1].name = two[0].name.clone(),
            |two| two[0].name = "../x".to_owned(),
            |two| two[0].name = String::new(),
            |two| two[0].name = "n".repeat(300),
            |two| two[0].name = "nbd:host".to_owned(),
        ];
        for change in changes {
            let (mut two, size) = good();
            assert!(are_laid_out(&two, size));
            change(&mut two);
            assert!(!are_laid_out(&two, size), "{two:?}");
        }
    }
}
