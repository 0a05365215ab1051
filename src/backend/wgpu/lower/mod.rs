//! From operations to dispatches: which kernel, on which ranges of which buffers, with what parameters.
//!
//! Lowering opens no device. Kernels are collected once each, so that they can be compiled side by side; a dispatch
//! names its kernel by number.

mod attention;
mod choice;
mod linear;
mod loss;
mod optimizer;
mod product;
mod rows;

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

pub use choice::{Choices, Question, Work};

use super::kernel::{Binding, Element, Kernel, Value};
use super::storage::{Cut, Limits, Place, Storage, View};
use crate::backend::EngineError;
use crate::program::plan::ROW_UNIT;
use crate::program::{BufferId, DType, Op, Plan};

/// What lowering knows of the device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Facts {
    /// Half-precision storage and arithmetic.
    pub f16: bool,
    /// Sums and largest values over a subgroup at once.
    pub subgroups: bool,
    /// 16x16x16 products of f16 summed in f32.
    pub cooperative: bool,
    pub limits: Limits,
    pub workgroup_bytes: u32,
    /// The adapter runs on the processor.
    pub software: bool,
    /// Workgroups that keep the device busy.
    pub workgroups: u32,
    /// Candidates are measured; else rules decide.
    pub measures: bool,
    /// Iterations, of all loops together, after which the driver ends a shader's loops: Mesa's software adapters do so
    /// at 65,536 and say nothing.
    pub loop_limit: Option<usize>,
    /// [`GradientScale::factor`] of f16 programs.
    pub gradient_factor: f32,
}

/// [`Facts::loop_limit`] of software adapters, with room for loops that nobody counts.
pub const SOFTWARE_LOOP_LIMIT: usize = 60_000;

/// What helps where a binding or a launch is too small.
const NARROWER: &str = "lower data.max_length (or a chat's --context), or choose another device";

/// Workgroups of a launch in each of its three directions.
const MOST_WORKGROUPS: usize = 65535;

/// One launch of a kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Dispatch {
    pub kernel: usize,
    /// Place, offset and bytes of each binding.
    pub bindings: Vec<(Place, u64, u64)>,
    pub parameters: Vec<u8>,
    /// Among the parameters is [`GradientScale::factor`].
    pub scaled: bool,
    pub grid: [u32; 3],
}

/// How f16 gradients relate to true ones. Inside the engine they carry the factor `factor / loss_scale`, which
/// depends on nothing but the model; whatever adds to a parameter's gradient takes it out again.
#[derive(Clone, Copy, Debug)]
pub struct GradientScale {
    pub factor: f32,
    /// The loss scale, f32 `[1]`.
    pub loss_scale: View,
}

/// Gradients of logits are at most this when an f16 program begins, less where they overflow: token weights of 1 leave 2^5 of headroom for the layers
/// below to amplify by a thousand, while 2^-24, the smallest f16, is 2^-35 of it.
pub const HALF_GRADIENT_FACTOR: f32 = 64.0;

pub struct Lowering<'a> {
    plan: &'a Plan,
    storage: &'a Storage,
    pub facts: Facts,
    pub kernels: Vec<Kernel>,
    numbers: HashMap<Kernel, usize>,
    pub dispatches: Vec<Dispatch>,
    /// Bytes of scratch that the largest dispatch wants.
    pub scratch: u64,
    /// Bytes of the largest unpacked weight.
    pub unpacked: u64,
    pub gradient_scale: Option<GradientScale>,
    choices: &'a Choices,
    /// Choices that were asked for.
    pub used: Choices,
    /// What was decided without a measurement.
    pub questions: Vec<Question>,
}

/// A launch being written.
pub struct Call {
    kernel: Kernel,
    bindings: Vec<(Place, u64, u64)>,
    parameters: Vec<u8>,
    scaled: bool,
    missing: Option<DType>,
    /// A buffer of which it wants more than a piece.
    apart: Option<&'static str>,
    /// Of all loops of one thread together, where they grow with the data.
    iterations: usize,
}

