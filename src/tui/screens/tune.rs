//! Step 3: hyperparameters, memory and time, warnings.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::Line;

use super::super::message::Forecast;
use crate::advise::{Fix, before};
use crate::spec::domain::Domain;
use crate::spec::keys::{KEYS, Key};
use crate::spec::{MethodKind, RunSpec};
use crate::tui::app::{App, Purpose, Step};
use crate::tui::keymap::Action;
use crate::tui::message::Request;
use crate::tui::theme::Role;
use crate::tui::widgets::list::fuzzy;
use crate::tui::widgets::{Look, memory, take_bottom, take_left, text, window_start};

/// A named set of values.
pub struct Preset {
    pub name: &'static str,
    pub help: &'static str,
    pub values: &'static [(&'static str, &'static str)],
}

/// Presets in the order in which the key goes through them.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "usual",
        help: "LoRA as most guides start",
        values: &[
            ("method.kind", "lora"),
            ("method.rank", "16"),
            ("method.alpha", "16"),
            ("method.dropout", "0.0"),
            ("train.epochs", "1.0"),
            ("train.batch", "8"),
            ("train.learning_rate", "2e-4"),
            ("train.schedule", "linear"),
            ("train.warmup", "0.05"),
        ],
    },
    Preset {
        name: "careful",
        help: "little data: two epochs, a lower rate, dropout, patience",
        values: &[
            ("method.kind", "lora"),
            ("method.rank", "8"),
            ("method.alpha", "8"),
            ("method.dropout", "0.05"),
            ("train.epochs", "2.0"),
            ("train.batch", "8"),
            ("train.learning_rate", "1e-4"),
            ("train.schedule", "cosine"),
            ("train.eval_every", "0.05"),
            ("train.patience", "3"),
        ],
    },
    Preset {
        name: "large adapter",
        help: "much data: rank 64, rank-stabilised",
        values: &[
            ("method.kind", "lora"),
            ("method.rank", "64"),
            ("method.alpha", "16"),
            ("method.rslora", "true"),
            ("train.epochs", "1.0"),
            ("train.batch", "16"),
            ("train.learning_rate", "2e-4"),
            ("train.schedule", "cosine"),
        ],
    },
    Preset {
        name: "full",
        help: "every weight, at a tenth of LoRA's rate",
        values: &[
            ("method.kind", "full"),
            ("train.epochs", "1.0"),
            ("train.batch", "16"),
            ("train.learning_rate", "2e-5"),
            ("train.schedule", "cosine"),
        ],
    },
];

/// The form.
#[derive(Default)]
pub struct TuneScreen {
    pub filter: String,
    /// Place among the fields shown.
    pub selected: usize,
    /// The warning whose fix is applied next.
    pub warning: usize,
    /// The preset that was applied last.
    pub preset: Option<usize>,
}

impl TuneScreen {
    pub fn set_filter(&mut self, text: String) {
        self.filter = text;
        self.selected = 0;
    }

    /// Fields that match, in the table's order, or best match first.
    pub fn fields(&self) -> Vec<&'static Key> {
        let keys: Vec<&'static Key> =
            FIELDS.iter().filter_map(|(section, name)| crate::spec::keys::find(section, name)).collect();
        let rest = KEYS.iter().filter(|key| !FIELDS.contains(&(key.section, key.name)));
        let all: Vec<&'static Key> = keys.into_iter().chain(rest).collect();
        // A key's own name counts more than its help and the names that others have for it.
        let names: Vec<String> = all.iter().map(|key| key.path()).collect();
        let words: Vec<String> = all.iter().map(|key| format!("{} {}", key.help, key.synonyms.join(" "))).collect();
        let mut order = fuzzy(&self.filter, &names);
        for at in fuzzy(&self.filter, &words) {
            if !order.contains(&at) {
                order.push(at);
            }
        }
        order.into_iter().map(|at| all[at]).collect()
    }
}

/// What most people change comes first; the rest of the table follows.
const FIELDS: [(&str, &str); 18] = [
    ("method", "kind"),
    ("method", "rank"),
    ("method", "alpha"),
    ("method", "dropout"),
    ("method", "targets"),
    ("method", "rslora"),
    ("train", "epochs"),
    ("train", "steps"),
    ("train", "batch"),
    ("train", "learning_rate"),
    ("train", "schedule"),
    ("train", "warmup"),
    ("train", "weight_decay"),
    ("train", "eval_every"),
    ("train", "patience"),
    ("data", "max_length"),
    ("data", "eval"),
    ("data", "packing"),
];

