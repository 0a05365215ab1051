//! Lays a workload out in memory and estimates its cost. Opens no device.
//!
//! Transient buffers live from the first operation that touches them to the last. Buffers whose lives overlap
//! get disjoint ranges of an arena; all programs share the arena, so its size is the largest any of them needs.
//! Placement is greedy by size (Pisarchyk & Lee 2020, arXiv 2001.03288): the largest buffer first, each at the
//! lowest free offset; when a segment is full, the next is opened. A buffer that no segment holds is placed in pieces of
//! as many rows each, where the engine works on ranges of rows.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::Serialize;

use super::spare::Spare;
use super::{Access, BufferId, DType, Kind, Op, Program, ProjectionBackward, Role, Target, Workload};

/// Where a buffer lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// Memory of its own for as long as the session lasts.
    Own,
    /// A byte range of an arena segment.
    Arena { segment: usize, offset: u64 },
    /// A byte range of a buffer in pieces: entry `buffer` of [`Plan::pieces`].
    Pieces { buffer: usize, offset: u64 },
}

/// A transient buffer that no segment holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pieces {
    /// Of each but the last: whole rows.
    pub bytes: u64,
    /// Segment and offset of each, in the order of their rows.
    pub places: Vec<(usize, u64)>,
}

impl Pieces {
    /// Segment and offset of the byte at `offset` of the buffer, and how many bytes from it on its piece may have.
    pub fn at(&self, offset: u64) -> (usize, u64, u64) {
        let (segment, start) = self.places[(offset / self.bytes) as usize];
        (segment, start + offset % self.bytes, self.bytes - offset % self.bytes)
    }
}

/// A workload laid out for a target.
#[derive(Clone, Debug)]
pub struct Plan {
    pub workload: Workload,
    pub target: Target,
    /// One entry a buffer.
    pub placements: Vec<Placement>,
    /// Bytes of each arena segment.
    pub segments: Vec<u64>,
    /// Transient buffers that lie in pieces.
    pub pieces: Vec<Pieces>,
    /// Persistent buffers that lie in the host's memory; their placement is [`Placement::Own`].
    pub host: BTreeSet<BufferId>,
    /// Room of buffers for LoRA branches.
    pub spare: Spare,
    pub summary: Summary,
}

/// The figures that `tune plan` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Bytes by kind. `activations` and `workspace` split the arena at the moment of its peak.
    pub bytes: BTreeMap<&'static str, u64>,
    /// Everything the plan takes on the device.
    pub peak_bytes: u64,
    /// Page-locked memory that it takes on the host beside.
    pub host_bytes: u64,
    pub programs: Vec<ProgramSummary>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ProgramSummary {
    pub name: String,
    pub role: Role,
    pub tokens: usize,
    pub operations: usize,
    pub flops: u64,
    pub bytes_moved: u64,
    /// Bytes of transient buffers alive at the worst moment.
    pub arena_bytes: u64,
    /// An estimate from the target's rates.
    pub estimated_seconds: f64,
    /// What the program takes on the device once it is captured; 0 where it is not worth capturing.
    pub graph_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("{name} takes {bytes} bytes, more than the {limit} that one allocation may have on {target}")]
    BufferTooLarge { name: String, bytes: u64, limit: u64, target: String },
    #[error("the plan needs {}, {target} has {}", gib(*needed), gib(*available))]
    DoesNotFit {
        needed: u64,
        available: u64,
        target: String,
        /// Settings, each of which alone would make it fit, as the run file spells them; where they were looked for.
        fits: Vec<String>,
    },
    #[error("{what}")]
    Refused {
        /// Why the engine does not run it on this device.
        what: String,
        /// As above.
        fits: Vec<String>,
    },
    #[error(
        "the plan keeps {} in the host's memory, page-locked; of this machine's {} may be taken",
        gib(*needed),
        gib(*available)
    )]
    HostTooSmall {
        needed: u64,
        available: u64,
        /// As above.
        fits: Vec<String>,
    },
}

