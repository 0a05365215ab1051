//! A run's history as the screens need it: the latest updates as they are, the whole in a bounded number of buckets.
//!
//! A run of a million updates takes as much memory here as one of ten thousand.

use std::collections::{BTreeMap, VecDeque};

use crate::run::{Event, Record};

/// Updates kept as they are.
const RECENT: usize = 4096;
/// Buckets of the whole; when they are full, neighbours are merged.
const BUCKETS: usize = 4096;
/// Lines kept of the log, warnings and samples.
const LINES: usize = 500;
/// Weight of a new loss in the smoothed one: a thirtieth of the run counts, within bounds.
fn smoothing(steps: u64) -> f64 {
    if steps == 0 { 0.1 } else { (30.0 / steps as f64).clamp(0.02, 0.3) }
}

/// One update.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Point {
    pub step: u64,
    pub epoch: f64,
    pub loss: f64,
    /// The smoothed loss after it.
    pub smooth: f64,
    pub grad_norm: f64,
    pub learning_rate: f64,
    pub tokens_per_second: f64,
    pub seconds: f64,
    pub vram_bytes: u64,
    pub padding: u64,
    pub tokens: u64,
}

/// Neighbouring updates in one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    pub first: u64,
    pub last: u64,
    pub count: u64,
    pub low: f64,
    pub high: f64,
    pub smooth: f64,
    pub grad_norm: f64,
    pub learning_rate: f64,
    pub tokens_per_second: f64,
}

impl Bucket {
    fn of(point: &Point) -> Self {
        Self {
            first: point.step,
            last: point.step,
            count: 1,
            low: point.loss,
            high: point.loss,
            smooth: point.smooth,
            grad_norm: point.grad_norm,
            learning_rate: point.learning_rate,
            tokens_per_second: point.tokens_per_second,
        }
    }

    fn merge(&mut self, next: &Bucket) {
        let (a, b) = (self.count as f64, next.count as f64);
        self.low = self.low.min(next.low);
        self.high = self.high.max(next.high);
        self.grad_norm = (self.grad_norm * a + next.grad_norm * b) / (a + b);
        self.tokens_per_second = (self.tokens_per_second * a + next.tokens_per_second * b) / (a + b);
        (self.smooth, self.learning_rate, self.last) = (next.smooth, next.learning_rate, next.last);
        self.count += next.count;
    }
}

/// What the run is doing, as far as its events say.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum State {
    #[default]
    Starting,
    Queued {
        behind: String,
    },
    Running,
    Paused,
    Stopped {
        reason: String,
    },
    Failed {
        error: String,
        hint: String,
    },
    Finished,
    /// The events say that it runs, and no worker does.
    Dead,
}

impl State {
    pub fn name(&self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Queued { .. } => "queued",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped { .. } => "stopped",
            State::Failed { .. } => "failed",
            State::Finished => "finished",
            State::Dead => "dead",
        }
    }

    /// Whether a worker should be there.
    pub fn is_live(&self) -> bool {
        matches!(self, State::Starting | State::Queued { .. } | State::Running | State::Paused)
    }
}

/// What `started` said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Started {
    pub model: String,
    pub device: String,
    pub reason: String,
    pub rows: usize,
    pub eval_rows: usize,
    pub steps: u64,
    pub epochs: f64,
    pub trainable_parameters: u64,
    pub parameters: u64,
}

/// How a line of the log is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    Plain,
    Good,
    Warn,
    Bad,
}

/// A line of the log.
#[derive(Clone, Debug, PartialEq)]
pub struct LogLine {
    /// RFC 3339.
    pub time: String,
    pub tone: Tone,
    pub text: String,
}

/// A warning that the worker gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Given {
    pub step: u64,
    pub rule: String,
    pub message: String,
    pub advice: String,
}

/// An answer on the way.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub step: u64,
    pub prompt: String,
    pub text: String,
}

/// An evaluation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    pub step: u64,
    pub loss: f64,
    pub perplexity: f64,
}

/// Everything that is shown of a run.
#[derive(Clone, Debug, Default)]
pub struct History {
    pub started: Option<Started>,
    pub state: State,
    /// Bytes by kind, from the run's plan.
    pub plan_bytes: BTreeMap<String, u64>,
    pub micro_sizes: Vec<usize>,
    pub estimated_step_seconds: f64,
    pub recent: VecDeque<Point>,
    pub whole: Vec<Bucket>,
    /// Updates that a bucket holds.
    width: u64,
    smooth: Option<f64>,
    pub evaluations: Vec<Evaluation>,
    pub samples: VecDeque<Sample>,
    pub warnings: VecDeque<Given>,
    pub best: Option<(u64, String)>,
    pub checkpoint: Option<(u64, String)>,
    pub log: VecDeque<LogLine>,
    pub seconds: f64,
    pub tokens: u64,
    pub train_loss: Option<f64>,
    pub eval_loss: Option<f64>,
    pub result: Option<String>,
    pub first_time: String,
    pub last_time: String,
    /// The schedule's peak, where it was changed on the way.
    pub changed_rate: Option<f64>,
}

