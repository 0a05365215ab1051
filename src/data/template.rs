//! Chat templates: Jinja, rendered as `apply_chat_template` of Transformers renders it.
//!
//! What Transformers gives a template and plain Jinja does not: `trim_blocks` and `lstrip_blocks`, loop controls,
//! `raise_exception`, `strftime_now`, a `tojson` that is Python's `json.dumps` without ASCII escapes, the special
//! tokens as variables, Python's string methods, reasoning under its several names, and the `generation` tag around
//! what the assistant wrote.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

use super::DataError;
use super::message::Message;
use super::python_json;
use crate::model::tokenizer::Tokenizer;

/// Noncharacters around the text of a `generation` block; taken out again after rendering.
const BLOCK_START: char = '\u{fdd0}';
const BLOCK_END: char = '\u{fdd1}';

/// The templates that `data.template` knows by name.
const BUILT_IN: [(&str, &str); 10] = [
    ("alpaca", include_str!("templates/alpaca.jinja")),
    ("chatml", include_str!("templates/chatml.jinja")),
    ("gemma", include_str!("templates/gemma.jinja")),
    ("llama2", include_str!("templates/llama2.jinja")),
    ("llama3", include_str!("templates/llama3.jinja")),
    ("mistral", include_str!("templates/mistral.jinja")),
    ("phi3", include_str!("templates/phi3.jinja")),
    ("qwen2.5", include_str!("templates/qwen2.5.jinja")),
    ("vicuna", include_str!("templates/vicuna.jinja")),
    ("zephyr", include_str!("templates/zephyr.jinja")),
];

/// Names of the built-in templates.
pub fn built_in_templates() -> impl Iterator<Item = &'static str> {
    BUILT_IN.iter().map(|(name, _)| *name)
}

/// A conversation as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    /// Bytes inside `{% generation %}` blocks, where the template has them.
    pub generation: Vec<Range<usize>>,
}

/// A compiled chat template.
#[derive(Clone)]
pub struct ChatTemplate {
    /// Where it is from, to be shown: `the model's own`, `built-in chatml`, a path.
    pub origin: String,
    environment: Arc<Environment<'static>>,
    /// Special tokens, which every template sees as variables.
    variables: Vec<(String, Value)>,
    has_tool_template: bool,
    has_generation_blocks: bool,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("origin", &self.origin).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles a template for a tokenizer. `origin` is what messages and reports call it.
    ///
    /// # Errors
    /// When the template is not valid Jinja.
    pub fn new(origin: &str, source: &str, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        Self::compile(origin, source, None, tokenizer)
    }

