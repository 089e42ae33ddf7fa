//! A crash while an encrypted image is created: what is left is refused, or opens and shows nothing
//! of what was there before.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::image::on_device::lay_out;
use crate::passphrase::Passphrase;
use crate::storage::Storage;
use crate::testing::{Loss, Recorder, RecordingStorage};
use crate::unfinished::Unfinished;
use crate::units::HostOffset;

const SIZE: u64 = 64 << 10;
/// What was there before.
const PLAIN: &[u8; 16] = b"someone's plain ";

fn options(format: Format) -> CreateOptions {
    let mut options = CreateOptions::new(format, SIZE);
    let key = NewKey::new(Passphrase::new(b"secret".to_vec()));
    options.encryption = Some(key.iteration_time(Duration::ZERO));
    options
}

/// Numbers without a pattern, the same ones in every run.
fn below() -> impl FnMut(u64) -> u64 {
    let mut state = 1_u64;
    move |bound| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % bound
    }
}

/// Opens what each crash leaves; returns whether the image was opened after all changes.
fn judge(recorder: &Recorder, storage: &RecordingStorage, options: &CreateOptions) -> bool {
    let key = options.encryption.clone().unwrap().passphrase;
    let open = OpenOptions::new().format(options.format).passphrase(key);
    let (mut below, mut opens) = (below(), false);
    for position in 0..=recorder.position() {
        for loss in [Loss::ALL, Loss::ALL].concat() {
            let left = storage.after_crash(position, loss, &mut below);
            let what = format!("{}, after {position} changes, {loss:?}", options.format);
            let memory = Arc::new(crate::storage::MemoryStorage::from_bytes(&left));
            let opened = Image::from_storage(memory as Arc<dyn Storage>, &open);
            opens = opened.is_ok();
            let Ok(image) = opened else { continue };
            let mut content = vec![1; SIZE as usize];
            image.read_at(GuestOffset::new(0), &mut content).unwrap();
            assert!(!content.windows(16).any(|window| window == PLAIN), "{what}: old content");
            let is_zero = content.iter().all(|byte| *byte == 0);
            assert!(is_zero || options.format == Format::Luks, "{what}: not zero");
        }
    }
    opens
}

#[test]
fn a_crash_while_an_encrypted_file_is_created_leaves_no_readable_disk() {
    for format in [Format::Qcow2, Format::Luks] {
        let options = options(format);
        let (size, content) = plan(Path::new("new"), &options).unwrap();
        let recorder = Recorder::new();
        let storage = recorder.storage(&[]);
        for step in steps(&options, size, &content, true) {
            match step {
                Step::SetLength(length) => storage.set_len(length),
                Step::Write(offset, bytes) => {
                    storage.write_at(HostOffset::new(offset), bytes, Durability::Cached)
                }
                Step::Sync => storage.sync(),
            }
            .unwrap();
        }
        storage.sync().unwrap();
        assert!(judge(&recorder, &storage, &options), "{format} is complete");
    }
}

/// The file is synced before the sector that makes it an image: a header whose keys are lost would
/// be a disk that nobody can open.
#[test]
fn a_header_is_in_a_new_file_only_with_all_its_keys() {
    for format in [Format::Qcow2, Format::Luks] {
        let options = options(format);
        let (size, content) = plan(Path::new("new"), &options).unwrap();
        let steps = steps(&options, size, &content, true);
        let [.., Step::Sync, Step::Write(0, last)] = &steps[..] else { panic!("{format}") };
        assert_eq!(last.len() as u64, SECTOR);
        let first = |step: &Step<'_>| matches!(step, Step::Write(offset, _) if *offset < SECTOR);
        assert_eq!(steps.iter().filter(|step| first(step)).count(), 1, "{format}");
    }
}

#[test]
fn a_crash_while_an_encrypted_device_is_created_shows_nothing_of_what_was_there() {
    for format in [Format::Qcow2, Format::Luks] {
        let options = options(format);
        let (size, content) = plan(Path::new("new"), &options).unwrap();
        let old = PLAIN.repeat((4 << 20) / PLAIN.len());
        let recorder = Recorder::new();
        let storage = recorder.storage(&old);
        let device = Unfinished::new(Arc::clone(&storage) as Arc<dyn Storage>).unwrap();
        lay_out(&device, &options, size, &content).unwrap();
        device.complete().unwrap();
        assert!(judge(&recorder, &storage, &options), "{format} is complete");
    }
}
