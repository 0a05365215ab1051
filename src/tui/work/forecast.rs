//! What a run would take: the plan of the very workload that would run, opened nowhere.

use crate::backend::Choice;
use crate::hub;
use crate::model::ModelConfig;
use crate::program::{Kind, Plan, PlanError, Role};
use crate::spec::{Capabilities, MethodKind, RunSpec};
use crate::train;
use crate::train::planning::{PlanningError, RecomputeChoice};
use crate::tui::message::{Fit, Forecast, Message, Request};

/// Plans run files; remembers the model that it planned for last.
#[derive(Default)]
pub struct Forecaster {
    model: Option<(String, ModelConfig)>,
}

impl Forecaster {
    /// Answers a request for a forecast.
    pub fn perform(&mut self, request: Request, sender: &std::sync::mpsc::Sender<Message>) {
        let Request::Forecast { generation, spec, lengths, rows } = request else { return };
        let lengths = lengths.as_ref().map(|lengths| lengths.as_slice());
        let result = self.forecast(&spec, lengths, rows).map(Box::new);
        let _ = sender.send(Message::Forecast { generation, result });
    }

    fn config(&mut self, spec: &RunSpec) -> Result<&ModelConfig, String> {
        let name = format!("{}@{}", spec.model.id, spec.model.revision);
        if self.model.as_ref().is_none_or(|(known, _)| *known != name) {
            self.model = Some((name, read_config(spec)?));
        }
        Ok(&self.model.as_ref().expect("set above").1)
    }

    fn forecast(&mut self, spec: &RunSpec, lengths: Option<&[usize]>, rows: Option<usize>) -> Result<Forecast, String> {
        let choice = choose(spec)?;
        let config = self.config(spec)?;
        let limit = spec.data.max_length;
        let context = config.max_position_embeddings;
        if limit > context {
            return Err(format!(
                "data.max_length = {limit}: the model's context is {context} tokens; use that or less"
            ));
        }
        // Without the rows every row is taken to be as long as it may be.
        let lengths: Vec<usize> = match lengths {
            Some(lengths) if !lengths.is_empty() => lengths.iter().map(|&length| length.min(limit)).collect(),
            _ => vec![limit],
        };
        let plan = plan(spec, config, &lengths, &choice)?;
        let capacity = budget(spec, &choice);
        let known = lengths.len() > 1;
        let rows = rows.unwrap_or(lengths.len()).max(1);
        let per_epoch = known.then(|| rows.div_ceil(spec.train.batch.max(1)) as u64);
        let updates = spec
            .train
            .steps
            .or_else(|| per_epoch.map(|per_epoch| (per_epoch as f64 * spec.train.epochs).ceil().max(1.0) as u64));
        let mean = lengths.iter().sum::<usize>() as f64 / lengths.len() as f64;
        let trainable = plan.workload.buffers.iter();
        let trainable: u64 = match spec.method.kind {
            MethodKind::Full => config.parameters(),
            _ => trainable
                .filter(|buffer| buffer.kind == Kind::Adapter && !buffer.name.ends_with(".compute"))
                .map(|buffer| buffer.elements() as u64)
                .sum(),
        };
        let lora_fits = (spec.method.kind == MethodKind::Qlora).then(|| {
            let mut lora = spec.clone();
            lora.method.kind = MethodKind::Lora;
            lora.model.weights = "auto".into();
            let plan = self::plan(&lora, config, &lengths, &choice);
            plan.is_ok_and(|plan| capacity.is_none_or(|capacity| plan.summary.peak_bytes <= capacity))
        });
        let mut micro_sizes: Vec<usize> = micro(&plan).map(|program| program.tokens).collect();
        micro_sizes.sort_unstable();
        Ok(Forecast {
            device: choice.target.name.clone(),
            reason: choice.reason.clone(),
            bytes: plan.summary.bytes.iter().map(|(kind, bytes)| ((*kind).to_owned(), *bytes)).collect(),
            capacity,
            micro_sizes,
            step_seconds: step_seconds(&plan, mean * spec.train.batch.min(rows) as f64),
            updates,
            updates_per_epoch: per_epoch,
            trainable_parameters: trainable,
            parameters: config.parameters(),
            lora_fits,
        })
    }
}