/// The value as the form shows it.
pub fn shown_value(spec: &RunSpec, key: &Key) -> String {
    match spec.get(key) {
        Some(toml::Value::String(text)) => text,
        Some(toml::Value::Float(value)) => crate::advise::change::short(value),
        Some(toml::Value::Array(values)) if values.iter().any(toml::Value::is_table) => {
            format!("{} sources", values.len())
        }
        Some(value) => value.to_string(),
        None => match key.path().as_str() {
            "train.learning_rate" => crate::advise::change::short(before::learning_rate(spec)),
            _ => "-".into(),
        },
    }
}

/// The next sensible value, up or down; none at the end of the range or where there is no order.
pub fn neighbour(spec: &RunSpec, key: &Key, up: bool) -> Option<String> {
    let value = spec.get(key);
    let number = || value.as_ref().and_then(|value| value.as_float().or(value.as_integer().map(|n| n as f64)));
    match key.domain {
        Domain::Flag => Some((!value.as_ref()?.as_bool()?).to_string()),
        Domain::Choice(words) => {
            let at = words.iter().position(|word| value.as_ref().and_then(|v| v.as_str()) == Some(word))?;
            let next = if up { at + 1 } else { at + words.len() - 1 };
            Some(words[next % words.len()].to_owned())
        }
        Domain::Whole { least, most } => {
            let now = value.as_ref().and_then(toml::Value::as_integer).unwrap_or(match key.name {
                "steps" => 30,
                _ => least,
            });
            let doubles = matches!(key.name, "rank" | "batch" | "max_length" | "steps");
            let next = match (doubles, up) {
                (true, true) => (now as u64).next_power_of_two().max(now as u64 + 1).next_power_of_two() as i64,
                (true, false) => 1i64 << (63 - ((now - 1).max(1)).leading_zeros()),
                (false, true) => now + 1,
                (false, false) => now - 1,
            };
            Some(next.clamp(least, most).to_string()).filter(|_| next.clamp(least, most) != now)
        }
        Domain::Real { .. } | Domain::Share | Domain::Evaluation => {
            let now = number().or((key.name == "learning_rate").then(|| before::learning_rate(spec)))?;
            let next = match key.name {
                "learning_rate" | "epsilon" | "weight_decay" => ladder(now, up),
                "alpha" => {
                    if up {
                        now * 2.0
                    } else {
                        now / 2.0
                    }
                }
                "epochs" => {
                    if up {
                        (now + 0.5).floor().max(1.0) + if now >= 1.0 && now.fract() == 0.0 { 1.0 } else { 0.0 }
                    } else if now > 1.0 {
                        (now - 1.0).max(1.0)
                    } else {
                        now / 2.0
                    }
                }
                "max_grad_norm" => {
                    if up {
                        now + 0.5
                    } else {
                        (now - 0.5).max(0.0)
                    }
                }
                _ if now >= 1.0 => {
                    if up {
                        now * 2.0
                    } else {
                        now / 2.0
                    }
                }
                _ => round((now + if up { 0.05 } else { -0.05 }).max(0.0)),
            };
            let text = crate::advise::change::short(next);
            // Whole numbers stay whole, and the range counts.
            let next = text.parse::<toml::Value>().ok()?;
            let float = next.as_integer().map_or(next.clone(), |n| toml::Value::Float(n as f64));
            (key.domain.accepts(&next) || key.domain.accepts(&float)).then_some(text)
        }
        _ => None,
    }
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// 1, 2, 5, 10, 20, 50 ... times a power of ten.
fn ladder(now: f64, up: bool) -> f64 {
    if now <= 0.0 {
        return if up { 1e-3 } else { 0.0 };
    }
    let power = 10f64.powf(now.log10().floor());
    let steps = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0].map(|factor| factor * power);
    let next = if up {
        steps.into_iter().find(|step| *step > now * 1.001)
    } else {
        steps.into_iter().rev().find(|step| *step < now * 0.999)
    };
    // Powers of ten in floating point are a little off.
    format!("{:.3e}", next.unwrap_or(now)).parse().unwrap_or(now)
}

impl App {
    /// Asks what the run file takes.
    pub(in crate::tui) fn refresh_forecast(&mut self) {
        self.forecast_of(self.draft.spec.clone());
    }

