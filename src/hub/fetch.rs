//! The Hugging Face hub over the network: search and download.
//!
//! `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_CACHE` are followed as in Python; with `HF_HUB_OFFLINE` set nothing
//! is asked. A download that was cut off goes on with the files that are missing.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Mutex;

use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::{HFClientSync, HFError, split_id};

/// Files of a model repository that training needs; pickles are never fetched.
const NEEDED: [&str; 10] = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
];

/// Most models that a search gives.
const FOUND: usize = 50;

/// Why the hub gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("the hub is not asked: HF_HUB_OFFLINE is set")]
    Offline,
    #[error("{id} is no hub id, which is owner/name")]
    NoId { id: String },
    #[error("the hub refused {what}: {source}")]
    Refused { what: String, source: Box<HFError> },
    #[error("the hub failed at {what}: {source}")]
    Failed { what: String, source: Box<HFError> },
}

impl FetchError {
    fn of(what: String, error: HFError) -> Self {
        let source = Box::new(error);
        match *source {
            HFError::AuthRequired { .. } | HFError::Forbidden { .. } | HFError::RepoNotFound { .. } => {
                FetchError::Refused { what, source }
            }
            _ => FetchError::Failed { what, source },
        }
    }

    /// The next step.
    pub fn hint(&self) -> &'static str {
        match self {
            FetchError::Offline => "unset it, or name a model folder",
            FetchError::NoId { .. } => "",
            FetchError::Refused { .. } => "for a gated or private model accept its terms and set HF_TOKEN",
            FetchError::Failed { .. } => {
                "see the network, or HF_ENDPOINT; what was fetched stays and is not fetched again"
            }
        }
    }
}

/// A model that the hub knows.
#[derive(Clone, Debug, PartialEq)]
pub struct FoundModel {
    pub id: String,
    pub family: String,
    pub parameters: Option<u64>,
    /// Of the weights, from the parameters and their types.
    pub bytes: Option<u64>,
    pub license: String,
    pub downloads: u64,
}

fn client() -> Result<HFClientSync, FetchError> {
    let offline = std::env::var("HF_HUB_OFFLINE").unwrap_or_default();
    if !matches!(offline.to_ascii_lowercase().as_str(), "" | "0" | "false" | "no" | "off") {
        return Err(FetchError::Offline);
    }
    HFClientSync::new().map_err(|error| FetchError::of("the start of a client".into(), error))
}

/// Text-generation models with safetensors whose names match, most downloaded first.
///
/// # Errors
/// When the hub is not to be asked, cannot be reached, or refuses.
pub fn search_models(query: &str) -> Result<Vec<FoundModel>, FetchError> {
    let found = client()?
        .list_models()
        .search(query)
        .filter("safetensors")
        .pipeline_tag("text-generation")
        .sort("downloads")
        .full(true)
        .limit(FOUND)
        .send()
        .map_err(|error| FetchError::of(format!("the search for \"{query}\""), error))?;
    Ok(found
        .into_iter()
        .map(|model| {
            let tags = model.tags.unwrap_or_default();
            let license = tags.iter().find_map(|tag| tag.strip_prefix("license:")).unwrap_or_default().to_owned();
            let config = model.config.as_ref().and_then(|config| config.get("model_type")?.as_str().map(str::to_owned));
            let weights = model.safetensors.as_ref();
            FoundModel {
                id: model.id,
                family: config.unwrap_or_default(),
                parameters: weights.map(|weights| weights.total),
                bytes: weights
                    .map(|weights| weights.parameters.iter().map(|(dtype, count)| bits(dtype) * count / 8).sum()),
                license,
                downloads: model.downloads.unwrap_or(0),
            }
        })
        .collect())
}

fn bits(dtype: &str) -> u64 {
    match dtype {
        "F64" | "I64" => 64,
        "F32" | "I32" | "U32" => 32,
        "F16" | "BF16" | "I16" => 16,
        "F4" => 4,
        _ => 8,
    }
}

/// Bytes had so far, file by file: events only tell what changed.
struct Bytes<'a> {
    files: Mutex<(u64, HashMap<String, u64>)>,
    tell: Box<dyn Fn(u64, u64) + Send + Sync + 'a>,
}

impl ProgressHandler for Bytes<'_> {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        let Ok(mut files) = self.files.lock() else { return };
        match event {
            DownloadEvent::Start { total_bytes, .. } => files.0 = *total_bytes,
            DownloadEvent::Progress { files: changed } => {
                for file in changed {
                    files.1.insert(file.filename.clone(), file.bytes_completed);
                }
            }
            _ => return,
        }
        (self.tell)(files.1.values().sum(), files.0);
    }
}

/// Fetches what training needs of a model into the Hugging Face cache; gives its folder there. `tell` gets bytes had
/// and bytes in all.
///
/// # Errors
/// When the hub is not to be asked, cannot be reached, or refuses.
pub fn download_model(
    id: &str,
    revision: &str,
    tell: impl Fn(u64, u64) + Send + Sync + 'static,
) -> Result<PathBuf, FetchError> {
    if !super::is_id(id) {
        return Err(FetchError::NoId { id: id.to_owned() });
    }
    let (owner, name) = split_id(id);
    let progress = Bytes { files: Mutex::default(), tell: Box::new(tell) };
    client()?
        .model(owner, name)
        .snapshot_download()
        .maybe_revision((!revision.is_empty()).then(|| revision.to_owned()))
        .allow_patterns(NEEDED.map(str::to_owned).to_vec())
        .progress(progress)
        .send()
        .map_err(|error| FetchError::of(format!("the download of {id}"), error))
}
