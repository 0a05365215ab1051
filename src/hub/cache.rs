//! The Hugging Face cache: `hub/models--owner--name/{refs, snapshots}`.

use std::path::PathBuf;

use super::HubError;

/// `$HF_HUB_CACHE`, `$HF_HOME/hub`, or `~/.cache/huggingface/hub`.
pub fn folder() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(cache) = variable("HF_HUB_CACHE") {
        return cache;
    }
    if let Some(home) = variable("HF_HOME") {
        return home.join("hub");
    }
    let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    cache.unwrap_or_else(|| PathBuf::from(".cache")).join("huggingface").join("hub")
}

/// The snapshot of a repository (`kind` is `models` or `datasets`) and its commit. A branch or tag is looked up in
/// `refs`; an empty revision is `main`, or the only snapshot there is.
///
/// # Errors
/// When the repository or the revision is not in the cache.
pub fn snapshot(kind: &str, id: &str, revision: &str) -> Result<(PathBuf, String), HubError> {
    let cache = folder();
    let repository = cache.join(format!("{kind}--{}", id.replace('/', "--")));
    let snapshots = repository.join("snapshots");
    if !snapshots.is_dir() {
        return Err(HubError::NotCached { id: id.to_owned(), cache });
    }
    let reference = if revision.is_empty() { "main" } else { revision };
    let mut commits: Vec<String> = std::fs::read_to_string(repository.join("refs").join(reference))
        .map(|commit| commit.trim().to_owned())
        .into_iter()
        .collect();
    if revision.is_empty() {
        let present = std::fs::read_dir(&snapshots).into_iter().flatten().flatten();
        let mut present: Vec<_> = present.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        if let ([], [_]) = (commits.as_slice(), present.as_slice()) {
            commits.append(&mut present);
        }
    } else {
        commits.push(revision.to_owned());
    }
    let found = commits.into_iter().map(|commit| (snapshots.join(&commit), commit)).find(|(path, _)| path.is_dir());
    found.ok_or_else(|| {
        if revision.is_empty() {
            HubError::NotCached { id: id.to_owned(), cache }
        } else {
            HubError::NoRevision { id: id.to_owned(), revision: revision.to_owned(), cache }
        }
    })
}

/// Models of the cache that can be opened: id and snapshot, by name.
pub fn cached_models() -> Vec<(String, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(folder()) else { return Vec::new() };
    let mut found: Vec<(String, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let id = entry.file_name().to_str()?.strip_prefix("models--")?.replace("--", "/");
            let (path, _) = snapshot("models", &id, "").ok()?;
            path.join("config.json").exists().then_some((id, path))
        })
        .collect();
    found.sort();
    found
}

/// Ids of the datasets of the cache, by name.
pub fn cached_datasets() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder()) else { return Vec::new() };
    let id =
        |entry: std::fs::DirEntry| Some(entry.file_name().to_str()?.strip_prefix("datasets--")?.replace("--", "/"));
    let mut found: Vec<String> = entries.flatten().filter_map(id).collect();
    found.retain(|id| snapshot("datasets", id, "").is_ok());
    found.sort();
    found
}
