//! System calls without a safe wrapper: the low-water mark of sockets.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

/// Sets how many bytes have to come before a socket is readable. Its end and its errors are
/// readable at once.
pub(crate) fn set_low_water_mark(socket: impl AsFd, bytes: i32) -> io::Result<()> {
    let socket = socket.as_fd().as_raw_fd();
    let length = libc::socklen_t::try_from(size_of_val(&bytes)).unwrap_or_default();
    // SAFETY: the socket is open, and the kernel reads `length` bytes of `bytes`, which lives across
    // the call.
    let outcome = unsafe {
        let value = (&raw const bytes).cast();
        libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, length)
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};

    use rustix::net::sockopt;

    use super::*;

    #[test]
    fn mark_of_a_socket_is_set_and_other_files_have_none() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        set_low_water_mark(&other, 4096).unwrap();
        one.write_all(b"a").unwrap();
        drop(one);
        assert!(sockopt::socket_recv_buffer_size(&other).unwrap() > 4096);
        assert!(set_low_water_mark(std::fs::File::open("/dev/null").unwrap(), 1).is_err());
    }
}
