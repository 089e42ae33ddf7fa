//! A process under load is killed again and again: whatever differs from the last backup is dirty.
//!
//! `IMGFMT_KILL_ROUNDS` sets how often.

use std::time::Duration;

use imgfmt::BitmapChange;

use crate::common::{Random, qemu};
use crate::survival::{self, begun, compare, content, make, open, start};

fn rounds() -> u64 {
    let rounds = std::env::var("IMGFMT_KILL_ROUNDS").ok().and_then(|text| text.parse().ok());
    rounds.unwrap_or(60)
}

fn kill_again_and_again(level: &str) {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = make(directory.path());
    let mut random = Random::new(level);
    let mut reference = vec![0; survival::SIZE as usize];
    let (mut dirty, mut changed, mut with_bits) = (0, 0, 0);
    for round in 0..rounds() {
        let _ = std::fs::remove_file(begun(&path));
        let mut process = start(&path, &format!("load {level}"));
        let started = std::time::Instant::now();
        // Most are killed while they write, some while they begin.
        let waits = random.below(6) > 0;
        while waits && !begun(&path).exists() {
            assert!(started.elapsed() < Duration::from_secs(60), "the load does not begin");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(random.below(40_000)));
        process.kill().unwrap();
        process.wait().unwrap();
        let what = format!("{level}, round {round}");
        let image = open(&path);
        with_bits += u32::from(!image.bitmap_durability().recovered.is_empty());
        let (more_dirty, more_changed) = compare(&image, &reference, &what);
        dirty += more_dirty;
        changed += more_changed;
        if random.below(3) == 0 {
            // A backup.
            reference = content(&image);
            let names = ["fine", "coarse"].map(str::to_owned);
            image.bitmap_transaction(&names.map(|name| BitmapChange::Clear { name })).unwrap();
        }
        image.close().unwrap();
        if round % 20 == 0 {
            qemu::check_but_for_leaks(&path, &what);
        }
    }
    println!(
        "{level}: {} kills, bits recovered from {with_bits}; dirty / really changed: {:.3}",
        rounds(),
        dirty as f64 / changed.max(1) as f64
    );
    assert!(u64::from(with_bits) * 2 > rounds(), "hardly anything was recovered");
}

#[test]
fn at_the_level_of_process_death() {
    kill_again_and_again("process");
}

#[test]
fn at_the_level_of_power_loss() {
    kill_again_and_again("power");
}
