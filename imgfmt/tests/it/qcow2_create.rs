//! Images made and resized by us are sound and readable for QEMU.

use imgfmt::{
    Access, BackingFile, BackingOptions, CompressionType, CreateOptions, DataFile, Durability,
    ErrorKind, Format, Image, L2Entries, OpenOptions, OpenPolicy, Preallocation, Qcow2Version,
    Repair, Shrink,
};

use crate::common::{self, Random, all_extents, at, qemu, range};

const MIB: u64 = 1 << 20;

fn writable() -> OpenOptions {
    OpenOptions::new().access(Access::ReadWrite)
}

fn variants() -> Vec<CreateOptions> {
    let mut variants = Vec::new();
    for (cluster_size, refcount_bits) in
        [(65536, 16), (512, 64), (512, 1), (4096, 8), (2 << 20, 32), (8192, 2)]
    {
        let mut options = CreateOptions::new(Format::Qcow2, 70 * MIB + 512);
        options.cluster_size = cluster_size;
        options.refcount_bits = refcount_bits;
        variants.push(options);
    }
    let plain = || CreateOptions::new(Format::Qcow2, 5 * MIB);
    let mut options = plain();
    options.version = Qcow2Version::V2;
    variants.push(options);
    let mut options = plain();
    options.lazy_refcounts = imgfmt::LazyRefcounts::On;
    variants.push(options);
    let mut options = plain();
    options.compression = CompressionType::Zstd;
    variants.push(options);
    let mut options = plain();
    options.l2_entries = L2Entries::Extended;
    variants.push(options);
    variants.push(CreateOptions::new(Format::Qcow2, 0));
    variants.push(CreateOptions::new(Format::Qcow2, 1 << 50));
    variants
}

#[test]
fn new_images_are_sound_empty_and_writable() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    for mut options in variants() {
        let _ = std::fs::remove_file(&path);
        if options.size == Some(1 << 50) {
            options.cluster_size = 2 << 20;
        }
        Image::create(&path, &options).unwrap();
        qemu::check(&path);
        let image = Image::open(&path, &writable()).unwrap();
        assert_eq!(image.size(), options.size.unwrap());
        if image.size() > 0 {
            let end = image.size() - 512;
            image.write_at(at(end), &[7; 512], Durability::Cached).unwrap();
            image.write_at(at(0), &[8; 512], Durability::Cached).unwrap();
        }
        image.close().unwrap();
        qemu::check(&path);
        let size = options.size.unwrap();
        if size > 0 {
            qemu::io(
                &path,
                "qcow2",
                &["read -P 8 0 512".into(), format!("read -P 7 {} 512", size - 512)],
            );
        }
    }
}

#[test]
fn a_new_file_ends_where_the_file_of_qemu_does() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [ours, theirs] = ["ours", "theirs"].map(|name| directory.path().join(name));
    for (size, cluster_size) in [(MIB, 65536), (1 << 40, 65536), (64 * MIB, 512), (0, 65536)] {
        let mut options = CreateOptions::new(Format::Qcow2, size);
        options.cluster_size = cluster_size;
        Image::create(&ours, &options).unwrap().close().unwrap();
        qemu::create(&theirs, &format!("cluster_size={cluster_size}"), &size.to_string());
        let [length, expected] =
            [&ours, &theirs].map(|path| std::fs::metadata(path).unwrap().len());
        assert_eq!(length, expected, "{size} {cluster_size}");
        std::fs::remove_file(&ours).unwrap();
    }
}

#[test]
fn an_overlay_takes_its_size_and_content_from_its_backing_file() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (base, top) = (directory.path().join("base.raw"), directory.path().join("top.qcow2"));
    std::fs::write(&base, vec![3; 3 << 20]).unwrap();
    let image = Image::create(&top, &CreateOptions::overlay("base.raw", Format::Raw)).unwrap();
    image.write_at(at(1000), &[4; 1000], Durability::Cached).unwrap();
    image.close().unwrap();
    qemu::check(&top);
    let content = qemu::content(&top, "qcow2");
    let mut image = Image::open(&top, &writable()).unwrap();
    image.clear().unwrap();
    let extents = all_extents(&image, range(0, 3 << 20));
    assert_eq!(extents.iter().map(|extent| extent.depth).collect::<Vec<_>>(), [2]);
    image.close().unwrap();
    qemu::check(&top);
    assert_eq!(content.len(), 3 << 20);
    assert!(
        content
            .iter()
            .enumerate()
            .all(|(i, byte)| *byte == if (1000..2000).contains(&i) { 4 } else { 3 })
    );
    let missing = CreateOptions::overlay("missing", Format::Raw);
    let other = directory.path().join("other.qcow2");
    assert_eq!(Image::create(&other, &missing).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!other.exists());
}

#[test]
fn a_new_image_is_open_and_locked_for_its_creator() {
    let directory = tempfile::tempdir().unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        let path = directory.path().join(format.name());
        let image = Image::create(&path, &CreateOptions::new(format, MIB)).unwrap();
        assert_eq!((image.access(), image.format()), (Access::ReadWrite, format));
        assert_eq!((image.size(), image.path()), (MIB, Some(&*path)));
        let other = Image::open(&path, &writable().format(format)).unwrap_err();
        assert_eq!(other.kind(), ErrorKind::Busy, "{other}");
        image.write_at(at(1000), b"first", Durability::Cached).unwrap();
        image.close().unwrap();
        let image = Image::open(&path, &OpenOptions::new().format(format)).unwrap();
        let mut found = [0; 5];
        image.read_at(at(1000), &mut found).unwrap();
        assert_eq!(&found, b"first");
    }
}

