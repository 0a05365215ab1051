//! Where every buffer of a plan lies on the card.
//!
//! Persistent buffers share one allocation. The weights of one linear operation lie end to end (and so do its LoRA
//! matrices and their gradients), so that projections that share an input run as one product.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::driver::{Card, DeviceMemory, PinnedMemory, failed, zero};
use super::product::Matrix;
use crate::backend::EngineError;
use crate::program::plan::{Fp8Sizes, fp8_sizes, offloads, scratch_bytes};
use crate::program::spare::Spare;
use crate::program::{Access, Buffer, BufferId, Columns, DType, Kind, Op, Placement, Plan, Workload};

const ALIGNMENT: u64 = 256;

/// A weight in 4 bits: where its parts lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Nf4Parts {
    /// Two values a byte.
    pub codes: u64,
    /// One byte a block of 64 values.
    pub scale_codes: u64,
    /// One f32 for 256 blocks.
    pub second_scales: u64,
    /// One f32: the mean of the scales.
    pub offset: u64,
    end: u64,
}

impl Nf4Parts {
    pub fn at(start: u64, elements: u64) -> Self {
        let blocks = elements.div_ceil(64);
        let scale_codes = (start + elements.div_ceil(2)).next_multiple_of(16);
        let second_scales = (scale_codes + blocks).next_multiple_of(16);
        let offset = second_scales + 4 * blocks.div_ceil(256);
        Self { codes: start, scale_codes, second_scales, offset, end: offset + 4 }
    }
}

/// A weight in 8-bit integers: where its parts lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Int8Parts {
    /// One a value.
    pub codes: u64,
    /// One f32 a row.
    pub scales: u64,
    end: u64,
}

impl Int8Parts {
    pub fn at(start: u64, elements: u64, rows: u64) -> Self {
        let scales = (start + elements).next_multiple_of(16);
        Self { codes: start, scales, end: scales + 4 * rows }
    }
}

/// How a buffer is held on this card. Frozen matrices are bf16 whatever the checkpoint has; frozen vectors are bf16
/// or f32.
fn stored(buffer: &Buffer, written: bool) -> DType {
    match (buffer.kind, buffer.dtype) {
        (Kind::Weight, DType::F32 | DType::F16) if !written && buffer.shape.len() > 1 => DType::BF16,
        (Kind::Weight, DType::F16) => DType::F32,
        (_, dtype) => dtype,
    }
}

/// Bytes of a buffer on the card, with the room that it has.
fn stored_bytes(workload: &Workload, spare: &Spare, id: BufferId, dtype: DType) -> u64 {
    let buffer = workload.buffer(id);
    match dtype {
        // The scale comes after the last weight of a linear operation.
        DType::Fp8 => buffer.elements() as u64,
        DType::Nf4 => Nf4Parts::at(0, buffer.elements() as u64).end,
        DType::Int8 => Int8Parts::at(0, buffer.elements() as u64, buffer.rows() as u64).end,
        _ => spare.bytes(workload, id, dtype),
    }
}

/// Scratch of 8-bit products.
pub(super) struct Fp8Scratch {
    memory: DeviceMemory,
    /// Up to 1,024 f32: the largest magnitudes that blocks found.
    pub largest: u64,
    /// One f32: the scale of the quantized factor.
    pub scale: u64,
    /// The quantized factor.
    pub operand: u64,
    pub operand_bytes: u64,
    /// Transposed weights.
    pub weight: u64,
    pub weight_bytes: u64,
}

impl Fp8Scratch {
    fn new(card: &Arc<Card>, sizes: Fp8Sizes) -> Result<Self, EngineError> {
        let memory = DeviceMemory::new(card, sizes.total(), "scratch of 8-bit products")?;
        let largest = memory.pointer;
        let operand = largest + Fp8Sizes::HEADER;
        let scale = operand - 16;
        let weight = operand + sizes.operand;
        Ok(Self { memory, largest, scale, operand, operand_bytes: sizes.operand, weight, weight_bytes: sizes.weight })
    }
}

pub(super) struct Memory {
    addresses: Vec<u64>,
    stored: Vec<DType>,
    /// Room for LoRA branches.
    spare: Spare,
    /// Where the scales of weights in 8-bit floats lie: the weights of one linear operation share one.
    scales: HashMap<BufferId, u64>,
    fp8: Option<Fp8Scratch>,
    persistent: DeviceMemory,
    segments: Vec<DeviceMemory>,
    /// Buffers that the plan leaves on the host.
    host: HashSet<BufferId>,
    /// Their memory: each its own, and one range for what layers leave there.
    _pinned: Vec<PinnedMemory>,
    /// Unpacked weights, dropped-out inputs, partial sums, weights on their way in.
    pub scratch: DeviceMemory,
}

