//! Numbers, durations and wrapped text as the screens write them.

use ratatui::style::Style;
use ratatui::text::{Line, Span};

/// Bytes with three significant digits: `1.23 GiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 999.5 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{} {}", three(value), UNITS[unit]) }
}

/// A count in short: `134.5M`, `12.4k`, `999`.
pub fn count(value: u64) -> String {
    let value = value as f64;
    match value {
        v if v >= 999.5e9 => format!("{}T", three(v / 1e12)),
        v if v >= 999.5e6 => format!("{}B", three(v / 1e9)),
        v if v >= 999.5e3 => format!("{}M", three(v / 1e6)),
        v if v >= 9999.5 => format!("{}k", three(v / 1e3)),
        v => format!("{v}"),
    }
}

/// A whole number with thousands separators.
pub fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Three significant digits.
pub fn three(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() { "NaN".into() } else { "inf".into() };
    }
    match value.abs() {
        v if v >= 99.95 => format!("{value:.0}"),
        v if v >= 9.995 => format!("{value:.1}"),
        v if v >= 0.9995 || v == 0.0 => format!("{value:.2}"),
        v if v >= 0.01 => format!("{value:.3}"),
        _ => crate::advise::change::short(value),
    }
}

/// A loss: four decimals.
pub fn loss(value: f64) -> String {
    if value.is_finite() { format!("{value:.4}") } else { three(value) }
}

/// Seconds as `3d 4h`, `2h 05m`, `3m 20s`, `12s`, `0.4s`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".into();
    }
    if seconds < 0.095 {
        return format!("{} ms", three(seconds * 1000.0));
    }
    if seconds < 9.95 {
        return format!("{seconds:.1}s");
    }
    let whole = seconds.round() as u64;
    match whole {
        s if s >= 86400 => format!("{}d {}h", s / 86400, s % 86400 / 3600),
        s if s >= 3600 => format!("{}h {:02}m", s / 3600, s % 3600 / 60),
        s if s >= 60 => format!("{}m {:02}s", s / 60, s % 60),
        s => format!("{s}s"),
    }
}

/// `text` in at most `width` columns, with the ellipsis where something is left out at the end.
pub fn shorten(text: &str, width: usize, ellipsis: &str) -> String {
    let mut taken = String::new();
    let mut used = 0;
    if Span::raw(text).width() <= width {
        return text.to_owned();
    }
    let room = width.saturating_sub(1);
    for character in text.chars() {
        let columns = Span::raw(character.to_string()).width();
        if used + columns > room {
            break;
        }
        taken.push(character);
        used += columns;
    }
    if width > 0 {
        taken.push_str(ellipsis);
    }
    taken
}

/// The end of `text` in at most `width` columns: what counts in a path.
pub fn shorten_start(text: &str, width: usize, ellipsis: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    if Span::raw(text).width() <= width {
        return text.to_owned();
    }
    let mut from = characters.len();
    let mut used = 1;
    while from > 0 {
        let columns = Span::raw(characters[from - 1].to_string()).width();
        if used + columns > width {
            break;
        }
        used += columns;
        from -= 1;
    }
    if width == 0 {
        return String::new();
    }
    let rest: String = characters[from..].iter().collect();
    format!("{ellipsis}{rest}")
}

/// `text` filled with blanks to `width` columns; longer text is shortened.
pub fn pad(text: &str, width: usize, ellipsis: &str) -> String {
    let text = shorten(text, width, ellipsis);
    let blanks = width.saturating_sub(Span::raw(text.as_str()).width());
    text + &" ".repeat(blanks)
}

/// `text` at the right of `width` columns.
pub fn pad_left(text: &str, width: usize) -> String {
    let blanks = width.saturating_sub(Span::raw(text).width());
    " ".repeat(blanks) + text
}

