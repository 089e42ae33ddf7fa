//! How SeaweedFS is started, here and by the benchmark.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

/// How long it may take to start, and to answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Where it listens.
const PORTS: [&str; 8] = [
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
];

/// Returns unused ports. Another program may take one in the meantime.
pub(crate) fn free_ports<const N: usize>() -> std::io::Result<[u16; N]> {
    let mut listeners = Vec::new();
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        *port = listener.local_addr()?.port();
        listeners.push(listener);
    }
    Ok(ports)
}

/// The port of the store among these.
pub(crate) fn s3(ports: &[u16]) -> u16 {
    ports[6]
}

/// Returns the arguments for a store on loopback with its data, and the file `s3.json` with who may
/// do what, in a directory.
pub(crate) fn arguments(directory: &Path, ports: &[u16]) -> Vec<String> {
    let directory = directory.display();
    let mut arguments = vec![
        "-logtostderr".to_owned(),
        "server".to_owned(),
        format!("-dir={directory}"),
        format!("-filer.localSocket={directory}/filer"),
        format!("-s3.localSocket={directory}/s3"),
        format!("-s3.config={directory}/s3.json"),
    ];
    arguments.extend(PORTS.iter().zip(ports).map(|(name, port)| format!("-{name}={port}")));
    let others = [
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
        "-s3.iam=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-master.electionTimeout=1s",
        "-master.volumeSizeLimitMB=1024",
        // A few MiB are accepted even on a disk that is nearly full.
        "-volume.minFreeSpace=0",
        "-volume.max=100",
    ];
    arguments.extend(others.map(str::to_owned));
    arguments
}

/// Returns the sockets that a store on these ports makes and leaves behind when it ends. It has no
/// option for their directory.
pub(crate) fn sockets(ports: &[u16]) -> Vec<String> {
    let parts = ["master", "volume", "filer", "s3"];
    let of_port = |port: &u16| parts.map(|part| format!("/tmp/seaweedfs-{part}-grpc-{port}.sock"));
    ports.iter().flat_map(of_port).collect()
}

/// Makes the bucket `bucket`; returns the status: 201, or 409 if it is there.
pub(crate) fn make_bucket(ports: &[u16]) -> std::io::Result<String> {
    ask(ports[4], "POST /buckets/bucket/")
}

/// Returns whether the store answers.
pub(crate) fn answers(ports: &[u16]) -> bool {
    ask(s3(ports), "GET /").is_ok_and(|it| it.starts_with(['2', '4']))
}

/// Returns the status of a reply.
pub(crate) fn ask(port: u16, request: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "{request} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n")?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    Ok(String::from_utf8_lossy(&head[9..]).into_owned())
}
