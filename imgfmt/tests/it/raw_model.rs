//! Random operations on a raw image do what the same operations do to a row of bytes.

use std::sync::Arc;

use imgfmt::storage::MemoryStorage;
use imgfmt::{
    Access, Durability, ExtentKind, Format, Image, OpenOptions, Speed, TryRead, ZeroMode,
};

use crate::common::{Random, all_extents, at, range};

const SIZE: u64 = 3 * 1024 * 1024 + 17;

fn options() -> OpenOptions {
    OpenOptions::new().format(Format::Raw).access(Access::ReadWrite)
}

fn compare(image: &Image, model: &[u8], offset: u64, length: u64) {
    let mut read = vec![0xee; length as usize];
    image.read_at(at(offset), &mut read).unwrap();
    let expected = &model[offset as usize..(offset + length) as usize];
    assert!(read == expected, "{length} bytes at {offset} differ");
    let mut tried = vec![0xee; length as usize];
    if image.try_read_at(at(offset), &mut tried).unwrap() == TryRead::Complete {
        assert!(tried == expected, "{length} bytes at {offset} differ when read without blocking");
    }
}

fn check_extents(image: &Image, model: &[u8]) {
    let extents = all_extents(image, range(0, SIZE));
    let mut position = 0;
    for extent in extents {
        assert_eq!(extent.range.offset().bytes(), position);
        assert_eq!(extent.depth, 1);
        position = extent.range.end().bytes();
        if extent.kind != ExtentKind::Data {
            let start = extent.range.offset().bytes() as usize;
            assert!(model[start..position as usize].iter().all(|byte| *byte == 0));
        }
    }
    assert_eq!(position, SIZE);
}

fn random_operations(image: &Image, random: &mut Random) {
    let mut model = vec![0; SIZE as usize];
    for _ in 0..400 {
        let offset = random.below(SIZE);
        let length = random.below(100_000).min(SIZE - offset);
        let part = offset as usize..(offset + length) as usize;
        let durability = [Durability::Cached, Durability::Fua][usize::from(random.below(20) == 0)];
        match random.below(6) {
            0 | 1 => {
                let data = random.bytes(length as usize);
                image.write_at(at(offset), &data, durability).unwrap();
                model[part].copy_from_slice(&data);
            }
            2 => {
                let mode = [ZeroMode::MayUnmap, ZeroMode::KeepAllocated][random.below(2) as usize];
                image.write_zeroes(range(offset, length), mode, Speed::Any, durability).unwrap();
                model[part].fill(0);
            }
            3 => {
                image.discard(range(offset, length), durability).unwrap();
                // A discard leaves either the old bytes or zeroes.
                let mut now = vec![0; length as usize];
                image.read_at(at(offset), &mut now).unwrap();
                for (new, old) in now.iter().zip(&mut model[part]) {
                    assert!(*new == 0 || new == old);
                    *old = *new;
                }
            }
            _ => compare(image, &model, offset, length),
        }
    }
    image.flush().unwrap();
    compare(image, &model, 0, SIZE);
    check_extents(image, &model);
}

#[test]
fn a_raw_file_behaves_like_a_row_of_bytes() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let image = Image::open(file.path(), &options()).unwrap();
    random_operations(&image, &mut Random::new("raw file"));
    assert_eq!(file.as_file().metadata().unwrap().len(), SIZE, "the file's length has changed");
}

#[test]
fn a_raw_image_in_memory_behaves_like_a_row_of_bytes() {
    let image = Image::from_storage(Arc::new(MemoryStorage::new(SIZE)), &options()).unwrap();
    random_operations(&image, &mut Random::new("memory"));
}
