//! `tune demo`: fine-tunes the embedded model on embedded questions, and shows its answers before and after.
//!
//! The run goes the ordinary way, through a run file and a worker, so that every other verb takes it afterwards.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use clap::Args;

use super::paint::{Stream, Tone, paint};
use super::report::warn;
use super::train::check_engine;
use super::watch::{self, Ended, Json, Manners, watch};
use crate::demo;
use crate::run::worker::exit;
use crate::run::{Event, Home, Record, RunFolder, launch};
use crate::spec::resolve;

/// Fine-tune a built-in model on built-in data, and compare its answers before and after
#[derive(Args, Debug)]
#[command(after_help = "Needs no network, no GPU and no file. Leaves a run that the other verbs take")]
pub struct Arguments {
    /// auto, cpu, wgpu, wgpu:N, cuda, cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
    /// Print events, one JSON object a line, and nothing else
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let start = Instant::now();
    let mut spec = demo::spec();
    spec.engine.device = arguments.device;
    let spec = resolve::resolve(&spec)?;
    check_engine(&spec)?;
    let folder = RunFolder::create(&Home::find()?.runs(), &spec.resolved_toml())?;
    if let Some(advice) = launch::start(&folder)? {
        warn(&advice);
    }
    if arguments.json {
        return Ok(match watch(&folder, 0, Manners::Owner, &mut Json)? {
            Ended::Run(code) => code,
            Ended::Detached => exit::DONE,
        });
    }
    let live = std::io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|name| name != "dumb");
    let mut view = View::new(std::io::stdout(), live);
    let id = folder.id();
    match watch(&folder, 0, Manners::Owner, &mut view)? {
        Ended::Run(exit::DONE) => {
            view.finish(&id, start.elapsed())?;
            Ok(exit::DONE)
        }
        Ended::Run(code) => Ok(code),
        Ended::Detached => {
            watch::View::note(&mut view, &format!("run {id} goes on; `tune attach {id}` shows it"));
            Ok(exit::DONE)
        }
    }
}

impl<W: Write> watch::View for View<W> {
    fn event(&mut self, record: &Record, _line: &[u8]) -> std::io::Result<()> {
        self.show(&record.event)
    }

    fn note(&mut self, text: &str) {
        let _ = self.close_line();
        eprintln!("{text}");
    }
}

/// Gathers what the run's events say, and writes it as it comes.
struct View<W: Write> {
    output: W,
    /// One line is written over and over; else a line now and then.
    live: bool,
    steps: u64,
    seconds: f64,
    /// Tenths of the run that a line was written for.
    tenths: u64,
    line_open: bool,
    before: Option<f64>,
    after: Option<f64>,
    samples: Vec<Sample>,
}

/// A question with the answers of the first and of the last evaluation.
struct Sample {
    prompt: String,
    first: String,
    last: String,
}

impl<W: Write> View<W> {
    fn new(output: W, live: bool) -> Self {
        Self {
            output,
            live,
            steps: 0,
            seconds: 0.0,
            tenths: 0,
            line_open: false,
            before: None,
            after: None,
            samples: Vec::new(),
        }
    }

