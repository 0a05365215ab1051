//! Updates and evaluations on an open session: micro-batches in, loss and gradient norm out.

use std::collections::HashMap;

use crate::backend::{EngineError, Session, read_values};
use crate::data::MicroBatch;
use crate::model::adapter::Adapter;
use crate::program::{BufferId, Kind, Workload};

/// Drives the programs of a training workload. Holds ids of the buffers it writes and reads.
pub struct Stepper {
    pub session: Box<dyn Session>,
    sizes: HashMap<usize, SizeIds>,
    begin: usize,
    update: usize,
    refresh: Option<usize>,
    loss_scale: BufferId,
    loss_sum: BufferId,
    grad_norm: BufferId,
    hyper: BufferId,
    key: BufferId,
    lora_scale: Option<BufferId>,
    seed: u64,
    betas: [f64; 2],
    padding_token: Option<u32>,
}

struct SizeIds {
    micro: usize,
    evaluate: Option<usize>,
    inputs: InputIds,
}

struct InputIds {
    ids: BufferId,
    /// Ids with padding as -1, where the embedding is trained.
    embedding_ids: Option<BufferId>,
    positions: BufferId,
    document_start: BufferId,
    document_end: BufferId,
    targets: BufferId,
    token_weights: BufferId,
    losses: BufferId,
}

/// Gradients of tokens are below 1 each where the loss is summed: at a thousandth of that no f16 overflows that f32 would not.
const LEAST_GRADIENT_SCALE: f32 = 1.0 / 1024.0;

/// What an update measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepResult {
    /// Mean over the update's label tokens.
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Whether parameters changed: not when the gradient norm was not finite.
    pub applied: bool,
}

impl Stepper {
    /// Finds its buffers in the session's workload.
    ///
    /// # Errors
    /// When the workload is no training workload.
    pub fn new(
        session: Box<dyn Session>,
        seed: u64,
        betas: [f64; 2],
        padding_token: Option<u32>,
    ) -> Result<Self, EngineError> {
        let workload = &session.plan().workload;
        let buffer = |name: &str| {
            workload.find(name).ok_or_else(|| EngineError::Unsupported {
                engine: "trainer",
                what: format!("the workload has no buffer {name}"),
            })
        };
        let program = |name: &str| {
            workload.program(name).ok_or_else(|| EngineError::Unsupported {
                engine: "trainer",
                what: format!("the workload has no program {name}"),
            })
        };
        let mut sizes = HashMap::new();
        for entry in &workload.programs {
            let Some(tokens) = entry.name.strip_prefix("micro.").and_then(|size| size.parse().ok()) else { continue };
            let input = |part: &str| buffer(&format!("inputs.{tokens}.{part}"));
            let ids = SizeIds {
                micro: program(&entry.name)?,
                evaluate: workload.program(&format!("evaluate.{tokens}")),
                inputs: InputIds {
                    ids: input("ids")?,
                    embedding_ids: workload.find(&format!("inputs.{tokens}.embedding_ids")),
                    positions: input("positions")?,
                    document_start: input("document_start")?,
                    document_end: input("document_end")?,
                    targets: input("targets")?,
                    token_weights: input("token_weights")?,
                    losses: input("losses")?,
                },
            };
            sizes.insert(tokens, ids);
        }
        let (begin, update, refresh) = (program("begin")?, program("update")?, workload.program("refresh"));
        let (loss_scale, loss_sum) = (buffer("loss_scale")?, buffer("loss_sum")?);
        let (grad_norm, hyper, key) = (buffer("grad_norm")?, buffer("hyper")?, buffer("random_key")?);
        let lora_scale = workload.find("lora_scale");
        Ok(Self {
            session,
            sizes,
            begin,
            update,
            refresh,
            loss_scale,
            loss_sum,
            grad_norm,
            hyper,
            key,
            lora_scale,
            seed,
            betas,
            padding_token,
        })
    }

    pub fn workload(&self) -> &Workload {
        &self.session.plan().workload
    }

