//! `tune converse`: the other end of the workbench's chat. Reads a JSON line a question and writes JSON lines: pieces
//! of the base model's answer, then of the tuned one's. Not shown in the help: people use `tune chat`.

use std::io::{BufRead, Write};
use std::ops::ControlFlow;

use clap::Args;

use super::report::Failure;
use crate::backend;
use crate::data::{ChatTemplate, Message};
use crate::generate::Sampling;
use crate::generate::chat::Chat;
use crate::model::Model;
use crate::model::adapter::Adapter;
use crate::run::worker::exit;
use crate::run::{Home, RunFolder};
use crate::spec::RunSpec;
use crate::train;
use crate::tui::work::chat::{Line, Question};

/// Answer questions from standard input as the base model and as the tuned one
#[derive(Args, Debug)]
pub struct Arguments {
    run: String,
}

/// Longest answer, tokens.
const LONGEST: usize = 400;

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let mut speakers = match Speakers::open(&arguments.run) {
        Ok(speakers) => speakers,
        Err(error) => {
            say(&Line::Failed(format!("{error:#}")))?;
            return Ok(exit::FAILED);
        }
    };
    let mut conversations: [Vec<Message>; 2] = Default::default();
    for line in std::io::stdin().lock().lines() {
        let question: Question = serde_json::from_str(&line?)?;
        for (side, messages) in conversations.iter_mut().enumerate() {
            if messages.is_empty() {
                messages.extend(speakers.system.iter().map(|text| Message::new("system", text)));
            }
            messages.push(Message::new("user", &question.prompt));
            let tuned = side == 1;
            match speakers.answer(tuned, messages) {
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
    Ok(exit::DONE)
}

fn say(line: &Line) -> std::io::Result<()> {
    let mut output = std::io::stdout().lock();
    serde_json::to_writer(&mut output, line)?;
    output.write_all(b"\n")?;
    output.flush()
}

/// Base and tuned model. With an adapter both are one session: its scale is set to 0 for the base.
struct Speakers {
    tuned: Chat,
    /// Only after full fine-tuning.
    base: Option<Chat>,
    sampling: Sampling,
    system: Option<String>,
}

impl Speakers {
    fn open(run: &str) -> anyhow::Result<Self> {
        let folder = Home::find()?.run(run)?;
        let spec = RunSpec::read(&folder.spec_path(), &[])?;
        let (model, tokenizer) = train::open_model(&spec)?;
        let choice = backend::choose(&spec.engine.device, &spec.engine.precision)?;
        let template = || ChatTemplate::choose(&spec.data.template, &tokenizer);
        let open = |model: &Model, adapter: Option<&Adapter>| -> anyhow::Result<Chat> {
            Ok(Chat::open(model, adapter, tokenizer.clone(), template()?, &choice, None)?)
        };
        let own =
            model.folder.as_ref().and_then(|path| std::fs::read_to_string(path.join("generation_config.json")).ok());
        let own = own.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
        let sampling = own.map(|config| Sampling::of_generation_config(&config)).unwrap_or_default();
        let system = Some(spec.data.system.clone()).filter(|text| !text.is_empty());
        if folder.model().is_dir() {
            let tuned = Model::open(&folder.model(), spec.train.seed)?;
            return Ok(Self { tuned: open(&tuned, None)?, base: Some(open(&model, None)?), sampling, system });
        }
        let adapter = Adapter::read(&adapter_folder(&folder)?, &model.config)?;
        Ok(Self { tuned: open(&model, Some(&adapter))?, base: None, sampling, system })
    }

    fn answer(&mut self, tuned: bool, messages: &[Message]) -> anyhow::Result<String> {
        let chat = match (&mut self.base, tuned) {
            (Some(base), false) => base,
            (None, _) => {
                self.tuned.use_adapter(tuned)?;
                &mut self.tuned
            }
            _ => &mut self.tuned,
        };
        let reply = chat.reply(messages, &self.sampling, LONGEST, |piece| {
            let line = if tuned { Line::Tuned(piece.to_owned()) } else { Line::Base(piece.to_owned()) };
            if say(&line).is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        Ok(reply.text)
    }
}

/// The result's adapter; before there is one, the newest checkpoint's.
fn adapter_folder(folder: &RunFolder) -> Result<std::path::PathBuf, Failure> {
    let newest = folder.checkpoint_steps().into_iter().rev();
    let kept = newest.map(|step| folder.checkpoints().join(format!("step-{step}")).join("adapter"));
    std::iter::once(folder.adapter()).chain(kept).find(|path| path.is_dir()).ok_or_else(|| {
        Failure::request(format!("run {} has no result and no checkpoint yet", folder.id()), "save writes one")
    })
}
