//! `nbd-cli repo`: repositories of backups.

mod args;
mod compact;
mod export;
mod import;
mod keys;
mod listing;
mod report;
mod store;
mod text;

use nbd_jobs::repository::repository_error;
use nbd_objects::repo::{CollectOptions, Creates, Id, Repository, Retention, SessionInfo};

pub use self::args::RepoArgs;
use self::args::{
    CheckArgs, ForgetArgs, ForgetSessionArgs, GcArgs, InitArgs, PruneArgs, RepoCommand,
};
pub use self::store::PassphraseArgs;
use self::store::described;
pub(crate) use self::store::open;
use self::text::line;
use crate::async_runtime::block_on;
use crate::error::{CommandError, Outcome};
use crate::output::{printable, unless_closed, warn};

pub(crate) fn run(args: &RepoArgs) -> Result<Outcome, CommandError> {
    block_on(async {
        match &args.command {
            RepoCommand::Init(args) => init(args).await,
            RepoCommand::List(args) => listing::list(args).await,
            RepoCommand::Check(args) => check(args).await,
            RepoCommand::Forget(args) => forget(args).await,
            RepoCommand::Prune(args) => prune(args).await,
            RepoCommand::Gc(args) => gc(args).await,
            RepoCommand::Compact(args) => compact::run(args).await,
            RepoCommand::Stats(args) => listing::stats(args).await,
            RepoCommand::ForgetSession(args) => forget_session(args).await,
            RepoCommand::Export(args) => export::run(args).await,
            RepoCommand::Import(args) => import::run(args).await,
            RepoCommand::Key(args) => keys::run(args).await,
        }
    })
}

async fn init(args: &InitArgs) -> Result<Outcome, CommandError> {
    let passphrase = args.store.passphrase()?;
    if passphrase.is_some() && !args.encrypt {
        return Err(CommandError::new(
            "a passphrase is given, but not --encrypt; add --encrypt, or leave the passphrase out \
             (--passphrase-file, NBD_PASSPHRASE_FILE)",
        ));
    }
    let place = args.store.new_place()?;
    let made = Repository::init(place, passphrase.as_deref().map(Vec::as_slice))
        .await
        .map_err(repository_error)?;
    if made.creates() == Creates::Overwriting {
        warn(
            "this store ignores If-None-Match, so gc never ends an interrupted backup: end it with \
             'repo forget-session'",
        );
    }
    let kind = if made.is_encrypted() { "encrypted" } else { "not encrypted" };
    line(&format!("{}: a new repository, {kind}", printable(made.name())))
}

async fn check(args: &CheckArgs) -> Result<Outcome, CommandError> {
    let repository = args.store.open().await?;
    let checked =
        repository.check(args.read_data.unwrap_or(0.0)).await.map_err(repository_error)?;
    let is_good = checked.problems.is_empty();
    unless_closed(report::check(&repository, &checked, args.json))?;
    Ok(if is_good { Outcome::Success } else { Outcome::Status(1) })
}

async fn forget(args: &ForgetArgs) -> Result<Outcome, CommandError> {
    let repository = args.store.open().await?;
    let mut found = Vec::new();
    for backup in &args.backups {
        if let Ok(id) = backup.parse::<Id>() {
            found.push((id, id.to_string()));
            continue;
        }
        // Elsewhere this is the newest backup; here it may be meant as all of them.
        if !backup.contains('@') {
            let name = printable(backup);
            return Err(CommandError::new(format!(
                "'{name}' is not one backup; give it as {name}@latest, {name}@DAY or {name}@ID, or \
                 let rules decide ('repo prune --name {name}')"
            )));
        }
        let (id, head) = repository.find(backup).await.map_err(repository_error)?;
        found.push((id, described(id, &head)));
    }
    for ((id, described), backup) in found.into_iter().zip(&args.backups) {
        if !repository.forget(id, args.damaged).await.map_err(repository_error)? {
            let other = repository.other_than_backup(id).await.map_err(repository_error)?;
            let (backup, name) = (printable(backup), printable(repository.name()));
            return Err(CommandError::new(match other {
                Some(other) => format!("'{backup}' in {name} is {other}"),
                None => format!("there is no backup '{backup}' in {name}"),
            }));
        }
        line(&format!("forgotten: {described}"))?;
    }
    Ok(Outcome::Success)
}

async fn prune(args: &PruneArgs) -> Result<Outcome, CommandError> {
    let retention = Retention {
        last: args.keep_last,
        hourly: args.keep_hourly,
        daily: args.keep_daily,
        weekly: args.keep_weekly,
        monthly: args.keep_monthly,
        yearly: args.keep_yearly,
    };
    if retention.is_empty() {
        return Err(CommandError::new(
            "no rule keeps a backup; give at least one of --keep-last, --keep-daily and so on",
        ));
    }
    let repository = args.store.open().await?;
    let backups = repository.list().await.map_err(repository_error)?;
    for info in &backups {
        if let Err(error) = &info.head {
            warn(&format!("{error}; it is kept"));
        }
    }
    let is_meant = |name: &str| args.name.as_deref().is_none_or(|wanted| wanted == name);
    for (id, head) in retention.expired(&backups) {
        if !is_meant(&head.name) {
            continue;
        }
        if !args.dry_run {
            repository.forget(id, false).await.map_err(repository_error)?;
        }
        let verb = if args.dry_run { "would be forgotten" } else { "forgotten" };
        line(&format!("{verb}: {}", described(id, &head)))?;
    }
    Ok(Outcome::Success)
}

async fn gc(args: &GcArgs) -> Result<Outcome, CommandError> {
    let repository = args.store.open().await?;
    let mut options = CollectOptions::default();
    (options.idle, options.wait, options.dry_run) = (args.idle, args.wait, args.dry_run);
    let waits = |session: &SessionInfo| warn(&listing::waits(session, args));
    let garbage = repository.collect_and_tell(&options, &waits).await.map_err(repository_error)?;
    if let Some(running) = garbage.running {
        let sessions = repository.sessions().await.map_err(repository_error)?;
        let record = sessions.into_iter().find(|it| it.id == running).and_then(|it| it.record);
        let what = match record.is_some_and(|record| record.is_compaction()) {
            true => "compaction",
            false => "backup",
        };
        return Err(CommandError::new(format!(
            "the {what} {running} is being made, so nothing was deleted; run gc again later, or end \
             the {what} with 'repo forget-session'"
        )));
    }
    for list in &garbage.lists {
        warn(&format!(
            "another gc runs or was killed: new backups do not use what it condemned; if it was \
             killed, remove its list with 'repo forget-session ID' ({list})"
        ));
    }
    report::garbage(&garbage, args).map(|()| Outcome::Success)
}

async fn forget_session(args: &ForgetSessionArgs) -> Result<Outcome, CommandError> {
    let repository = args.store.open().await?;
    if !repository.end_session(args.id).await.map_err(repository_error)? {
        repository.forget_list(args.id).await.map_err(|_| {
            CommandError::new(format!(
                "{} has no session, reader or list {}",
                printable(repository.name()),
                args.id
            ))
        })?;
    }
    line(&format!("ended: {}", args.id))
}
