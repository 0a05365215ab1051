//! `tune runs`: every run, the newest last.

use clap::Args;

use super::describe::{duration, grouped};
use super::paint::{Stream, Tone, paint};
use crate::run::worker::exit;
use crate::run::{Home, State, Summary};

/// List the runs
#[derive(Args, Debug)]
pub struct Arguments {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let home = Home::find()?;
    let runs: Vec<Summary> = home.list().iter().map(Summary::read).collect();
    if arguments.json {
        println!("{}", serde_json::json!({ "runs": runs }));
        return Ok(exit::DONE);
    }
    if runs.is_empty() {
        println!("there are no runs in {}; `tune demo` makes one", home.runs().display());
        return Ok(exit::DONE);
    }
    let header = ["RUN", "STATE", "STEP", "LOSS", "HELD OUT", "MODEL", "DEVICE", "AGE"].map(str::to_owned);
    let rows: Vec<[String; 8]> = std::iter::once(header).chain(runs.iter().map(row)).collect();
    print!("{}", table(&rows));
    Ok(exit::DONE)
}

fn row(run: &Summary) -> [String; 8] {
    let number = |value: Option<f64>| value.map_or_else(|| "-".into(), |value| format!("{value:.4}"));
    let step = match (run.step, run.steps) {
        (0, 0) => "-".into(),
        (step, 0) => grouped(step),
        (step, steps) => format!("{}/{}", grouped(step), grouped(steps)),
    };
    let name = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    // Of a folder its last part says enough.
    let model = run.model.strip_prefix('/').map_or(run.model.as_str(), |path| path.rsplit('/').next().unwrap_or(path));
    let age = chrono::DateTime::parse_from_rfc3339(&run.started)
        .map_or_else(|_| "-".into(), |time| duration((chrono::Utc::now() - time.to_utc()).as_seconds_f64().max(0.0)));
    [
        run.run.clone(),
        run.state.name().to_owned(),
        step,
        number(run.loss),
        number(run.eval_loss),
        name(model),
        name(&run.device),
        age,
    ]
}

/// Columns as wide as their widest cell; the first row is the header.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        let tone = if index == 0 { Some(Tone::Quiet) } else { tone(&row[1]) };
        let line = line.trim_end();
        text.push_str(&tone.map_or_else(|| line.to_owned(), |tone| paint(Stream::Out, tone, line)));
        text.push('\n');
    }
    text
}

fn tone(state: &str) -> Option<Tone> {
    if state == State::Training.name() {
        Some(Tone::Strong)
    } else if state == State::Failed.name() || state == State::Dead.name() {
        Some(Tone::Warning)
    } else {
        None
    }
}
