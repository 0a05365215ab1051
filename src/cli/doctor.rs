//! `tune doctor`: engines, libraries and folders; what is missing and what mends it.

use clap::Args;
use serde::Serialize;

use super::paint::{Stream, Tone, paint};
use super::report::Failure;
use crate::backend;
use crate::backend::doctor::{Finding, Report, State};
use crate::run::worker::exit;
use crate::run::{Home, runtime};
use crate::spec::size;

/// Say what this machine has, what is missing, and what mends it
#[derive(Args, Debug)]
pub struct Arguments {
    /// Print one JSON object
    #[arg(long, conflicts_with = "fix")]
    json: bool,
    /// Bring the libraries that are missing, after asking
    #[arg(long)]
    fix: bool,
    /// Do not ask
    #[arg(short, long, requires = "fix")]
    yes: bool,
}

#[derive(Serialize)]
struct Diagnosis {
    version: &'static str,
    /// What `engine.device = "auto"` takes, and why.
    device: String,
    engines: Vec<Report>,
    machine: Vec<Finding>,
}

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    if arguments.fix {
        return fix(arguments.yes);
    }
    let device = match backend::find("auto", "auto") {
        Ok(found) => format!("{} ({})", found.name, found.reason),
        Err(error) => format!("none: {error}"),
    };
    let diagnosis = Diagnosis {
        version: env!("CARGO_PKG_VERSION"),
        device,
        engines: backend::doctor::reports(),
        machine: machine(),
    };
    let usable = diagnosis.engines.iter().any(|engine| engine.usable);
    let sound = diagnosis.machine.iter().all(|finding| finding.state != State::Missing);
    if arguments.json {
        println!("{}", serde_json::to_string(&diagnosis)?);
    } else {
        print(&diagnosis);
    }
    Ok(if usable && sound { exit::DONE } else { exit::FAILED })
}

/// Runs the one command that mends what can be mended from here.
fn fix(yes: bool) -> anyhow::Result<u8> {
    let fix = match backend::cuda::fix() {
        Ok(fix) => fix,
        Err(why) => {
            println!("there is nothing to bring: {why}");
            return Ok(exit::DONE);
        }
    };
    let commands: Vec<String> = fix.commands.iter().map(shell_words::join).collect();
    println!("{}", fix.about);
    commands.iter().for_each(|command| println!("  {command}"));
    if !fix.runnable {
        let hint = format!("run `{}` where one is", commands.join("` and `"));
        return Err(Failure::run("neither uv nor pip is on this machine", hint).into());
    }
    if !yes && !super::rm::confirmed("bring these?")? {
        return Ok(exit::DONE);
    }
    for (words, command) in fix.commands.iter().zip(&commands) {
        let Some((program, rest)) = words.split_first() else { continue };
        let status = std::process::Command::new(program).args(rest).status()?;
        if !status.success() {
            let hint = match command.strip_prefix("uv ") {
                Some(pip) => format!("its own message says why; without uv it is `{pip}`"),
                None => "its own message says why".into(),
            };
            return Err(Failure::run(format!("`{command}` failed: {status}"), hint).into());
        }
    }
    if let Some(library) = fix.still_missing() {
        let what = format!("{library} is not where it was to be put, though nothing failed");
        return Err(Failure::run(what, "`tune doctor --fix` once more says what is missing").into());
    }
    println!("brought; `tune doctor` says what is there now");
    Ok(exit::DONE)
}

fn print(diagnosis: &Diagnosis) {
    println!("tune {}", diagnosis.version);
    println!("runs go to {}", diagnosis.device);
    for engine in &diagnosis.engines {
        let state = if engine.usable { "can be used" } else { "cannot be used" };
        println!("\n{} {state}", paint(Stream::Out, Tone::Strong, engine.engine));
        engine.findings.iter().for_each(print_finding);
    }
    println!("\n{}", paint(Stream::Out, Tone::Strong, "machine"));
    diagnosis.machine.iter().for_each(print_finding);
}

fn print_finding(finding: &Finding) {
    let (mark, tone) = match finding.state {
        State::Found => ("ok     ", Tone::Quiet),
        State::Absent => ("absent ", Tone::Warning),
        State::Missing => ("missing", Tone::Error),
    };
    println!("  {} {:14} {}", paint(Stream::Out, tone, mark), finding.name, finding.detail);
    if !finding.mend.is_empty() {
        println!("          {} {}", paint(Stream::Out, Tone::Hint, "mend:"), finding.mend);
    }
}

/// What every engine needs: a place for runs, a place for sockets, memory.
fn machine() -> Vec<Finding> {
    let mut findings = Vec::new();
    match Home::find() {
        Ok(home) => findings.push(home_finding(&home)),
        Err(error) => findings.push(Finding::missing("runs", error.to_string(), error.hint())),
    }
    findings.push(match runtime::socket_path("doctor") {
        Ok(path) => Finding::found("sockets", path.parent().unwrap_or(&path).display().to_string()),
        Err(error) => Finding::missing(
            "sockets",
            format!("no private folder for control sockets: {error}"),
            "make $XDG_RUNTIME_DIR, or remove the folder under /tmp that is not yours",
        ),
    });
    if let Ok(mut system) = sysinfo::System::new() {
        system.refresh_memory();
        let (total, free) = (system.total_memory(), system.available_memory());
        findings.push(Finding::found("memory", format!("{}, {} free", size::format(total), size::format(free))));
    }
    findings
}

fn home_finding(home: &Home) -> Finding {
    let path = home.path().display();
    // The nearest folder that is there decides.
    let existing = home.path().ancestors().find(|folder| folder.exists()).unwrap_or(home.path());
    match rustix::fs::access(existing, rustix::fs::Access::WRITE_OK) {
        Ok(()) => {
            let free = rustix::fs::statvfs(existing).map(|disk| disk.f_bavail * disk.f_frsize).unwrap_or(0);
            Finding::found("runs", format!("{path}, {} free", size::format(free)))
        }
        Err(error) => Finding::missing(
            "runs",
            format!("{path} cannot be written: {error}"),
            "make it writable, or set TUNE_HOME to a folder of yours",
        ),
    }
}
