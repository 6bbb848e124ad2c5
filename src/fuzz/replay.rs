//! Runs the fuzz targets with every sample of the corpora, and with a few thousand seeded mutations of them.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use super::{TARGETS, Target};

/// Enough to find shallow bugs; `make fuzz` finds the others.
const MUTATIONS: usize = 2_000;
/// Fixed, so that failures are reproducible.
const SEED: u64 = 7;

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

fn run((name, check): Target, sample: &[u8]) {
    let outcome = catch_unwind(AssertUnwindSafe(|| check(sample)));
    assert!(outcome.is_ok(), "{name}: add this sample to fuzz/corpus/{name}: {:?}", String::from_utf8_lossy(sample));
}

/// Applies one to four mutations that parsers are prone to mishandle.
fn mutate(samples: &[Vec<u8>], random: &mut fastrand::Rng) -> Vec<u8> {
    const WORDS: [&[u8]; 10] = [b"\0", b"\r\n", b"%2f", b"..", b"//", b"\"", b":", b"=", b"\xff\xff\xff\xff", b"{}"];
    let mut sample = random.choice(samples).unwrap().clone();
    for _ in 0..random.usize(1..=4) {
        let (from, to) = (random.usize(0..=sample.len()), random.usize(0..=sample.len()));
        let range = from.min(to)..from.max(to);
        match random.u8(0..6) {
            0 if from < sample.len() => sample[from] ^= 1 << random.u8(0..8),
            1 => drop(sample.drain(range)),
            2 => sample.extend_from_within(range),
            3 => drop(sample.splice(from..from, random.choice(WORDS).unwrap().iter().copied())),
            4 => {
                let other = random.choice(samples).unwrap();
                sample.truncate(from);
                sample.extend(&other[random.usize(0..=other.len())..]);
            }
            _ => sample.iter_mut().skip(range.start).take(range.len()).for_each(|byte| *byte = random.u8(..)),
        }
    }
    sample
}

#[test]
fn corpora_and_mutations_keep_invariants() {
    for target in TARGETS {
        let samples = corpus(target.0);
        assert!(samples.len() >= 4, "{}: {} samples", target.0, samples.len());
        samples.iter().for_each(|sample| run(target, sample));
        let mut random = fastrand::Rng::with_seed(SEED);
        for _ in 0..MUTATIONS {
            run(target, &mutate(&samples, &mut random));
        }
    }
}

/// `make fuzz` and this replay run the same targets.
#[test]
fn every_target_has_a_libfuzzer_binary() {
    let manifest = include_str!("../../fuzz/Cargo.toml");
    for (name, _) in TARGETS {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fuzz/fuzz_targets/{name}.rs"));
        assert!(fs::read_to_string(file).unwrap().contains(&format!("kirsa::fuzz::{name}::check(data)")), "{name}");
    }
    assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
}
