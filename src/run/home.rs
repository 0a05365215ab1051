//! Where runs are kept, and finding one by what the user calls it.

use std::path::{Path, PathBuf};

use super::{RunError, RunFolder};

/// The folder that holds `runs/` and what they share.
#[derive(Clone, Debug)]
pub struct Home {
    path: PathBuf,
}

impl Home {
    /// `$TUNE_HOME`, else the user's data folder (`~/.local/share/tune` on Linux).
    ///
    /// # Errors
    /// When neither is known.
    pub fn find() -> Result<Self, RunError> {
        let chosen = std::env::var_os("TUNE_HOME").filter(|value| !value.is_empty()).map(PathBuf::from);
        let usual = || directories::ProjectDirs::from("", "", "tune").map(|dirs| dirs.data_dir().to_owned());
        let path = chosen.or_else(usual).ok_or(RunError::NoHome)?;
        Ok(Self::at(&path))
    }

    pub fn at(path: &Path) -> Self {
        Self { path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()) }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn runs(&self) -> PathBuf {
        self.path.join("runs")
    }

    /// The lock of a device, held by the run that uses it.
    pub(super) fn device_lock(&self, device: &str) -> PathBuf {
        self.path.join("devices").join(format!("{}.lock", device.replace([':', '/'], "-")))
    }

    /// Whether no run has the device.
    pub fn has_free_device(&self, identity: &str) -> bool {
        super::lock::holder(&self.device_lock(identity)).is_none()
    }

    /// Every run, oldest first.
    pub fn list(&self) -> Vec<RunFolder> {
        let Ok(entries) = std::fs::read_dir(self.runs()) else { return Vec::new() };
        let mut runs: Vec<RunFolder> = entries
            .flatten()
            .filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
            .map(|entry| RunFolder::at(entry.path()))
            .filter(|folder| folder.spec_path().is_file())
            .collect();
        runs.sort_by_key(RunFolder::id);
        runs
    }

    /// The run of this id, of this unique prefix, or for `@last` the newest. The word at an id's end does too.
    ///
    /// # Errors
    /// When there is none, or more than one.
    pub fn run(&self, name: &str) -> Result<RunFolder, RunError> {
        let mut runs = self.list();
        if name == "@last" {
            return runs.pop().ok_or(RunError::NoRuns { path: self.runs() });
        }
        if let Some(at) = runs.iter().position(|run| run.id() == name) {
            return Ok(runs.swap_remove(at));
        }
        let matches = |run: &RunFolder| {
            !name.is_empty() && (run.id().starts_with(name) || run.id().ends_with(&format!("-{name}")))
        };
        let mut found: Vec<RunFolder> = runs.iter().filter(|run| matches(run)).cloned().collect();
        match (found.len(), runs.is_empty()) {
            (1, _) => Ok(found.remove(0)),
            (0, true) => Err(RunError::NoRuns { path: self.runs() }),
            (0, false) => Err(RunError::NoSuchRun { name: name.to_owned() }),
            _ => Err(RunError::Ambiguous {
                name: name.to_owned(),
                ids: found.iter().map(RunFolder::id).collect::<Vec<_>>().join(", "),
            }),
        }
    }
}