#[test]
fn an_image_that_cannot_be_opened_is_not_left_behind() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    std::fs::write(directory.path().join("base.raw"), vec![3; 1 << 20]).unwrap();
    let mut denied = CreateOptions::overlay("base.raw", Format::Raw);
    denied.open.policy = OpenPolicy::deny();
    let mut unknown = CreateOptions::new(Format::Qcow2, MIB);
    let given = BackingOptions::default();
    unknown.open.backing = BackingFile::Given(Box::new(given));
    unknown.data_file = Some(("disk.data".into(), DataFile::Plain));
    unknown.open.policy = OpenPolicy::deny();
    for options in [denied, unknown] {
        Image::create(&path, &options).unwrap_err();
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 1, "{options:?}");
    }
}

#[test]
fn the_data_file_of_a_new_image_needs_no_policy() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let mut options = CreateOptions::new(Format::Qcow2, MIB);
    options.data_file = Some(("disk.data".into(), DataFile::Raw));
    options.open.policy = OpenPolicy::deny();
    let image = Image::create(&path, &options).unwrap();
    image.write_at(at(5), b"data", Durability::Cached).unwrap();
    image.close().unwrap();
    assert_eq!(&std::fs::read(directory.path().join("disk.data")).unwrap()[5..9], b"data");
}

#[test]
fn existing_files_are_left_alone_and_nonsense_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "precious").unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        let error = Image::create(file.path(), &CreateOptions::new(format, MIB)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    }
    assert_eq!(std::fs::read(file.path()).unwrap(), b"precious");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    for (cluster_size, refcount_bits, size) in
        [(500, 16, MIB), (4 << 20, 16, MIB), (65536, 3, MIB), (65536, 128, MIB), (512, 16, 1 << 60)]
    {
        let mut options = CreateOptions::new(Format::Qcow2, size);
        options.cluster_size = cluster_size;
        options.refcount_bits = refcount_bits;
        assert_eq!(Image::create(&path, &options).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert!(!path.exists());
    }
}

#[test]
fn resized_disks_keep_what_they_had_and_gain_zeroes() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("resize");
    for (kind, version) in
        [(512, Qcow2Version::V3), (4096, Qcow2Version::V2), (65536, Qcow2Version::V3)]
    {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        let base = directory.path().join("base.raw");
        std::fs::write(&base, vec![9; 2 << 20]).unwrap();
        let mut options = CreateOptions::overlay("base.raw", Format::Raw);
        options.cluster_size = kind;
        options.version = version;
        Image::create(&path, &options).unwrap();
        let mut model = vec![9; 2 << 20];
        let mut image = Image::open(&path, &writable()).unwrap();
        let error = image.resize(512, Shrink::Refuse).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        for _ in 0..12 {
            let size = random.below(9000) * 512;
            image.resize(size, Shrink::Allow).unwrap();
            model.resize(size as usize, 0);
            if size > 0 {
                let offset = random.below(size);
                let length = (random.below(100_000)).min(size - offset);
                let data = vec![random.below(255) as u8 + 1; length as usize];
                image.write_at(at(offset), &data, Durability::Cached).unwrap();
                model[offset as usize..(offset + length) as usize].copy_from_slice(&data);
            }
            let mut whole = vec![1; size as usize];
            image.read_at(at(0), &mut whole).unwrap();
            assert!(whole == model, "clusters of {kind}: differs at size {size}");
            assert!(image.extents(range(size, 0)).next().is_none());
        }
        image.close().unwrap();
        qemu::check(&path);
        assert!(qemu::content(&path, "qcow2") == model);
    }
}

#[test]
fn preallocated_images_have_a_place_for_every_cluster() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let data = directory.path().join("data.raw");
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for data_file in [None, Some(DataFile::Plain), Some(DataFile::Raw)] {
            for l2_entries in [L2Entries::Standard, L2Entries::Extended] {
                let _ = (std::fs::remove_file(&path), std::fs::remove_file(&data));
                let mut options = CreateOptions::new(Format::Qcow2, 5 * MIB + 512);
                options.preallocation = preallocation;
                options.l2_entries = l2_entries;
                options.data_file = data_file.map(|kind| (common::text(&data).into(), kind));
                Image::create(&path, &options).unwrap();
                qemu::check(&path);
                let report = Image::check_file(&path, &OpenOptions::new(), Repair::None).unwrap();
                assert_eq!(report.allocated_clusters, report.total_clusters, "{options:?}");
                let image = Image::open(&path, &writable()).unwrap();
                assert!(all_extents(&image, range(0, image.size())).iter().all(|extent| {
                    extent.depth == 1 && extent.kind != imgfmt::ExtentKind::Hole
                }));
                let size = std::fs::metadata(&path).unwrap().len();
                image.write_at(at(MIB), &[5; 100_000], Durability::Cached).unwrap();
                image.close().unwrap();
                assert_eq!(std::fs::metadata(&path).unwrap().len(), size, "the file has grown");
                let content = qemu::content(&path, "qcow2");
                let mut expected = vec![0; content.len()];
                expected[MIB as usize..MIB as usize + 100_000].fill(5);
                assert!(content == expected, "{options:?}");
                if data_file == Some(DataFile::Raw) {
                    assert!(std::fs::read(&data).unwrap()[..content.len()] == content);
                }
            }
        }
    }
    let before = std::fs::read(&data).unwrap();
    let mut options = CreateOptions::new(Format::Qcow2, MIB);
    options.data_file = Some(("data.raw".into(), DataFile::Raw));
    let other = directory.path().join("other.qcow2");
    assert_eq!(Image::create(&other, &options).unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert!(!other.exists() && std::fs::read(&data).unwrap() == before);
}
