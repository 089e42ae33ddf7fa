//! SIGINT, SIGTERM and SIGHUP end the benchmark: it stops its servers and removes its directory,
//! which holds gigabytes.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

use super::{ending, process, running};

/// Installs a handler that cleans up and ends the program on a signal.
///
/// # Errors
///
/// Signals cannot be caught.
pub(crate) fn clean_up_on_signals(directory: &Path) -> Result<()> {
    let directory = directory.to_owned();
    let (ready, is_ready) = mpsc::channel();
    thread::spawn(move || match wait_for_signal(&ready) {
        Ok(number) => {
            ending::begin();
            eprintln!("bench: ended by signal {number}; cleaning up");
            clean_up(&directory);
            std::process::exit(128 + number);
        }
        Err(error) => drop(ready.send(Err(error))),
    });
    is_ready.recv().context("the thread for signals ended")?.context("cannot catch signals")
}

/// Reports through `ready` when signals are caught, and returns the number of the first one.
fn wait_for_signal(ready: &mpsc::Sender<io::Result<()>>) -> io::Result<i32> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        // The caller waits for this message.
        drop(ready.send(Ok(())));
        let kind = tokio::select! {
            _ = interrupt.recv() => SignalKind::interrupt(),
            _ = terminate.recv() => SignalKind::terminate(),
            _ = hangup.recv() => SignalKind::hangup(),
        };
        Ok(kind.as_raw_value())
    })
}

/// Ends all descendants and the daemons that left their process ids in the directory, then removes
/// it, and the sockets elsewhere that are listed in it.
fn clean_up(directory: &Path) {
    // The other thread may have started one more in the meantime.
    let mut started = daemons(directory);
    for _ in 0..2 {
        started.extend(process::descendants(std::process::id()));
        running::end_all(&started);
        started.clear();
        remove_files(directory);
    }
}

/// Removes the directory and the sockets that are listed in it.
fn remove_files(directory: &Path) {
    files(directory, "sockets").iter().for_each(|list| remove_listed(list));
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            eprintln!("bench: cannot remove {}: {error}", directory.display());
        }
        _ => {}
    }
}

/// Removes the files whose paths are the lines of another one, and that one.
pub(crate) fn remove_listed(list: &Path) {
    let paths = fs::read_to_string(list).unwrap_or_default();
    for path in paths.lines().map(Path::new).chain([list]) {
        // Not all of them need exist.
        drop(fs::remove_file(path));
    }
}

/// The processes whose ids are in files `*.pid` of the directory.
fn daemons(directory: &Path) -> Vec<u32> {
    let files = files(directory, "pid");
    files.iter().filter_map(|path| running::read_process_id(path)).collect()
}

/// The files of the directory with this extension.
fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths.filter(|path| path.extension() == Some(OsStr::new(extension))).collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn sockets_of_a_store_outside_of_the_directory_are_removed_with_it() {
        let outside = tempfile::tempdir().expect("temporary directory");
        let directory = tempfile::tempdir().expect("temporary directory").keep();
        let sockets = ["a.sock", "b.sock"].map(|name| outside.path().join(name));
        let _bound = std::os::unix::net::UnixListener::bind(&sockets[0]).expect("a socket");
        let list = sockets.map(|path| path.display().to_string()).join("\n");
        fs::write(directory.join("store.sockets"), list).expect("room");
        remove_files(&directory);
        assert!(!directory.exists());
        assert_eq!(fs::read_dir(outside.path()).expect("a directory").count(), 0);
    }

    #[test]
    fn a_directory_is_removed_and_the_daemon_of_its_pid_file_ended() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.keep();
        // A child of a shell that has ended: no descendant of ours any more.
        let pid_file = path.join("server.pid");
        let script = format!("sleep 600 & echo $! > {}", pid_file.display());
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).stdout(Stdio::null());
        assert!(shell.status().expect("sh starts").success());
        let daemon = running::read_process_id(&pid_file).expect("its id");
        assert!(running::is_alive(daemon));
        assert_eq!(daemons(&path), [daemon]);
        running::end_all(&[daemon]);
        assert!(!running::is_alive(daemon));
        fs::remove_dir_all(&path).expect("it is there");
    }
}
