//! The qemu-img form beside QEMU's own qemu-img: the same command lines in two directories with the
//! same files. A case is a line: commands between semicolons, then, after `=>`, the images that are
//! compared afterwards. Exit codes and standard output must be the same; of standard output only the
//! space that files take on disk and times are left out, and progress must begin at 0 % and end at 100 %.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use serde_json::Value;

use crate::support::{Outcome, PROGRAM, run};
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
    "qemu-img create -q -f qcow2 bitmaps.qcow2 1M",
    "qemu-img bitmap --add bitmaps.qcow2 b0",
    "qemu-img bitmap --add --disable -g 32k bitmaps.qcow2 b1",
    "qemu-io -c write_-P_2_0_128k bitmaps.qcow2",
    "qemu-img create -q -f qcow2 -o data_file=data.raw,data_file_raw=on data.qcow2 1M",
    "qemu-img convert -q -c -O qcow2 disk.qcow2 packed.qcow2",
    "qemu-img create -q -f qcow2 -o extended_l2=on,compression_type=zstd,refcount_bits=8 sub.qcow2 1M",
    "qemu-img create -q -f qcow2 -u -b nosuch.img -F raw orphan.qcow2 1M",
    "mkdir sub",
    "qemu-img create -q -f qcow2 -b ../raw.img -F raw sub/up.qcow2",
];

