//! Where buffers lie on the device.
//!
//! Arena segments are one wgpu buffer each. Persistent buffers are laid end to end in *slabs*, one sequence of
//! slabs a class of buffers, in an order that makes work on many tensors one dispatch: a parameter, its gradient and
//! its moments stand at the same place of their slabs, and the projections that share an input stand side by side.
//! Entries start at multiples of 128 elements, so that slabs of different element sizes keep step.
//!
//! A tensor that is too large for a buffer has a slab of its own, of several wgpu buffers with as many rows each; so has a
//! quantized one, or an optimizer state in 8 bits, that is too large for a binding, each of whose pieces is packed by
//! itself. What works on tensors works on parts of them that lie in one piece
//! ([`Lowering::parts`](super::lower::Lowering)). A transient buffer that no segment holds lies in pieces in several; what
//! works on rows works on ranges of them ([`Lowering::row_ranges`](super::lower::Lowering)).

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::program::plan::Pieces;
use crate::program::{BufferId, DType, Kind, Op, Placement, Plan, block8};

/// A wgpu buffer of the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    Segment(usize),
    /// A transient buffer in pieces, end to end. Bindings are of the segments that the pieces lie in.
    Pieces(usize),
    Slab(usize),
    /// Partial sums, between one dispatch and the next.
    Scratch,
    /// A quantized weight, unpacked for the products that follow.
    Unpacked,
    /// The values that codes of 8-bit optimizer states and of NF4 stand for.
    Tables,
}

/// A block of columns of a row-major matrix in device memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct View {
    pub place: Place,
    /// Bytes from the start of the place to element (0, 0) of the whole matrix; a multiple of 256.
    pub offset: u64,
    pub dtype: DType,
    pub rows: usize,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Element of the first column; rows that were skipped count `stride` each.
    pub start: usize,
    /// Columns.
    pub width: usize,
}

impl View {
    pub fn elements(&self) -> usize {
        self.rows * self.stride
    }

    /// Bytes of the whole rows, skipped ones included.
    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(&[self.rows + self.start / self.stride.max(1), self.stride])
    }

    /// Rows `first..first + count`. Offsets stay aligned when `first` is a multiple of 128.
    pub fn slice_rows(&self, first: usize, count: usize) -> View {
        let offset = self.offset + self.dtype.bytes(&[first, self.stride]);
        View { offset, rows: count, ..*self }
    }

    /// Rows `first..first + count`, wherever they start.
    pub fn skip_rows(&self, first: usize, count: usize) -> View {
        View { start: self.start + first * self.stride, rows: count, ..*self }
    }

    /// All elements as one row.
    pub fn flat(&self) -> View {
        let elements = self.elements();
        View { rows: 1, stride: elements, start: 0, width: elements, ..*self }
    }

    /// Every row starts at a multiple of four elements.
    pub fn by_fours(&self) -> bool {
        self.stride.is_multiple_of(4) && self.start.is_multiple_of(4)
    }

    /// `other` starts where this view ends, rows after rows.
    pub fn is_followed_by(&self, other: &View) -> bool {
        self.place == other.place
            && self.dtype == other.dtype
            && self.stride == other.stride
            && self.start == other.start
            && self.width == other.width
            && self.offset + self.bytes() == other.offset
    }
}

/// How a tensor is cut into wgpu buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Of each piece but the last; a multiple of 256.
    pub bytes: u64,
    /// Of the tensor in each piece but the last.
    pub rows: usize,
    /// Of the tensor in each piece; in a key-value cache, which is cut by heads, fewer than it has, and all rows.
    pub columns: usize,
}

impl Cut {
    /// Whether a tensor's bytes lie otherwise in its pieces than in the whole.
    pub fn rearranges(&self, view: &View) -> bool {
        self.columns < view.stride || view.dtype == DType::Block8
    }

    /// The bytes of a tensor with these rows and columns as they lie in its pieces.
    pub fn arranged(&self, dtype: DType, shape: [usize; 2], bytes: &[u8]) -> Vec<u8> {
        let mut pieces = vec![0; self.total(dtype, shape)];
        self.moves(dtype, shape, |whole, piece, count| {
            pieces[piece..piece + count].copy_from_slice(&bytes[whole..whole + count]);
        });
        pieces
    }

