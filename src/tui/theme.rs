//! Themes: roles, each with a style. A role without one takes its parent's: `kind.weights` falls back to `kind`,
//! then to plain text.
//!
//! The built-in themes are `themes/*.toml`. The default one names the terminal's own colours, so that the user's
//! palette rules; RGB colours become the nearest of the 256 where the terminal has no more.

use std::collections::BTreeMap;

use ratatui::style::{Color, Modifier, Style};

/// What a piece of the screen means; the theme says how it looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    Text,
    Dim,
    Title,
    Accent,
    Key,
    Border,
    BorderFocus,
    Selection,
    Input,
    Good,
    Warn,
    Bad,
    ChartRaw,
    ChartSmooth,
    ChartEval,
    ChartOther,
    ChartGrid,
    KindWeights,
    KindAdapter,
    KindGradients,
    KindOptimizer,
    KindActivations,
    KindWorkspace,
    KindOther,
    KindFree,
    TokenTrained,
    TokenMasked,
    TokenSpecial,
}

const ROLES: &[(Role, &str)] = &[
    (Role::Text, "text"),
    (Role::Dim, "dim"),
    (Role::Title, "title"),
    (Role::Accent, "accent"),
    (Role::Key, "key"),
    (Role::Border, "border"),
    (Role::BorderFocus, "border.focus"),
    (Role::Selection, "selection"),
    (Role::Input, "input"),
    (Role::Good, "good"),
    (Role::Warn, "warn"),
    (Role::Bad, "bad"),
    (Role::ChartRaw, "chart.raw"),
    (Role::ChartSmooth, "chart.smooth"),
    (Role::ChartEval, "chart.eval"),
    (Role::ChartOther, "chart.other"),
    (Role::ChartGrid, "chart.grid"),
    (Role::KindWeights, "kind.weights"),
    (Role::KindAdapter, "kind.adapter"),
    (Role::KindGradients, "kind.gradients"),
    (Role::KindOptimizer, "kind.optimizer"),
    (Role::KindActivations, "kind.activations"),
    (Role::KindWorkspace, "kind.workspace"),
    (Role::KindOther, "kind.other"),
    (Role::KindFree, "kind.free"),
    (Role::TokenTrained, "token.trained"),
    (Role::TokenMasked, "token.masked"),
    (Role::TokenSpecial, "token.special"),
];

/// The built-in themes by name.
pub const BUILT_IN: &[(&str, &str)] = &[
    ("default", include_str!("../../themes/default.toml")),
    ("dark", include_str!("../../themes/dark.toml")),
    ("light", include_str!("../../themes/light.toml")),
    ("high-contrast", include_str!("../../themes/high-contrast.toml")),
    ("monochrome", include_str!("../../themes/monochrome.toml")),
];

/// How many colours the terminal shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colors {
    None,
    Sixteen,
    Indexed,
    True,
}

impl Colors {
    /// What the environment says: `NO_COLOR`, `COLORTERM`, `TERM`.
    pub fn of_environment(variable: impl Fn(&str) -> Option<String>) -> Self {
        let value = |name: &str| variable(name).filter(|value| !value.is_empty());
        let term = value("TERM").unwrap_or_default();
        if value("NO_COLOR").is_some() || term == "dumb" {
            Colors::None
        } else if value("COLORTERM").is_some_and(|text| text.contains("truecolor") || text.contains("24bit")) {
            Colors::True
        } else if term.contains("256color") || term.contains("direct") {
            Colors::Indexed
        } else {
            Colors::Sixteen
        }
    }
}

/// What is wrong with a theme file.
#[derive(Debug, thiserror::Error)]
pub enum ThemeError {
    #[error("theme {name}: {what}")]
    Wrong { name: String, what: String },
    #[error("no theme \"{name}\"; there are default, dark, light, high-contrast, monochrome, or give a file")]
    Unknown { name: String },
}

/// A style for every role.
#[derive(Clone, Debug, PartialEq)]
pub struct Theme {
    pub name: String,
    styles: Vec<Style>,
    /// Meaning may not rest on colour at all: bars use letters.
    pub monochrome: bool,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    monochrome: bool,
    /// Needs more than the terminal's 16 colours.
    #[serde(default)]
    rgb: bool,
    roles: BTreeMap<String, Entry>,
}

#[derive(Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    fg: Option<String>,
    bg: Option<String>,
    #[serde(default)]
    modifiers: Vec<String>,
}

impl Theme {
    /// The built-in theme of that name, as far as the terminal can show it.
    ///
    /// # Errors
    /// When there is none.
    pub fn built_in(name: &str, colors: Colors) -> Result<Self, ThemeError> {
        let name = if colors == Colors::None { "monochrome" } else { name };
        let (name, text) = BUILT_IN
            .iter()
            .find(|(known, _)| *known == name)
            .ok_or_else(|| ThemeError::Unknown { name: name.into() })?;
        Self::parse(name, text, colors)
    }