    /// The template that `data.template` names: `auto` is the model's own or, where it has none, built-in `alpaca`,
    /// which needs no special tokens but the model's end of text.
    ///
    /// # Errors
    /// When there is no such template or it does not compile.
    pub fn choose(name: &str, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        if name == "auto" || name.is_empty() {
            return match Self::of_model(tokenizer)? {
                Some(template) => Ok(template),
                None => {
                    let mut template = Self::choose("alpaca", tokenizer)?;
                    template.origin = "built-in alpaca (the model has no chat template)".into();
                    Ok(template)
                }
            };
        }
        if let Some((_, source)) = BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
            return Self::new(&format!("built-in {name}"), source, tokenizer);
        }
        if let Some(source) = tokenizer.chat_templates().get(name) {
            return Self::new(&format!("the model's own \"{name}\""), source, tokenizer);
        }
        let path = Path::new(name);
        if path.is_file() {
            let source = std::fs::read_to_string(path)
                .map_err(|error| DataError::Read { path: path.into(), what: error.to_string() })?;
            return Self::new(name, &source, tokenizer);
        }
        let allowed = built_in_templates().collect::<Vec<_>>().join(", ");
        Err(DataError::UnknownTemplate { name: name.into(), allowed: format!("auto, {allowed}") })
    }

    /// The model's own template, with its separate one for tools where there is one.
    ///
    /// # Errors
    /// When it does not compile.
    pub fn of_model(tokenizer: &Tokenizer) -> Result<Option<Self>, DataError> {
        let templates = tokenizer.chat_templates();
        // Several named templates without a default one: Transformers would ask which; the first is as good.
        let Some(source) = templates.get("default").or_else(|| templates.values().next()) else { return Ok(None) };
        Self::compile("the model's own", source, templates.get("tool_use").map(String::as_str), tokenizer).map(Some)
    }

    fn compile(origin: &str, source: &str, tools: Option<&str>, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let failed = |error: Error| DataError::Template { template: origin.into(), what: describe(&error) };
        let mut environment = environment();
        environment.add_template_owned("chat", generation_as_filter(source)).map_err(failed)?;
        if let Some(tools) = tools {
            environment.add_template_owned("tools", generation_as_filter(tools)).map_err(failed)?;
        }
        Ok(Self {
            origin: origin.into(),
            environment: Arc::new(environment),
            variables: tokenizer
                .special_tokens()
                .iter()
                .map(|(name, text)| (name.clone(), Value::from(text.as_str())))
                .collect(),
            has_tool_template: tools.is_some(),
            has_generation_blocks: generation_as_filter(source) != source,
        })
    }

    /// Whether the template marks what the assistant wrote with `{% generation %}`.
    pub fn has_generation_blocks(&self) -> bool {
        self.has_generation_blocks
    }

    /// The text of a conversation; with `add_generation_prompt` up to where the assistant's next answer begins.
    ///
    /// # Errors
    /// When the template refuses the conversation (`raise_exception`) or fails on it.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String, DataError> {
        let values: Vec<Value> = messages.iter().map(message_value).collect();
        self.render_values(&values, tools, add_generation_prompt).map(|rendered| rendered.text)
    }

    /// As [`ChatTemplate::render`], from messages made by [`message_value`]: many prefixes of one conversation are
    /// rendered without converting it again.
    pub(super) fn render_values(
        &self,
        messages: &[Value],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<Rendered, DataError> {
        let failed = |error: Error| DataError::Template { template: self.origin.clone(), what: describe(&error) };
        let tools = tools.filter(|tools| !tools.is_null());
        let name = if tools.is_some() && self.has_tool_template { "tools" } else { "chat" };
        let template = self.environment.get_template(name).map_err(failed)?;
        let mut context: Vec<(String, Value)> = self.variables.clone();
        context.push(("messages".into(), Value::from(messages.to_vec())));
        context.push(("tools".into(), tools.map_or(Value::from(()), python_json::to_jinja)));
        context.push(("documents".into(), Value::from(())));
        context.push(("add_generation_prompt".into(), Value::from(add_generation_prompt)));
        let context = Value::from_pairs(context);
        // Templates come with models: one that trips the engine (it panics on a backward slice of an empty text) is
        // an error of that template.
        let text = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| template.render(context)))
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::InvalidOperation, "the template engine failed on it")))
            .map_err(failed)?;
        Ok(take_out_marks(text))
    }
}

/// A message as the template sees it.
pub(super) fn message_value(message: &Message) -> Value {
    let mut fields = message.fields.clone();
    // Reasoning goes by three names; templates read one or another.
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|key| fields.get(*key).filter(|value| !value.is_null()).cloned());
    if let Some(reasoning) = reasoning {
        if !fields.contains_key("thinking") {
            fields.shift_insert(0, "thinking".into(), reasoning.clone());
        }
        fields.insert("reasoning_content".into(), reasoning);
    }
    python_json::to_jinja(&serde_json::Value::Object(fields))
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(
        minijinja::syntax::SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .expect("the default delimiters are valid"),
    );
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|out, state, value| match f64::try_from(value.clone()) {
        Ok(float) if value.is_number() && !value.is_integer() => {
            out.write_str(&python_json::float_repr(float)).map_err(Error::from)
        }
        _ => minijinja::escape_formatter(out, state, value),
    });
    environment.add_filter("tojson", to_json);
    environment.add_filter("__generation", |block: String| format!("{BLOCK_START}{block}{BLOCK_END}"));
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| {
        use std::fmt::Write;
        let mut text = String::new();
        write!(text, "{}", chrono::Local::now().format(&format))
            .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format {format:?}")))?;
        Ok::<_, Error>(text)
    });
    // In Jinja2 whatever has a length and items is a sequence, strings and dicts too.
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined)
    });
    environment.add_test("iterable", |value: &Value| {
        value.kind() == ValueKind::String || (!value.is_none() && value.try_iter().is_ok())
    });
    environment
}

