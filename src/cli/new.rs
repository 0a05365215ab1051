//! `tune new`: writes a commented run file, fitted to the model and the data.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::report::Failure;
use super::request::Request;
use crate::data;
use crate::run::worker::exit;
use crate::spec::{EvalData, RunSpec, TrainData};
use crate::train;

/// Write a commented run file with defaults fitted to model and data
#[derive(Args, Debug)]
pub struct Arguments {
    /// Model: a folder, a hub id, or "demo"
    #[arg(long, value_name = "M")]
    model: Option<String>,
    /// Data: a file or a folder
    #[arg(long, value_name = "D")]
    data: Option<String>,
    /// Device: auto, cpu, wgpu, wgpu:N, cuda, cuda:N
    #[arg(long)]
    device: Option<String>,
    /// Set a key of the file, as train.learning_rate=1e-4; may be given again
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Where to write; - for standard output
    #[arg(long, value_name = "FILE", default_value = "run.toml")]
    out: PathBuf,
    /// Write over a file that is there
    #[arg(long)]
    force: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let to_output = arguments.out.as_os_str() == "-";
    if !to_output && !arguments.force && arguments.out.exists() {
        let message = format!("{} is there already", arguments.out.display());
        return Err(Failure::request(message, "--force writes over it, --out names another file").into());
    }
    let request = Request {
        file: None,
        model: arguments.model.clone(),
        data: arguments.data.clone(),
        device: arguments.device.clone(),
        settings: arguments.settings.clone(),
    };
    let mut spec = if request.asks() { request.spec()? } else { RunSpec::default() };
    let notes = fit(&mut spec, &request)?;
    let text = spec.commented();
    if to_output {
        std::io::stdout().lock().write_all(text.as_bytes())?;
    } else {
        write_whole(&arguments.out, &text)?;
        println!("wrote {}", arguments.out.display());
        notes.iter().for_each(|note| println!("{note}"));
        if spec.model.id.is_empty() || matches!(&spec.data.train, TrainData::Path(path) if path.is_empty()) {
            println!("fill in model.id and data.train, then `tune train {}`", arguments.out.display());
        } else {
            println!("`tune plan {0}` says what it needs, `tune train {0}` starts it", arguments.out.display());
        }
    }
    Ok(exit::DONE)
}

/// Fits what was not chosen to the model and the data; says what and why.
fn fit(spec: &mut RunSpec, request: &Request) -> anyhow::Result<Vec<String>> {
    let mut notes = Vec::new();
    if spec.model.id.is_empty() {
        return Ok(notes);
    }
    let (model, tokenizer) = train::open_model(spec)?;
    let context = model.config.max_position_embeddings;
    if spec.data.max_length > context && !request.names("data", "max_length") {
        spec.data.max_length = context;
        notes.push(format!("data.max_length = {context}: the model's context"));
    }
    if matches!(&spec.data.train, TrainData::Path(path) if path.is_empty()) {
        return Ok(notes);
    }
    let loaded = data::load(&spec.data, spec.train.seed, Some(&tokenizer), &|_| {})?;
    let rows = loaded.train.len() + loaded.eval.len();
    let longest = loaded.report.lengths.iter().copied().max().unwrap_or(0);
    let needed = longest.next_multiple_of(64).max(64);
    if needed < spec.data.max_length && !request.names("data", "max_length") {
        spec.data.max_length = needed;
        notes.push(format!("data.max_length = {needed}: the longest row has {longest} tokens"));
    }
    if matches!(spec.data.eval, EvalData::Fraction(_)) && !request.names("data", "eval") {
        let fraction = match rows {
            0..10 => 0.0,
            10..200 => 0.2,
            _ => 0.1,
        };
        if spec.data.eval != EvalData::Fraction(fraction) {
            spec.data.eval = EvalData::Fraction(fraction);
            let why = if fraction == 0.0 {
                "too few rows to hold any out"
            } else {
                "so that at least a few rows are held out"
            };
            notes.push(format!("data.eval = {fraction}: {why}"));
        }
    }
    // Fewer than 50 updates hardly move a model; more than three times over the rows it learns them by heart.
    let updates = rows as f64 / spec.train.batch as f64;
    if updates < 50.0 && !request.names("train", "epochs") && !request.names("train", "steps") {
        spec.train.epochs = 3.0;
        notes.push(format!("train.epochs = 3: {rows} rows make few updates"));
    }
    Ok(notes)
}

/// Writes under a temporary name and renames.
fn write_whole(path: &std::path::Path, text: &str) -> anyhow::Result<()> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let staging = path.with_file_name(format!(".{name}.new"));
    let written = std::fs::write(&staging, text).and_then(|()| std::fs::rename(&staging, path));
    written.map_err(|error| {
        let _ = std::fs::remove_file(&staging);
        Failure::request(format!("{} cannot be written: {error}", path.display()), "--out names another file").into()
    })
}
