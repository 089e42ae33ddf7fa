//! Counts the requests of one connection.

use std::sync::Arc;
use std::time::Instant;

use super::counters::{Counters, Outcome};
use super::record::ExportRecord;
use super::requests::RequestKind;

/// A request that is not answered yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ticket {
    kind: RequestKind,
    /// Length of its range, in bytes.
    length: u64,
    arrived: Instant,
}

/// Counts the requests of one connection. On drop, its counters are added to the export's.
#[derive(Debug)]
pub(crate) struct Tally {
    counters: Arc<Counters>,
    record: ExportRecord,
    /// The arrival time of the bytes that are being parsed.
    received: Instant,
    /// Number of requests of each kind that were answered since, without waiting.
    answered: [u32; RequestKind::ALL.len()],
    has_answered: bool,
}

impl Tally {
    /// For a client of an export of `size` bytes.
    pub(crate) fn new(record: &ExportRecord, size: u64) -> Self {
        let counters = Arc::new(Counters::new(size));
        record.enter(&counters);
        Self {
            counters,
            record: record.clone(),
            received: Instant::now(),
            answered: [0; RequestKind::ALL.len()],
            has_answered: false,
        }
    }

    pub(crate) const fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Records the arrival of bytes.
    pub(crate) fn received(&mut self) {
        self.received = Instant::now();
    }

    /// Records the range of a valid request, in bytes.
    pub(crate) fn begin(&self, kind: RequestKind, offset: u64, length: u64) {
        self.counters.note(kind, offset, length);
    }

    /// The ticket of a request that is answered later.
    pub(crate) const fn ticket(&self, kind: RequestKind, length: u64) -> Ticket {
        Ticket { kind, length, arrived: self.received }
    }

    /// Counts a request that was answered at once.
    pub(crate) fn answer(&mut self, kind: RequestKind, length: u64, outcome: Outcome) {
        self.answered[kind.index()] += 1;
        self.has_answered = true;
        self.counters.count(kind, length, outcome);
    }

    /// Counts an answered request with a ticket; does nothing for a part of an answer.
    pub(crate) fn answer_later(&mut self, answered: Option<(Ticket, Outcome)>) {
        let Some((Ticket { kind, length, arrived }, outcome)) = answered else { return };
        self.counters.count(kind, length, outcome);
        self.counters.time(kind, 1, nanoseconds(arrived, Instant::now()));
    }

    /// Called when everything that could be answered at once is. `in_flight` requests are not
    /// answered.
    pub(crate) fn settle(&mut self, in_flight: usize) {
        self.counters.set_in_flight(in_flight);
        if !std::mem::take(&mut self.has_answered) {
            return;
        }
        let latency = nanoseconds(self.received, Instant::now());
        for kind in RequestKind::ALL {
            let count = std::mem::take(&mut self.answered[kind.index()]);
            if count > 0 {
                self.counters.time(kind, count.into(), latency);
            }
        }
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        self.settle(0);
        self.record.leave(&self.counters);
    }
}

fn nanoseconds(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_keeps_what_clients_did_that_have_left() {
        let record = ExportRecord::default();
        let mut first = Tally::new(&record, 1 << 20);
        let second = Tally::new(&record, 1 << 20);
        first.received();
        first.begin(RequestKind::Read, 4096, 512);
        first.answer(RequestKind::Read, 512, Outcome::Success);
        let ticket = first.ticket(RequestKind::Write, 4096);
        first.settle(1);
        assert_eq!(record.statistics(1 << 20, None, 0).in_flight, 1);
        first.answer_later(Some((ticket, Outcome::Failure)));
        drop(first);
        let found = record.statistics(1 << 20, None, 0);
        assert_eq!((found.clients, found.clients_total, found.in_flight), (1, 2, 0));
        assert_eq!((found.requests.requests(), found.requests.errors()), (2, 1));
        assert_eq!(found.requests.get(RequestKind::Read).bytes, 512);
        assert_eq!(found.requests.get(RequestKind::Write).bytes, 0, "it failed");
        assert_eq!(found.activity.read[1], 512);
        drop(second);
        assert_eq!(record.statistics(1 << 20, None, 0).requests, found.requests);
    }
}
