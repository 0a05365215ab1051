//! The memory bar: what the plan takes, by kind, against what the device has.

use std::collections::BTreeMap;

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{Look, text};
use crate::tui::theme::Role;

/// Kinds in the order of the bar, each with its letter where colour cannot tell them apart.
const KINDS: [(&str, &str, Role); 6] = [
    ("weights", "W", Role::KindWeights),
    ("adapter", "A", Role::KindAdapter),
    ("gradients", "G", Role::KindGradients),
    ("optimizer", "O", Role::KindOptimizer),
    ("activations", "a", Role::KindActivations),
    ("workspace", "w", Role::KindWorkspace),
];

/// Bytes of each kind in the bar's order; what has no place of its own is `other`.
fn parts(bytes: &BTreeMap<String, u64>) -> Vec<(&'static str, &'static str, Role, u64)> {
    let mut parts: Vec<_> =
        KINDS.iter().map(|&(name, letter, role)| (name, letter, role, bytes.get(name).copied().unwrap_or(0))).collect();
    let other =
        bytes.iter().filter(|(name, _)| !KINDS.iter().any(|kind| kind.0 == *name)).map(|(_, bytes)| bytes).sum();
    parts.push(("other", "o", Role::KindOther, other));
    parts
}

/// The bar itself, one row: every kind in its share of `capacity`, the rest free. Over capacity the bar is full and
/// ends in a mark.
pub fn bar(bytes: &BTreeMap<String, u64>, capacity: Option<u64>, width: u16, look: &Look) -> Line<'static> {
    let total: u64 = bytes.values().sum();
    let whole = capacity.unwrap_or(total).max(total).max(1);
    let columns = u64::from(width);
    let mut line = Line::default();
    let (mut sum, mut drawn) = (0u64, 0u64);
    for (_, letter, role, part) in parts(bytes) {
        sum += part;
        let end = (u128::from(sum) * u128::from(columns)).div_ceil(u128::from(whole)) as u64;
        // A kind that is there at all is seen while there is room.
        let end = if part > 0 { end.max((drawn + 1).min(columns)) } else { end.max(drawn) };
        let sign = if look.theme.monochrome || !look.glyphs.braille { letter } else { look.glyphs.bar_full };
        line.push_span(Span::styled(sign.repeat((end - drawn) as usize), look.style(role)));
        drawn = end;
    }
    let free = look.glyphs.bar_empty.repeat(columns.saturating_sub(drawn) as usize);
    line.push_span(Span::styled(free, look.style(Role::KindFree)));
    line
}

/// The kinds with their bytes, as many to a row as there is room for.
pub fn legend(bytes: &BTreeMap<String, u64>, width: u16, look: &Look) -> Vec<Line<'static>> {
    let letters = look.theme.monochrome || !look.glyphs.braille;
    let mut lines = vec![Line::default()];
    let mut used = 0;
    for (name, letter, role, part) in parts(bytes) {
        if part == 0 {
            continue;
        }
        let sign = if letters { letter } else { look.glyphs.bar_full };
        let label = format!(" {name} {}  ", text::bytes(part));
        let columns = 1 + label.len();
        if used > 0 && used + columns > width as usize + 2 {
            lines.push(Line::default());
            used = 0;
        }
        if let Some(line) = lines.last_mut() {
            line.push_span(Span::styled(sign, look.style(role)));
            line.push_span(look.span(Role::Text, label));
        }
        used += columns;
    }
    lines
}

/// A plain bar of one share, between 0 and 1.
pub fn share(share: f64, role: Role, width: u16, look: &Look) -> Line<'static> {
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    let eighths = look.glyphs.eighths.len() as f64 + 1.0;
    let filled = (share * f64::from(width) * eighths).round() as usize;
    let (full, part) = (filled / eighths as usize, filled % eighths as usize);
    let mut text = look.glyphs.bar_full.repeat(full);
    let mut columns = full;
    if part > 0 {
        text.push_str(look.glyphs.eighths[part - 1]);
        columns += 1;
    }
    let rest = look.glyphs.bar_empty.repeat((width as usize).saturating_sub(columns));
    Line::from(vec![Span::styled(text, look.style(role)), Span::styled(rest, look.style(Role::KindFree))])
}

/// Draws bar, figures and legend; returns the rows used.
pub fn draw(bytes: &BTreeMap<String, u64>, capacity: Option<u64>, area: Rect, buffer: &mut Buffer, look: &Look) -> u16 {
    let total: u64 = bytes.values().sum();
    let role = match capacity {
        Some(capacity) if total > capacity => Role::Bad,
        Some(capacity) if total * 10 > capacity * 9 => Role::Warn,
        _ => Role::Good,
    };
    let mut lines = vec![bar(bytes, capacity, area.width, look)];
    let verdict = match capacity {
        Some(capacity) if total > capacity => {
            format!("{} of {}: {} too much", text::bytes(total), text::bytes(capacity), text::bytes(total - capacity))
        }
        Some(capacity) => format!("{} of {}", text::bytes(total), text::bytes(capacity)),
        None => text::bytes(total),
    };
    lines.push(Line::from(look.span(role, verdict)));
    lines.extend(legend(bytes, area.width, look));
    let rows = (lines.len() as u16).min(area.height);
    look.put_lines(buffer, area, lines);
    rows
}
