//! Memory of a session: persistent buffers, arena segments, and weights where they lie in the checkpoint.
//!
//! An operation borrows its buffers through [`Views`], which refuses two borrows that overlap when one of them
//! is for writing: a faulty plan is an error here, never undefined behaviour.

use std::alloc::{Layout as Allocation, alloc_zeroed, dealloc};
use std::cell::RefCell;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::product::{Matrix, MatrixMut, Values, Weight};
use super::quantized::{self, Int8, Nf4};
use super::{ENGINE, Layout, device};
use crate::backend::{self, EngineError, WeightSource, floats};
use crate::program::{Access, Buffer, BufferId, Columns, DType, Kind, Placement, Plan};

const ALIGNMENT: usize = 64;

/// One allocation, zeroed at first.
struct Region {
    start: NonNull<u8>,
    allocation: Allocation,
}

impl Region {
    fn new(bytes: u64, what: &str) -> Result<Self, EngineError> {
        let refused = || EngineError::OutOfMemory { engine: ENGINE, what: format!("{bytes} bytes for {what}") };
        let bytes = usize::try_from(bytes.max(1)).map_err(|_| refused())?;
        let allocation = Allocation::from_size_align(bytes, ALIGNMENT).map_err(|_| refused())?;
        // SAFETY: the size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(allocation) }).ok_or_else(refused)?;
        Ok(Self { start, allocation })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and freed only here.
        unsafe { dealloc(self.start.as_ptr(), self.allocation) }
    }
}

/// Where a buffer's bytes are.
struct Slot {
    start: *mut u8,
    bytes: usize,
    dtype: DType,
    /// In the weight source's memory: must not be written.
    mapped: bool,
    columns: usize,
    rows: usize,
}

pub struct Memory {
    slots: Vec<Slot>,
    regions: Vec<Region>,
    leases: RefCell<Vec<Lease>>,
    /// Keeps mapped weights alive.
    _weights: Arc<dyn WeightSource>,
}

// SAFETY: the pointers lead into regions owned by this value or into the weight source, which is `Send + Sync`.
unsafe impl Send for Memory {}

impl Memory {
    pub fn new(plan: &Plan, weights: Arc<dyn WeightSource>, layout: Layout) -> Result<Self, EngineError> {
        let workload = &plan.workload;
        let mut written = vec![false; workload.buffers.len()];
        for step in workload.programs.iter().flat_map(|program| &program.steps) {
            for (id, access) in step.op.accesses() {
                written[id.index()] |= access != Access::Read;
            }
        }
        let mut memory = Self {
            slots: Vec::with_capacity(workload.buffers.len()),
            regions: Vec::new(),
            leases: RefCell::default(),
            _weights: weights.clone(),
        };
        let mut segments = Vec::new();
        if layout == Layout::Arena {
            for (index, &bytes) in plan.segments.iter().enumerate() {
                segments.push(memory.allocate(bytes, &format!("arena segment {index}"))?);
            }
        }
        for (index, buffer) in workload.buffers.iter().enumerate() {
            let (start, mapped) = match plan.placements[index] {
                _ if buffer.kind == Kind::Weight => memory.load(buffer, &weights, written[index])?,
                Placement::Arena { .. } | Placement::Pieces { .. }
                    if layout != Layout::Arena && buffer.within.is_some() =>
                {
                    let (whole, first) = buffer.within.unwrap_or((BufferId(0), 0));
                    let offset = buffer.dtype.bytes(&[first, buffer.columns()]) as usize;
                    // SAFETY: a builder takes rows of earlier buffers only, within their bounds.
                    (unsafe { memory.slots[whole.index()].start.add(offset) }, false)
                }
                Placement::Pieces { .. } if layout == Layout::Arena => {
                    return Err(device(format!("{} lies in pieces", buffer.name)));
                }
                Placement::Arena { segment, offset } if layout == Layout::Arena => {
                    if offset + buffer.bytes() > plan.segments[segment] {
                        return Err(device(format!("{} does not fit its arena segment", buffer.name)));
                    }
                    // SAFETY: checked above to end inside the segment.
                    (unsafe { segments[segment].add(offset as usize) }, false)
                }
                _ => (memory.allocate(buffer.bytes(), &buffer.name)?, false),
            };
            memory.slots.push(Slot {
                start,
                bytes: buffer.bytes() as usize,
                dtype: buffer.dtype,
                mapped,
                columns: buffer.columns(),
                rows: buffer.rows(),
            });
        }
        for (id, values) in &workload.constants {
            memory.write(*id, bytemuck::cast_slice(values))?;
        }
        Ok(memory)
    }

