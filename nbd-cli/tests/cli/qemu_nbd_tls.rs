//! The qemu-nbd form with TLS objects, beside QEMU's own in both roles.

use std::process::Command;

use crate::support::qemu_nbd::{Foreground, ours};
use crate::support::tls::Certificates;
use crate::support::{Disk, Outcome, peer, run};
use crate::tools;

/// The distinguished name of the client whose certificate is in the good directory, with the commas
/// as they stand in an option.
const ALICE: &str = "CN=alice,,O=Example";

/// What `-L` says, with the credentials of a directory and the expected name of the server.
fn list(mut program: Command, server: &Foreground, directory: &str) -> Outcome {
    let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={directory}");
    program.args(["--object", &object, "--tls-creds", "tls0", "--tls-hostname", "localhost"]);
    run(program.args(["-L", "-k", server.socket()]))
}

#[test]
fn each_lists_the_other_over_tls_and_only_with_a_certificate() {
    tools!(theirs = "qemu-nbd");
    let Some(certificates) = Certificates::any() else { return };
    let disk = Disk::sparse();
    let (good, nobody) = (certificates.good(), certificates.nobody());
    let (good, nobody) = (good.display().to_string(), nobody.display().to_string());
    let object = format!("tls-creds-x509,id=tls0,endpoint=server,dir={good}");
    let arguments =
        ["--object", &object, "--tls-creds=tls0", "-t", "-e5", "-f", "raw", "-r", disk.path()];
    for server in [Command::new(&theirs), ours()] {
        let server = Foreground::start(server, &arguments);
        for client in [|| Command::new("qemu-nbd"), ours] {
            let said = list(client(), &server, &good).success();
            assert!(said.contains("exports available: 1\n export: ''\n  size:  8388608"), "{said}");
            assert_eq!(list(client(), &server, &nobody).code, Some(1), "{}", server.complaints());
            let plain = run(client().args(["-L", "-k", server.socket()]));
            assert_eq!(plain.code, Some(1), "in the clear: {plain:?}");
        }
    }
}

#[test]
fn the_lists_of_names_decide_who_may_connect() {
    let Some(certificates) = Certificates::any() else { return };
    let disk = Disk::sparse();
    let good = certificates.good().display().to_string();
    let rules = disk.beside("rules.json");
    let json = r#"{"policy": "deny", "rules": [{"match": "CN=ali*", "format": "glob",
                   "policy": "allow"}]}"#;
    std::fs::write(&rules, json).expect("room");
    let credentials = format!("tls-creds-x509,id=tls0,endpoint=server,dir={good}");
    for (object, may) in [
        (format!("authz-simple,id=auth0,identity={ALICE}"), true),
        ("authz-simple,id=auth0,identity=CN=al*".to_owned(), false),
        ("authz-simple,id=auth0,identity=CN=bob,,O=Example".to_owned(), false),
        (format!("authz-list,id=auth0,rules.0.match={ALICE},rules.0.policy=allow"), true),
        (
            format!("authz-list,id=auth0,policy=allow,rules.0.match={ALICE},rules.0.policy=deny"),
            false,
        ),
        ("authz-list,id=auth0,policy=allow".to_owned(), true),
        (
            "authz-list,id=auth0,rules.0.match=CN=a*,rules.0.policy=allow,rules.0.format=glob"
                .to_owned(),
            true,
        ),
        (format!("authz-list-file,id=auth0,filename={rules}"), true),
    ] {
        let arguments = [
            ["--object", &credentials, "--tls-creds", "tls0"],
            ["--object", &object, "--tls-authz", "auth0"],
            ["-t", "-r", "-fraw", disk.path()],
        ];
        let server = Foreground::start(ours(), &arguments.concat());
        let outcome = list(ours(), &server, &good);
        assert_eq!(outcome.code, Some(if may { 0 } else { 1 }), "{object}: {outcome:?}");
    }
}

#[test]
fn pre_shared_keys_are_found_by_the_name_of_the_user() {
    tools!(theirs = "qemu-nbd", psktool = "psktool");
    let disk = Disk::sparse();
    let directory = disk.beside("keys");
    std::fs::create_dir(&directory).expect("a directory");
    let keys = format!("{directory}/keys.psk");
    peer(&psktool, &["-u", "alice", "-p", &keys]);
    peer(&psktool, &["-u", "qemu", "-p", &keys]);
    let object = format!("tls-creds-psk,id=tls0,endpoint=server,dir={directory}");
    let arguments = ["--object", &object, "--tls-creds", "tls0", "-te0", "-fraw", disk.path()];
    let server = Foreground::start(ours(), &arguments);
    for (client, user, code) in [
        (Command::new(&theirs), ",username=alice", 0),
        (ours(), ",username=alice", 0),
        (Command::new(&theirs), "", 0),
        (ours(), "", 0),
        (ours(), ",username=bob", 1),
    ] {
        let mut client = client;
        let object = format!("tls-creds-psk,id=tls0,endpoint=client,dir={directory}{user}");
        client.args(["--object", &object, "--tls-creds", "tls0", "-L", "-k", server.socket()]);
        let outcome = run(&mut client);
        assert_eq!(outcome.code, Some(code), "{user}: {outcome:?}");
    }
}

#[test]
fn credentials_that_cannot_be_used_are_named() {
    let disk = Disk::sparse();
    let directory = disk.beside("none");
    for (objects, part) in [
        (&["tls-creds-x509,id=tls0,endpoint=server,dir=DIRECTORY"][..], "DIRECTORY"),
        (&["tls-creds-psk,id=tls0,endpoint=server,dir=DIRECTORY"], "DIRECTORY/keys.psk"),
        (&["tls-creds-x509,id=tls0,endpoint=client,dir=DIRECTORY"], "endpoint=server"),
        (
            &[
                "secret,id=sec0,data=letmein",
                "tls-creds-x509,id=tls0,endpoint=server,dir=DIRECTORY,passwordid=sec0",
            ],
            "DIRECTORY",
        ),
        (&["tls-creds-x509,id=tls0,endpoint=server,dir=DIRECTORY,passwordid=sec0"], "sec0"),
    ] {
        let mut command = ours();
        for object in objects {
            command.args(["--object", &object.replace("DIRECTORY", &directory)]);
        }
        let refused = run(command.args(["--tls-creds", "tls0", disk.path()]));
        assert_eq!(refused.code, Some(1));
        let part = part.replace("DIRECTORY", &directory);
        assert!(refused.stderr.contains(&part), "{part}: {refused:?}");
    }
}
