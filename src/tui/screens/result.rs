//! Step 5: what came of it.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::Line;

use super::chat::Chat;
use super::train::{Curve, chart_of};
use crate::tui::app::{App, Overlay, Purpose};
use crate::tui::history::State;
use crate::tui::keymap::Action;
use crate::tui::message::Request;
use crate::tui::theme::Role;
use crate::tui::widgets::{Look, take_bottom, text};

/// The chat; the rest is the run's history.
#[derive(Default)]
pub struct ResultScreen {
    pub chat: Chat,
}

impl App {
    pub(in crate::tui) fn act_result(&mut self, action: Action) -> bool {
        match action {
            Action::ChatWith => {
                if self.has_result() {
                    self.overlays.push(Overlay::Chat);
                }
            }
            Action::Export => {
                if self.has_result() {
                    let name = self.train.run.clone().unwrap_or_default();
                    self.edit(Purpose::ExportTo, &format!("./{name}"));
                }
            }
            Action::TrainAgain => match &self.train.run {
                Some(run) => {
                    let request = Request::LoadRun(run.clone());
                    self.ask(request);
                }
                None => self.complain("no run is open: 6 lists them"),
            },
            _ => return false,
        }
        true
    }

    /// Whether there is something to chat with or to export; says why not.
    fn has_result(&mut self) -> bool {
        let history = &self.train.history;
        let there = history.result.is_some() || history.checkpoint.is_some();
        if self.train.run.is_none() {
            self.complain("no run is open: 6 lists them");
        } else if !there {
            self.complain("nothing saved yet: s on Train writes a checkpoint");
        }
        self.train.run.is_some() && there
    }

    pub(in crate::tui) fn export_to(&mut self, to: &str) {
        if let Some(run) = &self.train.run {
            let request = Request::Export { run: run.clone(), to: to.into() };
            self.ask(request);
        }
    }

    pub(in crate::tui) fn draw_result(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let history = &self.train.history;
        let Some(run) = &self.train.run else {
            let inner = look.panel(buffer, area, "Result", true);
            let words = "no run is open: start one on Tune (3), or open one on Runs (6)";
            look.put_lines(
                buffer,
                inner,
                text::wrap(words, inner.width as usize).into_iter().map(|l| look.line(Role::Dim, l)),
            );
            return;
        };
        let (top, chart) = take_bottom(area, if area.height >= 18 { (area.height * 2 / 5).clamp(8, 24) } else { 0 });
        let inner = look.panel(buffer, top, "Result", true);
        let width = inner.width as usize;
        let mut lines: Vec<Line<'static>> = Vec::new();
        let mut row = |name: &str, role: Role, value: String| {
            let value = text::shorten(&value, width.saturating_sub(16), look.glyphs.ellipsis);
            lines.push(Line::from(vec![look.span(Role::Dim, text::pad(name, 16, "")), look.span(role, value)]));
        };
        row("run", Role::Accent, run.clone());
        let (role, state) = match &history.state {
            State::Finished => (Role::Good, "finished".to_owned()),
            State::Stopped { reason } => (Role::Warn, format!("stopped: {reason}")),
            State::Failed { error, .. } => (Role::Bad, format!("failed: {error}")),
            State::Dead => (Role::Bad, "its worker is gone; r on Runs (6) resumes it".to_owned()),
            live => (Role::Warn, format!("{}: so far", live.name())),
        };
        row("state", role, state);
        if let Some(started) = &history.started {
            row("model", Role::Text, started.model.clone());
            row("on", Role::Text, started.device.clone());
            row(
                "rows",
                Role::Text,
                format!(
                    "{} trained on, {} held out",
                    text::thousands(started.rows as u64),
                    text::thousands(started.eval_rows as u64)
                ),
            );
        }
        let updates = format!(
            "{} of {}, {} tokens in {}",
            text::thousands(history.step()),
            text::thousands(history.steps()),
            text::count(history.tokens),
            text::duration(history.seconds)
        );
        row("updates", Role::Text, updates);
        if let (Some(first), Some(last)) = (history.evaluations.first(), history.evaluations.last()) {
            let change = 100.0 * (last.loss - first.loss) / first.loss;
            let role = if last.loss < first.loss { Role::Good } else { Role::Bad };
            row(
                "held-out loss",
                role,
                format!("{} before, {} after ({change:+.1}%)", text::loss(first.loss), text::loss(last.loss)),
            );
            row(
                "perplexity",
                Role::Text,
                format!("{} before, {} after", text::three(first.perplexity), text::three(last.perplexity)),
            );
        } else {
            row("held-out loss", Role::Warn, "not known: no evaluation rows".into());
        }
        if let Some(best) = history.best_evaluation() {
            row("best", Role::Text, format!("{} at step {}", text::loss(best.loss), best.step));
        }
        if let Some((step, path)) = history.best.as_ref().or(history.checkpoint.as_ref()) {
            let path = text::shorten_start(path, width.saturating_sub(30), look.glyphs.ellipsis);
            row("checkpoint", Role::Text, format!("step {step}: {path}"));
        }
        if let Some(path) = &history.result {
            row("saved to", Role::Good, text::shorten_start(path, width.saturating_sub(16), look.glyphs.ellipsis));
        }
        row(
            "warnings",
            if history.warnings.is_empty() { Role::Good } else { Role::Warn },
            history.warnings.len().to_string(),
        );
        if let Some(sample) = history.samples.back() {
            row("last sample", Role::Dim, sample.prompt.replace('\n', " "));
            lines.extend(text::wrap(&sample.text, width).into_iter().map(|line| look.line(Role::Text, line)));
        }
        look.put_lines(buffer, inner, lines);
        if chart.height > 0 {
            let inner = look.panel(buffer, chart, "Loss, whole run", false);
            chart_of(history, Curve::Loss, false, self.train.log, inner.width).draw(inner, buffer, look);
        }
    }
}
