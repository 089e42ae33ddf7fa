//! An export with a flaw.

use nbd_proto::transmission::{Command, Durability, ExtentLimit, Fragmentation};
use nbd_proto::wire::{Errno, MetaContextName};
use nbd_server::export::MayBlock;

use crate::support::{Client, MODES, Script, Scripted, TestServer};
use nbd_proto::wire::ReplyMode;

#[test]
fn a_request_that_panics_is_answered_with_eio_and_the_connection_lives() {
    for prompt in [MayBlock::Yes, MayBlock::No] {
        let script = Script { panics: Some(0..512), prompt: Some(prompt), ..Script::default() };
        let server = TestServer::with(Default::default(), Scripted::new(4 << 20, script));
        for mode in MODES {
            let contexts = [MetaContextName::base_allocation()];
            let mut client = Client::open(&server, mode, "", &contexts);
            let mut commands = vec![
                (4096, Command::Read(Fragmentation::Allowed)),
                (1 << 20, Command::Read(Fragmentation::Allowed)),
                (4096, Command::Trim(Durability::Cached)),
                (4096, Command::Cache),
            ];
            if mode != ReplyMode::Simple {
                commands.push((4096, Command::BlockStatus(ExtentLimit::Many, None)));
            }
            for (length, command) in commands {
                let error = client.request(0, length, &command).result.unwrap_err();
                assert_eq!(error.errno, Errno::EIO, "{command:?} {mode:?} {prompt:?}");
            }
            for length in [10, 4096, 70_000, 1 << 20] {
                let error = client.write(0, &vec![1; length]).unwrap_err();
                assert_eq!(error.errno, Errno::EIO, "WRITE of {length} {mode:?} {prompt:?}");
            }
            assert_eq!(client.write(4096, &[5; 100]), Ok(()));
            assert_eq!(client.read(4096, 100), [5; 100]);
        }
    }
}
