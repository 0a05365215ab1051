//! Reads a run file, checking every key and value against the table.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use toml::Value;
use toml::de::{DeTable, DeValue};

use super::domain::Domain;
use super::keys::{self, Key};
use super::{RunSpec, suggest};

/// One thing that is wrong with a spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// `train.learning_rate`; empty where no key is at fault.
    pub key: String,
    /// Line of the file, from 1.
    pub line: Option<usize>,
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl Problem {
    pub fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { key: key.into(), line: None, message: message.into(), hint: None }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Everything that is wrong with a spec. Displays as one line a problem, hints in brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecError {
    /// The file, `--set`, or empty.
    pub origin: String,
    pub problems: Vec<Problem>,
}

impl SpecError {
    pub fn new(origin: impl Into<String>, problem: Problem) -> Self {
        Self { origin: origin.into(), problems: vec![problem] }
    }

    /// `run.toml:12: ` before a problem's message.
    pub fn place(&self, problem: &Problem) -> String {
        match (self.origin.as_str(), problem.line) {
            ("", _) => String::new(),
            (origin, Some(line)) => format!("{origin}:{line}: "),
            (origin, None) => format!("{origin}: "),
        }
    }
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{}{}", self.place(problem), problem.message)?;
            if let Some(hint) = &problem.hint {
                write!(f, " ({hint})")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for SpecError {}

impl RunSpec {
    /// Reads a run file, with `key=value` settings over it. Paths in the file are taken from the file's folder, paths
    /// in settings from the working folder.
    ///
    /// # Errors
    /// When the file cannot be read or any key or value is wrong; all problems at once.
    pub fn read(path: &Path, settings: &[String]) -> Result<Self, SpecError> {
        let origin = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| {
            let hint = if path.is_dir() {
                "a run file is wanted, not a folder; a run's own is run.toml inside it"
            } else {
                "`tune new` writes one"
            };
            SpecError::new(&origin, Problem::new("", format!("cannot be read: {error}")).hint(hint))
        })?;
        let mut spec = Self::parse(&text, &origin)?;
        if let Some(folder) = path.parent() {
            super::resolve::rebase(&mut spec, folder);
        }
        spec.apply(settings)?;
        Ok(spec)
    }

    /// Parses a run file's text; `origin` is named in problems.
    ///
    /// # Errors
    /// All problems at once.
    pub fn parse(text: &str, origin: &str) -> Result<Self, SpecError> {
        let mut problems = Vec::new();
        let mut file = keys::defaults();
        let document = DeTable::parse(text).map_err(|error| {
            let line = error.span().map(|span| line_of(text, &span));
            let message = format!("is not TOML: {}", error.message());
            SpecError::new(origin, Problem { line, ..Problem::new("", message) })
        })?;
        let mut resolved = None;
        for (section, content) in document.get_ref() {
            let name = section.get_ref().as_ref();
            let line = Some(line_of(text, &section.span()));
            if name == "resolved" {
                match owned(content.get_ref()).try_into() {
                    Ok(found) => resolved = Some(found),
                    Err(error) => {
                        let message = format!("[resolved] is not as tune writes it: {}", error.message());
                        problems.push(Problem { line, ..Problem::new("resolved", message) });
                    }
                }
                continue;
            }
            let is_section = keys::SECTIONS.iter().any(|(known, _)| *known == name);
            let DeValue::Table(table) = content.get_ref() else {
                let problem = if is_section {
                    Problem::new(name, format!("{name} is a section, written [{name}]"))
                } else {
                    Problem {
                        hint: suggest::unknown_key("", name),
                        ..Problem::new(name, format!("unknown key {name}"))
                    }
                };
                problems.push(Problem { line, ..problem });
                continue;
            };
            if !is_section {
                let hint = suggest::unknown_section(name);
                problems.push(Problem { line, hint, ..Problem::new(name, format!("unknown section [{name}]")) });
                continue;
            }
            for (key, value) in table {
                let line = Some(line_of(text, &value.span()));
                let entry = match keys::find(name, key.get_ref()) {
                    Some(entry) => entry,
                    None => {
                        let line = Some(line_of(text, &key.span()));
                        problems.push(Problem { line, ..unknown(name, key.get_ref()) });
                        continue;
                    }
                };
                let value = owned(value.get_ref());
                match verify(entry, &value) {
                    Ok(()) => put(&mut file, entry, value),
                    Err(problem) => problems.push(Problem { line, ..problem }),
                }
            }
        }
        if !problems.is_empty() {
            problems.sort_by_key(|problem| problem.line);
            return Err(SpecError { origin: origin.to_owned(), problems });
        }
        let mut spec = typed(file);
        spec.resolved = resolved;
        Ok(spec)
    }

    /// Applies `key=value` settings, in order. A value is TOML; text needs no quotes. A key that only one section has
    /// may stand without it.
    ///
    /// # Errors
    /// All problems at once; then nothing is changed.
    pub fn apply(&mut self, settings: &[String]) -> Result<(), SpecError> {
        let mut file = self.table();
        let mut problems = Vec::new();
        for setting in settings {
            match read_setting(setting) {
                Ok((key, value)) => put(&mut file, key, value),
                Err(problem) => problems.push(problem),
            }
        }
        if !problems.is_empty() {
            return Err(SpecError { origin: "--set".into(), problems });
        }
        let resolved = self.resolved.take();
        *self = typed(file);
        self.resolved = resolved;
        Ok(())
    }

    /// Sets one key from text, as [`apply`](Self::apply) does.
    ///
    /// # Errors
    /// When the key or the value is wrong; then nothing is changed.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), Problem> {
        let (entry, value) = read_setting(&format!("{key}={value}"))?;
        let mut file = self.table();
        put(&mut file, entry, value);
        let resolved = self.resolved.take();
        *self = typed(file);
        self.resolved = resolved;
        Ok(())
    }

    /// Takes a key's value back to its default.
    pub fn reset(&mut self, key: &Key) {
        let mut file = self.table();
        if let Some(Value::Table(section)) = file.get_mut(key.section) {
            match key.default_value() {
                Some(value) => section.insert(key.name.to_owned(), value),
                None => section.remove(key.name),
            };
        }
        let resolved = self.resolved.take();
        *self = typed(file);
        self.resolved = resolved;
    }

    /// A key's value; none where it is left out.
    pub fn get(&self, key: &Key) -> Option<Value> {
        self.table().get(key.section)?.get(key.name).cloned()
    }

    /// All sections but `[resolved]`.
    pub(super) fn table(&self) -> toml::Table {
        let mut file = toml::Table::try_from(self).expect("a spec is a table");
        file.remove("resolved");
        file
    }
}

/// Splits and checks `key=value`.
fn read_setting(setting: &str) -> Result<(&'static Key, Value), Problem> {
    let Some((path, text)) = setting.split_once('=') else {
        return Err(Problem::new(setting, format!("`{setting}` is no setting"))
            .hint("write key=value, as train.learning_rate=1e-4"));
    };
    let (path, text) = (path.trim(), text.trim());
    let Some(key) = keys::find_path(path) else {
        let (section, name) = path.split_once('.').unwrap_or(("", path));
        return Err(unknown(section, name));
    };
    let plain = || Value::String(text.to_owned());
    let quoted = text.len() >= 2 && (text.starts_with('"') || text.starts_with('\''));
    let value = if key.domain.is_text() && !quoted { plain() } else { text.parse().unwrap_or_else(|_| plain()) };
    // A lone name is a list of one.
    let value = match (key.domain, value) {
        (Domain::Texts, Value::String(one)) => Value::Array(vec![Value::String(one)]),
        (Domain::Targets, Value::String(names)) if names != "all-linear" && !names.is_empty() => {
            Value::Array(names.split(',').map(|name| Value::String(name.trim().to_owned())).collect())
        }
        (_, value) => value,
    };
    verify(key, &value)?;
    Ok((key, value))
}

fn unknown(section: &str, name: &str) -> Problem {
    let path = if section.is_empty() { name.to_owned() } else { format!("{section}.{name}") };
    let hint = suggest::unknown_key(section, name).or_else(|| Some("`tune new` writes a file with every key".into()));
    Problem { hint, ..Problem::new(&path, format!("unknown key {path}")) }
}

fn verify(key: &Key, value: &Value) -> Result<(), Problem> {
    let path = key.path();
    if !key.domain.accepts(value) {
        let shown = value.to_string();
        let message = format!("{path} = {shown} is not allowed: {}", key.domain.allowed());
        let nearest = match (key.domain, value.as_str()) {
            (Domain::Choice(words), Some(word)) => nearest_word(words, word),
            _ => None,
        };
        return Err(Problem { hint: nearest, ..Problem::new(path, message) });
    }
    if key.domain == Domain::Sources
        && let Value::Array(sources) = value
    {
        verify_sources(&path, sources)?;
    }
    Ok(())
}

fn nearest_word(words: &[&str], given: &str) -> Option<String> {
    let score = |word: &&&str| strsim::jaro_winkler(&given.to_ascii_lowercase(), word);
    let best = words.iter().max_by(|a, b| score(a).total_cmp(&score(b)))?;
    (score(&best) > 0.75).then(|| format!("did you mean \"{best}\"?"))
}

/// `[[data.train]]` tables.
fn verify_sources(path: &str, sources: &[Value]) -> Result<(), Problem> {
    const KNOWN: [(&str, Domain); 7] = [
        ("path", Domain::Place),
        ("subset", Domain::Text),
        ("split", Domain::Text),
        ("rows", Domain::Whole { least: 1, most: i64::MAX }),
        ("weight", Domain::Real { above: Some(0.0), least: f64::MIN, most: 1e6 }),
        ("format", Domain::Choice(keys::FORMATS)),
        ("columns", Domain::Text),
    ];
    if sources.is_empty() {
        return Err(Problem::new(path, format!("{path} is an empty list")).hint("name at least one source"));
    }
    for source in sources {
        let Value::Table(source) = source else {
            return Err(Problem::new(path, format!("{path} holds {source}, which is no table"))
                .hint("write [[data.train]] and path = \"...\" below it"));
        };
        for (name, value) in source {
            let inner = format!("{path}.{name}");
            let Some((_, domain)) = KNOWN.iter().find(|(known, _)| known == name) else {
                let names = KNOWN.map(|(known, _)| known).join(", ");
                return Err(Problem::new(&inner, format!("unknown key {inner}")).hint(format!("a source has {names}")));
            };
            let (accepted, allowed) = if name == "columns" {
                let texts = value.as_table().is_some_and(|table| table.values().all(Value::is_str));
                (texts, "a table of role to column, as { prompt = \"question\" }".to_owned())
            } else {
                (domain.accepts(value), domain.allowed())
            };
            if !accepted {
                return Err(Problem::new(&inner, format!("{inner} = {value} is not allowed: {allowed}")));
            }
        }
        if source.get("path").and_then(Value::as_str).is_none_or(str::is_empty) {
            return Err(Problem::new(path, format!("a source of {path} has no path")));
        }
    }
    Ok(())
}

fn put(file: &mut toml::Table, key: &Key, value: Value) {
    if let Some(Value::Table(section)) = file.get_mut(key.section) {
        section.insert(key.name.to_owned(), value);
    }
}

/// A table whose every value was checked, as a spec.
pub(super) fn typed(file: toml::Table) -> RunSpec {
    Value::Table(file).try_into().expect("values that the table of keys accepts have the spec's types")
}

/// Line of a span's start, from 1.
fn line_of(text: &str, span: &Range<usize>) -> usize {
    text[..span.start.min(text.len())].matches('\n').count() + 1
}

fn owned(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::String(text.to_string()),
        // A number too large for its type stays text, which no domain of numbers accepts.
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_| Value::String(number.to_string()), Value::Integer),
        DeValue::Float(number) => {
            number.as_str().replace("_", "").parse().map_or_else(|_| Value::String(number.to_string()), Value::Float)
        }
        DeValue::Boolean(flag) => Value::Boolean(*flag),
        DeValue::Datetime(time) => Value::Datetime(*time),
        DeValue::Array(list) => Value::Array(list.iter().map(|entry| owned(entry.get_ref())).collect()),
        DeValue::Table(table) => {
            Value::Table(table.iter().map(|(key, entry)| (key.get_ref().to_string(), owned(entry.get_ref()))).collect())
        }
    }
}
