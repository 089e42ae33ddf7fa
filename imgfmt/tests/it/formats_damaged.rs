//! Damaged images of other programs' formats are refused or read in part: no panic, no loop, no
//! more memory than the file's.

use std::sync::Arc;

use imgfmt::storage::MemoryStorage;
use imgfmt::{BackingFile, Format, Image, OpenOptions, OpenPolicy};

use crate::bodies::{foreign, foreign_vmdk};
use crate::common::{Random, at, range};

/// What a word is replaced by.
const VALUES: [fn(u32) -> u32; 8] = [
    |_| 0,
    |_| u32::MAX,
    |_| 0x7fff_ffff,
    |_| 0x8000_0000,
    |word| word ^ 1,
    |word| word ^ 0x8000_0000,
    |word| word.wrapping_add(0x0100_0001),
    |word| word.swap_bytes(),
];

/// No more of a disk than this is looked at.
const LOOK_MAX: u64 = 1 << 16;

fn look(bytes: &[u8], format: Format) {
    let options =
        OpenOptions::new().format(format).policy(OpenPolicy::deny()).backing(BackingFile::Ignored);
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    let image = match Image::from_storage(storage, &options) {
        Ok(image) => image,
        Err(error) => return assert!(!error.to_string().contains('\n'), "{error}"),
    };
    let length = image.size().min(LOOK_MAX);
    let mut buffer = vec![0; length as usize];
    for start in [0, image.size() - length] {
        let _ = image.read_at(at(start), &mut buffer);
        let _ = image.try_read_at(at(start), &mut buffer);
        let _ = image.map_read(range(start, length));
    }
    let _ = image.extents(range(0, image.size())).bounded(2, 1000).count();
}

/// The words of an image that are metadata: those that differ from the one before, as data here
/// does not, and those of headers.
fn places(bytes: &[u8]) -> impl Iterator<Item = usize> + use<'_> {
    let is_header = |place: usize| place < 512 || place + 512 > bytes.len();
    let differs = |place: usize| bytes[place..place + 4] != bytes[place - 4..place];
    let words = (0..bytes.len().saturating_sub(3)).step_by(4);
    words.filter(move |place| is_header(*place) || differs(*place))
}

#[test]
fn every_damaged_word_is_survived() {
    for (format, name, good) in foreign::seeds().into_iter().chain(foreign_vmdk::seeds()) {
        let format = Format::from_name(format).unwrap();
        println!("{format} {name}: {} bytes", good.len());
        for place in places(&good) {
            let mut word = [0; 4];
            word.copy_from_slice(&good[place..place + 4]);
            for value in VALUES {
                let mut bad = good.clone();
                bad[place..place + 4]
                    .copy_from_slice(&value(u32::from_le_bytes(word)).to_le_bytes());
                look(&bad, format);
            }
        }
    }
}

#[test]
fn every_cut_is_survived() {
    for (format, _, good) in foreign::seeds().into_iter().chain(foreign_vmdk::seeds()) {
        let format = Format::from_name(format).unwrap();
        for length in (0..good.len()).step_by(61).chain([512, 1024, good.len() - 1]) {
            look(&good[..length.min(good.len())], format);
        }
    }
}

#[test]
fn random_damage_is_survived() {
    let mut random = Random::new("damage of formats");
    for (format, _, good) in foreign::seeds().into_iter().chain(foreign_vmdk::seeds()) {
        let format = Format::from_name(format).unwrap();
        let places: Vec<usize> = places(&good).collect();
        for _ in 0..300 {
            let mut bad = good.clone();
            for _ in 0..=random.below(5) {
                let place = places[random.below(places.len() as u64) as usize];
                bad[place + random.below(4) as usize] = random.next() as u8;
            }
            look(&bad, format);
        }
    }
}
