//! The interface of the judges.

use std::path::Path;

use anyhow::Result;

use super::programs::Programs;

/// The environment of one round.
#[derive(Debug)]
pub(super) struct Round<'a> {
    /// The program under test.
    pub(super) programs: &'a Programs,
    /// An empty directory, removed afterwards.
    pub(super) directory: &'a Path,
    /// The seed of everything random in the round.
    pub(super) seed: u64,
    /// How many takeovers a round has, if it has any.
    pub(super) takeovers: u64,
}

/// Provokes errors and checks the outcome.
pub(super) trait Judge: Send + Sync {
    /// The name for selection.
    fn name(&self) -> &'static str;

    /// A description in one line.
    fn description(&self) -> &'static str;

    /// The unit of counting: states, images, attacks.
    fn unit(&self) -> &'static str;

    /// The test program that it runs, if it runs one.
    fn test_program(&self) -> Option<&'static str> {
        None
    }

    /// Whether it runs only if it is named: it takes more than time on this machine.
    fn is_on_request(&self) -> bool {
        false
    }

    /// Runs one round and returns the number of judged cases.
    ///
    /// # Errors
    ///
    /// The outcome is wrong.
    fn round(&self, round: &Round<'_>) -> Result<u64>;
}
