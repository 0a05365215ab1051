//! Where buffers lie on the device.
//!
//! Arena segments are one wgpu buffer each. Persistent buffers are laid end to end in *slabs*, one sequence of
//! slabs a class of buffers, in an order that makes work on many tensors one dispatch: a parameter, its gradient and
//! its moments stand at the same place of their slabs, and the projections that share an input stand side by side.
//! Entries start at multiples of 128 elements, so that slabs of different element sizes keep step.

use std::collections::HashMap;

use crate::program::{BufferId, DType, Kind, Op, Placement, Plan};

/// A wgpu buffer of the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    Segment(usize),
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

/// Placement of every buffer, and the sizes of what must be allocated.
pub struct Storage {
    views: Vec<View>,
    /// Bytes of each slab.
    pub slabs: Vec<u64>,
    /// Whether a shader may write to the slab.
    pub writable: Vec<bool>,
    pub segments: Vec<u64>,
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
    /// Lays out a plan. Slabs are at most `largest` bytes, unless one buffer alone is larger.
    /// `half_weights`: frozen bf16 weights are kept as f16.
    pub fn new(plan: &Plan, largest: u64, half_weights: bool) -> Storage {
        let workload = &plan.workload;
        let written = written(plan);
        let (order, moments) = order(plan);
        let mut views = Vec::with_capacity(workload.buffers.len());
        for (index, buffer) in workload.buffers.iter().enumerate() {
            let (place, offset) = match plan.placements[index] {
                Placement::Arena { segment, offset } => (Place::Segment(segment), offset),
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
        let (mut slabs, mut writable) = (Vec::new(), Vec::new());
        for (class, mut members) in classes {
            members.sort_by_key(|&index| (order[index], index));
            let mut open = false;
            for index in members {
                let view = &mut views[index];
                let odd = view.dtype.is_quantized() || view.dtype == DType::Block8;
                let unit = if odd { 256 } else { 128 * view.dtype.bytes(&[1, 1]) };
                let bytes = slab_bytes(view).next_multiple_of(unit.max(256));
                if !open || slabs.last().is_none_or(|&used: &u64| used + bytes > largest) {
                    slabs.push(0);
                    writable.push(class.writable);
                    open = true;
                }
                let slab = slabs.len() - 1;
                (view.place, view.offset) = (Place::Slab(slab), slabs[slab]);
                slabs[slab] += bytes;
            }
        }
        Storage { views, slabs, writable, segments: plan.segments.clone() }
    }

    pub fn view(&self, id: BufferId) -> View {
        self.views[id.index()]
    }

    /// Rows and columns of the tensor that starts where the view does.
    pub fn whole(&self, view: &View) -> (usize, usize) {
        let tensor = self.views.iter().find(|known| (known.place, known.offset) == (view.place, view.offset));
        tensor.map_or((view.rows, view.stride), |tensor| (tensor.rows, tensor.stride))
    }

    pub fn is_writable(&self, place: Place) -> bool {
        match place {
            Place::Slab(slab) => self.writable[slab],
            Place::Segment(_) | Place::Scratch | Place::Unpacked => true,
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
