//! What no single key can say: keys that contradict each other, and what an engine cannot do yet.

use super::parse::{Problem, SpecError};
use super::{MethodKind, RunSpec, TrainData};

/// What an engine can do today. Whoever teaches an engine more adds a word here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// `cpu`, `wgpu`, `cuda`.
    pub engine: &'static str,
    /// Values of `engine.precision` beside `auto`.
    pub precisions: &'static [&'static str],
    /// Values of `model.weights` beside `auto`; `nf4` is what qlora needs.
    pub weights: &'static [&'static str],
    /// Values of `train.optimizer_memory` beside `auto`.
    pub optimizer_memory: &'static [&'static str],
    /// Values of `engine.recompute` beside `auto`.
    pub recompute: &'static [&'static str],
}

/// One entry an engine.
pub const CAPABILITIES: [Capabilities; 3] = [
    Capabilities {
        engine: "cpu",
        precisions: &["f32"],
        weights: &["nf4", "int8"],
        optimizer_memory: &["device"],
        recompute: &["none", "all"],
    },
    Capabilities {
        engine: "wgpu",
        precisions: &["f32", "f16"],
        weights: &["nf4", "int8"],
        optimizer_memory: &["device"],
        recompute: &["none", "all"],
    },
    Capabilities {
        engine: "cuda",
        precisions: &["bf16", "fp8"],
        weights: &["nf4", "int8", "fp8"],
        optimizer_memory: &["device", "host"],
        recompute: &["none", "all"],
    },
];

impl Capabilities {
    /// Those of an engine by its name.
    pub fn of(engine: &str) -> Option<&'static Self> {
        CAPABILITIES.iter().find(|entry| entry.engine == engine)
    }

    /// Refuses by name what the engine cannot do.
    ///
    /// # Errors
    /// All problems at once.
    pub fn check(&self, spec: &RunSpec) -> Result<(), SpecError> {
        let mut problems = Vec::new();
        let mut refuse = |key: &str, value: &str, allowed: &[&str], others: &str| {
            let mut words = vec!["auto"];
            words.extend(allowed);
            let message = format!("{key} = \"{value}\": the {} engine cannot do that yet", self.engine);
            problems.push(Problem::new(key, message).hint(format!("it does {}{others}", words.join(", "))));
        };
        let precision = spec.engine.precision.as_str();
        if precision != "auto" && !self.precisions.contains(&precision) {
            refuse("engine.precision", precision, self.precisions, "");
        }
        let weights = spec.model.weights.as_str();
        if weights != "auto" && !self.weights.contains(&weights) {
            refuse("model.weights", weights, self.weights, ": as stored");
        }
        let memory = spec.train.optimizer_memory.as_str();
        if memory != "auto" && !self.optimizer_memory.contains(&memory) {
            refuse("train.optimizer_memory", memory, self.optimizer_memory, "");
        }
        let recompute = spec.engine.recompute.as_str();
        if recompute != "auto" && !self.recompute.contains(&recompute) {
            refuse("engine.recompute", recompute, self.recompute, "");
        }
        if spec.method.kind == MethodKind::Qlora && !self.weights.contains(&"nf4") {
            let message = format!("method.kind = \"qlora\": the {} engine has no NF4 weights yet", self.engine);
            problems.push(Problem::new("method.kind", message).hint("it does lora and full"));
        }
        if problems.is_empty() { Ok(()) } else { Err(SpecError { origin: String::new(), problems }) }
    }
}

/// Keys that contradict each other, or that a run cannot go without.
///
/// # Errors
/// All problems at once.
pub fn consistent(spec: &RunSpec) -> Result<(), SpecError> {
    let mut problems = Vec::new();
    if spec.model.id.is_empty() {
        problems.push(
            Problem::new("model.id", "model.id is not set")
                .hint("--model M, or id = \"M\" under [model]; \"demo\" is built in"),
        );
    }
    if matches!(&spec.data.train, TrainData::Path(path) if path.is_empty()) {
        problems.push(
            Problem::new("data.train", "data.train is not set").hint("--data FILE, or train = \"FILE\" under [data]"),
        );
    }
    let full = spec.method.kind == MethodKind::Full;
    if full && !spec.method.init.is_empty() {
        problems.push(
            Problem::new("method.init", "method.init names an adapter, and method.kind = \"full\" trains none")
                .hint("leave init out, or use kind = \"lora\""),
        );
    }
    if full && spec.model.weights != "auto" {
        let message = format!("model.weights = \"{}\" cannot be trained by method.kind = \"full\"", spec.model.weights);
        problems.push(Problem::new("model.weights", message).hint("use kind = \"lora\", or weights = \"auto\""));
    }
    if spec.method.kind == MethodKind::Qlora && !matches!(spec.model.weights.as_str(), "auto" | "nf4") {
        let message =
            format!("method.kind = \"qlora\" is lora on NF4 weights, and model.weights = \"{}\"", spec.model.weights);
        problems.push(Problem::new("model.weights", message).hint("weights = \"auto\", or kind = \"lora\""));
    }
    let (weights, precision) = (spec.model.weights.as_str(), spec.engine.precision.as_str());
    if precision == "fp8" && full {
        let message = "engine.precision = \"fp8\" is for frozen weights, and method.kind = \"full\" trains them";
        problems.push(Problem::new("engine.precision", message).hint("precision = \"bf16\", or kind = \"lora\""));
    }
    if precision == "fp8" && spec.method.kind == MethodKind::Qlora {
        let message = "engine.precision = \"fp8\" multiplies weights in 8 bits, and method.kind = \"qlora\" holds 4";
        problems.push(Problem::new("engine.precision", message).hint("precision = \"bf16\", or kind = \"lora\""));
    } else if precision == "fp8" && !matches!(weights, "auto" | "fp8") {
        let message = format!("engine.precision = \"fp8\" holds weights in fp8, and model.weights = \"{weights}\"");
        problems.push(Problem::new("model.weights", message).hint("weights = \"auto\", or precision = \"bf16\""));
    }
    if weights == "fp8" && !matches!(precision, "auto" | "fp8") {
        let message = format!("model.weights = \"fp8\" is multiplied in fp8, and engine.precision = \"{precision}\"");
        problems.push(Problem::new("engine.precision", message).hint("precision = \"auto\", or weights = \"auto\""));
    }
    if let Some(steps) = spec.train.steps
        && spec.train.warmup >= 1.0
        && spec.train.warmup > steps as f64
    {
        let message = format!("train.warmup = {} is longer than the run's {steps} updates", spec.train.warmup);
        problems.push(Problem::new("train.warmup", message).hint("a fraction such as 0.05 fits any length"));
    }
    if problems.is_empty() { Ok(()) } else { Err(SpecError { origin: String::new(), problems }) }
}
