//! Copies from standard input and to standard output, front to back.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::sync::Arc;

use bytes::Bytes;
use nbd_client::{ReadChunk, ReadMemory};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use super::content::Content;
use super::job::Job;
use super::plan::PlannedRange;
use crate::error::{JobError, JobErrorKind};
use crate::tasks;

/// Reads standard input to its end; the writes go on in parallel.
pub(super) async fn from_standard_input(job: &Arc<Job>) -> Result<(), JobError> {
    let room = job.destination.room()?;
    let permits = Arc::new(Semaphore::new(job.requests));
    let mut tasks: JoinSet<Result<(), JobError>> = JoinSet::new();
    let mut offset: u64 = 0;
    loop {
        let data = read_standard_input(job.request_size).await?;
        if data.is_empty() {
            break;
        }
        let length = data.len() as u64;
        job.context.keep_rate(length).await;
        if room.is_some_and(|room| offset.saturating_add(length) > room) {
            return Err(JobError::destination(format!(
                "standard input has more than the {} bytes that fit",
                room.unwrap_or_default()
            )));
        }
        job.sum_data(offset, &data, 1).await?;
        let permit = permits.clone().acquire_owned().await;
        let job = job.clone();
        tasks.spawn(tasks::boxed(async move {
            let stored = job.store(offset, &data).await;
            job.meter.add(length, 0);
            drop(permit);
            stored
        }));
        while let Some(ended) = tasks.try_join_next() {
            flatten(ended)?;
        }
        offset += length;
    }
    while let Some(ended) = tasks.join_next().await {
        flatten(ended)?;
    }
    job.destination.set_size(offset)
}

/// Writes standard output in order; the reads run ahead.
pub(super) async fn to_standard_output(job: &Arc<Job>) -> Result<(), JobError> {
    let zeroes = Bytes::from(vec![0; job.request_size]);
    let mut ahead: VecDeque<Ahead> = VecDeque::new();
    let mut more = true;
    loop {
        while more && ahead.len() < job.requests {
            match job.next_range().await? {
                Some(range) => ahead.push_back(Ahead::start(job, range)),
                None => more = false,
            }
        }
        match ahead.pop_front() {
            None => return Ok(()),
            Some(Ahead::Zero(offset, length)) => {
                write_zeroes(job, &zeroes, (offset, length)).await?;
            }
            Some(Ahead::Data(reading)) => {
                for chunk in flatten(reading.await)? {
                    match chunk {
                        ReadChunk::Hole { offset, length } => {
                            write_zeroes(job, &zeroes, (offset, length)).await?;
                        }
                        ReadChunk::Data { offset, data } => {
                            job.sum_data(offset, &data, 1).await?;
                            let length = data.len() as u64;
                            write_standard_output(data).await?;
                            job.meter.add(length, 0);
                        }
                    }
                }
            }
        }
    }
}

async fn write_zeroes(
    job: &Job,
    zeroes: &Bytes,
    (offset, mut length): (u64, u64),
) -> Result<(), JobError> {
    job.sum_zeroes(offset, length).await?;
    while length > 0 {
        let part = length.min(zeroes.len() as u64);
        write_standard_output(zeroes.slice(..part as usize)).await?;
        job.meter.add(part, part);
        length -= part;
    }
    Ok(())
}

/// From standard input to standard output.
pub(super) async fn through(job: &Arc<Job>) -> Result<(), JobError> {
    let mut offset = 0;
    loop {
        let data = read_standard_input(job.request_size).await?;
        if data.is_empty() {
            return Ok(());
        }
        job.context.keep_rate(data.len() as u64).await;
        job.sum_data(offset, &data, 1).await?;
        offset += data.len() as u64;
        job.meter.add(data.len() as u64, 0);
        write_standard_output(data).await?;
    }
}

/// A range out of order.
enum Ahead {
    /// The offset and the length.
    Zero(u64, u64),
    Data(JoinHandle<Result<Vec<ReadChunk>, JobError>>),
}

impl Ahead {
    fn start(job: &Arc<Job>, range: PlannedRange) -> Self {
        match range.content {
            Content::Zero => Self::Zero(range.offset, range.length),
            Content::Data | Content::Unchanged => {
                let job = job.clone();
                let read = async move {
                    job.context.keep_rate(range.length).await;
                    job.source.read_chunks(range.offset, range.length, &ReadMemory::default()).await
                };
                Self::Data(tasks::spawn(read))
            }
        }
    }
}

fn flatten<T>(ended: Result<Result<T, JobError>, tokio::task::JoinError>) -> Result<T, JobError> {
    ended.map_err(|error| JobError::given_up("task", &error))?
}

/// Reads `length` bytes, or fewer at the end of the input.
async fn read_standard_input(length: usize) -> Result<Bytes, JobError> {
    let read = move || -> io::Result<Vec<u8>> {
        let mut data = Vec::with_capacity(length);
        let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        input.take(length as u64).read_to_end(&mut data)?;
        Ok(data)
    };
    match tasks::spawn_blocking(read).await {
        Ok(Ok(data)) => Ok(data.into()),
        Ok(Err(error)) => {
            Err(JobError::source(format!("cannot read from standard input: {error}")))
        }
        Err(error) => Err(JobError::given_up("read", &error)),
    }
}

async fn write_standard_output(data: Bytes) -> Result<(), JobError> {
    // Bypasses the line buffer of the standard library.
    let write = move || -> io::Result<()> {
        File::from(io::stdout().as_fd().try_clone_to_owned()?).write_all(&data)
    };
    match tasks::spawn_blocking(write).await {
        Ok(result) => result.map_err(|error| output_error(&error)),
        Err(error) => Err(JobError::given_up("write", &error)),
    }
}

fn output_error(error: &io::Error) -> JobError {
    let kind = match error.kind() {
        io::ErrorKind::BrokenPipe => JobErrorKind::OutputClosed,
        _ => JobErrorKind::Destination,
    };
    JobError::new(kind, format!("cannot write to standard output: {error}"))
}
