//! The device of a run file, looked up in a process that ends ([`crate::cli::choose`]): the interface itself opens no
//! driver.

use std::collections::HashMap;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::backend::{self, Choice};

/// What the process prints: the choice, or why there is none.
pub type Answer = Result<Choice, String>;

/// How long an answer holds: what is free on a device changes.
const FRESH: Duration = Duration::from_secs(20);

/// What was asked (device and precision), when, and the answer.
type Known = HashMap<(String, String), (Instant, Answer)>;

static KNOWN: Mutex<Option<Known>> = Mutex::new(None);

/// As [`backend::choose`], without opening a driver here.
///
/// # Errors
/// When the device is not there or does not compute in that precision, and when no process can be started to ask.
pub fn choose(device: &str, precision: &str) -> Answer {
    if device == "cpu" {
        return backend::choose(device, precision).map_err(|error| error.to_string());
    }
    let key = (device.to_owned(), precision.to_owned());
    // Held while the process runs: two threads do not ask the same at once.
    let mut known = KNOWN.lock().map_err(|_| "a thread that looked for devices panicked".to_owned())?;
    let known = known.get_or_insert_default();
    if let Some((_, answer)) = known.get(&key).filter(|(given, _)| given.elapsed() < FRESH) {
        return answer.clone();
    }
    let answer = ask(device, precision);
    known.insert(key, (Instant::now(), answer.clone()));
    answer
}

fn ask(device: &str, precision: &str) -> Answer {
    let failed = |error: String| format!("no process could look for devices: {error}; see what `tune doctor` says");
    let output = std::env::current_exe()
        .and_then(|program| {
            Command::new(program)
                .args(["choose", device, precision])
                .stdin(Stdio::null())
                .stderr(Stdio::null())
                .output()
        })
        .map_err(|error| failed(error.to_string()))?;
    let line = output.stdout.split(|&byte| byte == b'\n').next().unwrap_or_default();
    serde_json::from_slice::<Answer>(line).map_err(|_| failed(format!("it ended with {}", output.status)))?
}
