//! The control socket: one JSON object a line each way.
//!
//! Requests are a [`Command`] (`{"command": "pause"}`) or `{"command": "status"}`; a reply is `{"ok": true, ...}` or
//! `{"ok": false, "error": "..."}`. A command is taken at once and carried out at the next safe step, where its
//! event shows it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Command, RunError, RunFolder, lock};
use crate::spec::keys;

/// What the worker is doing, as `status` replies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub run: String,
    pub process: u32,
    /// `preparing`, `queued`, `training`, `paused`, `ending`.
    pub state: String,
    pub step: u64,
    pub steps: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reply {
    pub ok: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
}

/// Longest request, bytes.
const LONGEST: u64 = 4096;

/// The listening socket; its file goes when this is dropped.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
}

impl Server {
    /// Listens in a thread; commands go to `commands`.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn start(path: PathBuf, commands: Sender<Command>, status: Arc<Mutex<Status>>) -> std::io::Result<Self> {
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        std::thread::Builder::new().name("control".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                let (commands, status) = (commands.clone(), status.clone());
                let _ = std::thread::Builder::new().name("control client".into()).spawn(move || {
                    // A client that went away is no concern of the run.
                    let _ = converse(stream, &commands, &status);
                });
            }
        })?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn converse(stream: UnixStream, commands: &Sender<Command>, status: &Mutex<Status>) -> std::io::Result<()> {
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.by_ref().take(LONGEST).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let reply = match answer(&line, commands) {
            Ok(()) => Reply { ok: true, error: None, status: status.lock().ok().map(|status| status.clone()) },
            Err(error) => Reply { ok: false, error: Some(error), status: None },
        };
        let mut line = serde_json::to_vec(&reply).map_err(std::io::Error::other)?;
        line.push(b'\n');
        writer.write_all(&line)?;
        if !reply.ok && reply.error.as_deref() == Some(TOO_LONG) {
            return Ok(());
        }
    }
}

const TOO_LONG: &str = "the request is too long";

fn answer(line: &str, commands: &Sender<Command>) -> Result<(), String> {
    if !line.ends_with('\n') && line.len() as u64 >= LONGEST {
        return Err(TOO_LONG.into());
    }
    let request: serde_json::Value = serde_json::from_str(line).map_err(|error| format!("not JSON: {error}"))?;
    if request.get("command").and_then(|name| name.as_str()) == Some("status") {
        return Ok(());
    }
    let command: Command = serde_json::from_value(request).map_err(|error| error.to_string())?;
    check(command)?;
    commands.send(command).map_err(|_| "the run is ending".to_owned())
}

/// Whether the command's value is one that the run file would accept.
///
/// # Errors
/// What is allowed.
pub fn check(command: Command) -> Result<(), String> {
    if let Command::SetLearningRate(rate) = command
        && let Some(key) = keys::find("train", "learning_rate")
        && !key.domain.accepts(&toml::Value::Float(rate))
    {
        return Err(format!("learning_rate = {rate} is not allowed: {}", key.domain.allowed()));
    }
    Ok(())
}

/// Sends a command to the run's worker and waits for its reply.
///
/// # Errors
/// When no worker lives, or it refuses.
pub fn send(folder: &RunFolder, command: Command) -> Result<Status, RunError> {
    request(folder, &serde_json::to_value(command).map_err(std::io::Error::other)?)
}

/// Asks the run's worker what it is doing.
///
/// # Errors
/// When no worker lives.
pub fn status(folder: &RunFolder) -> Result<Status, RunError> {
    request(folder, &serde_json::json!({ "command": "status" }))
}

fn request(folder: &RunFolder, request: &serde_json::Value) -> Result<Status, RunError> {
    let silent = || RunError::NotRunning { id: folder.id() };
    let mut attempts = 0;
    let stream = loop {
        let holder = lock::holder(&folder.lock_path()).ok_or_else(silent)?;
        // A worker that has just started holds the lock a moment before it listens.
        match holder.socket.map(UnixStream::connect) {
            Some(Ok(stream)) => break stream,
            _ if attempts < 100 => {
                attempts += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            Some(Err(error)) => return Err(error.into()),
            None => return Err(silent()),
        }
    };
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut line = serde_json::to_vec(request).map_err(std::io::Error::other)?;
    line.push(b'\n');
    (&stream).write_all(&line)?;
    let mut text = String::new();
    BufReader::new(&stream).read_line(&mut text)?;
    if text.is_empty() {
        return Err(silent());
    }
    let reply: Reply = serde_json::from_str(&text).map_err(std::io::Error::other)?;
    match reply {
        Reply { ok: true, status, .. } => Ok(status.unwrap_or_default()),
        Reply { error, .. } => Err(RunError::Refused { id: folder.id(), what: error.unwrap_or_default() }),
    }
}
