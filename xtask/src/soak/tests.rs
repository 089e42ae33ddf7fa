//! Runs with judges of their own.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use super::*;

/// Judges an image, of which a byte is wrong if the seed says so.
struct Planted;

impl Judge for Planted {
    fn name(&self) -> &'static str {
        "planted"
    }

    fn description(&self) -> &'static str {
        "an image with a fault"
    }

    fn unit(&self) -> &'static str {
        "images"
    }

    fn round(&self, round: &Round<'_>) -> Result<u64> {
        let mut random = Random::new(round.seed);
        let mut image = vec![7_u8; 4096];
        let at = random.below(4096) as usize;
        image[at] = 7 ^ random.below(256) as u8;
        fs::write(round.directory.join("image"), &image)?;
        let found = fs::read(round.directory.join("image"))?;
        match found.iter().position(|byte| *byte != 7) {
            Some(at) => bail!("the byte at {at} is {}", found[at]),
            None => Ok(1),
        }
    }
}

/// Takes its time, and has a program running that Ctrl-C would end.
struct Slow;

impl Judge for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn description(&self) -> &'static str {
        "a program that takes its time"
    }

    fn unit(&self) -> &'static str {
        "programs"
    }

    fn round(&self, round: &Round<'_>) -> Result<u64> {
        println!("\nround begun");
        let seconds = std::env::var("SOAK_TEST_SECONDS").unwrap_or_default();
        let said = round.directory.join("said");
        let mut command = Command::new("sleep");
        let ended = served::run(command.arg(seconds), &said, Duration::from_secs(600))?;
        if std::env::var_os("SOAK_TEST_FAILS").is_some() {
            bail!("as it was told to");
        }
        match ended.is_success() {
            true => Ok(1),
            false => bail!("the program was interrupted"),
        }
    }
}

fn soak(judge: impl Judge + 'static, keep: &Path) -> Soak {
    let judges: Vec<Box<dyn Judge>> = vec![Box::new(judge)];
    Soak {
        programs: Programs::none(),
        report: Mutex::new(Report::new(&judges)),
        judges,
        keep: keep.to_owned(),
        directory: rounds_directory().expect("a directory"),
        profile: "dev".to_owned(),
        takeovers: 20,
    }
}

/// The files of a kept round.
fn unpacked(archive: &Path) -> BTreeMap<String, Vec<u8>> {
    let directory = tempfile::tempdir().expect("a directory");
    let mut tar = Command::new("tar");
    let status = tar.arg("-xzf").arg(archive).arg("-C").arg(directory.path()).status();
    assert!(status.expect("tar").success());
    let files = fs::read_dir(directory.path()).expect("a directory");
    files
        .map(|file| {
            let file = file.expect("a file");
            let name = file.file_name().to_string_lossy().into_owned();
            (name, fs::read(file.path()).expect("a file"))
        })
        .collect()
}

#[test]
fn planted_fault_is_kept_with_its_seed_and_repeated_from_the_kept_file() {
    let keep = tempfile::tempdir().expect("a directory");
    let run = soak(Planted, keep.path());
    for _ in 0..3 {
        run.next_round(5);
    }
    let seed = seed_of_round(5, "planted", 1);
    let error = run.finish().expect_err("rounds failed").to_string();
    assert!(error.contains("3 rounds failed"), "{error}");
    let file = keep.path().join(format!("planted-{seed}.txt"));
    let text = fs::read_to_string(&file).expect("it names its judge and its seed");
    assert!(text.contains(&format!("--repeat planted:{seed}\n")), "{text}");
    let image = unpacked(&file.with_extension("tar.gz"));
    let at = image["image"].iter().position(|byte| *byte != 7).expect("the fault");
    assert!(text.contains(&format!("the byte at {at} is ")), "{text}");

    // The kept file says all that another run needs to find the same.
    let again = tempfile::tempdir().expect("a directory");
    let repeated = keep::Repeated::parse(file.to_str().expect("a name")).expect("a kept file");
    assert_eq!(repeated.judge, "planted");
    let run = soak(Planted, again.path());
    run.repeat(repeated.seed);
    run.finish().expect_err("it failed again");
    let same = again.path().join(format!("planted-{seed}.txt"));
    assert_eq!(fs::read_to_string(&same).expect("kept again"), text);
    assert_eq!(unpacked(&same.with_extension("tar.gz")), image);
}

