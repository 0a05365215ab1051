//! Events as lines for people.

use std::time::Duration;

use crate::run::{Event, Record};
use crate::spec::size;

/// Follows a run's events and says each in a line; knows how far the run is.
#[derive(Debug, Default)]
pub struct Narrator {
    steps: u64,
    /// Seconds of the last updates, for the time left.
    recent: std::collections::VecDeque<f64>,
}

/// What an event comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// An update: the line may be written over by the next one.
    Progress(String),
    /// Stays.
    Lasting(String),
    /// Stays, and should be noticed.
    Warning(String),
    /// The run's error, with what to do.
    Error { error: String, hint: String },
}

/// Updates whose mean decides the time left.
const RECENT: usize = 50;

impl Narrator {
    pub fn line(&mut self, record: &Record) -> Line {
        Line::Lasting(match &record.event {
            Event::Started {
                run,
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
                self.steps = *steps;
                format!(
                    "run {run}\nmodel {model}, {} parameters, {} trained\ndevice {device} ({reason})\n\
                     data {} rows, {} held out; {} updates, {} epochs",
                    count(*parameters),
                    count(*trainable_parameters),
                    grouped(*rows as u64),
                    grouped(*eval_rows as u64),
                    grouped(*steps),
                    short(*epochs)
                )
            }
            Event::Plan { peak_bytes, micro_sizes, estimated_step_seconds, recompute, .. } => format!(
                "plan {} at its peak, micro-batches of {} tokens, recompute: {recompute}, estimated {} an update",
                size::format(*peak_bytes),
                list(micro_sizes),
                duration(*estimated_step_seconds)
            ),
            Event::Step { step, loss, grad_norm, learning_rate, tokens_per_second, seconds, .. } => {
                if self.recent.len() == RECENT {
                    self.recent.pop_front();
                }
                self.recent.push_back(*seconds);
                let mean = self.recent.iter().sum::<f64>() / self.recent.len() as f64;
                let left = mean * self.steps.saturating_sub(*step) as f64;
                let of = if self.steps > 0 { format!("/{}", self.steps) } else { String::new() };
                let eta = if self.steps > 0 { format!("  eta {}", duration(left)) } else { String::new() };
                return Line::Progress(format!(
                    "step {step}{of}  loss {loss:.4}  grad norm {}  lr {}  {} tok/s{eta}",
                    short(*grad_norm),
                    short(*learning_rate),
                    grouped(tokens_per_second.round() as u64)
                ));
            }
            Event::Eval { step, loss, perplexity, .. } => {
                format!("eval at step {step}: loss {loss:.4}, perplexity {}", short(*perplexity))
            }
            Event::Sample { step, prompt, text } => {
                format!("sample at step {step}: {}\n  {}", one_line(prompt), text.trim().replace('\n', "\n  "))
            }
            Event::Warning { message, advice, .. } => {
                let advice = if advice.is_empty() { String::new() } else { format!("; {advice}") };
                return Line::Warning(format!("{message}{advice}"));
            }
            Event::Checkpoint { step, best, .. } => {
                format!("checkpoint at step {step}{}", if *best { ", the best so far" } else { "" })
            }
            Event::Changed { step, key, from, to } => format!("changed after step {step}: {key} {from} to {to}"),
            Event::Queued { behind } => format!("queued behind {behind}: the device is busy"),
            Event::Paused { step } => format!("paused after step {step}"),
            Event::Continued { step } => format!("continued after step {step}"),
            Event::Resumed { step, device, .. } if device.is_empty() => format!("resumed from step {step}"),
            Event::Resumed { step, device, reason, .. } => {
                format!("resumed from step {step} on {device} ({reason})")
            }
            Event::Stopped { step, reason, .. } => format!("stopped after step {step}: {reason}"),
            Event::Failed { error, hint, .. } => {
                return Line::Error { error: error.clone(), hint: hint.clone() };
            }
            Event::Finished { steps, seconds, train_loss, eval_loss, path } => {
                let eval = eval_loss.map(|loss| format!(", held-out loss {loss:.4}")).unwrap_or_default();
                format!(
                    "finished {} updates in {}: mean training loss {train_loss:.4}{eval}\nresult {}",
                    grouped(*steps),
                    duration(*seconds),
                    path.display()
                )
            }
        })
    }

    /// Told where a run's `started` was read elsewhere.
    pub fn expect(&mut self, steps: u64) {
        self.steps = steps;
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn list(sizes: &[usize]) -> String {
    sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

/// `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `134.5M`, for parameters.
pub fn count(number: u64) -> String {
    let value = number as f64;
    match number {
        0..1_000 => number.to_string(),
        1_000..1_000_000 => format!("{:.1}K", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}M", value / 1e6),
        _ => format!("{:.2}B", value / 1e9),
    }
}

/// Three digits that count: `0.812`, `1.90e-4`, `12.3`.
pub fn short(number: f64) -> String {
    let size = number.abs();
    if number == 0.0 || !number.is_finite() {
        return number.to_string();
    }
    match size {
        _ if size < 1e-2 => format!("{number:.2e}"),
        _ if size < 1e1 => format!("{number:.3}"),
        _ if size < 1e2 => format!("{number:.1}"),
        _ if size < 1e6 => format!("{number:.0}"),
        _ => format!("{number:.2e}"),
    }
}

/// `850 ms`, `12.3 s`, `4m05s`, `2h10m`, `3d04h`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".into();
    }
    let whole = Duration::from_secs_f64(seconds.min(1e9)).as_secs();
    match seconds {
        _ if seconds < 0.9995 => format!("{:.0} ms", seconds * 1e3),
        _ if seconds < 59.95 => format!("{seconds:.1} s"),
        _ if whole < 3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        _ if whole < 86_400 => format!("{}h{:02}m", whole / 3600, whole / 60 % 60),
        _ => format!("{}d{:02}h", whole / 86_400, whole / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_durations_readable() {
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(12), "12");
        assert_eq!(short(0.000_19), "1.90e-4");
        assert_eq!(short(0.8123), "0.812");
        assert_eq!(duration(0.85), "850 ms");
        assert_eq!(duration(245.0), "4m05s");
        assert_eq!(duration(100_000.0), "1d03h");
        assert_eq!(count(134_515_008), "134.5M");
    }
}
