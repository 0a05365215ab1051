//! Reading files into records: a record is one JSON object, with the line it stands on.

use std::collections::HashSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{DataError, parquet};
use crate::hub;

/// One row as the file has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub fields: Map<String, Value>,
    /// Line of the file (JSONL, CSV) or place in the list (JSON, parquet), counted from 1.
    pub line: usize,
}

/// Files that describe data and hold none.
const NOT_DATA: [&str; 4] = ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"];

/// The file, or the readable files of a folder and its subfolders in the order of their names.
///
/// # Errors
/// When there is nothing, or nothing readable.
pub fn files(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    if !path.is_dir() {
        return Err(DataError::NotFound { path: path.into() });
    }
    let mut found = Vec::new();
    let mut folders = vec![path.to_owned()];
    let unreadable =
        |path: &Path, error: std::io::Error| DataError::Read { path: path.into(), what: error.to_string() };
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(|error| unreadable(&folder, error))? {
            let path = entry.map_err(|error| unreadable(&folder, error))?.path();
            if !path.is_dir() {
                found.push(path);
            } else if !path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")) {
                folders.push(path);
            }
        }
    }
    retain_readable(&mut found);
    if found.is_empty() {
        return Err(DataError::Unreadable { path: path.into(), what: "no readable files in this folder".into() });
    }
    found.sort();
    Ok(found)
}

/// The folder of a data set: the path itself, or for a hub id that is no path its snapshot in the local cache.
///
/// # Errors
/// When it is neither here nor in the cache.
pub fn locate(path: &str) -> Result<PathBuf, DataError> {
    let local = PathBuf::from(path);
    if local.exists() || !hub::is_id(path) || kind(&local).is_some() {
        return Ok(local);
    }
    hub::locate_dataset(path, "").map_err(|_| DataError::Unsupported {
        path: path.into(),
        what: "there is no such file or folder, and no such dataset in the Hugging Face cache".into(),
        hint: format!("fetch it with `hf download --repo-type dataset {path}`, or give a file or folder"),
    })
}

/// The files of a folder (a file is itself) that belong to a subset and a split, by the names that data sets are stored under:
/// `train.jsonl`, `train-00000-of-00002.jsonl`, `train/...`, and a folder named for the subset.
///
/// # Errors
/// When none do; the message says which files there are.
pub fn select(folder: &Path, files: Vec<PathBuf>, subset: &str, split: &str) -> Result<Vec<PathBuf>, DataError> {
    if folder.is_file() || (subset.is_empty() && split.is_empty()) {
        return Ok(files);
    }
    let parts = |file: &Path| -> Vec<String> {
        let inside = file.strip_prefix(folder).unwrap_or(file);
        inside.iter().map(|part| part.to_string_lossy().into_owned()).collect()
    };
    let belongs = |file: &PathBuf| {
        let parts = parts(file);
        let named = |part: &String| {
            part.strip_prefix(split).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '.', '_']))
        };
        (subset.is_empty() || parts.iter().any(|part| part == subset)) && (split.is_empty() || parts.iter().any(named))
    };
    let (chosen, others): (Vec<_>, Vec<_>) = files.into_iter().partition(belongs);
    if chosen.is_empty() {
        let there = others.iter().map(|file| parts(file).join("/")).collect::<Vec<_>>().join(", ");
        return Err(DataError::Content {
            path: folder.into(),
            what: format!("no file belongs to subset \"{subset}\" and split \"{split}\" of {there}"),
        });
    }
    Ok(chosen)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Json,
    Lines,
    Csv(u8),
    Text,
    Parquet,
}

fn kind(path: &Path) -> Option<Kind> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let name = name.strip_suffix(".xz").unwrap_or(&name);
    Some(match name.rsplit_once('.')?.1 {
        "json" => Kind::Json,
        "jsonl" | "ndjson" => Kind::Lines,
        "csv" => Kind::Csv(b','),
        "tsv" => Kind::Csv(b'\t'),
        "txt" | "md" | "text" => Kind::Text,
        "parquet" => Kind::Parquet,
        _ => return None,
    })
}

/// Whether [`read`] reads files of this name, and the file is data rather than a word about it.
fn is_readable(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let about = NOT_DATA.contains(&name) || name.starts_with('.') || name.to_ascii_lowercase().starts_with("readme");
    !about && kind(path).is_some()
}

/// Leaves the files that [`read`] reads, each table once: `train.parquet` goes where `train.jsonl` lies beside it.
pub fn retain_readable<P: AsRef<Path> + Clone>(paths: &mut Vec<P>) {
    paths.retain(|path| is_readable(path.as_ref()));
    let is_parquet = |path: &Path| kind(path) == Some(Kind::Parquet);
    let others: HashSet<PathBuf> =
        paths.iter().map(AsRef::as_ref).filter(|path| !is_parquet(path)).map(|path| path.with_extension("")).collect();
    paths.retain(|path| !is_parquet(path.as_ref()) || !others.contains(&path.as_ref().with_extension("")));
}

