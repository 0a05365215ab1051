//! Opening the workbench: settings of the user and of the environment, the background, the loop.

use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

use super::app::{App, Settings, Step};
use super::event_loop;
use super::glyphs::Glyphs;
use super::keymap::{Keymap, KeymapError};
use super::message::{Message, Request};
use super::theme::{Colors, Theme, ThemeError};
use super::work::Background;
use crate::spec::RunSpec;

/// What the workbench opens on.
#[derive(Debug)]
pub enum Start {
    /// The five steps, empty.
    Empty,
    /// A run file in Tune.
    RunFile(PathBuf, Box<RunSpec>),
    /// A run, live; its id.
    Run(String),
}

/// Why it did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{path}: {source}", path = path.display())]
    Keymap { path: PathBuf, source: KeymapError },
    #[error(transparent)]
    Theme(#[from] ThemeError),
    #[error("{path}: {what}", path = path.display())]
    Config { path: PathBuf, what: String },
    #[error("the terminal failed: {0}")]
    Terminal(#[from] std::io::Error),
}

/// The user's `config.toml`.
#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    /// A built-in theme's name, or the path of a theme file.
    theme: String,
}

/// Settings from `$TUNE_CONFIG`, or the user's configuration folder (`~/.config/tune` on Linux): `config.toml`,
/// `keymap.toml`; `$TUNE_THEME` and `NO_COLOR` count more.
///
/// # Errors
/// Names the file and what is wrong in it.
pub fn settings() -> Result<Settings, OpenError> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let folder = variable("TUNE_CONFIG")
        .map(PathBuf::from)
        .or_else(|| directories::ProjectDirs::from("", "", "tune").map(|dirs| dirs.config_dir().to_owned()));
    let read = |name: &str| {
        let path = folder.as_ref()?.join(name);
        std::fs::read_to_string(&path).ok().map(|text| (path, text))
    };
    let config = match read("config.toml") {
        Some((path, text)) => toml::from_str(&text)
            .map_err(|error: toml::de::Error| OpenError::Config { path, what: error.message().to_owned() })?,
        None => Config::default(),
    };
    let keymap = match read("keymap.toml") {
        Some((path, text)) => Keymap::with_overrides(&text).map_err(|source| OpenError::Keymap { path, source })?,
        None => Keymap::default(),
    };
    let colors = Colors::of_environment(variable);
    let name = variable("TUNE_THEME").unwrap_or(config.theme);
    let theme = match name.as_str() {
        "" => Theme::built_in("default", colors)?,
        file if file.ends_with(".toml") => {
            let path = folder.as_deref().unwrap_or(Path::new(".")).join(file);
            let text = std::fs::read_to_string(&path)
                .map_err(|error| OpenError::Config { path: path.clone(), what: error.to_string() })?;
            Theme::parse(file, &text, colors)?
        }
        name => Theme::built_in(name, colors)?,
    };
    Ok(Settings { theme, colors, glyphs: Glyphs::of_environment(variable), keymap })
}

/// Opens the workbench and returns when it is left. Runs go on.
///
/// # Errors
/// When a settings file is wrong, or the terminal is gone.
pub fn open(start: Start) -> Result<(), OpenError> {
    let mut app = App::new(settings()?);
    let (sender, messages) = channel();
    match start {
        Start::Empty => {}
        Start::RunFile(path, spec) => {
            app.handle(Message::Loaded { path: Some(path), spec });
            app.go(Step::Tune);
        }
        Start::Run(run) => app.open_run(&run),
    }
    let mut background = Background::start(sender.clone())?;
    // Before the machine is looked through: what was asked for comes first.
    let mut requests = app.take_requests();
    requests.sort_by_key(|request| matches!(request, Request::ListModels | Request::ListFiles | Request::ListRuns));
    requests.into_iter().for_each(|request| background.perform(request));
    event_loop::run(&mut app, &messages, sender, |request| background.perform(request))?;
    Ok(())
}