fn micro(plan: &Plan) -> impl Iterator<Item = &crate::program::plan::ProgramSummary> {
    plan.summary.programs.iter().filter(|program| program.role == Role::Micro)
}

/// Seconds of an update of that many tokens: at the price of the largest micro-batch, and the update itself.
fn step_seconds(plan: &Plan, tokens: f64) -> f64 {
    let Some(largest) = micro(plan).max_by_key(|program| program.tokens) else { return 0.0 };
    let update = plan.summary.programs.iter().filter(|program| program.role == Role::Update);
    largest.estimated_seconds * tokens / largest.tokens.max(1) as f64
        + update.map(|program| program.estimated_seconds).sum::<f64>()
}

/// The configuration of the run file's model, with the type that its weights are stored in.
pub fn read_config(spec: &RunSpec) -> Result<ModelConfig, String> {
    match hub::locate_model(&spec.model.id, &spec.model.revision) {
        Ok(_) => {}
        Err(error) => return Err(format!("{error}; {}", error.hint())),
    }
    let (model, _) = train::open_model(spec).map_err(|error| error.to_string())?;
    Ok(model.config)
}

/// The device of the run file, refused where it cannot do what the file asks.
pub fn choose(spec: &RunSpec) -> Result<Choice, String> {
    let choice = super::device::choose(&spec.engine.device, &spec.engine.precision)?;
    if let Some(capabilities) = Capabilities::of(choice.target.engine) {
        capabilities.check(spec).map_err(|error| error.to_string())?;
    }
    Ok(choice)
}

/// Bytes that the plan may take: the device's, or the machine's where only it limits, or less where asked.
fn budget(spec: &RunSpec, choice: &Choice) -> Option<u64> {
    let asked = crate::spec::size::parse(&spec.engine.vram);
    match (asked, choice.target.memory) {
        (Some(asked), Some(there)) => Some(asked.min(there)),
        (asked, there) => asked.or(there),
    }
}

/// The plan that fits best; where none fits, the leanest, for its figures.
fn plan(spec: &RunSpec, config: &ModelConfig, lengths: &[usize], choice: &Choice) -> Result<Plan, String> {
    let mut search = train::search(spec, config, lengths, choice).map_err(|error| error.to_string())?;
    if lengths.len() == 1 {
        // The rows are not known yet: they may be of any length.
        search.shortest_row = 1;
    }
    match search.run() {
        Ok((plan, _)) => Ok(plan),
        Err(PlanningError::Plan(PlanError::DoesNotFit { .. } | PlanError::HostTooSmall { .. })) => {
            (search.target.memory, search.target.host_memory) = (None, None);
            search.recompute = RecomputeChoice::All;
            search.run().map(|(plan, _)| plan).map_err(|error| error.to_string())
        }
        Err(error) => Err(error.to_string()),
    }
}

/// Whether each method fits, for a run with usual settings and rows of up to 2048 tokens.
pub fn fits(id: &str, config: &ModelConfig) -> Vec<(&'static str, Fit)> {
    let methods = [("lora", MethodKind::Lora), ("qlora", MethodKind::Qlora), ("full", MethodKind::Full)];
    methods
        .into_iter()
        .map(|(name, kind)| {
            let mut spec = RunSpec::default();
            spec.model.id = id.to_owned();
            spec.method.kind = kind;
            spec.data.max_length = spec.data.max_length.min(config.max_position_embeddings);
            let fit = match choose(&spec) {
                Err(_) => Fit::Unsupported,
                Ok(mut choice) => {
                    // Smaller micro-batches lie in the memory of the largest; without them a plan is made in a tenth of
                    // the time and memory.
                    choice.target.micro_sizes.retain(|&size| size >= spec.data.max_length);
                    fit(&spec, config, &choice)
                }
            };
            (name, fit)
        })
        .collect()
}

fn fit(spec: &RunSpec, config: &ModelConfig, choice: &Choice) -> Fit {
    let Ok(plan) = plan(spec, config, &[spec.data.max_length], choice) else { return Fit::Unsupported };
    let bytes = plan.summary.peak_bytes;
    match budget(spec, choice) {
        Some(there) if bytes > there => Fit::TooLarge(bytes),
        Some(there) if bytes * 10 > there * 9 => Fit::Tight(bytes),
        _ => Fit::Fits(bytes),
    }
}
