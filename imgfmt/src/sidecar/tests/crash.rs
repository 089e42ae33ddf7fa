//! A crash at any instant, with any loss of unsynced writes: the recovered bits cover every byte of
//! the disk that has changed since the bitmaps were last clear.

use super::*;
use crate::storage::{Durability, Storage};
use crate::testing::{Loss, Recorder, RecordingStorage};
use crate::units::HostOffset;

const SIZE: u64 = 512 << 10;
const OPERATIONS: u32 = 150;
const GRANULARITIES: [u32; 3] = [9, 12, 16];

/// A store that records what becomes durable when. Words reach the recording as plain writes of the
/// page cache, which a crash may drop.
#[derive(Debug)]
struct RecordedStore {
    words: Vec<AtomicU64>,
    recorded: Arc<RecordingStorage>,
}

impl RecordedStore {
    fn new(bytes: &[u8], recorder: &Recorder) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        let words = words.iter().map(|word| AtomicU64::new(u64::from_le_bytes(*word).to_le()));
        Self { words: words.collect(), recorded: recorder.storage(bytes) }
    }

    /// Puts into the recording what was stored since.
    fn capture(&self) {
        let before = self.recorded.content();
        // The log is written past the words.
        let first = layout::DESCRIPTORS_OFFSET as usize / 8;
        let words = self.words.iter().zip(before.chunks_exact(8)).enumerate();
        for (index, (word, old)) in words.skip(first) {
            let bytes = u64::from_le(word.load(Relaxed)).to_le_bytes();
            if bytes != old {
                let offset = HostOffset::new(index as u64 * 8);
                self.recorded.write_at(offset, &bytes, Durability::Cached).unwrap();
            }
        }
    }
}

impl SidecarStorage for Arc<RecordedStore> {
    fn words(&self) -> &[AtomicU64] {
        &self.words
    }

    fn write_durable(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.capture();
        self.recorded.write_at(HostOffset::new(offset), bytes, Durability::Fua)
    }

    fn sync(&self) -> io::Result<()> {
        self.capture();
        self.recorded.sync()
    }

    fn remove(&self) -> io::Result<()> {
        panic!("nothing fails here")
    }
}

/// From one clearing of the bitmaps to the next.
struct Epoch {
    begins: usize,
    description: Description,
    store: Arc<RecordedStore>,
    sidecar: Arc<Sidecar>,
    /// The disk when the bitmaps were clear.
    reference: Vec<u8>,
}

struct Trial {
    recorder: Recorder,
    disk: Arc<RecordingStorage>,
    epochs: Vec<Epoch>,
    durability: BitmapDurability,
}

impl Trial {
    fn new(durability: BitmapDurability) -> Self {
        let recorder = Recorder::new();
        let disk = recorder.storage(&vec![0; SIZE as usize]);
        let mut trial = Self { recorder, disk, epochs: Vec::new(), durability };
        trial.clear();
        trial
    }

