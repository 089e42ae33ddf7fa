//! The example that prints captured bytes.

use nbd_proto::wire::{CommandFlags, CommandType, Cookie, RequestHeader};

#[path = "../../examples/decode.rs"]
#[allow(dead_code)] // Its main function is not called.
mod decode;

#[test]
fn a_captured_session_is_decoded_to_its_end_and_one_cut_off_is_refused() {
    let greeting = b"4e42444d41474943 49484156454f5054 0003";
    decode::decode("server", greeting).unwrap();
    let mut sent = vec![0, 0, 0, 3];
    let (command, cookie) = (CommandType::READ, Cookie(7));
    let header =
        RequestHeader { flags: CommandFlags::empty(), command, cookie, offset: 4096, length: 512 };
    header.encode_compact(&mut sent).unwrap();
    decode::decode("client", &sent).unwrap();
    decode::decode("client", &sent[..sent.len() - 1]).unwrap_err();
    decode::decode("server", &greeting[..16]).unwrap_err();
    decode::decode("nobody", greeting).unwrap_err();
}
