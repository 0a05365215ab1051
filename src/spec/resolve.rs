//! Makes a spec complete: paths absolute, the learning rate filled in, model commit, data hashes, version.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::parse::{Problem, SpecError};
use super::{EvalData, Resolved, RunSpec, TrainData, check};
use crate::hub;

/// Takes relative paths from `folder` where something is there; others are left for the working folder.
pub(super) fn rebase(spec: &mut RunSpec, folder: &Path) {
    each_place(spec, |_, text| {
        let path = folder.join(&*text);
        if !text.is_empty() && Path::new(text).is_relative() && path.exists() {
            *text = path.to_string_lossy().into_owned();
        }
    });
}

/// Calls `change` with the key and text of everything that may be a path.
fn each_place(spec: &mut RunSpec, mut change: impl FnMut(&'static str, &mut String)) {
    change("model.id", &mut spec.model.id);
    match &mut spec.data.train {
        TrainData::Path(path) => change("data.train", path),
        TrainData::Sources(sources) => sources.iter_mut().for_each(|source| change("data.train", &mut source.path)),
    }
    if let EvalData::Path(path) = &mut spec.data.eval {
        change("data.eval", path);
    }
    change("data.template", &mut spec.data.template);
    change("method.init", &mut spec.method.init);
}

/// The spec as a run's own `run.toml` has it.
///
/// # Errors
/// When keys contradict each other, or model, data or adapter are not there. Nothing is written.
pub fn resolve(spec: &RunSpec) -> Result<RunSpec, SpecError> {
    check::consistent(spec)?;
    let mut spec = spec.clone();
    let mut problems = Vec::new();
    spec.train.learning_rate = Some(spec.learning_rate());

    match hub::locate_model(&spec.model.id, &spec.model.revision) {
        Ok(hub::Location::Embedded) => {}
        Ok(hub::Location::Folder { path, commit: None }) => spec.model.id = path.to_string_lossy().into_owned(),
        Ok(hub::Location::Folder { commit: Some(commit), .. }) => spec.model.revision = commit,
        Err(error) => problems.push(Problem::new("model.id", error.to_string()).hint(error.hint())),
    }
    each_place(&mut spec, |key, text| {
        if text.is_empty() || key == "model.id" || (key == "data.template" && text == "auto") {
            return;
        }
        match Path::new(text.as_str()).canonicalize() {
            Ok(path) => *text = path.to_string_lossy().into_owned(),
            Err(_) if key == "data.template" => {}
            Err(_) if key != "method.init" && (text == "demo" || hub::is_id(text)) => {}
            Err(error) => {
                let hint = "paths are taken from the run file's folder, then from the working folder";
                problems.push(Problem::new(key, format!("{key} = \"{text}\" cannot be read: {error}")).hint(hint));
            }
        }
    });
    if !problems.is_empty() {
        return Err(SpecError { origin: String::new(), problems });
    }
    let data = data_hashes(&spec).map_err(|(path, error)| {
        SpecError::new("", Problem::new("data.train", format!("{} cannot be read: {error}", path.display())))
    })?;
    let changes = spec.resolved.take().map(|resolved| resolved.changes).unwrap_or_default();
    spec.resolved =
        Some(Resolved { version: env!("CARGO_PKG_VERSION").into(), created: crate::run::event::now(), data, changes });
    Ok(spec)
}

/// Data files that are not what they were when the spec was resolved.
pub fn changed_data(spec: &RunSpec) -> Vec<String> {
    let Some(resolved) = &spec.resolved else { return Vec::new() };
    let changed = |(path, hash): &(&String, &String)| file_hash(Path::new(path)).ok().as_ref() != Some(*hash);
    resolved.data.iter().filter(changed).map(|(path, _)| path.clone()).collect()
}

/// SHA-256 of every local data file; folders are walked.
fn data_hashes(spec: &RunSpec) -> Result<BTreeMap<String, String>, (PathBuf, std::io::Error)> {
    let mut paths = match &spec.data.train {
        TrainData::Path(path) => vec![PathBuf::from(path)],
        TrainData::Sources(sources) => sources.iter().map(|source| PathBuf::from(&source.path)).collect(),
    };
    if let EvalData::Path(path) = &spec.data.eval {
        paths.push(path.into());
    }
    let mut hashes = BTreeMap::new();
    while let Some(path) = paths.pop() {
        if path.is_dir() {
            let entries = std::fs::read_dir(&path).map_err(|error| (path.clone(), error))?;
            let visible =
                |entry: &PathBuf| !entry.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            paths.extend(entries.filter_map(|entry| Some(entry.ok()?.path())).filter(visible));
        } else if path.is_file() {
            let hash = file_hash(&path).map_err(|error| (path.clone(), error))?;
            hashes.insert(path.to_string_lossy().into_owned(), hash);
        }
    }
    Ok(hashes)
}

fn file_hash(path: &Path) -> std::io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut block = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut block)?;
        if count == 0 {
            break;
        }
        hasher.update(&block[..count]);
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
