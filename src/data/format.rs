//! Formats: which columns a row has, and what each of them means.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::DataError;
use super::read::Record;

/// How rows are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    Alpaca,
    Sharegpt,
    Messages,
    PromptCompletion,
    Text,
    Tokens,
}

/// A format's row in the table: its name, the roles it cannot do without, and those it may have.
struct Definition {
    format: Format,
    name: &'static str,
    needs: &'static [&'static str],
    may_have: &'static [&'static str],
}

const FORMATS: [Definition; 6] = [
    Definition {
        format: Format::Tokens,
        name: "tokens",
        needs: &["input_ids"],
        may_have: &["labels", "attention_mask", "weights"],
    },
    Definition { format: Format::Messages, name: "messages", needs: &["messages"], may_have: &["system", "tools"] },
    Definition { format: Format::Sharegpt, name: "sharegpt", needs: &["messages"], may_have: &["system", "tools"] },
    Definition {
        format: Format::Alpaca,
        name: "alpaca",
        needs: &["instruction", "output"],
        may_have: &["input", "system", "history"],
    },
    Definition {
        format: Format::PromptCompletion,
        name: "prompt-completion",
        needs: &["prompt", "response"],
        may_have: &["system"],
    },
    Definition { format: Format::Text, name: "text", needs: &["text"], may_have: &[] },
];

/// Columns that mean a role, the likeliest first.
const SYNONYMS: [(&str, &[&str]); 14] = [
    ("input_ids", &["input_ids"]),
    ("labels", &["labels"]),
    ("attention_mask", &["attention_mask"]),
    ("weights", &["weights", "loss_weights"]),
    ("messages", &["messages", "conversations", "conversation", "dialogue", "dialog", "chat"]),
    ("instruction", &["instruction"]),
    ("output", &["output", "response", "answer", "completion"]),
    ("input", &["input", "context"]),
    ("history", &["history"]),
    (
        "prompt",
        &["prompt", "question", "query", "problem", "user", "human", "input", "instruction", "request", "source"],
    ),
    (
        "response",
        &[
            "completion",
            "response",
            "answer",
            "output",
            "assistant",
            "reply",
            "solution",
            "target",
            "gpt",
            "bot",
            "answers",
        ],
    ),
    ("text", &["text", "content", "document", "body", "passage", "article"]),
    ("system", &["system", "system_prompt"]),
    ("tools", &["tools", "functions"]),
];

/// Other names that people use for a role in `columns`.
const ROLE_SYNONYMS: [(&str, &str); 8] = [
    ("completion", "response"),
    ("answer", "response"),
    ("assistant", "response"),
    ("question", "prompt"),
    ("user", "prompt"),
    ("query", "prompt"),
    ("conversations", "messages"),
    ("conversation", "messages"),
];

impl Format {
    fn definition(self) -> &'static Definition {
        FORMATS.iter().find(|definition| definition.format == self).expect("every format is in the table")
    }

    pub fn name(self) -> &'static str {
        self.definition().name
    }

    /// The format of that name; `None` for `auto`.
    ///
    /// # Errors
    /// When there is no such format.
    pub fn named(name: &str) -> Result<Option<Self>, DataError> {
        if name.is_empty() || name == "auto" {
            return Ok(None);
        }
        FORMATS.iter().find(|definition| definition.name == name).map(|definition| Some(definition.format)).ok_or_else(
            || DataError::UnknownFormat {
                name: name.into(),
                allowed: std::iter::once("auto")
                    .chain(FORMATS.iter().map(|definition| definition.name))
                    .collect::<Vec<_>>()
                    .join(", "),
            },
        )
    }
}

/// A format and what its columns are.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Mapping {
    pub format: Format,
    /// Why this format: shown to the user.
    pub why: String,
    /// Role to column.
    pub columns: BTreeMap<String, String>,
    /// Columns that reach the model in no role.
    pub unmapped: Vec<String>,
}

impl Mapping {
    /// The value of a role in a record.
    pub fn get<'a>(&self, record: &'a Record, role: &str) -> Option<&'a Value> {
        record.fields.get(self.columns.get(role)?).filter(|value| !value.is_null())
    }
}

