//! Step 4: the run, live.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::Line;

use crate::advise::{Fix, live};
use crate::monitor::MachineSample;
use crate::run::Command;
use crate::spec::RunSpec;
use crate::tui::app::{App, Overlay, Purpose, Step};
use crate::tui::history::{History, State, Tone};
use crate::tui::keymap::Action;
use crate::tui::message::{Message, Request};
use crate::tui::theme::Role;
use crate::tui::widgets::chart::{Chart, Mark, Series};
use crate::tui::widgets::{Look, memory, take_bottom, take_left, take_top, text};

/// What the chart shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Curve {
    #[default]
    Loss,
    LearningRate,
    GradNorm,
    Speed,
}

/// What the panel under the chart shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Panel {
    #[default]
    Events,
    Samples,
    Warnings,
}

/// The run that is looked at.
#[derive(Default)]
pub struct TrainScreen {
    pub run: Option<String>,
    pub history: History,
    /// The run's own run file.
    pub spec: Option<Box<RunSpec>>,
    pub machine: MachineSample,
    pub log: bool,
    /// Only the latest updates.
    pub recent: bool,
    pub curve: Curve,
    pub panel: Panel,
    /// Lines scrolled back from the end of the panel.
    pub scroll: usize,
    /// Reading the events for the first time.
    pub opening: bool,
}

impl TrainScreen {
    /// Takes figures of the machine; false when none of those shown changed.
    pub fn set_machine(&mut self, sample: MachineSample) -> bool {
        let changed = self.machine != sample;
        self.machine = sample;
        changed
    }
}

impl App {
    /// Opens a run: its whole history, then what comes.
    pub fn open_run(&mut self, run: &str) {
        let screen = &mut self.train;
        if screen.run.as_deref() != Some(run) {
            (screen.history, screen.spec) = (History::default(), None);
            screen.scroll = 0;
        }
        screen.run = Some(run.to_owned());
        screen.opening = true;
        self.result.chat.forget();
        self.ask(Request::Open(run.to_owned()));
        self.go(Step::Train);
    }

    pub(in crate::tui) fn on_run(&mut self, message: Message) {
        match message {
            Message::Started(Ok(run)) => {
                self.tell(format!("run {run} is on its way; it goes on without this window"));
                self.open_run(&run);
            }
            Message::Started(Err(error)) => self.complain(error),
            Message::History { run, history, spec, whole } if self.train.run.as_ref() == Some(&run) => {
                (self.train.history, self.train.spec, self.train.opening) = (*history, spec, !whole);
            }
            Message::Events { run, records } if self.train.run.as_ref() == Some(&run) => {
                for record in records {
                    self.train.history.take(record);
                }
                self.train.opening = false;
            }
            Message::Died { run } if self.train.run.as_ref() == Some(&run) && self.train.history.state.is_live() => {
                self.train.history.state = State::Dead;
            }
            _ => {}
        }
    }

    /// Writes a command to the run's worker.
    pub(in crate::tui) fn send(&mut self, command: Command) {
        match (&self.train.run, self.train.history.state.is_live()) {
            (Some(run), true) => {
                let request = Request::Send { run: run.clone(), command };
                self.ask(request);
            }
            (Some(_), false) => {
                let state = self.train.history.state.name();
                self.complain(format!("the run is {state}; r on the Runs screen starts it again"));
            }
            (None, _) => self.complain("no run is open: 6 lists them"),
        }
    }

    pub(in crate::tui) fn act_train(&mut self, action: Action) -> bool {
        let screen = &mut self.train;
        match action {
            Action::PauseRun => {
                let paused = screen.history.state == State::Paused;
                self.send(if paused { Command::Continue } else { Command::Pause });
            }
            Action::SaveNow => self.send(Command::Save),
            Action::EvaluateNow => self.send(Command::Evaluate),
            Action::StopRun => match &screen.run {
                Some(run) if screen.history.state.is_live() => {
                    let request = Request::Send { run: run.clone(), command: Command::Stop };
                    let question = "Save a checkpoint and stop the run?".to_owned();
                    self.overlays.push(Overlay::Confirm { question, request });
                }
                _ => self.send(Command::Stop),
            },
            Action::SetRate => {
                if screen.history.state.is_live() && screen.run.is_some() {
                    let rate = screen.spec.as_ref().map_or(2e-4, |spec| crate::advise::before::learning_rate(spec));
                    self.edit(Purpose::LearningRate, &crate::advise::change::short(rate));
                } else {
                    self.send(Command::SetLearningRate(0.0));
                }
            }
            Action::ApplyLiveFix => self.apply_live_fix(),
            Action::ToggleLog => screen.log = !screen.log,
            Action::ToggleWindow => screen.recent = !screen.recent,
            Action::NextCurve => {
                screen.curve = match screen.curve {
                    Curve::Loss => Curve::LearningRate,
                    Curve::LearningRate => Curve::GradNorm,
                    Curve::GradNorm => Curve::Speed,
                    Curve::Speed => Curve::Loss,
                };
            }
            Action::NextPanel => {
                screen.scroll = 0;
                screen.panel = match screen.panel {
                    Panel::Events => Panel::Samples,
                    Panel::Samples => Panel::Warnings,
                    Panel::Warnings => Panel::Events,
                };
            }
            Action::PanelUp => screen.scroll = (screen.scroll + 1).min(2000),
            Action::PanelDown => screen.scroll = screen.scroll.saturating_sub(1),
            Action::SeeResult => self.go(Step::Result),
            _ => return false,
        }
        true
    }