    /// Clears all bitmaps: the disk is flushed, and a new sidecar replaces the old one.
    fn clear(&mut self) {
        self.disk.sync().unwrap();
        let mut description = description(self.durability, SIZE, &GRANULARITIES);
        description.epoch = self.epochs.len() as u64 + 1;
        let bytes = store::new_bytes(&description);
        let store = Arc::new(RecordedStore::new(&bytes, &self.recorder));
        let boxed = Box::new(Arc::clone(&store));
        let sidecar = Sidecar::new(boxed, &description).unwrap();
        self.epochs.push(Epoch {
            begins: self.recorder.position(),
            description,
            store,
            sidecar,
            reference: self.disk.content(),
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let epoch = self.epochs.last().unwrap();
        let in_flight = epoch.sidecar.before_change(offset, data.len() as u64).unwrap();
        epoch.store.capture();
        self.disk.write_at(HostOffset::new(offset), data, Durability::Cached).unwrap();
        drop(in_flight);
    }

    /// Crashes and compares; returns how much is dirty and how much must be.
    fn crash(&self, position: usize, loss: Loss, below: &mut dyn FnMut(u64) -> u64) -> (u64, u64) {
        let epoch = self.epochs.iter().rfind(|epoch| epoch.begins <= position).unwrap();
        let disk = self.disk.after_crash(position, loss, below);
        let found = epoch.store.recorded.after_crash(position, loss, below);
        let boot = if loss == Loss::Nothing { BOOT } else { OTHER_BOOT };
        let recovery = match recovery(found, &epoch.description, boot) {
            Err(Rejection::PowerLoss) if self.durability == BitmapDurability::ProcessDeath => {
                return (0, 0);
            }
            other => other.unwrap(),
        };
        let (mut dirty_bytes, mut changed_bytes) = (0, 0);
        for bitmap in &epoch.description.bitmaps {
            let words = recovery.words(bitmap).unwrap().unwrap();
            for bit in 0..bitmap.bit_count {
                let start = (bit << bitmap.granularity_bits) as usize;
                let end = (start + (1 << bitmap.granularity_bits)).min(SIZE as usize);
                let is_dirty = words[(bit / 64) as usize] >> (bit % 64) & 1 == 1;
                let is_changed = disk[start..end] != epoch.reference[start..end];
                assert!(
                    is_dirty || !is_changed,
                    "bytes {start}..{end} have changed and are not dirty, {loss:?} lost after \
                     {position} changes"
                );
                dirty_bytes += if is_dirty { (end - start) as u64 } else { 0 };
                changed_bytes += if is_changed { (end - start) as u64 } else { 0 };
            }
        }
        (dirty_bytes, changed_bytes)
    }
}

fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed | 1;
    move |limit| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % limit
    }
}

fn crash_everywhere(durability: BitmapDurability, losses: &[Loss]) {
    let seed = now_nanoseconds();
    println!("{durability:?}: seed {seed}");
    let mut below = random(seed);
    let mut trial = Trial::new(durability);
    for operation in 0..OPERATIONS {
        match below(40) {
            0 => trial.clear(),
            1..=3 => trial.disk.sync().unwrap(),
            4 => trial.write(below(SIZE / 2), &vec![operation as u8 | 1; (SIZE / 2) as usize]),
            5..=9 => {
                let start = below(SIZE - 60_000);
                trial.write(start, &vec![operation as u8 | 1; 1 + below(60_000) as usize]);
            }
            _ => {
                let start = below(SIZE - 4000);
                trial.write(start, &vec![operation as u8 | 1; 1 + below(4000) as usize]);
            }
        }
    }
    let (mut dirty, mut changed) = (0, 0);
    for position in trial.epochs[0].begins..=trial.recorder.position() {
        for loss in losses {
            let (more_dirty, more_changed) = trial.crash(position, *loss, &mut below);
            dirty += more_dirty;
            changed += more_changed;
        }
    }
    println!(
        "{durability:?}, {losses:?}: {} crashes, dirty after recovery / really changed: {:.2}",
        (trial.recorder.position() - trial.epochs[0].begins) * losses.len(),
        dirty as f64 / changed.max(1) as f64
    );
}

#[test]
fn after_the_death_of_the_process_no_bit_is_missing() {
    crash_everywhere(BitmapDurability::ProcessDeath, &[Loss::Nothing]);
}

#[test]
fn after_a_loss_of_power_process_death_level_is_not_believed() {
    crash_everywhere(BitmapDurability::ProcessDeath, &[Loss::Everything]);
}

#[test]
fn after_a_loss_of_power_no_bit_is_missing() {
    crash_everywhere(BitmapDurability::PowerLoss, &Loss::ALL);
}

#[test]
fn a_write_that_was_not_announced_would_be_noticed() {
    let trial = Trial::new(BitmapDurability::PowerLoss);
    trial.disk.write_at(HostOffset::new(5000), b"secret", Durability::Fua).unwrap();
    let noticed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        trial.crash(trial.recorder.position(), Loss::Everything, &mut |_| 0)
    }));
    assert!(noticed.is_err());
}
