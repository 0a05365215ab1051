//! `tune data`: what a data set is to the program: format and why, counts, lengths, a row with its mask, lint.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;

use super::paint::{Stream, is_coloured};
use crate::data::{DataError, Format, Preview, Progress, Report, RowView};
use crate::hub;
use crate::model::tokenizer::Tokenizer;
use crate::run::worker::exit;
use crate::spec::{EvalData, RunSpec, TrainData};

/// Show how a data set will be read, rendered, masked and cut, before anything is trained.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// A data file or folder, "demo", or a run file (.toml)
    pub data: String,
    /// The model whose tokenizer and chat template to use: a folder, a hub id in the local cache, or "demo"
    #[arg(short, long)]
    pub model: Option<String>,
    /// The row to show: its line, or its place in the list, from 1
    #[arg(short, long, value_name = "N")]
    pub row: Option<usize>,
    /// List every row that was dropped, cut or repeated, not only their counts
    #[arg(short, long)]
    pub list: bool,
    /// Change a key of the run file, as in --set data.max_length=512
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Rows listed without `--list`.
const LISTED: usize = 5;

/// Prints the account; the exit code is 2 where a run would refuse the data.
///
/// # Errors
/// When the data, the model or the settings cannot be understood.
pub fn run(args: &Args) -> anyhow::Result<u8> {
    let mut spec = if args.data.ends_with(".toml") {
        RunSpec::read(Path::new(&args.data), &args.set)?
    } else {
        let mut spec = RunSpec::default();
        spec.data.train = TrainData::Path(args.data.clone());
        if args.data == "demo" {
            spec.data.eval = EvalData::Path("demo".into());
        }
        spec.apply(&args.set)?;
        spec
    };
    if let Some(model) = &args.model {
        spec.model.id.clone_from(model);
    }
    super::fetch::missing(&spec)?;
    let (tokenizer, model) = open_tokenizer(&spec)?;
    let progress = ProgressLine::new();
    let preview = Preview::open(&spec.data, spec.train.seed, &tokenizer, &|now| progress.show(now));
    progress.clear();
    let preview = preview?;
    let index = match args.row {
        None => (!preview.is_empty()).then_some(0),
        Some(line) => Some(find(&preview, line)?),
    };
    let row = index.map(|index| preview.row(index)).transpose()?.flatten();
    let text = if args.json {
        let object = json!({
            "model": model,
            "report": preview.report,
            "dropped_by_reason": preview.report.dropped_by_reason().into_iter().collect::<std::collections::BTreeMap<_, _>>(),
            "percentiles": percentiles(&preview.report).into_iter().collect::<std::collections::BTreeMap<_, _>>(),
            "histogram": preview.histogram,
            "row": row,
            "problem": preview.problem.as_ref().map(|problem| json!({
                "message": problem.to_string(),
                "hint": problem.hint(),
            })),
        });
        format!("{object}\n")
    } else {
        let page = Page { preview: &preview, model: &model, guessed: spec.model.id.is_empty(), list: args.list };
        page.text(row.as_ref(), Marks::of_standard_output())
    };
    std::io::stdout().write_all(text.as_bytes()).context("standard output cannot be written")?;
    Ok(if preview.problem.is_some() { exit::REQUEST } else { exit::DONE })
}

fn open_tokenizer(spec: &RunSpec) -> anyhow::Result<(Tokenizer, String)> {
    if spec.model.id.is_empty() || spec.model.id == "demo" {
        let tokenizer = Tokenizer::from_files(crate::demo::files()).map_err(DataError::from)?;
        return Ok((tokenizer, "demo".into()));
    }
    let folder = hub::resolve_model(&spec.model.id, &spec.model.revision)?;
    Ok((Tokenizer::open(&folder).map_err(DataError::from)?, spec.model.id.clone()))
}

fn find(preview: &Preview, line: usize) -> Result<usize, DataError> {
    preview.find(line).ok_or_else(|| {
        let report = &preview.report;
        let file = report.sources.first().map(|source| source.path.clone()).unwrap_or_default();
        let dropped = report.dropped.iter().find(|row| row.place.file == file && row.place.line == line);
        let what = match dropped {
            Some(row) => format!("row {line} is dropped: {}", row.reason),
            None => format!("there is no row {line}"),
        };
        DataError::Content { path: file, what }
    })
}

/// Progress on standard error, once the work has taken two seconds, where a terminal shows it.
struct ProgressLine {
    start: Instant,
    /// When it was last written.
    shown: Mutex<Option<Instant>>,
    terminal: bool,
}