impl Memory {
    /// Allocates everything, zeroed.
    pub fn new(card: &Arc<Card>, plan: &Plan) -> Result<Self, EngineError> {
        let workload = &plan.workload;
        let mut written = vec![false; workload.buffers.len()];
        for step in workload.programs.iter().flat_map(|program| &program.steps) {
            for (id, access) in step.op.accesses() {
                written[id.index()] |= access != Access::Read;
            }
        }
        let stored: Vec<DType> =
            workload.buffers.iter().zip(&written).map(|(buffer, &written)| stored(buffer, written)).collect();
        let mut addresses = vec![0; workload.buffers.len()];
        let mut scales: HashMap<BufferId, u64> = HashMap::new();
        let mut end = 0u64;
        for mut group in groups(workload) {
            group.retain(|id| !plan.host.contains(id));
            let eight_bit: Vec<BufferId> =
                group.iter().copied().filter(|id| stored[id.index()] == DType::Fp8).collect();
            let mut next = end.next_multiple_of(ALIGNMENT);
            for id in group {
                // Members that end on no 16-byte boundary cannot touch.
                let start = if next.is_multiple_of(16) { next } else { next.next_multiple_of(ALIGNMENT) };
                addresses[id.index()] = start;
                next = start + stored_bytes(workload, &plan.spare, id, stored[id.index()]);
            }
            if !eight_bit.is_empty() {
                let scale = next.next_multiple_of(16);
                next = scale + 4;
                scales.extend(eight_bit.into_iter().map(|id| (id, scale)));
            }
            end = next;
        }
        let persistent = DeviceMemory::new(card, end, "weights, adapter, gradients and optimizer state")?;
        let mut segments = Vec::new();
        for (index, &bytes) in plan.segments.iter().enumerate() {
            segments.push(DeviceMemory::new(card, bytes, &format!("arena segment {index}"))?);
        }
        let scratch = DeviceMemory::new(card, scratch_bytes(workload, &plan.target), "scratch")?;
        let mut pinned = Vec::new();
        let mut host: HashMap<BufferId, u64> = HashMap::new();
        let (offsets, bytes) = offloads(workload, ALIGNMENT);
        if bytes > 0 {
            let range = PinnedMemory::new(card, bytes as usize)?;
            host.extend(offsets.into_iter().map(|(id, offset)| (id, range.address() + offset)));
            pinned.push(range);
        }
        for &id in plan.host.iter().filter(|id| workload.buffer(**id).kind != Kind::Offload) {
            let bytes = stored_bytes(workload, &plan.spare, id, stored[id.index()]);
            let mut memory = PinnedMemory::new(card, bytes.max(16) as usize)?;
            if workload.buffer(id).kind == Kind::Optimizer {
                memory.bytes_mut().fill(0);
            }
            host.insert(id, memory.address());
            pinned.push(memory);
        }
        for (index, buffer) in workload.buffers.iter().enumerate() {
            if let Some(&address) = host.get(&BufferId(index as u32)) {
                addresses[index] = address;
                continue;
            }
            addresses[index] = match plan.placements[index] {
                Placement::Arena { segment, offset } => {
                    let bytes = plan.spare.bytes(workload, BufferId(index as u32), buffer.dtype);
                    if offset + bytes > segments[segment].bytes {
                        return Err(failed(format!("{} does not fit its arena segment", buffer.name)));
                    }
                    segments[segment].pointer + offset
                }
                Placement::Pieces { .. } => return Err(failed(format!("{} lies in pieces", buffer.name))),
                // A transient buffer that no program touches has no place and needs none.
                Placement::Own if buffer.kind.is_transient() => 0,
                Placement::Own => addresses[index] + persistent.pointer,
            };
        }
        scales.values_mut().for_each(|scale| *scale += persistent.pointer);
        let sizes = fp8_sizes(workload);
        let fp8 = if scales.is_empty() { None } else { Some(Fp8Scratch::new(card, sizes)?) };
        let spare = plan.spare.clone();
        let host = host.into_keys().collect();
        let memory =
            Self { addresses, stored, spare, scales, fp8, persistent, segments, host, _pinned: pinned, scratch };
        zero(card, memory.persistent.pointer, memory.persistent.bytes)?;
        memory.zero_arena(card)?;
        Ok(memory)
    }

    pub fn zero_arena(&self, card: &Card) -> Result<(), EngineError> {
        self.segments.iter().try_for_each(|segment| zero(card, segment.pointer, segment.bytes))
    }

    /// Pointer and bytes of each arena segment.
    pub fn segments(&self) -> impl Iterator<Item = (u64, u64)> {
        self.segments.iter().map(|segment| (segment.pointer, segment.bytes))
    }

