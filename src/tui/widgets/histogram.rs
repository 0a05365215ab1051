//! Row lengths against `max_length`.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;

use super::{Look, text};
use crate::tui::theme::Role;

/// Draws how many lengths fall into each column; those over `limit` are marked as cut.
pub fn draw(lengths: &[usize], limit: usize, area: Rect, buffer: &mut Buffer, look: &Look) {
    let Some(&longest) = lengths.iter().max() else {
        look.put(buffer, area, look.line(Role::Dim, "no rows"));
        return;
    };
    if area.height < 2 || area.width < 16 {
        return;
    }
    let columns = area.width as usize;
    // The limit stays in view when it is near; a far one would squeeze everything into the first columns.
    let top = if limit <= longest * 2 { longest.max(limit) } else { longest } + 1;
    let mut counts = vec![0usize; columns];
    for &length in lengths {
        counts[(length * columns / top).min(columns - 1)] += 1;
    }
    let tallest = counts.iter().copied().max().unwrap_or(1).max(1);
    let rows = area.height as usize - 1;
    let levels = look.glyphs.levels;
    let limit_column = limit * columns / top;
    for (column, &count) in counts.iter().enumerate() {
        let eighths = (count * rows * levels.len()).div_ceil(tallest);
        let role = if column >= limit_column && limit < top { Role::Bad } else { Role::ChartSmooth };
        for row in 0..rows {
            let filled = eighths.saturating_sub((rows - 1 - row) * levels.len()).min(levels.len());
            let x = area.x + column as u16;
            let y = area.y + row as u16;
            if filled > 0 {
                buffer[(x, y)].set_symbol(levels[filled - 1]).set_style(look.style(role));
            } else if column == limit_column && limit < top {
                buffer[(x, y)].set_symbol(look.glyphs.vertical).set_style(look.style(Role::Bad));
            }
        }
    }
    let foot = Rect { y: area.y + rows as u16, height: 1, ..area };
    look.put(buffer, foot, look.line(Role::Dim, "0"));
    let last = format!("{} tokens", text::thousands(longest as u64));
    let width = last.len() as u16;
    if area.width > width + 4 {
        look.put(buffer, Rect { x: foot.right() - width, width, ..foot }, look.line(Role::Dim, last));
    }
    let mark = format!("{}max_length {}", look.glyphs.up, text::thousands(limit as u64));
    let at = foot.x + limit_column as u16;
    if limit < top && limit_column > 2 && at + (mark.len() as u16) + width + 1 < foot.right() {
        look.put(buffer, Rect { x: at, width: foot.right() - at, ..foot }, look.line(Role::Bad, mark));
    }
}