    /// The other way round.
    pub fn gathered(&self, dtype: DType, shape: [usize; 2], pieces: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; dtype.bytes(&shape) as usize];
        self.moves(dtype, shape, |whole, piece, count| {
            bytes[whole..whole + count].copy_from_slice(&pieces[piece..piece + count]);
        });
        bytes
    }

    /// Bytes of all pieces.
    pub fn total(&self, dtype: DType, [rows, columns]: [usize; 2]) -> usize {
        let (down, across) = (rows.div_ceil(self.rows), columns.div_ceil(self.columns));
        let last = dtype.bytes(&[rows - (down - 1) * self.rows, self.columns]).next_multiple_of(256);
        (down * across - 1) * self.bytes as usize + last as usize
    }

    /// Of what lies together in the whole and in a piece: where in the whole, where in the pieces, its bytes.
    fn moves(&self, dtype: DType, [rows, columns]: [usize; 2], mut each: impl FnMut(usize, usize, usize)) {
        if dtype == DType::Block8 {
            let (all, own) = (rows * columns, self.rows * columns);
            for (piece, first) in (0..all).step_by(own).enumerate() {
                let (at, count) = (piece * self.bytes as usize, own.min(all - first));
                let scales = block8::scale_bytes(count);
                each(block8::scale_bytes(first), at, scales);
                each(block8::scale_bytes(all) + first, at + scales, count);
            }
            return;
        }
        let size = dtype.bytes(&[1]) as usize;
        for (piece, first) in (0..columns).step_by(self.columns).enumerate() {
            let width = self.columns.min(columns - first);
            for row in 0..rows {
                let at = piece * self.bytes as usize + row * width * size;
                each((row * columns + first) * size, at, width * size);
            }
        }
    }
}

/// Memory that buffers share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slab {
    pub bytes: u64,
    /// Whether a shader may write to it.
    pub writable: bool,
    /// None: one wgpu buffer.
    pub cut: Option<Cut>,
}

/// Bytes that things may have on an adapter.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// What a shader sees of a buffer at once.
    pub binding: u64,
    /// A wgpu buffer.
    pub buffer: u64,
}

/// A slab that buffers share takes at most so many bytes.
const SLAB_BYTES: u64 = 1 << 30;

/// Placement of every buffer, and the sizes of what must be allocated.
pub struct Storage {
    views: Vec<View>,
    pub slabs: Vec<Slab>,
    pub segments: Vec<u64>,
    pub pieces: Vec<Pieces>,
}

/// Buffers of one class share slabs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Class {
    writable: bool,
    kind: Kind,
    dtype_bytes: u64,
    /// 1 and 2: first and second moments.
    moment: u8,
}

impl Storage {
    /// Lays out a plan. `half_weights`: frozen bf16 weights are kept as f16.
    pub fn new(plan: &Plan, limits: Limits, half_weights: bool) -> Storage {
        let workload = &plan.workload;
        let written = written(plan);
        let (order, moments) = order(plan);
        let mut views = Vec::with_capacity(workload.buffers.len());
        for (index, buffer) in workload.buffers.iter().enumerate() {
            let (place, offset) = match plan.placements[index] {
                Placement::Arena { segment, offset } => (Place::Segment(segment), offset),
                Placement::Pieces { buffer, offset } => (Place::Pieces(buffer), offset),
                Placement::Own => (Place::Scratch, 0),
            };
            let frozen = buffer.kind == Kind::Weight && !written[index];
            let dtype = if half_weights && frozen && buffer.dtype == DType::BF16 { DType::F16 } else { buffer.dtype };
            let stride = buffer.columns();
            views.push(View { place, offset, dtype, rows: buffer.rows(), stride, start: 0, width: stride });
        }
        let mut classes: HashMap<Class, Vec<usize>> = HashMap::new();
        for (index, buffer) in workload.buffers.iter().enumerate() {
            if plan.placements[index] != Placement::Own {
                continue;
            }
            let class = Class {
                writable: written[index] || !matches!(buffer.kind, Kind::Weight | Kind::Constant),
                kind: buffer.kind,
                dtype_bytes: views[index].dtype.bytes(&[1, 1]),
                moment: moments[index],
            };
            classes.entry(class).or_default().push(index);
        }
        let mut classes: Vec<(Class, Vec<usize>)> = classes.into_iter().collect();
        classes.sort_by_key(|entry| entry.0);
        let largest = SLAB_BYTES.min(limits.binding).min(limits.buffer);
        let heads = cached_heads(plan);
        let mut slabs: Vec<Slab> = Vec::new();
        for (class, mut members) in classes {
            members.sort_by_key(|&index| (order[index], index));
            let mut open = false;
            for index in members {
                let view = &mut views[index];
                let writable = class.writable;
                let odd = view.dtype.is_quantized() || view.dtype == DType::Block8;
                let unit = if odd { 256 } else { 128 * view.dtype.bytes(&[1, 1]) };
                let bytes = slab_bytes(view).next_multiple_of(unit.max(256));
                if let Some((cut, bytes)) = cut(view, heads.get(&index).copied(), limits) {
                    (view.place, view.offset) = (Place::Slab(slabs.len()), 0);
                    slabs.push(Slab { bytes, writable, cut: Some(cut) });
                    open = false;
                    continue;
                }
                if !open || slabs.last().is_none_or(|slab| slab.bytes + bytes > largest) {
                    slabs.push(Slab { bytes: 0, writable, cut: None });
                    open = true;
                }
                let slab = slabs.len() - 1;
                (view.place, view.offset) = (Place::Slab(slab), slabs[slab].bytes);
                slabs[slab].bytes += bytes;
            }
        }
        Storage { views, slabs, segments: plan.segments.clone(), pieces: plan.pieces.clone() }
    }

