//! The screens: each holds its own small state, answers its own commands, and draws itself.

pub mod chat;
pub mod compare;
pub mod data;
pub mod model;
pub mod overlays;
pub mod result;
pub mod runs;
pub mod train;
pub mod tune;

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};
use ratatui::widgets::Widget;

use super::app::{App, Overlay, Purpose, Step};
use super::theme::Role;
use super::widgets::{Look, take_bottom, take_top, text};

/// The smallest screen that is drawn.
pub const LEAST: (u16, u16) = (40, 12);

impl App {
    /// Draws everything.
    pub fn draw(&self, buffer: &mut Buffer, look: &Look) {
        let area = buffer.area;
        buffer.set_style(area, look.style(Role::Text));
        if area.width < LEAST.0 || area.height < LEAST.1 {
            too_small(area, buffer, look);
            return;
        }
        let (top, rest) = take_top(area, 1);
        let (body, bottom) = take_bottom(rest, 1);
        self.draw_top(top, buffer, look);
        let prompt = self.editing.as_ref().filter(|editing| editing.purpose != Purpose::Field);
        let body = match prompt {
            Some(editing) => {
                let (body, line) = take_bottom(body, 1);
                editing.input.draw(line, buffer, look, editing.purpose.label());
                body
            }
            None => body,
        };
        match self.step {
            Step::Model => self.draw_model(body, buffer, look),
            Step::Data => self.draw_data(body, buffer, look),
            Step::Tune => self.draw_tune(body, buffer, look),
            Step::Train => self.draw_train(body, buffer, look),
            Step::Result => self.draw_result(body, buffer, look),
            Step::Runs => self.draw_runs(body, buffer, look),
        }
        for overlay in &self.overlays {
            match overlay {
                Overlay::Chat => self.draw_chat(body, buffer, look),
                Overlay::Compare(view) => view.draw(body, buffer, look),
                other => self.draw_overlay(other, buffer, look),
            }
        }
        if let Some(editing) = prompt.filter(|_| !self.overlays.is_empty()) {
            // Over the popup that asked for it.
            let line = Rect { y: body.bottom(), height: 1, ..body };
            editing.input.draw(line, buffer, look, editing.purpose.label());
        }
        self.draw_bottom(bottom, buffer, look);
    }

    /// The path through the steps, always in sight.
    fn draw_top(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let wide = area.width >= 60;
        let mut line = Line::from(look.span(Role::Accent, if wide { "tune  " } else { "" }));
        for (at, step) in Step::ALL.into_iter().enumerate() {
            let name = if wide { format!("{} {}", at + 1, step.name()) } else { step.name().to_owned() };
            let here = step == self.step;
            let between = match step {
                Step::Model => String::new(),
                Step::Runs => format!(" {} ", look.glyphs.vertical),
                _ if wide => format!(" {} ", look.glyphs.step),
                _ => look.glyphs.step.to_owned(),
            };
            line.push_span(look.span(Role::Dim, between));
            line.push_span(match here {
                true => look.span(Role::Selection, if wide { format!(" {name} ") } else { name }),
                false if self.is_done(step) => look.span(Role::Text, name),
                false => look.span(Role::Dim, name),
            });
        }
        let used = line.width() as u16;
        line.render(area, buffer);
        let subject = self.subject(look);
        let room = area.width.saturating_sub(used + 2);
        if room >= 12 {
            let subject = text::shorten_start(&subject, room as usize, look.glyphs.ellipsis);
            let width = Span::raw(subject.as_str()).width() as u16;
            let right = Rect { x: area.right() - width, width, ..area };
            look.put(buffer, right, look.line(Role::Dim, subject));
        }
    }

    /// What the work is about: the run, or model and data.
    fn subject(&self, look: &Look) -> String {
        if matches!(self.step, Step::Train | Step::Result)
            && let Some(run) = &self.train.run
        {
            return run.clone();
        }
        let model = &self.draft.spec.model.id;
        let data = self.draft.data_name();
        let name = |path: &str| path.rsplit('/').next().unwrap_or(path).to_owned();
        match (model.is_empty(), data.is_empty()) {
            (true, true) => String::new(),
            (false, true) => name(model),
            (true, false) => name(&data),
            (false, false) => format!("{} {} {}", name(model), look.glyphs.dot, name(&data)),
        }
    }

    fn is_done(&self, step: Step) -> bool {
        match step {
            Step::Model => !self.draft.spec.model.id.is_empty(),
            Step::Data => !self.draft.data_name().is_empty(),
            Step::Tune => self.train.run.is_some(),
            Step::Train | Step::Result => self.train.run.is_some(),
            Step::Runs => true,
        }
    }

    /// Keys of what has the keyboard, or a word to the user.
    fn draw_bottom(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        if let Some(notice) = &self.notice {
            let role = if notice.wrong { Role::Bad } else { Role::Good };
            let text = text::shorten(&notice.text.replace('\n', " "), area.width as usize, look.glyphs.ellipsis);
            look.put(buffer, area, look.line(role, text));
            return;
        }
        if let Some(problem) = self.editing.as_ref().and_then(|editing| editing.problem.as_ref()) {
            let text = text::shorten(&problem.replace('\n', " "), area.width as usize, look.glyphs.ellipsis);
            look.put(buffer, area, look.line(Role::Warn, text));
            return;
        }
        let entries = self.keymap.bar(&self.layers());
        let width = |entry: &(String, &str)| entry.0.len() + entry.1.len() + 3;
        let total = |entries: &[(String, &str)]| entries.iter().map(width).sum::<usize>();
        let mut entries = entries;
        // Quit, help and the palette stay; what is least important of the rest goes first.
        while total(&entries) > area.width as usize + 2 && entries.len() > 1 {
            let at = entries.len().saturating_sub(4).max(usize::from(entries.len() > 4));
            entries.remove(at.min(entries.len() - 1));
        }
        let mut line = Line::default();
        for (key, word) in entries {
            line.push_span(look.span(Role::Key, key));
            line.push_span(look.span(Role::Dim, format!(" {word}  ")));
        }
        look.put(buffer, area, line);
    }
}

fn too_small(area: Rect, buffer: &mut Buffer, look: &Look) {
    let lines = [
        format!("{} x {}", area.width, area.height),
        "too small".to_owned(),
        format!("tune needs {} x {}", LEAST.0, LEAST.1),
    ];
    let top = area.height.saturating_sub(lines.len() as u16) / 2;
    for (row, text) in lines.into_iter().enumerate() {
        let width = (text.len() as u16).min(area.width);
        let at = Rect { x: area.x + (area.width - width) / 2, y: area.y + top + row as u16, width, height: 1 };
        if at.y < area.bottom() {
            look.put(buffer, at, look.line(Role::Text, text));
        }
    }
}
