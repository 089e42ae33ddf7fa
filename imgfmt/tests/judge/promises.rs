//! What dirty bitmaps promise, and whether they keep it.

use std::collections::BTreeMap;
use std::sync::Arc;

use imgfmt::{BitmapChange, BitmapState, Durability, Image, Recording, Speed, TryWrite, ZeroMode};

use crate::common::bitmaps::dirty;
use crate::common::{Random, at, range};

pub const NAMES: [&str; 3] = ["a", "b", "the third"];

/// What a bitmap promises.
#[derive(Clone, Debug)]
pub struct Promise {
    pub recording: Recording,
    /// The disk when the bitmap was last cleared or enabled. May be longer than the disk is now:
    /// what was cut off and added again reads as zero.
    base: Arc<Vec<u8>>,
    /// What was dirty already, by merging or before the bitmap was enabled.
    required: Vec<(u64, u64)>,
    /// The dirty parts when it was disabled: nothing may be added.
    frozen: Option<Vec<(u64, u64)>>,
}

pub type Promises = BTreeMap<String, Promise>;

/// Whether a bitmap may be found to be unreliable, which is honest, but costs a full backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Knowledge {
    /// None may be.
    Kept,
    /// Those that noted changes may be.
    MayBeLost,
    /// All may be, also those that noted none.
    AllMayBeLost,
}

pub fn read(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.size() as usize];
    image.read_at(at(0), &mut bytes).unwrap();
    bytes
}

/// One random change of the list of bitmaps that is possible.
pub fn random_change(promises: &Promises, random: &mut Random) -> BitmapChange {
    let name = NAMES[random.below(3) as usize].to_owned();
    let Some(promise) = promises.get(&name) else {
        let granularity = 512 << random.below(8);
        return BitmapChange::Add { name, granularity, recording: Recording::Enabled };
    };
    let other = promises.keys().find(|other| **other != name);
    match (random.below(6), promise.recording, other) {
        (0, _, _) => BitmapChange::Remove { name },
        (1, Recording::Enabled, _) => BitmapChange::Disable { name },
        (1 | 2, Recording::Disabled, _) => BitmapChange::Enable { name },
        (3, _, Some(other)) => BitmapChange::Merge { into: name, from: other.clone() },
        _ => BitmapChange::Clear { name },
    }
}

/// What is promised behind a change that has succeeded.
pub fn promised(image: &Image, promises: &Promises, change: &BitmapChange) -> Promises {
    let mut promises = promises.clone();
    match change {
        BitmapChange::Add { name, recording, .. } => {
            let base = Arc::new(read(image));
            let promise = Promise { recording: *recording, base, required: vec![], frozen: None };
            promises.insert(name.clone(), promise);
        }
        BitmapChange::Remove { name } => {
            promises.remove(name);
        }
        BitmapChange::Clear { name } => {
            let promise = promises.get_mut(name).unwrap();
            promise.base = Arc::new(read(image));
            promise.required.clear();
            promise.frozen = promise.frozen.as_ref().map(|_| Vec::new());
        }
        BitmapChange::Disable { name } => {
            let promise = promises.get_mut(name).unwrap();
            promise.recording = Recording::Disabled;
            promise.frozen = Some(dirty(image, name));
        }
        BitmapChange::Enable { name } => {
            let promise = promises.get_mut(name).unwrap();
            promise.recording = Recording::Enabled;
            promise.required = promise.frozen.take().unwrap();
            promise.base = Arc::new(read(image));
        }
        BitmapChange::Merge { into, from } => {
            let promise = promises.get_mut(into).unwrap();
            promise.required.extend(dirty(image, from));
            promise.frozen = promise.frozen.as_ref().map(|_| dirty(image, into));
        }
        other => panic!("{other:?} is not made here"),
    }
    promises
}

/// What is promised behind a change of the disk's size that has succeeded.
pub fn promised_after_resize(image: &Image, promises: &Promises) -> Promises {
    let mut promises = promises.clone();
    for (name, promise) in &mut promises {
        if (promise.base.len() as u64) < image.size() {
            Arc::make_mut(&mut promise.base).resize(image.size() as usize, 0);
        }
        promise.required = cut(&promise.required, image.size());
        promise.frozen = promise.frozen.as_ref().map(|_| dirty(image, name));
    }
    promises
}

