//! From operations to launches.
//!
//! Everything is decided once, when a session opens: kernel variants, grids, pointers, product algorithms. Running
//! a program is then a walk over a list, or the replay of a graph made from it.

pub(super) mod attention;
pub(super) mod delta;
mod dropout;
mod elementwise;
mod fp8;
pub(super) mod gated;
mod head;
mod linear;
pub(super) mod lora;
pub(super) mod norm;
mod optimizer;
mod quantized;
pub(super) mod rotated;
mod tiling;

pub(super) use norm::{has_clusters, limits as norm_limits};
pub(super) use tiling::gated_rank;

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use super::command::{Command, Launch, Slot};
use super::compile::{Kernels, Variant};
use super::driver::{Card, DeviceMemory, Event, Lane, failed, unsupported};
use super::memory::Memory;
use super::product::{Matrix, Product, Products};
use super::tables::Tables;
use crate::backend::EngineError;
use crate::program::{BufferId, Columns, DType, Op, Program, ProjectionBackward, Workload};
use gated::Reader;
use norm::{Above, Clusters};
use tiling::Room;

pub(super) struct Lowering<'a> {
    pub card: &'a Arc<Card>,
    pub workload: &'a Workload,
    pub memory: &'a Memory,
    pub kernels: &'a mut Kernels,
    pub products: &'a mut Products,
    pub tables: &'a Tables,
    /// Tables that launches point to; they live as long as the session.
    pub kept: &'a mut Vec<DeviceMemory>,
    clusters: Clusters,
    commands: Vec<Command>,
    mark: Option<Rc<Event>>,
    /// The activations over which LoRA branches' sums came with the operation before: until the next is lowered.
    summed: Option<BufferId>,
    /// The branch whose gradient comes with that of the gated product which it read, or of attention.
    reader: Option<Reader>,
    /// The branches whose gradients of `a` come with that of the norm which they read.
    above: Option<Above>,
    /// The gradient over which the sums of the branch below came with it: until the operation that takes it is lowered.
    summed_below: Option<BufferId>,
    /// Copies on their way, by the buffer in the host's memory.
    copying: HashMap<BufferId, Rc<Event>>,
}

impl<'a> Lowering<'a> {
    pub fn new(
        card: &'a Arc<Card>,
        workload: &'a Workload,
        memory: &'a Memory,
        kernels: &'a mut Kernels,
        products: &'a mut Products,
        tables: &'a Tables,
        kept: &'a mut Vec<DeviceMemory>,
    ) -> Self {
        Self {
            card,
            workload,
            memory,
            kernels,
            products,
            tables,
            kept,
            clusters: Clusters::default(),
            commands: Vec::new(),
            mark: None,
            summed: None,
            reader: None,
            above: None,
            summed_below: None,
            copying: HashMap::new(),
        }
    }

    /// For a card on which so many clusters run at once.
    pub fn with_clusters(self, clusters: Clusters) -> Self {
        Self { clusters, ..self }
    }

    /// The launches of the first operation of these; what later ones can have from the same kernel is among them, and what
    /// they do without is not.
    ///
    /// # Errors
    /// When the operation has a shape or type that no kernel here takes.
    pub fn lower(&mut self, program: &Program, at: usize) -> Result<Vec<Command>, EngineError> {
        let (op, next) = (&program.steps[at].op, program.steps.get(at + 1).map(|next| &next.op));
        if self.is_left_out(program, at)? || self.norm_is_left_out(program, at)? {
            self.summed = None;
        } else if !self.gated_with_branches(op, next)?
            && !self.attention_with_branch(op, next)?
            && !self.rotated_with_branches(op, next)?
            && !self.norm_with_branches(op, next)?
            && !self.norm_backward_with_sums(program, at)?
        {
            if matches!(op, Op::LinearBackward { .. }) {
                self.reader = self.reader(program, at)?.or_else(|| self.attention_reader(op, next));
                self.above = self.above(program, at)?;
            }
            self.lower_alone(op)?;
            self.summed = None;
            let takes = |projection: &ProjectionBackward| self.summed_below == Some(projection.grad_output.buffer);
            if matches!(op, Op::LinearBackward { projections, .. } if projections.iter().any(takes)) {
                self.summed_below = None;
            }
        }
        Ok(std::mem::take(&mut self.commands))
    }

    fn lower_alone(&mut self, op: &Op) -> Result<(), EngineError> {
        match op {
            Op::Embedding { .. }
            | Op::EmbeddingBackward { .. }
            | Op::RmsNorm { .. }
            | Op::RmsNormBackward { .. }
            | Op::Rope { .. }
            | Op::Glu { .. }
            | Op::GluBackward { .. }
            | Op::GatherRows { .. }
            | Op::Cast { .. }
            | Op::Zero { .. } => self.elementwise(op)?,
            Op::Wait { buffers } => {
                let arrived: Vec<Rc<Event>> = buffers.iter().filter_map(|id| self.copying.remove(id)).collect();
                self.commands.extend(arrived.into_iter().map(|event| Command::Hold(event, Lane::Main)));
            }
            Op::Linear { input, projections } => self.linear(*input, projections)?,
            Op::LinearBackward { input, grad_input, projections } => {
                self.linear_backward(*input, *grad_input, projections)?;
            }
            Op::Attention { .. } | Op::AttentionBackward { .. } | Op::CachedAttention { .. } => self.attention(op)?,
            Op::LinearCrossEntropy { .. } => self.head(op)?,
            Op::GradientNorm { gradients, norm } => self.gradient_norm(gradients, *norm)?,
            Op::AdamW { .. } => self.adamw(op)?,
        }
        Ok(())
    }

