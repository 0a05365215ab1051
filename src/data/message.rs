//! A message of a conversation, and what a row of data is once its format no longer matters.

use serde_json::{Map, Value};

/// One turn. Every field that the data gives reaches the template: `role`, `content`, `tool_calls`,
/// `reasoning_content`, `name` ...
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    pub fields: Map<String, Value>,
    /// Weight of its tokens in the loss; 0 masks them.
    pub weight: f32,
}

impl Message {
    pub fn new(role: &str, content: &str) -> Self {
        let mut fields = Map::new();
        fields.insert("role".into(), role.into());
        fields.insert("content".into(), content.into());
        Self { fields, weight: 1.0 }
    }

    pub fn role(&self) -> &str {
        self.fields.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// The text, empty where there is none (an assistant's turn may be tool calls alone).
    pub fn content(&self) -> &str {
        self.fields.get("content").and_then(Value::as_str).unwrap_or_default()
    }

    pub fn is_assistant(&self) -> bool {
        matches!(self.role(), "assistant" | "model")
    }
}

/// A row of data, whatever its format was.
#[derive(Clone, Debug, PartialEq)]
pub enum Example {
    /// Goes through the chat template.
    Chat { messages: Vec<Message>, tools: Option<Value> },
    /// Goes into the stream of plain text.
    Text(String),
    /// Tokens as they are.
    Tokens { input_ids: Vec<u32>, labels: Vec<i32>, weights: Vec<f32> },
}