    fn show(&mut self, event: &Event) -> std::io::Result<()> {
        match event {
            Event::Started {
                run, device, reason, rows, eval_rows, steps, trainable_parameters, parameters, ..
            } => {
                self.steps = *steps;
                let millions = |count: &u64| *count as f64 / 1e6;
                writeln!(self.output, "run      {run}")?;
                writeln!(
                    self.output,
                    "model    {:.1} M parameters, built in; LoRA trains {:.2} M more",
                    millions(parameters),
                    millions(trainable_parameters)
                )?;
                writeln!(self.output, "data     {rows} questions about tune, {eval_rows} held out")?;
                writeln!(self.output, "device   {device} ({reason})")
            }
            Event::Eval { step, loss, .. } => {
                let name = if *step == 0 { "before" } else { "after" };
                if *step == 0 { &mut self.before } else { &mut self.after }.replace(*loss);
                self.close_line()?;
                writeln!(self.output, "{name:8} held-out loss {loss:.3}")
            }
            Event::Step { step, loss, tokens_per_second, seconds, .. } => {
                self.seconds += seconds;
                let left = self.seconds / *step as f64 * (self.steps - step) as f64;
                let text = format!(
                    "step     {step}/{}  loss {loss:.3}  {tokens_per_second:.0} tokens/s  {left:.0} s left",
                    self.steps
                );
                self.progress(*step, &text)
            }
            Event::Sample { prompt, text, .. } => {
                let text = text.trim().to_string();
                match self.samples.iter_mut().find(|sample| sample.prompt == *prompt) {
                    Some(sample) => sample.last = text,
                    None => {
                        let prompt = prompt.clone();
                        self.samples.push(Sample { prompt, first: text.clone(), last: text });
                    }
                }
                Ok(())
            }
            Event::Warning { message, advice, .. } => {
                self.close_line()?;
                self.output.flush()?;
                warn(&format!("{message}; {advice}"));
                Ok(())
            }
            Event::Queued { behind } => writeln!(self.output, "queued   behind run {behind}, which has the device"),
            Event::Stopped { step, .. } => {
                self.close_line()?;
                writeln!(self.output, "stopped  and saved after step {step}")
            }
            Event::Failed { error, hint, .. } => {
                self.close_line()?;
                self.output.flush()?;
                eprintln!("{} {error}", paint(Stream::Error, Tone::Error, "error:"));
                if !hint.is_empty() {
                    eprintln!("{} {hint}", paint(Stream::Error, Tone::Hint, "hint:"));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn progress(&mut self, step: u64, text: &str) -> std::io::Result<()> {
        if self.live {
            self.line_open = true;
            // Back to the start of the line, and clear the rest of it.
            write!(self.output, "\r{text}\x1b[K")?;
            return self.output.flush();
        }
        let tenths = step * 10 / self.steps.max(1);
        if tenths > self.tenths {
            self.tenths = tenths;
            writeln!(self.output, "{text}")?;
        }
        Ok(())
    }

    fn close_line(&mut self) -> std::io::Result<()> {
        if std::mem::take(&mut self.line_open) {
            writeln!(self.output)?;
        }
        Ok(())
    }

    /// The questions with both answers, what became of the loss, and where to go from here.
    fn finish(&mut self, run: &str, total: Duration) -> std::io::Result<()> {
        self.close_line()?;
        for Sample { prompt, first, last } in &self.samples {
            writeln!(self.output, "\n{prompt}")?;
            writeln!(self.output, "  before  {}", one_line(first))?;
            writeln!(self.output, "  after   {}", one_line(last))?;
        }
        writeln!(self.output)?;
        if let (Some(before), Some(after)) = (self.before, self.after) {
            let seconds = total.as_secs_f64();
            writeln!(self.output, "held-out loss {before:.3} -> {after:.3} in {seconds:.0} s; none of these three")?;
            writeln!(self.output, "questions was trained on, only others that mean the same\n")?;
        }
        writeln!(self.output, "tune chat {run}   talk to it")?;
        writeln!(self.output, "tune logs {run}   what happened, step by step")?;
        writeln!(self.output, "tune new --model FOLDER --data FILE   a run file for a model and data of your own")
    }
}

/// At most 160 characters of a text, in one line.
fn one_line(text: &str) -> String {
    let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match flat.char_indices().nth(160) {
        Some((end, _)) => format!("{} ...", &flat[..end]),
        None if flat.is_empty() => "(nothing)".into(),
        None => flat,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> Event {
        Event::Step {
            step,
            epoch: 0.0,
            loss: 1.5,
            grad_norm: 1.0,
            learning_rate: 1e-3,
            tokens: 100,
            label_tokens: 50,
            padding: 0,
            tokens_per_second: 1000.0,
            seconds: 0.1,
            vram_bytes: 0,
        }
    }

    fn sample(step: u64, text: &str) -> Event {
        Event::Sample { step, prompt: "What is tune?".into(), text: text.into() }
    }

    fn shown(live: bool) -> String {
        let mut output = Vec::new();
        let mut view = View::new(&mut output, live);
        view.steps = 40;
        view.show(&Event::Eval { step: 0, loss: 5.0, perplexity: 148.4, tokens: 10 }).unwrap();
        view.show(&sample(0, "A\nmoon  of")).unwrap();
        (1..=40).for_each(|n| view.show(&step(n)).unwrap());
        view.show(&Event::Eval { step: 40, loss: 0.5, perplexity: 1.6, tokens: 10 }).unwrap();
        view.show(&sample(40, "A terminal program.")).unwrap();
        view.finish("261122-otter", Duration::from_secs(20)).unwrap();
        String::from_utf8(output).unwrap()
    }

    #[test]
    fn both_answers_and_both_losses_are_shown() {
        let text = shown(false);
        assert!(text.contains("What is tune?\n  before  A moon of\n  after   A terminal program.\n"), "{text}");
        assert!(text.contains("held-out loss 5.000 -> 0.500 in 20 s"));
        assert!(text.contains("tune chat 261122-otter"));
    }

    #[test]
    fn a_pipe_gets_ten_lines_of_progress_and_no_escape_codes() {
        let text = shown(false);
        assert_eq!(text.lines().filter(|line| line.starts_with("step ")).count(), 10);
        assert!(!text.contains('\x1b') && !text.contains('\r'));
    }

    #[test]
    fn a_terminal_gets_one_line_written_over() {
        let text = shown(true);
        assert_eq!(text.matches('\r').count(), 40);
        assert_eq!(text.lines().filter(|line| line.contains("held-out loss")).count(), 3);
    }

    #[test]
    fn long_answers_are_cut_at_a_character() {
        assert_eq!(one_line(&"é".repeat(200)).chars().count(), 164);
        assert_eq!(one_line("  \n"), "(nothing)");
    }
}
