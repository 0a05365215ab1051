//! Help, command palette, questions, the run file.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::Line;

use crate::tui::app::{App, Overlay};
use crate::tui::keymap::Layer;
use crate::tui::theme::Role;
use crate::tui::widgets::{Look, take_top, text, window_start};

impl App {
    pub(super) fn draw_overlay(&self, overlay: &Overlay, buffer: &mut Buffer, look: &Look) {
        match overlay {
            Overlay::Help { scroll, layers } => self.draw_help(*scroll, layers, buffer, look),
            Overlay::Palette { input, selected } => {
                let entries = self.palette_entries(&input.text());
                let height = (entries.len() as u16 + 3).clamp(6, 20);
                let Some(inner) = look.popup(buffer, "Commands", 76, height) else { return };
                let (line, list) = take_top(inner, 1);
                input.draw(line, buffer, look, ": ");
                if entries.is_empty() {
                    look.put(buffer, list, look.line(Role::Dim, "nothing matches"));
                }
                let start = window_start(*selected, entries.len(), list.height as usize);
                for (row, entry) in entries.iter().enumerate().skip(start).take(list.height as usize) {
                    let at = Rect { y: list.y + (row - start) as u16, height: 1, ..list };
                    let keys = text::shorten(&entry.keys, 18, look.glyphs.ellipsis);
                    let room = (list.width as usize).saturating_sub(keys.len() + 1);
                    let line = Line::from(vec![
                        look.span(Role::Text, text::pad(&entry.text, room, look.glyphs.ellipsis)),
                        look.span(Role::Key, format!(" {keys}")),
                    ]);
                    look.put(buffer, at, line);
                    if row == *selected {
                        buffer.set_style(at, look.style(Role::Selection));
                    }
                }
            }
            Overlay::Confirm { question, .. } => {
                let width = buffer.area.width.saturating_sub(8).min(60);
                let lines = text::wrap(question, width.saturating_sub(4) as usize);
                let Some(inner) = look.popup(buffer, "Sure?", width, lines.len() as u16 + 4) else { return };
                look.put_lines(buffer, inner, lines.into_iter().map(|line| look.line(Role::Text, line)));
                let foot = Rect { y: inner.bottom().saturating_sub(1), height: 1, ..inner };
                look.put(
                    buffer,
                    foot,
                    Line::from(vec![
                        look.span(Role::Key, "y"),
                        look.span(Role::Dim, " yes   "),
                        look.span(Role::Key, "n"),
                        look.span(Role::Dim, " no"),
                    ]),
                );
            }
            Overlay::RunFile { scroll } => {
                let text = self.draft.spec.commented();
                let name = self.draft.path.as_ref().map_or("not saved".into(), |path| path.display().to_string());
                let height = buffer.area.height;
                let Some(inner) = look.popup(buffer, &format!("Run file: {name}"), 110, height) else { return };
                let lines: Vec<&str> = text.lines().collect();
                let most = lines.len().saturating_sub(inner.height as usize);
                let shown =
                    lines.iter().skip((*scroll as usize * 3).min(most)).map(|line| toml_line(line, inner.width, look));
                look.put_lines(buffer, inner, shown);
            }
            Overlay::Chat | Overlay::Compare(_) => {}
        }
    }

    /// Keys of every layer that the screen under the help listens to.
    fn draw_help(&self, scroll: u16, layers: &[Layer], buffer: &mut Buffer, look: &Look) {
        let (width, height) = (buffer.area.width.min(100), buffer.area.height);
        let Some(inner) = look.popup(buffer, &format!("Keys: {}", self.step.name()), width, height) else { return };
        let lines = self.help_lines(layers, inner.width as usize, look);
        let most = lines.len().saturating_sub(inner.height as usize);
        let from = (scroll as usize * 3).min(most);
        look.put_lines(buffer, inner, lines.into_iter().skip(from));
    }

    fn help_lines(&self, layers: &[Layer], width: usize, look: &Look) -> Vec<Line<'static>> {
        let mut lines = Vec::new();
        let mut last = None;
        // Typing and popups have keys too; they come after the screen's own.
        let others =
            [Layer::Text, Layer::Palette, Layer::Confirm, Layer::RunFile, Layer::Compare, Layer::Chat, Layer::Help];
        let rows =
            self.keymap.rows(layers).into_iter().chain(others.iter().flat_map(|layer| self.keymap.rows(&[*layer])));
        for (binding, keys) in rows {
            if last != Some(binding.layer) {
                if last.is_some() {
                    lines.push(Line::default());
                }
                lines.push(look.line(Role::Title, binding.layer.name()));
                last = Some(binding.layer);
            }
            let room = width.saturating_sub(20);
            for (row, help) in text::wrap(binding.help, room).into_iter().enumerate() {
                let keys = if row == 0 { keys.as_str() } else { "" };
                lines.push(Line::from(vec![
                    look.span(Role::Key, text::pad(keys, 20, look.glyphs.ellipsis)),
                    look.span(Role::Text, help),
                ]));
            }
        }
        lines
    }
}

/// A line of a run file: heading, key, value, comment.
fn toml_line(line: &str, width: u16, look: &Look) -> Line<'static> {
    let line = text::shorten(line, width as usize, look.glyphs.ellipsis);
    if line.starts_with('[') {
        return look.line(Role::Title, line);
    }
    let (code, comment) = match line.find(" # ").or_else(|| line.starts_with('#').then_some(0)) {
        Some(at) => line.split_at(at),
        None => (line.as_str(), ""),
    };
    let mut spans = Vec::new();
    match code.split_once('=') {
        Some((key, value)) => {
            spans.push(look.span(Role::Text, key));
            spans.push(look.span(Role::Dim, "="));
            spans.push(look.span(Role::Accent, value));
        }
        None => spans.push(look.span(Role::Text, code)),
    }
    spans.push(look.span(Role::Dim, comment));
    Line::from(spans)
}