    pub fn view(&self, id: BufferId) -> View {
        self.views[id.index()]
    }

    /// Rows and columns of the tensor that starts where the view does.
    pub fn whole(&self, view: &View) -> (usize, usize) {
        let tensor = self.views.iter().find(|known| (known.place, known.offset) == (view.place, view.offset));
        tensor.map_or((view.rows, view.stride), |tensor| (tensor.rows, tensor.stride))
    }

    /// The place and offset that a view is bound at; none where it lies in more than one piece.
    pub fn bound(&self, view: &View) -> Option<(Place, u64)> {
        let Place::Pieces(buffer) = view.place else { return Some((view.place, view.offset)) };
        let (segment, offset, left) = self.pieces[buffer].at(view.offset);
        (view.bytes() <= left).then_some((Place::Segment(segment), offset))
    }

    /// Rows of a view before the end of the piece that its first one lies in; none where it is in no pieces.
    pub fn rows_in_piece(&self, view: &View) -> Option<usize> {
        let Place::Pieces(buffer) = view.place else { return None };
        Some((self.pieces[buffer].at(view.offset).2 / view.dtype.bytes(&[1, view.stride]).max(1)) as usize)
    }

    /// How the tensor in a place is cut, if it is.
    pub fn cut(&self, place: Place) -> Option<Cut> {
        match place {
            Place::Slab(slab) => self.slabs[slab].cut,
            _ => None,
        }
    }

    pub fn is_writable(&self, place: Place) -> bool {
        match place {
            Place::Slab(slab) => self.slabs[slab].writable,
            Place::Segment(_) | Place::Pieces(_) | Place::Scratch | Place::Unpacked => true,
            Place::Tables => false,
        }
    }
}

/// Device bytes of a persistent buffer.
fn slab_bytes(view: &View) -> u64 {
    match view.dtype {
        DType::Nf4 | DType::Int8 | DType::Fp8 => super::quantized::device_bytes(view.dtype, view.rows, view.stride),
        _ => view.bytes(),
    }
}