    fn allocate(&mut self, bytes: u64, what: &str) -> Result<*mut u8, EngineError> {
        let region = Region::new(bytes, what)?;
        let start = region.start.as_ptr();
        self.regions.push(region);
        Ok(start)
    }

    /// A weight where it lies, or a copy: quantized, or in f32 where it will be trained, or where its alignment is odd.
    fn load(
        &mut self,
        buffer: &Buffer,
        weights: &Arc<dyn WeightSource>,
        written: bool,
    ) -> Result<(*mut u8, bool), EngineError> {
        let wrong = |what: String| EngineError::Weight { name: buffer.name.clone(), what };
        let tensor = weights.tensor(&buffer.name)?;
        if tensor.shape != buffer.shape {
            return Err(wrong(format!("has shape {:?}, the model wants {:?}", tensor.shape, buffer.shape)));
        }
        if tensor.bytes.len() as u64 != tensor.dtype.bytes(&tensor.shape) {
            return Err(wrong(format!("has {} bytes, not what its shape takes", tensor.bytes.len())));
        }
        if tensor.dtype == buffer.dtype {
            let aligned = (tensor.bytes.as_ptr() as usize).is_multiple_of(4);
            if !written && aligned {
                return Ok((tensor.bytes.as_ptr().cast_mut(), true));
            }
            let start = self.allocate(buffer.bytes(), &buffer.name)?;
            // SAFETY: the region was just allocated with this many bytes.
            unsafe { start.copy_from_nonoverlapping(tensor.bytes.as_ptr(), tensor.bytes.len()) };
            weights.release(&buffer.name);
            return Ok((start, false));
        }
        if !floats::is_float(tensor.dtype) || !(buffer.dtype == DType::F32 || buffer.dtype.is_quantized()) {
            return Err(wrong(format!(
                "is {} in the checkpoint, the plan wants {}",
                tensor.dtype.name(),
                buffer.dtype.name()
            )));
        }
        let start = self.allocate(buffer.bytes(), &buffer.name)?;
        if buffer.dtype.is_quantized() {
            // SAFETY: a fresh region of this many bytes.
            let bytes = unsafe { std::slice::from_raw_parts_mut(start, buffer.bytes() as usize) };
            backend::quantized::quantize(&buffer.name, &tensor, buffer.dtype, quantized::ALIGNMENT, bytes)?;
        } else {
            // SAFETY: a fresh region of `elements` f32, aligned to 64 bytes.
            let values = unsafe { std::slice::from_raw_parts_mut(start.cast::<f32>(), buffer.elements()) };
            floats::unpack(tensor.dtype, tensor.bytes, values);
        }
        weights.release(&buffer.name);
        Ok((start, false))
    }

    pub fn allocated(&self) -> u64 {
        self.regions.iter().map(|region| region.allocation.size() as u64).sum()
    }

