//! VMDK: what only it has. Several files, descriptors, parents, compressed grains.

use std::path::Path;
use std::sync::Arc;

use imgfmt::{BackingFile, Error, ErrorKind, Format, Image, NameTarget, OpenOptions, OpenPolicy};

use crate::bodies;
use crate::bodies::foreign_vmdk::{
    COMPRESSED, GRAIN, Hosted, cowd, grain_of, hosted, space_efficient,
};
use crate::chains_vs_qemu::{Layer, allocation, compare_data, compare_maps, compare_parts, joined};
use crate::common::{Random, all_extents, at, has_tool, qemu, range, run, text};
use crate::formats_vs_qemu::has_tools;

const SECTOR: usize = 512;

fn options() -> OpenOptions {
    OpenOptions::new().format(Format::Vmdk)
}

fn read(path: &Path) -> Vec<u8> {
    let image = Image::open(path, &options()).unwrap();
    let mut content = vec![0xee; image.size() as usize];
    image.read_at(at(0), &mut content).unwrap();
    content
}

fn open_error(path: &Path) -> Error {
    Image::open(path, &options()).unwrap_err()
}

/// Writes a descriptor with these lines for its extents.
fn describe(path: &Path, extents: &str) {
    let text = format!(
        "# Disk DescriptorFile\r\nversion=1\r\nCID=0000000a\r\n\
                        parentCID=ffffffff\r\ncreateType=\"custom\"\r\n\r\n# Extents\r\n{extents}\r\n"
    );
    std::fs::write(path, text).unwrap();
}

#[test]
fn compressed_grains_are_read_and_mapped_as_qemu_does() {
    if !has_tools() {
        return;
    }
    let mut random = Random::new("stream");
    let directory = tempfile::tempdir().unwrap();
    let (raw, path) = (directory.path().join("disk.raw"), directory.path().join("disk.vmdk"));
    for round in 0..2 {
        // QEMU's last grain is whole even if the disk ends before it.
        let mut content = vec![0; (random.below(100) as usize + 30) * 65536 - round * 3 * SECTOR];
        for _ in 0..8 {
            let start = random.below(content.len() as u64) as usize;
            let length = random.below(200_000) as usize;
            let bytes = random.bytes(length);
            let end = (start + bytes.len()).min(content.len());
            content[start..end].copy_from_slice(&bytes[..end - start]);
        }
        std::fs::write(&raw, &content).unwrap();
        let stream = ["-o", "subformat=streamOptimized", text(&raw), text(&path)];
        run("qemu-img", &[&["convert", "-f", "raw", "-O", "vmdk"][..], &stream].concat());
        let size = content.len() as u64;
        let layer = Layer { path: path.clone(), format: "vmdk", size, how: String::new() };
        let image = Image::open(&path, &options()).unwrap();
        assert_eq!(image.size(), size);
        let what = format!("round {round}");
        compare_data(&image, &layer, &mut random, &what);
        compare_parts(&image, &mut random, &what);
        compare_maps(&image, &layer, &what);
        assert!(read(&path) == content, "{what}");
    }
}

#[test]
fn grains_are_stored_zeroed_absent_and_compressed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.vmdk");
    let grains = [0, 7, 1, 0, 0, 0, 0, 0, 3, 0, 2];
    let plain = [0, 7, 0, 0, 0, 0, 0, 0, 3, 0, 2];
    let bytes_of = |grains: &[u8]| -> Vec<u8> {
        let value = |grain: &u8| if *grain == 1 { 0 } else { *grain };
        grains.iter().flat_map(|grain| grain_of(value(grain))).collect()
    };
    for (flags, at_end, grains) in [
        (0b101, false, &grains),
        (0b111, false, &grains),
        (COMPRESSED, false, &plain),
        (COMPRESSED, true, &plain),
        (COMPRESSED & !(1 << 17), false, &plain),
        (COMPRESSED | 0b100, false, &grains),
    ] {
        let mut image = hosted(&Hosted { flags, at_end, ..Hosted::new(grains) });
        if flags & (0b11 << 16) == 1 << 16 {
            // Without markers the stream is where the marker was.
            for start in (3 * SECTOR..image.len()).step_by(SECTOR) {
                if image[start + 12..].starts_with(&[0x78, 0x01]) {
                    image.copy_within(start + 12..start + GRAIN + 100, start);
                }
            }
        }
        std::fs::write(&path, &image).unwrap();
        assert!(read(&path) == bytes_of(grains), "{flags:x} {at_end}");
    }
}