    fn forecast_of(&mut self, spec: RunSpec) {
        if spec.model.id.is_empty() {
            (self.draft.forecast, self.draft.forecasting) = (None, false);
            return;
        }
        self.draft.forecast_generation += 1;
        self.draft.forecasting = true;
        let request = Request::Forecast {
            generation: self.draft.forecast_generation,
            spec: Box::new(spec),
            lengths: self.draft.lengths.clone(),
            rows: self.draft.preview.as_ref().and_then(|preview| Some(preview.as_ref().ok()?.rows)),
        };
        // Only the latest counts: an older one that was not handed out yet need not be.
        self.requests.retain(|request| !matches!(request, Request::Forecast { .. }));
        self.ask(request);
    }

    pub(in crate::tui) fn on_forecast(&mut self, generation: u64, result: Result<Box<Forecast>, String>) {
        if generation == self.draft.forecast_generation {
            self.draft.forecast = Some(result);
            self.draft.forecasting = false;
            self.draft.judge();
            self.tune.warning = self.tune.warning.min(self.draft.warnings.len().saturating_sub(1));
        }
    }

    fn field(&self) -> Option<&'static Key> {
        self.tune.fields().get(self.tune.selected).copied()
    }

    /// Puts a changed run file in place and asks for what follows.
    fn change(&mut self, spec: RunSpec) {
        let data_changed = spec.data != self.draft.spec.data || spec.model != self.draft.spec.model;
        if self.draft.change(spec) {
            self.tune.warning = self.tune.warning.min(self.draft.warnings.len().saturating_sub(1));
            if data_changed {
                self.refresh_preview();
            }
            self.refresh_forecast();
        }
    }

    /// A value being typed: memory and time follow it as soon as it is one.
    pub(in crate::tui) fn try_field(&mut self, text: &str) -> Result<(), String> {
        let spec = self.with_field(text)?;
        self.forecast_of(spec);
        Ok(())
    }

    /// Takes a typed value.
    pub(in crate::tui) fn set_field(&mut self, text: &str) -> Result<(), String> {
        let spec = self.with_field(text)?;
        self.change(spec);
        Ok(())
    }

    fn with_field(&self, text: &str) -> Result<RunSpec, String> {
        let key = self.field().ok_or("no field is marked")?;
        let mut spec = self.draft.spec.clone();
        if key.default.is_none() && matches!(text.trim(), "" | "-") {
            spec.reset(key);
            return Ok(spec);
        }
        spec.set(&key.path(), text.trim()).map_err(|problem| match problem.hint {
            Some(hint) => format!("{}; {hint}", problem.message),
            None => problem.message,
        })?;
        Ok(spec)
    }

    pub(in crate::tui) fn act_tune(&mut self, action: Action) -> bool {
        let last = self.tune.fields().len().saturating_sub(1);
        match action {
            Action::Up => self.tune.selected = self.tune.selected.saturating_sub(1),
            Action::Down => self.tune.selected = (self.tune.selected + 1).min(last),
            Action::PageUp => self.tune.selected = self.tune.selected.saturating_sub(10),
            Action::PageDown => self.tune.selected = (self.tune.selected + 10).min(last),
            Action::First => self.tune.selected = 0,
            Action::Last => self.tune.selected = last,
            Action::EditField => match self.field() {
                Some(key) => {
                    let value = self.draft.spec.get(key).map_or(String::new(), |value| match value {
                        toml::Value::String(text) => text,
                        toml::Value::Float(value) => crate::advise::change::short(value),
                        other => other.to_string(),
                    });
                    self.edit(Purpose::Field, &value);
                }
                None => self.complain("no field is marked"),
            },
            Action::Increase | Action::Decrease => {
                let up = action == Action::Increase;
                let next = self.field().map(|key| (key, neighbour(&self.draft.spec, key, up)));
                match next {
                    Some((key, Some(text))) => {
                        let mut spec = self.draft.spec.clone();
                        match spec.set(&key.path(), &text) {
                            Ok(()) => self.change(spec),
                            Err(problem) => self.complain(problem.message),
                        }
                    }
                    Some((key, None)) => self.tell(format!("{}: {}", key.path(), key.domain.allowed())),
                    None => self.complain("no field is marked"),
                }
            }
            Action::ResetField => {
                if let Some(key) = self.field() {
                    let mut spec = self.draft.spec.clone();
                    spec.reset(key);
                    self.change(spec);
                }
            }
            Action::UndoEdit => {
                if self.draft.undo() {
                    self.refresh_preview();
                    self.refresh_forecast();
                } else {
                    self.tell("nothing to take back");
                }
            }
            Action::NextWarning => {
                let count = self.draft.warnings.len().max(1);
                self.tune.warning = (self.tune.warning + 1) % count;
            }
            Action::ApplyFix => self.apply_fix(),
            Action::NextPreset => {
                let next = self.tune.preset.map_or(0, |at| (at + 1) % PRESETS.len());
                self.tune.preset = Some(next);
                let preset = &PRESETS[next];
                let mut spec = self.draft.spec.clone();
                for (key, value) in preset.values {
                    if let Err(problem) = spec.set(key, value) {
                        self.complain(problem.message);
                        return true;
                    }
                }
                self.change(spec);
                self.tell(format!("preset {}: {}", preset.name, preset.help));
            }
            Action::StartRun => self.start_run(),
            _ => return false,
        }
        true
    }

    fn apply_fix(&mut self) {
        let Some(warning) = self.draft.warnings.get(self.tune.warning).cloned() else {
            self.tell("no warnings");
            return;
        };
        match &warning.fix {
            Some(Fix::Change(changes)) => {
                let mut spec = self.draft.spec.clone();
                changes.iter().for_each(|change| change.apply(&mut spec));
                self.change(spec);
                self.tell(format!("{} (u takes it back)", Fix::Change(changes.clone()).describe()));
            }
            Some(Fix::OpenData) => self.go(Step::Data),
            _ => self.tell(format!("no single change mends it: {}", warning.advice)),
        }
    }

    fn start_run(&mut self) {
        let spec = &self.draft.spec;
        if spec.model.id.is_empty() {
            self.complain("no model chosen yet: 1");
        } else if self.draft.data_name().is_empty() {
            self.complain("no data chosen yet: 2");
        } else if let Some(Err(error)) = &self.draft.forecast {
            self.complain(error.clone());
        } else if let Some(Ok(forecast)) = &self.draft.forecast
            && !forecast.fits()
        {
            self.complain("it does not fit: see the memory bar");
        } else {
            self.ask(Request::Start(Box::new(self.draft.spec.clone())));
            self.tell("starting");
        }
    }

    pub(in crate::tui) fn draw_tune(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let (body, help) = take_bottom(area, if area.height >= 16 { 2 } else { 1 });
        self.draw_field_help(help, buffer, look);
        if area.width >= 64 {
            let (form, side) = take_left(body, (body.width * 9 / 20).clamp(34, 70));
            self.draw_form(form, buffer, look);
            let warnings =
                self.warning_rows(side.width as usize).clamp(3, side.height.saturating_sub(8).max(3) as usize);
            let (top, bottom) = take_bottom(side, (warnings as u16 + 2).min(side.height / 2 + 2));
            self.draw_forecast(top, buffer, look);
            self.draw_warnings(bottom, buffer, look);
        } else {
            let (form, side) = take_bottom(body, (body.height / 2).max(4));
            self.draw_form(form, buffer, look);
            let (top, bottom) = take_bottom(side, side.height / 2);
            self.draw_forecast(top, buffer, look);
            self.draw_warnings(bottom, buffer, look);
        }
    }

    fn warning_rows(&self, width: usize) -> usize {
        let lines = |text: &str| text::wrap(text, width.saturating_sub(6)).len();
        self.draft.warnings.iter().map(|warning| lines(&warning.message) + 1).sum()
    }

    fn draw_field_help(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let Some(key) = self.field() else { return };
        let default = key.default.map(|text| format!("; default {text}")).unwrap_or_default();
        let lines = vec![
            Line::from(vec![look.span(Role::Accent, key.path()), look.span(Role::Text, format!("  {}", key.help))]),
            look.line(Role::Dim, format!("{}{default}", key.domain.allowed())),
        ];
        look.put_lines(buffer, area, lines);
    }

    fn draw_form(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let fields = self.tune.fields();
        let title = match self.tune.filter.as_str() {
            "" => "Hyperparameters".to_owned(),
            filter => format!("{} matching \"{filter}\"", fields.len()),
        };
        let inner = look.panel(buffer, area, &title, true);
        let name_width = 18.min(inner.width as usize / 2);
        let start = window_start(self.tune.selected, fields.len(), inner.height as usize);
        for (row, key) in fields.iter().enumerate().skip(start).take(inner.height as usize) {
            let at = Rect { y: inner.y + (row - start) as u16, height: 1, ..inner };
            let marked = row == self.tune.selected;
            let value = shown_value(&self.draft.spec, key);
            let changed = self.draft.spec.get(key) != key.default_value();
            let warned = self.draft.warnings.iter().any(|warning| warning.key == key.path());
            let unused = self.is_unused(key);
            let sign = if warned {
                look.glyphs.warning
            } else if marked {
                look.glyphs.marker
            } else {
                " "
            };
            let room = (inner.width as usize).saturating_sub(name_width + 3);
            let role = if unused { Role::Dim } else { Role::Text };
            let line = Line::from(vec![
                look.span(if warned { Role::Warn } else { Role::Accent }, format!("{sign} ")),
                look.span(role, text::pad(key.name, name_width, look.glyphs.ellipsis)),
                look.span(Role::Text, " "),
                look.span(
                    if unused {
                        Role::Dim
                    } else if changed {
                        Role::Accent
                    } else {
                        Role::Text
                    },
                    text::shorten_start(&value, room, look.glyphs.ellipsis),
                ),
            ]);
            look.put(buffer, at, line);
            if marked {
                match self.editing.as_ref().filter(|editing| editing.purpose == Purpose::Field) {
                    Some(editing) => {
                        let skip = (name_width + 3) as u16;
                        let field = Rect { x: at.x + skip, width: at.width.saturating_sub(skip), ..at };
                        look.put(buffer, field, look.line(Role::Text, " ".repeat(field.width as usize)));
                        editing.input.draw(field, buffer, look, "");
                    }
                    None => buffer.set_style(at, look.style(Role::Selection)),
                }
            }
        }
    }

    /// Keys that do nothing with the chosen method.
    fn is_unused(&self, key: &Key) -> bool {
        let full = self.draft.spec.method.kind == MethodKind::Full;
        (full && key.section == "method" && key.name != "kind")
            || (key.name == "epochs" && self.draft.spec.train.steps.is_some())
    }

    fn draw_forecast(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let title = if self.draft.forecasting { "Memory and time (planning)" } else { "Memory and time" };
        let inner = look.panel(buffer, area, title, false);
        let forecast = match &self.draft.forecast {
            Some(Ok(forecast)) => forecast,
            Some(Err(error)) => {
                let lines = text::wrap(error, inner.width as usize).into_iter().map(|line| look.line(Role::Bad, line));
                look.put_lines(buffer, inner, lines);
                return;
            }
            None => {
                let words = if self.draft.spec.model.id.is_empty() { "choose a model first (1)" } else { "planning" };
                look.put(buffer, inner, look.line(Role::Dim, words));
                return;
            }
        };
        let used = memory::draw(&forecast.bytes, forecast.capacity, inner, buffer, look);
        let rest = Rect { y: inner.y + used, height: inner.height - used, ..inner };
        let mut lines = Vec::new();
        let mut time =
            vec![look.span(Role::Dim, "step "), look.span(Role::Text, text::duration(forecast.step_seconds))];
        if let Some(seconds) = forecast.seconds() {
            time.push(look.span(Role::Dim, "  run "));
            time.push(look.span(Role::Accent, text::duration(seconds)));
        }
        time.push(look.span(Role::Dim, "  (estimates)"));
        lines.push(Line::from(time));
        if let (Some(updates), Some(per_epoch)) = (forecast.updates, forecast.updates_per_epoch) {
            let rows = match &self.draft.preview {
                Some(Ok(preview)) => preview.rows,
                _ => 0,
            };
            lines.push(Line::from(vec![
                look.span(Role::Dim, "updates "),
                look.span(Role::Text, text::thousands(updates)),
                look.span(Role::Dim, "  an epoch "),
                look.span(
                    Role::Text,
                    format!("{} of {} rows", text::thousands(per_epoch), text::thousands(rows as u64)),
                ),
            ]));
        }
        let share = 100.0 * forecast.trainable_parameters as f64 / forecast.parameters.max(1) as f64;
        lines.push(Line::from(vec![
            look.span(Role::Dim, "trains "),
            look.span(Role::Text, text::count(forecast.trainable_parameters)),
            look.span(
                Role::Dim,
                format!(" of {} parameters ({}%)", text::count(forecast.parameters), text::three(share)),
            ),
        ]));
        let sizes = match forecast.micro_sizes.as_slice() {
            [first, .., last] if forecast.micro_sizes.len() > 4 => {
                format!("{first} to {last}, {} sizes", forecast.micro_sizes.len())
            }
            few => few.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        };
        lines.push(Line::from(vec![
            look.span(Role::Dim, "micro-batches "),
            look.span(Role::Text, format!("{sizes} tokens")),
        ]));
        lines.push(Line::from(vec![look.span(Role::Dim, "on "), look.span(Role::Text, forecast.device.clone())]));
        if !forecast.reason.is_empty() {
            lines.extend(
                text::wrap(&forecast.reason, rest.width as usize).into_iter().map(|line| look.line(Role::Dim, line)),
            );
        }
        look.put_lines(buffer, rest, lines);
    }

    fn draw_warnings(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let warnings = &self.draft.warnings;
        let title = match warnings.len() {
            0 => "Warnings: none".to_owned(),
            count => format!("Warnings {} of {count}", self.tune.warning + 1),
        };
        let inner = look.panel(buffer, area, &title, false);
        if warnings.is_empty() {
            let known = matches!(self.draft.preview, Some(Ok(_)));
            let words = if known { "nothing to say against it" } else { "rules about the data wait for the data" };
            look.put(buffer, inner, look.line(if known { Role::Good } else { Role::Dim }, words));
            return;
        }
        let width = inner.width as usize;
        let mut lines = Vec::new();
        let mut marked_at = 0;
        for (at, warning) in warnings.iter().enumerate() {
            let marked = at == self.tune.warning;
            if marked {
                marked_at = lines.len();
            }
            let sign = if marked { look.glyphs.marker } else { look.glyphs.warning };
            for (row, line) in text::wrap(&warning.message, width.saturating_sub(2)).into_iter().enumerate() {
                let sign = if row == 0 { sign } else { " " };
                let role = if marked { Role::Accent } else { Role::Text };
                lines.push(Line::from(vec![look.span(Role::Warn, format!("{sign} ")), look.span(role, line)]));
            }
            let fix = match &warning.fix {
                Some(fix) => format!("f: {}", fix.describe()),
                None => warning.advice.clone(),
            };
            let words = format!("{fix}  ({})", warning.source_names());
            let words = text::shorten(&words, width.saturating_sub(2), look.glyphs.ellipsis);
            lines.push(look.line(Role::Dim, format!("  {words}")));
        }
        let most = lines.len().saturating_sub(inner.height as usize);
        look.put_lines(buffer, inner, lines.into_iter().skip(marked_at.min(most)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(path: &str) -> &'static Key {
        crate::spec::keys::find_path(path).unwrap()
    }

    #[test]
    fn neighbours_are_sensible_values() {
        let spec = RunSpec::default();
        let up = |path| neighbour(&spec, key(path), true);
        let down = |path| neighbour(&spec, key(path), false);
        assert_eq!(up("method.rank").as_deref(), Some("32"));
        assert_eq!(down("method.rank").as_deref(), Some("8"));
        assert_eq!(up("train.learning_rate").as_deref(), Some("5e-4"));
        assert_eq!(down("train.learning_rate").as_deref(), Some("1e-4"));
        assert_eq!(up("train.epochs").as_deref(), Some("2"));
        assert_eq!(down("train.epochs").as_deref(), Some("0.5"));
        assert_eq!(up("train.schedule").as_deref(), Some("cosine"));
        assert_eq!(up("data.packing").as_deref(), Some("false"));
        assert_eq!(up("method.dropout").as_deref(), Some("0.05"));
        assert_eq!(down("method.dropout").as_deref(), Some("0"));
        assert_eq!(up("data.template"), None);
    }

    #[test]
    fn every_neighbour_of_every_key_is_accepted() {
        for key in KEYS {
            for up in [true, false] {
                let mut spec = RunSpec::default();
                for _ in 0..40 {
                    let Some(text) = neighbour(&spec, key, up) else { break };
                    spec.set(&key.path(), &text)
                        .unwrap_or_else(|problem| panic!("{} = {text}: {problem:?}", key.path()));
                }
            }
        }
    }

    #[test]
    fn every_preset_is_accepted() {
        for preset in PRESETS {
            let mut spec = RunSpec::default();
            for (key, value) in preset.values {
                spec.set(key, value).unwrap();
            }
        }
    }

    #[test]
    fn the_form_has_every_key_once() {
        let fields = TuneScreen::default().fields();
        assert_eq!(fields.len(), KEYS.len());
    }
}
