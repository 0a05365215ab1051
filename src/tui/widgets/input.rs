//! A line of text that is being typed.

use ratatui::buffer::Buffer;
use ratatui::layout::{Position, Rect};
use ratatui::text::{Line, Span};
use ratatui::widgets::Widget;

use super::Look;
use crate::tui::keymap::Action;
use crate::tui::theme::Role;

/// Text and cursor of a one-line field.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Input {
    characters: Vec<char>,
    /// Characters before the cursor.
    cursor: usize,
}

impl Input {
    pub fn new(text: &str) -> Self {
        let characters: Vec<char> = text.chars().collect();
        Self { cursor: characters.len(), characters }
    }

    pub fn text(&self) -> String {
        self.characters.iter().collect()
    }

    pub fn is_empty(&self) -> bool {
        self.characters.is_empty()
    }

    /// Types a character.
    pub fn insert(&mut self, character: char) {
        self.characters.insert(self.cursor, character);
        self.cursor += 1;
    }

    /// Pastes text; line breaks become blanks.
    pub fn paste(&mut self, text: &str) {
        for character in text.trim_end_matches(['\r', '\n']).chars() {
            self.insert(if character.is_control() { ' ' } else { character });
        }
    }

    /// Carries out an editing command; false when it is none.
    pub fn act(&mut self, action: Action) -> bool {
        match action {
            Action::CursorLeft => self.cursor = self.cursor.saturating_sub(1),
            Action::CursorRight => self.cursor = (self.cursor + 1).min(self.characters.len()),
            Action::CursorStart => self.cursor = 0,
            Action::CursorEnd => self.cursor = self.characters.len(),
            Action::DeleteBack => {
                if self.cursor > 0 {
                    self.cursor -= 1;
                    self.characters.remove(self.cursor);
                }
            }
            Action::DeleteForward => {
                if self.cursor < self.characters.len() {
                    self.characters.remove(self.cursor);
                }
            }
            Action::DeleteWord => {
                let blank = |at: usize| self.characters[at - 1].is_whitespace();
                let mut from = self.cursor;
                while from > 0 && blank(from) {
                    from -= 1;
                }
                while from > 0 && !blank(from) {
                    from -= 1;
                }
                self.characters.drain(from..self.cursor);
                self.cursor = from;
            }
            Action::DeleteLine => {
                self.characters.clear();
                self.cursor = 0;
            }
            _ => return false,
        }
        true
    }

    /// Draws the field and puts the cursor into it; what does not fit scrolls out at the left.
    pub fn draw(&self, area: Rect, buffer: &mut Buffer, look: &Look, label: &str) {
        if area.width == 0 || area.height == 0 {
            return;
        }
        let label = look.span(Role::Key, label);
        let room = (area.width as usize).saturating_sub(label.width() + 1).max(1);
        let columns = |text: &[char]| Span::raw(text.iter().collect::<String>()).width();
        let mut from = 0;
        while columns(&self.characters[from..self.cursor]) > room {
            from += 1;
        }
        let before = columns(&self.characters[from..self.cursor]);
        let shown: String = self.characters[from..].iter().collect();
        let x = area.x + (label.width() + before) as u16;
        let text = super::text::shorten(&shown, room + 1, "");
        Line::from(vec![label, look.span(Role::Input, text)]).render(Rect { height: 1, ..area }, buffer);
        if x < area.right() {
            look.cursor.set(Some(Position { x, y: area.y }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn editing_keys_edit() {
        let mut input = Input::new("learning rate");
        input.act(Action::DeleteWord);
        assert_eq!(input.text(), "learning ");
        input.act(Action::CursorStart);
        input.insert('x');
        input.act(Action::DeleteForward);
        assert_eq!(input.text(), "xearning ");
        input.act(Action::CursorEnd);
        input.act(Action::DeleteBack);
        input.paste("é\nb\n");
        assert_eq!(input.text(), "xearningé b");
        assert!(!input.act(Action::Quit));
    }
}
