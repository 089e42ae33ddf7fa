//! Replays the corpus of the fuzz targets, and bytes derived from it, through the same code.

use std::path::{Path, PathBuf};

use crate::bodies;
use crate::common::Random;

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

fn inputs(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let mut inputs: Vec<_> = std::fs::read_dir(corpus(target))
        .unwrap_or_else(|error| panic!("{}: {error}", corpus(target).display()))
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    inputs.sort();
    inputs
}

#[test]
fn the_corpus_of_every_target_is_survived() {
    for (target, body) in bodies::TARGETS {
        let inputs = inputs(target);
        assert!(!inputs.is_empty(), "{target} has no corpus");
        for (path, bytes) in inputs {
            println!("{}", path.display());
            body(&bytes);
        }
    }
}

/// Changed and cut seeds, with a printed seed; `IMGFMT_FUZZ_ROUNDS` sets how many of each, and
/// `IMGFMT_FUZZ_TARGET` chooses one target.
#[test]
fn inputs_near_the_corpus_are_survived() {
    let mut random = Random::new("fuzz");
    let rounds = std::env::var("IMGFMT_FUZZ_ROUNDS").ok().and_then(|text| text.parse().ok());
    let rounds: u32 = rounds.unwrap_or(30);
    let chosen = std::env::var("IMGFMT_FUZZ_TARGET").ok();
    let is_chosen = |target: &str| chosen.as_deref().is_none_or(|chosen| chosen == target);
    for (target, body) in bodies::TARGETS.into_iter().filter(|(target, _)| is_chosen(target)) {
        let seeds = recipe::seeds();
        let count = seeds.iter().filter(|(of, ..)| *of == target).count();
        println!("judged: {}", count as u64 * u64::from(rounds));
        for (_, name, original) in seeds.iter().filter(|(of, ..)| *of == target) {
            for _ in 0..rounds {
                let mut bytes = original.clone();
                mutate(&mut bytes, &mut random);
                let result = std::panic::catch_unwind(|| body(&bytes));
                assert!(result.is_ok(), "{target}, near {name}: {bytes:02x?}");
            }
        }
    }
}

fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    const INTERESTING: [u8; 6] = [0, 1, 0x7f, 0x80, 0xfe, 0xff];
    for _ in 0..=random.below(4) {
        if bytes.is_empty() {
            return;
        }
        // The fields are at the start, most of the rest is zero.
        let bound = if random.below(2) == 0 { bytes.len() } else { bytes.len().min(128) };
        let at = random.below(bound as u64) as usize;
        match random.below(8) {
            0..=2 => bytes[at] ^= 1 << random.below(8),
            3 => bytes[at] = INTERESTING[random.below(6) as usize],
            4 => bytes[at] = random.next() as u8,
            5 if random.below(4) == 0 => bytes.truncate(at),
            6 => bytes.insert(at, random.next() as u8),
            _ => {
                let end = (at + 1 + random.below(16) as usize).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                bytes.extend(copy);
            }
        }
    }
}

/// Writes the corpus anew. Run it by hand after a change of the targets:
/// `IMGFMT_WRITE_CORPUS=1 cargo test -p imgfmt --test it fuzz_corpus`.
#[test]
fn the_corpus_is_what_its_recipe_makes() {
    let is_writing = std::env::var_os("IMGFMT_WRITE_CORPUS").is_some();
    for (target, name, bytes) in recipe::seeds() {
        let path = corpus(target).join(name);
        if is_writing {
            std::fs::create_dir_all(corpus(target)).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        let found = std::fs::read(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let path = path.display();
        assert!(found == bytes, "{path} is out of date: set IMGFMT_WRITE_CORPUS=1 once");
    }
}

mod recipe;
