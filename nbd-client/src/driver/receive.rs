//! Receives replies: headers through a buffer, large data directly into its destination.

use std::pin::pin;
use std::task::{Context, Poll};

use bytes::{Buf, BufMut};
use nbd_proto::transmission::client::Event;
use tokio::io::AsyncReadExt;

use super::{Driver, Receiving};
use crate::error::LostConnection;

/// Least free space for a read, in bytes.
const LEAST_READ: usize = 16 * 1024;

/// Data of at least this many bytes is read directly into its destination.
const DIRECT_LEN: usize = 16 * 1024;

impl Driver {
    /// Processes the received bytes, and reads once if they are not enough.
    pub(super) fn receive(&mut self, cx: &mut Context<'_>) -> Result<bool, LostConnection> {
        let mut progress = self.work_off_input()?;
        let read = match &self.receiving {
            Some(receiving) if receiving.left >= DIRECT_LEN => self.read_data(cx),
            _ => self.read_input(cx),
        };
        match read? {
            Poll::Ready(0) => return Err(self.closed_by_server()),
            Poll::Ready(_) => progress = true,
            Poll::Pending => {}
        }
        Ok(progress)
    }

    fn work_off_input(&mut self) -> Result<bool, LostConnection> {
        let mut progress = false;
        loop {
            if let Some(receiving) = &mut self.receiving {
                let available = receiving.left.min(self.input.len());
                let data = self.input.get(..available).unwrap_or_default();
                if let Some(submission) = self.in_flight.get_mut(&receiving.cookie) {
                    submission.collect.push(receiving.position, data);
                }
                self.input.advance(available);
                if !self.data_arrived(available) {
                    return Ok(progress);
                }
            }
            match self.transmission.advance(&mut self.input)? {
                Event::NeedsInput => return Ok(progress),
                event => self.handle(event),
            }
            progress = true;
        }
    }

    /// Counts data that has reached its destination; returns true if it is complete.
    fn data_arrived(&mut self, length: usize) -> bool {
        let Some(receiving) = &mut self.receiving else { return true };
        receiving.left = receiving.left.saturating_sub(length);
        receiving.position = receiving.position.saturating_add(length as u64);
        let complete = receiving.left == 0;
        if complete {
            self.receiving = None;
        }
        complete
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::NeedsInput => {}
            Event::Data { cookie, position, length } => {
                if let Some(submission) = self.in_flight.get_mut(&cookie) {
                    let total = submission.data_len();
                    submission.collect.begin_data(total, position, length);
                }
                self.receiving = Some(Receiving { cookie, position, left: length });
            }
            Event::Hole { cookie, position, length } => {
                if let Some(submission) = self.in_flight.get_mut(&cookie) {
                    submission.collect.hole(position, length);
                }
            }
            Event::BlockStatus { cookie, context, descriptors } => {
                let context = self.contexts.iter().position(|id| *id == context);
                if let (Some(submission), Some(context)) =
                    (self.in_flight.get_mut(&cookie), context)
                {
                    submission.collect.status(context, descriptors);
                }
            }
            Event::Finished { cookie, result } => self.finish(cookie, result),
            // Other events cannot answer the requests of this driver.
            _ => {}
        }
    }

    fn read_data(&mut self, cx: &mut Context<'_>) -> std::io::Result<Poll<usize>> {
        let Some(receiving) = &self.receiving else { return Ok(Poll::Pending) };
        let Some(submission) = self.in_flight.get_mut(&receiving.cookie) else {
            return Ok(Poll::Pending);
        };
        let (position, left) = (receiving.position, receiving.left);
        match submission.collect.poll_fill(position, left, &mut self.stream, cx)? {
            Poll::Ready(length) => {
                self.data_arrived(length);
                Ok(Poll::Ready(length))
            }
            Poll::Pending => Ok(Poll::Pending),
        }
    }

    fn read_input(&mut self, cx: &mut Context<'_>) -> std::io::Result<Poll<usize>> {
        self.input.reserve(LEAST_READ);
        let room = if self.large_reads > 0 { LEAST_READ } else { usize::MAX };
        let mut input = (&mut self.input).limit(room);
        match pin!(self.stream.read_buf(&mut input)).poll(cx)? {
            Poll::Ready(length) => Ok(Poll::Ready(length)),
            Poll::Pending => Ok(Poll::Pending),
        }
    }

    fn closed_by_server(&self) -> LostConnection {
        let in_flight = self.in_flight.len();
        LostConnection::ClosedByServer(match (&self.receiving, self.input.len(), in_flight) {
            (Some(receiving), ..) => {
                format!("in the middle of data, {} bytes before its end", receiving.left)
            }
            (None, 0, 0) => "while no request was in flight".to_owned(),
            (None, 0, _) => format!("with {in_flight} requests in flight"),
            (None, length, _) => {
                format!("in the middle of a reply, after {length} bytes of a message")
            }
        })
    }
}
