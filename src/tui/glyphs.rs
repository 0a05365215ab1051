//! Characters that the screens draw with, and their plain ASCII stand-ins.

use ratatui::symbols::border;

/// One set of characters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Glyphs {
    /// Whether charts may use braille dots.
    pub braille: bool,
    pub border: border::Set<'static>,
    pub horizontal: &'static str,
    pub vertical: &'static str,
    pub bar_full: &'static str,
    pub bar_empty: &'static str,
    /// Eighths of a bar's cell, from one to seven.
    pub eighths: &'static [&'static str],
    /// Columns of a histogram, from lowest to full.
    pub levels: &'static [&'static str],
    pub marker: &'static str,
    pub step: &'static str,
    pub dot: &'static str,
    pub ellipsis: &'static str,
    pub warning: &'static str,
    pub check: &'static str,
    pub cross: &'static str,
    pub newline: &'static str,
    pub point: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub times: &'static str,
}

pub const UNICODE: Glyphs = Glyphs {
    braille: true,
    border: border::ROUNDED,
    horizontal: "─",
    vertical: "│",
    bar_full: "█",
    bar_empty: "░",
    eighths: &["▏", "▎", "▍", "▌", "▋", "▊", "▉"],
    levels: &["▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"],
    marker: "▸",
    step: "›",
    dot: "·",
    ellipsis: "…",
    warning: "▲",
    check: "✓",
    cross: "✗",
    newline: "↵",
    point: "●",
    up: "↑",
    down: "↓",
    times: "×",
};

pub const ASCII: Glyphs = Glyphs {
    braille: false,
    border: border::Set {
        top_left: "+",
        top_right: "+",
        bottom_left: "+",
        bottom_right: "+",
        vertical_left: "|",
        vertical_right: "|",
        horizontal_top: "-",
        horizontal_bottom: "-",
    },
    horizontal: "-",
    vertical: "|",
    bar_full: "#",
    bar_empty: ".",
    eighths: &[],
    levels: &[".", ":", "-", "=", "+", "*", "%", "#"],
    marker: ">",
    step: ">",
    dot: "-",
    ellipsis: "~",
    warning: "!",
    check: "+",
    cross: "x",
    newline: "\\n",
    point: "o",
    up: "^",
    down: "v",
    times: "x",
};

impl Glyphs {
    /// Unicode where the locale is UTF-8 and the terminal is no Linux console.
    pub fn of_environment(variable: impl Fn(&str) -> Option<String>) -> Self {
        let value = |name: &str| variable(name).filter(|value| !value.is_empty());
        let locale = value("LC_ALL").or_else(|| value("LC_CTYPE")).or_else(|| value("LANG")).unwrap_or_default();
        let utf8 = locale.to_ascii_lowercase().replace('-', "").contains("utf8");
        let term = value("TERM").unwrap_or_default();
        if utf8 && term != "linux" && term != "dumb" { UNICODE } else { ASCII }
    }

    /// `text` with what an ASCII terminal cannot show replaced.
    pub fn plain(&self, text: &str) -> String {
        if self.braille || text.is_ascii() {
            return text.to_owned();
        }
        text.chars().map(|character| if character.is_ascii() { character } else { '?' }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &'static [(&str, &str)]) -> Glyphs {
        Glyphs::of_environment(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_string()))
    }

    #[test]
    fn ascii_where_the_terminal_has_no_more() {
        assert!(of(&[("LANG", "en_US.UTF-8"), ("TERM", "xterm-256color")]).braille);
        assert!(!of(&[("LANG", "C"), ("TERM", "xterm")]).braille);
        assert!(!of(&[("LANG", "en_US.UTF-8"), ("TERM", "linux")]).braille);
        assert!(!of(&[("LC_ALL", "C"), ("LANG", "en_US.UTF-8"), ("TERM", "xterm")]).braille);
        assert!(of(&[("LANG", "C.utf8"), ("TERM", "screen")]).braille);
    }
}
