//! The examples of the crate `nbd-jobs`, against a running server.

use std::future::Future;

use crate::support::Server;

#[allow(dead_code, reason = "its main function is not called")]
#[path = "../../jobs/examples/copy.rs"]
mod copy;

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.expect("a runtime").block_on(work)
}

fn run_copy(from: &str, to: &str) {
    let arguments = [from, to].map(ToOwned::to_owned);
    block_on(copy::run(arguments.into_iter())).expect("it is copied");
}

#[test]
fn copy_example_copies_to_a_server_and_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let (disk, back) = (folder.path().join("disk.img"), folder.path().join("back.img"));
    let content: Vec<u8> = (0..1_000_000_u32).map(|at| (at / 512 % 251) as u8).collect();
    std::fs::write(&disk, &content).expect("a disk");
    let server = Server::ours(&["memory:1000000"]);
    run_copy(disk.to_str().expect("a plain name"), server.uri());
    run_copy(server.uri(), back.to_str().expect("a plain name"));
    assert!(std::fs::read(&back).expect("the copy") == content);
    assert_eq!(folder.path().read_dir().expect("the folder").count(), 2, "nothing else is left");
}