/// Python's methods that templates call.
fn method(state: &mut State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    use minijinja::value::from_args;
    if let Some(text) = value.as_str() {
        match method {
            "removeprefix" => {
                let (prefix,): (&str,) = from_args(arguments)?;
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            "removesuffix" => {
                let (suffix,): (&str,) = from_args(arguments)?;
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            "rsplit" => {
                let (separator, limit): (Option<&str>, Option<i64>) = from_args(arguments)?;
                let limit = usize::try_from(limit.unwrap_or(-1)).map_or(usize::MAX, |limit| limit.saturating_add(1));
                let mut parts: Vec<&str> = match separator {
                    Some(separator) => text.rsplitn(limit, separator).collect(),
                    None => rsplit_blanks(text, limit),
                };
                parts.reverse();
                return Ok(parts.into_iter().map(Value::from).collect());
            }
            "partition" | "rpartition" => {
                let (separator,): (&str,) = from_args(arguments)?;
                let parts = match method {
                    "partition" => text.split_once(separator).map_or([text, "", ""], |(a, b)| [a, separator, b]),
                    _ => text.rsplit_once(separator).map_or(["", "", text], |(a, b)| [a, separator, b]),
                };
                return Ok(parts.into_iter().map(Value::from).collect());
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments)
}

/// Words from the right, at most `limit` pieces, the last one whole, as `str.rsplit` without a separator.
fn rsplit_blanks(text: &str, limit: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_end();
    while !rest.is_empty() && parts.len() + 1 < limit {
        let start =
            rest.rfind(char::is_whitespace).map_or(0, |at| at + rest[at..].chars().next().map_or(1, char::len_utf8));
        parts.push(&rest[start..]);
        rest = rest[..start].trim_end();
    }
    if !rest.is_empty() {
        parts.push(rest);
    }
    parts
}

/// `json.dumps(value, ensure_ascii=False)` and its options.
fn to_json(value: &Value, indent: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let failed = |what: String| Error::new(ErrorKind::InvalidOperation, format!("tojson: {what}"));
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<Value>>("indent")?,
    };
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => match (indent.as_usize(), indent.as_str()) {
            (Some(spaces), _) => Some(" ".repeat(spaces)),
            (None, Some(text)) => Some(text.to_owned()),
            _ => return Err(failed(format!("indent {indent} is neither a number nor a text"))),
        },
    };
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let separators = match options.get::<Option<Value>>("separators")?.filter(|value| !value.is_none()) {
        None => None,
        Some(pair) => {
            let part = |i| pair.get_item_by_index(i).ok().and_then(|part| part.as_str().map(str::to_owned));
            match (part(0), part(1)) {
                (Some(item), Some(key)) => Some((item, key)),
                _ => return Err(failed("separators are two texts".into())),
            }
        }
    };
    options.assert_all_used()?;
    let json = python_json::from_jinja(value)?;
    let style = python_json::Style {
        indent,
        separators,
        ensure_ascii: ensure_ascii.unwrap_or(false),
        sort_keys: sort_keys.unwrap_or(false),
    };
    Ok(Value::from(python_json::dumps(&json, &style)))
}

/// `{% generation %}` is a tag of Transformers' own. As a filter block it keeps its whitespace control and its scope.
fn generation_as_filter(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}").map(|end| end + 2) else { break };
        let tag = &rest[start..start + length];
        let inner = &tag[2..tag.len() - 2];
        let (left, inner) = match inner.as_bytes().first() {
            Some(b'-' | b'+') => inner.split_at(1),
            _ => ("", inner),
        };
        let (inner, right) = match inner.as_bytes().last() {
            Some(b'-' | b'+') => inner.split_at(inner.len() - 1),
            _ => (inner, ""),
        };
        out.push_str(&rest[..start]);
        match inner.trim() {
            "generation" => out.push_str(&format!("{{%{left} filter __generation {right}%}}")),
            "endgeneration" => out.push_str(&format!("{{%{left} endfilter {right}%}}")),
            _ => out.push_str(tag),
        }
        rest = &rest[start + length..];
    }
    out.push_str(rest);
    out
}

fn take_out_marks(text: String) -> Rendered {
    if !text.contains(BLOCK_START) {
        return Rendered { text, generation: Vec::new() };
    }
    let mut out = String::with_capacity(text.len());
    let mut generation = Vec::new();
    let mut start = 0;
    for character in text.chars() {
        match character {
            BLOCK_START => start = out.len(),
            BLOCK_END => generation.push(start..out.len()),
            _ => out.push(character),
        }
    }
    Rendered { text: out, generation }
}

/// The error with its line and the reason below it.
fn describe(error: &Error) -> String {
    let mut text = match (error.detail(), error.line()) {
        (Some(detail), Some(line)) => format!("line {line}: {detail}"),
        (Some(detail), None) => detail.to_owned(),
        (None, Some(line)) => format!("line {line}: {}", error.kind()),
        (None, None) => error.kind().to_string(),
    };
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text.push_str(&format!("; {inner}"));
        source = inner.source();
    }
    text
}
