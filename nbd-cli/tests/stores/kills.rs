//! Every command that writes is killed, or loses its connection for good, at one request after the
//! other; then it runs again.

use crate::support::{Fate, Random, World, cases, is_thorough, points, seed, some};

const FATES: [Fate; 4] = [Fate::KilledBefore, Fate::KilledAfter, Fate::LostBefore, Fate::LostAfter];

fn interrupted(only: &[&str], is_encrypted: bool) {
    let world = World::new(is_encrypted);
    let mut random = Random::new(seed());
    let mut judged = 0;
    for case in cases(&world).iter().filter(|case| only.contains(&case.name)) {
        let count = world.scene(&case.contents).count(&case.arguments);
        for point in points(count, &mut random) {
            for fate in some(&FATES, 2, &mut random) {
                let context = format!("{}, request {point} of {count}, {fate:?}", case.name);
                let scene = world.scene(&case.contents);
                let (outcome, is_reached) = scene.run_until(&case.arguments, point, fate);
                if std::env::var_os("NBD_STORE_SHOW").is_some() {
                    println!("{context}: {is_reached} {outcome:?}");
                }
                match fate {
                    Fate::KilledBefore | Fate::KilledAfter => {
                        assert!(outcome.code.is_none() || !is_reached, "{context}: {outcome:?}");
                    }
                    _ => outcome.assert_is_clear(&context),
                }
                (case.after)(&scene, &outcome, &context);
                let again = scene.run(&case.arguments);
                again.assert_is_clear(&context);
                (case.again)(&scene, &again, &context);
                judged += 1;
            }
        }
    }
    println!("judged: {judged}");
}

#[test]
fn interrupted_push_and_init_are_completed_by_another_one() {
    interrupted(&["image push", "repo init"], is_thorough());
}

#[test]
fn interrupted_backup_loses_nothing_and_is_no_lie() {
    interrupted(
        &["backup, full", "backup, incremental"],
        is_thorough() && seed().is_multiple_of(2),
    );
}

#[test]
fn interrupted_forget_prune_and_gc_lose_no_backup() {
    interrupted(&["repo forget", "repo prune", "repo gc"], false);
}

#[test]
fn interrupted_change_of_passphrases_locks_nobody_out() {
    interrupted(&["repo key add", "repo key remove"], true);
}

#[test]
fn interrupted_restore_is_completed_by_another_one() {
    interrupted(&["restore"], is_thorough() && seed().is_multiple_of(2));
}