impl<'a> Lowering<'a> {
    pub fn new(plan: &'a Plan, storage: &'a Storage, facts: Facts, choices: &'a Choices) -> Lowering<'a> {
        let gradient_scale = loss_scale_of_half_gradients(plan)
            .map(|scale| GradientScale { factor: facts.gradient_factor, loss_scale: storage.view(scale) });
        Lowering {
            plan,
            storage,
            facts,
            kernels: Vec::new(),
            numbers: HashMap::new(),
            dispatches: Vec::new(),
            scratch: 0,
            unpacked: 0,
            gradient_scale,
            choices,
            used: Choices::new(),
            questions: Vec::new(),
        }
    }

    /// Appends the dispatches of an operation.
    ///
    /// # Errors
    /// When a buffer's type or size is beyond the engine on this adapter.
    pub fn op(&mut self, op: &Op) -> Result<(), EngineError> {
        match op {
            Op::Embedding { .. }
            | Op::EmbeddingBackward { .. }
            | Op::RmsNorm { .. }
            | Op::RmsNormBackward { .. }
            | Op::Rope { .. }
            | Op::Glu { .. }
            | Op::GluBackward { .. }
            | Op::GatherRows { .. } => self.rows(op),
            Op::Linear { input, projections } => self.linear(*input, projections),
            Op::LinearBackward { input, grad_input, projections } => {
                self.linear_backward(*input, *grad_input, projections)
            }
            Op::Attention { .. } | Op::AttentionBackward { .. } | Op::CachedAttention { .. } => self.attention(op),
            Op::LinearCrossEntropy { .. } => self.linear_cross_entropy(op),
            // Copies run in order.
            Op::Wait { .. } => Ok(()),
            Op::Cast { .. } | Op::Zero { .. } | Op::GradientNorm { .. } | Op::AdamW { .. } => self.optimizer(op),
        }
    }

    fn view(&self, id: BufferId) -> View {
        self.storage.view(id)
    }

    /// The columns of a wider buffer as a view.
    fn columns(&self, columns: &crate::program::Columns) -> View {
        View { start: columns.start, width: columns.width, ..self.view(columns.buffer) }
    }

    /// Ranges of the rows that these views have, first row and count, of at most so many: one, but where a view lies in pieces.
    fn row_ranges(&self, views: &[View], most: usize) -> Vec<(usize, usize)> {
        let rows = views.first().map_or(0, |view| view.rows);
        let mut ranges = Vec::new();
        let mut first = 0;
        while first < rows {
            let ends = views.iter().filter_map(|view| self.storage.rows_in_piece(&view.slice_rows(first, 1)));
            let count = ends.fold(rows - first, usize::min);
            let count = if count > most { (most / ROW_UNIT * ROW_UNIT).max(ROW_UNIT) } else { count };
            ranges.push((first, count));
            first += count;
        }
        ranges
    }

    /// Scratch for an array of f32. Every dispatch may use it, none keeps anything there past the next use.
    fn scratch(&mut self, elements: usize) -> View {
        let view = View {
            place: Place::Scratch,
            offset: 0,
            dtype: DType::F32,
            rows: 1,
            stride: elements,
            start: 0,
            width: elements,
        };
        self.scratch = self.scratch.max(view.bytes().next_multiple_of(256));
        view
    }

    /// Rows and columns of the tensor that a view is part of.
    pub(super) fn whole(&self, view: &View) -> (usize, usize) {
        self.storage.whole(view)
    }

    /// How the tensor that a view is part of is cut, if it is.
    pub(super) fn cut(&self, view: &View) -> Option<Cut> {
        self.storage.cut(view.place)
    }

    /// The type to which quantized weights are unpacked.
    pub(super) fn unpacked_type(&self) -> DType {
        if self.facts.f16 && self.plan.target.compute == DType::F16 { DType::F16 } else { DType::F32 }
    }

    pub(super) fn reserve_unpacked(&mut self, view: &View) {
        self.unpacked = self.unpacked.max(view.bytes().next_multiple_of(256));
    }

    pub(super) fn call(&self, file: &'static str) -> Call {
        Call {
            kernel: Kernel { file, constants: BTreeMap::new(), bindings: Vec::new(), parameters: Vec::new() },
            bindings: Vec::new(),
            parameters: Vec::new(),
            scaled: false,
            missing: None,
            apart: None,
            iterations: 0,
        }
    }

    /// Of a shader that sums over its workgroup (workgroup_reduce.wgsl).
    pub(super) fn reducing(&self, file: &'static str) -> Call {
        let mut call = self.call(file);
        call.flag("SUBGROUPS", self.sums_by_subgroups());
        call
    }

    pub(super) fn launch(&mut self, call: Call, grid: [usize; 3]) -> Result<(), EngineError> {
        let unsupported = |what: String| EngineError::Unsupported { engine: super::adapter::ENGINE, what };
        let file = call.kernel.file;
        if let Some(dtype) = call.missing {
            return Err(unsupported(format!("{file} on a {} buffer", dtype.name())));
        }
        if let Some(name) = call.apart {
            let limit = self.facts.limits.binding;
            return Err(unsupported(format!(
                "{file} needs all of its {name}, more than the {limit} bytes that the adapter binds; {NARROWER}"
            )));
        }
        if let Some(limit) = self.facts.loop_limit.filter(|&limit| call.iterations > limit) {
            return Err(unsupported(format!(
                "{file} takes {} iterations: this software adapter ends loops after {limit}; lower data.max_length, or \
                 use the cpu engine, which is faster here",
                call.iterations
            )));
        }
        if let Some(&(_, _, bytes)) = call.bindings.iter().find(|binding| binding.2 > self.facts.limits.binding) {
            return Err(unsupported(format!(
                "{file} on a buffer of {bytes} bytes: the adapter binds at most {}; {NARROWER}",
                self.facts.limits.binding
            )));
        }
        if grid.iter().any(|&count| count > MOST_WORKGROUPS) {
            let what = format!("{file} in {grid:?} workgroups: at most {MOST_WORKGROUPS} each way; {NARROWER}");
            return Err(unsupported(what));
        }
        if grid.contains(&0) {
            return Ok(());
        }
        let next = self.kernels.len();
        let kernel = *self.numbers.entry(call.kernel.clone()).or_insert(next);
        if kernel == next {
            self.kernels.push(call.kernel.clone());
        }
        let grid = grid.map(|count| count as u32);
        let Call { bindings, parameters, scaled, .. } = call;
        self.dispatches.push(Dispatch { kernel, bindings, parameters, scaled, grid });
        Ok(())
    }

    /// Binds a buffer element by element.
    pub(super) fn bind(&self, call: &mut Call, name: &'static str, view: &View) {
        self.bind_as(call, name, view, false);
    }

    /// Binds a buffer as vec4 when `vector`.
    pub(super) fn bind_as(&self, call: &mut Call, name: &'static str, view: &View, vector: bool) {
        let Some(element) = Element::of(view.dtype, self.facts.f16) else {
            call.missing = Some(view.dtype);
            return;
        };
        let unit = if vector { 16 } else { 4 };
        self.bind_element(call, name, view, element, unit);
        if let Some(binding) = call.kernel.bindings.last_mut() {
            binding.vector = vector;
        }
    }

    /// Binds a buffer as an array of `element`, in whole `unit`s of bytes.
    pub(super) fn bind_element(&self, call: &mut Call, name: &'static str, view: &View, element: Element, unit: u64) {
        let writable = self.storage.is_writable(view.place);
        call.kernel.bindings.push(Binding { name, element, vector: false, writable });
        match self.storage.bound(view) {
            Some((place, offset)) => call.bindings.push((place, offset, view.bytes().next_multiple_of(unit))),
            None => call.apart = Some(name),
        }
    }

    /// Binds a buffer of codes as its words.
    fn bind_words(&self, call: &mut Call, name: &'static str, view: &View) {
        let words = view.dtype.bytes(&[view.rows, view.stride]).div_ceil(4) as usize;
        self.bind(call, name, &View { dtype: DType::U32, rows: 1, stride: words, start: 0, width: words, ..*view });
    }

    /// Binds what takes the f16 gradient scale out again, where gradients are f16; returns the factor beside it.
    fn bind_unscale(&self, call: &mut Call, gradient: DType) -> f32 {
        match self.gradient_scale {
            Some(scale) if gradient == DType::F16 => {
                call.constant("UNSCALE", 1);
                call.scaled = true;
                self.bind(call, "unscale", &scale.loss_scale);
                1.0 / scale.factor
            }
            _ => 1.0,
        }
    }
}

/// The loss scale of a plan whose gradients of activations are f16. A loss whose gradient goes nowhere is given as
/// it is.
fn loss_scale_of_half_gradients(plan: &Plan) -> Option<BufferId> {
    let ops = || plan.workload.programs.iter().flat_map(|program| program.steps.iter().map(|step| &step.op));
    let goes_on = ops()
        .any(|op| matches!(op, Op::LinearBackward { .. } | Op::RmsNormBackward { .. } | Op::EmbeddingBackward { .. }));
    let scale = ops().find_map(|op| match op {
        Op::LinearCrossEntropy { scale, grad_input: Some(grad), .. }
            if plan.workload.buffer(*grad).dtype == DType::F16 =>
        {
            Some(*scale)
        }
        _ => None,
    });
    scale.filter(|_| goes_on)
}

impl Call {
    pub(super) fn constant(&mut self, name: &'static str, value: u32) -> &mut Self {
        self.kernel.constants.insert(name, value);
        self
    }

    pub(super) fn flag(&mut self, name: &'static str, on: bool) -> &mut Self {
        if on {
            self.constant(name, 1);
        }
        self
    }

    /// Iterations of all loops of one thread, at most.
    fn iterations(&mut self, count: usize) -> &mut Self {
        self.iterations = count;
        self
    }

    pub(super) fn number(&mut self, name: &'static str, value: usize) -> &mut Self {
        self.parameter(name, Value::U32(value as u32))
    }

    fn float(&mut self, name: &'static str, value: f32) -> &mut Self {
        self.parameter(name, Value::F32(value))
    }

    fn parameter(&mut self, name: &'static str, value: Value) -> &mut Self {
        let (float, bytes) = match value {
            Value::U32(value) => (false, value.to_le_bytes()),
            Value::F32(value) => (true, value.to_le_bytes()),
        };
        self.kernel.parameters.push((name, float));
        self.parameters.extend_from_slice(&bytes);
        self
    }
}
