//! A run's folder: where its files are.

use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::RunError;

/// The folder of one run. Holds no open files; cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// A folder that exists. Its name is the run's id.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Makes `runs/<id>` with `run_toml` in it, in one rename: nobody ever sees half of it.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn create(runs: &Path, run_toml: &str) -> Result<Self, RunError> {
        let denied = |source| RunError::NotWritable { path: runs.to_owned(), source };
        private_folder(runs).map_err(denied)?;
        for attempt in 0..100 {
            let id = super::id::fresh(attempt);
            let path = runs.join(&id);
            let staging = runs.join(format!(".{id}.new"));
            match std::fs::DirBuilder::new().mode(0o700).create(&staging) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
                other => other.map_err(denied)?,
            }
            let folder = Self { path: path.clone() };
            let filled = (|| {
                write_private(&staging.join("run.toml"), run_toml.as_bytes())?;
                std::fs::File::open(&staging)?.sync_all()?;
                // Renaming onto an existing run fails: its folder is not empty.
                std::fs::rename(&staging, &path)
            })();
            match filled {
                Ok(()) => return Ok(folder),
                Err(error) => {
                    let _ = std::fs::remove_dir_all(&staging);
                    if !path.exists() {
                        return Err(denied(error));
                    }
                }
            }
        }
        Err(denied(std::io::Error::other("no free run id")))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder's name.
    pub fn id(&self) -> String {
        self.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// The fully resolved spec.
    pub fn spec_path(&self) -> PathBuf {
        self.path.join("run.toml")
    }

    pub fn events_path(&self) -> PathBuf {
        self.path.join("events.jsonl")
    }

    pub fn log_path(&self) -> PathBuf {
        self.path.join("worker.log")
    }

    pub fn lock_path(&self) -> PathBuf {
        self.path.join("worker.lock")
    }

    /// `step-N` folders, each whole.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// The result of LoRA, in PEFT layout.
    pub fn adapter(&self) -> PathBuf {
        self.path.join("adapter")
    }

    /// The result of full fine-tuning, in Hugging Face layout.
    pub fn model(&self) -> PathBuf {
        self.path.join("model")
    }

    /// Steps that have a whole checkpoint, ascending. Folders still under a temporary name are not looked at.
    pub fn checkpoint_steps(&self) -> Vec<u64> {
        let Ok(entries) = std::fs::read_dir(self.checkpoints()) else { return Vec::new() };
        let mut steps: Vec<u64> =
            entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("step-")?.parse().ok()).collect();
        steps.sort_unstable();
        steps
    }
}

/// Makes a folder, and those above it, for this user alone.
pub(super) fn private_folder(path: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}