#[test]
fn the_redundant_directory_is_used_where_the_first_one_leads_out_of_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.vmdk");
    let grains = [5, 0, 0, 6, 0, 7];
    let good = hosted(&Hosted { flags: 0b111, ..Hosted::new(&grains) });
    std::fs::write(&path, &good).unwrap();
    let content = read(&path);
    let place = u32::from_le_bytes(good[56..60].try_into().unwrap()) as usize * SECTOR;
    let mut bad = good.clone();
    bad[place..place + 4].copy_from_slice(&0x00ff_ffffu32.to_le_bytes());
    std::fs::write(&path, &bad).unwrap();
    assert!(read(&path) == content, "a table");
    let mut bad = good;
    bad[56..64].copy_from_slice(&0x00ff_ffffu64.to_le_bytes());
    std::fs::write(&path, &bad).unwrap();
    assert!(read(&path) == content, "the directory");
}

#[test]
fn a_damaged_grain_is_an_error_and_the_others_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.vmdk");
    let good = hosted(&Hosted { flags: COMPRESSED, ..Hosted::new(&[5, 6]) });
    for (place, what) in [(0, "marker"), (8, "length"), (500, "damaged"), (12 + 4105, "damaged")] {
        let mut bad = good.clone();
        bad[3 * SECTOR + place] ^= 0x40;
        if place == 8 {
            bad[3 * SECTOR + 11] = 0x7f;
        }
        std::fs::write(&path, &bad).unwrap();
        let image = Image::open(&path, &options()).unwrap();
        let mut grain = vec![0; GRAIN];
        let error = image.read_at(at(0), &mut grain).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains(what), "{place}: {error}");
        image.read_at(at(GRAIN as u64), &mut grain).unwrap();
        assert!(grain == grain_of(6), "{place}");
    }
}

#[test]
fn a_disk_in_several_files_is_read_across_their_borders() {
    if !has_tools() {
        return;
    }
    let mut random = Random::new("several files");
    for subformat in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.vmdk");
        let (option, size) = (format!("subformat={subformat}"), 5u64 << 30);
        run("qemu-img", &["create", "-q", "-f", "vmdk", "-o", &option, text(&path), "5G"]);
        let border = 2u64 << 30;
        let commands = [border - 65536, 2 * border - 512, border + 65536, size - 512];
        let lengths = [131_072, 1024, 512, 512];
        let commands: Vec<String> = commands
            .iter()
            .zip(lengths)
            .map(|(offset, length)| format!("write -P {} {offset} {length}", random.below(255) + 1))
            .collect();
        qemu::io(&path, "vmdk", &commands);
        let image = Image::open(&path, &options()).unwrap();
        assert_eq!(image.size(), size);
        let peer = qemu::Nbd::serve(&path, "vmdk");
        let extents = all_extents(&image, range(0, size));
        assert_eq!(joined(&extents, allocation), peer.map("base:allocation"), "{subformat}");
        drop(peer);
        for offset in [border - 102_400, 2 * border - 1_024_000, size - 1_024_000] {
            let mut part = vec![0xee; 1_024_000];
            image.read_at(at(offset), &mut part).unwrap();
            let raw = directory.path().join("part");
            let window = format!(
                "driver=raw,offset={offset},size=1024000,file.driver=vmdk,\
                 file.file.driver=file,file.file.filename={}",
                text(&path)
            );
            run("qemu-img", &["convert", "-U", "--image-opts", "-O", "raw", &window, text(&raw)]);
            assert!(part == std::fs::read(&raw).unwrap(), "{subformat} at {offset}");
        }
    }
}