    /// What kernels that sum for LoRA branches may use.
    fn room(&self) -> Room {
        let (multiprocessors, workspace) = (self.card.multiprocessors as usize, self.products.workspace().1 as usize);
        Room { multiprocessors, shared: self.card.shared_bytes, workspace }
    }

    fn launch(
        &mut self,
        file: &'static str,
        entry: &str,
        grid: [usize; 3],
        threads: u32,
        arguments: Vec<Slot>,
    ) -> Result<(), EngineError> {
        self.launch_variant(&file.into(), entry, grid, threads, 0, arguments)
    }

    fn launch_variant(
        &mut self,
        file: &Variant,
        entry: &str,
        grid: [usize; 3],
        threads: u32,
        shared_bytes: usize,
        arguments: Vec<Slot>,
    ) -> Result<(), EngineError> {
        let function = self.kernels.function(file, entry)?;
        if grid[0] > i32::MAX as usize || grid[1] > 65_535 || grid[2] > 65_535 {
            return Err(unsupported(format!("{entry} would need a grid of {grid:?} blocks")));
        }
        if shared_bytes > self.card.shared_bytes {
            let has = self.card.shared_bytes;
            let what = format!("{entry} takes {shared_bytes} bytes of shared memory a block, this card has {has}");
            return Err(unsupported(format!("{what}; use --device wgpu")));
        }
        if shared_bytes > 48 << 10 {
            use super::driver::During;
            let attribute = cudarc::driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was just found in a loaded module.
            unsafe {
                cudarc::driver::result::function::set_function_attribute(function, attribute, shared_bytes as i32)
            }
            .during(&format!("giving {entry} {shared_bytes} bytes of shared memory"))?;
        }
        self.commands.push(Command::Launch(Launch {
            function,
            grid: grid.map(|n| n as u32),
            threads,
            shared_bytes: shared_bytes as u32,
            arguments,
            entry: entry.to_string(),
        }));
        Ok(())
    }

    /// The end of a program.
    ///
    /// # Errors
    /// When a copy was started that nothing waits for, or a sum left to an operation that does not come: the workload is wrong.
    pub fn end(&self, program: &str) -> Result<(), EngineError> {
        if self.reader.is_some() || self.above.is_some() || self.summed_below.is_some() {
            return Err(failed(format!("{program} leaves sums for LoRA branches to an operation that does not come")));
        }
        match self.copying.keys().next() {
            Some(id) => Err(failed(format!("{program} does not wait for {}", self.workload.buffer(*id).name))),
            None => Ok(()),
        }
    }

    fn product(&mut self, product: Product) -> Result<(), EngineError> {
        let prepared = self.products.prepare(product)?;
        self.commands.push(Command::Product(Box::new(prepared)));
        Ok(())
    }

    /// Lets `to` go on only when `from` has come to this point.
    fn order(&mut self, from: Lane, to: Lane) -> Result<(), EngineError> {
        if from == to {
            return Ok(());
        }
        // A wait takes the point that is marked when it is given: one event serves them all.
        let mark = match &self.mark {
            Some(mark) => mark.clone(),
            None => self.mark.insert(Rc::new(Event::mark(self.card)?)).clone(),
        };
        self.commands.push(Command::Mark(mark.clone(), from));
        self.commands.push(Command::Hold(mark, to));
        Ok(())
    }

    fn zero(&mut self, pointer: u64, bytes: u64) {
        self.commands.push(Command::Zero { pointer, bytes });
    }

    fn address(&self, id: BufferId) -> u64 {
        self.memory.address(id)
    }

    fn optional(&self, id: Option<BufferId>) -> u64 {
        id.map_or(0, |id| self.address(id))
    }

    fn matrix(&self, id: BufferId) -> Matrix {
        self.memory.matrix(self.workload, id)
    }

    fn columns(&self, columns: Columns) -> Matrix {
        self.memory.columns(self.workload, columns)
    }

    fn rows(&self, id: BufferId) -> usize {
        self.workload.buffer(id).rows()
    }

    fn width(&self, id: BufferId) -> usize {
        self.workload.buffer(id).columns()
    }

    /// Refuses buffers that are held in another type than the kernels of an operation take.
    fn expect(&self, op: &str, ids: &[BufferId], dtype: DType) -> Result<(), EngineError> {
        for &id in ids {
            if self.memory.stored(id) != dtype {
                let buffer = self.workload.buffer(id);
                let (held, wanted) = (self.memory.stored(id).name(), dtype.name());
                return Err(unsupported(format!("{op} with {} in {held}; its kernels take {wanted}", buffer.name)));
            }
        }
        Ok(())
    }

    /// A table in device memory that lives as long as the session.
    fn keep(&mut self, bytes: &[u8], what: &str) -> Result<u64, EngineError> {
        let memory = DeviceMemory::with(self.card, bytes, what)?;
        let pointer = memory.pointer;
        self.kept.push(memory);
        Ok(pointer)
    }
}

/// Vector width that rows of this many columns allow, when they start at these addresses: 8 or 1.
fn vector(columns: usize, pointers: &[u64]) -> usize {
    if columns.is_multiple_of(8) && pointers.iter().all(|pointer| pointer.is_multiple_of(16)) { 8 } else { 1 }
}

/// Threads of a block that walks over one row.
fn row_threads(columns: usize, vector: usize) -> u32 {
    (columns / vector).next_power_of_two().clamp(32, 256) as u32
}
