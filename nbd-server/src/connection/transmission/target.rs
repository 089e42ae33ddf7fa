//! The export of a connection, for its requests.

use std::sync::Arc;

use nbd_proto::transmission::{Command, ReplyEncoder, Request};
use nbd_proto::wire::{MetaContextId, MetaContextName};

use super::super::dispatch::{self, PreparedRequest};
use super::super::handshake::Established;
use super::super::writeback_errors::WritebackErrors;
use crate::export::{
    Export, ExportEntry, ExportError, Holes, Mapped, MayBlock, Operation, ReadMap, TryRead,
};
use crate::statistics::Ticket;

/// The export of a request, and the form of its answer.
pub(super) struct Target {
    entry: ExportEntry,
    export: Arc<dyn Export>,
    writeback: Arc<WritebackErrors>,
    contexts: Arc<[(MetaContextId, MetaContextName)]>,
    encoder: ReplyEncoder,
}

impl Target {
    pub(super) fn new(established: &Established) -> Self {
        let Established { granted, negotiated, .. } = established;
        let entry = &granted.entry;
        Self {
            entry: entry.clone(),
            export: Arc::clone(entry.export()),
            writeback: Arc::new(WritebackErrors::new(
                entry.failures().clone(),
                granted.failures,
                established.owes_failure,
            )),
            contexts: negotiated.meta_contexts.clone().into(),
            encoder: ReplyEncoder::new(negotiated.reply_mode),
        }
    }

    /// The client's knowledge of failures to make data durable.
    pub(super) const fn writeback(&self) -> &Arc<WritebackErrors> {
        &self.writeback
    }

    pub(super) const fn encoder(&self) -> ReplyEncoder {
        self.encoder
    }

    /// Whether the reply to a READ may contain holes.
    pub(super) fn holes_of(&self, request: &Request) -> Holes {
        dispatch::holes_of(self.encoder, request)
    }

    /// A request for the pool; the first `done` bytes of a READ are answered.
    pub(super) fn work(
        &self,
        request: Request,
        ticket: Ticket,
        payload: Vec<u8>,
        done: usize,
    ) -> PreparedRequest {
        PreparedRequest {
            export: Arc::clone(&self.export),
            contexts: Arc::clone(&self.contexts),
            encoder: self.encoder,
            request,
            ticket,
            writeback: Arc::clone(&self.writeback),
            payload,
            max_descriptors: 1,
            done,
            is_flushed_later: false,
        }
    }

    /// Carries out a request that is neither READ nor WRITE; `None` if it may have to wait.
    pub(super) fn execute_now(&self, request: &Request) -> Option<Result<(), ExportError>> {
        self.is_prompt(request).then(|| self.execute(request, &[]))
    }

    /// Carries out a WRITE; `None` if it may have to wait.
    pub(super) fn write_now(
        &self,
        request: &Request,
        payload: &[u8],
    ) -> Option<Result<(), ExportError>> {
        if self.is_prompt(request) {
            return Some(self.execute(request, payload));
        }
        dispatch::write_in_place(&*self.export, request, payload).then_some(Ok(()))
    }

    /// Reads, if that needs no waiting.
    pub(super) fn read_now(&self, offset: u64, buffer: &mut [u8], holes: Holes) -> TryRead {
        dispatch::read_in_place(&*self.export, offset, buffer, holes)
    }

    /// Maps a range; false if that may need waiting.
    pub(super) fn map_now(
        &self,
        offset: u64,
        length: usize,
        holes: Holes,
        map: &mut ReadMap,
    ) -> bool {
        dispatch::map_in_place(&*self.export, offset, length, holes, map) == Mapped::Complete
    }

    fn execute(&self, request: &Request, payload: &[u8]) -> Result<(), ExportError> {
        let result = dispatch::execute_in_place(&*self.export, &self.writeback, request, payload);
        if request.command == Command::Flush && result.is_ok() {
            self.entry.flushes().note_success();
        }
        result
    }

    fn is_prompt(&self, request: &Request) -> bool {
        let operation = match &request.command {
            Command::Write(durability) => Operation::Write(request.data_len(), *durability),
            Command::Flush => Operation::Flush,
            Command::Trim(_) => Operation::Trim,
            Command::Cache => Operation::Cache,
            Command::WriteZeroes(..) => Operation::WriteZeroes,
            Command::Read(_) | Command::BlockStatus(..) | Command::Disconnect => return false,
        };
        self.export.may_block(operation) == MayBlock::No
    }
}
