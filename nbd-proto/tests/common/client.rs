//! A client that goes through a whole session over a [`Wire`].

use bytes::BytesMut;
use nbd_proto::ProtocolError;
use nbd_proto::handshake::client::{
    Answer, AwaitStep, Awaiting, ClientHandshake, ClientStep, ExportStep, InfoRequest, OptionPhase,
};
use nbd_proto::handshake::{Negotiated, OptionError};
use nbd_proto::transmission::client::{Event, ServerError, Transmission};
use nbd_proto::transmission::{Command, Durability, ExtentLimit, Fragmentation, Speed, ZeroMode};
use nbd_proto::wire::{BlockDescriptor, MetaContextId, MetaContextName, ReplyMode};

use super::link::Wire;

/// Why a session ended early.
#[derive(Debug)]
pub enum Stop {
    /// The wire gives no more bytes.
    Starved,
    /// The peer broke the protocol.
    Protocol(ProtocolError),
}

impl From<ProtocolError> for Stop {
    fn from(error: ProtocolError) -> Self {
        Self::Protocol(error)
    }
}

/// A client with its buffers.
#[derive(Debug)]
pub struct Driver<W> {
    pub wire: W,
    pub input: BytesMut,
    pub out: BytesMut,
}

/// What one request gave.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub data: Vec<u8>,
    pub statuses: Vec<(MetaContextId, Vec<BlockDescriptor>)>,
    pub error: Option<ServerError>,
}

impl<W: Wire> Driver<W> {
    pub fn new(wire: W) -> Self {
        Self { wire, input: BytesMut::new(), out: BytesMut::new() }
    }

    fn more(&mut self) -> Result<(), Stop> {
        if self.wire.exchange(&mut self.out, &mut self.input) { Ok(()) } else { Err(Stop::Starved) }
    }

    pub fn greet(&mut self) -> Result<OptionPhase, Stop> {
        let mut handshake = ClientHandshake::new();
        loop {
            handshake = match handshake.advance(&mut self.input, &mut self.out)? {
                ClientStep::NeedsInput(handshake) => handshake,
                ClientStep::Newstyle(phase) => return Ok(phase),
                ClientStep::Oldstyle(_) => panic!("the server is newstyle"),
            };
            self.more()?;
        }
    }

    /// Waits for the answer to an option; a refusal is given back with the phase.
    pub fn ask<A: Answer>(
        &mut self,
        mut awaiting: Awaiting<A>,
    ) -> Result<Result<A::Accepted, (OptionError, OptionPhase)>, Stop> {
        loop {
            awaiting = match awaiting.advance(&mut self.input)? {
                AwaitStep::NeedsInput(awaiting) => awaiting,
                AwaitStep::Accepted(accepted) => return Ok(Ok(accepted)),
                AwaitStep::Refused { error, next } => return Ok(Err((error, next))),
            };
            self.more()?;
        }
    }

    pub fn export_name(&mut self, phase: OptionPhase, name: &str) -> Result<Negotiated, Stop> {
        let mut awaiting = phase.export_name(name, &mut self.out).unwrap();
        loop {
            awaiting = match awaiting.advance(&mut self.input)? {
                ExportStep::NeedsInput(awaiting) => awaiting,
                ExportStep::Transmission(negotiated) => return Ok(*negotiated),
            };
            self.more()?;
        }
    }