#[test]
fn judges_that_take_more_than_time_run_only_if_they_are_named() {
    let judges = |only: &[&str]| {
        let only = only.iter().copied().map(str::to_owned).collect();
        let options = Options { only, ..Options::continuous_integration() };
        chosen(&options, None).expect("judges of these names")
    };
    let usual = judges(&[]);
    assert!(usual.iter().all(|judge| judge.name() != "ceph") && usual.len() > 10);
    let named = judges(&["ceph", "floods"]);
    assert_eq!(named.len(), 2);
    assert_eq!(test_programs(&named), ["cli"].into());
}

#[test]
fn rounds_of_a_judge_follow_from_the_seed_whatever_the_others_do() {
    let seeds = |seed, judge| (0..50).map(move |number| seed_of_round(seed, judge, number));
    assert!(seeds(1, "kills").eq(seeds(1, "kills")));
    let all = [seeds(1, "kills"), seeds(2, "kills"), seeds(1, "skill")].into_iter().flatten();
    assert_eq!(all.collect::<BTreeSet<_>>().len(), 150);
}

/// The run that the tests below interrupt.
#[test]
fn run_to_be_interrupted() {
    let Some(keep) = std::env::var_os("SOAK_TEST_KEEP") else { return };
    let soak = soak(Slow, Path::new(&keep));
    interrupt::watch().expect("signals");
    let options = Options { minutes: 10, jobs: Some(2), ..Options::continuous_integration() };
    soak.run(&options);
    std::process::exit(i32::from(soak.finish().is_err()));
}

/// Starts such a run, and waits until both of its rounds have begun.
fn start(
    place: &Path,
    seconds: &str,
    fails: bool,
) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "soak::tests::run_to_be_interrupted", "--nocapture"]);
    command.env("SOAK_TEST_KEEP", place).env("SOAK_TEST_SECONDS", seconds).env("TMPDIR", place);
    if fails {
        command.env("SOAK_TEST_FAILS", "1");
    }
    let mut child = command.stdout(Stdio::piped()).spawn().expect("this program");
    let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut begun = 0;
    while begun < 2 {
        let mut line = String::new();
        assert_ne!(output.read_line(&mut line).expect("its output"), 0, "it has ended");
        begun += usize::from(line.trim() == "round begun");
    }
    (child, output)
}

fn ended(
    mut child: Child,
    mut output: BufReader<std::process::ChildStdout>,
) -> (ExitStatus, String) {
    let mut text = String::new();
    output.read_to_string(&mut text).expect("its output");
    (child.wait().expect("it ends"), text)
}

fn is_clean(place: &Path) -> bool {
    let mut files = fs::read_dir(place).expect("a directory");
    files.all(|file| !file.expect("a file").file_name().to_string_lossy().starts_with("soak-"))
}

#[test]
fn signal_ends_a_run_after_the_rounds_in_progress_with_its_figures() {
    let interrupted = |signal, fails| {
        let place = tempfile::tempdir().expect("a directory");
        let (child, output) = start(place.path(), "8", fails);
        kill_process(Pid::from_child(&child), signal).expect("it runs");
        let (status, text) = ended(child, output);
        assert_eq!(status.code(), Some(i32::from(fails)), "{text}");
        let row =
            if fails { "| slow | 2 | 0 programs | 2 |" } else { "| slow | 2 | 2 programs | 0 |" };
        assert!(text.contains(row), "{text}");
        assert!(!text.contains("round begun"), "no other round begins: {text}");
        assert!(is_clean(place.path()));
    };
    thread::scope(|scope| {
        for (signal, fails) in [(Signal::INT, false), (Signal::TERM, false), (Signal::INT, true)] {
            scope.spawn(move || interrupted(signal, fails));
        }
    });
}

#[test]
fn second_signal_abandons_the_rounds_in_progress() {
    let place = tempfile::tempdir().expect("a directory");
    let (child, mut output) = start(place.path(), "500", false);
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::TERM).expect("it runs");
    let mut line = String::new();
    while !line.contains("interrupted") {
        line.clear();
        assert_ne!(output.read_line(&mut line).expect("its output"), 0, "it has ended");
    }
    kill_process(pid, Signal::TERM).expect("it runs");
    let (status, text) = ended(child, output);
    assert_eq!(status.code(), Some(0), "{text}");
    assert!(text.contains("| slow | 0 | 0 programs | 0 |"), "{text}");
    assert!(is_clean(place.path()));
    let kept = fs::read_dir(place.path()).expect("a directory").count();
    assert_eq!(kept, 0, "nothing was found that could be kept");
}
