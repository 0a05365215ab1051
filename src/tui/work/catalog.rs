//! What there is: models and data files of this machine, models of the hub.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;

use super::forecast;
use crate::hub::{self, fetch::Repository};
use crate::model::ModelConfig;
use crate::spec::RunSpec;
use crate::tui::message::{Examined, FileEntry, Message, ModelEntry, Origin, Request};

/// Folders under the working folder that are looked into, this deep.
const DEPTH: usize = 3;
/// Entries of a folder that are looked at: a home folder may hold a million files.
const ENTRIES: usize = 2000;
/// Endings of data files.
const DATA: [&str; 6] = ["json", "jsonl", "csv", "txt", "parquet", "md"];

/// Answers a request about what there is.
pub fn perform(request: Request, sender: &Sender<Message>) {
    match request {
        Request::ListModels => list_models(sender),
        Request::ListFiles => {
            let mut files = vec![FileEntry { path: "demo".into(), bytes: 0, downloads: None }];
            files.extend(data_files(Path::new(".")));
            files.extend(hub::cached_datasets().into_iter().map(|id| FileEntry {
                path: id,
                bytes: 0,
                downloads: None,
            }));
            let _ = sender.send(Message::Files(files));
        }
        Request::SearchHub(Repository::Model, query) => {
            let _ = sender.send(Message::HubModels(search(&query)));
        }
        Request::SearchHub(Repository::Dataset, query) => {
            let found = hub::fetch::search_datasets(&query).map_err(|error| error.with_hint());
            let entry = |found: hub::fetch::FoundDataset| FileEntry {
                path: found.id,
                bytes: 0,
                downloads: Some(found.downloads),
            };
            let _ = sender.send(Message::HubDatasets(found.map(|found| found.into_iter().map(entry).collect())));
        }
        Request::Examine(id) => {
            let result = examine(&id).map(Box::new);
            let _ = sender.send(Message::Examined { id, result });
        }
        Request::Download(repository, id) => {
            let here = match repository {
                Repository::Model => hub::locate_model(&id, "").is_ok(),
                Repository::Dataset => crate::data::locate(&id).is_ok(),
            };
            if here {
                return;
            }
            let (told, name) = (std::sync::Mutex::new(sender.clone()), id.clone());
            let tell = move |done, total| {
                if let Ok(told) = told.lock() {
                    let _ = told.send(Message::Progress { repository, id: name.clone(), done, total });
                }
            };
            let result = hub::fetch::download(repository, &id, "", &tell).map_err(|error| error.with_hint());
            let result = result.map(|path| path.display().to_string());
            let _ = sender.send(Message::Downloaded { repository, id, result });
        }
        _ => {}
    }
}

/// What a model of the hub is, and whether it fits.
fn examine(id: &str) -> Result<Examined, String> {
    let text = hub::fetch::model_config(id).map_err(|error| error.with_hint())?;
    let config = ModelConfig::parse(&text).map_err(|error| error.to_string())?;
    Ok(Examined {
        family: config.family.to_string(),
        parameters: config.parameters(),
        context: config.max_position_embeddings,
        fits: forecast::fits(id, &config),
    })
}

/// Lists what is there at once, then works out what fits.
fn list_models(sender: &Sender<Message>) {
    let mut found: Vec<(ModelEntry, Option<PathBuf>)> = vec![(describe("demo", Origin::Embedded, None), None)];
    for path in model_folders(Path::new("."), DEPTH) {
        let id = path.strip_prefix(".").unwrap_or(&path).display().to_string();
        found.push((describe(&format!("./{id}"), Origin::Folder, Some(&path)), Some(path)));
    }
    for (id, path) in hub::cached_models() {
        found.push((describe(&id, Origin::Cache, Some(&path)), Some(path)));
    }
    let entries: Vec<ModelEntry> = found.iter().map(|(entry, _)| entry.clone()).collect();
    let _ = sender.send(Message::Models(entries.clone()));
    for entry in entries.iter().filter(|entry| entry.problem.is_none()) {
        let mut spec = RunSpec::default();
        spec.model.id = entry.id.clone();
        if let Ok(config) = forecast::read_config(&spec) {
            let fits = forecast::fits(&entry.id, &config);
            let _ = sender.send(Message::Fits { id: entry.id.clone(), fits });
        }
    }
}