    fn apply_live_fix(&mut self) {
        let history = &self.train.history;
        let Some(warning) = history.warnings.back() else {
            self.tell("no warnings");
            return;
        };
        let rate = self.train.spec.as_ref().map_or(2e-4, |spec| crate::advise::before::learning_rate(spec));
        let rate = history.changed_rate.unwrap_or(rate);
        let end = history.end_of_epoch().unwrap_or_else(|| history.steps());
        let (advice, fix) = (warning.advice.clone(), live::fix_for(&warning.rule, rate, end));
        match fix {
            Some(Fix::Evaluate) => self.send(Command::Evaluate),
            Some(Fix::LearningRate(rate)) => self.send(Command::SetLearningRate(rate)),
            Some(Fix::Stop) => {
                self.act_train(Action::StopRun);
            }
            Some(Fix::FinishEpoch { at_step }) => match &self.train.run {
                Some(run) if self.train.history.state.is_live() => {
                    let request = Request::StopAt { run: run.clone(), step: at_step };
                    self.ask(request);
                }
                _ => self.send(Command::Stop),
            },
            _ => self.tell(advice),
        }
    }

    pub(in crate::tui) fn draw_train(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let screen = &self.train;
        if screen.run.is_none() {
            let inner = look.panel(buffer, area, "Train", true);
            let words = "no run is open: start one on Tune (3), or open one on Runs (6)";
            look.put_lines(
                buffer,
                inner,
                text::wrap(words, inner.width as usize).into_iter().map(|l| look.line(Role::Dim, l)),
            );
            return;
        }
        let (head, rest) = take_top(area, 2.min(area.height));
        self.draw_progress(head, buffer, look);
        if area.width >= 110 {
            let (left, right) = take_left(rest, area.width * 2 / 3);
            let (chart, panel) = take_bottom(left, (left.height / 4).clamp(3, 14));
            let (main, second) =
                if chart.height >= 24 { take_bottom(chart, chart.height / 3) } else { take_bottom(chart, 0) };
            self.draw_curve(screen.curve, screen.recent, main, buffer, look);
            if second.height > 0 {
                // Beside the whole, the latest in full resolution; and the other way round.
                self.draw_curve(screen.curve, !screen.recent, second, buffer, look);
            }
            self.draw_panel(panel, buffer, look);
            let (figures, machine) = take_bottom(right, right.height / 2);
            self.draw_figures(figures, buffer, look);
            self.draw_machine(machine, buffer, look);
        } else {
            let small = rest.height < 16;
            let panel_rows = if small { 0 } else { (rest.height / 5).clamp(3, 8) };
            let (rest, panel) = take_bottom(rest, panel_rows);
            let (chart, figures) = take_bottom(rest, if small { 3.min(rest.height / 2) } else { 6 });
            self.draw_curve(screen.curve, screen.recent, chart, buffer, look);
            if figures.width >= 70 {
                let (left, right) = take_left(figures, figures.width / 2);
                self.draw_figures(left, buffer, look);
                self.draw_machine(right, buffer, look);
            } else {
                self.draw_figures(figures, buffer, look);
            }
            if panel.height > 0 {
                self.draw_panel(panel, buffer, look);
            }
        }
    }