    /// Writes an adapter's matrices and scale.
    ///
    /// # Errors
    /// When the device fails.
    pub fn load_adapter(&mut self, adapter: &Adapter) -> Result<(), EngineError> {
        for (name, tensor) in &adapter.tensors {
            self.write_tensor(name, &tensor.values)?;
        }
        self.set_lora_scale(adapter.scale())?;
        self.refresh()
    }

    /// 0 gives the base model.
    ///
    /// # Errors
    /// When the device fails.
    pub fn set_lora_scale(&mut self, scale: f32) -> Result<(), EngineError> {
        match self.lora_scale {
            Some(buffer) => self.session.write(buffer, bytemuck::bytes_of(&scale)),
            None => Ok(()),
        }
    }

    /// Brings the adapter's copies in the compute type up to date.
    ///
    /// # Errors
    /// When the device fails.
    pub fn refresh(&mut self) -> Result<(), EngineError> {
        self.refresh.map_or(Ok(()), |program| self.session.run(program))
    }

    /// Writes a whole f32 buffer by name.
    ///
    /// # Errors
    /// When there is none of that name, or the device fails.
    pub fn write_tensor(&mut self, name: &str, values: &[f32]) -> Result<(), EngineError> {
        let buffer = self.named(name)?;
        self.session.write(buffer, bytemuck::cast_slice(values))
    }

    /// Reads a whole f32 buffer by name.
    ///
    /// # Errors
    /// When there is none of that name, or the device fails.
    pub fn read_tensor(&mut self, name: &str) -> Result<Vec<f32>, EngineError> {
        let buffer = self.named(name)?;
        read_values(&mut *self.session, buffer)
    }

    fn named(&self, name: &str) -> Result<BufferId, EngineError> {
        self.workload().find(name).ok_or_else(|| EngineError::Unsupported {
            engine: "trainer",
            what: format!("the workload has no buffer {name}"),
        })
    }

