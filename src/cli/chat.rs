//! `tune chat`: a conversation in the terminal, line by line, or from piped lines.

use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::Context;
use clap::Args;

use super::report::Failure;
use crate::backend;
use crate::data::{ChatTemplate, Message};
use crate::generate::chat::{Chat, ChatError, Reply};
use crate::generate::{Finish, GenerateError, Sampling};
use crate::hub;
use crate::model::Model;
use crate::model::adapter::Adapter;
use crate::model::tokenizer::Tokenizer;
use crate::run::worker::exit;
use crate::run::{Home, RunError, RunFolder};
use crate::spec::RunSpec;
use crate::train;

/// Talk to a model or to the result of a run.
#[derive(Args, Debug)]
pub struct Arguments {
    /// A run (id, prefix of it, or @last) or a model (folder, hub id in the cache, or "demo")
    pub target: String,
    /// System prompt
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// 0: always the most likely token
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Only the K most likely tokens; 0: all
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Only the most likely tokens that together reach this probability
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Only tokens at least this many times as likely as the most likely one
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Above 1: tokens that were there before become less likely
    #[arg(long, value_name = "X")]
    pub repetition_penalty: Option<f32>,
    #[arg(long, default_value_t = 3407)]
    pub seed: u64,
    /// Longest answer, tokens
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub max_tokens: usize,
    /// Tokens that the conversation may have together
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// The base model of a run, without its adapter
    #[arg(long)]
    pub base: bool,
    /// auto, cpu, wgpu, wgpu:N, cuda, cuda:N
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// auto, f32, f16, bf16
    #[arg(long, default_value = "auto")]
    pub precision: String,
    /// Figures after each answer: tokens, tokens per second, what was reused
    #[arg(long)]
    pub verbose: bool,
}

const HELP: &str = "\
/reset        forget the conversation
/system TEXT  set the system prompt and forget the conversation
/help         this list
/quit         leave (Ctrl-D does too)
Ctrl-C stops an answer";

/// What Ctrl-C does now.
const WAITING: u8 = 0;
const ANSWERING: u8 = 1;
const INTERRUPTED: u8 = 2;

/// What a line of input asks for.
#[derive(Debug, PartialEq)]
enum Line<'a> {
    Empty,
    Say(&'a str),
    Reset,
    System(&'a str),
    Help,
    Quit,
    Unknown(&'a str),
}

fn parse(line: &str) -> Line<'_> {
    let line = line.trim();
    let Some(command) = line.strip_prefix('/') else {
        return if line.is_empty() { Line::Empty } else { Line::Say(line) };
    };
    let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    match name {
        "reset" => Line::Reset,
        "system" => Line::System(rest.trim()),
        "help" | "?" => Line::Help,
        "quit" | "exit" | "q" => Line::Quit,
        _ => Line::Unknown(line),
    }
}

/// The conversation as it stands.
struct Conversation {
    system: Option<String>,
    messages: Vec<Message>,
}

impl Conversation {
    fn new(system: Option<String>) -> Self {
        let mut conversation = Self { system: system.filter(|text| !text.is_empty()), messages: Vec::new() };
        conversation.reset();
        conversation
    }

    fn reset(&mut self) {
        self.messages = self.system.iter().map(|text| Message::new("system", text)).collect();
    }
}

pub fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let target = Target::find(&arguments.target, arguments.base)?;
    let sampling = sampling(&target.model, &arguments);
    sampling.check().map_err(|error| Failure::request(error.to_string(), "`tune chat --help` lists the settings"))?;
    let choice = backend::choose(&arguments.device, &arguments.precision).map_err(|error| {
        Failure::request(error.to_string(), "`tune doctor` says which engines there are and what is missing")
    })?;
    let template = ChatTemplate::choose(&target.template, &target.tokenizer)?;
    let device = format!("{} ({})", choice.target.name, choice.reason);
    let mut chat =
        Chat::open(&target.model, target.adapter.as_ref(), target.tokenizer, template, &choice, arguments.context)
            .map_err(refused)?;
    let system = arguments.system.clone().or(target.system);
    let mut conversation = Conversation::new(system);
    let interactive = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    if interactive {
        eprintln!("{}\non {device}; {} tokens of context; /help", target.name, chat.capacity());
    }
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout());
    converse(&mut chat, &mut conversation, &sampling, &arguments, &mut input, &mut output, interactive)?;
    Ok(exit::DONE)
}

/// What is talked to.
struct Target {
    name: String,
    model: Model,
    tokenizer: Tokenizer,
    adapter: Option<Adapter>,
    /// As in `data.template`.
    template: String,
    system: Option<String>,
}

