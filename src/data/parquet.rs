//! Parquet files, as most datasets on the Hugging Face Hub are stored.

use std::fs::File;
use std::path::Path;

use parquet::file::reader::FileReader;
use parquet::file::serialized_reader::SerializedFileReader;
use serde_json::Value;

use super::DataError;
use super::read::Record;

/// The rows of a parquet file, nested columns as nested JSON; `line` is the row's number.
///
/// # Errors
/// When the file is not parquet, is cut off, or uses a compression that is not read; the message says which.
pub fn records(path: &Path) -> Result<Vec<Record>, DataError> {
    let file = File::open(path).map_err(|error| DataError::Read { path: path.into(), what: error.to_string() })?;
    let broken =
        |what: String, hint: &str| DataError::Unsupported { path: path.display().to_string(), what, hint: hint.into() };
    let reader = SerializedFileReader::new(file)
        .map_err(|error| broken(format!("not a whole parquet file: {error}"), "fetch or write it again"))?;
    let unread =
        |what: String| broken(what, "write it anew, compressed with snappy, gzip, lz4 or zstd, or as JSON lines");
    let rows = reader.get_row_iter(None).map_err(|error| unread(error.to_string()))?;
    rows.enumerate()
        .map(|(index, row)| {
            let row = row.map_err(|error| unread(format!("row {} cannot be read: {error}", index + 1)))?;
            match row.to_json_value() {
                Value::Object(fields) => Ok(Record { fields, line: index + 1 }),
                _ => Err(unread(format!("row {} has no columns", index + 1))),
            }
        })
        .collect()
}