/// Text in lines of at most `width` columns, broken between words; newlines are kept.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let width = width.max(1);
    let mut lines = Vec::new();
    for paragraph in text.split('\n') {
        let mut line = String::new();
        let mut used = 0;
        for word in paragraph.split(' ') {
            let columns = Span::raw(word).width();
            let gap = usize::from(used > 0);
            if used > 0 && used + gap + columns > width {
                lines.push(std::mem::take(&mut line));
                used = 0;
            } else if gap > 0 {
                line.push(' ');
                used += 1;
            }
            for character in word.chars() {
                let columns = Span::raw(character.to_string()).width();
                if used + columns > width {
                    lines.push(std::mem::take(&mut line));
                    used = 0;
                }
                line.push(character);
                used += columns;
            }
        }
        lines.push(line);
    }
    lines
}

/// Spans broken into lines of at most `width` columns: after a space where the line has one in its second half, else at
/// any character; a newline character ends a line.
pub fn flow(spans: impl IntoIterator<Item = Span<'static>>, width: usize) -> Vec<Line<'static>> {
    let width = width.max(1);
    let columns = |character: char| Span::raw(character.to_string()).width();
    let mut lines = Vec::new();
    let mut line: Vec<(char, Style)> = Vec::new();
    let mut used = 0;
    for span in spans {
        for character in span.content.chars() {
            if character == '\n' {
                lines.push(styled(&line));
                (line, used) = (Vec::new(), 0);
                continue;
            }
            if used + columns(character) > width {
                let space = line.iter().rposition(|(character, _)| *character == ' ').map(|at| at + 1);
                let end = space.filter(|at| at * 2 > line.len()).unwrap_or(line.len());
                let rest = line.split_off(end);
                lines.push(styled(&line));
                line = rest;
                used = line.iter().map(|(character, _)| columns(*character)).sum();
            }
            line.push((character, span.style));
            used += columns(character);
        }
    }
    lines.push(styled(&line));
    lines
}

/// Characters of one style are one span.
fn styled(characters: &[(char, Style)]) -> Line<'static> {
    let runs = characters.chunk_by(|(_, first), (_, second)| first == second);
    runs.map(|run| Span::styled(run.iter().map(|(character, _)| *character).collect::<String>(), run[0].1)).collect()
}

/// Groups of spans in lines of at most `width` columns; a group is never broken.
pub fn arrange(groups: Vec<Vec<Span<'static>>>, width: usize) -> Vec<Line<'static>> {
    let mut lines = vec![Line::default()];
    let mut used = 0;
    for group in groups {
        let columns: usize = group.iter().map(Span::width).sum();
        if used > 0 && used + columns > width {
            lines.push(Line::default());
            used = 0;
        }
        used += columns + 2;
        if let Some(line) = lines.last_mut() {
            line.spans.extend(group);
            line.push_span("  ");
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(24 << 30), "24.0 GiB");
        assert_eq!(count(134_515_008), "135M");
        assert_eq!(count(9_999), "9999");
        assert_eq!(count(12_345), "12.3k");
        assert_eq!(thousands(1_234_567), "1,234,567");
        assert_eq!(three(2e-4), "2e-4");
        assert_eq!(three(1234.5), "1234");
        assert_eq!(duration(0.42), "0.4s");
        assert_eq!(duration(0.0421), "42.1 ms");
        assert_eq!(duration(200.0), "3m 20s");
        assert_eq!(duration(7500.0), "2h 05m");
        assert_eq!(duration(f64::NAN), "-");
    }

    #[test]
    fn text_is_cut_by_columns_not_bytes() {
        assert_eq!(shorten("hello", 5, "…"), "hello");
        assert_eq!(shorten("hello!", 5, "…"), "hell…");
        assert_eq!(shorten("世界世界", 5, "…"), "世界…");
        assert_eq!(shorten_start("/a/b/rows.json", 6, "…"), "….json");
        assert_eq!(pad("ab", 4, "…"), "ab  ");
        assert_eq!(shorten("ab", 0, "…"), "");
    }

    #[test]
    fn text_wraps_between_words_and_long_words_break() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("abcdefgh", 3), ["abc", "def", "gh"]);
        assert_eq!(wrap("a\nb", 9), ["a", "b"]);
        assert_eq!(wrap("", 9), [""]);
    }
}
