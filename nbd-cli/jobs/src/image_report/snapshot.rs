//! Internal snapshots.

use imgfmt::Snapshot;
use serde::Serialize;

/// An internal snapshot, with the keys of qemu-img.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct SnapshotReport {
    /// The id.
    pub id: String,
    /// The name.
    pub name: String,
    /// Bytes of the state of the virtual machine.
    pub vm_state_size: u64,
    /// When it was made: seconds since 1970.
    pub date_sec: u32,
    /// The nanoseconds of that second.
    pub date_nsec: u32,
    /// How long the virtual machine had been running: seconds.
    pub vm_clock_sec: u64,
    /// The nanoseconds of that second.
    pub vm_clock_nsec: u64,
    /// How many instructions the virtual machine had executed, if they were counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
}

impl From<&Snapshot> for SnapshotReport {
    fn from(snapshot: &Snapshot) -> Self {
        Self {
            id: snapshot.id.clone(),
            name: snapshot.name.clone(),
            vm_state_size: snapshot.vm_state_size,
            date_sec: snapshot.date_s,
            date_nsec: snapshot.date_ns,
            vm_clock_sec: snapshot.vm_clock_ns / 1_000_000_000,
            vm_clock_nsec: snapshot.vm_clock_ns % 1_000_000_000,
            icount: snapshot.instruction_count(),
        }
    }
}
