//! `tune choose`: the device that a run file's words come to, as one JSON object. The workbench asks for it in a process
//! that ends, so that no driver stays in the interface: a graphics driver maps a compiler, and CUDA keeps half a gigabyte of
//! the card for every process that looked at it. Not shown in the help: people use `tune doctor`.

use clap::Args;

use crate::backend;
use crate::run::worker::exit;
use crate::tui::work::device::Answer;

/// Say which device a run would take
#[derive(Args, Debug)]
pub struct Arguments {
    /// As `engine.device`
    device: String,
    /// As `engine.precision`
    precision: String,
}

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let answer: Answer = backend::choose(&arguments.device, &arguments.precision).map_err(|error| error.to_string());
    println!("{}", serde_json::to_string(&answer)?);
    Ok(exit::DONE)
}
