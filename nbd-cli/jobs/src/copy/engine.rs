//! Concurrent tasks that copy pieces of the disk.

use std::sync::Arc;

use tokio::task::JoinSet;

use super::crew::Crew;
use super::destination::Destination;
use super::job::Job;
use super::source::Source;
use super::stream;
use crate::error::JobError;
use crate::size::exact;
use crate::tasks;

/// Copies everything, unless the job is cancelled.
pub(crate) async fn run(job: &Arc<Job>) -> Result<(), JobError> {
    job.context.cancellation.unless_cancelled(copy(job)).await
}

async fn copy(job: &Arc<Job>) -> Result<(), JobError> {
    match (&job.source, &job.destination) {
        (Source::Standard, Destination::Standard) => stream::through(job).await,
        (Source::Standard, _) => stream::from_standard_input(job).await,
        (_, Destination::Standard) => stream::to_standard_output(job).await,
        _ => in_parallel(job).await,
    }
}

async fn in_parallel(job: &Arc<Job>) -> Result<(), JobError> {
    let size = job.source.size().unwrap_or_default();
    if !size.is_multiple_of(job.alignment) {
        return Err(JobError::destination(format!(
            "one side needs requests aligned to {} and the disk's {size} bytes are not a multiple of \
             that",
            exact(job.alignment)
        )));
    }
    job.destination.set_size(size)?;
    let mut tasks = JoinSet::new();
    let lanes = job.lanes.runtimes().len().max(1);
    let tasks_of_lane = job.requests.div_ceil(lanes);
    let crews: Vec<_> = (0..lanes).map(|_| Arc::new(Crew::new(tasks_of_lane))).collect();
    for (number, crew) in (0..job.requests).zip(crews.iter().cycle()) {
        let (job, crew) = (job.clone(), crew.clone());
        let runtime = job.lanes.runtime(number);
        let task = async move {
            if crew.join(number / lanes).await { job.copy_pieces(&crew).await } else { Ok(()) }
        };
        tasks.spawn_on(tasks::boxed(task), &runtime);
    }
    while let Some(ended) = tasks.join_next().await {
        // The first error ends the copy: dropping the set stops the other tasks.
        ended.map_err(|error| JobError::given_up("task", &error))??;
    }
    Ok(())
}
