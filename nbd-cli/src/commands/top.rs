//! `nbd-cli top`: the activity of a running server, live.

use std::io::IsTerminal as _;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError};
use std::time::{Duration, Instant};

use clap::Args;
use nbd_jobs::JobError;
use nbd_jobs::chart::Color;
use nbd_jobs::size::{parse_duration, parse_limit};
use nbd_jobs::status::Status;
use nbd_jobs::tasks;
use nbd_jobs::watch::{Activity, Line, LineKind, Order, WatchSource, table};

use crate::error::{CommandError, Outcome};
use crate::output::{Output, printable};
use crate::screen::{self, Screen};
use crate::signals::{TerminalSignal, on_terminal_signals};
use crate::terminal::{self, ColorChoice};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli top /run/nbd.control
  nbd-cli top 127.0.0.1:9810
  nbd-cli top --once --sort latency unix:/run/nbd.metrics
  nbd-cli top --json --interval 10 /run/nbd.control >> load.json

Keys: q ends, s sorts by the next value, p pauses.

Rates are those of the last interval. Latencies, from the arrival of a request until its reply is
ready, are upper bounds, exact to a factor of two; 99 of 100 requests took no longer than P99.";

/// Arguments of `nbd-cli top`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct TopArgs {
    /// The server: the path of its control socket (serve --control), or the address of its metrics
    /// (serve --metrics): HOST:PORT, PORT or unix:PATH.
    #[arg(value_name = "CONTROL|ADDRESS")]
    pub source: WatchSource,

    /// Print the activity of one interval as text, and end.
    #[arg(long)]
    pub once: bool,

    /// Print one JSON object per interval and line; with --once, a single one.
    #[arg(long)]
    pub json: bool,

    /// Time between two updates, such as 500ms or 5s.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    pub interval: Duration,

    /// The value that sorts exports and clients: throughput, requests, latency, queue, errors or
    /// name.
    #[arg(long, value_name = "VALUE", default_value = "throughput")]
    pub sort: Order,

    /// Time limit for the server's answer: seconds, or 500ms, 2m; 0 for none.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_limit)]
    pub timeout: Duration,

    /// Whether to use colours.
    #[arg(long, value_enum, value_name = "WHEN", default_value_t)]
    pub color: ColorChoice,
}

/// Time beyond two intervals after which numbers that were not renewed are called old.
const PATIENCE: Duration = Duration::from_secs(2);
/// Time between two updates of the displayed age.
const AGE_UNIT: Duration = Duration::from_secs(1);

pub(crate) fn run(args: &TopArgs) -> Result<Outcome, CommandError> {
    let before = args.source.fetch(args.timeout)?;
    if args.once || args.json {
        return print(args, before);
    }
    if !std::io::stdout().is_terminal() {
        return Err(CommandError::new(
            "standard output is not a terminal; give --once or --json to print the numbers",
        ));
    }
    Session::new(args, before).run()
}

/// Prints the activity of one interval, or of all.
fn print(args: &TopArgs, mut before: Status) -> Result<Outcome, CommandError> {
    loop {
        std::thread::sleep(args.interval);
        let now = args.source.fetch(args.timeout)?;
        let mut activity = Activity::between(&before, &now);
        args.sort.apply(&mut activity);
        let mut output = Output::new();
        if args.json {
            output.compact_json(&activity)?;
            output.text("\n")?;
        } else {
            let lines = table(&activity, terminal::columns(), None);
            lines.iter().try_for_each(|line| output.line(line.text.trim_end()))?;
        }
        output.finish()?;
        if args.once {
            return Ok(Outcome::Success);
        }
        before = now;
    }
}

/// The events for the display.
enum Event {
    Key(u8),
    /// New numbers are in the channel.
    Numbers,
    Signal(TerminalSignal),
    /// The terminal was closed.
    NoKeys,
}

/// The display on a terminal.
struct Session<'a> {
    args: &'a TopArgs,
    color: Color,
    order: Order,
    is_paused: bool,
    latest: Status,
    activity: Activity,
    problem: Option<String>,
    /// When the numbers came.
    renewed: Instant,
}

impl<'a> Session<'a> {
    fn new(args: &'a TopArgs, first: Status) -> Self {
        Self {
            args,
            color: terminal::color(args.color),
            order: args.sort,
            is_paused: false,
            activity: Activity::between(&first, &first),
            latest: first,
            problem: None,
            renewed: Instant::now(),
        }
    }

