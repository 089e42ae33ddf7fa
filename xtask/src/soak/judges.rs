//! The list of the judges.

use super::from_tests::FromTests;
use super::judge::Judge;
use super::{ceph, commands, flood, full_disk, kills, lies, relays, sessions, streams, takeovers};

/// Every judge.
pub(super) fn all() -> Vec<Box<dyn Judge>> {
    let mut judges: Vec<Box<dyn Judge>> = Vec::new();
    for tests in FromTests::ALL {
        judges.push(Box::new(*tests));
    }
    judges.push(Box::new(commands::Commands));
    judges.push(Box::new(kills::Kills));
    judges.push(Box::new(streams::Streams));
    judges.push(Box::new(takeovers::Takeovers));
    judges.push(Box::new(relays::Relays { has_kills: false }));
    judges.push(Box::new(relays::Relays { has_kills: true }));
    judges.push(Box::new(sessions::Sessions));
    judges.push(Box::new(full_disk::FullDisk));
    judges.push(Box::new(flood::Flood));
    judges.push(Box::new(lies::Lies));
    judges.push(Box::new(ceph::Ceph));
    judges
}