impl Plan {
    /// The plan with so many bytes more on the device, of the engine's own.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn with_workspace(mut self, bytes: u64) -> Result<Plan, PlanError> {
        *self.summary.bytes.entry(Kind::Workspace.name()).or_default() += bytes;
        self.summary.peak_bytes += bytes;
        match self.target.memory {
            Some(available) if self.summary.peak_bytes > available => Err(PlanError::DoesNotFit {
                needed: self.summary.peak_bytes,
                available,
                target: self.target.name,
                fits: Vec::new(),
            }),
            _ => Ok(self),
        }
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

/// A transient buffer's life: indices of the first and last step that touch it.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    pub buffer: BufferId,
    pub first: usize,
    pub last: usize,
}

/// Lives of a program's transient buffers, in order of first use.
pub fn lives(workload: &Workload, program: &Program) -> Vec<Life> {
    let mut order: Vec<Life> = Vec::new();
    let mut index = HashMap::new();
    for (step, entry) in program.steps.iter().enumerate() {
        for (buffer, _) in entry.op.accesses() {
            let buffer = workload.whole(buffer);
            if !workload.buffer(buffer).kind.is_transient() {
                continue;
            }
            let at = *index.entry(buffer).or_insert_with(|| {
                order.push(Life { buffer, first: step, last: step });
                order.len() - 1
            });
            order[at].last = step;
        }
    }
    order
}

/// Frozen weights that only embeddings read, a few rows of them each time: what may be left in the host's memory. Not
/// those that are also the head.
pub fn frozen_embeddings(workload: &Workload) -> BTreeSet<BufferId> {
    let mut tables = BTreeSet::new();
    let mut others = BTreeSet::new();
    for step in workload.programs.iter().flat_map(|program| &program.steps) {
        for (id, access) in step.op.accesses() {
            if workload.buffer(id).kind != Kind::Weight {
                continue;
            }
            if matches!(step.op, Op::Embedding { .. }) && access == Access::Read {
                tables.insert(id);
            } else {
                others.insert(id);
            }
        }
    }
    &tables - &others
}

/// The optimizer's moments.
pub fn optimizer_states(workload: &Workload) -> BTreeSet<BufferId> {
    workload.of_kind(Kind::Optimizer).map(|(id, _)| id).collect()
}

/// Where what layers leave in the host's memory lies in one range of it, and the bytes of that range: programs run one after
/// the other and share it.
pub fn offloads(workload: &Workload, alignment: u64) -> (BTreeMap<BufferId, u64>, u64) {
    let (mut offsets, mut most) = (BTreeMap::new(), 0);
    for program in &workload.programs {
        let mut end = 0;
        for (id, _) in program.steps.iter().flat_map(|step| step.op.accesses()) {
            let buffer = workload.buffer(id);
            if buffer.kind == Kind::Offload && !offsets.contains_key(&id) {
                offsets.insert(id, end);
                end += aligned(buffer.bytes(), alignment);
            }
        }
        most = most.max(end);
    }
    (offsets, most)
}

/// Scratch of products of 8-bit floats, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fp8Sizes {
    /// Of the factor that is quantized on the way in.
    pub operand: u64,
    /// Of transposed weights.
    pub weight: u64,
}

impl Fp8Sizes {
    /// Bytes for magnitudes and the scale.
    pub const HEADER: u64 = 8192;
    /// More than this is worked through in parts.
    const MOST: u64 = 128 << 20;

    pub fn total(self) -> u64 {
        Self::HEADER + self.operand + self.weight
    }
}

/// What the products of a workload on weights in 8-bit floats need beside the arena; zero without such weights.
pub fn fp8_sizes(workload: &Workload) -> Fp8Sizes {
    let mut sizes = Fp8Sizes::default();
    let held = |id: BufferId| workload.buffer(id).dtype == DType::Fp8;
    for step in workload.programs.iter().flat_map(|program| &program.steps) {
        match &step.op {
            Op::Linear { input, projections } if projections.iter().any(|p| held(p.weight)) => {
                sizes.operand = sizes.operand.max(workload.buffer(*input).elements() as u64);
            }
            Op::LinearBackward { grad_input: Some(input), projections, .. }
                if projections.iter().any(|p| held(p.weight)) =>
            {
                let rows = workload.buffer(*input).rows() as u64;
                let columns: u64 = projections.iter().map(|p| p.grad_output.width as u64).sum();
                let weights: u64 = projections.iter().map(|p| workload.buffer(p.weight).elements() as u64).sum();
                sizes.operand = sizes.operand.max(rows * columns);
                sizes.weight = sizes.weight.max(weights);
            }
            _ => {}
        }
    }
    let even = |bytes: u64| bytes.min(Fp8Sizes::MOST).next_multiple_of(256);
    Fp8Sizes { operand: even(sizes.operand), weight: even(sizes.weight) }
}

