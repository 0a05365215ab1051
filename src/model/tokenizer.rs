//! The tokenizer of a model: `tokenizer.json`, its special tokens and its chat templates.
//!
//! Text rendered by a chat template carries its own special tokens and is encoded without adding any; plain text
//! is encoded with those that the tokenizer's post-processor adds, both as Transformers does.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

/// What can go wrong when a tokenizer is opened or used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("{folder} has no tokenizer.json", folder = folder.display())]
    Missing { folder: PathBuf },
    #[error("{file} could not be read: {what}")]
    Broken { file: String, what: String },
    #[error("the tokenizer failed on a text of {bytes} bytes: {what}")]
    Encode { bytes: usize, what: String },
    #[error("the tokenizer could not decode {tokens} tokens: {what}")]
    Decode { tokens: usize, what: String },
}

impl TokenizerError {
    /// The next step; empty where there is none to name.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Missing { .. } => {
                "save the model's fast tokenizer there \
                 (Transformers: AutoTokenizer.from_pretrained(ID).save_pretrained(FOLDER))"
            }
            Self::Broken { .. } => "fetch the model's tokenizer files again",
            _ => "",
        }
    }
}

/// Token ids with the bytes of the text that each stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    pub ids: Vec<u32>,
    /// Byte range in the text; empty for tokens that stand for none of it.
    pub offsets: Vec<(usize, usize)>,
}

/// A model's tokenizer. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// `bos_token`, `eos_token`, `pad_token`, `unk_token` ... as texts.
    special_tokens: BTreeMap<String, String>,
    special_ids: Arc<HashSet<u32>>,
    special_texts: Arc<Vec<String>>,
    /// Chat templates by name; the usual one is `default`.
    chat_templates: BTreeMap<String, String>,
    model_max_length: Option<usize>,
}

impl Tokenizer {
    /// Opens the tokenizer of a model folder.
    ///
    /// # Errors
    /// When `tokenizer.json` is missing, or one of the tokenizer's files is broken.
    pub fn open(folder: &Path) -> Result<Self, TokenizerError> {
        let read = |name: &str| std::fs::read(folder.join(name)).ok();
        let mut named = Vec::new();
        if let Ok(entries) = std::fs::read_dir(folder.join("additional_chat_templates")) {
            for path in entries.flatten().map(|entry| entry.path()) {
                let stem = path.file_stem().and_then(|stem| stem.to_str()).map(str::to_owned);
                if let (true, Some(stem), Ok(text)) =
                    (path.extension().is_some_and(|e| e == "jinja"), stem, std::fs::read_to_string(&path))
                {
                    named.push((stem, text));
                }
            }
        }
        Self::assemble(&folder.display().to_string(), &read, named)
    }