    /// Reads a theme file. With 16 colours or fewer an RGB theme gives way to the default one.
    ///
    /// # Errors
    /// Names the role and what is wrong with it.
    pub fn parse(name: &str, text: &str, colors: Colors) -> Result<Self, ThemeError> {
        let wrong = |what: String| ThemeError::Wrong { name: name.into(), what };
        let file: File = toml::from_str(text).map_err(|error| wrong(error.to_string()))?;
        if file.rgb && colors == Colors::Sixteen && name != "default" {
            return Ok(Self { name: name.into(), ..Self::built_in("default", colors)? });
        }
        for role in file.roles.keys() {
            if !ROLES.iter().any(|(_, known)| known == role || known.split('.').next() == Some(role)) {
                return Err(wrong(format!("no role \"{role}\"")));
            }
        }
        let mut styles = Vec::with_capacity(ROLES.len());
        for (_, role) in ROLES {
            let parent = role.split('.').next().unwrap_or(role);
            let entry = file.roles.get(*role).or_else(|| file.roles.get(parent));
            let style = match entry {
                Some(entry) => entry.style(colors).map_err(|what| wrong(format!("{role}: {what}")))?,
                None => Style::new(),
            };
            styles.push(style);
        }
        Ok(Self { name: name.into(), styles, monochrome: file.monochrome })
    }

    /// The theme under another name: that which was asked for.
    pub fn named(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self }
    }

    /// The style of a role.
    pub fn style(&self, role: Role) -> Style {
        self.styles.get(role as usize).copied().unwrap_or_default()
    }
}

impl Entry {
    fn style(&self, colors: Colors) -> Result<Style, String> {
        let color = |text: &String| -> Result<Color, String> {
            let color: Color = text.parse().map_err(|_| format!("no colour \"{text}\""))?;
            Ok(match (colors, color) {
                (Colors::None, _) => Color::Reset,
                (Colors::Indexed, Color::Rgb(r, g, b)) => nearest_indexed(r, g, b),
                (_, color) => color,
            })
        };
        let mut style = Style::new();
        if let Some(text) = &self.fg {
            style = style.fg(color(text)?);
        }
        if let Some(text) = &self.bg {
            style = style.bg(color(text)?);
        }
        for name in &self.modifiers {
            style = style.add_modifier(match name.as_str() {
                "bold" => Modifier::BOLD,
                "dim" => Modifier::DIM,
                "italic" => Modifier::ITALIC,
                "underlined" => Modifier::UNDERLINED,
                "reversed" => Modifier::REVERSED,
                other => return Err(format!("no modifier \"{other}\"")),
            });
        }
        Ok(style)
    }
}

/// The nearest colour of the 6x6x6 cube or the grey ramp.
fn nearest_indexed(r: u8, g: u8, b: u8) -> Color {
    const LEVELS: [i32; 6] = [0, 95, 135, 175, 215, 255];
    let nearest = |value: u8| (0..6).min_by_key(|&at| (LEVELS[at] - i32::from(value)).abs()).unwrap_or(0);
    let distance =
        |x: i32, y: i32, z: i32| (x - i32::from(r)).pow(2) + (y - i32::from(g)).pow(2) + (z - i32::from(b)).pow(2);
    let (x, y, z) = (nearest(r), nearest(g), nearest(b));
    let cube = distance(LEVELS[x], LEVELS[y], LEVELS[z]);
    let mean = (i32::from(r) + i32::from(g) + i32::from(b)) / 3;
    let step = ((mean - 8) / 10).clamp(0, 23);
    let grey = 8 + 10 * step;
    if distance(grey, grey, grey) < cube {
        Color::Indexed(232 + step as u8)
    } else {
        Color::Indexed((16 + 36 * x + 6 * y + z) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_theme_parses_and_roles_are_in_order() {
        for (at, (role, _)) in ROLES.iter().enumerate() {
            assert_eq!(*role as usize, at);
        }
        for (name, _) in BUILT_IN {
            Theme::built_in(name, Colors::True).unwrap();
        }
    }

    #[test]
    fn no_color_leaves_modifiers_only() {
        let environment = |name: &str| (name == "NO_COLOR").then(|| "1".to_string());
        let colors = Colors::of_environment(environment);
        assert_eq!(colors, Colors::None);
        let theme = Theme::built_in("dark", colors).unwrap();
        assert!(theme.monochrome);
        for (role, name) in ROLES {
            let style = theme.style(*role);
            assert!(matches!(style.fg, None | Some(Color::Reset)), "{name}");
            assert!(matches!(style.bg, None | Some(Color::Reset)), "{name}");
        }
    }

    #[test]
    fn rgb_becomes_what_the_terminal_has() {
        let indexed = Theme::built_in("dark", Colors::Indexed).unwrap();
        for (role, name) in ROLES {
            assert!(!matches!(indexed.style(*role).fg, Some(Color::Rgb(..))), "{name}");
        }
        let sixteen = Theme::built_in("dark", Colors::Sixteen).unwrap();
        let default = Theme::built_in("default", Colors::Sixteen).unwrap();
        assert_eq!(sixteen.styles, default.styles);
        assert_eq!(nearest_indexed(255, 0, 0), Color::Indexed(196));
        assert_eq!(nearest_indexed(128, 128, 128), Color::Indexed(244));
    }

    #[test]
    fn a_role_falls_back_to_its_parent() {
        let theme = Theme::parse("x", "[roles]\nkind = { fg = \"red\" }\n", Colors::True).unwrap();
        assert_eq!(theme.style(Role::KindWeights).fg, Some(Color::Red));
        assert_eq!(theme.style(Role::Text), Style::new());
        assert!(Theme::parse("x", "[roles]\nkid = { fg = \"red\" }\n", Colors::True).is_err());
    }
}
