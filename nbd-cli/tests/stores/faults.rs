//! Every command that writes meets, at one request after the other, a store that loses replies, is
//! busy, talks nonsense, cuts replies short or hangs. Each ends rightly or says in one sentence
//! what is wrong, and goes on when it is called again.

use nbd_objects::testing::Fault;

use crate::support::{Fate, is_thorough, judge, seed};

const FAULTS: [Fault; 7] = [
    Fault::ReplyLost,
    Fault::Status(503),
    Fault::Status(409),
    Fault::Nonsense,
    Fault::Cut(10),
    Fault::Stall(10),
    Fault::Hang,
];

fn met(only: &[&str], is_encrypted: bool) {
    judge(only, is_encrypted, false, |random| {
        let always = FAULTS[random.below(FAULTS.len())];
        [&FAULTS.map(Fate::Once)[..], &[Fate::Always(always)]].concat()
    });
}

#[test]
fn push_and_init_bear_faults_of_the_store() {
    met(&["image push", "repo init"], is_thorough());
}

#[test]
fn backups_bear_faults_of_the_store() {
    met(
        &["backup, full", "backup, incremental", "backup, several"],
        is_thorough() && seed().is_multiple_of(2),
    );
}

#[test]
fn backups_by_a_bitmap_bear_faults_of_the_store() {
    met(&["backup, by bitmap", "backup, several by bitmaps"], false);
}

#[test]
fn forget_prune_and_gc_bear_faults_of_the_store() {
    met(&["repo forget", "repo prune", "repo gc"], false);
}

#[test]
fn compaction_bears_faults_of_the_store() {
    met(&["repo compact", "repo gc, compacted"], is_thorough() && seed().is_multiple_of(2));
}

#[test]
fn changes_of_passphrases_bear_faults_of_the_store() {
    met(&["repo key add", "repo key remove"], true);
}

#[test]
fn restore_bears_faults_of_the_store() {
    met(&["restore", "restore, several"], is_thorough() && seed().is_multiple_of(2));
}

#[test]
fn export_bears_faults_of_the_store() {
    met(&["repo export"], is_thorough() && seed().is_multiple_of(2));
}

#[test]
fn import_bears_faults_of_the_store() {
    met(&["repo import"], is_thorough() && seed().is_multiple_of(2));
}
