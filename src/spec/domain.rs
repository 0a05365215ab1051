//! What values a key may have.

use toml::Value;

use super::size;

/// The values that a key accepts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Domain {
    /// true or false.
    Flag,
    /// A whole number, both ends included.
    Whole { least: i64, most: i64 },
    /// A number from `least`, or above `above`, to `most`.
    Real { above: Option<f64>, least: f64, most: f64 },
    /// A fraction below 1, or a whole number from 1.
    Share,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Any text.
    Text,
    /// A path, an id or a name.
    Place,
    /// A list of texts.
    Texts,
    /// `"all-linear"` or a list of names.
    Targets,
    /// Two decays of AdamW.
    Betas,
    /// A fraction or a path.
    Evaluation,
    /// A path, or a list of source tables.
    Sources,
    /// `"auto"` or bytes such as `"22GiB"`.
    Size,
    /// `"auto"`, `"cpu"`, or `"wgpu"` and `"cuda"`, numbered or not.
    Device,
}

impl Domain {
    /// What is allowed, for messages and help.
    pub fn allowed(&self) -> String {
        match self {
            Domain::Flag => "true or false".into(),
            Domain::Whole { least, most: i64::MAX } => format!("a whole number from {least}"),
            Domain::Whole { least, most } => format!("a whole number from {least} to {most}"),
            Domain::Real { above: Some(above), most, .. } => format!("a number above {above}, at most {most}"),
            Domain::Real { least, most, .. } => format!("a number from {least} to {most}"),
            Domain::Share => "a fraction from 0 to below 1, or a whole number of updates".into(),
            Domain::Choice(words) => words.join(", "),
            Domain::Text | Domain::Place => "text in quotes".into(),
            Domain::Texts => "a list of texts".into(),
            Domain::Targets => "\"all-linear\" or a list of projection names, such as [\"q_proj\", \"v_proj\"]".into(),
            Domain::Betas => "two numbers from 0 to below 1, such as [0.9, 0.999]".into(),
            Domain::Evaluation => "a fraction from 0 to below 1, or the path of a file".into(),
            Domain::Sources => "a path or id, or [[data.train]] tables".into(),
            Domain::Size => "\"auto\" or a size such as \"22GiB\"".into(),
            Domain::Device => "auto, cpu, wgpu, wgpu:N, cuda, cuda:N".into(),
        }
    }

    /// Whether the value is of the right type and in range.
    pub fn accepts(&self, value: &Value) -> bool {
        let number = number(value);
        match self {
            Domain::Flag => value.is_bool(),
            Domain::Whole { least, most } => value.as_integer().is_some_and(|n| n >= *least && n <= *most),
            Domain::Real { above, least, most } => number
                .is_some_and(|n| n.is_finite() && above.is_none_or(|above| n > above) && n >= *least && n <= *most),
            Domain::Share => {
                number.is_some_and(|n| (0.0..1.0).contains(&n) || ((1.0..=1e9).contains(&n) && n.fract() == 0.0))
            }
            Domain::Choice(words) => value.as_str().is_some_and(|word| words.contains(&word)),
            Domain::Text | Domain::Place => value.is_str(),
            Domain::Texts => is_texts(value),
            Domain::Targets => {
                value.as_str() == Some("all-linear")
                    || value.as_array().is_some_and(|list| !list.is_empty() && is_texts(value))
            }
            Domain::Betas => value.as_array().is_some_and(|list| {
                list.len() == 2 && list.iter().all(|beta| self::number(beta).is_some_and(|n| (0.0..1.0).contains(&n)))
            }),
            Domain::Evaluation => value.is_str() || number.is_some_and(|n| (0.0..1.0).contains(&n)),
            Domain::Sources => value.is_str() || value.is_array(),
            Domain::Size => {
                value.as_str().is_some_and(|text| text == "auto" || size::parse(text).is_some_and(|b| b > 0))
            }
            Domain::Device => value.as_str().is_some_and(is_device),
        }
    }

    /// Whether a value given without quotes, on the command line, is text.
    pub(super) fn is_text(&self) -> bool {
        matches!(self, Domain::Choice(_) | Domain::Text | Domain::Place | Domain::Size | Domain::Device)
    }
}

fn is_texts(value: &Value) -> bool {
    value.as_array().is_some_and(|list| list.iter().all(Value::is_str))
}

fn number(value: &Value) -> Option<f64> {
    value.as_float().or_else(|| value.as_integer().map(|n| n as f64))
}

fn is_device(text: &str) -> bool {
    match text.split_once(':') {
        None => matches!(text, "auto" | "cpu" | "wgpu" | "cuda"),
        Some((engine, index)) => matches!(engine, "wgpu" | "cuda") && index.parse::<u16>().is_ok(),
    }
}
