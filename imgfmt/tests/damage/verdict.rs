//! What two engines say about an image, and where they must not differ.

use std::path::Path;
use std::process::Command;

use imgfmt::{CheckReport, Format, Image, OpenOptions, Repair};

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
    told(&Image::check_file(path, &options(), repair))
}

fn told(report: &imgfmt::Result<CheckReport>) -> Verdict {
    match report {
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

/// Damages that we report and QEMU's check does not look at, by words of our message. Each stands
/// in the table in DESIGN.md.
const MORE_THAN_QEMU: [&str; 3] = [
    // QEMU's first write marks the image as corrupt.
    "says that there are bitmaps (autoclear bit 0), but not where",
    // QEMU refuses to read such an entry.
    "has the zero flag, which version 2 lacks",
    "has the COPIED bit but no L2 table",
];

/// What we refuse and QEMU does not, by words of our error.
const REFUSED_BY_US: [&str; 1] = [
    // A length that is not a multiple of 8, which the format demands and QEMU does not look at.
    "a header of ",
];

fn is_listed(text: &str, list: &[&str]) -> bool {
    list.iter().any(|words| text.contains(words))
}

fn is_refused_on_purpose(report: &imgfmt::Result<CheckReport>) -> bool {
    report.as_ref().is_err_and(|error| is_listed(&error.to_string(), &REFUSED_BY_US))
}

/// Whether a message is about a refcount that is too high.
fn is_leak(message: &str) -> bool {
    let Some((_, counts)) = message.split_once(" has refcount ") else { return false };
    let Some((is, should)) = counts.split_once(", should be ") else { return false };
    matches!((is.parse::<u64>(), should.parse::<u64>()), (Ok(is), Ok(should)) if is > should)
}

/// Whether we may say what `report` says where QEMU says `theirs`.
fn may_say(report: &imgfmt::Result<CheckReport>, theirs: Verdict) -> bool {
    match (told(report), theirs, report) {
        (ours, theirs, _) if ours == theirs => true,
        // Headers that QEMU refuses.
        (_, Verdict::Impossible, _) => true,
        (Verdict::Impossible, ..) => is_refused_on_purpose(report),
        (Verdict::Corruptions, _, Ok(report)) => report
            .messages
            .iter()
            .all(|message| is_leak(message) || is_listed(message, &MORE_THAN_QEMU)),
        _ => false,
    }
}

/// Everything that is wrong with how we treat an image. The verdict is QEMU's.
pub fn differences(directory: &Path, base: &Base, bytes: &[u8]) -> (Verdict, Vec<String>) {
    let mut wrong = Vec::new();
    let path = directory.join("damaged.qcow2");
    std::fs::write(&path, bytes).unwrap();
    let verdict = theirs(&path, &[]);
    let report = Image::check_file(&path, &options(), Repair::None);
    if !may_say(&report, verdict) {
        let found = told(&report);
        let words = match &report {
            Ok(report) => report.messages.join(", "),
            Err(error) => error.to_string(),
        };
        wrong.push(format!("we say {found:?}, QEMU {verdict:?}: {words}"));
    }
    let is_refused = is_refused_on_purpose(&report);
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
        if repair == Repair::All
            && second == Verdict::Impossible
            && verdict != second
            && !is_refused
        {
            std::fs::write(&path, bytes).unwrap();
            let repaired = theirs(&path, &["-r", "all"]);
            if repaired != Verdict::Impossible {
                wrong.push(format!("we cannot repair what QEMU can ({repaired:?})"));
            }
        }
    }
    (verdict, wrong)
}
