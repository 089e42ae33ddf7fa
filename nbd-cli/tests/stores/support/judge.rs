//! Judges commands: at one request after the other something happens, and then they run again.

use super::cases::{World, cases, is_thorough};
use super::random::{Random, seed_or};
use super::{Fate, Outcome};

/// Most fates of a request, unless there is time for all.
const FATES_MAX: usize = 2;

/// The seed without one in the environment.
const DEFAULT_SEED: u64 = 1;

/// Runs each of these commands until a request meets a fate, judges what is left, and runs it
/// again. `is_every` says that each request does, whatever the environment says.
pub(crate) fn judge(
    only: &[&str],
    is_encrypted: bool,
    is_every: bool,
    fates: impl Fn(&mut Random) -> Vec<Fate>,
) {
    let world = World::new(is_encrypted);
    let mut random = Random::of_this_run(DEFAULT_SEED);
    let mut judged = 0;
    for case in cases(&world).iter().filter(|case| only.contains(&case.name)) {
        let count = {
            let scene = world.scene(&case.contents);
            let _live = (case.prepare)(&scene);
            scene.count(&case.arguments)
        };
        for point in points(count, is_every, &mut random) {
            let fates = fates(&mut random);
            for fate in some(fates, FATES_MAX, &mut random) {
                let context = format!("{}, request {point} of {count}, {fate:?}", case.name);
                let scene = world.scene(&case.contents);
                let _live = (case.prepare)(&scene);
                let (outcome, is_reached) = scene.run_until(&case.arguments, point, fate);
                if std::env::var_os("NBD_STORE_SHOW").is_some() {
                    println!("{context}: {is_reached} {outcome:?}");
                }
                check_end(fate, &outcome, is_reached, &context);
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

fn check_end(fate: Fate, outcome: &Outcome, is_reached: bool, context: &str) {
    match fate {
        Fate::KilledBefore | Fate::KilledAfter => {
            assert!(outcome.code.is_none() || !is_reached, "{context}: {outcome:?}");
        }
        _ => outcome.assert_is_clear(context),
    }
}

/// The requests of a command that meet a fault: so many of `count`, or all, as the environment
/// says.
fn points(count: usize, is_every: bool, random: &mut Random) -> Vec<usize> {
    let wanted = std::env::var("NBD_STORE_POINTS").ok().and_then(|it| it.parse().ok());
    let mut points: Vec<usize> = (0..count).collect();
    let wanted = if is_every { count } else { wanted.unwrap_or(1).min(count) };
    for index in 0..wanted {
        points.swap(index, index + random.below(count - index));
    }
    points.truncate(wanted);
    points.sort_unstable();
    points
}

/// All of these, or so many of them.
fn some<T>(mut chosen: Vec<T>, count: usize, random: &mut Random) -> Vec<T> {
    while !is_thorough() && chosen.len() > count {
        chosen.swap_remove(random.below(chosen.len()));
    }
    chosen
}

/// A seed from the environment, or always the same one.
pub(crate) fn seed() -> u64 {
    seed_or(DEFAULT_SEED)
}
