//! Every state that a crash can leave, sector by sector, while the backing file is changed.

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::create_options::{CreateOptions, Qcow2Version};
use crate::image::Image;
use crate::qcow2::metadata::header_edit::put_extension;
use crate::qcow2::purpose::Purpose;
use crate::storage::MemoryStorage;
use crate::testing::Recorder;

const UNKNOWN_EXTENSION: u32 = 0x1234_5678;
const UNKNOWN_AUTOCLEAR: u64 = 1 << 40;

/// Name and format as the header says them.
type Named = Option<(OsString, Option<String>)>;
/// A change of the backing file.
type To<'a> = Option<(&'a str, Format)>;

struct Trial {
    directory: tempfile::TempDir,
    bytes: Vec<u8>,
    has_qemu: bool,
}

fn has_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    assert!(found || std::env::var_os("CI").is_none(), "qemu-img is needed");
    found
}

impl Trial {
    /// An image above `base.qcow2` or `base.raw`, or above nothing.
    fn new(options: CreateOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for (name, format) in [("base.raw", Format::Raw), ("base.qcow2", Format::Qcow2)] {
            let options = CreateOptions::new(format, 1 << 20);
            Image::create(directory.path().join(name), &options).unwrap();
        }
        let path = directory.path().join("disk.qcow2");
        Image::create(&path, &options).unwrap();
        let bytes = std::fs::read(path).unwrap();
        Self { directory, bytes, has_qemu: has_qemu() }
    }

    fn edit(&mut self, edit: impl FnOnce(&MemoryStorage)) {
        let storage = MemoryStorage::from_bytes(&self.bytes);
        edit(&storage);
        storage.read_exact_at(HostOffset::new(0), &mut self.bytes).unwrap();
    }

    /// Adds an extension that pushes those behind it out of the first sector.
    fn push_extension(&mut self, length: usize) {
        let cluster_size = header(&self.bytes).geometry.cluster_size();
        let content = vec![0xa5; length];
        self.edit(|file| put_extension(file, cluster_size, UNKNOWN_EXTENSION, &content).unwrap());
    }

    /// Has a bit set that is not known here.
    fn set_unknown_autoclear(&mut self) {
        let bits = UNKNOWN_AUTOCLEAR | autoclear::SEAL;
        self.bytes[field::AUTOCLEAR as usize..][..8].copy_from_slice(&bits.to_be_bytes());
    }

    /// Changes the backing file and looks at every state that a crash can leave.
    fn change(&mut self, to: To<'_>, may_lack_format: bool) {
        self.change_seen(to, may_lack_format, false);
    }

    /// The same where the image may be refused in between; returns in how many states it is.
    fn change_with_gap(&mut self, to: To<'_>) -> usize {
        self.change_seen(to, false, true)
    }

    fn change_seen(&mut self, to: To<'_>, may_lack_format: bool, may_be_unfinished: bool) -> usize {
        let old = named(&self.bytes);
        let new: Named = to.map(|(name, format)| (name.into(), Some(format.name().to_owned())));
        let others = other_extensions(&self.bytes);
        let recorder = Recorder::new();
        let storage = recorder.storage(&self.bytes);
        change(&*storage, to);
        let (mut seen, mut unfinished) = (HashSet::new(), 0);
        for position in 0..=recorder.position() {
            for state in storage.all_after_crash(position) {
                if !seen.insert(state.clone()) {
                    continue;
                }
                let what = format!("{old:?} to {new:?}, {position} changes");
                if is_unfinished(&state) {
                    assert!(may_be_unfinished, "{what}: unfinished");
                    assert!(other_extensions(&state) == others, "{what}: other extensions");
                    self.judge_unfinished(&state, &what);
                    unfinished += 1;
                    change_again(&state, to, &new, &what);
                    continue;
                }
                let found = named(&state);
                let what = format!("{what}: {found:?}");
                let lacks_format = found.as_ref().is_some_and(|(name, format)| {
                    let is_known = [&old, &new].into_iter().flatten().any(|it| it.0 == *name);
                    format.is_none() && is_known && old.is_some() && new.is_some()
                });
                let has_either = found == old || found == new;
                assert!(has_either || may_lack_format && lacks_format, "{what}");
                assert!(other_extensions(&state) == others, "{what}: other extensions");
                let bits = header(&state).autoclear;
                let is_cleared = bits & (UNKNOWN_AUTOCLEAR | autoclear::SEAL) == 0;
                let is_old = found.as_ref().map(|it| &it.0) == old.as_ref().map(|it| &it.0);
                assert!(is_old || is_cleared, "{what}: autoclear bits {bits:#x}");
                self.judge(&state, &found, &what);
                change_again(&state, to, &new, &what);
            }
        }
        assert!(seen.len() > 1, "nothing was written");
        self.bytes = storage.content();
        assert!(named(&self.bytes) == new);
        assert_eq!(header(&self.bytes).autoclear & (UNKNOWN_AUTOCLEAR | autoclear::SEAL), 0);
        unfinished
    }

