//! JSON text as Python's `json.dumps` writes it: chat templates put it into prompts, so every blank counts.

use minijinja::value::{Value as JinjaValue, ValueKind};
use minijinja::{Error, ErrorKind};
use serde_json::Value;

/// The options of `json.dumps`.
#[derive(Clone, Debug, Default)]
pub(super) struct Style {
    pub indent: Option<String>,
    /// Between items and after keys; `", "` and `": "` unless indented.
    pub separators: Option<(String, String)>,
    pub ensure_ascii: bool,
    pub sort_keys: bool,
}

pub(super) fn dumps(value: &Value, style: &Style) -> String {
    let (item, key) = match (&style.separators, &style.indent) {
        (Some((item, key)), _) => (item.as_str(), key.as_str()),
        (None, Some(_)) => (",", ": "),
        (None, None) => (", ", ": "),
    };
    let mut writer = Writer { out: String::new(), style, item, key };
    writer.value(value, 0);
    writer.out
}

struct Writer<'a> {
    out: String,
    style: &'a Style,
    item: &'a str,
    key: &'a str,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) {
        match value {
            Value::Null => self.out.push_str("null"),
            Value::Bool(true) => self.out.push_str("true"),
            Value::Bool(false) => self.out.push_str("false"),
            Value::Number(number) => match number.as_f64() {
                Some(float) if number.is_f64() => self.out.push_str(&float_repr(float)),
                _ => self.out.push_str(&number.to_string()),
            },
            Value::String(text) => self.string(text),
            Value::Array(items) if items.is_empty() => self.out.push_str("[]"),
            Value::Array(items) => {
                self.out.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.between(i, depth + 1);
                    self.value(item, depth + 1);
                }
                self.line(depth);
                self.out.push(']');
            }
            Value::Object(fields) if fields.is_empty() => self.out.push_str("{}"),
            Value::Object(fields) => {
                let mut fields: Vec<_> = fields.iter().collect();
                if self.style.sort_keys {
                    fields.sort_by(|a, b| a.0.cmp(b.0));
                }
                self.out.push('{');
                for (i, (name, field)) in fields.into_iter().enumerate() {
                    self.between(i, depth + 1);
                    self.string(name);
                    self.out.push_str(self.key);
                    self.value(field, depth + 1);
                }
                self.line(depth);
                self.out.push('}');
            }
        }
    }

    fn between(&mut self, i: usize, depth: usize) {
        if i > 0 {
            self.out.push_str(self.item);
        }
        self.line(depth);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                control if control < ' ' => self.out.push_str(&format!("\\u{:04x}", control as u32)),
                plain if plain.is_ascii() && plain != '\u{7f}' => self.out.push(plain),
                other if self.style.ensure_ascii => {
                    for unit in other.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                other => self.out.push(other),
            }
        }
        self.out.push('"');
    }
}

/// `repr(float)`: the shortest digits that read back, with an exponent below 1e-4 and from 1e16.
pub(super) fn float_repr(value: f64) -> String {
    let scientific = format!("{value:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return value.to_string() };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') { plain } else { format!("{plain}.0") };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// A JSON value for a template, the fields of objects in their order.
pub(super) fn to_jinja(value: &Value) -> JinjaValue {
    match value {
        Value::Null => JinjaValue::from(()),
        Value::Bool(value) => JinjaValue::from(*value),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => JinjaValue::from(integer),
            (None, Some(integer)) => JinjaValue::from(integer),
            (None, None) => JinjaValue::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => JinjaValue::from(text.as_str()),
        Value::Array(items) => items.iter().map(to_jinja).collect(),
        Value::Object(fields) => {
            JinjaValue::from_pairs(fields.iter().map(|(name, field)| (name.as_str(), to_jinja(field))))
        }
    }
}

/// What a template holds as JSON; undefined values are null.
///
/// # Errors
/// For values that JSON has no form for.
pub(super) fn from_jinja(value: &JinjaValue) -> Result<Value, Error> {
    let refused = || Error::new(ErrorKind::InvalidOperation, format!("tojson: {} has no form in JSON", value.kind()));
    Ok(match value.kind() {
        ValueKind::Undefined | ValueKind::None => Value::Null,
        ValueKind::Bool => Value::Bool(value.is_true()),
        ValueKind::Number => match (value.is_integer(), value.as_i64()) {
            (true, Some(integer)) => integer.into(),
            (true, None) => u64::try_from(value.clone())?.into(),
            (false, _) => f64::try_from(value.clone())?.into(),
        },
        ValueKind::String => value.as_str().unwrap_or_default().into(),
        ValueKind::Seq | ValueKind::Iterable => {
            value.try_iter()?.map(|item| from_jinja(&item)).collect::<Result<Vec<_>, _>>()?.into()
        }
        ValueKind::Map => {
            let mut fields = serde_json::Map::new();
            for key in value.try_iter()? {
                fields.insert(key.to_string(), from_jinja(&value.get_item(&key)?)?);
            }
            Value::Object(fields)
        }
        _ => return Err(refused()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_what_python_writes() {
        let value = serde_json::json!({"b": [1, 2.0, 1e16, 1e-5, -0.5, 123456.789], "a": "é\n\u{1}<&>'", "n": null, "e": {}, "l": []});
        assert_eq!(
            dumps(&value, &Style::default()),
            "{\"b\": [1, 2.0, 1e+16, 1e-05, -0.5, 123456.789], \"a\": \"é\\n\\u0001<&>'\", \"n\": null, \"e\": {}, \"l\": []}"
        );
        let style = Style { indent: Some("  ".into()), sort_keys: true, ensure_ascii: true, ..Style::default() };
        assert_eq!(
            dumps(&serde_json::json!({"b": [1], "a": "🙂"}), &style),
            "{\n  \"a\": \"\\ud83d\\ude42\",\n  \"b\": [\n    1\n  ]\n}"
        );
    }
}