impl Target {
    /// A folder or "demo" is a model; then runs are looked through, then the cache of hub models.
    ///
    /// # Errors
    /// When nothing has that name, or what has it cannot be read.
    fn find(name: &str, base: bool) -> anyhow::Result<Self> {
        let path = std::path::Path::new(name);
        if path.join("run.toml").is_file() {
            return Self::of_run(&RunFolder::at(path.canonicalize()?), base);
        }
        if name == "demo" || path.is_dir() {
            return Self::of_model(name);
        }
        match Home::find()?.run(name) {
            Ok(folder) => Self::of_run(&folder, base),
            Err(RunError::NoSuchRun { .. } | RunError::NoRuns { .. }) if hub::is_id(name) => Self::of_model(name),
            Err(RunError::NoSuchRun { .. } | RunError::NoRuns { .. }) if name != "@last" => Err(Failure::request(
                format!("there is no run and no model folder {name}"),
                "`tune runs` lists the runs; a model is a folder, a hub id such as owner/name, or \"demo\"",
            )
            .into()),
            Err(error) => Err(error.into()),
        }
    }

    fn of_model(id: &str) -> anyhow::Result<Self> {
        let mut spec = RunSpec::default();
        spec.model.id = id.into();
        super::fetch::missing(&spec)?;
        let (model, tokenizer) = train::open_model(&spec)?;
        Ok(Self { name: id.into(), model, tokenizer, adapter: None, template: "auto".into(), system: None })
    }

    /// The result of a run; before there is one, what its newest checkpoint holds.
    fn of_run(folder: &RunFolder, base: bool) -> anyhow::Result<Self> {
        let spec = RunSpec::read(&folder.spec_path(), &[])?;
        let id = folder.id();
        let (mut model, tokenizer) = train::open_model(&spec)?;
        let mut adapter = None;
        let name = if base {
            format!("{}, the base model of run {id}", spec.model.id)
        } else if folder.adapter().is_dir() {
            adapter = Some(Adapter::read(&folder.adapter(), &model.config)?);
            format!("{} as tuned by run {id}", spec.model.id)
        } else if folder.model().is_dir() {
            model = Model::open(&folder.model(), spec.train.seed)?;
            format!("the model that run {id} trained")
        } else {
            let newest = folder.checkpoint_steps().into_iter().rev();
            let with_adapter = newest
                .map(|step| (step, folder.checkpoints().join(format!("step-{step}")).join("adapter")))
                .find(|(_, path)| path.is_dir());
            let Some((step, path)) = with_adapter else {
                return Err(Failure::request(
                    format!("run {id} has no result yet, and no checkpoint with an adapter"),
                    format!("`tune wait {id}` waits for the end; --base talks to its base model"),
                )
                .into());
            };
            adapter = Some(Adapter::read(&path, &model.config)?);
            format!("{} as tuned by run {id} up to step {step}", spec.model.id)
        };
        let system = Some(spec.data.system).filter(|text| !text.is_empty());
        Ok(Self { name, model, tokenizer, adapter, template: spec.data.template, system })
    }
}

/// The model's own settings, with the flags over them.
fn sampling(model: &Model, arguments: &Arguments) -> Sampling {
    let own = model
        .folder
        .as_ref()
        .and_then(|folder| std::fs::read_to_string(folder.join("generation_config.json")).ok())
        .and_then(|text| serde_json::from_str(&text).ok())
        .map(|config: serde_json::Value| Sampling::of_generation_config(&config))
        .unwrap_or_default();
    Sampling {
        temperature: arguments.temperature.unwrap_or(own.temperature),
        top_k: arguments.top_k.unwrap_or(own.top_k),
        top_p: arguments.top_p.unwrap_or(own.top_p),
        min_p: arguments.min_p.unwrap_or(own.min_p),
        repetition_penalty: arguments.repetition_penalty.unwrap_or(own.repetition_penalty),
        seed: arguments.seed,
    }
}

/// Errors that a different request would not have.
fn refused(error: ChatError) -> anyhow::Error {
    match error {
        ChatError::Context { .. } => Failure::request(error.to_string(), "--context sets it").into(),
        ChatError::Plan(_) => Failure::request(error.to_string(), "a smaller --context needs less memory").into(),
        ChatError::Generate(GenerateError::PromptTooLong { .. }) => {
            Failure::request(error.to_string(), "--context sets how much the conversation may hold").into()
        }
        other => other.into(),
    }
}

