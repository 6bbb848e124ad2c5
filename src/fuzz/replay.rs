//! Every sample of the corpora, and a few thousand seeded changes of them, through the entries that are fuzzed.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use super::{TARGETS, Target};

/// Enough to break what is easily broken; what is not is found by `make fuzz`.
const CHANGES: usize = 2_000;
/// The same on every run, so that a failure can be repeated.
const SEED: u64 = 7;

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

fn run((name, check): Target, sample: &[u8]) {
    let outcome = catch_unwind(AssertUnwindSafe(|| check(sample)));
    assert!(outcome.is_ok(), "{name}: put this into fuzz/corpus/{name}: {:?}", String::from_utf8_lossy(sample));
}

/// One to four of the changes that parsers stumble over.
fn changed(samples: &[Vec<u8>], random: &mut fastrand::Rng) -> Vec<u8> {
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
fn every_corpus_and_thousands_of_changes_of_it_keep_what_must_hold() {
    for target in TARGETS {
        let samples = corpus(target.0);
        assert!(samples.len() >= 4, "{}: {} samples", target.0, samples.len());
        samples.iter().for_each(|sample| run(target, sample));
        let mut random = fastrand::Rng::with_seed(SEED);
        for _ in 0..CHANGES {
            run(target, &changed(&samples, &mut random));
        }
    }
}

/// What `make fuzz` builds is what is replayed here.
#[test]
fn every_entry_has_a_target_of_libfuzzers() {
    let manifest = include_str!("../../fuzz/Cargo.toml");
    for (name, _) in TARGETS {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fuzz/fuzz_targets/{name}.rs"));
        assert!(fs::read_to_string(file).unwrap().contains(&format!("kirsa::fuzz::{name}::check(data)")), "{name}");
    }
    assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
}
