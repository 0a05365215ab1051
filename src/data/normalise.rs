//! From a record of any format to an [`Example`]: conversations in roles, text, or tokens.

use serde_json::{Map, Value};

use super::IGNORED;
use super::format::{Format, Mapping};
use super::message::{Example, Message};
use super::read::Record;

/// Why a row is not trained on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unfit(pub String);

fn unfit<T>(reason: impl Into<String>) -> Result<T, Unfit> {
    Err(Unfit(reason.into()))
}

/// Makes an example of a record. `system` is put before conversations that have no system prompt of their own.
pub(super) fn normalise(record: &Record, mapping: &Mapping, system: &str) -> Result<Example, Unfit> {
    match mapping.format {
        Format::Tokens => tokens(record, mapping),
        Format::Text => {
            let text = text(mapping.get(record, "text"))?;
            if text.trim().is_empty() { unfit("empty") } else { Ok(Example::Text(text)) }
        }
        Format::Alpaca => {
            let instruction = text(mapping.get(record, "instruction"))?;
            let input = text(mapping.get(record, "input"))?;
            let mut messages = Vec::new();
            for pair in list(mapping.get(record, "history"))? {
                let [question, answer] = pair.as_array().map_or(&[][..], Vec::as_slice) else {
                    return unfit("history is not a list of [question, answer]");
                };
                messages.push(Message::new("user", &text(Some(question))?));
                messages.push(Message::new("assistant", &text(Some(answer))?));
            }
            let user = match (instruction.is_empty(), input.is_empty()) {
                (_, true) => instruction,
                (true, false) => input,
                (false, false) => format!("{instruction}\n{input}"),
            };
            messages.push(Message::new("user", &user));
            messages.push(Message::new("assistant", &text(mapping.get(record, "output"))?));
            chat(messages, mapping.get(record, "system"), None, system)
        }
        Format::PromptCompletion => {
            let prompt = mapping.get(record, "prompt");
            let response = mapping.get(record, "response");
            // Both may be lists of messages (TRL's conversational prompts).
            let mut messages = match prompt {
                Some(Value::Array(turns)) => turns.iter().map(message).collect::<Result<Vec<_>, _>>()?,
                prompt => vec![Message::new("user", &text(prompt)?)],
            };
            match response {
                Some(Value::Array(turns)) if turns.iter().all(Value::is_object) => {
                    for turn in turns {
                        messages.push(message(turn)?);
                    }
                }
                Some(Value::Object(_)) => messages.extend(response.map(message).transpose()?),
                response => messages.push(Message::new("assistant", &text(response)?)),
            }
            chat(messages, mapping.get(record, "system"), None, system)
        }
        Format::Messages | Format::Sharegpt => {
            let turns = list(mapping.get(record, "messages"))?;
            let messages = turns.iter().map(message).collect::<Result<Vec<_>, _>>()?;
            let tools = match mapping.get(record, "tools") {
                None => None,
                Some(Value::String(text)) if text.trim().is_empty() => None,
                Some(Value::String(text)) => match serde_json::from_str::<Value>(text) {
                    Ok(tools) => Some(tools),
                    Err(_) => return unfit("tools is not JSON"),
                },
                Some(tools) => Some(tools.clone()),
            };
            chat(messages, mapping.get(record, "system"), tools.map(as_functions), system)
        }
    }
}

/// Tools in the form templates expect: a list of `{"type": "function", "function": {...}}`.
fn as_functions(tools: Value) -> Value {
    let list = match tools {
        Value::Array(list) => list,
        other => vec![other],
    };
    let wrapped = list.into_iter().map(|tool| match tool.get("function") {
        Some(_) => tool,
        None => serde_json::json!({"type": "function", "function": tool}),
    });
    Value::Array(wrapped.collect())
}

fn chat(
    mut messages: Vec<Message>,
    row_system: Option<&Value>,
    tools: Option<Value>,
    default_system: &str,
) -> Result<Example, Unfit> {
    if messages.first().is_none_or(|first| first.role() != "system") {
        let row_system = text(row_system)?;
        let system = if row_system.is_empty() { default_system } else { &row_system };
        if !system.is_empty() {
            messages.insert(0, Message::new("system", system));
        }
    }
    if messages.iter().all(|message| is_blank(message) || message.role() == "system") {
        return unfit("empty");
    }
    if !messages.iter().any(Message::is_assistant) {
        return unfit("no answer: no turn of the assistant");
    }
    if messages.iter().any(|message| message.is_assistant() && is_blank(message)) {
        return unfit("an answer is empty");
    }
    if let [.., user, _] = messages.as_slice()
        && messages.len() == 2
        && user.role() == "user"
        && is_blank(user)
    {
        return unfit("the prompt is empty");
    }
    Ok(Example::Chat { messages, tools: tools.filter(|tools| tools.as_array().is_none_or(|list| !list.is_empty())) })
}