#[test]
fn a_descriptor_names_parts_of_every_kind() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.vmdk");
    let file =
        |name: &str, bytes: &[u8]| std::fs::write(directory.path().join(name), bytes).unwrap();
    file("a flat \"one\".vmdk", &[[1; SECTOR], [2; SECTOR], [3; SECTOR], [4; SECTOR]].concat());
    file("\u{e9}t\u{e9}\u{20ac}.vmdk", &[5; SECTOR]);
    file("part.vmdk", &hosted(&Hosted::new(&[0, 8])));
    let lines = "RW 1 FLAT \"a flat \"one\".vmdk\" 2\r\nRDONLY 1 VMFS \"a flat \"one\".vmdk\"\r\n\
                 RW 3 ZERO\r\nRW 9 SPARSE \"part.vmdk\"\r\nRW 1 FLAT \"\u{e9}t\u{e9}\u{20ac}.vmdk\" 0";
    describe(&path, lines);
    let mut expected = [[3; SECTOR], [1; SECTOR]].concat();
    expected.extend([0; 3 * SECTOR + GRAIN]);
    expected.extend(&grain_of(8)[..SECTOR]);
    expected.extend([5; SECTOR]);
    assert!(read(&path) == expected);
    // The same with a name as Windows writes it.
    let text = std::fs::read_to_string(&path).unwrap();
    let text = text.replace("version=1", "version=1\r\nencoding=\"windows-1252\"");
    let bytes = text.chars().map(|c| if c == '\u{20ac}' { 0x80 } else { c as u8 });
    std::fs::write(&path, bytes.collect::<Vec<u8>>()).unwrap();
    assert!(read(&path) == expected, "windows-1252");
}

#[test]
fn an_extent_without_access_is_an_error_there_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.vmdk");
    std::fs::write(directory.path().join("flat"), [9; 2 * SECTOR]).unwrap();
    describe(&path, "RW 1 FLAT \"flat\" 0\nNOACCESS 1 FLAT \"gone\" 0\nRW 1 FLAT \"flat\" 1");
    let image = Image::open(&path, &options()).unwrap();
    let mut sector = [0; SECTOR];
    for offset in [0, 2] {
        image.read_at(at(offset * SECTOR as u64), &mut sector).unwrap();
        assert_eq!(sector, [9; SECTOR]);
    }
    let error = image.read_at(at(SECTOR as u64), &mut sector).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

#[test]
fn extents_are_files_that_the_policy_allows() {
    let directory = tempfile::tempdir().unwrap();
    let inner = directory.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    std::fs::write(directory.path().join("outer"), [9; SECTOR]).unwrap();
    std::os::unix::fs::symlink("../outer", inner.join("link")).unwrap();
    let path = inner.join("disk.vmdk");
    for (line, kind) in [
        ("RW 1 FLAT \"../outer\" 0", ErrorKind::PolicyDenied),
        ("RW 1 FLAT \"link\" 0", ErrorKind::PolicyDenied),
        ("RW 1 FLAT \"/etc/passwd\" 0", ErrorKind::PolicyDenied),
        ("RW 1 FLAT \"nbd://localhost/\" 0", ErrorKind::PolicyDenied),
        ("RW 1 FLAT \"json:{}\" 0", ErrorKind::PolicyDenied),
        ("RW 1 FLAT \"\\\\.\\PhysicalDrive0\" 0", ErrorKind::NotFound),
        ("RW 1 FLAT \"disk.vmdk\" 0", ErrorKind::InvalidFormat),
        ("RW 1 SPARSE \"disk.vmdk\"", ErrorKind::InvalidFormat),
        ("RW 1 FLAT \"missing\" 0", ErrorKind::NotFound),
        ("RW 1 VMFSRDM \"outer\"", ErrorKind::Unsupported),
        ("RW 0 ZERO", ErrorKind::InvalidFormat),
        ("RW 18446744073709551615 ZERO", ErrorKind::InvalidFormat),
        ("RW 9007199254740992 ZERO\nRW 9007199254740992 ZERO", ErrorKind::InvalidFormat),
        ("RW 1 FLAT \"outer 0", ErrorKind::InvalidFormat),
        ("RW 1 FLAT", ErrorKind::InvalidFormat),
        ("", ErrorKind::InvalidFormat),
        ("encryption.data = \"abc\"\nRW 1 ZERO", ErrorKind::Unsupported),
        ("ddb.iofilters = \"vmwarevmcrypt\"\nRW 1 ZERO", ErrorKind::Unsupported),
    ] {
        describe(&path, line);
        let error = open_error(&path);
        assert_eq!(error.kind(), kind, "{line}: {error}");
    }
    // Trust makes no file of a device.
    describe(&path, "RW 1 FLAT \"/dev/zero\" 0");
    let trusting = options().policy(OpenPolicy::any_file());
    let error = Image::open(&path, &trusting).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PolicyDenied, "{error}");
    // Nor does a name that says what is below it.
    let reader = |name: &str| {
        let file = NameTarget::File(name["json:".len()..].into());
        Ok(NameTarget::WithBacking(Box::new(file), BackingFile::Ignored))
    };
    let reading = options().policy(OpenPolicy::any_file().read_scheme("json", Arc::new(reader)));
    describe(&path, "RW 1 FLAT \"json:/dev/zero\" 0");
    let error = Image::open(&path, &reading).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PolicyDenied, "{error}");
    describe(&path, "RW 1 FLAT \"../outer\" 0");
    Image::open(&path, &trusting).unwrap();
    // It is described without opening them.
    let denying = OpenOptions::new().policy(OpenPolicy::deny());
    let info = Image::inspect_file(&path, &denying).unwrap();
    assert_eq!((info.format, info.size), (Format::Vmdk, SECTOR as u64));
}

