//! Takes replies apart, and judges what they say.

use std::time::{Duration, Instant};

use nbd_proto::transmission::Durability;
use nbd_proto::transmission::client::{Event, ServerError};
use nbd_proto::wire::Cookie;

use super::options::RequestKind;
use super::slots::Slot;
use super::targets::Target;
use super::verdict::judge_alone;
use super::worker::{Check, Trouble, Worker};
use crate::error::JobError;
use crate::text::printable;

impl Worker {
    /// Takes the replies that have come.
    pub(super) fn take_replies(&mut self, now: Instant) -> Result<(), Trouble> {
        let mut buffer = std::mem::take(&mut self.input);
        let unread = buffer.get(self.unread.clone()).unwrap_or_default();
        let taken = self.take_apart(unread, now);
        if let Ok(taken) = taken {
            // What is left is a part of a header or of an error: little.
            self.unread.start += taken;
            let left = self.unread.len();
            buffer.copy_within(self.unread.clone(), 0);
            self.unread = 0..left;
        }
        self.input = buffer;
        taken.map(drop)
    }

    /// Gives how many bytes were taken.
    fn take_apart(&mut self, mut input: &[u8], now: Instant) -> Result<usize, Trouble> {
        let length = input.len();
        loop {
            input = self.take_data(input);
            if self.receiving.is_some() {
                break;
            }
            let event = self.transmission.advance(&mut input);
            let event = event.map_err(|error| {
                let uri = &self.shared.uri;
                let text = printable(&error.to_string());
                Trouble::Fatal(JobError::source(format!(
                    "{uri}: the server's reply is wrong: {text}"
                )))
            })?;
            match event {
                Event::NeedsInput => break,
                Event::Data { cookie, position, length } => {
                    let index = self.slots.find(cookie).unwrap_or(usize::MAX);
                    self.receiving = Some((index, position as usize, length));
                }
                Event::Hole { cookie, position, length } => self.zero(cookie, position, length),
                Event::Finished { cookie, result } => self.finish(cookie, result, now)?,
                // No request asks for a status or for anything else.
                _ => {}
            }
        }
        Ok(length - input.len())
    }

    /// Takes what there is of the data that is being received.
    fn take_data<'a>(&mut self, input: &'a [u8]) -> &'a [u8] {
        let Some((index, position, left)) = self.receiving else { return input };
        let (data, rest) = input.split_at(left.min(input.len()));
        if !matches!(self.check, Check::Discard)
            && let Some(slot) = self.slots.get(index)
            && let Some(place) = slot.data.get_mut(position..position.saturating_add(data.len()))
        {
            place.copy_from_slice(data);
        }
        let left = left - data.len();
        self.receiving = (left > 0).then_some((index, position + data.len(), left));
        rest
    }

    fn zero(&mut self, cookie: Cookie, position: u64, length: usize) {
        let start = position as usize;
        if let Some(index) = self.slots.find(cookie)
            && let Some(slot) = self.slots.get(index)
            && let Some(place) = slot.data.get_mut(start..start.saturating_add(length))
        {
            place.fill(0);
        }
    }

    fn finish(
        &mut self,
        cookie: Cookie,
        result: Result<(), ServerError>,
        now: Instant,
    ) -> Result<(), Trouble> {
        let Some(index) = self.slots.find(cookie) else { return Ok(()) };
        let Some(slot) = self.slots.get(index) else { return Ok(()) };
        if let Err(error) = result {
            return Err(failed(&self.shared.uri.to_string(), slot.target, &error));
        }
        let Target { kind, offset, length } = slot.target;
        self.recorder.record(kind, length.into(), now.saturating_duration_since(slot.started));
        match &mut self.check {
            Check::Discard => {}
            Check::Alone { block_len, seed } => {
                let (block_len, seed) = (*block_len, *seed);
                look_at(&self.shared, slot, block_len, seed);
            }
            Check::Ledger(ledger) => match kind {
                RequestKind::Read => {
                    let Slot { data, expected, epoch, .. } = slot;
                    let shared = &self.shared;
                    let wrong = |mismatch| shared.add_mismatch(mismatch);
                    let good = ledger.check(offset, data, expected, *epoch, wrong);
                    shared.verified().good_blocks += good;
                }
                RequestKind::Write => {
                    let is_durable = self.durability == Durability::Fua;
                    let epoch = slot.epoch;
                    ledger.end_write(offset, length, is_durable, epoch);
                }
                RequestKind::Flush => {
                    ledger.end_flush(std::mem::take(&mut slot.covered), slot.epoch);
                }
                RequestKind::Zeroes | RequestKind::Trim => {}
            },
        }
        self.slots.release(cookie);
        Ok(())
    }
}

/// Checks blocks of which only the seed is known.
fn look_at(shared: &super::shared::Shared, slot: &Slot, block_len: u32, seed: u64) {
    let (mut good, mut other) = (0, 0);
    let offsets = (slot.target.offset..).step_by(block_len as usize);
    for (block, offset) in slot.data.chunks(block_len as usize).zip(offsets) {
        match judge_alone(block, seed, offset) {
            Ok(true) => good += 1,
            Ok(false) => other += 1,
            Err(mismatch) => shared.add_mismatch(mismatch),
        }
    }
    let mut verified = shared.verified();
    verified.good_blocks += good;
    verified.other_blocks += other;
}

/// The server refused a request: it is shutting down, or does not support it.
fn failed(uri: &str, target: Target, error: &ServerError) -> Trouble {
    let text = printable(&error.to_string());
    if error.is_shutdown() {
        return Trouble::Lost(text);
    }
    let Target { kind, offset, length } = target;
    let what = match kind {
        RequestKind::Flush => "flush".to_owned(),
        _ => format!("{} {length} bytes at offset {offset} of", kind.verb()),
    };
    Trouble::Fatal(JobError::source(format!("cannot {what} {uri}: {text}")))
}

/// The first pause between two attempts to make a connection, and the longest.
const PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];

impl Worker {
    /// Makes the connection again, if that is what helps, and sends again what was not answered.
    pub(super) fn recover(&mut self, trouble: Trouble) -> Result<(), JobError> {
        let why = match trouble {
            Trouble::Fatal(error) => return Err(error),
            Trouble::Lost(why) => why,
        };
        let began = Instant::now();
        let mut pause = PAUSES[0];
        let mut last = why.clone();
        loop {
            let left = self.shared.reconnect.saturating_sub(began.elapsed());
            if left.is_zero() || self.shared.is_cancelled() {
                return Err(self.lost(&why, &last));
            }
            let connecting = async { tokio::time::timeout(left, self.reconnector.connect()).await };
            match self.runtime.block_on(connecting) {
                Ok(Ok(stream)) => {
                    match self.resume(stream) {
                        Ok(()) => return Ok(()),
                        Err(Trouble::Fatal(error)) => return Err(error),
                        Err(Trouble::Lost(error)) => last = error,
                    };
                }
                Ok(Err(error @ nbd_client::Error::Lost { .. })) => {
                    return Err(JobError::source(printable(&error.to_string())));
                }
                Ok(Err(error)) => last = printable(&error.to_string()),
                Err(_) => {}
            }
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(PAUSES[1]);
        }
    }

    fn lost(&self, why: &str, last: &str) -> JobError {
        let (uri, patience) = (&self.shared.uri, self.shared.reconnect);
        let why = printable(why);
        JobError::source(if patience.is_zero() {
            format!("the connection to {uri} was lost: {why} (--reconnect TIME makes it again)")
        } else {
            format!(
                "the connection to {uri} was lost ({why}) and could not be made again within \
                 {patience:?}: {last}"
            )
        })
    }
}
