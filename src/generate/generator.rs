//! The generation loop over an open session.

use std::ops::ControlFlow;

use super::feed::{chunks, reusable};
use super::sampling::{Sampling, SamplingError};
use crate::backend::{EngineError, Session, read_values};
use crate::program::{BufferId, Role, Workload};

#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    #[error("the prompt is empty: there is nothing to continue")]
    EmptyPrompt,
    #[error("the prompt takes {tokens} tokens, the context holds {capacity}; shorten it or give a larger context")]
    PromptTooLong { tokens: usize, capacity: usize },
    #[error("token {token} of the prompt is not in the model's vocabulary of {vocabulary}; is this its tokenizer?")]
    UnknownToken { token: u32, vocabulary: usize },
    #[error("the model gives logits that are not finite after {tokens} tokens; its weights or its adapter are broken")]
    NotFinite { tokens: usize },
    #[error("the workload cannot generate: {0}")]
    Workload(String),
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model gave one of its stop tokens.
    Stop(u32),
    /// The answer has as many tokens as were allowed.
    Length,
    /// The key-value cache is full.
    ContextFull,
    /// The caller broke it off.
    Interrupted,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The stop token is not among them.
    pub tokens: Vec<u32>,
    pub finish: Finish,
    /// Tokens of the prompt that the cache held already.
    pub reused: usize,
}

/// A program that takes tokens, and its inputs.
struct Feed {
    size: usize,
    program: usize,
    ids: BufferId,
    positions: BufferId,
    rows: BufferId,
    start: BufferId,
}

/// Generates on a session whose workload has prefill and decode programs, and knows what the session's key-value
/// cache holds: kept between the turns of a chat, it runs only the tokens that are new. Always give it the session
/// it was made for.
pub struct Generator {
    /// Ascending by size; the first takes one token.
    feeds: Vec<Feed>,
    logits: BufferId,
    vocabulary: usize,
    capacity: usize,
    stop: Vec<u32>,
    /// Tokens whose keys and values are in the cache, from its first row on.
    cached: Vec<u32>,
}

impl Generator {
    /// `stop` are the tokens that end an answer; `capacity` the rows of the workload's key-value cache.
    ///
    /// # Errors
    /// When the workload has no `decode` program, or lacks one of its inputs.
    pub fn new(workload: &Workload, stop: &[u32], capacity: usize) -> Result<Self, GenerateError> {
        let find =
            |name: String| workload.find(&name).ok_or_else(|| GenerateError::Workload(format!("no buffer {name}")));
        let mut feeds = Vec::new();
        for (program, entry) in workload.programs.iter().enumerate() {
            if !matches!(entry.role, Role::Prefill | Role::Decode) {
                continue;
            }
            let size = entry.tokens;
            feeds.push(Feed {
                size,
                program,
                ids: find(format!("inputs.{size}.ids"))?,
                positions: find(format!("inputs.{size}.positions"))?,
                rows: find(format!("inputs.{size}.rows"))?,
                start: find(format!("inputs.{size}.start"))?,
            });
        }
        feeds.sort_by_key(|feed| feed.size);
        if feeds.first().is_none_or(|feed| feed.size != 1) {
            return Err(GenerateError::Workload("no decode program".into()));
        }
        let logits = find("logits".into())?;
        let vocabulary = workload.buffer(logits).elements();
        Ok(Self { feeds, logits, vocabulary, capacity, stop: stop.to_vec(), cached: Vec::new() })
    }

    /// Tokens that prompt and answer may have together.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets the cache: needed after weights or adapter have changed.
    pub fn forget(&mut self) {
        self.cached.clear();
    }

    /// Logits `[V]` after the last of `tokens`. A prefix that the cache holds is not run again.
    ///
    /// # Errors
    /// When there are no tokens, they do not fit, or the device fails.
    pub fn logits(&mut self, session: &mut dyn Session, tokens: &[u32]) -> Result<Vec<f32>, GenerateError> {
        if tokens.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        if tokens.len() > self.capacity {
            return Err(GenerateError::PromptTooLong { tokens: tokens.len(), capacity: self.capacity });
        }
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= self.vocabulary) {
            return Err(GenerateError::UnknownToken { token, vocabulary: self.vocabulary });
        }
        self.cached.truncate(reusable(&self.cached, tokens));
        let sizes: Vec<usize> = self.feeds.iter().map(|feed| feed.size).collect();
        let start = self.cached.len();
        for chunk in chunks(start, tokens.len() - start, self.capacity, &sizes) {
            let at = self.cached.len();
            self.run(session, &tokens[at..at + chunk.tokens], chunk.size)?;
        }
        let logits: Vec<f32> = read_values(session, self.logits)?;
        match logits.iter().all(|logit| logit.is_finite()) {
            true => Ok(logits),
            false => Err(GenerateError::NotFinite { tokens: tokens.len() }),
        }
    }

    /// Runs `tokens`, padded to `size`, behind what is cached.
    fn run(&mut self, session: &mut dyn Session, tokens: &[u32], size: usize) -> Result<(), GenerateError> {
        let feed = self.feeds.iter().find(|feed| feed.size == size).expect("chunks have the programs' sizes");
        let start = self.cached.len();
        let mut ids = vec![0i32; size];
        for (id, &token) in ids.iter_mut().zip(tokens) {
            *id = token as i32;
        }
        let positions: Vec<i32> = (start..start + size).map(|position| position as i32).collect();
        session.write(feed.ids, bytemuck::cast_slice(&ids))?;
        session.write(feed.positions, bytemuck::cast_slice(&positions))?;
        session.write(feed.rows, bytemuck::cast_slice(&[tokens.len() as i32 - 1]))?;
        session.write(feed.start, bytemuck::cast_slice(&[start as i32]))?;
        session.run(feed.program)?;
        self.cached.extend_from_slice(tokens);
        Ok(())
    }

    /// Continues `prompt` by at most `max_tokens` tokens. `on_token` sees each token as it is chosen, without the
    /// stop token, and may break off.
    ///
    /// # Errors
    /// When a setting is out of range, the prompt is empty or too long, or the device fails.
    pub fn generate(
        &mut self,
        session: &mut dyn Session,
        prompt: &[u32],
        sampling: &Sampling,
        max_tokens: usize,
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Answer, GenerateError> {
        sampling.check()?;
        let reused = reusable(&self.cached, prompt);
        let mut tokens = prompt.to_vec();
        let mut drawn = 0;
        let finish = loop {
            if drawn == max_tokens {
                break Finish::Length;
            }
            if tokens.len() > self.capacity && drawn > 0 {
                break Finish::ContextFull;
            }
            let mut logits = self.logits(session, &tokens)?;
            let token = sampling.choose(&mut logits, &tokens, drawn as u32);
            if self.stop.contains(&token) {
                break Finish::Stop(token);
            }
            tokens.push(token);
            drawn += 1;
            if on_token(token).is_break() {
                break Finish::Interrupted;
            }
        };
        Ok(Answer { tokens: tokens.split_off(prompt.len()), finish, reused })
    }
}