    fn draw_progress(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let history = &self.train.history;
        let role = match history.state {
            State::Running | State::Finished => Role::Good,
            State::Failed { .. } | State::Dead => Role::Bad,
            _ => Role::Warn,
        };
        let (step, steps) = (history.step(), history.steps());
        let mut line = Line::from(vec![look.span(role, format!("{} ", look.glyphs.point))]);
        line.push_span(look.span(role, if self.train.opening { "opening" } else { history.state.name() }));
        let of = if steps > 0 { format!(" of {}", text::thousands(steps)) } else { String::new() };
        line.push_span(look.span(Role::Text, format!("  step {}{of}", text::thousands(step))));
        if let Some(point) = history.last() {
            let epochs = history.started.as_ref().map_or(0.0, |started| started.epochs);
            line.push_span(look.span(Role::Dim, format!("  epoch {:.2} of {}", point.epoch, text::three(epochs))));
        }
        match &history.state {
            State::Running => {
                if let Some(left) = history.seconds_left() {
                    line.push_span(look.span(Role::Dim, "  left "));
                    line.push_span(look.span(Role::Accent, text::duration(round_time(left))));
                }
            }
            State::Queued { behind } => line.push_span(look.span(Role::Dim, format!("  behind {behind}"))),
            State::Stopped { reason } => line.push_span(look.span(Role::Dim, format!("  {reason}"))),
            State::Failed { error, .. } => line.push_span(look.span(Role::Bad, format!("  {error}"))),
            State::Dead => line.push_span(look.span(Role::Bad, "  its worker is gone; r on Runs (6) resumes it")),
            _ => {}
        }
        look.put(buffer, area, line);
        let share = if steps > 0 { step as f64 / steps as f64 } else { 0.0 };
        let bar = Rect { y: area.y + 1, height: area.height.saturating_sub(1), ..area };
        look.put(buffer, bar, memory::share(share, Role::ChartSmooth, area.width, look));
    }

    fn draw_curve(&self, curve: Curve, recent: bool, area: Rect, buffer: &mut Buffer, look: &Look) {
        let name = match curve {
            Curve::Loss => "Loss",
            Curve::LearningRate => "Learning rate",
            Curve::GradNorm => "Grad norm",
            Curve::Speed => "Tokens per second",
        };
        let log = self.train.log && curve == Curve::Loss;
        let title = format!(
            "{name}, {}{}",
            if recent { "latest" } else { "whole run" },
            if log { ", logarithmic" } else { "" }
        );
        let inner = look.panel(buffer, area, &title, false);
        chart_of(&self.train.history, curve, recent, log, inner.width).draw(inner, buffer, look);
    }

    fn draw_figures(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let history = &self.train.history;
        let inner = look.panel(buffer, area, "Figures", false);
        let mut lines: Vec<Line<'static>> = Vec::new();
        let mut row = |pairs: Vec<(&'static str, String)>| {
            let mut line = Line::default();
            for (name, value) in pairs {
                line.push_span(look.span(Role::Dim, format!("{name} ")));
                line.push_span(look.span(Role::Text, format!("{value}  ")));
            }
            lines.push(line);
        };
        let last = history.last().copied().unwrap_or_default();
        let known = history.last().is_some();
        let or_dash = |text: String| if known { text } else { "-".into() };
        row(vec![("loss", or_dash(text::loss(last.loss))), ("smooth", or_dash(text::loss(last.smooth)))]);
        let eval = history.evaluations.last().map_or("-".into(), |e| text::loss(e.loss));
        let best = history.best_evaluation().map_or("-".into(), |e| format!("{} @{}", text::loss(e.loss), e.step));
        row(vec![("eval", eval), ("best", best)]);
        row(vec![
            ("rate", or_dash(text::three(last.learning_rate))),
            ("grad norm", or_dash(text::three(last.grad_norm))),
        ]);
        // What the plan thinks possible is the limit that the speed is held against.
        let share = if history.estimated_step_seconds > 0.0 && last.seconds > 0.0 {
            format!(" ({:.0}% of plan)", 100.0 * history.estimated_step_seconds / last.seconds)
        } else {
            String::new()
        };
        row(vec![("tok/s", or_dash(format!("{}{share}", text::count(last.tokens_per_second as u64))))]);
        row(vec![
            ("step", or_dash(text::duration(last.seconds))),
            ("trained", text::duration(round_time(history.seconds))),
        ]);
        row(vec![("tokens", text::count(history.tokens)), ("padding", or_dash(format!("{}%", padding(&last))))]);
        if let Some(started) = &history.started {
            row(vec![
                ("rows", text::thousands(started.rows as u64)),
                ("held out", text::thousands(started.eval_rows as u64)),
            ]);
            row(vec![("model", started.model.clone())]);
            row(vec![("device", started.device.clone())]);
            row(vec![(
                "trains",
                format!(
                    "{} of {} parameters",
                    text::count(started.trainable_parameters),
                    text::count(started.parameters)
                ),
            )]);
        }
        if let Some((step, _)) = &history.checkpoint {
            row(vec![("checkpoint", format!("step {step}"))]);
        }
        look.put_lines(buffer, inner, lines);
    }

