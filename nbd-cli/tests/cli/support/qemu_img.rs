//! Runs the qemu-img form beside QEMU's own qemu-img: the same command lines in two directories
//! with the same files. A case is a line: commands between semicolons, then, after `=>`, the images
//! that are compared afterwards. Exit codes and standard output must be the same; of standard
//! output only the space that files take on disk and times are left out, and progress must begin at
//! 0 % and end at 100 %.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use serde_json::Value;

use super::{Outcome, PROGRAM, run};
use crate::tools;

/// The files that every case finds, each made by these commands of QEMU.
const FILES: &[&str] = &[
    "qemu-img create -q -f raw raw.img 1M",
    "qemu-io -f raw -c write_-P_7_128k_200k -c write_-P_1_900k_4k raw.img",
    "qemu-img create -q -f raw odd.img 1000",
    "qemu-img create -q -f raw empty.img 1M",
    "qemu-img create -q -f raw big.img 2M",
    "qemu-img create -q -f qcow2 disk.qcow2 1M",
    "qemu-io -c write_-P_7_0_128k -c write_-z_256k_64k -c write_-P_5_512k_3k disk.qcow2",
    "qemu-img create -q -f qcow2 -o cluster_size=4k,compat=0.10 old.qcow2 1M",
    "qemu-io -c write_-P_7_0_128k old.qcow2",
    "qemu-img create -q -f qcow2 -b disk.qcow2 -F qcow2 top.qcow2",
    "qemu-io -c write_-P_9_64k_64k -c write_-z_512k_64k top.qcow2",
    "qemu-img create -q -f qcow2 -b raw.img -F raw -o lazy_refcounts=on longer.qcow2 3M",
    "qemu-io -c write_-P_9_2M_64k longer.qcow2",
    "qemu-img create -q -f qcow2 snap.qcow2 1M",
    "qemu-io -c write_-P_1_0_64k snap.qcow2",
    "qemu-img snapshot -c first snap.qcow2",
    "qemu-io -c write_-P_2_0_128k snap.qcow2",
    "qemu-img snapshot -c second snap.qcow2",
    "qemu-img create -q -f qcow2 crossed.qcow2 1M",
    "qemu-io -c write_-P_1_0_64k crossed.qcow2",
    "qemu-img snapshot -c 2 crossed.qcow2",
    "qemu-io -c write_-P_2_0_64k crossed.qcow2",
    "qemu-img snapshot -c 1 crossed.qcow2",
    "qemu-io -c write_-P_3_0_64k crossed.qcow2",
    "qemu-img create -q -f qcow2 bitmaps.qcow2 1M",
    "qemu-img bitmap --add bitmaps.qcow2 b0",
    "qemu-img bitmap --add --disable -g 32k bitmaps.qcow2 b1",
    "qemu-io -c write_-P_2_0_128k bitmaps.qcow2",
    "qemu-img create -q -f qcow2 -o data_file=data.raw,data_file_raw=on data.qcow2 1M",
    "qemu-img convert -q -c -O qcow2 disk.qcow2 packed.qcow2",
    "qemu-img create -q -f qcow2 -o extended_l2=on,compression_type=zstd,refcount_bits=8 sub.qcow2 1M",
    "qemu-img create -q -f qcow2 -u -b nosuch.img -F raw orphan.qcow2 1M",
    "qemu-img create -q --object secret,id=s,data=x -f luks -o key-secret=s,iter-time=10 a.luks 1M",
    "qemu-img create -q --object secret,id=s,data=x -f qcow2 \
     -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 locked.qcow2 1M",
    "qemu-io --object secret,id=s,data=x -c write_-P_7_0_128k --image-opts \
     driver=qcow2,encrypt.key-secret=s,file.filename=locked.qcow2",
    "qemu-img create -q -f vmdk sparse.vmdk 1M",
    "qemu-img create -q -f raw parts.img 4M",
    "qemu-io -f raw -c write_-P_170_0_4M parts.img",
    "qemu-img convert -q -n -f raw --target-image-opts disk.qcow2 \
     driver=raw,offset=1536k,size=1M,file.filename=parts.img",
    "mkdir sub",
    "qemu-img create -q -f qcow2 -b ../raw.img -F raw sub/up.qcow2",
];

/// The words of a command; two quotes are an empty one, and an underscore in a command of qemu-io
/// is a blank.
pub(crate) fn words(text: &str) -> Vec<String> {
    let is_of_qemu_io = text.starts_with("qemu-io");
    let word = |word: &str| match is_of_qemu_io {
        true => word.replace('_', " "),
        false => word.replace("''", ""),
    };
    text.split_whitespace().map(word).collect()
}

fn run_in(directory: &Path, program: &str, arguments: &[String]) -> Outcome {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(directory).env("TZ", "UTC").env("LC_ALL", "C");
    run(&mut command)
}

fn make_files(directory: &Path) {
    for line in FILES {
        let words = words(line);
        let outcome = run_in(directory, &words[0], &words[1..]);
        assert_eq!(outcome.code, Some(0), "{line}: {outcome:?}");
    }
}

/// Runs ours in a directory.
pub(crate) fn ours(directory: &Path, arguments: &[String]) -> Outcome {
    let mut all = vec!["qemu-img".to_owned()];
    all.extend_from_slice(arguments);
    run_in(directory, PROGRAM, &all)
}

/// Runs a program of QEMU in a directory.
pub(crate) fn theirs(directory: &Path, line: &str) -> Outcome {
    let words = words(line);
    run(Command::new(&words[0]).args(&words[1..]).current_dir(directory))
}

