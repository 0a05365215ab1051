//! Chat with base and tuned model, side by side.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::Line;
use ratatui::widgets::{Clear, Widget};

use crate::tui::app::App;
use crate::tui::message::{Request, Side};
use crate::tui::theme::Role;
use crate::tui::widgets::input::Input;
use crate::tui::widgets::{Look, take_bottom, take_left, text};

/// One question and both answers.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    pub question: String,
    /// Base, tuned.
    pub answers: [String; 2],
    pub done: [bool; 2],
    pub error: Option<String>,
}

/// The conversation.
#[derive(Default)]
pub struct Chat {
    pub input: Input,
    pub turns: Vec<Turn>,
    /// Lines scrolled back from the end.
    back: usize,
}

impl Chat {
    /// Takes a piece of an answer.
    pub fn piece(&mut self, side: Side, text: &str) {
        if let Some(turn) = self.turns.last_mut() {
            turn.answers[side as usize].push_str(text);
        }
    }

    /// An answer is whole.
    pub fn end(&mut self, side: Side, error: Option<String>) {
        if let Some(turn) = self.turns.last_mut() {
            turn.done[side as usize] = true;
            if error.is_some() {
                turn.error = error;
                turn.done = [true, true];
            }
        }
    }

    /// Both answers of the latest turn are whole.
    pub fn is_idle(&self) -> bool {
        self.turns.last().is_none_or(|turn| turn.done == [true, true])
    }

    pub fn scroll(&mut self, rows: isize) {
        self.back = self.back.saturating_add_signed(rows * 3).min(10_000);
    }

    /// The chat is closed; what was said stays.
    pub fn leave(&mut self) {
        if let Some(turn) = self.turns.last_mut() {
            turn.done = [true, true];
        }
    }

    /// Another run: the conversation is over.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

impl App {
    pub(in crate::tui) fn send_chat(&mut self) {
        let prompt = self.result.chat.input.text().trim().to_owned();
        let Some(run) = self.train.run.clone() else { return };
        if prompt.is_empty() {
            return;
        }
        if !self.result.chat.is_idle() {
            self.tell("still answering");
            return;
        }
        let chat = &mut self.result.chat;
        chat.input = Input::default();
        chat.back = 0;
        chat.turns.push(Turn { question: prompt.clone(), ..Turn::default() });
        self.ask(Request::Chat { run, prompt });
    }

    pub(in crate::tui) fn draw_chat(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let chat = &self.result.chat;
        Clear.render(area, buffer);
        buffer.set_style(area, look.style(Role::Text));
        let (body, line) = take_bottom(area, 1);
        chat.input.draw(line, buffer, look, "you: ");
        let (left, right) = take_left(body, body.width / 2);
        for (side, area, title) in [(0, left, "Base"), (1, right, "Tuned")] {
            let inner = look.panel(buffer, area, title, side == 1);
            let width = inner.width as usize;
            let mut lines: Vec<Line<'static>> = Vec::new();
            for turn in &chat.turns {
                for line in text::wrap(&format!("{} {}", look.glyphs.marker, turn.question), width) {
                    lines.push(look.line(Role::Accent, line));
                }
                let answer = &turn.answers[side];
                if answer.is_empty() && !turn.done[side] {
                    lines.push(look.line(Role::Dim, look.glyphs.ellipsis));
                } else {
                    lines.extend(text::wrap(answer, width).into_iter().map(|line| look.line(Role::Text, line)));
                }
                if let Some(error) = &turn.error {
                    lines.extend(text::wrap(error, width).into_iter().map(|line| look.line(Role::Bad, line)));
                }
                lines.push(Line::default());
            }
            if chat.turns.is_empty() {
                let words = if side == 0 { "the model as it was" } else { "the model after this run" };
                lines.push(look.line(Role::Dim, words));
            }
            let most = lines.len().saturating_sub(inner.height as usize);
            look.put_lines(buffer, inner, lines.into_iter().skip(most - chat.back.min(most)));
        }
    }
}
