//! Log lines on standard error, for `-v`.

use tracing_subscriber::filter::LevelFilter;

/// Starts logging: warnings by default, information with one `-v`, everything with more.
pub(crate) fn start(verbosity: u8) {
    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // Fails only if a subscriber is set already, as in a test that runs two commands.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        // A line that cannot be written, for instance to a full disk, is lost: reporting it in the
        // same place would panic, and end the connection that the line was about.
        .log_internal_errors(false)
        .try_init();
}
