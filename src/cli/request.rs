//! What a run is asked to be: a run file, or model and data, with settings over it.

use std::path::PathBuf;

use clap::Args;

use super::report::Failure;
use crate::spec::keys::{self, Key};
use crate::spec::{RunSpec, SpecError};

/// A run file or the flags in its place.
#[derive(Args, Clone, Debug, Default)]
pub struct Request {
    /// The run file; `tune new` writes one
    #[arg(value_name = "RUN.toml")]
    pub file: Option<PathBuf>,
    /// Model: a folder, a hub id, or "demo"
    #[arg(long, value_name = "M")]
    pub model: Option<String>,
    /// Data: a file, a folder, or a dataset's id
    #[arg(long, value_name = "D")]
    pub data: Option<String>,
    /// Device: auto, cpu, wgpu, wgpu:N, cuda, cuda:N
    #[arg(long)]
    pub device: Option<String>,
    /// Set a key of the run file, as train.learning_rate=1e-4; may be given again
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub settings: Vec<String>,
}

impl Request {
    /// The spec that is asked for, checked but not resolved; what it names on the hub is here by then.
    ///
    /// # Errors
    /// When nothing is asked for, the file cannot be read, or a key or value is wrong.
    pub fn spec(&self) -> anyhow::Result<RunSpec> {
        if !self.asks() {
            return Err(Failure::request(
                "there is nothing to train",
                "name a run file, or --model M --data D; `tune demo` needs neither",
            )
            .into());
        }
        let mut spec = match &self.file {
            Some(file) => RunSpec::read(file, &[])?,
            None => RunSpec::default(),
        };
        spec.apply(&self.flags()).map_err(|error| SpecError { origin: String::new(), ..error })?;
        spec.apply(&self.settings)?;
        super::fetch::missing(&spec)?;
        Ok(spec)
    }

    /// Whether anything is asked for.
    pub fn asks(&self) -> bool {
        self.file.is_some() || !self.flags().is_empty() || !self.settings.is_empty()
    }

    /// Whether a key is set by the file or a flag, rather than by its default.
    pub fn names(&self, section: &str, name: &str) -> bool {
        let text = self.file.as_ref().and_then(|file| std::fs::read_to_string(file).ok());
        let file = text.and_then(|text| text.parse::<toml::Table>().ok());
        let in_file = file.is_some_and(|file| file.get(section).is_some_and(|keys| keys.get(name).is_some()));
        let path = |setting: &str| keys::find_path(setting.split('=').next().unwrap_or_default().trim()).map(Key::path);
        in_file
            || self
                .flags()
                .iter()
                .chain(&self.settings)
                .any(|setting| path(setting) == Some(format!("{section}.{name}")))
    }

    /// The flags beside `--set` as settings, which come before those.
    fn flags(&self) -> Vec<String> {
        // Quoted, so that a name such as `1e5` or `true` stays a name.
        let quoted = |key: &str, value: &String| format!("{key}={}", toml::Value::String(value.clone()));
        let model = self.model.iter().map(|model| quoted("model.id", model));
        let data = self.data.iter().map(|data| quoted("data.train", data));
        let device = self.device.iter().map(|device| quoted("engine.device", device));
        model.chain(data).chain(device).collect()
    }
}
