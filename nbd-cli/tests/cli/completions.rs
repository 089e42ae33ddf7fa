//! Completion scripts, run by their shells.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::support::{Disk, PROGRAM, Server, nbd_cli, run};
use crate::tools;

#[test]
fn every_shell_gets_a_script_that_knows_the_commands() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = nbd_cli(&["completions", shell]).success();
        for command in ["serve", "info", "list-meta", "map", "copy", "tls"] {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
}

/// A server with the exports 'vm' and 'vm two', an image with bitmaps and snapshots, and the
/// scripts.
struct Lab {
    disk: Disk,
    control: String,
    image: String,
    _server: Server,
}

impl Lab {
    fn new() -> Self {
        let disk = Disk::sparse();
        let (served, image) = (disk.beside("served.qcow2"), disk.beside("image.qcow2"));
        for image in [&served, &image] {
            nbd_cli(&["image", "create", "-f", "qcow2", image, "1M"]).success();
            nbd_cli(&["bitmap", "add", image, "daily"]).success();
            nbd_cli(&["bitmap", "add", image, "weekly"]).success();
        }
        nbd_cli(&["image", "snapshot", "create", &image, "before-upgrade"]).success();
        let control = disk.beside("control");
        let (first, second) = (format!("vm={served}"), "vm two=memory:1M".to_owned());
        let server = Server::ours(&["--control", &control, &first, &second]);
        for shell in ["bash", "fish", "zsh"] {
            let script = nbd_cli(&["completions", shell]).success();
            fs::write(disk.beside(shell), script).expect("room");
        }
        Self { disk, control, image, _server: server }
    }

    /// Command lines, and the words that complete them.
    fn cases(&self) -> Vec<(String, Vec<&'static str>)> {
        let (control, image) = (&self.control, &self.image);
        vec![
            (format!("nbd-cli control {control} remove-export v"), vec!["vm", "vm two"]),
            (format!("nbd-cli control {control} bitmap-clear vm "), vec!["daily", "weekly"]),
            (format!("nbd-cli backup --control {control} --export vm --bitmap d"), vec!["daily"]),
            (format!("nbd-cli bitmap disable {image} w"), vec!["weekly"]),
            (format!("nbd-cli image snapshot apply {image} "), vec!["before-upgrade"]),
        ]
    }

    /// Runs a shell that finds the program under its name.
    fn shell(&self, program: &Path, arguments: &[&str]) -> Vec<String> {
        let directory = self.disk.beside("bin");
        let _ = fs::create_dir(&directory);
        let _ = std::os::unix::fs::symlink(PROGRAM, Path::new(&directory).join("nbd-cli"));
        let paths = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new(program);
        command.args(arguments).env("PATH", format!("{directory}:{paths}"));
        command.env("HOME", self.disk.beside("home"));
        let text = run(&mut command).success();
        text.lines().map(str::trim_end).map(ToOwned::to_owned).collect()
    }

    /// What bash offers for a command line.
    fn bash(&self, bash: &Path, line: &str) -> Vec<String> {
        let script = format!(
            "source '{}'; COMP_LINE=$1; COMP_POINT=${{#1}}; read -ra COMP_WORDS <<< \"$1\"
             [[ $1 == *' ' ]] && COMP_WORDS+=('')
             COMP_CWORD=$((${{#COMP_WORDS[@]}}-1))
             function=$(complete -p nbd-cli); function=${{function#*-F }}; function=${{function%% *}}
             \"$function\" nbd-cli \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"
             printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            self.disk.beside("bash")
        );
        self.shell(bash, &["--norc", "-c", &script, "bash", line])
    }
}

#[test]
fn bash_completes_options_commands_and_names() {
    tools!(bash = "bash");
    let lab = Lab::new();
    for (line, words) in [
        ("nbd-cli serve --read-o", "--read-only"),
        ("nbd-cli image conv", "convert"),
        ("nbd-cli list-", "list-meta"),
        ("nbd-cli image convert --output-f", "--output-format"),
    ] {
        assert_eq!(lab.bash(&bash, line), [words], "{line}");
    }
    for (line, names) in lab.cases() {
        let quoted: Vec<_> = names.iter().map(|name| name.replace(' ', "\\ ")).collect();
        assert_eq!(lab.bash(&bash, &line), quoted, "{line}");
    }
    // A word that bash splits at the colon: only the last part is completed.
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--listen", "127.0.0.1:0", "other=memory:1M"]);
    let server = Server::start(&mut command, lab.disk.beside("none").into());
    let uri = server.uri();
    let start = uri.strip_suffix("ther").expect("a URI with the name");
    let rest = uri.strip_prefix("nbd:").expect("a URI");
    let found = lab.bash(&bash, &format!("nbd-cli info {start}"));
    assert!(found.len() == 1 && rest.ends_with(&found[0]), "{found:?} is not the end of {rest}");
}

#[test]
fn fish_completes_names() {
    tools!(fish = "fish");
    let lab = Lab::new();
    fs::create_dir(lab.disk.beside("home")).expect("a directory");
    for (line, names) in lab.cases() {
        let script = format!("source '{}'; complete -C \"$argv[1]\"", lab.disk.beside("fish"));
        let found = lab.shell(&fish, &["-c", &script, &line]);
        for name in names {
            assert!(found.iter().any(|found| found.replace('\\', "") == name), "{line}: {found:?}");
        }
    }
}

#[test]
fn zsh_completes_names() {
    tools!(zsh = "zsh");
    let lab = Lab::new();
    for (line, names) in lab.cases() {
        let script = format!(
            "compdef() {{ : }}; source '{}'
             compadd() {{ shift; print -l -- \"$@\" }}
             words=(${{(z)1}}); [[ $1 == *' ' ]] && words+=(''); CURRENT=$#words; _nbd-cli",
            lab.disk.beside("zsh")
        );
        let found = lab.shell(&zsh, &["-fc", &script, "zsh", &line]);
        assert_eq!(found, names, "{line}");
    }
}

#[test]
fn completion_gives_up_on_servers_that_do_not_answer() {
    let disk = Disk::sparse();
    let socket = disk.beside("deaf");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    let words = ["completions", "--", "nbd-cli", "control", &socket, "remove-export", ""];
    assert_eq!(nbd_cli(&words).success(), "");
    for words in [&["nbd-cli", "bitmap", "clear", "/nonexistent", ""][..], &["nbd-cli"], &[""]] {
        assert_eq!(nbd_cli(&[&["completions", "--"], words].concat()).success(), "");
    }
}
