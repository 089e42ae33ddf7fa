//! Clusters that we compress are what QEMU decompresses.

use std::path::Path;

use imgfmt::{
    Access, CompressionType, CreateOptions, Durability, ErrorKind, Format, Image, OpenOptions,
    Repair,
};

use crate::common::{Random, at, qemu};

const SIZE: u64 = (2 << 20) + 512;

#[test]
fn compressed_images_of_every_kind_are_written_from_several_threads() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("compress");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    for (cluster_size, compression, refcount_bits) in [
        (65536, CompressionType::Zlib, 16),
        (65536, CompressionType::Zstd, 16),
        (4096, CompressionType::Zlib, 2),
        (512, CompressionType::Zlib, 1),
        (1 << 20, CompressionType::Zstd, 64),
    ] {
        let _ = std::fs::remove_file(&path);
        let mut options = CreateOptions::new(Format::Qcow2, SIZE);
        options.cluster_size = cluster_size;
        options.compression = compression;
        options.refcount_bits = refcount_bits;
        Image::create(&path, &options).unwrap();
        let mut model: Vec<u8> = (0..SIZE).map(|i| (i / 333) as u8).collect();
        model[1_000_000..1_300_000].copy_from_slice(&random.bytes(300_000));
        let image = Image::open(&path, &OpenOptions::new().access(Access::ReadWrite)).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (image, model) = (&image, &model);
                scope.spawn(move || {
                    let chunks = model.chunks(cluster_size as usize).enumerate();
                    for (index, chunk) in chunks.filter(|(index, _)| index % 3 == thread) {
                        let offset = at(index as u64 * cluster_size);
                        image.write_compressed(offset, chunk).unwrap();
                    }
                });
            }
        });
        // Overwriting, in the usual form and compressed again, frees what was there.
        image.write_at(at(100_000), &[1; 70_000], Durability::Cached).unwrap();
        model[100_000..170_000].fill(1);
        let again = cluster_size as usize..2 * cluster_size as usize;
        model[again.clone()].fill(2);
        image.write_compressed(at(cluster_size), &model[again]).unwrap();
        let error = image.write_compressed(at(512), &[0; 7]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let mut read = vec![0; SIZE as usize];
        image.read_at(at(0), &mut read).unwrap();
        assert!(read == model, "{options:?}");
        image.close().unwrap();
        qemu::check(&path);
        assert!(qemu::content(&path, "qcow2") == model, "QEMU, {options:?}");
        let report = Image::check_file(&path, &OpenOptions::new(), Repair::None).unwrap();
        // Less than a sector is not worth it.
        assert_eq!(report.compressed_clusters > 0, cluster_size > 512);
        assert_eq!((report.leaks, report.corruptions), (0, 0), "{:?}", report.messages);
    }
}

fn length_of(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

#[test]
fn a_file_ends_with_a_whole_sector_after_every_compressed_cluster() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let image = Image::create(&path, &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    let mut random = Random::new("whole sectors");
    for cluster in 0..SIZE / 65536 {
        // Something that is compressed to another number of bytes each time.
        let mut data = vec![cluster as u8 + 1; 65536];
        let length = 1 + random.below(1000) as usize;
        let noise = random.bytes(length);
        data[..noise.len()].copy_from_slice(&noise);
        image.write_compressed(at(cluster * 65536), &data).unwrap();
        // Also while the image is in use: a crash must not leave anything else.
        assert_eq!(length_of(&path) % 512, 0, "cluster {cluster}");
    }
    image.close().unwrap();
    assert_eq!(length_of(&path) % 512, 0);
}

#[test]
fn a_closed_file_ends_with_the_whole_cluster_that_was_written_in_part() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let image = Image::create(&path, &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    image.write_at(at(70_000), &[1; 100], Durability::Cached).unwrap();
    image.close().unwrap();
    assert_eq!(length_of(&path) % 65536, 0);
    // An image that nobody changes stays as it is.
    let odd = length_of(&path) - 1000;
    std::fs::File::options().write(true).open(&path).unwrap().set_len(odd).unwrap();
    Image::open(&path, &OpenOptions::new().access(Access::ReadWrite)).unwrap().close().unwrap();
    assert_eq!(length_of(&path), odd);
}