/// Scratch of an engine that multiplies through libraries: unpacked weights, dropped-out inputs, partial sums, weights on
/// their way in. Of one that unpacks weights by itself, the largest of them, or what it binds of it at once. Zero for others.
pub fn scratch_bytes(workload: &Workload, target: &Target) -> u64 {
    if target.unpacks_apart() {
        let quantized = workload.of_kind(Kind::Weight).filter(|(_, buffer)| buffer.dtype.is_quantized());
        let unpacked = quantized.map(|(_, buffer)| target.compute.bytes(&buffer.shape).min(target.largest_segment));
        return aligned(unpacked.max().unwrap_or(0), target.alignment);
    }
    if !target.unpacks_weights() {
        return 0;
    }
    let unpacked = |id: BufferId| matches!(workload.buffer(id).dtype, DType::Nf4 | DType::Int8);
    // Converted weights arrive there in pieces, of which a small model needs no large ones.
    let weights: u64 = workload.of_kind(Kind::Weight).map(|(_, buffer)| buffer.bytes()).sum();
    let mut bytes = (weights / 128).clamp(SCRATCH_LEAST, 4 * SCRATCH_LEAST).next_multiple_of(1 << 20);
    for step in workload.programs.iter().flat_map(|program| &program.steps) {
        let (whole, summed) = match &step.op {
            Op::Linear { projections, .. } => {
                let drops = |p: &super::Projection| p.lora.as_ref().is_some_and(|lora| lora.dropout.is_some());
                (projections.iter().any(|p| unpacked(p.weight) || drops(p)), 0)
            }
            Op::LinearBackward { projections, .. } => {
                let drops = |p: &ProjectionBackward| p.lora.as_ref().is_some_and(|lora| lora.dropout.is_some());
                let biased = projections.iter().filter(|p| p.grad_bias.is_some());
                let widest = biased.map(|p| p.grad_output.width).max().unwrap_or(0);
                (projections.iter().any(|p| unpacked(p.weight) || drops(p)), widest)
            }
            Op::RmsNormBackward { grad_weight: Some(weight), .. } => (false, workload.buffer(*weight).elements()),
            _ => continue,
        };
        if whole {
            return SCRATCH_MOST;
        }
        bytes = bytes.max((4 * PARTIAL_SUMS * summed) as u64);
    }
    bytes.min(SCRATCH_MOST)
}

const SCRATCH_LEAST: u64 = 2 << 20;
const SCRATCH_MOST: u64 = 64 << 20;

/// Rows of partial sums for the sums of columns.
pub const PARTIAL_SUMS: usize = 128;

/// Share of the memory's rate at which weights are unpacked: measured at 4096 tokens of an 8B model.
const UNPACKING_SHARE: f64 = 0.6;

/// What a copy beside other operations costs them, as a share of its own time: they share memory, and marks take a while.
const COPY_BURDEN: f64 = 0.1;

/// Lays `workload` out for `target`, all on the device but what is made to be offloaded.
///
/// # Errors
/// When a buffer is larger than an allocation may be, or the whole larger than the target's memory.
pub fn plan(workload: Workload, target: Target) -> Result<Plan, PlanError> {
    plan_with_host(workload, target, BTreeSet::new())
}