impl History {
    /// Takes one event.
    pub fn take(&mut self, record: Record) {
        let Record { time, event } = record;
        if self.first_time.is_empty() {
            self.first_time.clone_from(&time);
        }
        match event {
            Event::Step {
                step,
                epoch,
                loss,
                grad_norm,
                learning_rate,
                tokens,
                padding,
                tokens_per_second,
                seconds,
                vram_bytes,
                ..
            } => {
                let smooth = match self.smooth {
                    Some(smooth) if loss.is_finite() => smooth + smoothing(self.steps()) * (loss - smooth),
                    Some(smooth) => smooth,
                    None => loss,
                };
                self.smooth = smooth.is_finite().then_some(smooth);
                self.seconds += seconds;
                self.tokens += tokens;
                if !matches!(self.state, State::Running) {
                    self.state = State::Running;
                }
                self.point(Point {
                    step,
                    epoch,
                    loss,
                    smooth,
                    grad_norm,
                    learning_rate,
                    tokens_per_second,
                    seconds,
                    vram_bytes,
                    padding,
                    tokens,
                });
            }
            other => self.rare(&time, other),
        }
        self.last_time = time;
    }

    fn point(&mut self, point: Point) {
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(point);
        let width = self.width.max(1);
        let bucket = Bucket::of(&point);
        match self.whole.last_mut() {
            Some(last) if last.count < width => last.merge(&bucket),
            _ => self.whole.push(bucket),
        }
        if self.whole.len() > BUCKETS {
            let mut merged = Vec::with_capacity(BUCKETS);
            for pair in self.whole.chunks(2) {
                let mut bucket = pair[0];
                pair[1..].iter().for_each(|next| bucket.merge(next));
                merged.push(bucket);
            }
            self.whole = merged;
            self.width = width * 2;
        }
    }

    fn rare(&mut self, time: &str, event: Event) {
        let (tone, text) = match event {
            Event::Step { .. } => return,
            Event::Started {
                model,
                device,
                reason,
                rows,
                eval_rows,
                steps,
                epochs,
                trainable_parameters,
                parameters,
                ..
            } => {
                let text = format!("started on {device}: {steps} updates, {rows} rows");
                self.state = State::Running;
                self.started = Some(Started {
                    model,
                    device,
                    reason,
                    rows,
                    eval_rows,
                    steps,
                    epochs,
                    trainable_parameters,
                    parameters,
                });
                (Tone::Plain, text)
            }
            Event::Plan { peak_bytes, bytes, micro_sizes, estimated_step_seconds, .. } => {
                let sizes = micro_sizes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let text = format!(
                    "plan: {} at its peak, micro-batches of {sizes} tokens",
                    super::widgets::text::bytes(peak_bytes)
                );
                (self.plan_bytes, self.micro_sizes) = (bytes, micro_sizes);
                self.estimated_step_seconds = estimated_step_seconds;
                (Tone::Plain, text)
            }
            Event::Eval { step, loss, perplexity, .. } => {
                self.evaluations.push(Evaluation { step, loss, perplexity });
                (Tone::Plain, format!("step {step}: evaluation loss {loss:.4}, perplexity {perplexity:.2}"))
            }
            Event::Sample { step, prompt, text } => {
                let line = format!("step {step}: sample for \"{}\"", prompt.replace('\n', " "));
                push(&mut self.samples, Sample { step, prompt, text });
                (Tone::Plain, line)
            }
            Event::Warning { rule, message, advice } => {
                let text = format!("{message}; {advice}");
                let step = self.step();
                push(&mut self.warnings, Given { step, rule, message, advice });
                (Tone::Warn, text)
            }
            Event::Checkpoint { step, path, best } => {
                let path = path.display().to_string();
                if best {
                    self.best = Some((step, path.clone()));
                }
                self.checkpoint = Some((step, path));
                (Tone::Plain, format!("step {step}: checkpoint{}", if best { ", the best so far" } else { "" }))
            }
            Event::Changed { step, key, from, to } => {
                if key.ends_with("learning_rate") {
                    self.changed_rate = to.as_f64();
                }
                (Tone::Plain, format!("step {step}: {key} from {from} to {to}"))
            }
            Event::Queued { behind } => {
                let text = format!("waits for {behind}");
                self.state = State::Queued { behind };
                (Tone::Plain, text)
            }
            Event::Paused { step } => {
                self.state = State::Paused;
                (Tone::Warn, format!("step {step}: paused"))
            }
            Event::Continued { step } => {
                self.state = State::Running;
                (Tone::Good, format!("step {step}: goes on"))
            }
            Event::Resumed { step, .. } => {
                self.rewind(step);
                self.state = State::Running;
                (Tone::Good, format!("resumed from step {step}"))
            }
            Event::Stopped { step, path, reason } => {
                let text = format!("step {step}: stopped, {reason}");
                self.result = path.map(|path| path.display().to_string());
                self.state = State::Stopped { reason };
                (Tone::Warn, text)
            }
            Event::Failed { error, hint, .. } => {
                let text = format!("failed: {error}");
                self.state = State::Failed { error, hint };
                (Tone::Bad, text)
            }
            Event::Finished { steps, train_loss, eval_loss, path, .. } => {
                self.state = State::Finished;
                (self.train_loss, self.eval_loss) = (Some(train_loss), eval_loss);
                self.result = Some(path.display().to_string());
                (Tone::Good, format!("finished after {steps} updates"))
            }
        };
        push(&mut self.log, LogLine { time: time.to_owned(), tone, text });
    }

