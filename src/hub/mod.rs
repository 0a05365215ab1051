//! Models and datasets: local folders, the Hugging Face cache, the hub.

mod cache;
pub mod download;
pub mod fetch;

use std::path::{Path, PathBuf};

pub use cache::{cached_datasets, cached_models};

/// Where a model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// In the binary.
    Embedded,
    /// A folder; of a hub model the snapshot in the cache, with its commit.
    Folder { path: PathBuf, commit: Option<String> },
}

#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("no model {id}: there is no such folder")]
    NoFolder { id: String },
    #[error("no model {id} in the Hugging Face cache ({cache})", cache = cache.display())]
    NotCached { id: String, cache: PathBuf },
    #[error("no revision {revision} of {id} in the Hugging Face cache ({cache})", cache = cache.display())]
    NoRevision { id: String, revision: String, cache: PathBuf },
}

impl HubError {
    /// The next step.
    pub fn hint(&self) -> String {
        match self {
            HubError::NoFolder { .. } => {
                "name a folder with config.json and safetensors, a hub id such as owner/name, or \"demo\"".into()
            }
            HubError::NotCached { id, .. } => format!("fetch it with `hf download {id}`, or name a folder"),
            HubError::NoRevision { id, revision, .. } => {
                format!("fetch it with `hf download {id} --revision {revision}`, or leave the revision out")
            }
        }
    }
}

/// Finds a model by folder, by hub id in the local cache, or as `demo`. An existing folder wins over an id.
///
/// # Errors
/// When it is nowhere on this machine.
pub fn locate_model(id: &str, revision: &str) -> Result<Location, HubError> {
    if id == "demo" {
        return Ok(Location::Embedded);
    }
    if let Ok(path) = Path::new(id).canonicalize() {
        return Ok(Location::Folder { path, commit: None });
    }
    if !is_id(id) {
        return Err(HubError::NoFolder { id: id.to_owned() });
    }
    let (path, commit) = cache::snapshot("models", id, revision)?;
    Ok(Location::Folder { path, commit: Some(commit) })
}

/// Folder of a hub dataset in the local cache.
///
/// # Errors
/// When it is not there.
pub fn locate_dataset(id: &str, revision: &str) -> Result<PathBuf, HubError> {
    cache::snapshot("datasets", id, revision).map(|(path, _)| path)
}

/// Whether a text has the form of a hub id, `owner/name`.
pub fn is_id(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    text.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

/// Folder of a model that is not the embedded one.
///
/// # Errors
/// When it is nowhere on this machine.
pub fn resolve_model(id: &str, revision: &str) -> Result<PathBuf, HubError> {
    match locate_model(id, revision)? {
        Location::Folder { path, .. } => Ok(path),
        Location::Embedded => Err(HubError::NoFolder { id: id.to_owned() }),
    }
}
