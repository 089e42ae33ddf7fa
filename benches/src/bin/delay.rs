//! A proxy that holds back the first byte of each reply, as if the server were far away: `delay
//! LISTEN SERVER MILLISECONDS`, with addresses such as 127.0.0.1:9000. It runs until it is killed.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// Bytes that are moved at a time.
const PIECE: usize = 256 << 10;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match &arguments[..] {
        [listen, server, delay] => match delay.parse() {
            Ok(delay) => run(listen, server, Duration::from_millis(delay)),
            Err(_) => Err(io::Error::other("the delay is not a number of milliseconds")),
        },
        _ => Err(io::Error::other("usage: delay LISTEN SERVER MILLISECONDS")),
    };
    if let Err(error) = result {
        eprintln!("delay: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn run(listen: &str, server: &str, delay: Duration) -> io::Result<()> {
    for client in TcpListener::bind(listen)?.incoming() {
        let (client, server) = (client?, TcpStream::connect(server)?);
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
        }
        // Whether the next bytes of the server begin a reply.
        let is_asked = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&is_asked);
        let (from, to) = (client.try_clone()?, server.try_clone()?);
        thread::spawn(move || relay(from, to, || asked.store(true, Ordering::Release)));
        thread::spawn(move || {
            relay(server, client, || {
                if is_asked.swap(false, Ordering::AcqRel) {
                    thread::sleep(delay);
                }
            });
        });
    }
    Ok(())
}

/// Moves bytes until one of the ends closes; `arrived` is called before a piece is passed on.
fn relay(mut from: TcpStream, mut to: TcpStream, arrived: impl Fn()) {
    let mut piece = vec![0; PIECE];
    while let Ok(length) = from.read(&mut piece) {
        if length == 0 {
            break;
        }
        arrived();
        if to.write_all(&piece[..length]).is_err() {
            break;
        }
    }
    // The other direction ends as well.
    drop(to.shutdown(Shutdown::Write));
    drop(from.shutdown(Shutdown::Read));
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn each_reply_is_late_and_whole() {
        let server = TcpListener::bind("127.0.0.1:0").expect("a port");
        let proxy = TcpListener::bind("127.0.0.1:0").expect("a port");
        let (to, listen) = (server.local_addr(), proxy.local_addr().expect("an address"));
        drop(proxy);
        thread::spawn(move || {
            let (mut stream, _) = server.accept().expect("a client");
            let mut request = [0; 4];
            while stream.read_exact(&mut request).is_ok() {
                stream.write_all(&vec![request[0]; 1 << 20]).expect("a client that reads");
            }
        });
        let (listen, to) = (listen.to_string(), to.expect("an address").to_string());
        let address = listen.clone();
        thread::spawn(move || run(&listen, &to, Duration::from_millis(30)));
        let mut client = loop {
            if let Ok(client) = TcpStream::connect(&address) {
                break client;
            }
            thread::sleep(Duration::from_millis(1));
        };
        for request in [b"aaaa", b"bbbb"] {
            let start = Instant::now();
            client.write_all(request).expect("sent");
            let mut reply = vec![0; 1 << 20];
            client.read_exact(&mut reply).expect("a reply");
            assert!(reply.iter().all(|byte| *byte == request[0]));
            assert!(start.elapsed() >= Duration::from_millis(30));
        }
    }
}