fn describe(id: &str, origin: Origin, path: Option<&Path>) -> ModelEntry {
    let config = match path {
        Some(path) => ModelConfig::read(path),
        None => {
            let text = crate::demo::files().iter().find(|(name, _)| *name == "config.json");
            ModelConfig::parse(text.and_then(|(_, bytes)| std::str::from_utf8(bytes).ok()).unwrap_or("{}"))
        }
    };
    let bytes = match path {
        Some(path) => weight_bytes(path),
        None => crate::demo::files().iter().map(|(_, bytes)| bytes.len() as u64).sum(),
    };
    let mut entry = ModelEntry {
        id: id.to_owned(),
        origin,
        family: String::new(),
        parameters: None,
        bytes: Some(bytes),
        context: None,
        license: path.map_or_else(|| env!("CARGO_PKG_LICENSE").to_owned(), license),
        problem: None,
        fits: Vec::new(),
        downloads: None,
    };
    match config {
        Ok(config) => {
            entry.family = config.family.to_string();
            entry.parameters = Some(config.parameters());
            entry.context = Some(config.max_position_embeddings);
        }
        Err(error) => entry.problem = Some(error.to_string()),
    }
    entry
}

/// Bytes of the safetensors files.
fn weight_bytes(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|ending| ending == "safetensors"))
        .filter_map(|entry| Some(std::fs::metadata(entry.path()).ok()?.len()))
        .sum()
}

/// The license that the model card's heading or the license file's first line names.
fn license(folder: &Path) -> String {
    let card = std::fs::read_to_string(folder.join("README.md")).unwrap_or_default();
    let heading = card.strip_prefix("---").and_then(|rest| rest.split_once("\n---")).map_or("", |(heading, _)| heading);
    let of_card = heading.lines().find_map(|line| line.strip_prefix("license:")).map(str::trim);
    if let Some(license) = of_card.filter(|license| !license.is_empty()) {
        return license.to_owned();
    }
    let file = std::fs::read_to_string(folder.join("LICENSE")).unwrap_or_default();
    file.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default().chars().take(40).collect()
}

/// Folders with a `config.json` that names an architecture.
fn model_folders(root: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    walk(root, depth, &mut |path| {
        let config = path.join("config.json");
        let Ok(text) = std::fs::read_to_string(&config) else { return };
        if text.contains("\"architectures\"") {
            found.push(path.to_owned());
        }
    });
    found.sort();
    found
}

/// Visits a folder and those below it, without hidden ones and build outputs.
fn walk(folder: &Path, depth: usize, visit: &mut dyn FnMut(&Path)) {
    visit(folder);
    if depth == 0 {
        return;
    }
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten().take(ENTRIES) {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let is_folder = entry.path().is_dir();
        if is_folder && !name.starts_with('.') && !["target", "node_modules", "venv"].contains(&name.as_ref()) {
            walk(&entry.path(), depth - 1, visit);
        }
    }
}

/// Data files, those nearest first.
fn data_files(root: &Path) -> Vec<FileEntry> {
    // Files that every project has and nobody trains on.
    const NOT_DATA: [&str; 12] = [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "package.json",
        "package-lock.json",
        "tsconfig.json",
        "adapter_config.json",
        "README.md",
        "model.safetensors.index.json",
    ];
    let mut files: BTreeMap<(usize, String), u64> = BTreeMap::new();
    walk(root, DEPTH, &mut |folder| {
        let Ok(entries) = std::fs::read_dir(folder) else { return };
        for entry in entries.flatten().take(ENTRIES) {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            let ending = path.extension().map(|ending| ending.to_string_lossy().to_ascii_lowercase());
            if !ending.is_some_and(|ending| DATA.contains(&ending.as_str())) || NOT_DATA.contains(&name.as_str()) {
                continue;
            }
            let Ok(file) = std::fs::metadata(&path) else { continue };
            if file.is_file() && file.len() > 0 {
                let shown = path.strip_prefix(root).unwrap_or(&path).display().to_string();
                files.insert((shown.matches('/').count(), shown), file.len());
            }
        }
    });
    files.into_iter().map(|((_, path), bytes)| FileEntry { path, bytes, downloads: None }).take(ENTRIES).collect()
}

fn search(query: &str) -> Result<Vec<ModelEntry>, String> {
    let found = hub::fetch::search_models(query).map_err(|error| error.with_hint())?;
    Ok(found
        .into_iter()
        .map(|model| ModelEntry {
            id: model.id,
            origin: Origin::Hub,
            family: model.family,
            parameters: model.parameters,
            bytes: model.bytes,
            context: None,
            license: model.license,
            problem: None,
            fits: Vec::new(),
            downloads: Some(model.downloads),
        })
        .collect())
}
