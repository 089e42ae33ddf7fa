//! `nbd-cli completions`: shell completion scripts for this command line.
//!
//! The scripts complete commands, options and files themselves. For the names of exports, bitmaps
//! and snapshots, they run this command with the words of the command line; it asks servers and
//! images.

mod names;

use std::ffi::OsString;

use clap::{Args, Command};
use clap_complete::Shell;

use crate::error::{CommandError, Outcome};
use crate::output::Output;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli completions bash > ~/.local/share/bash-completion/completions/nbd-cli
  nbd-cli completions zsh > ~/.zfunc/_nbd-cli
  nbd-cli completions fish > ~/.config/fish/completions/nbd-cli.fish

In bash, zsh and fish the names of exports, bitmaps and snapshots are completed too: after the
control socket of a running server, after an image, and after nbd://HOST/.";

/// Arguments of `nbd-cli completions`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct CompletionsArgs {
    /// The shell for which to write the script.
    #[arg(value_enum, required_unless_present = "words")]
    pub shell: Option<Shell>,

    /// A command line up to the cursor, whose last word is completed with names. For the scripts.
    #[arg(last = true, hide = true, allow_hyphen_values = true)]
    pub words: Vec<OsString>,
}

/// Prints the script, or names, for the command line `program`.
pub(crate) fn run(args: &CompletionsArgs, program: Command) -> Result<Outcome, CommandError> {
    let mut output = Output::new();
    match args.shell {
        Some(shell) => output.text(&script(shell, program))?,
        None => {
            names::complete(program, &args.words).iter().try_for_each(|name| output.line(name))?;
        }
    }
    output.finish()?;
    Ok(Outcome::Success)
}

fn script(shell: Shell, mut program: Command) -> String {
    // Written to memory first: the generator panics if its writer fails, as a closed pipe does.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut program, "nbd-cli", &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    match shell {
        // The generator encodes the hyphen of the program's name in two ways, and then finds no
        // subcommand.
        Shell::Bash => script.replace("nbd__subcmd__cli", "nbd__cli") + BASH,
        Shell::Zsh => with_names_in_zsh(&script),
        Shell::Fish => script + FISH,
        _ => script,
    }
}

/// Bash splits words at `:` and `=`, so the words are taken from the line.
const BASH: &str = r#"
_nbd_cli_with_names() {
    _nbd__cli "$@"
    [[ "${BASH_VERSINFO[0]}" -ge 4 ]] || return 0
    local line="${COMP_LINE:0:COMP_POINT}" words names name last
    read -ra words <<< "$line"
    [[ "$line" == *[[:space:]] ]] && words+=("")
    mapfile -t names < <("${1/#\~/$HOME}" completions -- "${words[@]}" 2>/dev/null)
    [[ ${#names[@]} -gt 0 ]] || return 0
    last="${words[${#words[@]}-1]}"
    last="${last%"${last##*[:=]}"}"
    COMPREPLY=()
    for name in "${names[@]}"; do
        name="${name#"$last"}"
        printf -v name %q "$name"
        COMPREPLY+=("$name")
    done
}

if [[ "${BASH_VERSINFO[0]}" -eq 4 && "${BASH_VERSINFO[1]}" -ge 4 || "${BASH_VERSINFO[0]}" -gt 4 ]]; then
    complete -F _nbd_cli_with_names -o nosort -o bashdefault -o default nbd-cli
fi
"#;

/// For the values of an option, Fish uses only the lines about this option.
const FISH: &str = r#"
function __fish_nbd_cli_names
    set -l words (commandline -opc) (commandline -ct)
    $words[1] completions -- $words 2>/dev/null
end
complete -c nbd-cli -k -a "(__fish_nbd_cli_names)"
complete -c nbd-cli -n "__fish_seen_subcommand_from backup" -l bitmap -x -k -a "(__fish_nbd_cli_names)"
complete -c nbd-cli -n "__fish_seen_subcommand_from backup" -l export -x -k -a "(__fish_nbd_cli_names)"
complete -c nbd-cli -n "__fish_seen_subcommand_from checkpoint-start" -l bitmap -x -k -a "(__fish_nbd_cli_names)"
"#;

const ZSH: &str = r#"
_nbd-cli() {
    local -a names
    names=("${(@f)$("${words[1]}" completions -- "${(@Q)words[1,CURRENT]}" 2>/dev/null)}")
    names=(${names:#})
    if (( $#names )); then
        compadd -- "${names[@]}"
    else
        _nbd-cli_static "$@"
    fi
}

if [ "$funcstack[1]" = "_nbd-cli" ]; then"#;

/// The function of the generated script gets another name, and is called if there are no names.
fn with_names_in_zsh(script: &str) -> String {
    const FUNCTION: &str = "\n_nbd-cli() {";
    const END: &str = "\nif [ \"$funcstack[1]\" = \"_nbd-cli\" ]; then";
    match (script.matches(FUNCTION).count(), script.matches(END).count()) {
        (1, 1) => script.replace(END, ZSH).replacen(FUNCTION, "\n_nbd-cli_static() {", 1),
        // The generator's output has another form: complete without names.
        _ => script.to_owned(),
    }
}