/// Removes what differs between two runs of one program too.
fn without_space(value: &mut Value, is_made: bool) {
    match value {
        Value::Object(members) => {
            for key in ["actual-size", "date-sec", "date-nsec"] {
                members.remove(key);
            }
            if is_made {
                members.remove("children");
                members.remove("image-end-offset");
                // QEMU writes 0, though nothing has counted.
                members.remove("icount");
                members.remove("offset");
                // The identifier of the content is random.
                members.remove("cid");
            }
            members.values_mut().for_each(|value| without_space(value, is_made));
        }
        Value::Array(members) => members.iter_mut().for_each(|it| without_space(it, is_made)),
        _ => {}
    }
}

/// Standard output in the form that is compared.
fn comparable(text: &str, is_made: bool) -> String {
    let text = match text.rsplit_once("%)\r") {
        None => text.to_owned(),
        Some((progress, rest)) => {
            let is_whole =
                progress.starts_with("    (0.00/100%)\r") && progress.ends_with("(100.00/100");
            let words = text.lines().filter(|line| !line.contains("%)\r"));
            let after = rest.strip_suffix('\n').unwrap_or(rest);
            format!("progress {is_whole}\n{after}\n{}", words.collect::<Vec<_>>().join("\n"))
        }
    };
    if let Ok(mut value) = serde_json::from_str::<Value>(&text) {
        without_space(&mut value, is_made);
        return value.to_string();
    }
    let date = |line: &str| match line.find(" 20").filter(|_| line.contains("0000:00:00.000")) {
        Some(start) if is_made => line[..start].to_owned(),
        Some(start) => format!("{}{}", &line[..start], &line[start + 20..]),
        None => line.to_owned(),
    };
    let is_left = |line: &&str| {
        !line.contains("disk size:")
            && !(is_made && (line.contains("file length:") || line.contains("Image end offset")))
    };
    text.lines().filter(is_left).map(|line| date(line) + "\n").collect()
}

/// What QEMU says about an image that a case has made or changed.
fn judge(directories: [&Path; 2], file: &str) -> Result<(), String> {
    let [theirs, ours] = directories.map(|directory| directory.join(file).display().to_string());
    let image = |arguments: &[&str]| {
        let arguments: Vec<_> = arguments.iter().map(|word| (*word).to_owned()).collect();
        run_in(directories[1], "qemu-img", &arguments)
    };
    let compared = image(&["compare", &theirs, &ours]);
    if compared.code != Some(0) {
        return Err(format!("{file} has another content: {compared:?}"));
    }
    let checked = image(&["check", &ours]);
    if !matches!(checked.code, Some(0 | 63)) {
        return Err(format!("{file} is not sound: {checked:?}"));
    }
    let info = |path: &str| {
        let directory = path.strip_suffix(file).unwrap_or(path);
        comparable(&image(&["info", "--output=json", path]).stdout, true).replace(directory, "")
    };
    match (info(&theirs), info(&ours)) {
        (theirs, ours) if theirs == ours => Ok(()),
        (theirs, ours) => Err(format!("{file}: info\n  theirs {theirs}\n  ours   {ours}")),
    }
}

/// Runs a case; returns what differs.
fn differences(files: &Path, case: &str) -> Vec<String> {
    let (commands, made) = case.split_once("=>").unzip();
    let (commands, is_made) = (commands.unwrap_or(case), made.is_some());
    let directory = tempfile::tempdir().expect("a directory");
    let [theirs, mine] = ["theirs", "ours"].map(|name| directory.path().join(name));
    for copy in [&theirs, &mine] {
        let copied = run(Command::new("cp").args(["-r", "--sparse=always"]).arg(files).arg(copy));
        assert_eq!(copied.code, Some(0), "{copied:?}");
    }
    let mut found = Vec::new();
    for command in commands.split(';') {
        let words = words(command);
        let (expected, actual) = (run_in(&theirs, "qemu-img", &words), ours(&mine, &words));
        if expected.code != actual.code {
            found.push(format!("exit code\n  theirs {expected:?}\n  ours   {actual:?}"));
        }
        let [left, right] = [&expected, &actual].map(|run| comparable(&run.stdout, is_made));
        // QEMU reports what it is about to create before it looks at all options.
        let may_differ = expected.code == Some(1) && expected.stdout.starts_with("Formatting");
        if left != right && !may_differ {
            found.push(format!("output\n  theirs {left}\n  ours   {right}\n {}", actual.stderr));
        }
        if actual.code != Some(0) && expected.stderr.is_empty() != actual.stderr.is_empty() {
            found.push(format!("errors\n  theirs {expected:?}\n  ours   {actual:?}"));
        }
    }
    for file in made.unwrap_or_default().split_whitespace() {
        found.extend(judge([&theirs, &mine], file).err());
    }
    found
}

/// Runs the cases, a line each; empty lines are none.
#[track_caller]
pub(crate) fn compare_all(cases: &str) {
    static MADE: OnceLock<tempfile::TempDir> = OnceLock::new();
    tools!(_qemu_img = "qemu-img", _qemu_io = "qemu-io");
    let files = MADE.get_or_init(|| {
        let files = tempfile::tempdir().expect("a directory");
        make_files(files.path());
        files
    });
    let cases: Vec<_> = cases.lines().map(str::trim).filter(|it| !it.is_empty()).collect();
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let all = differences(files.path(), case).join("\n");
                    if !all.is_empty() {
                        found.lock().expect("the list").push(format!("{case}\n{all}"));
                    }
                }
            });
        }
    });
    let found = found.into_inner().expect("the list");
    assert!(found.is_empty(), "{} of {}:\n{}", found.len(), cases.len(), found.join("\n\n"));
}
