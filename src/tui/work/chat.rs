//! The chat's other end: a child process with the model, so that the interface holds none and cannot be taken down
//! by a device.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::Sender;

use serde::{Deserialize, Serialize};

use crate::tui::message::{Message, Side};

/// A line to the child.
#[derive(Debug, Serialize, Deserialize)]
pub struct Question {
    pub prompt: String,
}

/// A line from the child.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    Base(String),
    Tuned(String),
    /// The base model's answer is whole.
    BaseEnd,
    TunedEnd,
    Failed(String),
}

/// The child, once a question was asked.
#[derive(Default)]
pub struct ChatProcess {
    running: Option<Running>,
}

struct Running {
    run: String,
    child: Child,
    input: ChildStdin,
}

impl Drop for ChatProcess {
    fn drop(&mut self) {
        self.stop();
    }
}

impl ChatProcess {
    /// Asks both models; their answers come as messages.
    pub fn ask(&mut self, run: String, prompt: String, sender: Sender<Message>) {
        if let Err(error) = self.try_ask(run, prompt, &sender) {
            self.stop();
            let _ = sender.send(Message::ChatEnd { side: Side::Tuned, error: Some(format!("no chat: {error}")) });
        }
    }

    fn try_ask(&mut self, run: String, prompt: String, sender: &Sender<Message>) -> std::io::Result<()> {
        let alive = match &mut self.running {
            Some(running) => running.run == run && running.child.try_wait()?.is_none(),
            None => false,
        };
        if !alive {
            self.stop();
            self.running = Some(start(run, sender.clone())?);
        }
        if let Some(running) = &mut self.running {
            let mut line = serde_json::to_vec(&Question { prompt })?;
            line.push(b'\n');
            running.input.write_all(&line)?;
            running.input.flush()?;
        }
        Ok(())
    }

    /// Ends the child.
    pub fn stop(&mut self) {
        if let Some(mut running) = self.running.take() {
            let _ = running.child.kill();
            let _ = running.child.wait();
        }
    }
}

fn start(run: String, sender: Sender<Message>) -> std::io::Result<Running> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("converse").arg(&run).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let pipe_missing = || std::io::Error::other("the chat process has no pipe");
    let input = child.stdin.take().ok_or_else(pipe_missing)?;
    let output = child.stdout.take().ok_or_else(pipe_missing)?;
    let errors = child.stderr.take().ok_or_else(pipe_missing)?;
    std::thread::Builder::new().name("chat".into()).spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let message = match serde_json::from_str(&line) {
                Ok(Line::Base(text)) => Message::ChatPiece { side: Side::Base, text },
                Ok(Line::Tuned(text)) => Message::ChatPiece { side: Side::Tuned, text },
                Ok(Line::BaseEnd) => Message::ChatEnd { side: Side::Base, error: None },
                Ok(Line::TunedEnd) => Message::ChatEnd { side: Side::Tuned, error: None },
                Ok(Line::Failed(error)) => Message::ChatEnd { side: Side::Tuned, error: Some(error) },
                Err(_) => continue,
            };
            if sender.send(message).is_err() {
                return;
            }
        }
        // Its last words, when it did not end because it was told to.
        let last = BufReader::new(errors).lines().map_while(Result::ok).last();
        if let Some(error) = last {
            let _ = sender.send(Message::ChatEnd { side: Side::Tuned, error: Some(error) });
        }
    })?;
    Ok(Running { run, child, input })
}
