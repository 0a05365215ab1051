//! `tune` and `tune attach`: the workbench.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use super::report::{self, Failure};
use crate::run::Home;
use crate::run::worker::exit;
use crate::spec::RunSpec;
use crate::tui::{self, OpenError, Start};

/// Opens the workbench, on a run file if one is given.
///
/// # Errors
/// When there is no terminal, or the file is wrong.
pub fn run(file: Option<PathBuf>) -> anyhow::Result<u8> {
    let start = match file {
        Some(path) => {
            if !path.exists() && path.extension().is_none() {
                let what = format!("there is no verb and no run file {}", path.display());
                return Err(Failure::request(what, "`tune --help` lists the verbs").into());
            }
            let spec = RunSpec::read(&path, &[])?;
            Start::RunFile(path, Box::new(spec))
        }
        None => Start::Empty,
    };
    require_terminal()?;
    leave(tui::open(start))
}

/// Opens the workbench on a run.
///
/// # Errors
/// When there is no such run.
pub fn attach(run: &str) -> anyhow::Result<u8> {
    let folder = Home::find()?.run(run)?;
    leave(tui::open(Start::Run(folder.id())))
}

/// Ends this process at once. Threads in the background may be in the middle of asking a graphics driver for its
/// adapters; an ordinary exit runs the driver's destructors beside them, which crashes or never ends. Nothing is lost:
/// runs have processes of their own, and files are written whole or not at all.
fn leave(result: Result<(), OpenError>) -> ! {
    let code = match result {
        Ok(()) => exit::DONE,
        Err(error) => report::report(&error.into()),
    };
    let _ = std::io::stdout().flush();
    signal_hook::low_level::exit(code.into())
}

/// Whether the workbench can be shown here.
pub fn has_terminal() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

fn require_terminal() -> Result<(), Failure> {
    if has_terminal() {
        return Ok(());
    }
    Err(Failure::request("the workbench needs a terminal", "`tune --help` lists what works without one"))
}
