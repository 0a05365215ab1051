//! All runs.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::Line;

use crate::tui::app::{App, Overlay};
use crate::tui::history::State;
use crate::tui::keymap::Action;
use crate::tui::message::{Request, RunEntry};
use crate::tui::theme::Role;
use crate::tui::widgets::chart::sparkline;
use crate::tui::widgets::list::List;
use crate::tui::widgets::{Look, take_bottom, text, window_start};

/// The list of runs.
#[derive(Default)]
pub struct RunsScreen {
    pub list: List<RunEntry>,
    pub loaded: bool,
    /// The first of two to compare.
    pub compare: Option<String>,
}

fn search_text(entry: &RunEntry) -> String {
    format!("{} {} {} {} {}", entry.id, entry.state.name(), entry.model, entry.method, entry.data)
}

impl RunsScreen {
    pub fn set(&mut self, runs: Vec<RunEntry>) {
        self.loaded = true;
        self.list.set(runs, search_text, |entry| entry.id.clone());
    }

    pub fn filter(&mut self, text: String) {
        self.list.filter(text, search_text);
    }
}

impl App {
    pub(in crate::tui) fn act_runs(&mut self, action: Action) -> bool {
        if self.runs.list.act(action) {
            return true;
        }
        if action == Action::RefreshRuns {
            self.ask(Request::ListRuns);
            return true;
        }
        let Some(entry) = self.runs.list.selected().cloned() else {
            self.complain("no run marked");
            return true;
        };
        match action {
            Action::AttachRun => self.open_run(&entry.id),
            Action::MarkCompare => match self.runs.compare.take() {
                Some(first) if first != entry.id => self.ask(Request::Compare(first, entry.id)),
                Some(_) => self.tell("mark removed"),
                None => {
                    self.tell(format!("{} marked; c on another run compares them", entry.id));
                    self.runs.compare = Some(entry.id);
                }
            },
            Action::ResumeRun => {
                if entry.state.is_live() {
                    self.tell(format!("{} is {} already", entry.id, entry.state.name()));
                } else if entry.state == State::Finished {
                    self.tell(format!("{} is finished", entry.id));
                } else {
                    self.ask(Request::Resume(entry.id));
                }
            }
            Action::RemoveRun => {
                if entry.state.is_live() {
                    self.complain(format!("{} is {}: stop it first", entry.id, entry.state.name()));
                } else {
                    let question = format!("Remove run {} with its checkpoints and its result?", entry.id);
                    self.overlays.push(Overlay::Confirm { question, request: Request::Remove(entry.id) });
                }
            }
            Action::LoadRunFile => self.ask(Request::LoadRun(entry.id)),
            _ => return false,
        }
        true
    }

    pub(in crate::tui) fn draw_runs(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let list = &self.runs.list;
        let (top, detail) = take_bottom(area, if area.height >= 14 { 5 } else { 0 });
        let title = match list.filter_text() {
            "" => format!("Runs {}", list.items().len()),
            filter => format!("Runs {} of {} matching \"{filter}\"", list.shown().len(), list.items().len()),
        };
        let inner = look.panel(buffer, top, &title, true);
        if list.shown().len() == 0 {
            let words =
                if self.runs.loaded { "no runs yet: Model, Data, Tune, then s starts one" } else { "looking for runs" };
            look.put(buffer, inner, look.line(Role::Dim, words));
            return;
        }
        let width = inner.width as usize;
        let spark = if width >= 90 {
            20
        } else if width >= 70 {
            10
        } else {
            0
        };
        let id_width = 22.min(width / 2);
        let model_width = width.saturating_sub(id_width + 10 + 15 + 9 + 9 + spark + 4).min(40);
        let mut head = text::pad("  run", id_width + 2, "") + &text::pad("state", 10, "");
        head.push_str(&text::pad_left("step", 14));
        head.push_str(&text::pad_left("loss", 9));
        head.push_str(&text::pad_left("eval", 9));
        if spark > 0 {
            head.push_str(&text::pad(" curve", spark + 2, ""));
        }
        if model_width >= 8 {
            head.push_str("  model");
        }
        look.put(buffer, inner, look.line(Role::Dim, head));
        let inner = Rect { y: inner.y + 1, height: inner.height.saturating_sub(1), ..inner };
        let start = window_start(list.position(), list.shown().len(), inner.height as usize);
        for (row, entry) in list.shown().enumerate().skip(start).take(inner.height as usize) {
            let at = Rect { y: inner.y + (row - start) as u16, height: 1, ..inner };
            let marked = row == list.position();
            let sign = if self.runs.compare.as_deref() == Some(&entry.id) {
                look.glyphs.check
            } else if marked {
                look.glyphs.marker
            } else {
                " "
            };
            let role = state_role(&entry.state);
            let mut line = Line::from(look.span(Role::Accent, format!("{sign} ")));
            line.push_span(look.span(Role::Text, text::pad(&entry.id, id_width, look.glyphs.ellipsis)));
            line.push_span(look.span(role, text::pad(entry.state.name(), 10, "")));
            let steps = format!("{}/{}", text::count(entry.step), text::count(entry.steps));
            line.push_span(look.span(Role::Text, text::pad_left(&steps, 14)));
            let loss = |value: Option<f64>| text::pad_left(&value.map_or("-".into(), text::loss), 9);
            line.push_span(look.span(Role::Text, loss(entry.loss)));
            line.push_span(look.span(Role::Text, loss(entry.eval_loss)));
            if spark > 0 {
                let curve = sparkline(&entry.losses, spark, look.glyphs.levels);
                line.push_span(ratatui::text::Span::styled(
                    format!(" {} ", text::pad(&curve, spark, "")),
                    look.style(Role::ChartSmooth),
                ));
            }
            if model_width >= 8 {
                let name = text::shorten_start(&entry.model, model_width, look.glyphs.ellipsis);
                line.push_span(look.span(Role::Dim, format!(" {name}")));
            }
            look.put(buffer, at, line);
            if marked {
                buffer.set_style(at, look.style(Role::Selection));
            }
        }
        if let Some(entry) = list.selected().filter(|_| detail.height > 1) {
            let inner = look.panel(buffer, detail, &entry.id, false);
            let mut lines = vec![Line::from(vec![
                look.span(Role::Dim, "model "),
                look.span(Role::Text, entry.model.clone()),
                look.span(Role::Dim, "  method "),
                look.span(Role::Text, entry.method.clone()),
            ])];
            lines.push(Line::from(vec![
                look.span(Role::Dim, "data "),
                look.span(
                    Role::Text,
                    text::shorten_start(&entry.data, inner.width.saturating_sub(6) as usize, look.glyphs.ellipsis),
                ),
            ]));
            let why = match &entry.state {
                State::Stopped { reason } => reason.clone(),
                State::Failed { error, hint } => format!("{error}; {hint}"),
                State::Queued { behind } => format!("behind {behind}"),
                State::Dead => "its worker is gone; r resumes it from the last checkpoint".into(),
                _ => format!("started {}", entry.started),
            };
            let why = text::shorten(&why.replace('\n', " "), inner.width as usize, look.glyphs.ellipsis);
            lines.push(look.line(state_role(&entry.state), why));
            look.put_lines(buffer, inner, lines);
        }
    }
}

fn state_role(state: &State) -> Role {
    match state {
        State::Running | State::Finished => Role::Good,
        State::Failed { .. } | State::Dead => Role::Bad,
        _ => Role::Warn,
    }
}
