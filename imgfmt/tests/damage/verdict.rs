//! What two engines say about an image, and where they must not differ.

use std::path::Path;
use std::process::Command;

use imgfmt::{Format, Image, OpenOptions, Repair};

use super::Base;
use crate::common::at;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Clean,
    Leaks,
    Corruptions,
    /// The image cannot be checked.
    Impossible,
}

fn options() -> OpenOptions {
    OpenOptions::new().format(Format::Qcow2)
}

fn ours(path: &Path, repair: Repair) -> Verdict {
    match Image::check_file(path, &options(), repair) {
        Err(_) => Verdict::Impossible,
        Ok(report) if report.corruptions > 0 => Verdict::Corruptions,
        Ok(report) if report.leaks > 0 => Verdict::Leaks,
        Ok(_) => Verdict::Clean,
    }
}

fn theirs(path: &Path, arguments: &[&str]) -> Verdict {
    let mut command = Command::new("qemu-img");
    let output = command.args(["check", "-f", "qcow2"]).args(arguments).arg(path).output().unwrap();
    match output.status.code() {
        Some(0) => Verdict::Clean,
        Some(2) => Verdict::Corruptions,
        Some(3) => Verdict::Leaks,
        _ => Verdict::Impossible,
    }
}

/// What our engine can read, piece by piece; nothing where it cannot.
fn readable(path: &Path, snapshot: Option<&str>) -> Vec<Option<Vec<u8>>> {
    let options = match snapshot {
        None => options(),
        Some(name) => options().snapshot(name),
    };
    let Ok(disk) = Image::open(path, &options) else { return Vec::new() };
    let pieces = (0..disk.size().min(8 << 20)).step_by(4096);
    let read = |offset: u64| {
        let mut bytes = vec![0; 4096.min(disk.size() - offset) as usize];
        disk.read_at(at(offset), &mut bytes).ok().map(|()| bytes)
    };
    pieces.map(read).collect()
}

/// What QEMU can read, zeroes where it cannot; nothing if it does not open the image.
fn salvaged(path: &Path, snapshot: bool) -> Option<Vec<u8>> {
    let raw = path.with_extension("raw");
    let _ = std::fs::remove_file(&raw);
    let mut command = Command::new("qemu-img");
    command.args(["convert", "--salvage", "-U", "-f", "qcow2", "-O", "raw"]);
    if snapshot {
        command.args(["-l", "snapshot.name=one"]);
    }
    let output = command.args([path, &*raw]).output().unwrap();
    output.status.success().then(|| std::fs::read(&raw).unwrap())
}

struct Content {
    ours: Vec<Option<Vec<u8>>>,
    our_snapshot: Vec<Option<Vec<u8>>>,
    theirs: Option<Vec<u8>>,
    their_snapshot: Option<Vec<u8>>,
}

impl Content {
    fn of(path: &Path, base: &Base) -> Self {
        let snapshot = base.has_snapshot;
        Self {
            ours: readable(path, None),
            our_snapshot: if snapshot { readable(path, Some("one")) } else { Vec::new() },
            theirs: salvaged(path, false),
            their_snapshot: if snapshot { salvaged(path, true) } else { None },
        }
    }

    /// What was readable and is not any more, or differs.
    fn lost(&self, after: &Self) -> Option<String> {
        let pieces = |before: &[Option<Vec<u8>>], after: &[Option<Vec<u8>>]| {
            let same = |(number, piece): (usize, &Option<Vec<u8>>)| {
                piece.is_none() || after.get(number) == Some(piece)
            };
            before.iter().enumerate().all(same)
        };
        let whole =
            |before: &Option<Vec<u8>>, after: &Option<Vec<u8>>| before.is_none() || before == after;
        match () {
            () if !pieces(&self.ours, &after.ours) => Some("our engine reads another disk".into()),
            () if !pieces(&self.our_snapshot, &after.our_snapshot) => {
                Some("our engine reads another snapshot".into())
            }
            () if !whole(&self.theirs, &after.theirs) => Some("QEMU reads another disk".into()),
            () if !whole(&self.their_snapshot, &after.their_snapshot) => {
                Some("QEMU reads another snapshot".into())
            }
            () => None,
        }
    }
}

/// Whether we may say `ours` where QEMU says `theirs`; see the table in DESIGN.md.
fn may_say(ours: Verdict, theirs: Verdict) -> bool {
    match (ours, theirs) {
        (ours, theirs) if ours == theirs => true,
        // Words that QEMU's check does not look at, and headers that QEMU refuses.
        (Verdict::Corruptions, _) => true,
        (_, Verdict::Impossible) => true,
        _ => false,
    }
}

/// Everything that is wrong with how we treat an image. The verdict is QEMU's.
pub fn differences(folder: &Path, base: &Base, bytes: &[u8]) -> (Verdict, Vec<String>) {
    let mut wrong = Vec::new();
    let path = folder.join("damaged.qcow2");
    std::fs::write(&path, bytes).unwrap();
    let verdict = theirs(&path, &[]);
    let found = ours(&path, Repair::None);
    if !may_say(found, verdict) {
        wrong.push(format!("we say {found:?}, QEMU {verdict:?}"));
    }
    let before = Content::of(&path, base);
    for repair in [Repair::Leaks, Repair::All] {
        std::fs::write(&path, bytes).unwrap();
        let first = ours(&path, repair);
        let second = ours(&path, Repair::None);
        if second != first && first != Verdict::Impossible {
            wrong.push(format!("{repair:?} leaves {first:?}, then we find {second:?}"));
        }
        let judged = theirs(&path, &[]);
        if matches!(second, Verdict::Clean | Verdict::Leaks) && judged != second {
            wrong.push(format!("after {repair:?} we say {second:?}, QEMU {judged:?}"));
        }
        if let Some(what) = before.lost(&Content::of(&path, base)) {
            wrong.push(format!("after {repair:?} {what}"));
        }
        if repair == Repair::All && second == Verdict::Impossible && verdict != second {
            std::fs::write(&path, bytes).unwrap();
            let repaired = theirs(&path, &["-r", "all"]);
            if repaired != Verdict::Impossible {
                wrong.push(format!("we cannot repair what QEMU can ({repaired:?})"));
            }
        }
    }
    (verdict, wrong)
}
