//! Damaged images beside qemu-img: what is said about them, and what can be read before and after a
//! repair.
//!
//! The images are the same in every run, so that a difference that nobody has seen yet stops no
//! change that has nothing to do with it; `cargo xtask soak` looks for others. Environment
//! variables:
//!
//! - `IMGFMT_SEED`: where random numbers begin
//! - `IMGFMT_ROUNDS`: how many images are damaged (25), or
//! - `IMGFMT_MINUTES`: for how long
//! - `IMGFMT_KEEP`: a directory for images about which something is wrong, each with its list of
//!   words
//!
//! The last line says how many images there were and about how many of them something was wrong.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::{Random, qemu};
use crate::damage::verdict::{Verdict, differences};
use crate::damage::{self, Base, KINDS};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Keeps an image, and in words how it came about.
fn keep(bytes: &[u8], base: &Base, patches: &[damage::Patch], seed: u64, wrong: &[String]) {
    let Some(directory) = std::env::var_os("IMGFMT_KEEP") else { return };
    let directory = Path::new(&directory);
    std::fs::create_dir_all(directory).unwrap();
    let words = patches.iter().map(|patch| format!("{:#x} {:#x}\n", patch.place, patch.word));
    let text =
        format!("{}\nseed {seed}\n{}{}\n", base.name, words.collect::<String>(), wrong.join("\n"));
    std::fs::write(directory.join(format!("{seed}.txt")), text).unwrap();
    std::fs::write(directory.join(format!("{seed}.qcow2")), bytes).unwrap();
}

#[test]
fn what_is_said_of_damaged_images_and_what_is_left_of_them_is_as_with_qemu() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::seeded(number("IMGFMT_SEED").unwrap_or(1));
    let mut bases: Vec<Option<Base>> = KINDS.iter().map(|_| None).collect();
    let start = Instant::now();
    let minutes = number("IMGFMT_MINUTES");
    let rounds = number("IMGFMT_ROUNDS").unwrap_or(25);
    let (mut images, mut different) = (0, 0);
    let mut verdicts = [0; 4];
    let mut reports = Vec::new();
    loop {
        let is_over = match minutes {
            Some(minutes) => start.elapsed() > Duration::from_secs(minutes * 60),
            None => images >= rounds,
        };
        if is_over {
            break;
        }
        // Each round can be repeated by its own seed.
        let seed = if images == 0 { number("IMGFMT_SEED") } else { None };
        let seed = seed.unwrap_or_else(|| random.next()) | 1;
        let mut random = Random::seeded(seed);
        let kind = random.below(KINDS.len() as u64) as usize;
        let base = bases[kind].get_or_insert_with(|| Base::make(directory.path(), kind));
        let patches = base.damage(&mut random);
        let bytes = base.patched(&patches);
        images += 1;
        let (verdict, wrong) = differences(directory.path(), base, &bytes);
        verdicts[match verdict {
            Verdict::Clean => 0,
            Verdict::Leaks => 1,
            Verdict::Corruptions => 2,
            Verdict::Impossible => 3,
        }] += 1;
        if !wrong.is_empty() {
            different += 1;
            let words: Vec<_> = patches.iter().map(|patch| base.describe(patch)).collect();
            let report = format!(
                "IMGFMT_SEED={seed} ({}, {}): {}",
                base.name,
                words.join(", "),
                wrong.join("; ")
            );
            println!("{report}");
            keep(&bytes, base, &patches, seed, &wrong);
            reports.push(report);
        }
    }
    let [clean, leaks, corruptions, impossible] = verdicts;
    println!("clean {clean}, leaks {leaks}, corruptions {corruptions}, not checked {impossible}");
    println!("images {images}, differences {different}");
    println!("judged: {images}");
    assert!(reports.is_empty(), "{}", reports.join("\n"));
}
