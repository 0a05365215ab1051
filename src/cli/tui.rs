//! `tune` and `tune attach`: the workbench.

use std::io::IsTerminal;
use std::path::PathBuf;

use super::report::Failure;
use crate::run::Home;
use crate::run::worker::exit;
use crate::spec::RunSpec;
use crate::tui::{self, Start};

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
    tui::open(start)?;
    Ok(exit::DONE)
}

/// Opens the workbench on a run.
///
/// # Errors
/// When there is no such run.
pub fn attach(run: &str) -> anyhow::Result<u8> {
    let folder = Home::find()?.run(run)?;
    tui::open(Start::Run(folder.id()))?;
    Ok(exit::DONE)
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
