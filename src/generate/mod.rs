//! Generation: prefill and decode programs over a key-value cache, sampling, streaming text, chat.

pub mod chat;
pub mod feed;
mod generator;
pub mod sampling;

pub use generator::{Answer, Finish, GenerateError, Generator};
pub use sampling::Sampling;
