//! Tasks and threads whose code is in the program once.
//!
//! The runtime and the standard library have some kilobytes of code for each type of future and
//! closure that is started. In a box all of them have one type. That costs an allocation each.

use std::any::Any;
use std::io;
use std::marker::PhantomData;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::thread;

use tokio::runtime::Runtime;
use tokio::task::{JoinError, JoinHandle};

/// A future of any type.
pub type BoxedFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Hides the type of a future.
pub fn boxed<T>(future: impl Future<Output = T> + Send + 'static) -> BoxedFuture<T> {
    Box::pin(future)
}

/// Starts a task as `tokio::spawn` does.
///
/// # Panics
///
/// Outside of a runtime.
pub fn spawn<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    tokio::spawn(boxed(future))
}

/// Runs futures beside each other in this task, and passes each result to `each` when its future
/// ends. One that waits keeps no other from going on.
///
/// # Cancel safety
///
/// What is not finished is dropped; `each` has the other results.
#[cfg(feature = "server")]
pub(crate) async fn all_at_once<T>(
    futures: impl Iterator<Item = impl Future<Output = T>>,
    mut each: impl FnMut(T),
) {
    let mut waiting: Vec<_> = futures.map(Box::pin).collect();
    std::future::poll_fn(|context| {
        waiting.retain_mut(|one| match one.as_mut().poll(context) {
            Poll::Ready(result) => {
                each(result);
                false
            }
            Poll::Pending => true,
        });
        if waiting.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// Runs a future to its end on this thread, as `Runtime::block_on` does.
///
/// # Panics
///
/// In a task.
pub fn block_on<T>(runtime: &Runtime, future: impl Future<Output = T>) -> T {
    fn run(runtime: &Runtime, future: Pin<&mut dyn Future<Output = ()>>) {
        runtime.block_on(future);
    }
    let mut output = None;
    run(runtime, pin!(async { output = Some(future.await) }));
    output.expect("the future has ended")
}

/// Work on a thread that may block; the work goes on if this is dropped.
#[derive(Debug)]
pub struct BlockingTask<T> {
    task: JoinHandle<Box<dyn Any + Send>>,
    result: PhantomData<fn() -> T>,
}

impl<T: 'static> Future for BlockingTask<T> {
    type Output = Result<T, JoinError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let result = Pin::new(&mut self.task).poll(context);
        result.map_ok(|result| *result.downcast().expect("the result of this work"))
    }
}

/// Starts work that may block, as `tokio::task::spawn_blocking` does.
///
/// # Panics
///
/// Outside of a runtime.
pub fn spawn_blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> BlockingTask<T> {
    type Work = Box<dyn FnOnce() -> Box<dyn Any + Send> + Send>;
    let work: Work = Box::new(|| Box::new(work()));
    BlockingTask { task: tokio::task::spawn_blocking(work), result: PhantomData }
}

/// Starts a thread.
///
/// # Errors
///
/// The system cannot start one; the work is dropped then.
pub fn start_thread(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<thread::JoinHandle<()>> {
    let work: Box<dyn FnOnce() + Send> = Box::new(work);
    thread::Builder::new().name(name.to_owned()).spawn(work)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn blocking_work_returns_its_result_and_its_panic() {
        let text = spawn_blocking(|| "done".to_owned()).await;
        assert_eq!(text.expect("it ends"), "done");
        let failed = spawn_blocking::<()>(|| std::panic::panic_any("mistake")).await;
        let panic = failed.expect_err("it panics").into_panic();
        assert_eq!(panic.downcast_ref(), Some(&"mistake"));
    }

    #[tokio::test]
    async fn blocking_work_goes_on_without_its_future() {
        let (sender, receiver) = mpsc::channel();
        drop(spawn_blocking(move || sender.send(7)));
        let received = spawn_blocking(move || receiver.recv()).await;
        assert_eq!(received.expect("it ends"), Ok(7));
    }

    #[test]
    fn a_thread_has_its_name() {
        let (sender, receiver) = mpsc::channel();
        let name = move || sender.send(thread::current().name().map(ToOwned::to_owned));
        let thread = start_thread("worker", move || drop(name())).expect("a thread");
        thread.join().expect("it ends");
        assert_eq!(receiver.recv(), Ok(Some("worker".to_owned())));
    }
}