    pub fn write(&mut self, id: BufferId, bytes: &[u8]) -> Result<(), EngineError> {
        let slot = &self.slots[id.index()];
        if slot.bytes != bytes.len() {
            return Err(device(format!("{} bytes written to a buffer of {}", bytes.len(), slot.bytes)));
        }
        if slot.dtype.is_quantized() {
            return Err(device(format!("buffer {} is quantized and cannot be written", id.0)));
        }
        if slot.mapped {
            let start = self.allocate(bytes.len() as u64, "a weight that is overwritten")?;
            let slot = &mut self.slots[id.index()];
            slot.start = start;
            slot.mapped = false;
        }
        // SAFETY: the slot owns this many bytes, and nothing else borrows the memory.
        unsafe { self.slots[id.index()].start.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    pub fn read(&self, id: BufferId, bytes: &mut [u8]) -> Result<(), EngineError> {
        let slot = &self.slots[id.index()];
        if slot.bytes != bytes.len() {
            return Err(device(format!("{} bytes read from a buffer of {}", bytes.len(), slot.bytes)));
        }
        // SAFETY: the slot has this many bytes, and nothing writes them meanwhile.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(slot.start, bytes.len()) };
        Ok(())
    }

    /// Fills a buffer with bytes that read as NaN in every floating-point type.
    pub fn poison(&mut self, id: BufferId) {
        let slot = &self.slots[id.index()];
        if !slot.mapped {
            // SAFETY: the slot owns this many bytes, and nothing else borrows the memory.
            unsafe { slot.start.write_bytes(0xff, slot.bytes) };
        }
    }

    /// Borrows for one operation.
    pub fn views(&mut self) -> Views<'_> {
        self.leases.borrow_mut().clear();
        Views { memory: self }
    }
}

/// Bytes lent to the running operation.
struct Lease {
    bytes: Range<usize>,
    writable: bool,
    /// Buffer and columns, where only a block of columns is lent.
    columns: Option<(BufferId, Range<usize>)>,
}

/// The buffers of one operation. Every borrow is checked against those made before.
pub struct Views<'m> {
    memory: &'m Memory,
}