    fn draw_machine(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let history = &self.train.history;
        let machine = &self.train.machine;
        let inner = look.panel(buffer, area, "Machine", false);
        let mut lines = Vec::new();
        let mut gauges: Vec<(&str, f64, String)> = Vec::new();
        let mut gauge = |name, share, words| gauges.push((name, share, words));
        let share = |used: u64, total: u64| used as f64 / total.max(1) as f64;
        for gpu in &machine.gpus {
            let words = format!("{} of {}", text::bytes(gpu.memory_used), text::bytes(gpu.memory_total));
            gauge("VRAM", share(gpu.memory_used, gpu.memory_total), words);
            let mut words = gpu.utilization.map(|percent| format!("{percent}%")).unwrap_or_default();
            if let Some(degrees) = gpu.temperature {
                words.push_str(&format!(" {degrees}C"));
            }
            if let (Some(power), Some(limit)) = (gpu.power, gpu.power_limit) {
                words.push_str(&format!(" {power:.0}/{limit:.0}W"));
            }
            gauge("GPU", f64::from(gpu.utilization.unwrap_or(0)) / 100.0, words);
        }
        let host = &machine.host;
        if host.memory_total > 0 {
            let words = format!("{} of {}", text::bytes(host.memory_used), text::bytes(host.memory_total));
            gauge("host", share(host.memory_used, host.memory_total), words);
            gauge("CPU", f64::from(host.cpu) / 100.0, format!("{:.0}% of {} cores", host.cpu, host.cores));
        }
        // Bars of one length, in the room that the longest words leave.
        let longest = gauges.iter().map(|(_, _, words)| words.len()).max().unwrap_or(0) as u16;
        let bar_width = inner.width.saturating_sub(longest + 6).clamp(2, 24);
        for (name, share, words) in gauges {
            let role = if share > 0.9 { Role::Warn } else { Role::ChartSmooth };
            let mut line = Line::from(look.span(Role::Dim, text::pad(name, 5, "")));
            line.spans.extend(memory::share(share, role, bar_width, look).spans);
            line.push_span(look.span(Role::Text, format!(" {words}")));
            lines.push(line);
        }
        if let Some(point) = history.last().filter(|point| point.vram_bytes > 0) {
            lines.push(Line::from(vec![
                look.span(Role::Dim, "run  "),
                look.span(Role::Text, format!("{} on the device", text::bytes(point.vram_bytes))),
            ]));
        }
        for gpu in &machine.gpus {
            if let Some(warning) = live::throttled(&gpu.throttle_reasons) {
                lines.push(look.line(Role::Warn, warning.message));
            }
        }
        if !history.plan_bytes.is_empty() {
            lines.push(memory::bar(&history.plan_bytes, None, inner.width, look));
            lines.extend(memory::legend(&history.plan_bytes, inner.width, look));
        }
        look.put_lines(buffer, inner, lines);
    }

    fn draw_panel(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let history = &self.train.history;
        let title = match self.train.panel {
            Panel::Events => "Events".to_owned(),
            Panel::Samples => format!("Samples {}", history.samples.len()),
            Panel::Warnings => format!("Warnings {}", history.warnings.len()),
        };
        let inner = look.panel(buffer, area, &title, false);
        let width = inner.width as usize;
        let mut lines: Vec<Line<'static>> = Vec::new();
        match self.train.panel {
            Panel::Events => {
                for line in history.log.iter().rev().take(inner.height as usize + self.train.scroll).rev() {
                    let role = match line.tone {
                        Tone::Plain => Role::Text,
                        Tone::Good => Role::Good,
                        Tone::Warn => Role::Warn,
                        Tone::Bad => Role::Bad,
                    };
                    let words =
                        text::shorten(&line.text.replace('\n', " "), width.saturating_sub(9), look.glyphs.ellipsis);
                    lines.push(Line::from(vec![
                        look.span(Role::Dim, format!("{} ", clock(&line.time))),
                        look.span(role, words),
                    ]));
                }
                if let State::Failed { hint, .. } = &history.state {
                    lines.extend(text::wrap(hint, width).into_iter().map(|line| look.line(Role::Warn, line)));
                }
            }
            Panel::Samples => {
                for sample in history.samples.iter().rev().take(8).rev() {
                    let head = format!("step {}: {}", sample.step, sample.prompt.replace('\n', " "));
                    lines.push(look.line(Role::Accent, text::shorten(&head, width, look.glyphs.ellipsis)));
                    lines.extend(text::wrap(&sample.text, width).into_iter().map(|line| look.line(Role::Text, line)));
                }
                if lines.is_empty() {
                    lines.push(look.line(Role::Dim, "no samples; sample.prompts asks for them at every evaluation"));
                }
            }
            Panel::Warnings => {
                for warning in history.warnings.iter().rev().take(20).rev() {
                    let words = format!(
                        "{} step {}: {}; {}",
                        look.glyphs.warning, warning.step, warning.message, warning.advice
                    );
                    lines.extend(text::wrap(&words, width).into_iter().map(|line| look.line(Role::Warn, line)));
                }
                if lines.is_empty() {
                    lines.push(look.line(Role::Good, "none"));
                }
            }
        }
        let height = inner.height as usize;
        let most = lines.len().saturating_sub(height);
        let from = most - self.train.scroll.min(most);
        look.put_lines(buffer, inner, lines.into_iter().skip(from));
    }
}