/// Finds out a file's format and what its columns mean. `format` and `columns` are what the user says of it.
///
/// # Errors
/// When columns named by the user do not exist, needed ones are missing, or nothing fits.
pub fn detect(
    path: &Path,
    records: &[Record],
    format: Option<Format>,
    columns: &BTreeMap<String, String>,
) -> Result<Mapping, DataError> {
    let present = present_columns(records);
    let has = |column: &str| present.iter().any(|name| name == column);
    let fail = |hint: String| DataError::Format { path: path.into(), columns: present.join(", "), hint };
    let mut given = BTreeMap::new();
    for (role, column) in columns {
        let role = ROLE_SYNONYMS.iter().find(|(other, _)| other == role).map_or(role.as_str(), |(_, role)| role);
        if !SYNONYMS.iter().any(|(known, _)| *known == role) {
            let known = SYNONYMS.iter().map(|(known, _)| *known).collect::<Vec<_>>().join(", ");
            return Err(fail(format!("columns.{role} is no role; roles are {known}")));
        }
        if !has(column) {
            return Err(fail(format!("columns.{role} = \"{column}\" names a column that no row has")));
        }
        given.insert(role.to_owned(), column.clone());
    }

    let (format, why) = match format {
        Some(format) => (format, "data.format says so".to_owned()),
        None => guess(path, records, &present, &given)?,
    };
    let definition = format.definition();
    let mut mapping = given;
    for role in definition.needs.iter().chain(definition.may_have) {
        if !mapping.contains_key(*role) {
            let taken: Vec<&String> = mapping.values().collect();
            let column = synonyms(role).iter().find(|column| has(column) && !taken.iter().any(|t| t == *column));
            if let Some(column) = column {
                mapping.insert((*role).to_owned(), (*column).to_owned());
            }
        }
    }
    // A file of one column leaves no doubt about which one holds the text.
    if format == Format::Text && !mapping.contains_key("text") && present.len() == 1 {
        mapping.insert("text".into(), present[0].clone());
    }
    mapping.retain(|role, _| definition.needs.contains(&role.as_str()) || definition.may_have.contains(&role.as_str()));
    if let Some(missing) = definition.needs.iter().find(|role| !mapping.contains_key(**role)) {
        return Err(fail(format!(
            "{} needs a column for the role {missing}: name it with columns = {{ {missing} = \"COLUMN\" }} in [[data.train]]",
            definition.name
        )));
    }
    let unmapped = present.iter().filter(|column| !mapping.values().any(|mapped| mapped == *column)).cloned().collect();
    Ok(Mapping { format, why, columns: mapping, unmapped })
}

fn synonyms(role: &str) -> &'static [&'static str] {
    SYNONYMS.iter().find(|(name, _)| *name == role).map_or(&[], |(_, columns)| columns)
}

/// Columns in the order of their first appearance, over the first rows.
fn present_columns(records: &[Record]) -> Vec<String> {
    let mut present: Vec<String> = Vec::new();
    for record in records.iter().take(200) {
        for column in record.fields.keys() {
            if !present.iter().any(|name| name == column) {
                present.push(column.clone());
            }
        }
    }
    present
}

fn guess(
    path: &Path,
    records: &[Record],
    present: &[String],
    given: &BTreeMap<String, String>,
) -> Result<(Format, String), DataError> {
    let unsupported = |what: &str, hint: &str| DataError::Unsupported {
        path: path.display().to_string(),
        what: what.into(),
        hint: hint.into(),
    };
    let has = |column: &str| present.iter().any(|name| name == column);
    // What the user maps decides first.
    for definition in &FORMATS {
        if !given.is_empty() && definition.needs.iter().all(|role| given.contains_key(*role)) {
            let format = match definition.format {
                Format::Messages => conversation_format(records, &given["messages"]).0,
                format => format,
            };
            return Ok((format, format!("columns maps {}", definition.needs.join(" and "))));
        }
    }
    if has("input_ids") {
        return Ok((Format::Tokens, "the column input_ids holds token ids".into()));
    }
    for (a, b) in [("chosen", "rejected"), ("chosen_messages", "rejected_messages")] {
        if has(a) && has(b) {
            return Err(unsupported(
                &format!(
                    "rows with {a} and {b} are preference data, for methods such as DPO that do not exist here yet"
                ),
                "to train on the chosen answers alone, map them: columns = { prompt = \"COLUMN\", response = \"COLUMN\" }",
            ));
        }
    }
    if let Some(column) = synonyms("messages").iter().find(|column| has(column)) {
        if records.iter().take(50).any(|record| record.fields.get("label").is_some_and(Value::is_boolean)) {
            return Err(unsupported(
                "conversations with a true or false label are KTO data, a method that does not exist here yet",
                "to train on all of them alike, good or bad, set format = \"messages\"",
            ));
        }
        let (format, why) = conversation_format(records, column);
        return Ok((format, why));
    }
    if has("instruction")
        && let Some(output) = synonyms("output").iter().find(|column| has(column))
    {
        return Ok((Format::Alpaca, format!("the columns instruction and {output}")));
    }
    let column = |role: &str| synonyms(role).iter().find(|column| has(column));
    if let Some(response) = column("response")
        && let Some(prompt) = synonyms("prompt").iter().find(|column| has(column) && *column != response)
    {
        return Ok((Format::PromptCompletion, format!("the columns {prompt} and {response}")));
    }
    if let Some(text) = column("text") {
        return Ok((Format::Text, format!("the column {text}, and no columns of a conversation")));
    }
    if let [only] = present
        && records.iter().all(|record| record.fields.get(only).is_none_or(Value::is_string))
    {
        return Ok((Format::Text, format!("the one column {only} holds text")));
    }
    Err(DataError::Format {
        path: path.into(),
        columns: present.join(", "),
        hint: "say what they mean in [[data.train]]: columns = { prompt = \"COLUMN\", response = \"COLUMN\" }, or \
               messages, or text"
            .into(),
    })
}

/// `messages` where turns have role and content, `sharegpt` where they have from and value.
fn conversation_format(records: &[Record], column: &str) -> (Format, String) {
    let sharegpt = records
        .iter()
        .find_map(|record| record.fields.get(column)?.as_array()?.first()?.as_object())
        .is_some_and(|turn| turn.contains_key("from") && turn.contains_key("value"));
    if sharegpt {
        (Format::Sharegpt, format!("the column {column} holds turns with from and value"))
    } else {
        (Format::Messages, format!("the column {column} holds turns with role and content"))
    }
}