impl<'m> Views<'m> {
    fn lease(&self, id: BufferId, writable: bool, columns: Option<Range<usize>>) -> Result<&'m Slot, EngineError> {
        let slot = &self.memory.slots[id.index()];
        if writable && slot.mapped {
            return Err(device(format!("buffer {} is a frozen weight, an operation writes it", id.0)));
        }
        let start = slot.start as usize;
        let new = Lease { bytes: start..start + slot.bytes, writable, columns: columns.map(|range| (id, range)) };
        let mut leases = self.memory.leases.borrow_mut();
        for old in leases.iter() {
            let apart = old.bytes.end <= new.bytes.start || new.bytes.end <= old.bytes.start;
            let other_columns = match (&old.columns, &new.columns) {
                (Some((a, first)), Some((b, second))) if a == b => {
                    first.end <= second.start || second.end <= first.start
                }
                _ => false,
            };
            if !apart && !other_columns && (old.writable || new.writable) {
                return Err(device(format!("buffer {} shares memory with another that the operation writes", id.0)));
            }
        }
        leases.push(new);
        Ok(slot)
    }

    fn typed<T: bytemuck::Pod>(
        &self,
        id: BufferId,
        dtype: DType,
        writable: bool,
    ) -> Result<(*mut T, usize), EngineError> {
        let slot = self.lease(id, writable, None)?;
        if slot.dtype != dtype {
            return Err(device(format!("buffer {} is {}, wanted {}", id.0, slot.dtype.name(), dtype.name())));
        }
        Ok((slot.start.cast(), slot.bytes / size_of::<T>()))
    }

    pub fn f32(&self, id: BufferId) -> Result<&'m [f32], EngineError> {
        let (start, length) = self.typed(id, DType::F32, false)?;
        // SAFETY: aligned, initialised, and leased for reading while `'m` lasts.
        Ok(unsafe { std::slice::from_raw_parts(start, length) })
    }

    pub fn f32_mut(&self, id: BufferId) -> Result<&'m mut [f32], EngineError> {
        let (start, length) = self.typed(id, DType::F32, true)?;
        // SAFETY: aligned, initialised, and leased to this caller alone.
        Ok(unsafe { std::slice::from_raw_parts_mut(start, length) })
    }

    pub fn i32(&self, id: BufferId) -> Result<&'m [i32], EngineError> {
        let (start, length) = self.typed(id, DType::I32, false)?;
        // SAFETY: as in `f32`.
        Ok(unsafe { std::slice::from_raw_parts(start, length) })
    }

    /// A random-number key.
    pub fn key(&self, id: BufferId) -> Result<[u32; 4], EngineError> {
        let (start, length) = self.typed(id, DType::U32, false)?;
        // SAFETY: as in `f32`.
        let values: &[u32] = unsafe { std::slice::from_raw_parts(start, length) };
        values.try_into().map_err(|_| device(format!("buffer {} is not a key of four numbers", id.0)))
    }

    /// A buffer of one number.
    pub fn scalar(&self, id: BufferId) -> Result<f32, EngineError> {
        self.f32(id)?.first().copied().ok_or_else(|| device(format!("buffer {} is empty", id.0)))
    }

    pub fn bytes_mut(&self, id: BufferId) -> Result<&'m mut [u8], EngineError> {
        let slot = self.lease(id, true, None)?;
        // SAFETY: leased to this caller alone.
        Ok(unsafe { std::slice::from_raw_parts_mut(slot.start, slot.bytes) })
    }

    pub fn dtype(&self, id: BufferId) -> DType {
        self.memory.slots[id.index()].dtype
    }

    /// Elements of one row of a buffer.
    pub fn columns_of(&self, id: BufferId) -> usize {
        self.memory.slots[id.index()].columns
    }

    /// A whole f32 buffer as a matrix.
    pub fn matrix(&self, id: BufferId) -> Result<Matrix<'m>, EngineError> {
        let columns = self.memory.slots[id.index()].columns;
        Ok(Matrix::new(self.f32(id)?, columns))
    }

    pub fn matrix_mut(&self, id: BufferId) -> Result<MatrixMut<'m>, EngineError> {
        let columns = self.memory.slots[id.index()].columns;
        Ok(MatrixMut::new(self.f32_mut(id)?, columns))
    }

    pub fn columns(&self, columns: Columns) -> Result<Matrix<'m>, EngineError> {
        let (start, rows, stride) = self.block(columns, false)?;
        // SAFETY: `block` checked that the columns lie in the buffer and leased them for reading.
        Ok(unsafe { Matrix::from_raw(start, rows, columns.width, stride) })
    }

    pub fn columns_mut(&self, columns: Columns) -> Result<MatrixMut<'m>, EngineError> {
        let (start, rows, stride) = self.block(columns, true)?;
        // SAFETY: `block` checked that the columns lie in the buffer and leased them to this caller alone.
        Ok(unsafe { MatrixMut::from_raw(start, rows, columns.width, stride) })
    }

    fn block(&self, columns: Columns, writable: bool) -> Result<(*mut f32, usize, usize), EngineError> {
        let range = columns.start..columns.start + columns.width;
        let slot = self.lease(columns.buffer, writable, Some(range.clone()))?;
        if slot.dtype != DType::F32 || range.end > slot.columns {
            return Err(device(format!("columns {range:?} of buffer {} do not exist as f32", columns.buffer.0)));
        }
        // SAFETY: the first of the columns lies in the buffer.
        Ok((unsafe { slot.start.cast::<f32>().add(columns.start) }, slot.rows, slot.columns))
    }

    /// A matrix in any storage type that products accept.
    pub fn weight(&self, id: BufferId) -> Result<Weight<'m>, EngineError> {
        let slot = self.lease(id, false, None)?;
        let (rows, columns) = (slot.rows, slot.columns);
        let elements = rows * columns;
        let start = slot.start;
        let broken = || device(format!("buffer {} does not hold what its shape takes", id.0));
        // SAFETY: the slot holds this many elements of its type, 4-byte aligned, or this many bytes, leased for reading.
        let values = unsafe {
            let bytes = || std::slice::from_raw_parts(start, slot.bytes);
            match slot.dtype {
                DType::F32 => Values::F32(std::slice::from_raw_parts(start.cast(), elements)),
                DType::BF16 => Values::BF16(std::slice::from_raw_parts(start.cast(), elements)),
                DType::F16 => Values::F16(std::slice::from_raw_parts(start.cast(), elements)),
                DType::Nf4 => Values::Nf4(Nf4::new(bytes(), rows, columns).ok_or_else(broken)?),
                DType::Int8 => Values::Int8(Int8::new(bytes(), rows, columns).ok_or_else(broken)?),
                other => return Err(device(format!("buffer {} is {}, not a weight type", id.0, other.name()))),
            }
        };
        Ok(Weight { values, rows, columns })
    }

    /// A weight of any shape as one row.
    pub fn flat(&self, id: BufferId) -> Result<Weight<'m>, EngineError> {
        let weight = self.weight(id)?;
        if self.dtype(id).is_quantized() {
            return Err(device(format!("buffer {} is quantized, which only products take", id.0)));
        }
        Ok(Weight { rows: 1, columns: weight.rows * weight.columns, ..weight })
    }
}