    /// Sends one request and collects its answer.
    pub fn request(
        &mut self,
        transmission: &mut Transmission,
        offset: u64,
        length: u64,
        command: &Command,
        payload: &[u8],
    ) -> Result<Outcome, Stop> {
        let cookie = transmission
            .request(offset, length, command, &mut self.out)
            .expect("negotiated and inside the export");
        self.out.extend_from_slice(payload);
        let mut outcome = Outcome::default();
        if let Command::Read(_) = command {
            // A pattern that no test writes, so that a byte nobody answered is seen.
            outcome.data = vec![0xee; length as usize];
        }
        loop {
            match transmission.advance(&mut self.input)? {
                Event::NeedsInput => self.more()?,
                Event::Data { cookie: named, position, length } => {
                    assert_eq!(named, cookie);
                    while self.input.len() < length {
                        self.more()?;
                    }
                    let data = self.input.split_to(length);
                    let start = position as usize;
                    outcome.data[start..start + length].copy_from_slice(&data);
                }
                Event::Hole { position, length, .. } => {
                    let start = position as usize;
                    outcome.data[start..start + length].fill(0);
                }
                Event::BlockStatus { context, descriptors, .. } => {
                    outcome.statuses.push((context, descriptors));
                }
                Event::Finished { cookie: named, result } => {
                    assert_eq!(named, cookie);
                    outcome.error = result.err();
                    return Ok(outcome);
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

/// How a session asks for its export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    ExportName,
    Go,
}

/// A session with every option and every command that `mode` has. Checks what comes back.
pub fn session<W: Wire>(driver: &mut Driver<W>, mode: ReplyMode, way: Way) -> Result<(), Stop> {
    let phase = driver.greet()?;
    let negotiated = negotiate(driver, phase, mode, way)?;
    assert_eq!(negotiated.size, super::DISK_SIZE);
    assert_eq!(negotiated.reply_mode, mode);
    assert_eq!(negotiated.meta_contexts.len(), if mode == ReplyMode::Simple { 0 } else { 2 });
    let mut transmission = Transmission::new(&negotiated);
    transfer(driver, &mut transmission, mode)?;
    if mode != ReplyMode::Simple {
        statuses(driver, &mut transmission, mode)?;
    }
    transmission.request(0, 0, &Command::Disconnect, &mut driver.out).unwrap();
    assert_eq!(transmission.in_flight(), 0);
    // DISC has no answer; only carry it over.
    driver.wire.exchange(&mut driver.out, &mut driver.input);
    Ok(())
}

fn negotiate<W: Wire>(
    driver: &mut Driver<W>,
    phase: OptionPhase,
    mode: ReplyMode,
    way: Way,
) -> Result<Negotiated, Stop> {
    let awaiting = phase.list(&mut driver.out).unwrap();
    let (exports, phase) = driver.ask(awaiting)?.unwrap();
    assert_eq!(exports, super::listed_exports());

    let awaiting = phase.info("nowhere", InfoRequest::ALL, &mut driver.out).unwrap();
    let (error, phase) = driver.ask(awaiting)?.unwrap_err();
    assert_eq!(error.message, "no such export");

    let mut phase = phase;
    match mode {
        ReplyMode::Simple => {}
        ReplyMode::Structured => {
            let awaiting = phase.structured_reply(&mut driver.out).unwrap();
            phase = driver.ask(awaiting)?.unwrap();
        }
        ReplyMode::Extended => {
            let awaiting = phase.extended_headers(&mut driver.out).unwrap();
            phase = driver.ask(awaiting)?.unwrap();
        }
    }
    let awaiting = phase.list_meta_context("disk", &["qemu:"], &mut driver.out).unwrap();
    let (names, mut phase) = driver.ask(awaiting)?.unwrap();
    assert_eq!(names.len(), 2);
    if mode != ReplyMode::Simple {
        let wanted = [
            MetaContextName::base_allocation(),
            MetaContextName::new("qemu:dirty-bitmap:b0").unwrap(),
        ];
        let awaiting = phase.set_meta_context("disk", &wanted, &mut driver.out).unwrap();
        let (selected, next) = driver.ask(awaiting)?.unwrap();
        assert_eq!(selected[0].0, MetaContextId(0));
        assert_eq!(selected[1].0, MetaContextId(2));
        phase = next;
    }
    let awaiting = phase.info("disk", InfoRequest::ALL, &mut driver.out).unwrap();
    let (info, phase) = driver.ask(awaiting)?.unwrap();
    assert_eq!(info.canonical_name.as_deref(), Some("disk"));
    assert_eq!(info.description.as_deref(), Some("a disk with everything"));
    if way == Way::ExportName {
        return driver.export_name(phase, "disk");
    }
    let awaiting = phase.go("disk", InfoRequest::default(), &mut driver.out).unwrap();
    Ok(driver.ask(awaiting)?.unwrap().0)
}

fn transfer<W: Wire>(
    driver: &mut Driver<W>,
    transmission: &mut Transmission,
    mode: ReplyMode,
) -> Result<(), Stop> {
    let ok = Outcome::default();
    let pattern: Vec<u8> = (0..1500_u32).map(|i| (i % 251) as u8 + 1).collect();
    let write = Command::Write(Durability::Fua);
    assert_eq!(driver.request(transmission, 1000, 1500, &write, &pattern)?, ok);
    for fragmentation in [Fragmentation::Allowed, Fragmentation::Forbidden] {
        let command = Command::Read(fragmentation);
        if fragmentation == Fragmentation::Forbidden && mode == ReplyMode::Simple {
            continue; // DF needs structured replies.
        }
        let read = driver.request(transmission, 900, 2000, &command, &[])?;
        assert_eq!(read.error, None);
        assert_eq!(read.data[..100], [0; 100]);
        assert_eq!(read.data[100..1600], pattern);
        assert_eq!(read.data[1600..], [0; 400]);
    }
    let zeroes = Command::WriteZeroes(ZeroMode::KeepAllocated, Speed::FastOnly, Durability::Cached);
    assert_eq!(driver.request(transmission, 1024, 512, &zeroes, &[])?, ok);
    assert_eq!(driver.request(transmission, 2048, 512, &Command::Trim(Durability::Fua), &[])?, ok);
    assert_eq!(driver.request(transmission, 0, 4096, &Command::Cache, &[])?, ok);
    assert_eq!(driver.request(transmission, 0, 0, &Command::Flush, &[])?, ok);
    let read =
        driver.request(transmission, 1000, 1500, &Command::Read(Fragmentation::Allowed), &[])?;
    let mut expected = pattern;
    expected[24..536].fill(0);
    expected[1048..].fill(0);
    assert_eq!(read.data, expected);
    Ok(())
}

fn statuses<W: Wire>(
    driver: &mut Driver<W>,
    transmission: &mut Transmission,
    mode: ReplyMode,
) -> Result<(), Stop> {
    let all = Command::BlockStatus(ExtentLimit::Many, None);
    let status = driver.request(transmission, 0, 2048, &all, &[])?;
    let expected: Vec<BlockDescriptor> = [(512, 3), (512, 0), (512, 3), (512, 0)]
        .into_iter()
        .map(|(length, flags)| BlockDescriptor { length, flags })
        .collect();
    assert_eq!(
        status.statuses,
        [(MetaContextId(0), expected.clone()), (MetaContextId(2), expected.clone())]
    );
    let one = Command::BlockStatus(ExtentLimit::One, None);
    let status = driver.request(transmission, 0, 2048, &one, &[])?;
    assert_eq!(status.statuses[0].1, expected[..1]);
    if mode == ReplyMode::Extended {
        let wanted = Some([MetaContextId(2)].into());
        let some = Command::BlockStatus(ExtentLimit::Many, wanted);
        let status = driver.request(transmission, 0, 2048, &some, &[])?;
        assert_eq!(status.statuses, [(MetaContextId(2), expected)]);
    }
    Ok(())
}
