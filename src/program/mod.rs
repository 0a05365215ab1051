//! A training step as data: buffers, operations, programs, and the plan made of them.
//!
//! A [`Workload`] is a table of buffers and a few [`Program`]s over it. Builders in `model/` write it, `plan`
//! lays it out in memory, engines in `backend/` run it. Nothing here knows a model or a device.

mod access;
pub mod block8;
mod buffer;
mod build;
mod op;
pub mod plan;
pub mod random;
pub mod spare;
mod target;

pub use buffer::{Buffer, BufferId, Columns, DType, Kind};
pub use build::WorkloadBuilder;
pub use op::{
    Access, Activation, AdamWPart, AttentionShape, Direction, Dropout, Lora, LoraBackward, Op, Projection,
    ProjectionBackward,
};
pub use plan::{Placement, Plan, PlanError};
pub use target::{NormLimits, Rates, Target};

use serde::Serialize;

/// What a program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Forward and backward of one micro-batch, accumulating gradients.
    Micro,
    /// Gradient norm, clipping, optimizer; gradients are zero afterwards.
    Update,
    /// Forward and loss of one micro-batch, no gradients.
    Evaluate,
    /// Many tokens of one sequence through the key-value cache.
    Prefill,
    /// One token of one sequence.
    Decode,
}

/// An operation with a stable name (`layers.3.attn.qkv`), the same wherever it stands in the list.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    pub name: String,
    #[serde(flatten)]
    pub op: Op,
}

/// A static list of operations over static shapes.
#[derive(Clone, Debug, Serialize)]
pub struct Program {
    /// `micro.1024`, `update`, `decode`.
    pub name: String,
    pub role: Role,
    /// Rows of the program's inputs; 0 for `update`.
    pub tokens: usize,
    pub steps: Vec<Step>,
}

/// Programs over one table of buffers.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Workload {
    pub buffers: Vec<Buffer>,
    pub programs: Vec<Program>,
    /// Contents of [`Kind::Constant`] buffers.
    #[serde(skip)]
    pub constants: Vec<(BufferId, Vec<f32>)>,
    /// Tokens of the longest document that a packed micro-batch holds, where it is known: attention's arithmetic.
    pub longest_document: Option<usize>,
}

impl Workload {
    pub fn buffer(&self, id: BufferId) -> &Buffer {
        &self.buffers[id.index()]
    }

    /// The buffer whose memory a buffer lies in: itself, but for rows of another.
    pub fn whole(&self, id: BufferId) -> BufferId {
        self.buffer(id).within.map_or(id, |(whole, _)| whole)
    }

    pub fn find(&self, name: &str) -> Option<BufferId> {
        self.buffers.iter().position(|buffer| buffer.name == name).map(|index| BufferId(index as u32))
    }

    /// Index of the program with this name.
    pub fn program(&self, name: &str) -> Option<usize> {
        self.programs.iter().position(|program| program.name == name)
    }

    /// Buffers of one kind, in table order.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = (BufferId, &Buffer)> {
        self.buffers
            .iter()
            .enumerate()
            .filter(move |(_, buffer)| buffer.kind == kind)
            .map(|(index, buffer)| (BufferId(index as u32), buffer))
    }
}

impl Program {
    pub fn flops(&self, workload: &Workload) -> u64 {
        self.steps.iter().map(|step| step.op.flops(workload)).sum()
    }

    pub fn bytes_moved(&self, workload: &Workload) -> u64 {
        self.steps.iter().map(|step| step.op.bytes_moved(workload)).sum()
    }

    /// Whether an engine does without the operation at `at`, which is made again for the gradients of LoRA branches that come with
    /// those of others: a gated product or a norm. That nothing else reads it is taken for granted: builders make it for this.
    pub fn does_without(&self, workload: &Workload, at: usize, target: &Target) -> bool {
        self.does_without_product(workload, at, target.gated_rank) || self.does_without_norm(workload, at, target)
    }

    /// A norm that is read for nothing but the gradients of `a` of the branches that read it, which come with its own where
    /// branches and columns are such as a target takes ([`Target::norms`]).
    fn does_without_norm(&self, workload: &Workload, at: usize, target: &Target) -> bool {
        let Op::RmsNorm { output, residual: None, .. } = &self.steps[at].op else { return false };
        let mut later = self.steps[at + 1..].iter().map(|step| &step.op);
        let reads = |op: &&Op| op.accesses().iter().any(|&(id, _)| id == *output);
        let Some(Op::LinearBackward { grad_input: Some(grad_input), projections, .. }) = later.find(reads) else {
            return false;
        };
        let Some(Op::RmsNormBackward { grad_output, grad_weight: None, .. }) = later.next() else { return false };
        let loras = || projections.iter().filter_map(|projection| projection.lora.as_ref());
        let ranks: usize = loras().map(|lora| lora.middle.width).sum();
        let shape = (workload.buffer(*output).rows(), workload.buffer(*output).columns());
        grad_input == grad_output
            && target.norms.is_some_and(|norms| norms.take(shape, ranks))
            && loras().all(|lora| lora.dropout.is_none() && lora.middle.width.is_multiple_of(8))
            && projections.iter().all(|projection| workload.buffer(projection.weight).dtype != DType::Fp8)
    }

    /// A gated product that is made again for nothing but the gradient of `a` of the branch that read it, which comes with the
    /// gradients of gate and up where the branches have at most the rank `most` ([`Target::gated_rank`]).
    fn does_without_product(&self, workload: &Workload, at: usize, most: usize) -> bool {
        let ops: Vec<&Op> = self.steps[at..].iter().take(4).map(|step| &step.op).collect();
        let &[
            Op::Glu { gate_up, output, .. },
            Op::LinearBackward { input, grad_input: Some(grad_product), projections: down },
            Op::GluBackward { grad_output, gate_up: made_from, grad_gate_up, .. },
            Op::LinearBackward { grad_input: Some(_), projections: gate_and_up, .. },
        ] = ops.as_slice()
        else {
            return false;
        };
        let joined = output == input && grad_product == grad_output && gate_up == made_from && down.len() == 1;
        let fits = |projection: &ProjectionBackward| {
            let lora = projection.lora.as_ref().filter(|lora| lora.dropout.is_none());
            let rank = lora.map_or(usize::MAX, |lora| lora.middle.width);
            rank <= most && rank.is_multiple_of(8) && workload.buffer(projection.weight).dtype != DType::Fp8
        };
        joined
            && gate_and_up.len() == 2
            && gate_and_up.iter().all(|projection| projection.grad_output.buffer == *grad_gate_up)
            && down.iter().chain(gate_and_up).all(fits)
    }
}