/// The words of a command; two quotes are an empty one, and an underscore in a command of qemu-io is
/// a blank.
fn words(text: &str) -> Vec<String> {
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

fn ours(directory: &Path, arguments: &[String]) -> Outcome {
    let mut all = vec!["qemu-img".to_owned()];
    all.extend_from_slice(arguments);
    run_in(directory, PROGRAM, &all)
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
                members.remove("offset");
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

#[track_caller]
fn compare_all(cases: &str) {
    static MADE: OnceLock<tempfile::TempDir> = OnceLock::new();
    tools!(_qemu_img = "qemu-img", _qemu_io = "qemu-io");
    let files = MADE.get_or_init(|| {
        let files = tempfile::tempdir().expect("a directory");
        make_files(files.path());
        files
    });
    let cases: Vec<_> =
        cases.lines().map(str::trim).filter(|it| !it.is_empty() && !it.starts_with('#')).collect();
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

#[test]
fn images_are_described_alike() {
    compare_all(
        "
        info disk.qcow2
        info raw.img
        info odd.img
        info old.qcow2
        info top.qcow2
        info longer.qcow2
        info snap.qcow2
        info bitmaps.qcow2
        info data.qcow2
        info sub.qcow2
        info packed.qcow2
        info orphan.qcow2
        info sub/up.qcow2
        info -f qcow2 disk.qcow2
        info -f raw disk.qcow2
        info -U disk.qcow2
        info --backing-chain top.qcow2
        info --backing-chain sub/up.qcow2
        info --backing-chain orphan.qcow2
        info --output=json disk.qcow2
        info --output=json raw.img
        info --output=json odd.img
        info --output json top.qcow2
        info --output=json snap.qcow2
        info --output=json bitmaps.qcow2
        info --output=json data.qcow2
        info --output=json sub.qcow2
        info --output=json sub/up.qcow2
        info --output=json --backing-chain top.qcow2
        info --output=json --backing-chain disk.qcow2
        info --output=json -U --force-share raw.img
        info --output=json --image-opts driver=qcow2,file.filename=disk.qcow2
        info --output=human disk.qcow2
        info --image-opts driver=raw,file.driver=file,file.filename=raw.img
        info --object secret,id=s,data=x disk.qcow2
        info --output=xml disk.qcow2
        info nosuch.img
        info
        info disk.qcow2 raw.img
        info --nosuch disk.qcow2
        info -f nosuch disk.qcow2
        info -f qcow2 raw.img
        info -f
        nosuch
        map disk.qcow2
        map top.qcow2
        map longer.qcow2
        map raw.img
        map -f raw raw.img
        map packed.qcow2
        map snap.qcow2
        map --output=json disk.qcow2
        map --output=json raw.img
        map --output=json top.qcow2
        map --output=json longer.qcow2
        map --output=json packed.qcow2
        map --output=json old.qcow2
        info --output=json old.qcow2
        map --output=json sub/up.qcow2
        map --output=json -s 64k -l 128k top.qcow2
        map --start-offset=100k --max-length=10k raw.img
        map --output=json -s 0x10000 disk.qcow2
        map --output=json --image-opts driver=qcow2,file.filename=disk.qcow2
        map -s x disk.qcow2
        map nosuch.img
        map
        check disk.qcow2
        check raw.img
        check -f raw disk.qcow2
        check -q disk.qcow2
        check old.qcow2
        check snap.qcow2
        check packed.qcow2
        check bitmaps.qcow2
        check sub.qcow2
        check -U disk.qcow2
        check -T none disk.qcow2
        check -r all disk.qcow2
        check -r leaks disk.qcow2
        check --output=json disk.qcow2
        check --output=json packed.qcow2
        check --output=json -r all snap.qcow2
        check --output=json raw.img
        check -r nosuch disk.qcow2
        check -T nosuch disk.qcow2
        check nosuch.img
        check
        ",
    );
}

#[test]
fn disks_are_compared_and_measured_alike() {
    compare_all(
        "
        compare disk.qcow2 disk.qcow2
        compare disk.qcow2 raw.img
        compare disk.qcow2 packed.qcow2
        compare packed.qcow2 disk.qcow2 -p
        compare -q disk.qcow2 raw.img
        compare empty.img big.img
        compare -s empty.img big.img
        compare raw.img longer.qcow2
        compare longer.qcow2 raw.img
        compare disk.qcow2 top.qcow2
        compare -f raw -F raw empty.img big.img
        compare -f raw -F qcow2 raw.img top.qcow2
        compare -U -T none disk.qcow2 disk.qcow2
        compare --image-opts driver=raw,file.filename=raw.img driver=raw,file.filename=empty.img
        compare disk.qcow2
        compare disk.qcow2 nosuch.img
        compare --nosuch disk.qcow2 raw.img
        compare -f nosuch disk.qcow2 raw.img
        compare -T nosuch disk.qcow2 raw.img
        measure raw.img
        measure -O qcow2 raw.img
        measure -O raw disk.qcow2
        measure -O qcow2 disk.qcow2
        measure -O qcow2 top.qcow2
        measure -O qcow2 bitmaps.qcow2
        measure -O qcow2 -o compat=0.10 bitmaps.qcow2
        measure -O qcow2 -o cluster_size=2M --size 1T
        measure -O qcow2 -o refcount_bits=1,extended_l2=on --size 10G
        measure -O qcow2 -o preallocation=metadata --size 1G
        measure -O qcow2 -o preallocation=full --size 1G
        measure -O qcow2 -l first snap.qcow2
        measure --output=json -O qcow2 raw.img
        measure --output=json -O qcow2 bitmaps.qcow2
        measure --output=json --size 1G
        measure --output=json --size 1.5G -O qcow2
        measure --output=json -U -f qcow2 -O raw disk.qcow2
        measure -O vmdk --size 1M
        measure
        measure --size 1M raw.img
        measure --size x
        measure -O qcow2 -o nosuch=1 --size 1M
        measure -O qcow2 -o cluster_size=1000 --size 1M
        ",
    );
}

#[test]
fn images_are_created_and_converted_alike() {
    compare_all(
        "
        create new.img 1M => new.img
        create -f raw new.img 1000 => new.img
        create -f raw -o preallocation=falloc new.img 64k => new.img
        create -f raw -o preallocation=full,nocow=off new.img 64k => new.img
        create -f qcow2 new.qcow2 1M => new.qcow2
        create -q -f qcow2 new.qcow2 1.5G => new.qcow2
        create -f qcow2 -o size=5M new.qcow2 => new.qcow2
        create -f qcow2 -o size=5M new.qcow2 1M
        create -f qcow2 -o cluster_size=4k,compat=0.10 new.qcow2 1M => new.qcow2
        create -f qcow2 -o compat=v3 -o lazy_refcounts=on,refcount_bits=1 new.qcow2 1M => new.qcow2
        create -f qcow2 -o extended_l2=on,compression_type=zstd new.qcow2 1M => new.qcow2
        create -f qcow2 -o preallocation=metadata new.qcow2 1M => new.qcow2
        create -f qcow2 -o preallocation=falloc,nocow=off new.qcow2 1M => new.qcow2
        create -f qcow2 -o preallocation=full new.qcow2 1M => new.qcow2
        create -f qcow2 -o preallocation=off new.qcow2 1M => new.qcow2
        create -f qcow2 -o data_file=new.data new.qcow2 1M => new.qcow2
        create -f qcow2 -o data_file=new.data,data_file_raw=on new.qcow2 1M => new.qcow2
        create -f qcow2 -b disk.qcow2 -F qcow2 new.qcow2 => new.qcow2
        create -f qcow2 -b raw.img -F raw new.qcow2 5M => new.qcow2
        create -f qcow2 -b odd.img -F raw new.qcow2 => new.qcow2
        create -f qcow2 -o backing_file=raw.img,backing_fmt=raw new.qcow2 => new.qcow2
        create -f qcow2 -b ../raw.img -F raw sub/new.qcow2 => sub/new.qcow2
        create -u -f qcow2 -b nosuch.img -F raw new.qcow2 1M ; info --output=json new.qcow2 =>
        create -f qcow2 disk.qcow2 2M => disk.qcow2
        create -f raw disk.qcow2 2M => disk.qcow2
        create -f qcow2 raw.img 1M => raw.img
        create -f qcow2 new.qcow2
        create -f qcow2 new.qcow2 x
        create -f qcow2 new.qcow2 -1
        create -f qcow2 new.qcow2 9E
        create -f qcow2 new.qcow2 1M 2M
        create -f qcow2 -b disk.qcow2 new.qcow2
        create -f qcow2 -b nosuch.img -F raw new.qcow2
        create -f qcow2 -b nosuch.img -F nosuch new.qcow2
        create -f raw -b raw.img -F raw new.img
        create -f qcow2 -b disk.qcow2 -F qcow2 disk.qcow2
        create -f qcow2 -o nosuch=1 new.qcow2 1M
        create -f qcow2 -o cluster_size=1000 new.qcow2 1M
        create -f qcow2 -o compat=2 new.qcow2 1M
        create -f qcow2 -o preallocation=nosuch new.qcow2 1M
        create -f raw -o preallocation=metadata new.img 1M
        create -f raw -o cluster_size=64k new.img 1M
        create -f qcow2 -o lazy_refcounts=on,compat=0.10 new.qcow2 1M
        create -f nosuch new.img 1M
        create nosuch/new.img 1M
        create -f qcow2
        create
        convert raw.img new.img => new.img
        convert -O raw disk.qcow2 new.img => new.img
        convert -p -O raw disk.qcow2 new.img => new.img
        convert -O qcow2 raw.img new.qcow2 => new.qcow2
        convert -p -q -O qcow2 raw.img new.qcow2 => new.qcow2
        convert -f raw -O qcow2 disk.qcow2 new.qcow2 => new.qcow2
        convert -c -O qcow2 disk.qcow2 new.qcow2 => new.qcow2
        convert -c -O qcow2 -o compression_type=zstd disk.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 -o cluster_size=4k,compat=0.10 top.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 -o preallocation=metadata disk.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 -o preallocation=full raw.img new.qcow2 => new.qcow2
        convert -O raw -o preallocation=falloc disk.qcow2 new.img => new.img
        convert -p -O qcow2 -t none -T none -W -m 4 raw.img new.qcow2 => new.qcow2
        convert -O raw -t writeback -T writeback -W -m 16 -S 4k disk.qcow2 new.img => new.img
        convert -O raw -S 0 disk.qcow2 new.img => new.img
        convert -O qcow2 -S 0 disk.qcow2 new.qcow2 => new.qcow2
        convert -U -O raw disk.qcow2 new.img => new.img
        convert -r 100M -O raw disk.qcow2 new.img => new.img
        convert -C -O raw disk.qcow2 new.img => new.img
        convert -n -O raw disk.qcow2 raw.img => raw.img
        convert -n -O raw disk.qcow2 big.img => big.img
        convert -n --target-is-zero -O raw disk.qcow2 empty.img => empty.img
        convert -n -O qcow2 raw.img disk.qcow2 => disk.qcow2
        convert -n --target-image-opts disk.qcow2 driver=raw,file.filename=raw.img => raw.img
        convert --image-opts -O raw driver=qcow2,file.filename=disk.qcow2 new.img => new.img
        convert -l first -O raw snap.qcow2 new.img => new.img
        convert -l snapshot.name=second -O qcow2 snap.qcow2 new.qcow2 => new.qcow2
        convert -l snapshot.id=1 -O raw snap.qcow2 new.img => new.img
        convert --bitmaps -O qcow2 bitmaps.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 raw.img disk.qcow2 => disk.qcow2
        convert -O raw top.qcow2 raw.img => raw.img
        convert -O raw longer.qcow2 new.img => new.img
        convert odd.img new.img => new.img
        convert -O qcow2 odd.img new.qcow2 => new.qcow2
        convert data.qcow2 new.img => new.img
        convert sub.qcow2 new.img => new.img
        convert -n -O raw disk.qcow2 nosuch.img
        convert -n -O raw big.img raw.img
        convert -n -O raw disk.qcow2 odd.img
        convert --target-is-zero -O raw disk.qcow2 raw.img
        convert --target-image-opts disk.qcow2 driver=raw,file.filename=raw.img
        convert -c -O raw disk.qcow2 new.img
        convert --bitmaps -O raw bitmaps.qcow2 new.img
        convert --skip-broken-bitmaps -O qcow2 bitmaps.qcow2 new.qcow2
        convert --bitmaps -O qcow2 raw.img new.qcow2
        convert -l nosuch -O raw snap.qcow2 new.img
        convert -l first -O raw raw.img new.img
        convert -m 0 -O raw disk.qcow2 new.img
        convert -m 17 -O raw disk.qcow2 new.img
        convert -S 1000 -O raw disk.qcow2 new.img
        convert -t nosuch -O raw disk.qcow2 new.img
        convert -T nosuch -O raw disk.qcow2 new.img
        convert -r x -O raw disk.qcow2 new.img
        convert -O nosuch disk.qcow2 new.img
        convert -O qcow2 -o nosuch=1 disk.qcow2 new.img
        convert -f nosuch disk.qcow2 new.img
        convert nosuch.img new.img
        convert disk.qcow2 nosuch/new.img
        convert orphan.qcow2 new.img
        convert disk.qcow2
        convert
        ",
    );
}

#[test]
fn what_is_not_supported_is_refused_by_name_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    std::fs::write(here.join("old.img"), [7; 4096]).unwrap();
    std::fs::hard_link(here.join("old.img"), here.join("second-name.img")).unwrap();
    for (line, part) in [
        ("create -f vmdk new.img 1M", "VMDK"),
        ("create -f qcow2 -o encrypt.format=luks new.img 1M", "encrypt"),
        ("create -f qcow2 -o nocow=on new.img 1M", "nocow"),
        ("create -f qcow2 -o data_file=x sub/new.img 1M", "data_file"),
        ("create old.img 1M", "several names"),
        ("convert -B base.img -F raw -O qcow2 old.img new.img", "-B"),
        ("convert --salvage old.img new.img", "--salvage"),
        ("convert old.img old.img new.img", "one source"),
        ("convert -n -S 0 old.img new.img", "-S 0"),
        ("info --object tls-creds-x509,id=a,dir=b old.img", "tls-creds-x509"),
        ("info --image-opts driver=rbd,pool=a", "rbd"),
        ("bench old.img", "bench"),
    ] {
        let outcome = ours(here, &words(line));
        assert_eq!(outcome.code, Some(1), "{line}: {outcome:?}");
        let is_named = outcome.stderr.starts_with("qemu-img: ") && outcome.stderr.contains(part);
        assert!(is_named && outcome.stderr.lines().count() == 1, "{line}: {outcome:?}");
        assert_eq!(std::fs::read_dir(here).unwrap().count(), 2, "{line}");
        assert_eq!(std::fs::read(here.join("old.img")).unwrap(), [7; 4096], "{line}");
    }
}

#[test]
fn sigusr1_asks_how_far_a_conversion_is() {
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk.img"), vec![7; 16 << 20]).unwrap();
    // At this rate it takes longer than the test waits.
    let mut job = Command::new(PROGRAM)
        .args(["qemu-img", "convert", "-r", "64k", "disk.img", "new.img"])
        .current_dir(directory.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let partial = directory.path().join("new.img.partial");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !partial.exists() {
        assert!(Instant::now() < deadline, "it does not begin");
        std::thread::sleep(Duration::from_millis(10));
    }
    let id = rustix::process::Pid::from_child(&job);
    let mut stderr = std::io::BufReader::new(job.stderr.take().unwrap());
    let (sender, line) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let _ = std::io::BufRead::read_line(&mut stderr, &mut text);
        let _ = sender.send(text);
    });
    // It answers after its next step.
    let text = loop {
        rustix::process::kill_process(id, rustix::process::Signal::USR1).unwrap();
        match line.recv_timeout(Duration::from_millis(200)) {
            Ok(text) => break text,
            Err(_) => assert!(Instant::now() < deadline, "it does not answer"),
        }
    };
    job.kill().unwrap();
    job.wait().unwrap();
    assert!(text.starts_with("    (") && text.ends_with("/100%)\n"), "{text:?}");
}
