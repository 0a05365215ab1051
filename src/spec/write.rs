//! Writes a spec as TOML: with comments for people (`tune new`), plain for a run's own file.

use std::fmt::Write;

use toml::Value;

use super::keys::{KEYS, SECTIONS};
use super::{MethodKind, RunSpec};

/// Column of the comments.
const COMMENT: usize = 33;

impl RunSpec {
    /// The file that `tune new` writes: every key, its value, its meaning.
    pub fn commented(&self) -> String {
        let mut text =
            String::from("# A run of tune. `tune train` on this file starts it, `tune plan` says what it needs\n");
        self.write_sections(&mut text, |line, help| {
            let pad = COMMENT.saturating_sub(line.chars().count());
            format!("{line}{:pad$} # {help}", "")
        });
        text
    }

    /// A run's own `run.toml`: every key, and what was resolved.
    pub fn resolved_toml(&self) -> String {
        let mut text = String::from("# Written by tune when the run was made; `tune train` on it repeats the run\n");
        self.write_sections(&mut text, |line, _| line.to_owned());
        if let Some(resolved) = &self.resolved {
            let section = std::collections::BTreeMap::from([("resolved", resolved)]);
            text.push('\n');
            text.push_str(&toml::to_string(&section).expect("texts and numbers are TOML"));
        }
        text
    }

    fn write_sections(&self, text: &mut String, with_help: impl Fn(&str, &str) -> String) {
        let file = self.table();
        for (section, _) in SECTIONS {
            let _ = write!(text, "\n[{section}]\n");
            for key in KEYS.iter().filter(|key| key.section == section) {
                let line = match file.get(section).and_then(|values| values.get(key.name)) {
                    Some(value) => format!("{} = {}", key.name, literal(value)),
                    None => format!("# {} = {}", key.name, self.example(key.name)),
                };
                let _ = writeln!(text, "{}", with_help(&line, key.help).trim_end());
            }
        }
    }

    /// What an unset key would do, for its commented-out line.
    fn example(&self, name: &str) -> &'static str {
        match (name, self.method.kind) {
            ("learning_rate", MethodKind::Full) => "2e-5",
            ("learning_rate", _) => "2e-4",
            _ => "60",
        }
    }
}

/// A value on one line; small floats as people write them.
fn literal(value: &Value) -> String {
    match value {
        Value::Float(number) if *number != 0.0 && number.abs() < 1e-2 => format!("{number:e}"),
        other => other.to_string(),
    }
}
