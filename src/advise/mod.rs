//! Advice: what experience says about a run, before it starts and while it goes.
//!
//! Each rule is a small pure function in a table, with the source it comes from and, where there is one, the fix
//! that one key applies. [`before`] judges a run file together with what is known about its data; [`live`] judges
//! the events of a run that goes on. Nothing here touches a file, a device or the terminal.

pub mod before;
pub mod change;
pub mod live;

pub use before::{Facts, check};
pub use change::Change;
pub use live::Watch;

/// Where a rule comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Unsloth's fine-tuning guide.
    Guide,
    /// CraftRigs' LoRA guide.
    CraftRigs,
    /// NVIDIA's article on fine-tuning.
    Nvidia,
    /// Unsloth's LoRA hyperparameter guide.
    LoraGuide,
    /// "LoRA Without Regret", Schulman et al. 2025.
    WithoutRegret,
    /// Common practice among people who fine-tune.
    Practice,
    /// What users of other fine-tuning programs report.
    Reports,
    /// Not an opinion: the engine or the driver said so.
    Measured,
}

impl Source {
    pub fn name(self) -> &'static str {
        match self {
            Source::Guide => "Unsloth fine-tuning guide",
            Source::CraftRigs => "CraftRigs LoRA guide",
            Source::Nvidia => "NVIDIA fine-tuning article",
            Source::LoraGuide => "Unsloth LoRA guide",
            Source::WithoutRegret => "LoRA Without Regret",
            Source::Practice => "common practice",
            Source::Reports => "users' reports",
            Source::Measured => "measured",
        }
    }
}

/// What one key does about a warning.
#[derive(Clone, Debug, PartialEq)]
pub enum Fix {
    /// Changes the run file, all of them together.
    Change(Vec<Change>),
    /// Nothing in the run file helps: look at the data.
    OpenData,
    /// Asks the running worker for an evaluation.
    Evaluate,
    /// Stops the run; the best checkpoint is kept.
    Stop,
    /// Lets the run go on to the end of this epoch and stops there.
    FinishEpoch { at_step: u64 },
    /// Changes the learning rate of the running worker.
    LearningRate(f64),
}

impl Fix {
    /// What the fix does, in a few words: `train.epochs = 3`.
    pub fn describe(&self) -> String {
        match self {
            Fix::Change(changes) => changes.iter().map(Change::describe).collect::<Vec<_>>().join(", "),
            Fix::OpenData => "look at the data".into(),
            Fix::Evaluate => "evaluate now".into(),
            Fix::Stop => "stop, keep the best checkpoint".into(),
            Fix::FinishEpoch { at_step } => format!("stop at the end of this epoch, step {at_step}"),
            Fix::LearningRate(rate) => format!("learning rate to {}", change::short(*rate)),
        }
    }
}

/// One warning, ready to show.
#[derive(Clone, Debug, PartialEq)]
pub struct Warning {
    /// The rule's name, the same in the table, in events and in the docs.
    pub rule: &'static str,
    /// The key of the run file that it is about; empty for a live one.
    pub key: &'static str,
    /// The value seen and why it matters.
    pub message: String,
    /// What to do about it, in words.
    pub advice: String,
    pub sources: &'static [Source],
    pub fix: Option<Fix>,
}

impl Warning {
    /// The sources' names, for display.
    pub fn source_names(&self) -> String {
        self.sources.iter().map(|source| source.name()).collect::<Vec<_>>().join(", ")
    }
}