/// Lays `workload` out with some persistent buffers in the host's memory, where the target reaches it.
///
/// # Errors
/// As [`plan`].
pub fn plan_with_host(workload: Workload, target: Target, mut host: BTreeSet<BufferId>) -> Result<Plan, PlanError> {
    host.extend(workload.of_kind(Kind::Offload).map(|(id, _)| id));
    if !target.reaches_host() {
        host.clear();
    }
    let on_host = host.iter().map(|id| workload.buffer(*id)).filter(|buffer| buffer.kind != Kind::Offload);
    let host_bytes: u64 = on_host.map(|buffer| aligned(buffer.bytes(), target.alignment)).sum::<u64>()
        + if target.reaches_host() { offloads(&workload, target.alignment).1 } else { 0 };
    let spare = Spare::new(&workload, &target);
    let mut placements = vec![Placement::Own; workload.buffers.len()];
    let mut arena = Arena::default();
    let mut bytes: BTreeMap<&'static str, u64> = BTreeMap::new();
    for (index, buffer) in workload.buffers.iter().enumerate() {
        let id = BufferId(index as u32);
        if buffer.kind.is_transient() || host.contains(&id) {
            continue;
        }
        let taken = aligned(spare.bytes(&workload, id, buffer.dtype), target.alignment);
        *bytes.entry(buffer.kind.name()).or_default() += taken;
    }
    let mut programs = Vec::new();
    let mut worst = (0, 0);
    for program in &workload.programs {
        let mut lives = lives(&workload, program);
        let shared = if target.works_in_place() { share(&workload, &spare, program, &mut lives) } else { Vec::new() };
        place(&workload, &target, &spare, &lives, &mut placements, &mut arena)?;
        for (result, input) in shared {
            placements[result.index()] = placements[input.index()];
        }
        place_rows(&workload, &spare, &mut placements);
        let (activations, workspace) = peak(&workload, &spare, program, &lives);
        if activations + workspace > worst.0 + worst.1 {
            worst = (activations, workspace);
        }
        programs.push(ProgramSummary {
            name: program.name.clone(),
            role: program.role,
            tokens: program.tokens,
            operations: program.steps.len(),
            flops: program.flops(&workload),
            bytes_moved: program.bytes_moved(&workload),
            arena_bytes: activations + workspace,
            estimated_seconds: estimate(&workload, program, &target),
            graph_bytes: 0,
        });
    }
    let Arena { segments, pieces } = arena;
    let arena: u64 = segments.iter().sum();
    // What placement loses between buffers is counted as activations.
    let eight_bit = fp8_sizes(&workload);
    let products = if eight_bit == Fp8Sizes::default() { 0 } else { eight_bit.total() };
    let scratch = scratch_bytes(&workload, &target);
    bytes.insert(Kind::Workspace.name(), worst.1 + target.library_workspace + scratch + products);
    bytes.insert(Kind::Activation.name(), arena.saturating_sub(worst.1));
    if target.graph_bytes > 0 {
        capture(&workload, &target, &mut programs);
        let free = target.memory.map(|memory| memory.saturating_sub(bytes.values().sum()));
        capture_more(&workload, &target, free, &mut programs);
        bytes.insert("graphs", programs.iter().map(|program| program.graph_bytes).sum());
    }
    let peak_bytes = bytes.values().sum();
    if let Some(available) = target.memory
        && peak_bytes > available
    {
        return Err(PlanError::DoesNotFit { needed: peak_bytes, available, target: target.name, fits: Vec::new() });
    }
    if let Some(available) = target.host_memory
        && host_bytes > available
    {
        return Err(PlanError::HostTooSmall { needed: host_bytes, available, fits: Vec::new() });
    }
    let summary = Summary { bytes, peak_bytes, host_bytes, programs };
    Ok(Plan { workload, target, placements, segments, pieces, host, spare, summary })
}

/// Operations that may be in captured programs whatever they take: about five launches each.
const CAPTURED: usize = 2400;

/// Seconds of an operation whose launches the host prepares in as much time.
const SHORT_OPERATION: f64 = 75e-6;

/// Decides which programs are worth capturing, which takes memory on the device for every operation: always while there
/// are few, and then where operations are so short that the host could not keep up with them.
fn capture(workload: &Workload, target: &Target, programs: &mut [ProgramSummary]) {
    let mut captured = 0;
    for (program, summary) in workload.programs.iter().zip(programs) {
        let operations = program.steps.len();
        let short = summary.estimated_seconds < SHORT_OPERATION * operations as f64;
        if captured + operations > CAPTURED && !short {
            continue;
        }
        captured += operations;
        summary.graph_bytes = operations as u64 * target.graph_bytes;
    }
}