/// Reads one file whole.
///
/// # Errors
/// When it is not readable, not text, or a line of it is broken: the message names file and line.
pub fn read(path: &Path) -> Result<Vec<Record>, DataError> {
    let kind = kind(path)
        .ok_or_else(|| DataError::Unreadable { path: path.into(), what: "this kind of file is not read".into() })?;
    if kind == Kind::Parquet {
        return parquet::records(path);
    }
    let failed = |error: std::io::Error| DataError::Read { path: path.into(), what: error.to_string() };
    let mut bytes = std::fs::read(path).map_err(failed)?;
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("xz")) {
        let mut plain = Vec::new();
        xz2::read::XzDecoder::new_multi_decoder(bytes.as_slice()).read_to_end(&mut plain).map_err(failed)?;
        bytes = plain;
    }
    parse(path, kind, bytes)
}

/// Records of JSON lines held in memory.
///
/// # Errors
/// When a line is broken.
pub fn read_lines(name: &Path, text: &str) -> Result<Vec<Record>, DataError> {
    lines(name, text)
}

fn parse(path: &Path, kind: Kind, bytes: Vec<u8>) -> Result<Vec<Record>, DataError> {
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
        DataError::Line { path: path.into(), line, what: "the file is not UTF-8 text from here on".into() }
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    match kind {
        Kind::Lines => lines(path, text),
        Kind::Csv(delimiter) => csv(path, text, delimiter),
        Kind::Text => Ok(document(text)),
        Kind::Json => json(path, text),
        Kind::Parquet => Err(DataError::Unreadable {
            path: path.into(),
            what: "parquet is compressed by itself: it is read without .xz around it".into(),
        }),
    }
}

fn document(text: &str) -> Vec<Record> {
    let mut fields = Map::new();
    fields.insert("text".into(), text.into());
    if text.trim().is_empty() { Vec::new() } else { vec![Record { fields, line: 1 }] }
}

fn json(path: &Path, text: &str) -> Result<Vec<Record>, DataError> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let value = match serde_json::from_str::<Value>(text) {
        Ok(value) => value,
        Err(error) => {
            // JSON lines under the name .json: the first line is an object by itself, and there are more.
            let mut filled = text.lines().filter(|line| !line.trim().is_empty());
            let first = filled.next().is_some_and(|line| serde_json::from_str::<Map<String, Value>>(line).is_ok());
            if first && filled.next().is_some() {
                return lines(path, text);
            }
            return Err(DataError::Line {
                path: path.into(),
                line: error.line(),
                what: format!("broken JSON: {error}"),
            });
        }
    };
    let list = match value {
        Value::Array(list) => list,
        Value::Object(mut fields) => {
            // {"data": [...]}: the rows stand under one key.
            let key = ["data", "train", "rows", "examples", "instances"].into_iter().find(|key| {
                fields.get(*key).and_then(Value::as_array).is_some_and(|rows| rows.iter().all(Value::is_object))
            });
            match key.and_then(|key| fields.remove(key)) {
                Some(Value::Array(list)) => list,
                _ => vec![Value::Object(fields)],
            }
        }
        _ => {
            return Err(DataError::Content {
                path: path.into(),
                what: "JSON data is a list of objects, one object, or one object a line".into(),
            });
        }
    };
    list.into_iter()
        .enumerate()
        .map(|(i, value)| match fields(value) {
            Some(fields) => Ok(Record { fields, line: i + 1 }),
            None => Err(DataError::Content { path: path.into(), what: format!("item {} is not an object", i + 1) }),
        })
        .collect()
}

fn lines(path: &Path, text: &str) -> Result<Vec<Record>, DataError> {
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(i, line)| {
            let broken = |what: String| DataError::Line { path: path.into(), line: i + 1, what };
            let value: Value = serde_json::from_str(line)
                .map_err(|error| broken(format!("broken JSON at column {}: {}", error.column(), reason(&error))))?;
            let fields = fields(value).ok_or_else(|| broken("not a JSON object".into()))?;
            Ok(Record { fields, line: i + 1 })
        })
        .collect()
}

/// serde_json's message without its own line and column, which count within the line.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_owned()
}

/// A bare text is a document, a bare list a conversation.
fn fields(value: Value) -> Option<Map<String, Value>> {
    let (key, value) = match value {
        Value::Object(fields) => return Some(fields),
        Value::String(_) => ("text", value),
        Value::Array(_) => ("messages", value),
        _ => return None,
    };
    let mut fields = Map::new();
    fields.insert(key.into(), value);
    Some(fields)
}

fn csv(path: &Path, text: &str, delimiter: u8) -> Result<Vec<Record>, DataError> {
    let mut reader = ::csv::ReaderBuilder::new().delimiter(delimiter).from_reader(text.as_bytes());
    let broken = |error: ::csv::Error| {
        let line = error.position().map_or(1, |position| position.line() as usize);
        DataError::Line { path: path.into(), line, what: format!("broken CSV: {error}") }
    };
    let header = reader.headers().map_err(broken)?.clone();
    reader
        .records()
        .map(|record| {
            let record = record.map_err(broken)?;
            let line = record.position().map_or(1, |position| position.line() as usize);
            let fields = header.iter().zip(record.iter()).map(|(name, cell)| (name.to_owned(), cell.into())).collect();
            Ok(Record { fields, line })
        })
        .collect()
}