#[test]
fn a_part_of_a_disk_is_not_taken_for_a_disk() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk-s001.vmdk");
    let mut part = hosted(&Hosted::new(&[5]));
    part[28..44].fill(0);
    for part in [part, cowd(&[5]), space_efficient(&[5])] {
        std::fs::write(&path, &part).unwrap();
        let error = open_error(&path);
        assert!(error.to_string().contains("open the descriptor"), "{error}");
    }
}

#[test]
fn a_descriptor_in_an_extent_is_as_long_as_the_header_says() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.vmdk");
    let with_length = |capacity: u64, sectors: u64, text: &[u8]| {
        let mut image = hosted(&Hosted::new(&[5]));
        image[12..20].copy_from_slice(&capacity.to_le_bytes());
        image[36..44].copy_from_slice(&sectors.to_le_bytes());
        image.resize(3 << 20, 0);
        image[SECTOR..SECTOR + text.len()].copy_from_slice(text);
        std::fs::write(&path, image).unwrap();
    };
    let mut text = b"# Disk DescriptorFile\nversion=1\nRW 3 ZERO\n".to_vec();
    text.resize(SECTOR, b'\n');
    text.extend(b"RW 4 ZERO\n");
    with_length(0, 1, &text);
    assert_eq!(Image::open(&path, &options()).unwrap().size(), 3 * SECTOR as u64);
    with_length(0, 2, &text);
    assert_eq!(Image::open(&path, &options()).unwrap().size(), 7 * SECTOR as u64);
    // None of it is left out.
    for capacity in [0, 8] {
        for sectors in [2049, 1 << 20, u64::MAX >> 9] {
            with_length(
                capacity,
                sectors,
                b"# Disk DescriptorFile\nversion=1\nRW 8 SPARSE \"x\"\n",
            );
            let error = open_error(&path);
            assert_eq!(error.kind(), ErrorKind::InvalidFormat, "{error}");
            assert!(error.to_string().contains("longer than 1 MiB"), "{error}");
        }
    }
    with_length(0, 2, b"");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, [&bytes[..SECTOR], b"# Disk DescriptorFile\nRW 3 ZERO\n"].concat())
        .unwrap();
    assert!(open_error(&path).to_string().contains("cut off"));
}

#[test]
fn extents_of_esx_show_the_parent_where_they_have_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    let (base, path) = (file("base.vmdk"), file("disk.vmdk"));
    std::fs::write(file("base-flat.vmdk"), [9; 5 * GRAIN]).unwrap();
    describe(&base, "RW 40 VMFS \"base-flat.vmdk\"");
    let text = std::fs::read_to_string(&base).unwrap();
    std::fs::write(&base, text.replace("custom", "vmfs")).unwrap();
    std::fs::write(file("cowd"), cowd(&[0, 2, 0, 3, 4])).unwrap();
    std::fs::write(file("space"), space_efficient(&[0, 2, 1, 3, 4])).unwrap();
    for (kind, name, create_type, third) in
        [("VMFSSPARSE", "cowd", "vmfsSparse", 9), ("SESPARSE", "space", "seSparse", 0)]
    {
        describe(&path, &format!("RW 40 {kind} \"{name}\""));
        let text = std::fs::read_to_string(&path).unwrap();
        let below = "parentCID=0000000a\r\nparentFileNameHint=\"base.vmdk\"";
        let text = text.replace("parentCID=ffffffff", below).replace("custom", create_type);
        std::fs::write(&path, &text).unwrap();
        let parts = [vec![9; GRAIN], grain_of(2), vec![third; GRAIN], grain_of(3), grain_of(4)];
        assert!(read(&path) == parts.concat(), "{kind}");
        let image = Image::open(&path, &options()).unwrap();
        let depths: Vec<u32> = all_extents(&image, range(0, image.size()))
            .iter()
            .flat_map(|extent| vec![extent.depth; extent.range.length() as usize / GRAIN])
            .collect();
        assert_eq!(depths, [2, 1, if third == 0 { 1 } else { 2 }, 1, 1], "{kind}");
        if has_tool("qemu-img") {
            assert!(qemu::content(&path, "vmdk") == parts.concat(), "{kind}: QEMU");
        }
        std::fs::write(&path, text.replace("parentCID=0000000a", "parentCID=0000000b")).unwrap();
        assert!(open_error(&path).to_string().contains("was changed since"), "{kind}");
    }
    let mut dirty = space_efficient(&[2]);
    dirty[SECTOR + 24] = 1;
    std::fs::write(file("space"), dirty).unwrap();
    describe(&path, "RW 8 SESPARSE \"space\"");
    assert!(open_error(&path).to_string().contains("journal"));
}

