//! The Hugging Face hub over the network: search and download.
//!
//! `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_CACHE` are followed as in Python; with `HF_HUB_OFFLINE` set nothing
//! is asked. A download that was cut off goes on at the byte where it was ([`super::download`]).

use std::path::PathBuf;

use hf_hub::{HFClient, HFClientSync, HFError, split_id};

use super::download::{self, Order};
use crate::data;

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
    #[error("none of the {files} files of {id} on the hub is of use here")]
    Nothing { id: String, files: usize },
    #[error("{id} is being fetched by another process")]
    Busy { id: String },
    #[error("{file} of {id} did not come as the hub has it")]
    Damaged { id: String, file: String },
    #[error("{path} cannot be written: {source}", path = path.display())]
    NotWritable { path: PathBuf, source: std::io::Error },
}

impl FetchError {
    pub(super) fn of(what: String, error: HFError) -> Self {
        let source = Box::new(error);
        match *source {
            HFError::AuthRequired { .. } | HFError::Forbidden { .. } | HFError::RepoNotFound { .. } => {
                FetchError::Refused { what, source }
            }
            HFError::Http { ref context } if matches!(context.status.as_u16(), 401 | 403 | 404) => {
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
            FetchError::Nothing { .. } => {
                "a model needs config.json and safetensors; of datasets JSON, JSONL, CSV, parquet and text are read"
            }
            FetchError::Busy { .. } => "wait for it, then choose it again",
            FetchError::Damaged { .. } => "it was removed; fetch it again",
            FetchError::NotWritable { .. } => "HF_HOME or HF_HUB_CACHE says where the cache is",
            FetchError::Refused { .. } => {
                "see that the name is right; for what is gated or private accept its terms and set HF_TOKEN"
            }
            FetchError::Failed { .. } => {
                "see the network, or HF_ENDPOINT; what was fetched stays, and the next attempt goes on from there"
            }
        }
    }
}

impl FetchError {
    /// The error and what to do next, on one line.
    pub fn with_hint(&self) -> String {
        match self.hint() {
            "" => self.to_string(),
            hint => format!("{self}; {hint}"),
        }
    }
}

/// What a repository of the hub holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repository {
    Model,
    Dataset,
}

/// A dataset that the hub knows.
#[derive(Clone, Debug, PartialEq)]
pub struct FoundDataset {
    pub id: String,
    pub license: String,
    pub downloads: u64,
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

/// Whether `HF_HUB_OFFLINE` forbids to ask the hub.
pub fn is_offline() -> bool {
    let offline = std::env::var("HF_HUB_OFFLINE").unwrap_or_default();
    !matches!(offline.to_ascii_lowercase().as_str(), "" | "0" | "false" | "no" | "off")
}

fn client() -> Result<HFClientSync, FetchError> {
    if is_offline() {
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
            let license = license(&tags);
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

/// The `config.json` of a model of the hub, without fetching anything else.
///
/// # Errors
/// When the hub is not to be asked, cannot be reached, or refuses (what is gated asks for a token).
pub fn model_config(id: &str) -> Result<String, FetchError> {
    let what = || format!("the configuration of {id}");
    let (owner, name) = split_id(id);
    let file = client()?.model(owner, name).download_file_to_bytes().filename("config.json").send();
    let bytes = file.map_err(|error| FetchError::of(what(), error))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Datasets whose names match, most downloaded first.
///
/// # Errors
/// When the hub is not to be asked, cannot be reached, or refuses.
pub fn search_datasets(query: &str) -> Result<Vec<FoundDataset>, FetchError> {
    let found = client()?
        .list_datasets()
        .search(query)
        .sort("downloads")
        .full(true)
        .limit(FOUND)
        .send()
        .map_err(|error| FetchError::of(format!("the search for \"{query}\""), error))?;
    let dataset = |found: hf_hub::repository::DatasetInfo| FoundDataset {
        id: found.id,
        license: license(&found.tags.unwrap_or_default()),
        downloads: found.downloads.unwrap_or(0),
    };
    Ok(found.into_iter().map(dataset).collect())
}

fn license(tags: &[String]) -> String {
    tags.iter().find_map(|tag| tag.strip_prefix("license:")).unwrap_or_default().to_owned()
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

/// Whether a path of a model repository matches one of [`NEEDED`]; copies in folders are for other programs.
fn is_needed(path: &str) -> bool {
    !path.contains('/')
        && NEEDED.iter().any(|pattern| match pattern.split_once('*') {
            Some((start, end)) => {
                path.len() >= start.len() + end.len() && path.starts_with(start) && path.ends_with(end)
            }
            None => path == *pattern,
        })
}

/// Fetches what training needs of a model, or the readable files of a dataset, into the Hugging Face cache; gives the
/// folder there. `tell` gets bytes had and bytes in all.
///
/// # Errors
/// When the hub is not to be asked, cannot be reached or refuses, or the cache cannot be written.
pub fn download(
    repository: Repository,
    id: &str,
    revision: &str,
    tell: &(dyn Fn(u64, u64) + Sync),
) -> Result<PathBuf, FetchError> {
    if !super::is_id(id) {
        return Err(FetchError::NoId { id: id.to_owned() });
    }
    if is_offline() {
        return Err(FetchError::Offline);
    }
    let started = |error| FetchError::of("the start of a client".into(), error);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| started(HFError::from(error)))?;
    let client = HFClient::new().map_err(started)?;
    let (owner, name) = split_id(id);
    let folder = runtime.block_on(async {
        match repository {
            Repository::Model => {
                let needed = |paths: &mut Vec<String>| paths.retain(|path| is_needed(path));
                let order = Order { kind: "models", id, revision, wanted: &needed, tell };
                download::snapshot(&client.model(owner, name), &order).await
            }
            Repository::Dataset => {
                let order = Order { kind: "datasets", id, revision, wanted: &data::retain_readable, tell };
                download::snapshot(&client.dataset(owner, name), &order).await
            }
        }
    });
    // Threads that still talk to the hub are not waited for.
    runtime.shutdown_background();
    folder
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_training_needs_of_a_model() {
        for path in ["config.json", "model-00001-of-00002.safetensors", "tokenizer_config.json", "chat_template.jinja"]
        {
            assert!(is_needed(path), "{path}");
        }
        for path in
            ["pytorch_model.bin", "original/model.safetensors", "README.md", "config.json.bak", "onnx/model.onnx"]
        {
            assert!(!is_needed(path), "{path}");
        }
    }
}
