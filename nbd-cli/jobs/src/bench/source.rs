//! The sources of requests.

use std::time::{Duration, Instant};

use super::options::RequestKind;
use super::targets::{Target, Targets};

/// The task of a connection.
#[derive(Debug)]
pub(super) enum Source {
    /// The load.
    Load(Load),
    /// Reads these ranges (offset and length, in bytes), and nothing else.
    Ranges(std::vec::IntoIter<(u64, u32)>),
    /// One flush.
    Flush { is_made: bool },
}

/// The next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A request and its due time.
    Request(Target, Instant),
    /// No request is due before this time.
    NotBefore(Instant),
    /// The source is exhausted.
    End,
}

/// The requests of a load.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) targets: Targets,
    /// Number of requests that are left, if it is limited.
    pub(super) left: Option<u64>,
    /// The interval between requests and the due time of the next one, if there is a rate.
    pub(super) rate: Option<(Duration, Instant)>,
    /// Writes between two flushes, and those since the last one.
    pub(super) flush_every: Option<(u64, u64)>,
}

impl Source {
    /// A load with at most `per_second` requests, if that is limited.
    pub(super) fn load(
        targets: Targets,
        left: Option<u64>,
        per_second: Option<f64>,
        flush_every: Option<u64>,
    ) -> Self {
        let rate = per_second.map(|rate| (Duration::from_secs_f64(1.0 / rate), Instant::now()));
        let flush_every = flush_every.map(|every| (every, 0));
        Self::Load(Load { targets, left, rate, flush_every })
    }

    /// The next request. It counts if `counts`: not during the warm-up.
    pub(super) fn next(&mut self, now: Instant, counts: bool) -> Next {
        match self {
            Self::Load(load) => load.next(now, counts),
            Self::Ranges(ranges) => ranges.next().map_or(Next::End, |(offset, length)| {
                Next::Request(Target { kind: RequestKind::Read, offset, length }, now)
            }),
            Self::Flush { is_made } if *is_made => Next::End,
            Self::Flush { is_made } => {
                *is_made = true;
                Next::Request(FLUSH, now)
            }
        }
    }

    /// Chooses another offset for a request whose blocks are being written.
    pub(super) fn instead(&mut self, target: Target) -> Target {
        match self {
            Self::Load(load) => Target { kind: target.kind, ..load.targets.next() },
            _ => target,
        }
    }
}

/// A flush has no range.
const FLUSH: Target = Target { kind: RequestKind::Flush, offset: 0, length: 0 };

impl Load {
    fn next(&mut self, now: Instant, counts: bool) -> Next {
        if let Some((every, since)) = &mut self.flush_every
            && since >= every
        {
            *since = 0;
            return Next::Request(FLUSH, now);
        }
        if self.left == Some(0) {
            return Next::End;
        }
        let due = match &mut self.rate {
            Some((_, due)) if *due > now => return Next::NotBefore(*due),
            Some((interval, due)) => {
                let this = *due;
                *due += *interval;
                this
            }
            None => now,
        };
        if counts && let Some(left) = &mut self.left {
            *left -= 1;
        }
        let target = self.targets.next();
        if target.kind != RequestKind::Read
            && let Some((_, since)) = &mut self.flush_every
        {
            *since += 1;
        }
        Next::Request(target, due)
    }
}

#[cfg(test)]
mod tests {
    use super::super::options::{BlockSize, Pattern, Workload};
    use super::super::random::Random;
    use super::super::targets::Section;
    use super::*;

    fn targets(workload: Workload) -> Targets {
        let section = Section { offset: 0, length: 1 << 20 };
        let sizes = [BlockSize { length: 4096, weight: 1 }];
        Targets::new(section, workload, Pattern::Sequential, &sizes, Random::new(1, 0))
    }

    fn kinds(source: &mut Source) -> Vec<RequestKind> {
        let now = Instant::now();
        std::iter::from_fn(|| match source.next(now, true) {
            Next::Request(target, _) => Some(target.kind),
            _ => None,
        })
        .take(10)
        .collect()
    }

    #[test]
    fn writes_are_counted_and_flushed() {
        use RequestKind::{Flush, Write};
        let mut source = Source::load(targets(Workload::Write), Some(5), None, Some(2));
        assert_eq!(kinds(&mut source), [Write, Write, Flush, Write, Write, Flush, Write]);
        let mut source = Source::load(targets(Workload::Read), Some(5), None, Some(2));
        assert_eq!(kinds(&mut source), [RequestKind::Read; 5]);
    }

    #[test]
    fn requests_of_the_warm_up_do_not_count() {
        let mut source = Source::load(targets(Workload::Read), Some(1), None, None);
        for _ in 0..3 {
            assert!(matches!(source.next(Instant::now(), false), Next::Request(..)));
        }
        assert_eq!(kinds(&mut source).len(), 1);
    }

    #[test]
    fn rate_makes_requests_due_at_equal_distances() {
        let mut source = Source::load(targets(Workload::Read), None, Some(1000.0), None);
        let late = Instant::now() + Duration::from_millis(3);
        let mut due = Vec::new();
        while let Next::Request(_, at) = source.next(late, true) {
            due.push(at);
        }
        assert!(due.len() >= 3, "those that are late are made at once: {}", due.len());
        assert!(due.windows(2).all(|pair| pair[1] - pair[0] == Duration::from_millis(1)));
        assert!(matches!(source.next(late, true), Next::NotBefore(at) if at > late));
    }

    #[test]
    fn ranges_are_read_and_one_flush_is_made() {
        let mut source = Source::Ranges(vec![(0, 512), (4096, 512)].into_iter());
        assert_eq!(kinds(&mut source), [RequestKind::Read; 2]);
        let mut source = Source::Flush { is_made: false };
        assert_eq!(kinds(&mut source), [RequestKind::Flush]);
    }
}
