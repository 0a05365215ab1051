//! Two runs over each other.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::Line;
use ratatui::widgets::{Clear, Widget};

use crate::tui::history::History;
use crate::tui::message::Comparison;
use crate::tui::theme::Role;
use crate::tui::widgets::chart::{Chart, Mark, Series};
use crate::tui::widgets::{Look, take_bottom, text};

/// The view of a comparison.
#[derive(Clone, Debug)]
pub struct CompareView {
    pub comparison: Comparison,
    pub log: bool,
    pub scroll: u16,
}

impl CompareView {
    pub fn new(comparison: Comparison) -> Self {
        Self { comparison, log: false, scroll: 0 }
    }

    /// Draws both curves, the figures beside each other, and the keys that differ.
    pub fn draw(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let Comparison { names, histories, differences } = &self.comparison;
        Clear.render(area, buffer);
        buffer.set_style(area, look.style(Role::Text));
        let rows = (differences.len() as u16 + 6).min(area.height / 2);
        let (chart, table) = take_bottom(area, rows);
        let inner = look.panel(buffer, chart, &format!("{} and {}", names[0], names[1]), true);
        let steps = histories.iter().map(|history| history.steps().max(history.step())).max().unwrap_or(1).max(1);
        let curve = |name, role, history: &History| {
            let points = history.whole.iter().map(|b| ((b.first + b.last) as f64 / 2.0, b.smooth));
            Series::line(name, role, points)
        };
        let evaluations = |role, history: &History| Series {
            name: "",
            role,
            mark: Mark::Points,
            points: history.evaluations.iter().map(|e| (e.step as f64, e.loss, e.loss)).collect(),
        };
        let series = vec![
            curve("first", Role::ChartSmooth, &histories[0]),
            curve("second", Role::ChartOther, &histories[1]),
            evaluations(Role::ChartSmooth, &histories[0]),
            evaluations(Role::ChartOther, &histories[1]),
        ];
        let x = (0.0, steps as f64);
        Chart { series, x, log: self.log, label: text::three, x_name: "step" }.draw(inner, buffer, look);
        let inner = look.panel(buffer, table, "What differs", false);
        let value_width = (inner.width as usize).saturating_sub(24) / 2;
        let row = |name: &str, first: String, second: String| {
            let cell = |role, value: &str| look.span(role, text::pad(value, value_width, look.glyphs.ellipsis));
            Line::from(vec![
                look.span(Role::Dim, text::pad(name, 24, look.glyphs.ellipsis)),
                cell(Role::ChartSmooth, &first),
                cell(Role::ChartOther, &second),
            ])
        };
        let both = |value: &dyn Fn(&History) -> String| (value(&histories[0]), value(&histories[1]));
        let mut lines = vec![row("run", names[0].clone(), names[1].clone())];
        let (first, second) = both(&|h| h.last().map_or("-".into(), |p| text::loss(p.smooth)));
        lines.push(row("smoothed loss", first, second));
        let (first, second) =
            both(&|h| h.best_evaluation().map_or("-".into(), |e| format!("{} @{}", text::loss(e.loss), e.step)));
        lines.push(row("best evaluation", first, second));
        let (first, second) = both(&|h| format!("{} in {}", text::thousands(h.step()), text::duration(h.seconds)));
        lines.push(row("updates", first, second));
        for (key, first, second) in differences.iter().skip(self.scroll as usize) {
            lines.push(row(key, first.clone(), second.clone()));
        }
        if differences.is_empty() {
            lines.push(look.line(Role::Dim, "their run files are the same"));
        }
        look.put_lines(buffer, inner, lines);
    }
}
