//! `tune compare`: two runs over each other: what they were asked to be, and what came of it.

use clap::Args;

use super::describe::short;
use super::paint::{Stream, Tone, paint};
use crate::run::worker::exit;
use crate::run::{Event, EventReader, Home, RunFolder, Summary};
use crate::spec::{RunSpec, keys};

/// Compare two runs: settings that differ, losses over each other
#[derive(Args, Debug)]
pub struct Arguments {
    /// Id, unique prefix of it, or @last
    #[arg(value_name = "RUN")]
    first: String,
    /// The other run
    #[arg(value_name = "RUN")]
    second: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The losses of a run.
struct Curve {
    summary: Summary,
    spec: Option<RunSpec>,
    /// Step and loss of updates, after every rewind of a resume.
    train: Vec<(u64, f64)>,
    eval: Vec<(u64, f64)>,
}

impl Curve {
    fn read(folder: &RunFolder) -> std::io::Result<Self> {
        let (mut train, mut eval) = (Vec::new(), Vec::new());
        if let Ok(mut reader) = EventReader::open(&folder.events_path()) {
            while let Some(record) = reader.next_record()? {
                match record.event {
                    Event::Step { step, loss, .. } => train.push((step, loss)),
                    Event::Eval { step, loss, .. } => eval.push((step, loss)),
                    Event::Resumed { step: to, .. } => {
                        train.retain(|(step, _)| *step <= to);
                        eval.retain(|(step, _)| *step <= to);
                    }
                    _ => {}
                }
            }
        }
        let spec = RunSpec::read(&folder.spec_path(), &[]).ok();
        Ok(Self { summary: Summary::read(folder), spec, train, eval })
    }
}

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let home = Home::find()?;
    let runs = [Curve::read(&home.run(&arguments.first)?)?, Curve::read(&home.run(&arguments.second)?)?];
    let settings = settings(&runs);
    if arguments.json {
        let side =
            |curve: &Curve| serde_json::json!({ "summary": curve.summary, "train": curve.train, "eval": curve.eval });
        let settings: Vec<_> =
            settings.iter().map(|(key, [a, b])| serde_json::json!({ "key": key, "values": [a, b] })).collect();
        println!("{}", serde_json::json!({ "runs": [side(&runs[0]), side(&runs[1])], "settings": settings }));
        return Ok(exit::DONE);
    }
    let mut rows: Vec<[String; 3]> = vec![[String::new(), runs[0].summary.run.clone(), runs[1].summary.run.clone()]];
    rows.extend(settings.into_iter().map(|(key, [a, b])| [key, a, b]));
    let loss = |value: Option<f64>| value.map_or_else(|| "-".into(), |loss| format!("{loss:.4}"));
    let mut row = |name: &str, of: &dyn Fn(&Curve) -> String| rows.push([name.to_owned(), of(&runs[0]), of(&runs[1])]);
    row("state", &|curve| curve.summary.state.name().to_owned());
    row("step", &|curve| curve.summary.step.to_string());
    row("loss", &|curve| loss(curve.summary.loss));
    row("held-out loss before", &|curve| loss(curve.eval.first().map(|point| point.1)));
    row("held-out loss", &|curve| loss(curve.eval.last().map(|point| point.1)));
    row("best held-out loss", &|curve| loss(curve.eval.iter().map(|point| point.1).min_by(f64::total_cmp)));
    row("tokens per second", &|curve| curve.summary.tokens_per_second.map_or_else(|| "-".into(), short));
    print!("{}", columns(&rows));
    let [first, second] = &runs;
    for (name, a, b) in [("training loss", &first.train, &second.train), ("held-out loss", &first.eval, &second.eval)] {
        if let Some(plot) = plot(a, b) {
            println!("\n{name}: a is {}, b is {}, * is both", first.summary.run, second.summary.run);
            print!("{plot}");
        }
    }
    Ok(exit::DONE)
}

/// Keys whose values differ.
fn settings(runs: &[Curve; 2]) -> Vec<(String, [String; 2])> {
    let [Some(first), Some(second)] = [&runs[0].spec, &runs[1].spec] else { return Vec::new() };
    let shown = |spec: &RunSpec, key| spec.get(key).map_or_else(|| "-".to_owned(), |value| value.to_string());
    let pairs = keys::KEYS.iter().map(|key| (key.path(), [shown(first, key), shown(second, key)]));
    pairs.filter(|(_, [a, b])| a != b).collect()
}

fn columns(rows: &[[String; 3]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ").trim_end().to_owned();
        text.push_str(&if index == 0 { paint(Stream::Out, Tone::Strong, &line) } else { line });
        text.push('\n');
    }
    text
}

const WIDTH: usize = 64;
const HEIGHT: usize = 14;

/// Two curves over the same axes; none when there is nothing to draw.
fn plot(a: &[(u64, f64)], b: &[(u64, f64)]) -> Option<String> {
    let finite = || a.iter().chain(b).filter(|(_, loss)| loss.is_finite());
    let last = finite().map(|(step, _)| *step).max()?.max(1);
    let (low, high) = finite().fold((f64::MAX, f64::MIN), |(low, high), (_, loss)| (low.min(*loss), high.max(*loss)));
    let span = (high - low).max(1e-9);
    let mut cells = [[' '; WIDTH]; HEIGHT];
    for (points, mark) in [(a, 'a'), (b, 'b')] {
        // Points that fall into one column are drawn as their mean.
        let mut sums = [(0.0, 0u32); WIDTH];
        for (step, loss) in points.iter().filter(|(_, loss)| loss.is_finite()) {
            let column = (*step as f64 / last as f64 * (WIDTH - 1) as f64).round() as usize;
            sums[column].0 += loss;
            sums[column].1 += 1;
        }
        for (column, (sum, points)) in sums.into_iter().enumerate().filter(|(_, (_, points))| *points > 0) {
            let height = (sum / f64::from(points) - low) / span * (HEIGHT - 1) as f64;
            let cell = &mut cells[HEIGHT - 1 - height.round() as usize][column];
            *cell = if *cell == ' ' { mark } else { '*' };
        }
    }
    let mut text = String::new();
    for (index, row) in cells.iter().enumerate() {
        let label = match index {
            0 => format!("{high:.3}"),
            _ if index == HEIGHT - 1 => format!("{low:.3}"),
            _ => String::new(),
        };
        let row: String = row.iter().collect();
        text.push_str(&format!("{label:>8} |{}\n", row.trim_end()));
    }
    text.push_str(&format!(
        "{:>8} +{}\n{:>10}{:>width$}\n",
        "",
        "-".repeat(WIDTH),
        0,
        format!("step {last}"),
        width = WIDTH
    ));
    Some(text)
}
