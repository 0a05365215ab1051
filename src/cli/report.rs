//! Errors at the edge: what happened and where, then what to do next.

use std::fmt::Write;

use super::paint::{Stream, Tone, paint};
use crate::data::DataError;
use crate::hub::HubError;
use crate::hub::fetch::FetchError;
use crate::model::ModelError;
use crate::run::RunError;
use crate::run::worker::exit;
use crate::spec::SpecError;
use crate::train::TrainError;

/// An error of a verb, with its exit code.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub message: String,
    /// The next step; may be empty.
    pub hint: String,
    pub code: u8,
}

impl Failure {
    /// The request was wrong.
    pub fn request(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into(), code: exit::REQUEST }
    }

    /// The run, or the machine, failed.
    pub fn run(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into(), code: exit::FAILED }
    }
}

/// Prints an error to standard error; gives the exit code.
pub fn report(error: &anyhow::Error) -> u8 {
    let (text, code) = describe(error);
    eprint!("{text}");
    code
}

/// The text of an error, and the exit code.
fn describe(error: &anyhow::Error) -> (String, u8) {
    let mut text = String::new();
    if let Some(error) = error.downcast_ref::<SpecError>() {
        for problem in &error.problems {
            entry(&mut text, &format!("{}{}", error.place(problem), problem.message), problem.hint.as_deref());
        }
        return (text, exit::REQUEST);
    }
    let (message, hint, code) = if let Some(failure) = error.downcast_ref::<Failure>() {
        (failure.message.clone(), failure.hint.clone(), failure.code)
    } else if let Some(error) = error.downcast_ref::<RunError>() {
        let code = match error {
            RunError::NoWorker { .. } | RunError::Io(_) => exit::FAILED,
            _ => exit::REQUEST,
        };
        (error.to_string(), error.hint(), code)
    } else if let Some(error) = error.downcast_ref::<HubError>() {
        (error.to_string(), error.hint(), exit::REQUEST)
    } else if let Some(error) = error.downcast_ref::<FetchError>() {
        let code = match error {
            FetchError::Refused { .. } | FetchError::NoId { .. } | FetchError::Nothing { .. } => exit::REQUEST,
            _ => exit::FAILED,
        };
        (error.to_string(), error.hint().into(), code)
    } else if let Some(error) = error.downcast_ref::<TrainError>() {
        (error.to_string(), error.hint(), if error.is_request() { exit::REQUEST } else { exit::FAILED })
    } else if let Some(error) = error.downcast_ref::<DataError>() {
        (error.to_string(), error.hint(), exit::REQUEST)
    } else if let Some(error) = error.downcast_ref::<ModelError>() {
        (error.to_string(), String::new(), exit::REQUEST)
    } else {
        (chain(error), String::new(), exit::FAILED)
    };
    entry(&mut text, &message, (!hint.is_empty()).then_some(hint.as_str()));
    (text, code)
}

/// An error with what caused it, on one line, nothing said twice.
fn chain(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |text, cause| {
        let cause = cause.to_string();
        match text.is_empty() {
            true => cause,
            false if text.contains(&cause) => text,
            false => format!("{text}: {cause}"),
        }
    })
}

fn entry(text: &mut String, message: &str, hint: Option<&str>) {
    let _ = writeln!(text, "{} {}", paint(Stream::Error, Tone::Error, "error:"), message.trim_end_matches('.'));
    if let Some(hint) = hint {
        let _ = writeln!(text, "{} {}", paint(Stream::Error, Tone::Hint, "hint:"), hint.trim_end_matches('.'));
    }
}

/// Prints something that the user should know and that stops nothing.
pub fn warn(message: &str) {
    eprintln!("{} {message}", paint(Stream::Error, Tone::Warning, "warning:"));
}

/// Whether an error is a closed pipe on the other side of standard output: no error of ours.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let kind =
        |error: &(dyn std::error::Error + 'static)| error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    error.chain().filter_map(kind).any(|kind| kind == std::io::ErrorKind::BrokenPipe)
}

/// Ends the program without a word where `println!` finds that whoever read standard output has enough, as `| head` does.
pub fn end_with_the_reader() {
    let others = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let closed = |text: &str| text.starts_with("failed printing to stdout") && text.contains("Broken pipe");
        if panic.payload().downcast_ref::<String>().is_some_and(|text| closed(text)) {
            std::process::exit(i32::from(crate::run::worker::exit::DONE));
        }
        others(panic);
    }));
}
