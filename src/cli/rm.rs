//! `tune rm`: removes runs with everything in their folders.

use std::io::{BufRead, IsTerminal, Write};

use clap::Args;

use super::report::Failure;
use crate::run::worker::exit;
use crate::run::{Home, RunError, RunFolder, Summary, lock};
use crate::spec::size;

/// Remove runs, their checkpoints and results
#[derive(Args, Debug)]
pub struct Arguments {
    /// Ids, unique prefixes of them, or @last
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<String>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let home = Home::find()?;
    let mut folders: Vec<RunFolder> = Vec::new();
    for name in &arguments.runs {
        let folder = home.run(name)?;
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    for folder in &folders {
        if lock::holder(&folder.lock_path()).is_some() {
            return Err(RunError::Busy { id: folder.id() }.into());
        }
    }
    for folder in &folders {
        let summary = Summary::read(folder);
        let bytes = size::format(bytes(folder.path()));
        let what = format!("run {} ({}, step {}, {bytes})", summary.run, summary.state.name(), summary.step);
        if !arguments.yes && !confirmed(&format!("remove {what}?"))? {
            println!("kept {what}");
            continue;
        }
        // Renamed first: what is half removed is no run any more.
        let doomed = folder.path().with_file_name(format!(".{}.removed", folder.id()));
        std::fs::rename(folder.path(), &doomed)?;
        std::fs::remove_dir_all(&doomed)?;
        println!("removed {what}");
    }
    Ok(exit::DONE)
}

/// Asks a question whose answer is yes or no; without an answer it is no.
///
/// # Errors
/// When nobody is there to answer.
pub(super) fn confirmed(question: &str) -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::request(format!("nobody answers: {question}"), "--yes goes on without asking").into());
    }
    print!("{question} [y/N] ");
    std::io::stdout().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}

/// Bytes of all files below a folder; links are not followed.
fn bytes(folder: &std::path::Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() => bytes(&entry.path()),
        Ok(found) => found.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}