    /// Nobody reads an image that lacks its backing file.
    fn judge_unfinished(&self, state: &[u8], what: &str) {
        let storage = MemoryStorage::from_bytes(state);
        for purpose in [Purpose::Use, Purpose::Check, Purpose::Describe] {
            let error = Header::read(&storage, purpose).unwrap_err().to_string();
            assert!(error.contains("'nbd-cli image rebase --unsafe'"), "{what}: {error}");
        }
        if self.has_qemu {
            let path = self.directory.path().join("disk.qcow2");
            std::fs::write(&path, state).unwrap();
            let output = Command::new("qemu-img").arg("check").arg(&path).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(said.contains("Unknown incompatible feature"), "{what}: {said}");
        }
    }

    /// Moves the name to the end of the list of extensions, where no mark is left, or up to 7 bytes
    /// into the last extension's padding.
    fn take_mark_away(&mut self, overlap: u64) {
        let cluster_size = header(&self.bytes).geometry.cluster_size();
        let name = header(&self.bytes).backing_name.unwrap();
        self.edit(|file| {
            let area = Area::read(file, cluster_size).unwrap();
            let place = area.end - overlap;
            area.write(place, name.as_bytes()).unwrap();
            area.write(BACKING_FILE_OFFSET as u64, &place.to_be_bytes()).unwrap();
            assert!(!has_mark(&Area::read(file, cluster_size).unwrap()));
        });
    }

    /// What QEMU says.
    fn judge(&self, state: &[u8], found: &Named, what: &str) {
        if !self.has_qemu {
            return;
        }
        let path = self.directory.path().join("disk.qcow2");
        std::fs::write(&path, state).unwrap();
        // QEMU takes that name for devices only, and opens the backing file for a check.
        if found.as_ref().is_none_or(|it| it.1.as_deref() != Some("host_device")) {
            qemu(&["check", "-f", "qcow2"], &path, what);
        }
        let said = qemu(&["info", "-f", "qcow2"], &path, what);
        let line = |start: &str| {
            let line = said.lines().find_map(|line| line.strip_prefix(start));
            line.map(|rest| rest.split(" (actual path").next().unwrap_or(rest).to_owned())
        };
        let (name, format) = found.clone().unzip();
        assert_eq!(line("backing file: "), name.map(|name| name.into_string().unwrap()), "{what}");
        if found.is_some() {
            assert_eq!(line("backing file format: "), format.flatten(), "{what}");
        }
    }
}