/// Captures every other micro-batch and the update where memory is left for it: it is not worth giving up anything else.
/// Evaluations, which are few, and what is wanted once, stay launches.
fn capture_more(workload: &Workload, target: &Target, free: Option<u64>, programs: &mut [ProgramSummary]) {
    let mut taken: u64 = programs.iter().map(|program| program.graph_bytes).sum();
    for (program, summary) in workload.programs.iter().zip(programs) {
        let bytes = program.steps.len() as u64 * target.graph_bytes;
        let often = matches!(summary.role, Role::Micro | Role::Update);
        if often && summary.graph_bytes == 0 && free.is_none_or(|free| taken + bytes <= free) {
            taken += bytes;
            summary.graph_bytes = bytes;
        }
    }
}

/// Seconds that a program should take: each operation the longer of its arithmetic and its memory traffic, and copies that
/// run beside others as far as they are waited for.
pub fn estimate(workload: &Workload, program: &Program, target: &Target) -> f64 {
    let (mut now, mut bus_free) = (0.0f64, 0.0f64);
    let mut arrivals: HashMap<BufferId, f64> = HashMap::new();
    for (at, step) in program.steps.iter().enumerate() {
        if !program.does_without(workload, at, target) {
            now += estimate_op(workload, &step.op, target);
        }
        match &step.op {
            Op::Cast { pairs } if target.copies_beside() => {
                for &(from, to) in pairs {
                    let Some(id) = [from, to].into_iter().find(|id| workload.buffer(*id).kind == Kind::Offload) else {
                        continue;
                    };
                    let seconds = workload.buffer(id).bytes() as f64 / target.bus_bandwidth;
                    bus_free = bus_free.max(now) + seconds;
                    arrivals.insert(id, bus_free);
                    now += COPY_BURDEN * seconds;
                }
            }
            Op::Wait { buffers } => {
                now = buffers.iter().filter_map(|id| arrivals.get(id)).fold(now, |now, &arrival| now.max(arrival));
            }
            _ => {}
        }
    }
    now
}

/// Seconds that an operation should take on the target: the longer of arithmetic and memory traffic.
pub fn estimate_op(workload: &Workload, op: &Op, target: &Target) -> f64 {
    let rate = match op {
        Op::Attention { .. } | Op::CachedAttention { .. } => target.rates.attention_flops,
        Op::AttentionBackward { .. } => 0.75 * target.rates.attention_flops,
        _ => target.rates.flops,
    };
    let eight_bit = target.fp8_flops.map_or(0, |_| op.fp8_flops(workload));
    let arithmetic =
        (op.flops(workload) - eight_bit) as f64 / rate + eight_bit as f64 / target.fp8_flops.unwrap_or(rate);
    let memory = op.bytes_moved(workload) as f64 / target.rates.bandwidth;
    // A copy that runs beside other operations is waited for elsewhere.
    let beside = matches!(op, Op::Cast { .. }) && target.copies_beside() || matches!(op, Op::Wait { .. });
    let bus = if beside {
        0.0
    } else {
        let accesses = op.accesses().into_iter();
        let offloaded = accesses.filter(|(id, _)| workload.buffer(*id).kind == Kind::Offload);
        offloaded.map(|(id, _)| workload.buffer(id).bytes()).sum::<u64>() as f64 / target.bus_bandwidth
    };
    let on_device = if target.overlaps_memory() { arithmetic.max(memory) } else { arithmetic + memory };
    on_device.max(bus).max(head_passes(workload, op, target)) + unpacking(workload, op, target) + target.rates.per_op
}

/// Seconds in which the chunks of a head only read its weight, each chunk anew.
fn head_passes(workload: &Workload, op: &Op, target: &Target) -> f64 {
    let Op::LinearCrossEntropy { input, weight, grad_input, grad_weight, logits, .. } = op else { return 0.0 };
    let bytes = |id: BufferId| workload.buffer(id).bytes();
    let chunks = workload.buffer(*input).rows().div_ceil(workload.buffer(*logits).rows().max(1));
    let reads = bytes(*weight) * (1 + u64::from(grad_input.is_some()));
    let sums = grad_weight.map_or(0, |id| 2 * bytes(id));
    chunks as f64 * (reads + sums) as f64 / target.rates.bandwidth
}