    fn run(mut self) -> Result<Outcome, CommandError> {
        let (sender, events) = mpsc::channel();
        let signals = sender.clone();
        let mut is_ending = false;
        on_terminal_signals(move |signal| {
            if let TerminalSignal::End(end) = signal {
                // A terminal that accepts no output stops the other threads.
                if std::mem::replace(&mut is_ending, true) && end.is_request() {
                    screen::restore_at_once();
                    std::process::exit(end.exit_status().into());
                }
            }
            // After the last event, there is no receiver.
            let _ = signals.send(Event::Signal(signal));
        })?;
        let screen = Screen::open()?;
        let (keys, gone) = (sender.clone(), sender.clone());
        screen.read_keys(
            move |key| keys.send(Event::Key(key)).is_ok(),
            move || drop(gone.send(Event::NoKeys)),
        )?;
        let numbers = watch(self.args, sender)?;
        loop {
            screen.draw(&self.lines(&screen))?;
            let event = match events.recv_timeout(AGE_UNIT) {
                Ok(event) => event,
                // The numbers have become older.
                Err(RecvTimeoutError::Timeout) => continue,
                // The sending threads hold a sender until they end.
                Err(RecvTimeoutError::Disconnected) => return Ok(Outcome::Success),
            };
            match event {
                Event::Key(b'q' | b'Q') | Event::NoKeys => return Ok(Outcome::Success),
                Event::Key(b's') => self.order = self.order.next(),
                Event::Key(b'p' | b' ') => self.is_paused = !self.is_paused,
                Event::Key(_) | Event::Signal(TerminalSignal::Resized) => {}
                Event::Signal(TerminalSignal::Stop) => screen.stop()?,
                Event::Signal(TerminalSignal::End(signal)) => {
                    return Ok(Outcome::Status(signal.exit_status()));
                }
                Event::Numbers => numbers.try_iter().for_each(|it| self.note(it)),
            }
        }
    }

    fn note(&mut self, numbers: Result<Status, JobError>) {
        match numbers {
            Ok(now) => {
                if !self.is_paused {
                    self.activity = Activity::between(&self.latest, &now);
                }
                self.latest = now;
                self.problem = None;
                self.renewed = Instant::now();
            }
            Err(error) => self.problem = Some(CommandError::from(error).to_string()),
        }
    }

    fn lines(&mut self, screen: &Screen) -> Vec<String> {
        self.order.apply(&mut self.activity);
        let (columns, rows) = screen.size();
        // The last line has the keys.
        let found = table(&self.activity, columns, Some(rows.saturating_sub(2)));
        let mut lines: Vec<_> = found.iter().map(|line| self.styled(line, columns)).collect();
        lines.truncate(rows.saturating_sub(2));
        lines.push(String::new());
        let paused = if self.is_paused { " [paused]" } else { "" };
        let (order, source) = (self.order.name(), &self.args.source);
        lines.push(match self.staleness() {
            Some(text) => self.with("\x1b[31m", &one_line(&text, columns)),
            None => format!("q quit  s sort: {order}  p pause{paused}  {source}"),
        });
        lines
    }

    /// What is wrong with the numbers, and their age.
    fn staleness(&self) -> Option<String> {
        let age = self.renewed.elapsed();
        let problem = match &self.problem {
            Some(problem) => problem,
            None if age < self.args.interval.saturating_mul(2) + PATIENCE => return None,
            None => "the server does not answer",
        };
        Some(format!("The numbers are {} s old: {problem}", age.as_secs()))
    }

    fn styled(&self, line: &Line, columns: usize) -> String {
        match line.kind {
            // Long names must not make the output long.
            LineKind::Plain => line.text.chars().take(columns).collect(),
            LineKind::Heads => self.with("\x1b[7m", &format!("{:columns$}", line.text)),
        }
    }

    fn with(&self, start: &str, text: &str) -> String {
        match self.color {
            Color::On => format!("{start}{text}\x1b[0m"),
            Color::Off => text.to_owned(),
        }
    }
}

/// A text that may have come from a server.
fn one_line(text: &str, columns: usize) -> String {
    printable(text).chars().take(columns).collect()
}

/// Starts a thread that fetches numbers from the server until the receiver is dropped.
fn watch(
    args: &TopArgs,
    events: Sender<Event>,
) -> Result<Receiver<Result<Status, JobError>>, CommandError> {
    let (source, interval, limit) = (args.source.clone(), args.interval, args.timeout);
    let (sender, numbers) = mpsc::sync_channel(1);
    let thread = tasks::start_thread("watch", move || {
        loop {
            std::thread::sleep(interval);
            if !offer(source.fetch(limit), &sender, &events) {
                return;
            }
        }
    });
    let failed = |error| CommandError::new(format!("cannot start a thread: {error}"));
    thread.map(|_| numbers).map_err(failed)
}

/// Passes numbers on, or drops them while others wait: a terminal that accepts no output must not
/// fill the memory. Returns whether there is still a receiver.
fn offer<T>(numbers: T, sender: &SyncSender<T>, events: &Sender<Event>) -> bool {
    match sender.try_send(numbers) {
        Ok(()) => events.send(Event::Numbers).is_ok(),
        Err(TrySendError::Full(_)) => true,
        Err(TrySendError::Disconnected(_)) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_display_that_is_stopped_collects_no_numbers() {
        let (sender, numbers) = mpsc::sync_channel(1);
        let (event_sender, events) = mpsc::channel();
        for number in 0..1000 {
            assert!(offer(number, &sender, &event_sender));
        }
        assert_eq!(events.try_iter().count(), 1);
        assert_eq!(numbers.try_iter().collect::<Vec<_>>(), [0]);
        assert!(offer(1000, &sender, &event_sender));
        assert_eq!((events.try_iter().count(), numbers.try_recv()), (1, Ok(1000)));
        drop(numbers);
        assert!(!offer(1001, &sender, &event_sender));
    }

    #[test]
    fn a_problem_is_one_line_without_control_characters() {
        let shown = one_line(&format!("\u{1b}]52;c;\u{7}{}", "x".repeat(1 << 20)), 80);
        assert!(shown.starts_with("\\u{1b}]52;c;"), "{shown}");
        assert!(shown.chars().count() == 80 && !shown.contains(char::is_control), "{shown}");
    }
}
