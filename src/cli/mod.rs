//! The command line: one file a verb.

pub mod chat;
pub mod choose;
pub mod command;
pub mod compare;
pub mod converse;
pub mod data;
pub mod demo;
pub mod describe;
pub mod doctor;
pub mod fetch;
pub mod logs;
pub mod new;
pub mod paint;
pub mod plan;
pub mod report;
pub mod request;
pub mod resume;
pub mod rm;
pub mod runs;
pub mod train;
pub mod tui;
pub mod wait;
pub mod watch;
pub mod worker;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{CommandFactory, Parser, Subcommand};

use crate::run::worker::exit;

/// Fine-tune language models on the machine you are logged in to
#[derive(Parser, Debug)]
#[command(name = "tune", version, disable_help_subcommand = true, args_conflicts_with_subcommands = true)]
struct Cli {
    /// Open the workbench on this run file; without it, and without a verb, on an empty one
    #[arg(value_name = "RUN.toml")]
    file: Option<PathBuf>,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Subcommand, Debug)]
enum Verb {
    Demo(demo::Arguments),
    New(new::Arguments),
    Train(train::Arguments),
    Plan(plan::Arguments),
    Data(data::Args),
    Runs(runs::Arguments),
    Attach(logs::Attach),
    Logs(logs::Arguments),
    Wait(wait::Arguments),
    Pause(command::Pause),
    Continue(command::Continue),
    Save(command::Save),
    Set(command::Set),
    Stop(command::Stop),
    Resume(resume::Arguments),
    Chat(chat::Arguments),
    Compare(compare::Arguments),
    Rm(rm::Arguments),
    Doctor(doctor::Arguments),
    #[command(hide = true)]
    Worker(worker::Arguments),
    #[command(hide = true)]
    Converse(converse::Arguments),
    #[command(hide = true)]
    Choose(choose::Arguments),
}

/// Runs a command line, the program's name first; gives the exit code.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors, and go to standard output.
            let code = if error.use_stderr() { exit::REQUEST } else { exit::DONE };
            let _ = error.print();
            return code;
        }
    };
    let Some(verb) = cli.verb else {
        if cli.file.is_none() && !tui::has_terminal() {
            let _ = Cli::command().print_help();
            return exit::REQUEST;
        }
        if let Some(name) = cli.file.as_ref().filter(|file| !file.exists()) {
            return report::report(&neither_verb_nor_file(&name.to_string_lossy()).into());
        }
        return tui::run(cli.file).unwrap_or_else(|error| report::report(&error));
    };
    report::end_with_the_reader();
    let result = match verb {
        Verb::Demo(arguments) => demo::run(arguments),
        Verb::New(arguments) => new::run(arguments),
        Verb::Train(arguments) => train::run(arguments),
        Verb::Plan(arguments) => plan::run(arguments),
        Verb::Data(arguments) => data::run(&arguments),
        Verb::Runs(arguments) => runs::run(arguments),
        Verb::Attach(arguments) => logs::attach(arguments),
        Verb::Logs(arguments) => logs::run(arguments),
        Verb::Wait(arguments) => wait::run(arguments),
        Verb::Pause(arguments) => command::pause(arguments),
        Verb::Continue(arguments) => command::go_on(arguments),
        Verb::Save(arguments) => command::save(arguments),
        Verb::Set(arguments) => command::set(arguments),
        Verb::Stop(arguments) => command::stop(arguments),
        Verb::Resume(arguments) => resume::run(arguments),
        Verb::Chat(arguments) => chat::run(arguments),
        Verb::Compare(arguments) => compare::run(arguments),
        Verb::Rm(arguments) => rm::run(arguments),
        Verb::Doctor(arguments) => doctor::run(arguments),
        Verb::Worker(arguments) => worker::run(arguments),
        Verb::Converse(arguments) => converse::run(arguments),
        Verb::Choose(arguments) => choose::run(arguments),
    };
    match result {
        Ok(code) => code,
        Err(error) if report::is_closed_pipe(&error) => exit::DONE,
        Err(error) => report::report(&error),
    }
}

/// What was typed in a verb's place is no verb, and no file has that name.
fn neither_verb_nor_file(name: &str) -> report::Failure {
    let command = Cli::command();
    let verbs = command.get_subcommands().filter(|verb| !verb.is_hide_set()).map(clap::Command::get_name);
    let nearest = verbs.max_by(|a, b| strsim::jaro_winkler(name, a).total_cmp(&strsim::jaro_winkler(name, b)));
    let hint = match nearest.filter(|verb| strsim::jaro_winkler(name, verb) > 0.8) {
        Some(verb) => format!("did you mean `tune {verb}`?"),
        None => "`tune --help` lists the verbs, `tune new` writes a run file".to_owned(),
    };
    report::Failure::request(format!("{name} is neither a verb nor a file"), hint)
}