    /// The adapter as it stands on the device, with the tensors of `like`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read_adapter(&mut self, like: &Adapter) -> Result<Adapter, EngineError> {
        let mut adapter = like.clone();
        for (name, tensor) in &mut adapter.tensors {
            tensor.values = self.read_tensor(name)?;
        }
        Ok(adapter)
    }

    /// Names of the trained tensors, in the workload's order.
    pub fn trained(&self) -> Vec<String> {
        self.workload()
            .of_kind(Kind::Gradient)
            .filter_map(|(_, buffer)| buffer.name.strip_suffix(".grad").map(str::to_string))
            .collect()
    }

    /// Sums the gradients of an update, without changing parameters; returns the mean loss. `step` counts from 0.
    ///
    /// # Errors
    /// When the device fails.
    pub fn accumulate(&mut self, batches: &[MicroBatch], step: u64) -> Result<f64, EngineError> {
        self.start(batches)?;
        for (index, batch) in batches.iter().enumerate() {
            self.write_key(step, index as u32)?;
            let program = self.size(batch).micro;
            self.write_inputs(batch)?;
            self.session.run(program)?;
        }
        Ok(f64::from(self.scalar(self.loss_sum)?))
    }

    /// One update: gradients of all micro-batches, then the optimizer. `step` counts from 0.
    ///
    /// # Errors
    /// When the device fails.
    pub fn update(&mut self, batches: &[MicroBatch], step: u64, rate: f64) -> Result<StepResult, EngineError> {
        let count = step as i32 + 1;
        let corrections = [1.0 - self.betas[0].powi(count), (1.0 - self.betas[1].powi(count)).sqrt()];
        let hyper = [rate as f32, corrections[0] as f32, corrections[1] as f32, 0.0];
        self.session.write(self.hyper, bytemuck::cast_slice(&hyper))?;
        self.start(batches)?;
        for (index, batch) in batches.iter().enumerate() {
            self.write_key(step, index as u32)?;
            let program = self.size(batch).micro;
            self.write_inputs(batch)?;
            self.session.run(program)?;
        }
        self.session.run(self.update)?;
        let loss = f64::from(self.scalar(self.loss_sum)?);
        let grad_norm = f64::from(self.scalar(self.grad_norm)?);
        Ok(StepResult { loss, grad_norm, applied: grad_norm.is_finite() })
    }

    /// Makes the scale of gradients smaller, for an update that overflowed; gives the scale before and the one now. None where
    /// there is no scale, or it is so small that it was not the reason.
    ///
    /// # Errors
    /// When the device fails.
    pub fn shrink_gradients(&mut self) -> Result<Option<(f32, f32)>, EngineError> {
        let Some(from) = self.session.gradient_scale().filter(|&scale| scale > LEAST_GRADIENT_SCALE) else {
            return Ok(None);
        };
        let to = from / 4.0;
        self.session.set_gradient_scale(to)?;
        Ok(Some((from, to)))
    }

    /// Mean loss over the label tokens of all batches. `between` runs after each; false ends the evaluation early
    /// and gives none.
    ///
    /// # Errors
    /// When the device fails or the workload has no evaluation.
    pub fn evaluate(
        &mut self,
        batches: &[MicroBatch],
        mut between: impl FnMut() -> bool,
    ) -> Result<Option<f64>, EngineError> {
        self.start(batches)?;
        for batch in batches {
            let program = self.size(batch).evaluate.ok_or_else(|| EngineError::Unsupported {
                engine: "trainer",
                what: "the workload has no evaluation".into(),
            })?;
            self.write_inputs(batch)?;
            self.session.run(program)?;
            if !between() {
                return Ok(None);
            }
        }
        Ok(Some(f64::from(self.scalar(self.loss_sum)?)))
    }

    /// Negative log-likelihood of every token of a batch, 0 where there is no label.
    ///
    /// # Errors
    /// As [`Stepper::evaluate`].
    pub fn token_losses(&mut self, batch: &MicroBatch) -> Result<Vec<f32>, EngineError> {
        self.evaluate(std::slice::from_ref(batch), || true)?;
        let losses = self.size(batch).inputs.losses;
        read_values(&mut *self.session, losses)
    }

    /// Index of the program that ran a micro-batch, and the same batch's inputs written again: for looking at one
    /// operation after the other.
    ///
    /// # Errors
    /// When the device fails.
    pub fn prepare(&mut self, batches: &[MicroBatch], index: usize, step: u64) -> Result<usize, EngineError> {
        self.start(batches)?;
        self.write_key(step, index as u32)?;
        self.write_inputs(&batches[index])?;
        Ok(self.size(&batches[index]).micro)
    }

    fn start(&mut self, batches: &[MicroBatch]) -> Result<(), EngineError> {
        let labels: usize = batches.iter().map(|batch| batch.label_tokens).sum();
        let scale = 1.0 / labels.max(1) as f32;
        self.session.write(self.loss_scale, bytemuck::bytes_of(&scale))?;
        self.session.run(self.begin)
    }

    fn write_key(&mut self, step: u64, micro: u32) -> Result<(), EngineError> {
        let key = [self.seed as u32, (self.seed >> 32) as u32, step as u32, micro];
        self.session.write(self.key, bytemuck::cast_slice(&key))
    }

    fn write_inputs(&mut self, batch: &MicroBatch) -> Result<(), EngineError> {
        let inputs = &self.sizes[&batch.size].inputs;
        let words = [
            (inputs.ids, &batch.ids),
            (inputs.positions, &batch.positions),
            (inputs.document_start, &batch.document_start),
            (inputs.document_end, &batch.document_end),
            (inputs.targets, &batch.targets),
        ];
        for (buffer, values) in words {
            self.session.write(buffer, bytemuck::cast_slice(values))?;
        }
        if let Some(buffer) = inputs.embedding_ids {
            let trained = |&id: &i32| if Some(id as u32) == self.padding_token { -1 } else { id };
            let ids: Vec<i32> = batch.ids.iter().map(trained).collect();
            self.session.write(buffer, bytemuck::cast_slice(&ids))?;
        }
        self.session.write(inputs.token_weights, bytemuck::cast_slice(&batch.token_weights))
    }

    fn size(&self, batch: &MicroBatch) -> &SizeIds {
        &self.sizes[&batch.size]
    }

    fn scalar(&mut self, buffer: BufferId) -> Result<f32, EngineError> {
        Ok(read_values::<f32>(&mut *self.session, buffer)?[0])
    }
}