/// Reads lines and answers each, until the input ends.
fn converse(
    chat: &mut Chat,
    conversation: &mut Conversation,
    sampling: &Sampling,
    arguments: &Arguments,
    input: &mut dyn BufRead,
    output: &mut dyn Write,
    interactive: bool,
) -> anyhow::Result<()> {
    let state = interruptions()?;
    let mut line = String::new();
    loop {
        if interactive {
            write!(output, "> ")?;
            output.flush()?;
        }
        line.clear();
        if input.read_line(&mut line).context("standard input cannot be read")? == 0 {
            if interactive {
                writeln!(output)?;
            }
            return Ok(());
        }
        match parse(&line) {
            Line::Empty => {}
            Line::Quit => return Ok(()),
            Line::Help => writeln!(output, "{HELP}")?,
            Line::Unknown(command) => eprintln!("no command {command}; /help lists them"),
            Line::Reset => {
                conversation.reset();
                eprintln!("the conversation is forgotten");
            }
            Line::System(text) => {
                *conversation = Conversation::new(Some(text.to_owned()));
                eprintln!("system prompt {}", if text.is_empty() { "removed" } else { "set" });
            }
            Line::Say(text) => {
                conversation.messages.push(Message::new("user", text));
                state.store(ANSWERING, Ordering::SeqCst);
                let mut broken = None;
                let reply = chat.reply(&conversation.messages, sampling, arguments.max_tokens, |piece| {
                    if let Err(error) = output.write_all(piece.as_bytes()).and_then(|()| output.flush()) {
                        broken = Some(error);
                        return ControlFlow::Break(());
                    }
                    match state.load(Ordering::SeqCst) {
                        INTERRUPTED => ControlFlow::Break(()),
                        _ => ControlFlow::Continue(()),
                    }
                });
                state.store(WAITING, Ordering::SeqCst);
                if let Some(error) = broken {
                    return Err(error).context("standard output cannot be written");
                }
                let reply = match reply {
                    Ok(reply) => reply,
                    Err(error) if interactive => {
                        conversation.messages.pop();
                        eprintln!("{error}");
                        continue;
                    }
                    Err(error) => return Err(refused(error)),
                };
                writeln!(output)?;
                note(&reply, arguments);
                conversation.messages.push(Message::new("assistant", &reply.text));
            }
        }
    }
}

/// What the user should know about an answer besides its text.
fn note(reply: &Reply, arguments: &Arguments) {
    match reply.answer.finish {
        Finish::Stop(_) => {}
        Finish::Length => eprintln!("(cut at {} tokens; --max-tokens allows more)", arguments.max_tokens),
        Finish::ContextFull => eprintln!("(the context is full; /reset, or --context with more)"),
        Finish::Interrupted => eprintln!("(stopped)"),
    }
    if reply.left_out > 0 {
        eprintln!("(the oldest {} messages no longer fit the context and were left out)", reply.left_out);
    }
    if arguments.verbose {
        let decoding = (reply.total - reply.first_token).as_secs_f64();
        let later = reply.answer.tokens.len().saturating_sub(1);
        eprintln!(
            "({} prompt tokens, {} of them reused; first token after {:.0} ms; {} tokens, {:.1} a second)",
            reply.prompt_tokens,
            reply.answer.reused,
            reply.first_token.as_secs_f64() * 1e3,
            reply.answer.tokens.len(),
            later as f64 / decoding.max(1e-9),
        );
    }
}

/// Listens for Ctrl-C: it breaks off an answer, or ends the program while none is being given.
fn interruptions() -> anyhow::Result<Arc<AtomicU8>> {
    let state = Arc::new(AtomicU8::new(WAITING));
    let shared = state.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("interrupt".into()).spawn(move || {
        runtime.block_on(async {
            while tokio::signal::ctrl_c().await.is_ok() {
                if shared.compare_exchange(ANSWERING, INTERRUPTED, Ordering::SeqCst, Ordering::SeqCst).is_err() {
                    println!();
                    // Not the ordinary exit: it runs drivers' destructors beside an engine at work.
                    signal_hook::low_level::exit(0);
                }
            }
        });
    })?;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_only_after_a_slash() {
        assert_eq!(parse("  hello /quit \n"), Line::Say("hello /quit"));
        assert_eq!(parse("/quit\n"), Line::Quit);
        assert_eq!(parse("/system  be brief \n"), Line::System("be brief"));
        assert_eq!(parse("/system"), Line::System(""));
        assert_eq!(parse("/tmp is full"), Line::Unknown("/tmp is full"));
        assert_eq!(parse("\n"), Line::Empty);
    }

    #[test]
    fn a_reset_keeps_the_system_prompt() {
        let mut conversation = Conversation::new(Some("be brief".into()));
        conversation.messages.push(Message::new("user", "hello"));
        conversation.reset();
        assert_eq!(conversation.messages, [Message::new("system", "be brief")]);
        assert!(Conversation::new(Some(String::new())).messages.is_empty());
    }
}
