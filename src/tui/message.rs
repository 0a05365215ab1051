//! What comes in and what goes out: messages to the interface, and the work it asks for.
//!
//! The interface itself does no slow thing. It hands out [`Request`]s; their answers come back as [`Message`]s.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crossterm::event::KeyEvent;

use super::history::{History, State};
use crate::hub::fetch::Repository;
use crate::monitor::MachineSample;
use crate::run::{Command, Record};
use crate::spec::RunSpec;

/// Work that the interface wants done.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Models of this machine; their fit follows one by one.
    ListModels,
    SearchHub(Repository, String),
    /// What a model of the hub is and whether it fits, from its configuration alone. Only the latest counts.
    Examine(String),
    /// Fetches what is not here yet.
    Download(Repository, String),
    /// Data files around the working folder.
    ListFiles,
    /// What the data of a run file is like. Only the latest counts.
    Preview {
        generation: u64,
        spec: Box<RunSpec>,
    },
    /// What a run file takes. Only the latest counts.
    Forecast {
        generation: u64,
        spec: Box<RunSpec>,
        /// Of all rows read, held out ones too.
        lengths: Option<std::sync::Arc<Vec<usize>>>,
        /// Rows of these that are trained on.
        rows: Option<usize>,
    },
    ListRuns,
    /// Reads a run's events and follows them.
    Open(String),
    Compare(String, String),
    Send {
        run: String,
        command: Command,
    },
    Start(Box<RunSpec>),
    Resume(String),
    Remove(String),
    /// Sends a live run a stop at the given update.
    StopAt {
        run: String,
        step: u64,
    },
    Chat {
        run: String,
        prompt: String,
    },
    LeaveChat,
    Export {
        run: String,
        to: PathBuf,
    },
    Save {
        path: PathBuf,
        text: String,
    },
    Load(PathBuf),
    /// The run file of a run.
    LoadRun(String),
    /// Samples of GPU and host, on or off.
    Monitor(bool),
    Copy(String),
    Redraw,
    Suspend,
}

/// Whether a method fits a model into this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    Fits(u64),
    /// Over nine tenths of what there is.
    Tight(u64),
    TooLarge(u64),
    /// The engine cannot do it.
    Unsupported,
}

/// Where a model comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Embedded,
    Folder,
    Cache,
    Hub,
}

impl Origin {
    pub fn name(self) -> &'static str {
        match self {
            Origin::Embedded => "built in",
            Origin::Folder => "folder",
            Origin::Cache => "cache",
            Origin::Hub => "hub",
        }
    }
}

/// A model that can be chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelEntry {
    /// What `model.id` will say.
    pub id: String,
    pub origin: Origin,
    pub family: String,
    pub parameters: Option<u64>,
    pub bytes: Option<u64>,
    pub context: Option<usize>,
    pub license: String,
    /// Why it cannot be used, if it cannot.
    pub problem: Option<String>,
    /// LoRA, QLoRA, full; empty until worked out.
    pub fits: Vec<(&'static str, Fit)>,
    /// Downloads, for those of the hub.
    pub downloads: Option<u64>,
}

/// What the configuration of a model of the hub says.
#[derive(Clone, Debug, PartialEq)]
pub struct Examined {
    pub family: String,
    pub parameters: u64,
    pub context: usize,
    pub fits: Vec<(&'static str, Fit)>,
}

/// A data file that can be chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct FileEntry {
    pub path: String,
    pub bytes: u64,
    /// Downloads, for a dataset of the hub that is not here yet.
    pub downloads: Option<u64>,
}

/// How a piece of a row is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceKind {
    Trained,
    Masked,
    Special,
    /// A special token that is trained on: an end of turn.
    TrainedSpecial,
}

/// One token of a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    pub text: String,
    pub kind: PieceKind,
}

/// A row as the model will see it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowView {
    pub tokens: usize,
    pub trained: usize,
    pub pieces: Vec<Piece>,
}