#[test]
fn damaged_extents_of_esx_are_survived() {
    for good in [cowd(&[0, 2, 3]), space_efficient(&[0, 2, 1, 3])] {
        let words = good.chunks(4).enumerate().filter(|(_, word)| **word != [0; 4]);
        let places = words.map(|(place, _)| place * 4).chain((0..256).step_by(4));
        for place in places {
            for value in [0, 1, u32::MAX, 0x8000_0000, 0x7fff_ffff, 0x3000_0000, 0x1000_0000] {
                let mut bad = good.clone();
                bad[place..place + 4].copy_from_slice(&value.to_le_bytes());
                bodies::foreign_vmdk::vmdk(&bad);
            }
        }
        for length in (0..good.len()).step_by(509) {
            bodies::foreign_vmdk::vmdk(&good[..length]);
        }
    }
}

#[test]
fn a_parent_shows_where_nothing_is_and_must_be_the_right_one() {
    if !has_tools() {
        return;
    }
    let mut random = Random::new("parents");
    let directory = tempfile::tempdir().unwrap();
    let (base, path) = (directory.path().join("base.vmdk"), directory.path().join("disk.vmdk"));
    run("qemu-img", &["create", "-q", "-f", "vmdk", text(&base), "20M"]);
    qemu::io(&base, "vmdk", &qemu::random_commands(&mut random, 20 << 20, 12));
    let below = ["-b", text(&base), "-F", "vmdk", text(&path)];
    run(
        "qemu-img",
        &[&["create", "-q", "-f", "vmdk", "-o", "zeroed_grain=on"][..], &below].concat(),
    );
    qemu::io(&path, "vmdk", &qemu::random_commands(&mut random, 20 << 20, 12));
    let layer = Layer { path: path.clone(), format: "vmdk", size: 20 << 20, how: String::new() };
    let image = Image::open(&path, &options()).unwrap();
    compare_data(&image, &layer, &mut random, "parent");
    compare_parts(&image, &mut random, "parent");
    compare_maps(&image, &layer, "parent");
    drop(image);
    let content = read(&path);
    // The name that another machine gave it is a path there.
    let bytes = std::fs::read(&path).unwrap();
    let changed = |from: &str, to: &str| {
        assert!(to.len() <= from.len());
        let place = bytes.windows(from.len()).position(|part| part == from.as_bytes()).unwrap();
        let mut bytes = bytes.clone();
        let mut value = to.as_bytes().to_vec();
        value.resize(from.len(), b'\n');
        bytes[place..place + from.len()].copy_from_slice(&value);
        std::fs::write(&path, bytes).unwrap();
    };
    let hint = format!("\"{}\"", text(&base));
    changed(&hint, "\"C:\\vm\\base.vmdk\"");
    assert!(read(&path) == content, "the last component of the name");
    changed(&hint, "\"gone.vmdk\"");
    assert_eq!(open_error(&path).kind(), ErrorKind::NotFound);
    changed(&hint, "\"\"");
    assert_eq!(open_error(&path).kind(), ErrorKind::InvalidFormat);
    let ignoring = options().backing(BackingFile::Ignored);
    changed(&hint, "\"gone.vmdk\"");
    Image::open(&path, &ignoring).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    // Opened for writing, the base gets another identifier.
    qemu::io(&base, "vmdk", &["write -P 1 0 512".into()]);
    let error = open_error(&path);
    assert!(error.to_string().contains("was changed since"), "{error}");
}
