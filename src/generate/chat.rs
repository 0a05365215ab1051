//! Chat: a conversation rendered by the model's template, answered piece by piece.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::{Answer, GenerateError, Generator, Sampling};
use crate::backend::{self, EngineError, Session};
use crate::data::{ChatTemplate, DataError, Message};
use crate::model::adapter::Adapter;
use crate::model::tokenizer::{Tokenizer, TokenizerError};
use crate::model::{GenerationOptions, Model, ModelError, generation_workload};
use crate::program::{BufferId, PlanError, plan};

/// Sizes of the prefill programs, tokens.
const PREFILL_SIZES: [usize; 3] = [16, 64, 256];

/// Tokens of context when nothing else is asked for; less where the model takes less.
pub const DEFAULT_CONTEXT: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    #[error(transparent)]
    Generate(#[from] GenerateError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("the context of {asked} tokens is more than the model's {allowed}; ask for at most that")]
    Context { asked: usize, allowed: usize },
}

/// What answers: a model on a device, perhaps with an adapter, with its tokenizer and chat template.
pub struct Chat {
    session: Box<dyn Session>,
    generator: Generator,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    adapter: Option<AdapterScale>,
}

struct AdapterScale {
    buffer: BufferId,
    scale: f32,
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    pub text: String,
    pub answer: Answer,
    pub prompt_tokens: usize,
    /// Messages at the start, system prompt apart, that did not fit the context.
    pub left_out: usize,
    /// Until the first token was chosen.
    pub first_token: Duration,
    pub total: Duration,
}

impl Chat {
    /// Lays out the generation programs for the device and opens them. `context` is how many tokens prompt and
    /// answer may have together; none for [`DEFAULT_CONTEXT`] or what the model takes, whichever is less.
    ///
    /// # Errors
    /// When the model does not take that context, does not fit, or the device fails.
    pub fn open(
        model: &Model,
        adapter: Option<&Adapter>,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        choice: &backend::Choice,
        context: Option<usize>,
    ) -> Result<Self, ChatError> {
        let allowed = model.config.max_position_embeddings;
        let capacity = match context {
            Some(asked) if asked > allowed => return Err(ChatError::Context { asked, allowed }),
            Some(asked) => asked,
            None => DEFAULT_CONTEXT.min(allowed),
        };
        let sizes = PREFILL_SIZES.into_iter().filter(|&size| size <= capacity).collect();
        let options = GenerationOptions { capacity, prefill_sizes: sizes };
        let adapter_options = adapter.map(Adapter::options);
        let workload = generation_workload(&model.config, &options, adapter_options.as_ref(), None, &choice.target)?;
        let mut plan = plan::plan(workload, choice.target.clone())?;
        if let Some(facts) = &choice.facts {
            let bytes = facts.workspace(&plan)?;
            plan = plan.with_workspace(bytes)?;
        }
        let mut session = backend::open(plan, model.weights.clone(), &choice.device)?;
        let adapter = match adapter {
            Some(adapter) => Some(write_adapter(session.as_mut(), adapter)?),
            None => None,
        };
        let generator = Generator::new(&session.plan().workload, &model.eos_token_ids, capacity)?;
        Ok(Self { session, generator, tokenizer, template, adapter })
    }

    /// Answers as the base model (`false`) or with the adapter (`true`), from the same weights.
    ///
    /// # Errors
    /// When the device fails.
    pub fn use_adapter(&mut self, with: bool) -> Result<(), ChatError> {
        if let Some(adapter) = &self.adapter {
            let scale = if with { adapter.scale } else { 0.0 };
            self.session.write(adapter.buffer, bytemuck::bytes_of(&scale))?;
            self.generator.forget();
        }
        Ok(())
    }

    /// Tokens that prompt and answer may have together.
    pub fn capacity(&self) -> usize {
        self.generator.capacity()
    }

    /// Answers the last of `messages`. When the conversation has grown past the context, the oldest messages but
    /// the system prompt are left out, and counted. `on_text` gets the text as it comes and may break off.
    ///
    /// # Errors
    /// When the template refuses the messages, the last one alone is too long, or the device fails.
    pub fn reply(
        &mut self,
        messages: &[Message],
        sampling: &Sampling,
        max_tokens: usize,
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Reply, ChatError> {
        let start = Instant::now();
        let (prompt, left_out) = self.prompt(messages, max_tokens)?;
        let mut stream = self.tokenizer.stream(true);
        let mut text = String::new();
        let mut first_token = None;
        let mut failed = None;
        let answer = self.generator.generate(self.session.as_mut(), &prompt, sampling, max_tokens, |token| {
            first_token.get_or_insert_with(|| start.elapsed());
            let piece = match stream.push(token) {
                Ok(piece) => piece,
                Err(error) => {
                    failed = Some(error);
                    return ControlFlow::Break(());
                }
            };
            text.push_str(&piece);
            if piece.is_empty() { ControlFlow::Continue(()) } else { on_text(&piece) }
        })?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        let rest = stream.finish()?;
        if !rest.is_empty() {
            text.push_str(&rest);
            let _ = on_text(&rest);
        }
        let total = start.elapsed();
        Ok(Reply {
            text,
            answer,
            prompt_tokens: prompt.len(),
            left_out,
            first_token: first_token.unwrap_or(total),
            total,
        })
    }

    /// Token ids of the conversation, cut to leave room for an answer, and how many messages were left out.
    fn prompt(&self, messages: &[Message], max_tokens: usize) -> Result<(Vec<u32>, usize), ChatError> {
        let capacity = self.capacity();
        let room = capacity - max_tokens.min(capacity / 4);
        let system = messages.iter().take_while(|message| message.role() == "system").count();
        let mut left_out = 0;
        loop {
            let mut kept = messages[..system].to_vec();
            kept.extend_from_slice(&messages[system + left_out..]);
            let text = self.template.render(&kept, None, true)?;
            let ids = self.tokenizer.encode(&text, false)?;
            let next = next_user(messages, system + left_out);
            match next {
                Some(next) if ids.len() > room => left_out = next - system,
                _ => return Ok((ids, left_out)),
            }
        }
    }
}

/// The first message of the user after the one at `from`: where a conversation can be cut.
fn next_user(messages: &[Message], from: usize) -> Option<usize> {
    (from + 1..messages.len()).find(|&index| messages[index].role() == "user")
}

fn write_adapter(session: &mut dyn Session, adapter: &Adapter) -> Result<AdapterScale, EngineError> {
    let find = |session: &dyn Session, name: &str| {
        session.plan().workload.find(name).ok_or_else(|| EngineError::Weight {
            name: name.to_string(),
            what: "the workload has no such adapter matrix".into(),
        })
    };
    for (name, tensor) in &adapter.tensors {
        let buffer = find(session, name)?;
        session.write(buffer, bytemuck::cast_slice(&tensor.values))?;
    }
    let scale = AdapterScale { buffer: find(session, "lora_scale")?, scale: adapter.scale() };
    session.write(scale.buffer, bytemuck::bytes_of(&scale.scale))?;
    if let Some(refresh) = session.plan().workload.program("refresh") {
        session.run(refresh)?;
    }
    Ok(scale)
}
