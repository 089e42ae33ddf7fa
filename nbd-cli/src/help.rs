//! Wraps help once, for the terminal that shows it.

use clap::Command;

/// Joins the paragraphs of the texts after the options, which are wrapped in the source: clap wraps
/// them for the terminal.
pub(crate) fn wrapped_once(command: Command) -> Command {
    let command = match command.get_after_help().map(ToString::to_string) {
        Some(text) => command.after_help(paragraphs(&text)),
        None => command,
    };
    command.mut_subcommands(wrapped_once)
}

/// Joins the lines of paragraphs. Indented lines, such as examples and tables, and titles, which
/// end in a colon, are kept.
fn paragraphs(text: &str) -> String {
    let mut joined = String::with_capacity(text.len());
    let mut goes_on = false;
    for line in text.lines() {
        let stands_alone = line.is_empty() || line.starts_with(' ');
        if !joined.is_empty() {
            joined.push(if goes_on && !stands_alone { ' ' } else { '\n' });
        }
        joined.push_str(line);
        goes_on = !stands_alone && !line.ends_with(':');
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_are_joined_and_examples_are_not() {
        let text = "Examples:\n  a b\n  c d\n\nOne two\nthree.\n\nFour\nfive:\n  six";
        let expected = "Examples:\n  a b\n  c d\n\nOne two three.\n\nFour five:\n  six";
        assert_eq!(paragraphs(text), expected);
    }
}