/// Seconds in which an engine that multiplies unpacked weights only unpacks those of an operation: the same for few tokens
/// as for many.
fn unpacking(workload: &Workload, op: &Op, target: &Target) -> f64 {
    let weights: Vec<BufferId> = match op {
        Op::Linear { projections, .. } => projections.iter().map(|projection| projection.weight).collect(),
        Op::LinearBackward { grad_input: Some(_), projections, .. } => projections.iter().map(|p| p.weight).collect(),
        _ => Vec::new(),
    };
    let quantized = weights
        .into_iter()
        .map(|id| workload.buffer(id))
        .filter(|buffer| matches!(buffer.dtype, DType::Nf4 | DType::Int8));
    let bytes: u64 = quantized.map(|buffer| buffer.bytes() + target.compute.bytes(&buffer.shape)).sum();
    if target.unpacks_weights() { bytes as f64 / (UNPACKING_SHARE * target.rates.bandwidth) } else { 0.0 }
}

fn aligned(bytes: u64, alignment: u64) -> u64 {
    bytes.next_multiple_of(alignment)
}

/// Lets the gradient of a gated product take the place of its input where nothing reads the input any more: gives
/// (result, input) pairs, whose lives become one. Not so in linear operations, where the same holds for LoRA branches: what
/// runs beside the large product would have to come before it.
fn share(workload: &Workload, spare: &Spare, program: &Program, lives: &mut Vec<Life>) -> Vec<(BufferId, BufferId)> {
    let mut pairs = Vec::new();
    for (at, step) in program.steps.iter().enumerate() {
        let Op::GluBackward { gate_up, grad_gate_up, .. } = &step.op else { continue };
        let find = |id: BufferId| lives.iter().position(|life| life.buffer == id);
        let (Some(input), Some(result)) = (find(*gate_up), find(*grad_gate_up)) else { continue };
        let bytes = |id: BufferId| spare.bytes(workload, id, workload.buffer(id).dtype);
        let same = bytes(*gate_up) == bytes(*grad_gate_up);
        if same && lives[input].last == at && lives[result].first == at {
            lives[input].last = lives[result].last;
            lives.remove(result);
            pairs.push((*grad_gate_up, *gate_up));
        }
    }
    pairs
}

/// Activation and workspace bytes alive at the program's worst step.
fn peak(workload: &Workload, spare: &Spare, program: &Program, lives: &[Life]) -> (u64, u64) {
    let mut change = vec![(0i64, 0i64); program.steps.len() + 1];
    for life in lives {
        let buffer = workload.buffer(life.buffer);
        let bytes = spare.bytes(workload, life.buffer, buffer.dtype) as i64;
        let (add, remove) = (life.first, life.last + 1);
        if buffer.kind == Kind::Workspace {
            change[add].1 += bytes;
            change[remove].1 -= bytes;
        } else {
            change[add].0 += bytes;
            change[remove].0 -= bytes;
        }
    }
    let (mut now, mut worst) = ((0, 0), (0, 0));
    for (activations, workspace) in change {
        now = (now.0 + activations, now.1 + workspace);
        if now.0 + now.1 > worst.0 + worst.1 {
            worst = now;
        }
    }
    (worst.0 as u64, worst.1 as u64)
}

/// What programs share.
#[derive(Default)]
struct Arena {
    segments: Vec<u64>,
    pieces: Vec<Pieces>,
}

/// What is placed: a buffer, or a piece of one.
#[derive(Clone, Copy)]
struct Item {
    life: Life,
    bytes: u64,
    /// Entry of [`Plan::pieces`], and which of its pieces.
    piece: Option<(usize, usize)>,
}

