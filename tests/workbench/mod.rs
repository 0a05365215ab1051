//! A private home, a tiny model and a little data for tests that run the program itself.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Output {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Output {
    pub fn all(&self) -> String {
        format!("exit code {}\n--- stdout\n{}--- stderr\n{}", self.code, self.out, self.err)
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.all()))
    }

    /// Standard output as events, nothing else in it.
    pub fn events(&self) -> Vec<Value> {
        let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        self.out.lines().map(parse).collect()
    }
}

pub struct Bench {
    folder: TempDir,
    /// Short, as sockets need it.
    runtime: TempDir,
}

impl Bench {
    pub fn new() -> Self {
        let bench = Self { folder: TempDir::new().unwrap(), runtime: TempDir::new().unwrap() };
        let rows: String = (0..40)
            .map(|row| {
                let words = ["alpha", "beta", "gamma", "delta", "epsilon"];
                let (a, b) = (words[row % 5], words[row / 5 % 5]);
                let row =
                    serde_json::json!({ "prompt": format!("{a} {row}?"), "completion": format!(" {b} {a} {row}") });
                format!("{row}\n")
            })
            .collect();
        bench.write("rows.jsonl", &rows);
        bench
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn home(&self) -> PathBuf {
        self.path().join("home")
    }

    /// Folder of the tiny Llama.
    pub fn model(&self) -> String {
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny/llama").into()
    }

    pub fn data(&self) -> String {
        self.path().join("rows.jsonl").to_str().unwrap().to_owned()
    }

    pub fn write(&self, name: &str, text: &str) -> String {
        let path = self.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    pub fn copy_model(&self, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(self.model()).unwrap().flatten() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }

    /// Every folder of a run, hidden ones included.
    pub fn run_folders(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.home().join("runs")).into_iter().flatten().flatten();
        let mut folders: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        folders.sort();
        folders
    }

    pub fn only_run(&self) -> PathBuf {
        let folders = self.run_folders();
        assert_eq!(folders.len(), 1, "{folders:?}");
        folders[0].clone()
    }

    pub fn command_at(&self, home: &Path, arguments: &[&str]) -> Command {
        self.prepare(Command::new(env!("CARGO_BIN_EXE_tune")), home, arguments)
    }

    pub fn prepare(&self, mut command: Command, home: &Path, arguments: &[&str]) -> Command {
        command.args(arguments).current_dir(self.path());
        command.env("TUNE_HOME", home).env("XDG_RUNTIME_DIR", self.runtime.path());
        command.env("HF_HUB_CACHE", self.path().join("cache")).env("HF_HUB_OFFLINE", "1").env("RAYON_NUM_THREADS", "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        self.command_at(&self.home(), arguments)
    }

    pub fn tune(&self, arguments: &[&str]) -> Output {
        self.tune_at(&self.home(), arguments)
    }

    pub fn tune_at(&self, home: &Path, arguments: &[&str]) -> Output {
        finish(self.command_at(home, arguments).spawn().unwrap())
    }

    /// Arguments of a training run on the tiny model.
    pub fn request(&self, settings: &[&str]) -> Vec<String> {
        let mut arguments = vec!["--model".to_owned(), self.model(), "--data".into(), self.data()];
        for setting in
            ["engine.device=cpu", "method.rank=4", "data.max_length=64", "data.eval=0.2"].iter().chain(settings)
        {
            arguments.extend(["--set".to_owned(), (*setting).to_owned()]);
        }
        arguments
    }

    pub fn train(&self, flags: &[&str], settings: &[&str]) -> Output {
        finish(self.spawn_train(flags, settings))
    }

    pub fn spawn_train(&self, flags: &[&str], settings: &[&str]) -> Child {
        let request = self.request(settings);
        let arguments: Vec<&str> =
            std::iter::once("train").chain(flags.iter().copied()).chain(request.iter().map(String::as_str)).collect();
        self.command(&arguments).spawn().unwrap()
    }

    /// Starts a run in the background and gives its folder.
    pub fn detached(&self, settings: &[&str]) -> PathBuf {
        let output = self.train(&["--detach", "--json"], settings);
        assert_eq!(output.code, 0, "{}", output.all());
        output.json()["path"].as_str().unwrap().into()
    }

    pub fn summary(&self, folder: &Path) -> Value {
        let runs = self.tune(&["runs", "--json"]).json();
        let id = name(folder);
        runs["runs"].as_array().unwrap().iter().find(|run| run["run"] == id).unwrap().clone()
    }
}

impl Drop for Bench {
    /// No worker outlives its test.
    fn drop(&mut self) {
        for folder in self.run_folders() {
            if let Some(holder) = tune::run::lock::holder(&folder.join("worker.lock"))
                && holder.process != 0
            {
                kill(holder.process, "KILL");
            }
        }
    }
}

pub fn name(folder: &Path) -> String {
    folder.file_name().unwrap().to_str().unwrap().to_owned()
}

/// Waits for the first line that a process writes: it has begun what it is there for.
pub fn first_line(child: &mut Child) -> String {
    let mut line = String::new();
    let output = child.stdout.as_mut().expect("its output is read");
    // One byte at a time, so that the rest is there for others.
    let mut byte = [0];
    while output.read(&mut byte).expect("it writes") == 1 && byte[0] != b'\n' {
        line.push(char::from(byte[0]));
    }
    line
}

pub fn finish(child: Child) -> Output {
    let output = child.wait_with_output().unwrap();
    Output {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Whole events of a run.
pub fn events(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("events.jsonl")).unwrap_or_default();
    let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    whole.map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

pub fn of_kind<'a>(events: &'a [Value], kind: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["event"] == kind).collect()
}

/// Loss and grad norm of every update, as exact numbers; later ones stand for earlier ones of the same step.
pub fn updates(events: &[Value]) -> std::collections::BTreeMap<u64, (String, String, String)> {
    let exact = |event: &Value, key: &str| event[key].to_string();
    of_kind(events, "step")
        .into_iter()
        .map(|event| {
            let values = (exact(event, "loss"), exact(event, "grad_norm"), exact(event, "learning_rate"));
            (event["step"].as_u64().unwrap(), values)
        })
        .collect()
}

/// Waits until `found` gives something.
pub fn until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = found() {
            return value;
        }
        assert!(started.elapsed() < Duration::from_secs(120), "{what} did not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits for a run's step.
pub fn until_step(folder: &Path, step: u64) {
    until("the step", || {
        let events = events(folder);
        of_kind(&events, "step").iter().any(|event| event["step"].as_u64() >= Some(step)).then_some(())
    });
}

/// The living worker's process.
pub fn worker(folder: &Path) -> u32 {
    until("the worker", || {
        tune::run::lock::holder(&folder.join("worker.lock"))
            .map(|holder| holder.process)
            .filter(|&process| process != 0)
    })
}

/// Waits until a run has no worker.
pub fn until_no_worker(folder: &Path) {
    until("the end of the worker", || tune::run::lock::holder(&folder.join("worker.lock")).is_none().then_some(()));
}

pub fn kill(process: u32, signal: &str) {
    let _ = Command::new("kill").args([format!("-{signal}"), process.to_string()]).stderr(Stdio::null()).status();
}

/// Every checkpoint is whole, and nothing is left under a temporary name.
pub fn assert_whole_checkpoints(folder: &Path) {
    let entries = std::fs::read_dir(folder.join("checkpoints")).into_iter().flatten().flatten();
    let left: Vec<_> = entries.map(|entry| entry.file_name()).filter(|name| name.as_bytes()[0] == b'.').collect();
    assert!(left.is_empty(), "{left:?} is left behind");
    assert_checkpoints_open(folder);
}

/// Every checkpoint that has its name is whole. A kill may have left one that has not.
pub fn assert_checkpoints_open(folder: &Path) {
    for entry in std::fs::read_dir(folder.join("checkpoints")).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        assert!(name.starts_with("step-"), "{name} is no checkpoint");
        for file in ["state.json", "trained.safetensors", "optimizer.safetensors"] {
            let bytes = std::fs::read(entry.path().join(file)).unwrap_or_else(|error| panic!("{name}/{file}: {error}"));
            if file.ends_with("safetensors") {
                safetensors::SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{name}/{file}: {error}"));
            } else {
                serde_json::from_slice::<serde_json::Value>(&bytes).unwrap();
            }
        }
    }
}