/// How a tensor is cut and the bytes of all its pieces; none where it need not be, or cannot. `heads`: of a key-value cache, their
/// number and dimensions.
fn cut(view: &View, heads: Option<(usize, usize)>, limits: Limits) -> Option<(Cut, u64)> {
    let bytes = slab_bytes(view);
    let most = limits.binding.min(limits.buffer);
    // The last piece is as large as it must be.
    let after_rows = |rows: usize| {
        let last = (view.rows - 1) % rows + 1;
        let of = |rows: usize| slab_bytes(&View { rows, ..*view }).next_multiple_of(256);
        let whole = (view.rows - last) as u64 / rows as u64;
        (Cut { bytes: of(rows), rows, columns: view.stride }, whole * of(rows) + of(last))
    };
    if let Some((count, head_dim)) = heads {
        let most_heads = (most / view.dtype.bytes(&[view.rows, head_dim]).max(1)) as usize;
        let columns = most_heads * head_dim;
        let piece = view.dtype.bytes(&[view.rows, columns]).next_multiple_of(256);
        let cut = Cut { bytes: piece, rows: view.rows, columns };
        return (bytes > most && most_heads > 0).then(|| (cut, count.div_ceil(most_heads) as u64 * piece));
    }
    if matches!(view.dtype, DType::Nf4 | DType::Int8) {
        // Blocks of scales begin with a piece, and rows at which products begin.
        let unit = super::quantized::whole_rows(view.stride).max(128);
        let fits = |rows: &usize| super::quantized::device_bytes(view.dtype, *rows, view.stride) <= most;
        let rows = (1..=view.rows / unit).rev().map(|units| units * unit).find(fits);
        let rows = rows.filter(|_| bytes > most)?;
        return Some(after_rows(rows));
    }
    // As many rows whatever the type: a parameter and its copy, its gradient and its moments are cut alike.
    let rows = (most / DType::F32.bytes(&[1, view.stride]).max(1)) as usize / 128 * 128;
    let cuts = match view.dtype {
        // Bound whole; blocks begin with a piece.
        DType::Block8 => bytes > most && (rows * view.stride).is_multiple_of(block8::BLOCK),
        _ => bytes > limits.buffer,
    };
    (cuts && rows > 0).then(|| after_rows(rows))
}

/// Heads of the key-value caches of a plan, by the caches' numbers: how many, and their dimensions.
fn cached_heads(plan: &Plan) -> HashMap<usize, (usize, usize)> {
    let mut heads = HashMap::new();
    for step in plan.workload.programs.iter().flat_map(|program| &program.steps) {
        if let Op::CachedAttention { cache_key, cache_value, shape, .. } = &step.op {
            heads.extend([cache_key, cache_value].map(|id| (id.index(), (shape.kv_heads, shape.head_dim))));
        }
    }
    heads
}

fn written(plan: &Plan) -> Vec<bool> {
    let mut written = vec![false; plan.workload.buffers.len()];
    for program in &plan.workload.programs {
        for step in &program.steps {
            for (id, access) in step.op.accesses() {
                written[id.index()] |= access != crate::program::Access::Read;
            }
        }
    }
    written
}

/// A sort key for each buffer, and which moment it is.
fn order(plan: &Plan) -> (Vec<u32>, Vec<u8>) {
    let count = plan.workload.buffers.len();
    let (mut key, mut moments) = (vec![u32::MAX; count], vec![0; count]);
    let mut next = 0;
    let mut assign = |key: &mut Vec<u32>, id: BufferId| {
        if key[id.index()] == u32::MAX {
            key[id.index()] = next;
            next += 1;
        }
    };
    let ops = || plan.workload.programs.iter().flat_map(|program| program.steps.iter().map(|step| &step.op));
    for op in ops() {
        if let Op::Linear { projections, .. } = op {
            projections.iter().for_each(|p| assign(&mut key, p.weight));
            projections.iter().filter_map(|p| p.bias).for_each(|bias| assign(&mut key, bias));
            projections.iter().filter_map(|p| p.lora.as_ref()).for_each(|lora| assign(&mut key, lora.a));
            projections.iter().filter_map(|p| p.lora.as_ref()).for_each(|lora| assign(&mut key, lora.b));
        }
    }
    // A parameter keeps step with its copy in the compute type, which is what Linear reads.
    for op in ops() {
        if let Op::Cast { pairs } = op {
            for &(from, to) in pairs {
                assign(&mut key, to);
                let number = key[to.index()].min(key[from.index()]);
                (key[from.index()], key[to.index()]) = (number, number);
            }
        }
    }
    for op in ops() {
        if let Op::AdamW { parts, .. } = op {
            for part in parts {
                assign(&mut key, part.parameter);
                let number = key[part.parameter.index()];
                for id in [part.gradient, part.first_moment, part.second_moment] {
                    key[id.index()] = number;
                }
                moments[part.first_moment.index()] = 1;
                moments[part.second_moment.index()] = 2;
            }
        }
    }
    (key, moments)
}