    /// Opens a tokenizer from files held in memory, `(name, bytes)` as they would lie in a model folder.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn from_files(files: &[(&str, &[u8])]) -> Result<Self, TokenizerError> {
        let read = |name: &str| files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| bytes.to_vec());
        Self::assemble("the embedded model", &read, Vec::new())
    }

    fn assemble(
        place: &str,
        read: &dyn Fn(&str) -> Option<Vec<u8>>,
        named_templates: Vec<(String, String)>,
    ) -> Result<Self, TokenizerError> {
        let broken = |file: &str, what: String| TokenizerError::Broken { file: format!("{place}/{file}"), what };
        let json = |file: &str| -> Result<Value, TokenizerError> {
            match read(file) {
                Some(bytes) => serde_json::from_slice(&bytes).map_err(|error| broken(file, error.to_string())),
                None => Ok(Value::Null),
            }
        };
        let Some(bytes) = read("tokenizer.json") else {
            return Err(TokenizerError::Missing { folder: place.into() });
        };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| broken("tokenizer.json", error.to_string()))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| broken("tokenizer.json", error.to_string()))?;

        let config = json("tokenizer_config.json")?;
        let map = json("special_tokens_map.json")?;
        add_listed_tokens(&mut inner, &config).map_err(|what| broken("tokenizer_config.json", what))?;

        let mut special_tokens = BTreeMap::new();
        for name in ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"] {
            let text = match config.get(name) {
                Some(Value::Null) => None,
                Some(value) => token_text(value),
                None => map.get(name).and_then(token_text),
            };
            if let Some(text) = text {
                special_tokens.insert(name.to_owned(), text);
            }
        }
        // A folder without tokenizer_config.json still says in config.json which token begins and ends a text.
        for (name, key) in [("bos_token", "bos_token_id"), ("eos_token", "eos_token_id")] {
            if special_tokens.contains_key(name) || config.get(name).is_some() {
                continue;
            }
            for file in ["generation_config.json", "config.json"] {
                let id = match json(file)?.get(key) {
                    Some(Value::Array(ids)) => ids.first().and_then(Value::as_u64),
                    Some(id) => id.as_u64(),
                    None => None,
                };
                if let Some(text) = id.and_then(|id| inner.id_to_token(id as u32)) {
                    special_tokens.insert(name.to_owned(), text);
                    break;
                }
            }
        }

        let mut chat_templates = BTreeMap::new();
        match config.get("chat_template") {
            Some(Value::String(text)) => {
                chat_templates.insert("default".to_owned(), text.clone());
            }
            Some(Value::Array(list)) => {
                for entry in list {
                    if let (Some(name), Some(text)) = (entry["name"].as_str(), entry["template"].as_str()) {
                        chat_templates.insert(name.to_owned(), text.to_owned());
                    }
                }
            }
            _ => {
                if let Some(text) = json("chat_template.json")?["chat_template"].as_str() {
                    chat_templates.insert("default".to_owned(), text.to_owned());
                }
            }
        }
        // Template files stand above tokenizer_config.json, and all together replace what it says.
        if let Some(bytes) = read("chat_template.jinja") {
            let text = String::from_utf8(bytes).map_err(|error| broken("chat_template.jinja", error.to_string()))?;
            chat_templates = BTreeMap::from([("default".to_owned(), text)]);
            chat_templates.extend(named_templates);
        } else if !named_templates.is_empty() {
            chat_templates = named_templates.into_iter().collect();
        }

        let mut special_ids: HashSet<u32> =
            inner.get_added_tokens_decoder().iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        special_ids.extend(special_tokens.values().filter_map(|text| inner.token_to_id(text)));
        // Files without a limit say 1e30.
        let model_max_length =
            config.get("model_max_length").and_then(Value::as_f64).filter(|n| *n < 1e9).map(|n| n as usize);
        Ok(Self {
            special_tokens,
            special_texts: Arc::new(special_ids.iter().filter_map(|id| inner.id_to_token(*id)).collect()),
            special_ids: Arc::new(special_ids),
            inner: Arc::new(inner),
            chat_templates,
            model_max_length,
        })
    }

    /// Token ids of a text. `add_special_tokens` for plain text, not for text from a chat template.
    ///
    /// # Errors
    /// When the tokenizer's model has no token for a part of the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        self.inner
            .encode_fast(text, add_special_tokens)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| TokenizerError::Encode { bytes: text.len(), what: error.to_string() })
    }

    /// Token ids of a text with the bytes each one covers.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(&self, text: &str, add_special_tokens: bool) -> Result<Encoded, TokenizerError> {
        self.inner
            .encode(text, add_special_tokens)
            .map(|encoding| Encoded { ids: encoding.get_ids().to_vec(), offsets: encoding.get_offsets().to_vec() })
            .map_err(|error| TokenizerError::Encode { bytes: text.len(), what: error.to_string() })
    }

    /// The text of token ids.
    ///
    /// # Errors
    /// When the decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|error| TokenizerError::Decode { tokens: ids.len(), what: error.to_string() })
    }

    /// Decodes a stream of tokens piece by piece, never half a character.
    pub fn stream(&self, skip_special_tokens: bool) -> TextStream {
        TextStream { tokenizer: self.clone(), skip_special_tokens, ids: Vec::new(), shown: 0, read: 0 }
    }

    /// The number of ids, added tokens included: one past the highest.
    pub fn vocabulary_size(&self) -> usize {
        let added = self.inner.get_added_tokens_decoder().keys().max().map_or(0, |id| *id as usize + 1);
        self.inner.get_vocab_size(true).max(added)
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token as it stands in the vocabulary (byte-level tokens look odd there).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether the id is a control token: begin, end, role markers.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// The texts of all control tokens.
    pub fn special_texts(&self) -> impl Iterator<Item = &str> {
        self.special_texts.iter().map(String::as_str)
    }

    /// `bos_token`, `eos_token` ... as texts, by name: what chat templates see as variables.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }

    pub fn bos_token(&self) -> Option<&str> {
        self.special_tokens.get("bos_token").map(String::as_str)
    }

    pub fn eos_token(&self) -> Option<&str> {
        self.special_tokens.get("eos_token").map(String::as_str)
    }

    pub fn bos_id(&self) -> Option<u32> {
        self.bos_token().and_then(|text| self.token_to_id(text))
    }

    pub fn eos_id(&self) -> Option<u32> {
        self.eos_token().and_then(|text| self.token_to_id(text))
    }

    /// Whether plain text is encoded with a begin-of-text token before it.
    pub fn adds_bos(&self) -> bool {
        let bos = self.bos_id();
        bos.is_some() && self.encode("", true).is_ok_and(|ids| ids.first().copied() == bos)
    }

    pub fn pad_id(&self) -> Option<u32> {
        self.special_tokens.get("pad_token").and_then(|text| self.token_to_id(text))
    }

    /// Chat templates by name; the usual one is `default`.
    pub fn chat_templates(&self) -> &BTreeMap<String, String> {
        &self.chat_templates
    }

    /// `model_max_length` of tokenizer_config.json, where it is a real limit.
    pub fn model_max_length(&self) -> Option<usize> {
        self.model_max_length
    }
}