    pub fn allocated(&self) -> u64 {
        let fp8 = self.fp8.as_ref().map_or(0, |fp8| fp8.memory.bytes);
        self.persistent.bytes
            + self.scratch.bytes
            + fp8
            + self.segments.iter().map(|segment| segment.bytes).sum::<u64>()
    }

    pub fn address(&self, id: BufferId) -> u64 {
        self.addresses[id.index()]
    }

    /// Whether the buffer lies in page-locked memory of the host.
    pub fn on_host(&self, id: BufferId) -> bool {
        self.host.contains(&id)
    }

    /// Scratch of 8-bit products.
    ///
    /// # Errors
    /// When the plan has no weights in 8-bit floats.
    pub fn fp8(&self) -> Result<&Fp8Scratch, EngineError> {
        self.fp8.as_ref().ok_or_else(|| failed("the plan has no scratch for 8-bit products"))
    }

    /// Weights in 8-bit floats that share a scale, with where it lies.
    pub fn fp8_groups(&self) -> std::collections::BTreeMap<u64, Vec<BufferId>> {
        let mut groups: std::collections::BTreeMap<u64, Vec<BufferId>> = Default::default();
        self.scales.iter().for_each(|(&id, &scale)| groups.entry(scale).or_default().push(id));
        groups
    }

    /// Where the scale of a weight in 8-bit floats lies.
    pub fn scale(&self, id: BufferId) -> u64 {
        self.scales.get(&id).copied().unwrap_or(0)
    }

    /// Columns that the buffer's rows have beyond their own.
    pub fn spare(&self, workload: &Workload, id: BufferId) -> usize {
        self.spare.columns(workload, id)
    }

    /// Rows below the buffer's own.
    pub fn spare_rows(&self, id: BufferId) -> usize {
        self.spare.rows(id)
    }

    /// The type in which the buffer is held.
    pub fn stored(&self, id: BufferId) -> DType {
        self.stored[id.index()]
    }

    /// Addresses of all persistent buffers but these, ascending.
    pub fn others(&self, workload: &Workload, buffers: &[BufferId]) -> std::collections::BTreeSet<u64> {
        let buffers: HashSet<BufferId> = buffers.iter().copied().collect();
        (0..self.addresses.len() as u32)
            .map(BufferId)
            .filter(|id| !buffers.contains(id) && !workload.buffer(*id).kind.is_transient())
            .map(|id| self.address(id))
            .collect()
    }

    /// A whole buffer as `[first dimension, the others]`.
    pub fn matrix(&self, workload: &Workload, id: BufferId) -> Matrix {
        let buffer = workload.buffer(id);
        let matrix = Matrix::new(self.address(id), self.stored(id), buffer.rows(), buffer.columns());
        Matrix { scale: self.scale(id), stride: matrix.columns + self.spare(workload, id), ..matrix }
    }

    /// A block of columns of a buffer.
    pub fn columns(&self, workload: &Workload, columns: Columns) -> Matrix {
        self.matrix(workload, columns.buffer).slice_columns(columns.start, columns.width)
    }
}

/// All persistent buffers, those that belong together side by side, sorted by kind.
fn groups(workload: &Workload) -> Vec<Vec<BufferId>> {
    let mut groups: Vec<Vec<BufferId>> = Vec::new();
    let mut placed = HashSet::new();
    let mut add = |ids: Vec<BufferId>| {
        let fresh = ids.iter().all(|id| !workload.buffer(*id).kind.is_transient() && !placed.contains(id));
        let distinct = ids.iter().collect::<HashSet<_>>().len() == ids.len();
        if fresh && distinct && !ids.is_empty() {
            placed.extend(ids.iter().copied());
            groups.push(ids);
        }
    };
    for step in workload.programs.iter().flat_map(|program| &program.steps) {
        match &step.op {
            Op::Linear { projections, .. } => {
                add(projections.iter().map(|p| p.weight).collect());
                add(projections.iter().filter_map(|p| p.bias).collect());
                add(projections.iter().filter_map(|p| p.lora.as_ref().map(|lora| lora.a)).collect());
            }
            Op::LinearBackward { projections, .. } => {
                add(projections.iter().map(|p| p.weight).collect());
                add(projections.iter().filter_map(|p| p.grad_weight).collect());
                add(projections.iter().filter_map(|p| p.lora.as_ref().map(|lora| lora.a)).collect());
                add(projections.iter().filter_map(|p| p.lora.as_ref().map(|lora| lora.grad_a)).collect());
            }
            _ => {}
        }
    }
    for (index, buffer) in workload.buffers.iter().enumerate() {
        let id = BufferId(index as u32);
        if !buffer.kind.is_transient() && !placed.contains(&id) {
            groups.push(vec![id]);
        }
    }
    groups.sort_by_key(|group| workload.buffer(group[0]).kind);
    groups
}
