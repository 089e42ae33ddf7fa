//! The order in which a stream copies: what readers ask for first.

use std::sync::{Arc, Mutex};

use imgfmt::jobs::{JobContext, Observer, Progress, stream_in_place};
use imgfmt::{CreateOptions, Format, GuestRange, Image};

use crate::common::at;
use crate::judge::streams::read;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 40 * MIB + 512;

/// Reads at some places of the disk after a number of parts.
struct Reader {
    image: Arc<Image>,
    reads: Vec<(usize, u64)>,
    parts: Mutex<Vec<u64>>,
    done: Mutex<Progress>,
}

impl Observer for Reader {
    fn progress(&self, progress: &Progress) {
        let mut done = self.done.lock().unwrap();
        assert!(progress.done >= done.done && progress.done <= progress.total);
        *done = *progress;
    }

    fn copied(&self, range: GuestRange) {
        let mut parts = self.parts.lock().unwrap();
        parts.push(range.offset().bytes() / MIB);
        for (_, place) in self.reads.iter().filter(|(count, _)| *count == parts.len()) {
            self.image.read_at(at(*place), &mut [0; 512]).unwrap();
        }
    }
}

/// The order of the parts, in MiB, of a disk that is read like this.
fn order(reads: Vec<(usize, u64)>, top_size: u64) -> Vec<u64> {
    let directory = tempfile::tempdir().unwrap();
    let [base, top] = ["base.raw", "top.qcow2"].map(|name| directory.path().join(name));
    let content: Vec<u8> = (0..SIZE).map(|at| (at >> 9) as u8 | 1).collect();
    std::fs::write(&base, &content).unwrap();
    let mut options = CreateOptions::overlay("base.raw", Format::Raw);
    options.size = Some(top_size);
    let image = Arc::new(Image::create(&top, &options).unwrap());
    let reader = Arc::new(Reader {
        image: Arc::clone(&image),
        reads,
        parts: Mutex::default(),
        done: Mutex::default(),
    });
    let context = JobContext { observer: reader.clone(), ..JobContext::default() };
    let streamed = stream_in_place(&image, None, &context).unwrap();
    assert_eq!(streamed.data, SIZE.next_multiple_of(64 << 10).min(top_size));
    let done = *reader.done.lock().unwrap();
    assert_eq!((done.done, done.total), (top_size, top_size));
    std::fs::remove_file(&base).unwrap();
    let mut expected = content;
    expected.resize(top_size as usize, 0);
    assert!(read(&image) == expected);
    std::mem::take(&mut *reader.parts.lock().unwrap())
}

#[test]
fn what_a_reader_asks_for_comes_next_and_then_what_follows_it() {
    let everything = order(Vec::new(), SIZE);
    assert_eq!(everything, (0..=40).collect::<Vec<_>>());
    let found = order(vec![(3, 20 * MIB + 5000)], SIZE);
    let expected: Vec<_> = (0..3).chain(20..29).chain(3..20).chain(29..=40).collect();
    assert_eq!(found, expected);
    // Of what is copied already, nothing comes again; and the disk has an end.
    let reads = vec![(3, 0), (4, 2 * MIB), (5, SIZE - 512), (6, 30 * MIB), (7, 35 * MIB)];
    let found = order(reads, SIZE);
    let expected: Vec<_> =
        (0..5).chain([40, 30]).chain(35..40).chain(31..35).chain(5..30).collect();
    assert_eq!(found, expected);
}

#[test]
fn a_reader_beyond_the_end_of_the_layer_below_disturbs_nothing() {
    let found = order(vec![(2, 44 * MIB), (5, 20 * MIB)], 45 * MIB);
    let first = [0, 1, 44, 2, 3].into_iter();
    // The last one is zero, up to the end of the disk.
    let expected: Vec<_> = first.chain(20..29).chain(4..20).chain(29..=40).chain([40]).collect();
    assert_eq!(found, expected);
}