impl ProgressLine {
    fn new() -> Self {
        Self { start: Instant::now(), shown: Mutex::new(None), terminal: std::io::stderr().is_terminal() }
    }

    fn show(&self, progress: Progress) {
        let Ok(mut shown) = self.shown.lock() else { return };
        let recent = shown.is_some_and(|shown| shown.elapsed() < Duration::from_millis(100));
        if self.terminal && self.start.elapsed() > Duration::from_secs(2) && !recent {
            *shown = Some(Instant::now());
            eprint!("\r\x1b[K{} {}/{}", progress.stage, progress.done, progress.total);
        }
    }

    fn clear(&self) {
        if self.shown.lock().is_ok_and(|shown| shown.is_some()) {
            eprint!("\r\x1b[K");
        }
    }
}

fn percentiles(report: &Report) -> [(&'static str, usize); 5] {
    [("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("longest", 1.0)]
        .map(|(name, fraction)| (name, report.percentile(fraction)))
}

/// How trained, special and cut tokens are marked.
#[derive(Clone, Copy, Debug)]
struct Marks {
    coloured: bool,
}

impl Marks {
    fn of_standard_output() -> Self {
        Self { coloured: is_coloured(Stream::Out) }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.coloured && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// The row's text; trained tokens stand in double brackets, and are green where there is colour.
    fn row(self, row: &RowView) -> String {
        let mut out = String::new();
        let mut rest = row.spans.as_slice();
        while let Some(first) = rest.first() {
            let run = rest.iter().take_while(|span| span.trained == first.trained && span.cut == first.cut).count();
            let mut text = String::new();
            for span in &rest[..run] {
                let code = match (span.trained, span.special) {
                    (true, true) => "1;32",
                    (true, false) => "32",
                    (false, true) => "36",
                    (false, false) => "0",
                };
                text.push_str(&self.paint(if span.cut { "9;2" } else { code }, &visible(&span.text)));
            }
            match (first.trained, first.cut) {
                (true, _) => write!(out, "{}{text}{}", self.paint("1;32", "[["), self.paint("1;32", "]]")),
                (false, true) => write!(out, "{}{text}", self.paint("1;33", "\n--- cut here ---\n")),
                (false, false) => write!(out, "{text}"),
            }
            .expect("writing to a String does not fail");
            rest = &rest[run..];
        }
        out
    }
}

/// Control characters of data never reach the terminal.
fn visible(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\t' => c.to_string(),
            c if c.is_control() => c.escape_unicode().to_string(),
            c => c.to_string(),
        })
        .collect()
}

struct Page<'a> {
    preview: &'a Preview,
    model: &'a str,
    /// No model was named.
    guessed: bool,
    list: bool,
}

impl Page<'_> {
    fn text(&self, row: Option<&RowView>, marks: Marks) -> String {
        let mut out = String::new();
        self.write(&mut out, row, marks).expect("writing to a String does not fail");
        out
    }

    fn write(&self, out: &mut String, row: Option<&RowView>, marks: Marks) -> std::fmt::Result {
        let report = &self.preview.report;
        let label = |name: &str| marks.paint("2", &format!("  {name:<11}"));
        for source in &report.sources {
            let role = if source.eval { " (evaluation)" } else { "" };
            writeln!(out, "{}{role}", marks.paint("1", &source.path.display().to_string()))?;
            writeln!(out, "{}{}: {}", label("format"), source.mapping.format.name(), source.mapping.why)?;
            let columns: Vec<String> =
                source.mapping.columns.iter().map(|(role, column)| format!("{role} = {column}")).collect();
            let unmapped = match source.mapping.unmapped.as_slice() {
                [] => String::new(),
                unmapped => format!("; not used: {}", unmapped.join(", ")),
            };
            writeln!(out, "{}{}{unmapped}", label("columns"), columns.join(", "))?;
            writeln!(out, "{}{} read, {} understood", label("rows"), source.rows, source.kept)?;
        }
        writeln!(out, "{}", marks.paint("1", "all of it"))?;
        let stream = if report.held_out_of_stream { " (pieces of the stream)" } else { "" };
        writeln!(
            out,
            "{}{} read, {} trained on, {} held out{stream}, {} dropped, {} cut, {} repeated",
            label("rows"),
            report.read,
            report.train_rows,
            report.eval_rows,
            report.dropped.len(),
            report.truncated.len(),
            report.duplicates.len()
        )?;
        for (reason, count) in report.dropped_by_reason() {
            writeln!(out, "{}{count} dropped: {reason}", label(""))?;
        }
        if report.left_out > 0 {
            writeln!(out, "{}{} left out by rows", label(""), report.left_out)?;
        }
        let note = if self.guessed { " (no --model given: lengths are those of the embedded tokenizer)" } else { "" };
        writeln!(out, "{}{}{note}", label("tokenizer"), self.model)?;
        if let Some(template) = &report.template {
            let methods: Vec<String> =
                report.mask_methods.iter().map(|(method, rows)| format!("{rows} by {}", method.describe())).collect();
            writeln!(out, "{}{template}", label("template"))?;
            writeln!(out, "{}{}", label("answers"), methods.join("; "))?;
        }
        let share = 100.0 * report.label_tokens as f64 / report.tokens.max(1) as f64;
        writeln!(
            out,
            "{}{} in the rows trained on, {} of them targets ({share:.0}%)",
            label("tokens"),
            report.tokens,
            report.label_tokens
        )?;
        self.lengths(out, marks)?;
        self.lists(out, marks)?;
        if let Some(row) = row {
            let held = if row.held_out { ", held out" } else { "" };
            writeln!(
                out,
                "\n{} {} tokens, {} trained on{held}",
                marks.paint("1", &row.place.to_string()),
                row.tokens,
                row.label_tokens
            )?;
            if let Some(note) = &row.note {
                writeln!(out, "  {note}")?;
            }
            writeln!(out, "{}", marks.row(row))?;
        }
        for lint in &report.lint {
            writeln!(out, "\n{} {}", marks.paint("1;33", "warning:"), lint.message)?;
            writeln!(out, "{} {}", marks.paint("36", "hint:"), lint.advice)?;
        }
        if let Some(problem) = &self.preview.problem {
            writeln!(out, "\n{} {problem}", marks.paint("1;31", "error:"))?;
            writeln!(out, "{} {}", marks.paint("36", "hint:"), problem.hint())?;
        }
        Ok(())
    }

    fn lengths(&self, out: &mut String, marks: Marks) -> std::fmt::Result {
        const BAR: usize = 40;
        let histogram = &self.preview.histogram;
        let Some(most) = histogram.bins.iter().map(|bin| bin.rows).max() else { return Ok(()) };
        let report = &self.preview.report;
        let figures: Vec<String> =
            percentiles(report).iter().map(|(name, length)| format!("{name} {length}")).collect();
        let text = report.sources.iter().all(|source| source.mapping.format == Format::Text);
        let unit = if text { "rows of the stream, tokens" } else { "tokens a row" };
        writeln!(out, "{}{} ({unit})", marks.paint("2", "  lengths    "), figures.join("  "))?;
        let width = histogram.bins.last().map_or(1, |bin| bin.to.to_string().len());
        let mut passed = false;
        for bin in &histogram.bins {
            if !passed && bin.from >= histogram.max_length {
                passed = true;
                let rule = format!("--- max_length {}: {} rows are longer", histogram.max_length, histogram.over);
                writeln!(out, "  {}", marks.paint("33", &rule))?;
            }
            let bar = "#".repeat((bin.rows * BAR).div_ceil(most.max(1)));
            writeln!(out, "  {:>width$} to {:>width$}  {bar:<BAR$}  {}", bin.from, bin.to - 1, bin.rows)?;
        }
        if !passed {
            let rule = format!("--- max_length {}: {} rows are longer", histogram.max_length, histogram.over);
            writeln!(out, "  {}", marks.paint("2", &rule))?;
        }
        Ok(())
    }

    fn lists(&self, out: &mut String, marks: Marks) -> std::fmt::Result {
        let report = &self.preview.report;
        let dropped = report.dropped.iter().map(|row| format!("{}: {}", row.place, row.reason)).collect();
        let cut = report.truncated.iter().map(|row| format!("{}: {} tokens", row.place, row.length)).collect();
        let repeated = report.duplicates.iter().map(ToString::to_string).collect();
        for (name, rows) in [("dropped", dropped), ("cut", cut), ("repeated", repeated)] {
            let rows: Vec<String> = rows;
            if rows.is_empty() {
                continue;
            }
            writeln!(out, "{}", marks.paint("1", name))?;
            let shown = if self.list { rows.len() } else { LISTED };
            for row in rows.iter().take(shown) {
                writeln!(out, "  {row}")?;
            }
            if rows.len() > shown {
                writeln!(out, "  and {} more (--list shows all)", rows.len() - shown)?;
            }
        }
        Ok(())
    }
}