    /// A resumed run does the updates after its checkpoint again.
    fn rewind(&mut self, step: u64) {
        while self.recent.back().is_some_and(|point| point.step > step) {
            self.recent.pop_back();
        }
        while self.whole.last().is_some_and(|bucket| bucket.first > step) {
            self.whole.pop();
        }
        self.evaluations.retain(|evaluation| evaluation.step <= step);
        self.smooth = self.recent.back().map(|point| point.smooth).or(self.whole.last().map(|bucket| bucket.smooth));
    }

    /// The latest update; none before the first.
    pub fn last(&self) -> Option<&Point> {
        self.recent.back()
    }

    /// Updates done.
    pub fn step(&self) -> u64 {
        self.last().map_or(0, |point| point.step)
    }

    /// Updates of the whole run; 0 before it is known.
    pub fn steps(&self) -> u64 {
        self.started.as_ref().map_or(0, |started| started.steps)
    }

    /// Seconds that the updates left should take, by the latest ones.
    pub fn seconds_left(&self) -> Option<f64> {
        let left = self.steps().checked_sub(self.step())?;
        let mut latest: Vec<f64> = self.recent.iter().rev().take(50).map(|point| point.seconds).collect();
        if latest.is_empty() {
            return None;
        }
        latest.sort_by(f64::total_cmp);
        Some(latest[latest.len() / 2] * left as f64)
    }

    /// The evaluation with the lowest loss.
    pub fn best_evaluation(&self) -> Option<&Evaluation> {
        self.evaluations.iter().filter(|e| e.loss.is_finite()).min_by(|a, b| a.loss.total_cmp(&b.loss))
    }

    /// Losses of the whole run in its buckets, for a sparkline.
    pub fn losses(&self) -> Vec<f64> {
        self.whole.iter().map(|bucket| bucket.smooth).collect()
    }

    /// First update of the next epoch's end after the latest one.
    pub fn end_of_epoch(&self) -> Option<u64> {
        let (started, last) = (self.started.as_ref()?, self.last()?);
        if started.epochs <= 0.0 {
            return None;
        }
        let per_epoch = started.steps as f64 / started.epochs;
        Some((((last.epoch.floor() + 1.0) * per_epoch).round() as u64).min(started.steps))
    }
}

fn push<T>(list: &mut VecDeque<T>, item: T) {
    if list.len() == LINES {
        list.pop_front();
    }
    list.push_back(item);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(event: Event) -> Record {
        Record { time: "2026-11-22T10:00:00.000Z".into(), event }
    }

    fn step(step: u64, loss: f64) -> Record {
        record(Event::Step {
            step,
            epoch: 0.0,
            loss,
            grad_norm: 1.0,
            learning_rate: 1e-4,
            tokens: 10,
            label_tokens: 5,
            padding: 0,
            tokens_per_second: 100.0,
            seconds: 0.1,
            vram_bytes: 0,
        })
    }

    #[test]
    fn a_long_run_stays_small_and_whole() {
        let mut history = History::default();
        for index in 1..=100_000 {
            history.take(step(index, if index == 50_001 { 9.0 } else { 1.0 }));
        }
        assert_eq!(history.recent.len(), RECENT);
        assert!(history.whole.len() <= BUCKETS && history.whole.len() >= BUCKETS / 2);
        assert_eq!(history.whole.iter().map(|bucket| bucket.count).sum::<u64>(), 100_000);
        assert_eq!((history.whole[0].first, history.whole.last().unwrap().last), (1, 100_000));
        let highest = history.whole.iter().map(|bucket| bucket.high).fold(0.0, f64::max);
        assert_eq!(highest, 9.0);
    }

    #[test]
    fn a_resumed_run_takes_its_updates_back() {
        let mut history = History::default();
        (1..=30).for_each(|index| history.take(step(index, 1.0)));
        history.take(record(Event::Resumed { step: 20, process: 1, device: String::new(), reason: String::new() }));
        assert_eq!(history.step(), 20);
        (21..=25).for_each(|index| history.take(step(index, 1.0)));
        assert_eq!(history.whole.iter().map(|bucket| bucket.count).sum::<u64>(), 25);
    }

    #[test]
    fn a_loss_that_is_no_number_does_not_spoil_the_smoothed_one() {
        let mut history = History::default();
        history.take(step(1, 2.0));
        history.take(step(2, f64::NAN));
        history.take(step(3, 2.0));
        assert_eq!(history.last().unwrap().smooth, 2.0);
    }
}
