//! Every command that writes meets, at one request after the other, a store that loses replies, is
//! busy, talks nonsense, cuts replies short or hangs. Each ends rightly or says in one sentence what
//! is wrong, and goes on when it is called again.

use nbd_objects::testing::Fault;

use crate::support::{Fate, Random, World, cases, is_thorough, points, seed, some};

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
    let world = World::new(is_encrypted);
    let mut random = Random::new(seed());
    let mut judged = 0;
    for case in cases(&world).iter().filter(|case| only.contains(&case.name)) {
        let count = world.scene(&case.contents).count(&case.arguments);
        for point in points(count, &mut random) {
            let always = FAULTS[random.below(FAULTS.len())];
            let once = FAULTS.map(Fate::Once);
            let all = [&once[..], &[Fate::Always(always)]].concat();
            for fate in some(&all, 2, &mut random) {
                let context = format!("{}, request {point} of {count}, {fate:?}", case.name);
                let scene = world.scene(&case.contents);
                let (outcome, _) = scene.run_until(&case.arguments, point, fate);
                if std::env::var_os("NBD_STORE_SHOW").is_some() {
                    println!("{context}: {outcome:?}");
                }
                outcome.assert_is_clear(&context);
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
fn push_and_init_bear_faults_of_the_store() {
    met(&["image push", "repo init"], is_thorough());
}

#[test]
fn backups_bear_faults_of_the_store() {
    met(&["backup, full", "backup, incremental"], is_thorough() && seed().is_multiple_of(2));
}

#[test]
fn forget_prune_and_gc_bear_faults_of_the_store() {
    met(&["repo forget", "repo prune", "repo gc"], false);
}

#[test]
fn changes_of_passphrases_bear_faults_of_the_store() {
    met(&["repo key add", "repo key remove"], true);
}

#[test]
fn restore_bears_faults_of_the_store() {
    met(&["restore"], is_thorough() && seed().is_multiple_of(2));
}
