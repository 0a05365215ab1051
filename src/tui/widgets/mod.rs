//! Pieces that screens are made of. A widget is given what it shows and draws it; none keeps or changes state.

pub mod chart;
pub mod histogram;
pub mod input;
pub mod list;
pub mod memory;
pub mod text;

use std::cell::Cell;

use ratatui::buffer::Buffer;
use ratatui::layout::{Position, Rect};
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Clear, Widget};

use super::glyphs::Glyphs;
use super::theme::{Role, Theme};

/// How things look here: theme and characters. Also collects where the cursor shall be.
pub struct Look<'a> {
    pub theme: &'a Theme,
    pub glyphs: &'a Glyphs,
    /// Set by the text field that has the keyboard.
    pub cursor: Cell<Option<Position>>,
}

impl<'a> Look<'a> {
    pub fn new(theme: &'a Theme, glyphs: &'a Glyphs) -> Self {
        Self { theme, glyphs, cursor: Cell::new(None) }
    }

    pub fn style(&self, role: Role) -> Style {
        self.theme.style(role)
    }

    /// Text in a role.
    pub fn span(&self, role: Role, text: impl Into<String>) -> Span<'static> {
        Span::styled(self.glyphs.plain(&text.into()), self.style(role))
    }

    /// A line of one role.
    pub fn line(&self, role: Role, text: impl Into<String>) -> Line<'static> {
        Line::from(self.span(role, text))
    }

    /// Draws a line at the top of `area`.
    pub fn put(&self, buffer: &mut Buffer, area: Rect, line: impl Into<Line<'static>>) {
        if area.height > 0 && area.width > 0 {
            line.into().render(Rect { height: 1, ..area }, buffer);
        }
    }

    /// Draws lines one under the other, as many as there is room for.
    pub fn put_lines(&self, buffer: &mut Buffer, area: Rect, lines: impl IntoIterator<Item = Line<'static>>) {
        for (row, line) in lines.into_iter().take(area.height as usize).enumerate() {
            line.render(Rect { y: area.y + row as u16, height: 1, ..area }, buffer);
        }
    }

    /// A titled panel; returns what is inside. Boxed where there is room for it, else under a rule.
    pub fn panel(&self, buffer: &mut Buffer, area: Rect, title: &str, focused: bool) -> Rect {
        if area.height == 0 || area.width == 0 {
            return Rect { height: 0, ..area };
        }
        let style = self.style(if focused { Role::BorderFocus } else { Role::Border });
        let title = self.span(if focused { Role::Accent } else { Role::Title }, title);
        if area.height >= 5 && area.width >= 24 && buffer.area.width >= 100 {
            let block = Block::new()
                .borders(Borders::ALL)
                .border_set(self.glyphs.border)
                .border_style(style)
                .title(Line::from(vec![Span::raw(" "), title, Span::raw(" ")]));
            let inner = block.inner(area);
            block.render(area, buffer);
            return Rect { x: inner.x + 1, width: inner.width.saturating_sub(2), ..inner };
        }
        let width = title.width() as u16;
        let rule = self.glyphs.horizontal.repeat(area.width.saturating_sub(width + 4) as usize);
        let line = Line::from(vec![
            Span::styled(self.glyphs.horizontal, style),
            Span::raw(" "),
            title,
            Span::raw(" "),
            Span::styled(rule, style),
        ]);
        self.put(buffer, area, line);
        Rect { y: area.y + 1, height: area.height - 1, ..area }
    }

    /// A box over everything, centred and cut to the screen; none when there is no room.
    pub fn popup(&self, buffer: &mut Buffer, title: &str, width: u16, height: u16) -> Option<Rect> {
        let screen = buffer.area;
        let (width, height) = (width.min(screen.width.saturating_sub(2)), height.min(screen.height.saturating_sub(2)));
        if width < 10 || height < 3 {
            return None;
        }
        let area = Rect {
            x: screen.x + (screen.width - width) / 2,
            y: screen.y + (screen.height - height) / 2,
            width,
            height,
        };
        Clear.render(area, buffer);
        let block = Block::new()
            .borders(Borders::ALL)
            .border_set(self.glyphs.border)
            .border_style(self.style(Role::BorderFocus))
            .style(self.style(Role::Text))
            .title(Line::from(vec![Span::raw(" "), self.span(Role::Accent, title), Span::raw(" ")]));
        let inner = block.inner(area);
        block.render(area, buffer);
        Some(Rect { x: inner.x + 1, width: inner.width.saturating_sub(2), ..inner })
    }
}

/// First row shown of a list so that `selected` is in view, about the middle.
pub fn window_start(selected: usize, count: usize, height: usize) -> usize {
    selected.saturating_sub(height / 2).min(count.saturating_sub(height))
}

/// Splits off `height` rows at the top.
pub fn take_top(area: Rect, height: u16) -> (Rect, Rect) {
    let height = height.min(area.height);
    (Rect { height, ..area }, Rect { y: area.y + height, height: area.height - height, ..area })
}

/// Splits off `height` rows at the bottom: (rest, bottom).
pub fn take_bottom(area: Rect, height: u16) -> (Rect, Rect) {
    let height = height.min(area.height);
    let rest = area.height - height;
    (Rect { height: rest, ..area }, Rect { y: area.y + rest, height, ..area })
}

/// Splits off `width` columns at the left, with one column between.
pub fn take_left(area: Rect, width: u16) -> (Rect, Rect) {
    let width = width.min(area.width);
    let after = (width + 1).min(area.width);
    (Rect { width, ..area }, Rect { x: area.x + after, width: area.width - after, ..area })
}