fn qemu(arguments: &[&str], path: &Path, what: &str) -> String {
    let output = Command::new("qemu-img").args(arguments).arg(path).output().unwrap();
    assert!(output.status.success(), "{what}: qemu-img {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// An interrupted change can be repeated.
fn change_again(state: &[u8], to: To<'_>, new: &Named, what: &str) {
    let again = MemoryStorage::from_bytes(state);
    change(&again, to);
    let mut bytes = vec![0; state.len()];
    again.read_exact_at(HostOffset::new(0), &mut bytes).unwrap();
    assert!(named(&bytes) == *new, "{what}: changed again");
}

fn is_unfinished(bytes: &[u8]) -> bool {
    u32_at(bytes, 4) >= 3
        && u64_at(bytes, field::INCOMPATIBLE as usize) & incompatible::NAME_UNFINISHED != 0
}

fn change(storage: &dyn Storage, to: To<'_>) {
    change_backing(storage, to.map(|(name, format)| (name.as_ref(), format)), Use::Closed).unwrap();
}

fn header(bytes: &[u8]) -> Header {
    Header::read(&MemoryStorage::from_bytes(bytes), Purpose::Use).unwrap()
}

fn named(bytes: &[u8]) -> Named {
    let header = header(bytes);
    Some((header.backing_name?, header.extensions.backing_format))
}

/// Kind and content of the extensions that have nothing to do with the backing file.
fn other_extensions(bytes: &[u8]) -> BTreeSet<(u32, Vec<u8>)> {
    let storage = MemoryStorage::from_bytes(bytes);
    let header = Header::read_to_name(&storage).unwrap();
    let area = Area::read(&storage, header.geometry.cluster_size()).unwrap();
    let others = area
        .extensions
        .iter()
        .filter(|(_, kind, _)| ![UNUSED, extension::BACKING_FORMAT].contains(kind));
    others
        .map(|(place, kind, length)| {
            (*kind, area.bytes[*place as usize + 8..][..*length as usize].to_vec())
        })
        .collect()
}

fn blank(cluster_size: u64) -> CreateOptions {
    let mut options = CreateOptions::new(Format::Qcow2, 1 << 20);
    options.cluster_size = cluster_size;
    options
}

/// The name of a base in the tests' directory, in this many bytes.
fn name(base: &str, length: usize) -> String {
    let mut name = "./".repeat((length - base.len()) / 2);
    name.push_str(base);
    name
}

#[test]
fn a_crash_leaves_the_old_or_the_new_backing_file() {
    for cluster_size in [512, 1024, 4096, 65536] {
        for version in [Qcow2Version::V2, Qcow2Version::V3] {
            let mut options = blank(cluster_size);
            options.version = version;
            let mut trial = Trial::new(options);
            if version == Qcow2Version::V3 {
                trial.set_unknown_autoclear();
            }
            trial.change(Some(("base.raw", Format::Raw)), false);
            trial.change(Some(("base.qcow2", Format::Qcow2)), false);
            trial.change(Some((&name("base.qcow2", 90), Format::Qcow2)), false);
            trial.change(Some(("base.raw", Format::Raw)), false);
            trial.change(None, false);
            trial.change(Some(("base.qcow2", Format::Qcow2)), false);
        }
    }
}

#[test]
fn a_crash_leaves_the_old_or_the_new_of_long_names() {
    let mut trial = Trial::new(blank(4096));
    for round in 0..3 {
        trial.change(Some((&name("base.raw", 1022 - round), Format::Raw)), false);
        trial.change(Some((&name("base.qcow2", 1022 - round), Format::Qcow2)), false);
    }
    trial.change(None, false);
}

#[test]
fn a_crash_leaves_no_wrong_format_where_the_format_is_not_in_the_first_sector() {
    for length in [376, 384, 392, 600] {
        let mut trial = Trial::new(blank(4096));
        trial.push_extension(length);
        trial.change(Some(("base.raw", Format::Raw)), false);
        trial.change(Some(("base.qcow2", Format::Qcow2)), true);
        trial.change(Some((&name("base.qcow2", 300), Format::Qcow2)), false);
        trial.change(Some(("base.raw", Format::Raw)), true);
        trial.change(None, false);
        trial.change(Some(("base.raw", Format::Raw)), false);
    }
}

#[test]
fn a_crash_leaves_the_old_or_the_new_backing_file_of_foreign_images() {
    // Without a format, as old programs leave it; and with a format's name that is longer than
    // ours.
    for format in [None, Some("host_device")] {
        for pushed in [0, 376, 600] {
            let mut trial = Trial::new(blank(65536));
            if pushed > 0 {
                trial.push_extension(pushed);
            }
            trial.change(Some(("base.raw", Format::Raw)), false);
            trial.edit(|file| {
                remove_extension(file, 65536, extension::BACKING_FORMAT).unwrap();
                if let Some(format) = format {
                    put_extension(file, 65536, extension::BACKING_FORMAT, format.as_bytes())
                        .unwrap();
                }
            });
            // The longer one lies in a later sector.
            trial.change(Some(("base.qcow2", Format::Qcow2)), format.is_some());
            trial.change(Some(("base.raw", Format::Raw)), false);
        }
    }
}

#[test]
fn two_names_that_do_not_fit_into_the_header_at_once_leave_a_marked_image() {
    for (cluster_size, lengths) in [(1024, [250, 390, 392, 400]), (2048, [800, 802, 900, 1000])] {
        let mut trial = Trial::new(blank(cluster_size));
        trial.change(Some((&name("base.qcow2", lengths[0]), Format::Qcow2)), false);
        let mut unfinished = 0;
        for length in &lengths[1..] {
            trial.set_unknown_autoclear();
            let name = name("base.qcow2", *length);
            unfinished += trial.change_with_gap(Some((&name, Format::Qcow2)));
        }
        assert!(unfinished > 0);
        // Another format, a short name, none.
        trial.change_with_gap(Some((&name("base.raw", lengths[1]), Format::Raw)));
        trial.change(Some(("base.qcow2", Format::Qcow2)), false);
        trial.change(None, false);
    }
}

#[test]
fn a_crash_in_version_2_leaves_the_old_or_the_new_backing_file_where_both_names_fit() {
    let mut options = blank(1024);
    options.version = Qcow2Version::V2;
    let mut trial = Trial::new(options);
    for length in [440, 442, 400] {
        trial.change(Some((&name("base.qcow2", length), Format::Qcow2)), false);
    }
}

#[test]
fn a_name_that_does_not_fit_into_the_header_changes_nothing() {
    for (version, length) in [(Qcow2Version::V2, 950), (Qcow2Version::V3, 900)] {
        let mut options = blank(1024);
        options.version = version;
        let mut trial = Trial::new(options);
        trial.change(Some((&name("base.qcow2", 300), Format::Qcow2)), false);
        let before = trial.bytes.clone();
        trial.edit(|file| {
            let name = name("base.qcow2", length);
            let changed = change_backing(file, Some((name.as_ref(), Format::Qcow2)), Use::Closed);
            let kind = changed.map_err(|error| error.kind());
            assert_eq!(kind, Err(ErrorKind::InvalidInput), "{version:?}");
        });
        assert!(trial.bytes == before);
    }
}

#[test]
fn a_crash_hurts_no_image_whose_extensions_end_at_the_name_without_a_mark() {
    // Where the mark has to be: in the first sector, or in a later one.
    let versions = [(Qcow2Version::V2, false), (Qcow2Version::V3, false), (Qcow2Version::V3, true)];
    for (version, is_beyond) in versions {
        for overlap in [0, 3] {
            let mut options = blank(4096);
            options.version = version;
            let next = [
                Some(("base.raw", Format::Raw)),
                Some((&*name("base.qcow2", 90), Format::Qcow2)),
                None,
            ];
            for to in next {
                let mut trial = Trial::new(options.clone());
                trial.push_extension(if is_beyond { 600 } else { 5 });
                trial.change(Some((&name("base.qcow2", 30), Format::Qcow2)), false);
                trial.push_extension(5);
                trial.take_mark_away(overlap);
                let unfinished = trial.change_with_gap(to);
                let is_marked = is_beyond && to.is_some();
                assert_eq!(unfinished > 0, is_marked, "{version:?}, {overlap}, {to:?}");
            }
        }
    }
}

#[test]
fn an_image_whose_disk_is_being_overwritten_gets_no_backing_file() {
    let mut trial = Trial::new(blank(4096));
    let bits = incompatible::INCOMPLETE.to_be_bytes();
    trial.bytes[field::INCOMPATIBLE as usize..][..8].copy_from_slice(&bits);
    let before = trial.bytes.clone();
    trial.edit(|file| {
        for bits in [incompatible::INCOMPLETE, !incompatible::KNOWN] {
            let area = Area::read(file, 4096).unwrap();
            area.write(field::INCOMPATIBLE, &bits.to_be_bytes()).unwrap();
            assert!(
                change_backing(file, Some((OsStr::new("base.raw"), Format::Raw)), Use::Closed)
                    .is_err()
            );
        }
        let area = Area::read(file, 4096).unwrap();
        area.write(field::INCOMPATIBLE, &bits).unwrap();
    });
    assert!(trial.bytes == before);
}