/// A curve of a run: the whole in its buckets, or the latest updates.
pub fn chart_of(history: &History, curve: Curve, recent: bool, log: bool, width: u16) -> Chart {
    let columns = u64::from(Chart::plot_width(width).max(1)) * 2;
    let x = if recent {
        // The window moves by quarters, so that most of the picture stays where it is.
        let quarter = (columns / 4).max(1);
        let end = history.step().div_ceil(quarter).max(4) * quarter;
        ((end - 4 * quarter) as f64, end as f64)
    } else {
        (0.0, history.steps().max(history.step()).max(1) as f64)
    };
    let label = match curve {
        Curve::Speed => |value: f64| text::count(value.max(0.0) as u64),
        _ => text::three,
    };
    let mut series = Vec::new();
    if recent {
        let points = || history.recent.iter().filter(|point| point.step as f64 >= x.0);
        let line = |name, role, value: fn(&crate::tui::history::Point) -> f64| {
            Series::line(name, role, points().map(|point| (point.step as f64, value(point))))
        };
        match curve {
            Curve::Loss => {
                let raw = points().map(|p| (p.step as f64, p.loss, p.loss)).collect();
                series.push(Series { name: "raw", role: Role::ChartRaw, mark: Mark::Range, points: raw });
                series.push(line("smooth", Role::ChartSmooth, |p| p.smooth));
            }
            Curve::LearningRate => series.push(line("", Role::ChartSmooth, |p| p.learning_rate)),
            Curve::GradNorm => series.push(line("", Role::ChartSmooth, |p| p.grad_norm)),
            Curve::Speed => series.push(line("", Role::ChartSmooth, |p| p.tokens_per_second)),
        }
    } else {
        let middle = |bucket: &crate::tui::history::Bucket| (bucket.first + bucket.last) as f64 / 2.0;
        let line = |name, role, value: fn(&crate::tui::history::Bucket) -> f64| {
            Series::line(name, role, history.whole.iter().map(|bucket| (middle(bucket), value(bucket))))
        };
        match curve {
            Curve::Loss => {
                let raw = history.whole.iter().map(|bucket| (middle(bucket), bucket.low, bucket.high)).collect();
                series.push(Series { name: "raw", role: Role::ChartRaw, mark: Mark::Range, points: raw });
                series.push(line("smooth", Role::ChartSmooth, |b| b.smooth));
            }
            Curve::LearningRate => series.push(line("", Role::ChartSmooth, |b| b.learning_rate)),
            Curve::GradNorm => series.push(line("", Role::ChartSmooth, |b| b.grad_norm)),
            Curve::Speed => series.push(line("", Role::ChartSmooth, |b| b.tokens_per_second)),
        }
    }
    if curve == Curve::Loss {
        let points = history.evaluations.iter().map(|e| (e.step as f64, e.loss, e.loss)).collect();
        series.push(Series { name: "eval", role: Role::ChartEval, mark: Mark::Points, points });
    }
    Chart { series, x, log, label, x_name: "step" }
}

fn padding(point: &crate::tui::history::Point) -> u64 {
    100 * point.padding / (point.tokens + point.padding).max(1)
}

/// Long times in coarse steps: a figure that changes with every frame is read by nobody.
fn round_time(seconds: f64) -> f64 {
    match seconds {
        s if s >= 600.0 => (s / 60.0).round() * 60.0,
        s if s >= 120.0 => (s / 10.0).round() * 10.0,
        s => s.round(),
    }
}

/// Hours, minutes and seconds of a time stamp, in local time.
fn clock(time: &str) -> String {
    chrono::DateTime::parse_from_rfc3339(time)
        .map(|time| time.with_timezone(&chrono::Local).format("%H:%M:%S").to_string())
        .unwrap_or_else(|_| "--:--:--".into())
}
