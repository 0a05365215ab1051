//! `tune converse`: the other end of the workbench's chat. Reads a JSON line a question, writes JSON lines: pieces of
//! the base model's answer and of the tuned one's. Not shown: people use `tune chat`.

use std::io::{BufRead, Write};
use std::ops::ControlFlow;

use clap::Args;

use super::chat::open_run;
use crate::data::Message;
use crate::generate::Sampling;
use crate::tui::work::chat::{Line, Question};

/// Answer questions from standard input as base and as tuned model
#[derive(Args, Debug)]
pub struct Arguments {
    run: String,
}

/// Longest answer, tokens.
const LONGEST: usize = 512;

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let mut output = std::io::stdout().lock();
    let mut say = move |line: &Line| -> std::io::Result<()> {
        serde_json::to_writer(&mut output, line)?;
        output.write_all(b"\n")?;
        output.flush()
    };
    let mut speakers = match open_run(&arguments.run) {
        Ok(speakers) => speakers,
        Err(error) => {
            say(&Line::Failed(format!("{error:#}")))?;
            return Ok(1);
        }
    };
    let sampling = Sampling::default();
    let mut conversations: [Vec<Message>; 2] = Default::default();
    for line in std::io::stdin().lock().lines() {
        let question: Question = serde_json::from_str(&line?)?;
        for (side, messages) in conversations.iter_mut().enumerate() {
            messages.push(Message::new("user", &question.prompt));
            let tuned = side == 1;
            let reply = speakers.answer(tuned, messages, &sampling, LONGEST, |piece| {
                let line = if tuned { Line::Tuned(piece.to_owned()) } else { Line::Base(piece.to_owned()) };
                match say(&line) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                }
            });
            match reply {
                Ok(text) => messages.push(Message::new("assistant", &text)),
                Err(error) => {
                    messages.pop();
                    say(&Line::Failed(format!("{error:#}")))?;
                    continue;
                }
            }
            say(if tuned { &Line::TunedEnd } else { &Line::BaseEnd })?;
        }
    }
    Ok(0)
}
