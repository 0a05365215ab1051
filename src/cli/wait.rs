//! `tune wait`: until a run is over, with its exit code; for chaining.

use clap::Args;

use super::watch::{Ended, Manners, View, watch};
use crate::run::worker::exit;
use crate::run::{Home, Record, Summary};

/// Wait until a run is over; the exit code is the run's
#[derive(Args, Debug)]
pub struct Arguments {
    /// Id, unique prefix of it, or @last
    run: String,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let folder = Home::find()?.run(&arguments.run)?;
    let code = match watch(&folder, 0, Manners::Visitor, &mut Silent)? {
        Ended::Run(code) => code,
        // Not waited to the end: whatever was chained must not start.
        Ended::Detached => return Ok(exit::FAILED),
    };
    let summary = Summary::read(&folder);
    match (arguments.json, &summary.reason) {
        (true, _) => println!("{}", serde_json::to_string(&summary)?),
        (false, Some(reason)) => {
            println!("run {} {} after step {}: {reason}", summary.run, summary.state.name(), summary.step)
        }
        (false, None) => println!("run {} {} after step {}", summary.run, summary.state.name(), summary.step),
    }
    Ok(code)
}

struct Silent;

impl View for Silent {
    fn event(&mut self, _record: &Record, _line: &[u8]) -> std::io::Result<()> {
        Ok(())
    }

    fn note(&mut self, _text: &str) {}
}