fn place(
    workload: &Workload,
    target: &Target,
    spare: &Spare,
    lives: &[Life],
    placements: &mut [Placement],
    arena: &mut Arena,
) -> Result<(), PlanError> {
    let size = |id: BufferId| aligned(spare.bytes(workload, id, workload.buffer(id).dtype).max(1), target.alignment);
    let too_large: Vec<BufferId> =
        lives.iter().map(|life| life.buffer).filter(|id| size(*id) > target.largest_segment).collect();
    let mut items = Vec::new();
    for &life in lives {
        let (id, bytes) = (life.buffer, size(life.buffer));
        if bytes <= target.largest_segment {
            items.push(Item { life, bytes, piece: None });
            continue;
        }
        let buffer = workload.buffer(id);
        let Some(rows) = rows_of_piece(workload, target, &too_large, buffer.rows()) else {
            let largest = too_large.iter().copied().max_by_key(|id| size(*id)).unwrap_or(id);
            return Err(PlanError::BufferTooLarge {
                name: workload.buffer(largest).name.clone(),
                bytes: size(largest),
                limit: target.largest_segment,
                target: target.name.clone(),
            });
        };
        let of = |rows: usize| aligned(buffer.dtype.bytes(&[rows, buffer.columns()]), target.alignment);
        let entry = arena.pieces.len();
        placements[id.index()] = Placement::Pieces { buffer: entry, offset: 0 };
        for (piece, first) in (0..buffer.rows()).step_by(rows).enumerate() {
            items.push(Item { life, bytes: of(rows.min(buffer.rows() - first)), piece: Some((entry, piece)) });
        }
        arena.pieces.push(Pieces { bytes: of(rows), places: vec![(0, 0); buffer.rows().div_ceil(rows)] });
    }
    items.sort_by_key(|item| (std::cmp::Reverse(item.bytes), item.life.first, item.life.buffer, item.piece));
    // Placed so far, a list a segment: (life, offset, bytes).
    let mut placed: Vec<Vec<(Life, u64, u64)>> = Vec::new();
    for Item { life, bytes, piece } in items {
        let found = placed.iter().enumerate().find_map(|(segment, taken)| {
            lowest_gap(taken, &life, bytes, target.largest_segment).map(|offset| (segment, offset))
        });
        let (segment, offset) = found.unwrap_or_else(|| {
            placed.push(Vec::new());
            (placed.len() - 1, 0)
        });
        let taken = &mut placed[segment];
        let at = taken.partition_point(|entry| entry.1 <= offset);
        taken.insert(at, (life, offset, bytes));
        if arena.segments.len() <= segment {
            arena.segments.push(0);
        }
        arena.segments[segment] = arena.segments[segment].max(offset + bytes);
        match piece {
            None => placements[life.buffer.index()] = Placement::Arena { segment, offset },
            Some((entry, piece)) => arena.pieces[entry].places[piece] = (segment, offset),
        }
    }
    Ok(())
}

/// Rows of which pieces are multiples: a range of rows of any buffer then begins where a placement may.
pub const ROW_UNIT: usize = 128;

/// Rows of each piece but the last of a buffer with so many: the same whatever the buffer, so that what works on several
/// meets the ends of their pieces together. None where the engine takes no pieces, or a few rows are too large already.
fn rows_of_piece(workload: &Workload, target: &Target, too_large: &[BufferId], rows: usize) -> Option<usize> {
    let bytes = |id: &BufferId| {
        let buffer = workload.buffer(*id);
        buffer.dtype.bytes(&[ROW_UNIT, buffer.columns()])
    };
    let most = target.largest_segment / too_large.iter().map(bytes).max()?.max(1);
    if !target.works_on_rows() || most == 0 {
        return None;
    }
    let most = usize::try_from(most).unwrap_or(usize::MAX).saturating_mul(ROW_UNIT);
    Some(rows.div_ceil(rows.div_ceil(most)).next_multiple_of(ROW_UNIT))
}

/// Puts buffers that are rows of others where those rows are.
fn place_rows(workload: &Workload, spare: &Spare, placements: &mut [Placement]) {
    for (index, buffer) in workload.buffers.iter().enumerate() {
        let Some((whole, first)) = buffer.within else { continue };
        let before = buffer.dtype.bytes(&[first, buffer.columns() + spare.columns(workload, whole)]);
        placements[index] = match placements[whole.index()] {
            Placement::Own => continue,
            Placement::Arena { segment, offset } => Placement::Arena { segment, offset: offset + before },
            Placement::Pieces { buffer, offset } => Placement::Pieces { buffer, offset: offset + before },
        };
    }
}

/// Lowest offset at which `bytes` fit beside the buffers that live at the same time. `taken` is by offset.
fn lowest_gap(taken: &[(Life, u64, u64)], life: &Life, bytes: u64, limit: u64) -> Option<u64> {
    let mut offset = 0;
    for (other, start, size) in taken {
        if other.last < life.first || life.last < other.first {
            continue;
        }
        if offset + bytes <= *start {
            break;
        }
        offset = offset.max(start + size);
    }
    (offset + bytes <= limit).then_some(offset)
}