/// What is promised when the image has been closed and opened again: what was cut off before is
/// forgotten.
pub fn promised_when_reopened(image: &Image, promises: &Promises) -> Promises {
    let mut promises = promises.clone();
    for promise in promises.values_mut() {
        Arc::make_mut(&mut promise.base).truncate(image.size() as usize);
    }
    promises
}

fn cut(parts: &[(u64, u64)], size: u64) -> Vec<(u64, u64)> {
    let parts = parts.iter().filter(|(start, _)| *start < size);
    parts.map(|(start, length)| (*start, (*length).min(size - start))).collect()
}

/// A random change of the disk's content.
pub fn write(image: &Image, random: &mut Random) -> imgfmt::Result<()> {
    let size = image.size();
    let offset = random.below(size.div_ceil(512)) * 512;
    let length = ((random.below(40) + 1) * 512).min(size - offset);
    let durability = [Durability::Cached, Durability::Fua][random.below(2) as usize];
    match random.below(5) {
        0 => image.write_zeroes(range(offset, length), ZeroMode::MayUnmap, Speed::Any, durability),
        1 => image.discard(range(offset, length), durability),
        2 => {
            let data = random.bytes(length as usize);
            match image.try_write_at(at(offset), &data)? {
                TryWrite::Complete => Ok(()),
                TryWrite::WouldBlock => image.write_at(at(offset), &data, durability),
            }
        }
        _ => image.write_at(at(offset), &random.bytes(length as usize), durability),
    }
}

/// Whether a bitmap keeps its promise.
fn is_kept(image: &Image, name: &str, content: &[u8], promise: &Promise) -> bool {
    let dirty = dirty(image, name);
    if let Some(frozen) = &promise.frozen {
        return dirty == *frozen;
    }
    let covers = |at: u64, end: u64| {
        dirty.iter().any(|(start, length)| *start <= at && end <= start + length)
    };
    let required = cut(&promise.required, content.len() as u64);
    let sectors = content.chunks(512).zip(promise.base.chunks(512)).enumerate();
    let differ = |now: &[u8], then: &[u8]| {
        let length = now.len().min(then.len());
        now[..length] != then[..length]
    };
    let mut changed = sectors.filter(|(_, (now, then))| differ(now, then));
    required.iter().all(|(start, length)| covers(*start, start + length))
        && changed.all(|(index, _)| covers(index as u64 * 512, index as u64 * 512 + 1))
}

/// Fails unless each bitmap keeps one of the promises, or says that it cannot.
pub fn check(image: &Image, candidates: &[&Promises], knowledge: Knowledge, what: &str) {
    let content = read(image);
    assert_eq!(image.bitmap_damage(), None, "{what}");
    let found = image.bitmaps();
    for name in NAMES {
        let promises: Vec<_> = candidates.iter().map(|list| list.get(name)).collect();
        let Some(bitmap) = found.iter().find(|bitmap| bitmap.name == name) else {
            assert!(promises.iter().any(Option::is_none), "{what}: '{name}' is lost");
            continue;
        };
        match &bitmap.state {
            BitmapState::Consistent { .. } => {
                let kept = |promise: &Promise| is_kept(image, name, &content, promise);
                let is_kept = promises.iter().flatten().any(|promise| kept(promise));
                assert!(is_kept, "{what}: '{name}' does not cover what has changed");
            }
            BitmapState::Inconsistent { reason } => {
                let may_be = |promise: &&Promise| match knowledge {
                    Knowledge::Kept => false,
                    Knowledge::MayBeLost => promise.recording == Recording::Enabled,
                    Knowledge::AllMayBeLost => true,
                };
                let is_fine = promises.iter().flatten().any(may_be);
                assert!(is_fine, "{what}: '{name}' is inconsistent: {reason}");
            }
            state => panic!("{what}: '{name}': {state:?}"),
        }
    }
}
