//! `bench`: what it measures, and what it refuses.

use crate::support::{Disk, PROGRAM, Server, nbd_cli, run, says};
use crate::tools;

/// Runs `bench` with `--json` and gives the report.
#[track_caller]
fn report(uri: &str, arguments: &[&str]) -> serde_json::Value {
    let text = nbd_cli(&[&["bench", "--json", uri], arguments].concat()).success();
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn every_workload_is_made_as_often_as_asked_and_counted_by_kind() {
    let server = Server::ours(&["memory:4M"]);
    for (workload, kind) in
        [("read", "read"), ("write", "write"), ("zeroes", "zeroes"), ("trim", "trim")]
    {
        let arguments = ["-w", workload, "--requests", "500", "--destroy-data", "-b", "8K"];
        let report = report(server.uri(), &arguments);
        assert_eq!(report[kind]["requests"], 500, "{report}");
        assert_eq!(report["bytes"], 500 * 8192, "{report}");
        let latency = &report[kind]["latency"];
        let at = |name: &str| latency[name].as_f64().expect("microseconds");
        let ascending = ["min", "p50", "p90", "p95", "p99", "p99.9", "p99.99", "max"].map(at);
        assert!(ascending[0] > 0.0 && ascending.is_sorted(), "{latency}");
        assert!(report["client-cpu"]["us-per-request"].as_f64().expect("CPU time") > 0.0);
    }
    let arguments = ["-w", "mixed", "--read-percent", "50", "--requests", "1000", "--destroy-data"];
    let arguments = [&arguments[..], &["--flush-every", "10", "--fua", "-C", "2"]].concat();
    let report = report(server.uri(), &arguments);
    let count = |kind: &str| report[kind]["requests"].as_u64().expect("a number");
    assert_eq!(count("read") + count("write"), 1000, "{report}");
    assert!((300..700).contains(&count("read")), "{report}");
    // On two connections.
    assert!((count("write") / 10).abs_diff(count("flush")) <= 2, "{report}");
}

#[test]
fn time_rate_and_warm_up_are_kept() {
    let server = Server::ours(&["memory:1M"]);
    for connections in [1, MANY] {
        let arguments = ["--duration", "600ms", "--rate", "500", "--warm-up", "300ms", "-d", "4"];
        let count = connections.to_string();
        let arguments = [&arguments[..], &["-C", &count]].concat();
        let report = report(server.uri(), &arguments);
        let seconds = report["seconds"].as_f64().expect("time");
        let requests = report["requests"].as_u64().expect("count");
        assert!(seconds >= 0.6, "{report}");
        let most = 500.0 * seconds + 8.0 * connections as f64;
        assert!(requests > 0 && requests as f64 <= most, "{report}");
    }
}

/// Connections that share threads, unless the machine has half as many cores.
const MANY: usize = 40;

#[test]
fn connections_that_share_threads_make_their_parts_of_the_load() {
    let server = Server::ours(&["memory:64M"]);
    let connections = MANY.to_string();
    let arguments = ["-w", "mixed", "--requests", "20000", "--destroy-data", "-C", &connections];
    let report =
        report(server.uri(), &[&arguments[..], &["-b", "4K:9,256K:1", "-d", "8"]].concat());
    assert_eq!(report["requests"], 20_000, "{report}");
}

#[test]
fn cpu_time_of_a_server_on_a_unix_socket_is_measured() {
    let server = Server::ours(&["memory:1M"]);
    let report = report(server.uri(), &["--requests", "20000"]);
    assert_eq!(report["server-cpu"]["pid"], server.pid(), "{report}");
    says(
        nbd_cli(&["bench", "--requests", "1", "--server-pid", "4294967295", server.uri()]),
        &["there is no process 4294967295", "--server-pid"],
    );
}

#[test]
fn the_same_seed_makes_the_same_requests() {
    tools!(nbdkit = "nbdkit");
    let directory = Disk::sparse();
    let offsets = |name: &str, seed: &str| {
        let log = directory.beside(name);
        let logged = format!("logfile={log}");
        let server = Server::nbdkit(&nbdkit, &["--filter=log", "memory", "1M", &logged]);
        let arguments = ["bench", "--requests", "50", "-d", "1", "--zipf", "1.1", "--seed", seed];
        nbd_cli(&[&arguments[..], &[server.uri()]].concat()).success();
        drop(server);
        let text = std::fs::read_to_string(log).expect("the log");
        let reads = text.lines().filter(|line| line.contains(" Read "));
        let offsets: Vec<_> = reads
            .filter_map(|line| line.split_once("offset=").map(|(_, rest)| rest.to_owned()))
            .map(|rest| rest.split(' ').next().unwrap_or_default().to_owned())
            .collect();
        offsets
    };
    let first = offsets("first.log", "7");
    assert!(!first.is_empty(), "nbdkit logs reads");
    assert_eq!(first, offsets("second.log", "7"));
    assert_ne!(first, offsets("third.log", "8"));
}

#[test]
fn other_servers_and_every_form_of_replies_are_understood() {
    tools!(nbdkit = "nbdkit", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let ours = Server::ours(&["--read-only", disk.path()]);
    let file = format!("file={}", disk.path());
    let nbdkit = Server::nbdkit(&nbdkit, &["file", &file]);
    let qemu = Server::qemu_nbd(&qemu_nbd, "disk", &["-f", "raw", "-r", disk.path()]);
    for server in [&ours, &nbdkit, &qemu] {
        for replies in ["simple", "structured", "extended"] {
            let arguments = ["--requests", "300", "-b", "4K:3,256K:1", "--replies", replies];
            let report = report(server.uri(), &arguments);
            assert_eq!(report["read"]["requests"], 300, "{report}");
        }
    }
}

#[test]
fn data_is_not_overwritten_unless_that_is_said() {
    let disk = Disk::sparse();
    let server = Server::ours(&[disk.path()]);
    for workload in ["write", "mixed", "zeroes", "trim"] {
        let arguments = ["bench", "--requests", "10", "-w", workload, server.uri()];
        says(nbd_cli(&arguments), &["overwrites the data", "--destroy-data"]);
    }
    nbd_cli(&["bench", "--requests", "10", server.uri()]).success();
    server.end();
    disk.assert_equals(disk.path());
}

#[test]
fn what_the_export_cannot_do_or_does_not_have_is_refused() {
    let server = Server::ours(&["--read-only", "memory:1M"]);
    let uri = server.uri();
    let destroy = "--destroy-data";
    for (arguments, parts) in [
        (&["-w", "write", destroy][..], &["is read-only", "--workload read"][..]),
        (&["--range", "1M+4K"], &["does not fit in the disk of 1048576 bytes", "--range"]),
        (&["-b", "2M"], &["too small", "--range"]),
        (&["-b", "1000"], &["--block-size 1000", "multiples of 512"]),
        (&["--zipf", "0"], &["--zipf 0", "more than 0"]),
        (&["--verify"], &["--workload write"]),
        (&["--verify-only"], &["--verify-state FILE", "--seed"]),
        (&["--verify-state", "x"], &["--verify", "--verify-only"]),
        (&["--fua"], &["--fua", "--workload"]),
        (&["--read-percent", "5"], &["--workload mixed"]),
        (&["--progress=1"], &["does not report percents", "--progress without"]),
        (&["-C", "257"], &["--connections is limited to 256"]),
    ] {
        says(nbd_cli(&[&["bench", uri], arguments].concat()), parts);
    }
    says(nbd_cli(&["bench", &server.uri_of("nothing")]), &["no export named 'nothing'"]);
}

#[test]
fn server_that_fails_is_named_with_the_place() {
    tools!(nbdkit = "nbdkit");
    let filter = ["--filter=error", "memory", "8M", "error-pread=EIO", "error-pread-rate=100%"];
    let server = Server::nbdkit(&nbdkit, &filter);
    let outcome = nbd_cli(&["bench", "--duration", "10s", server.uri()]);
    says(outcome, &["cannot read 4096 bytes at offset", server.uri(), "EIO"]);
}

#[test]
fn text_has_a_line_for_each_kind_and_progress_a_line_a_second() {
    let server = Server::ours(&["memory:1M"]);
    let arguments = ["bench", "--duration", "2500ms", "--progress", server.uri()];
    let outcome = run(std::process::Command::new(PROGRAM).args(arguments));
    let shown = outcome.stderr.lines().filter(|line| line.contains("requests/s")).count();
    assert!(shown >= 1, "{outcome:?}");
    let text = outcome.success();
    assert!(text.lines().any(|line| line.starts_with("read ")), "{text}");
    assert!(text.contains("CPU time of a request: ") && text.contains("seed "), "{text}");
}

#[test]
fn interrupted_load_still_has_its_report() {
    let server = Server::ours(&["memory:1M"]);
    let mut command = std::process::Command::new(PROGRAM);
    command.args(["bench", "--duration", "5m", "--json", "--progress", server.uri()]);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = command.spawn().expect("nbd-cli");
    let mut said = std::io::BufReader::new(child.stderr.take().expect("piped"));
    let mut line = String::new();
    std::io::BufRead::read_line(&mut said, &mut line).expect("a line a second");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it runs");
    let output = child.wait_with_output().expect("its end");
    assert_eq!(output.status.code(), Some(130));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(report["interrupted"] == true && report["requests"].as_u64() > Some(0), "{report}");
}

#[test]
fn load_goes_through_tls() {
    use crate::support::tls::{Certificates, TlsServer};
    let Some(certificates) = Certificates::any() else { return };
    let good = certificates.good();
    let directory = good.to_str().expect("a plain name");
    let server = TlsServer::start(&["--tls-certificates", directory]);
    let uri = server.server.uri().to_owned();
    let arguments = ["--requests", "2000", "-b", "4K,64K", "--tls-certificates", directory];
    let arguments = [&arguments[..], &["--tls-hostname", "localhost", "--tls", "require"]].concat();
    let verify = ["-w", "mixed", "--verify", "--destroy-data"];
    let report = report(&uri, &[&arguments[..], &verify].concat());
    assert!(report["verify"]["bad-blocks"] == 0, "{report}");
    assert!(report["verify"]["good-blocks"].as_u64() > Some(0), "{report}");
}
