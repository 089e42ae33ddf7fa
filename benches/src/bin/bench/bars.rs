//! The ratios that the benchmark must reach.

use serde::{Deserialize, Serialize};

/// One requirement: a ratio of medians over the rounds of one run.
#[derive(Debug)]
pub(crate) struct Bar {
    /// The row's name.
    pub(crate) row: &'static str,
    pub(crate) ratio: Ratio,
    pub(crate) limit: Limit,
}

/// The ratio that a bar checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ratio {
    /// Our throughput divided by that of the fastest peer.
    ThroughputToPeer,
    /// Our throughput divided by that of the floor.
    ThroughputToFloor,
    /// Our CPU time per request divided by that of the cheapest peer.
    CpuToPeer,
}

/// The required ratio.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Limit {
    AtLeast(f64),
    AtMost(f64),
}

/// Every bar.
pub(crate) const BARS: &[Bar] = &[
    peer("randread-4k-qd1", 1.5),
    peer("randread-4k-qd16", 3.0),
    peer("randread-4k-qd64", 3.5),
    peer("randread-4k-qd4-c32", 2.0),
    peer("randwrite-4k-qd16", 1.2),
    peer("randwrite-4k-qd64", 1.2),
    peer("read-256k-qd16", 1.0),
    peer("write-256k-qd16", 1.2),
    peer("nbdcopy-c1", 1.5),
    peer("nbdcopy-c4", 1.5),
    cpu("randread-4k-qd1", 0.8),
    cpu("randread-4k-qd16", 0.3),
    cpu("randread-4k-qd64", 0.3),
    cpu("randread-4k-qd4-c32", 0.4),
    cpu("randwrite-4k-qd16", 0.7),
    cpu("randwrite-4k-qd64", 0.7),
    cpu("read-256k-qd16", 0.5),
    floor("randread-4k-qd1", 0.8),
    floor("randread-4k-qd16", 0.8),
    floor("randread-4k-qd64", 0.8),
];

const fn peer(row: &'static str, least: f64) -> Bar {
    Bar { row, ratio: Ratio::ThroughputToPeer, limit: Limit::AtLeast(least) }
}

const fn floor(row: &'static str, least: f64) -> Bar {
    Bar { row, ratio: Ratio::ThroughputToFloor, limit: Limit::AtLeast(least) }
}

const fn cpu(row: &'static str, most: f64) -> Bar {
    Bar { row, ratio: Ratio::CpuToPeer, limit: Limit::AtMost(most) }
}

/// The verdict on one bar.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct BarReport {
    pub(crate) row: String,
    pub(crate) requirement: String,
    /// The measured ratio, if all its parts were measured.
    pub(crate) measured: Option<f64>,
    pub(crate) verdict: Verdict,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    Pass,
    Fail,
    NotMeasured,
}

impl Verdict {
    /// The word in the table.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Fail => "FAIL",
            Self::NotMeasured => "not measured",
        }
    }
}

/// Returns whether a ratio meets the requirement.
pub(crate) fn is_met(limit: Limit, ratio: f64) -> bool {
    match limit {
        Limit::AtLeast(limit) => ratio >= limit,
        Limit::AtMost(limit) => ratio <= limit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::ROWS;

    #[test]
    fn every_bar_names_a_row() {
        for bar in BARS {
            assert!(ROWS.iter().any(|row| row.name == bar.row), "{}", bar.row);
        }
    }

    #[test]
    fn bars_pass_at_their_limit_and_fail_beyond() {
        assert!(is_met(Limit::AtLeast(2.5), 2.5) && !is_met(Limit::AtLeast(2.5), 2.49));
        assert!(is_met(Limit::AtMost(0.5), 0.5) && !is_met(Limit::AtMost(0.5), 0.51));
        assert!(!is_met(Limit::AtLeast(1.0), f64::NAN) && !is_met(Limit::AtMost(1.0), f64::NAN));
    }
}