/// What is known of the data.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Preview {
    pub format: String,
    /// Column and role; no role: unused.
    pub columns: Vec<(String, Option<String>)>,
    pub rows: usize,
    pub eval_rows: usize,
    pub dropped: usize,
    pub empty: usize,
    pub duplicates: usize,
    pub shared: usize,
    pub cut: usize,
    pub label_tokens: usize,
    /// Tokens of each row before cutting.
    pub lengths: Vec<usize>,
    pub lint: Vec<String>,
    pub samples: Vec<RowView>,
    pub unmapped: Vec<String>,
}

/// What a run would take.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Forecast {
    pub device: String,
    /// Why that device.
    pub reason: String,
    pub bytes: BTreeMap<String, u64>,
    pub capacity: Option<u64>,
    pub micro_sizes: Vec<usize>,
    /// An estimate.
    pub step_seconds: f64,
    pub updates: Option<u64>,
    pub updates_per_epoch: Option<u64>,
    pub trainable_parameters: u64,
    pub parameters: u64,
    /// Whether plain LoRA would fit too.
    pub lora_fits: Option<bool>,
}

impl Forecast {
    pub fn total(&self) -> u64 {
        self.bytes.values().sum()
    }

    /// Seconds of the whole run; an estimate.
    pub fn seconds(&self) -> Option<f64> {
        Some(self.updates? as f64 * self.step_seconds)
    }

    pub fn fits(&self) -> bool {
        self.capacity.is_none_or(|capacity| self.total() <= capacity)
    }
}

/// A run of the list.
#[derive(Clone, Debug, PartialEq)]
pub struct RunEntry {
    pub id: String,
    pub state: State,
    pub model: String,
    pub method: String,
    pub data: String,
    pub step: u64,
    pub steps: u64,
    pub loss: Option<f64>,
    pub eval_loss: Option<f64>,
    /// Smoothed losses, for a sparkline.
    pub losses: Vec<f64>,
    pub started: String,
}

/// Who answers in the chat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Base,
    Tuned,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Message {
    Key(KeyEvent),
    Paste(String),
    Resize(u16, u16),
    /// SIGTERM or SIGHUP.
    Terminate,
    Models(Vec<ModelEntry>),
    Fits {
        id: String,
        fits: Vec<(&'static str, Fit)>,
    },
    HubModels(Result<Vec<ModelEntry>, String>),
    Examined {
        id: String,
        /// Why its configuration could not be had.
        result: Result<Box<Examined>, String>,
    },
    HubDatasets(Result<Vec<FileEntry>, String>),
    /// Bytes had and to come of a download.
    Progress {
        repository: Repository,
        id: String,
        done: u64,
        total: u64,
    },
    Downloaded {
        repository: Repository,
        id: String,
        result: Result<String, String>,
    },
    Files(Vec<FileEntry>),
    Preview {
        generation: u64,
        result: Result<Box<Preview>, String>,
    },
    Forecast {
        generation: u64,
        result: Result<Box<Forecast>, String>,
    },
    Runs(Vec<RunEntry>),
    History {
        run: String,
        history: Box<History>,
        spec: Option<Box<RunSpec>>,
        /// False for a first look at the two ends of a very long run.
        whole: bool,
    },
    Events {
        run: String,
        records: Vec<Record>,
    },
    /// The worker is gone without an end in the events.
    Died {
        run: String,
    },
    Compared(Box<Comparison>),
    Started(Result<String, String>),
    Machine(Box<MachineSample>),
    ChatPiece {
        side: Side,
        text: String,
    },
    ChatEnd {
        side: Side,
        error: Option<String>,
    },
    Loaded {
        path: Option<PathBuf>,
        spec: Box<RunSpec>,
    },
    /// Something to tell in the status line.
    Done(String),
    Wrong(String),
}

/// Two runs beside each other.
#[derive(Clone, Debug)]
pub struct Comparison {
    pub names: [String; 2],
    pub histories: [History; 2],
    /// Keys whose values differ, with both values.
    pub differences: Vec<(String, String, String)>,
}