fn is_blank(message: &Message) -> bool {
    let said = |key: &str| match message.fields.get(key) {
        Some(Value::String(text)) => !text.trim().is_empty(),
        Some(Value::Array(list)) => !list.is_empty(),
        _ => false,
    };
    !["content", "tool_calls", "reasoning_content", "thinking", "reasoning"].into_iter().any(said)
}

/// Roles as data sets call them, and as templates know them.
const ROLES: [(&str, &str); 17] = [
    ("human", "user"),
    ("user", "user"),
    ("prompter", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("bot", "assistant"),
    ("model", "assistant"),
    ("assistant", "assistant"),
    ("system", "system"),
    ("developer", "developer"),
    ("tool", "tool"),
    ("observation", "tool"),
    ("function_response", "tool"),
    ("function", "tool"),
    ("function_call", "function_call"),
];

/// A turn in either spelling: role and content, or from and value.
fn message(turn: &Value) -> Result<Message, Unfit> {
    let Some(turn) = turn.as_object() else { return unfit("a turn is not an object") };
    let role = turn.get("role").or_else(|| turn.get("from")).and_then(Value::as_str);
    let Some(role) = role else { return unfit("a turn has no role") };
    let Some((_, role)) = ROLES.iter().find(|(name, _)| name.eq_ignore_ascii_case(role.trim())) else {
        return unfit(format!("unknown role {role:?}"));
    };
    let mut fields = Map::new();
    fields.insert("role".into(), (*role).into());
    let content = turn.get("content").or_else(|| turn.get("value"));
    match content {
        Some(Value::Array(parts)) => spread(parts, &mut fields)?,
        None | Some(Value::Null) => {
            fields.insert("content".into(), "".into());
        }
        Some(Value::String(text)) => {
            fields.insert("content".into(), text.as_str().into());
        }
        Some(other) => {
            fields.insert("content".into(), other.to_string().into());
        }
    }
    for (key, value) in turn {
        let own = matches!(key.as_str(), "role" | "from" | "content" | "value" | "weight" | "loss_weight" | "train");
        if !own && !value.is_null() && !fields.contains_key(key) {
            fields.insert(key.clone(), value.clone());
        }
    }
    if *role == "function_call" {
        call(&mut fields)?;
    }
    parse_arguments(&mut fields);
    let weight = match turn.get("loss_weight").or_else(|| turn.get("weight")).or_else(|| turn.get("train")) {
        Some(Value::Bool(train)) => f32::from(u8::from(*train)),
        Some(Value::Number(number)) => number.as_f64().unwrap_or(1.0) as f32,
        _ => 1.0,
    };
    if !weight.is_finite() || weight < 0.0 {
        return unfit(format!("a turn's weight is {weight}"));
    }
    Ok(Message { fields, weight })
}

/// Content in parts: texts are joined, reasoning and tool calls get their own fields.
fn spread(parts: &[Value], fields: &mut Map<String, Value>) -> Result<(), Unfit> {
    let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    for part in parts {
        let kind = part.get("type").and_then(Value::as_str).unwrap_or("text");
        let value = part.get("text").or_else(|| part.get("value")).or_else(|| part.get("content"));
        match (kind, value) {
            ("text" | "input_text" | "output_text", Some(Value::String(text))) => content.push_str(text),
            ("reasoning" | "thinking", Some(Value::String(text))) => reasoning.push_str(text),
            ("tool_call" | "function_call", Some(Value::String(text))) => match serde_json::from_str::<Value>(text) {
                Ok(function) => calls.push(serde_json::json!({"type": "function", "function": function})),
                Err(_) => return unfit("a tool call is not JSON"),
            },
            ("tool_call" | "function_call", Some(function)) => {
                calls.push(serde_json::json!({"type": "function", "function": function}));
            }
            _ => match part.as_str() {
                Some(text) => content.push_str(text),
                None => return unfit(format!("content of type {kind}: only text is trained on")),
            },
        }
    }
    fields.insert("content".into(), content.into());
    if !reasoning.is_empty() {
        fields.insert("reasoning_content".into(), reasoning.into());
    }
    if !calls.is_empty() {
        fields.insert("tool_calls".into(), calls.into());
    }
    Ok(())
}

/// A function_call turn of sharegpt data is an assistant's turn whose content is the call as JSON.
fn call(fields: &mut Map<String, Value>) -> Result<(), Unfit> {
    let text = fields.get("content").and_then(Value::as_str).unwrap_or_default();
    let Ok(calls) = serde_json::from_str::<Value>(text) else { return unfit("a function call is not JSON") };
    let list = match calls {
        Value::Array(list) => list,
        one => vec![one],
    };
    if list.iter().any(|call| call.get("name").is_none_or(|name| !name.is_string())) {
        return unfit("a function call has no name");
    }
    let calls = list.into_iter().map(|function| serde_json::json!({"type": "function", "function": function}));
    let calls: Vec<Value> = calls.collect();
    fields.insert("role".into(), "assistant".into());
    fields.insert("content".into(), "".into());
    fields.insert("tool_calls".into(), calls.into());
    Ok(())
}

/// Arguments written as a text of JSON become the object that templates print.
fn parse_arguments(fields: &mut Map<String, Value>) {
    let Some(calls) = fields.get_mut("tool_calls").and_then(Value::as_array_mut) else { return };
    for call in calls {
        let function = if call.get("function").is_some() { &mut call["function"] } else { call };
        let parsed = match function.get("arguments").and_then(Value::as_str) {
            Some(text) => serde_json::from_str::<Value>(text).ok().filter(Value::is_object),
            None => None,
        };
        if let Some(arguments) = parsed {
            function["arguments"] = arguments;
        }
    }
}

/// A text; a number is written out, a missing value is empty.
fn text(value: Option<&Value>) -> Result<String, Unfit> {
    match value {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        Some(Value::Bool(value)) => Ok(value.to_string()),
        Some(_) => unfit("a list or an object stands where text is expected"),
    }
}

/// A list, also where a cell of CSV holds it as JSON; missing is empty.
fn list(value: Option<&Value>) -> Result<Vec<Value>, Unfit> {
    match value {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => Ok(list.clone()),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(Vec::new()),
        Some(Value::String(text)) => match serde_json::from_str(text) {
            Ok(Value::Array(list)) => Ok(list),
            _ => unfit("text stands where a list is expected"),
        },
        Some(_) => unfit("not a list"),
    }
}

fn tokens(record: &Record, mapping: &Mapping) -> Result<Example, Unfit> {
    let integers = |role: &str| -> Result<Option<Vec<i64>>, Unfit> {
        let values = match mapping.get(record, role) {
            None => return Ok(None),
            some => list(some)?,
        };
        let integers: Option<Vec<i64>> = values.iter().map(Value::as_i64).collect();
        integers.map(Some).ok_or_else(|| Unfit(format!("{role} is not a list of whole numbers")))
    };
    let Some(ids) = integers("input_ids")? else { return unfit("empty") };
    let mut input_ids = Vec::with_capacity(ids.len());
    for id in ids {
        match u32::try_from(id) {
            Ok(id) if i32::try_from(id).is_ok() => input_ids.push(id),
            _ => return unfit(format!("input_ids has {id}")),
        }
    }
    let mut labels: Vec<i32> = match integers("labels")? {
        None => input_ids.iter().map(|id| *id as i32).collect(),
        Some(labels) => {
            if labels.len() != input_ids.len() {
                return unfit(format!("{} input_ids but {} labels", input_ids.len(), labels.len()));
            }
            let mut checked = Vec::with_capacity(labels.len());
            for label in labels {
                match i32::try_from(label) {
                    Ok(label) if label >= 0 || label == IGNORED => checked.push(label),
                    _ => return unfit(format!("labels has {label}")),
                }
            }
            checked
        }
    };
    let mut weights: Vec<f32> = match mapping.get(record, "weights") {
        None => Vec::new(),
        some => {
            let values: Option<Vec<f32>> = list(some)?.iter().map(|w| w.as_f64().map(|w| w as f32)).collect();
            match values {
                Some(values) if values.len() == input_ids.len() => values,
                _ => return unfit("weights is not a list of as many numbers as input_ids"),
            }
        }
    };
    if let Some(mask) = integers("attention_mask")? {
        // Padding goes; a hole inside a row has no meaning here.
        let end = mask.iter().rposition(|m| *m != 0).map_or(0, |last| last + 1);
        let start = mask.iter().position(|m| *m != 0).unwrap_or(0);
        if mask.len() != input_ids.len() || mask[start..end].contains(&0) {
            return unfit("attention_mask has holes or another length than input_ids");
        }
        input_ids = input_ids[start..end].to_vec();
        labels = labels[start..end].to_vec();
        if !weights.is_empty() {
            weights = weights[start..end].to_vec();
        }
    }
    for (label, weight) in labels.iter_mut().zip(&weights) {
        if *weight == 0.0 {
            *label = IGNORED;
        }
    }
    if input_ids.is_empty() { unfit("empty") } else { Ok(Example::Tokens { input_ids, labels, weights }) }
}
