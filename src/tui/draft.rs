//! The run that is being put together: its run file, what is known of it, and how it got there.

use std::path::PathBuf;
use std::sync::Arc;

use super::message::{Forecast, Preview};
use crate::advise::{self, Facts, Warning};
use crate::spec::keys::KEYS;
use crate::spec::{RunSpec, TrainData};

/// Changes that undo takes back.
const UNDO: usize = 100;

/// A run file being edited.
#[derive(Clone, Debug, Default)]
pub struct Draft {
    pub spec: RunSpec,
    pub path: Option<PathBuf>,
    undo: Vec<RunSpec>,
    pub preview: Option<Result<Box<Preview>, String>>,
    /// Lengths of the preview's rows, for the forecast.
    pub lengths: Option<Arc<Vec<usize>>>,
    pub forecast: Option<Result<Box<Forecast>, String>>,
    /// The latest questions asked; older answers are not taken.
    pub preview_generation: u64,
    pub forecast_generation: u64,
    /// A question is on its way.
    pub previewing: bool,
    pub forecasting: bool,
    pub warnings: Vec<Warning>,
}

impl Draft {
    /// What the warnings' rules may know.
    pub fn facts(&self) -> Facts {
        let lora_fits = match &self.forecast {
            Some(Ok(forecast)) => forecast.lora_fits,
            _ => None,
        };
        let Some(Ok(preview)) = &self.preview else { return Facts { lora_fits, ..Facts::default() } };
        let limit = self.spec.data.max_length;
        let mut lengths = preview.lengths.clone();
        lengths.sort_unstable();
        let at = (lengths.len() * 99).div_ceil(100).saturating_sub(1);
        Facts {
            rows: Some(preview.rows),
            eval_rows: Some(preview.eval_rows),
            shared_rows: preview.shared,
            duplicate_rows: preview.duplicates,
            cut_rows: lengths.iter().filter(|&&length| length > limit).count(),
            length_p99: lengths.get(at).copied(),
            unmapped_columns: preview.unmapped.clone(),
            lora_fits,
        }
    }

    /// Judges the run file anew.
    pub fn judge(&mut self) {
        self.warnings = advise::check(&self.spec, &self.facts());
    }

    /// Changes the run file; undo takes it back. False when nothing changed.
    pub fn change(&mut self, spec: RunSpec) -> bool {
        if spec == self.spec {
            return false;
        }
        if self.undo.len() == UNDO {
            self.undo.remove(0);
        }
        self.undo.push(std::mem::replace(&mut self.spec, spec));
        self.judge();
        true
    }

    /// Another run file in place of this one; what was resolved for another run does not count.
    pub fn replace(&mut self, spec: RunSpec) {
        self.change(RunSpec { resolved: None, ..spec });
    }

    /// Takes the last change back.
    pub fn undo(&mut self) -> bool {
        let Some(spec) = self.undo.pop() else { return false };
        self.spec = spec;
        self.judge();
        true
    }

    /// The data that is trained on, for the top line.
    pub fn data_name(&self) -> String {
        match &self.spec.data.train {
            TrainData::Path(path) => path.clone(),
            TrainData::Sources(sources) => match sources.as_slice() {
                [one] => one.path.clone(),
                many => format!("{} sources", many.len()),
            },
        }
    }

    /// The run file as one command line.
    pub fn command_line(&self) -> String {
        let defaults = RunSpec::default();
        let mut line = String::from("tune train");
        if !self.spec.model.id.is_empty() {
            line.push_str(&format!(" --model {}", quote(&self.spec.model.id)));
        }
        if let TrainData::Path(path) = &self.spec.data.train
            && !path.is_empty()
        {
            line.push_str(&format!(" --data {}", quote(path)));
        }
        for key in KEYS {
            let given = matches!((key.section, key.name), ("model", "id"))
                || (key.name == "train" && matches!(self.spec.data.train, TrainData::Path(_)));
            let value = self.spec.get(key);
            if given || value == defaults.get(key) {
                continue;
            }
            if let Some(value) = value {
                let text = match &value {
                    toml::Value::String(text) => text.clone(),
                    other => other.to_string(),
                };
                line.push_str(&format!(" --set {}", quote(&format!("{}={text}", key.path()))));
            }
        }
        line
    }
}

/// A word of a shell's command line.
fn quote(text: &str) -> String {
    let plain = |character: char| character.is_ascii_alphanumeric() || "-_./=:@,+".contains(character);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_holds_what_is_not_default() {
        let mut draft = Draft::default();
        draft.spec.model.id = "demo".into();
        draft.spec.data.train = TrainData::Path("my rows.json".into());
        draft.spec.method.rank = 64;
        draft.spec.data.system = "Don't".into();
        assert_eq!(
            draft.command_line(),
            "tune train --model demo --data 'my rows.json' --set 'data.system=Don'\\''t' --set method.rank=64"
        );
    }

    #[test]
    fn changes_can_be_taken_back() {
        let mut draft = Draft::default();
        let mut spec = draft.spec.clone();
        spec.method.rank = 64;
        assert!(draft.change(spec.clone()));
        assert!(!draft.change(spec));
        assert!(draft.undo() && draft.spec.method.rank == 16);
        assert!(!draft.undo());
    }
}
