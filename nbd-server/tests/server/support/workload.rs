//! Random requests, many at a time, held against a model.

use std::collections::HashMap;
use std::ops::Range;

use nbd_proto::transmission::{Command, Durability, Fragmentation, Speed, ZeroMode};
use nbd_proto::wire::Cookie;

use super::{Client, Random};

/// Random requests to one region of the disk, which nobody else uses.
pub struct Workload {
    /// In bytes.
    pub region: Range<u64>,
    /// Lengths to choose from, in bytes.
    pub lengths: Vec<usize>,
    /// Number of requests.
    pub count: usize,
    /// Requests in flight at a time.
    pub depth: usize,
}

struct InFlight {
    range: Range<u64>,
    writes: bool,
    expected: Option<Vec<u8>>,
}

impl Workload {
    /// Carries the requests out and checks every byte that is read, and at the end the whole
    /// region. The region has to read as zeroes before.
    pub fn run(&self, client: &mut Client, random: &mut Random) {
        let mut model = vec![0; (self.region.end - self.region.start) as usize];
        let mut flying: HashMap<Cookie, InFlight> = HashMap::new();
        for _ in 0..self.count {
            let range = loop {
                // Requests that overlap may be carried out in any order: there is nothing to
                // compare with.
                let range = self.range(random);
                let free = |other: &InFlight| {
                    !(range.start < other.range.end && other.range.start < range.end)
                };
                if flying.len() < self.depth && flying.values().all(free) {
                    break range;
                }
                self.settle(client, &mut flying);
            };
            let (cookie, request) = self.submit(client, random, range, &mut model);
            flying.insert(cookie, request);
        }
        while !flying.is_empty() {
            self.settle(client, &mut flying);
        }
        for (index, part) in model.chunks(1 << 20).enumerate() {
            let offset = self.region.start + ((index as u64) << 20);
            assert!(client.read(offset, part.len() as u64) == part, "the end, from {offset} on");
        }
    }

    fn range(&self, random: &mut Random) -> Range<u64> {
        let length = self.lengths[random.below(self.lengths.len() as u64) as usize] as u64;
        let start =
            self.region.start + random.below(self.region.end - self.region.start - length + 1);
        start..start + length
    }

    fn submit(
        &self,
        client: &mut Client,
        random: &mut Random,
        range: Range<u64>,
        model: &mut [u8],
    ) -> (Cookie, InFlight) {
        let length = range.end - range.start;
        let part =
            (range.start - self.region.start) as usize..(range.end - self.region.start) as usize;
        let part = &mut model[part];
        let mut data = Vec::new();
        let mut expected = None;
        let command = match random.below(20) {
            0..9 => {
                data = random.bytes(length as usize);
                part.copy_from_slice(&data);
                Command::Write(Durability::Cached)
            }
            9 => {
                part.fill(0);
                Command::WriteZeroes(ZeroMode::MayUnmap, Speed::Any, Durability::Cached)
            }
            10 => Command::Flush,
            11 => Command::Cache,
            _ => {
                expected = Some(part.to_vec());
                Command::Read(Fragmentation::Allowed)
            }
        };
        let writes = matches!(command, Command::Write(_) | Command::WriteZeroes(..));
        let cookie = client.submit(range.start, length, &command, &data);
        (cookie, InFlight { range, writes, expected })
    }

    /// Waits for one answer.
    fn settle(&self, client: &mut Client, flying: &mut HashMap<Cookie, InFlight>) {
        let (cookie, outcome) = client.next_finished();
        let InFlight { range, writes, expected } = flying.remove(&cookie).unwrap();
        assert_eq!(outcome.result, Ok(()), "{range:?}, writes: {writes}");
        if let Some(expected) = expected {
            assert!(outcome.data == expected, "READ of {range:?} gave other bytes");
        }
    }
}