/// Tokens that tokenizer_config.json lists and tokenizer.json lacks are added, as Transformers does.
fn add_listed_tokens(inner: &mut tokenizers::Tokenizer, config: &Value) -> Result<(), String> {
    let Some(listed) = config.get("added_tokens_decoder").and_then(Value::as_object) else { return Ok(()) };
    let mut missing: Vec<(u32, tokenizers::AddedToken)> = Vec::new();
    for (id, token) in listed {
        let (Ok(id), Some(content)) = (id.parse::<u32>(), token["content"].as_str()) else { continue };
        if inner.token_to_id(content).is_none() {
            let flag = |name: &str| token[name].as_bool().unwrap_or(false);
            missing.push((
                id,
                tokenizers::AddedToken::from(content, flag("special"))
                    .single_word(flag("single_word"))
                    .lstrip(flag("lstrip"))
                    .rstrip(flag("rstrip"))
                    .normalized(flag("normalized")),
            ));
        }
    }
    missing.sort_by_key(|(id, _)| *id);
    for (id, token) in missing {
        let content = token.content.clone();
        inner.add_tokens([token]).map_err(|error| error.to_string())?;
        if inner.token_to_id(&content) != Some(id) {
            return Err(format!(
                "added token {content:?} should have id {id}, which tokenizer.json does not leave free"
            ));
        }
    }
    Ok(())
}

/// A special token is written as its text or as an object with `content`.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content").and_then(Value::as_str)).map(str::to_owned)
}

/// Turns tokens into text as they come. See [`Tokenizer::stream`].
#[derive(Clone, Debug)]
pub struct TextStream {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    ids: Vec<u32>,
    /// Tokens before this one only give context to the decoder.
    shown: usize,
    /// Tokens before this one have been returned as text.
    read: usize,
}

impl TextStream {
    /// The text that this token completes; empty while a character is still incomplete.
    ///
    /// # Errors
    /// When the decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.ids.push(id);
        let text = self.pending()?;
        if text.is_empty() || text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.shown = self.read;
        self.read = self.ids.len();
        Ok(text)
    }

    /// What is left at the end, complete or not.
    ///
    /// # Errors
    /// When the decoder fails.
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        let text = self.pending()?;
        self.ids.clear();
        (self.shown, self.read) = (0, 0);
        Ok(text)
    }

    fn pending(&self) -> Result<String, TokenizerError> {
        let before = self.tokenizer.decode(&self.ids[self.shown..self.read], self.skip_special_tokens)?;
        let after = self.tokenizer.decode(&self.ids[self.shown..], self.skip_special_tokens)?;
        Ok(after.strip_prefix(before.as_str()).unwrap_or_default().to_owned())
    }
}
