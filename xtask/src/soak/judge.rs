//! The judges: their interface and their list.

use std::path::Path;

use anyhow::Result;

use super::from_tests::FromTests;
use super::programs::Programs;
use super::{commands, flood, full_disk, kills, lies};

/// What one round has to work with.
#[derive(Debug)]
pub(super) struct Round<'a> {
    /// What is judged.
    pub(super) programs: &'a Programs,
    /// An empty directory, removed afterwards.
    pub(super) directory: &'a Path,
    /// Everything random in the round derives from this number.
    pub(super) seed: u64,
}

/// Makes trouble and says whether what came of it is right.
pub(super) trait Judge: Send + Sync {
    /// The name by which it is chosen.
    fn name(&self) -> &'static str;

    /// One line for people.
    fn description(&self) -> &'static str;

    /// What is counted: states, images, attacks.
    fn unit(&self) -> &'static str;

    /// Runs one round and returns how much was judged in it.
    ///
    /// # Errors
    ///
    /// What was judged is not right.
    fn round(&self, round: &Round<'_>) -> Result<u64>;
}

/// Every judge.
pub(super) fn all() -> Vec<Box<dyn Judge>> {
    let mut judges: Vec<Box<dyn Judge>> = Vec::new();
    for tests in FromTests::ALL {
        judges.push(Box::new(*tests));
    }
    judges.push(Box::new(commands::Commands));
    judges.push(Box::new(kills::Kills));
    judges.push(Box::new(full_disk::FullDisk));
    judges.push(Box::new(flood::Flood));
    judges.push(Box::new(lies::Lies));
    judges
}
