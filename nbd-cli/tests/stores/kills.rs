//! Every command that writes is killed, or loses its connection for good, at one request after the
//! other; then it runs again.

use crate::support::{Fate, is_thorough, judge, seed};

const FATES: [Fate; 4] = [Fate::KilledBefore, Fate::KilledAfter, Fate::LostBefore, Fate::LostAfter];

fn interrupted(only: &[&str], is_encrypted: bool) {
    judge(only, is_encrypted, false, |_| FATES.to_vec());
}

#[test]
fn interrupted_push_and_init_are_completed_by_another_one() {
    interrupted(&["image push", "repo init"], is_thorough());
}

#[test]
fn interrupted_backup_loses_nothing_and_is_no_lie() {
    interrupted(
        &["backup, full", "backup, incremental", "backup, several"],
        is_thorough() && seed().is_multiple_of(2),
    );
}

#[test]
fn interrupted_backup_by_a_bitmap_keeps_what_the_bitmap_knows() {
    interrupted(&["backup, by bitmap", "backup, several by bitmaps"], false);
}

#[test]
fn interrupted_forget_prune_and_gc_lose_no_backup() {
    interrupted(&["repo forget", "repo prune", "repo gc"], false);
}

#[test]
fn interrupted_compaction_is_completed_by_another_one_and_costs_no_backup() {
    let is_encrypted = is_thorough() && seed().is_multiple_of(2);
    // In each round of soak at every request.
    judge(&["repo compact"], is_encrypted, is_thorough(), |_| FATES.to_vec());
    interrupted(&["repo gc, compacted"], is_encrypted);
}

#[test]
fn interrupted_change_of_passphrases_keeps_one_that_opens() {
    interrupted(&["repo key add", "repo key remove"], true);
}

#[test]
fn interrupted_restore_is_completed_by_another_one() {
    interrupted(&["restore", "restore, several"], is_thorough() && seed().is_multiple_of(2));
}

#[test]
fn interrupted_export_is_completed_by_another_one() {
    interrupted(&["repo export"], is_thorough() && seed().is_multiple_of(2));
}

#[test]
fn interrupted_import_is_completed_by_another_one() {
    interrupted(&["repo import"], is_thorough() && seed().is_multiple_of(2));
}
