//! Replays the corpus of the fuzz targets, and bytes derived from it, through the same code.

#[path = "../fuzz/src/bodies.rs"]
#[allow(clippy::expect_used)]
mod bodies;
mod common;

use std::path::{Path, PathBuf};

use common::link::Numbers;

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

fn inputs(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let mut inputs: Vec<_> = std::fs::read_dir(corpus(target))
        .unwrap_or_else(|error| panic!("{}: {error}", corpus(target).display()))
        .map(|entry| entry.expect("a readable directory").path())
        .map(|path| (path.clone(), std::fs::read(path).expect("a readable file")))
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

/// Changed and cut seeds, with a printed seed; `NBD_PROTO_FUZZ_ROUNDS` sets how many of each.
#[test]
fn inputs_near_the_corpus_are_survived() {
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |now| now.as_nanos() as u64 | 1);
    println!("seed {seed}");
    let rounds = std::env::var("NBD_PROTO_FUZZ_ROUNDS").ok().and_then(|text| text.parse().ok());
    let rounds: u32 = rounds.unwrap_or(200);
    let mut numbers = Numbers(seed);
    for (target, body) in bodies::TARGETS {
        let seeds = recipe::seeds();
        for (_, name, original) in seeds.iter().filter(|(of, ..)| *of == target) {
            for _ in 0..rounds {
                let mut bytes = original.clone();
                mutate(&mut bytes, &mut numbers);
                let result = std::panic::catch_unwind(|| body(&bytes));
                assert!(result.is_ok(), "{target}, near {name}: {bytes:02x?}");
            }
        }
    }
}

fn mutate(bytes: &mut Vec<u8>, numbers: &mut Numbers) {
    const INTERESTING: [u8; 6] = [0, 1, 0x7f, 0x80, 0xfe, 0xff];
    for _ in 0..=numbers.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = numbers.below(bytes.len() as u64) as usize;
        match numbers.below(6) {
            0 => bytes[at] ^= 1 << numbers.below(8),
            1 => bytes[at] = INTERESTING[numbers.below(6) as usize],
            2 => bytes[at] = numbers.next() as u8,
            3 => bytes.truncate(at),
            4 => bytes.insert(at, numbers.next() as u8),
            _ => {
                let end = (at + 1 + numbers.below(16) as usize).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                bytes.extend(copy);
            }
        }
    }
}

/// Writes the corpus anew from whole sessions and hand-made messages. Run it by hand after a change
/// of the targets: `NBD_PROTO_WRITE_CORPUS=1 cargo test -p nbd-proto --test fuzz_corpus`.
#[test]
fn the_corpus_is_what_its_recipe_makes() {
    let is_writing = std::env::var_os("NBD_PROTO_WRITE_CORPUS").is_some();
    for (target, name, bytes) in recipe::seeds() {
        let path = corpus(target).join(name);
        if is_writing {
            std::fs::create_dir_all(corpus(target)).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        let found = std::fs::read(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let path = path.display();
        assert!(found == bytes, "{path} is out of date: set NBD_PROTO_WRITE_CORPUS=1 once");
    }
}

#[path = "fuzz_corpus/recipe.rs"]
mod recipe;
