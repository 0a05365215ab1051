//! Weights on their way to the card: from the memory-mapped file through page-locked memory, converted or quantized
//! on the card as they arrive.

use std::sync::Arc;

use rayon::prelude::*;

use super::command::{Launch, Slot, arguments};
use super::compile::Kernels;
use super::driver::{Card, Event, PinnedMemory, Rows, failed, read, read_rows, unsupported, write, write_rows};
use super::memory::{Int8Parts, Memory, Nf4Parts};
use super::tables::Tables;
use crate::backend::{EngineError, Tensor, WeightSource};
use crate::program::{BufferId, DType, Kind, Workload};

/// Bytes of one page-locked stage, and of the place on the card where converted weights arrive.
const STAGE_BYTES: usize = 32 << 20;

/// Two stages: one fills while the other is on its way.
pub(super) struct Loader<'a> {
    card: &'a Arc<Card>,
    kernels: &'a mut Kernels,
    memory: &'a Memory,
    tables: &'a Tables,
    stages: [(PinnedMemory, Event, bool); 2],
    next: usize,
}

/// How `cast.cu` and `nf4.cu` number the types of a checkpoint.
fn type_number(dtype: DType) -> Option<i32> {
    match dtype {
        DType::F32 => Some(0),
        DType::F16 => Some(1),
        DType::BF16 => Some(2),
        _ => None,
    }
}

impl<'a> Loader<'a> {
    pub fn new(
        card: &'a Arc<Card>,
        kernels: &'a mut Kernels,
        memory: &'a Memory,
        tables: &'a Tables,
    ) -> Result<Self, EngineError> {
        let stage = || Ok::<_, EngineError>((PinnedMemory::new(card, STAGE_BYTES)?, Event::new(card)?, false));
        Ok(Self { card, kernels, memory, tables, stages: [stage()?, stage()?], next: 0 })
    }

    /// Loads every weight of the workload.
    pub fn load(&mut self, workload: &Workload, source: &dyn WeightSource) -> Result<(), EngineError> {
        for (scale, group) in self.memory.fp8_groups() {
            let mut largest = 0.0f32;
            for id in group {
                largest = largest.max(largest_magnitude(&source.tensor(&workload.buffer(id).name)?));
            }
            // The largest code is 448.
            write(self.card, scale, &(largest / 448.0).to_le_bytes())?;
        }
        for (id, buffer) in workload.of_kind(Kind::Weight) {
            let wrong = |what: String| EngineError::Weight { name: buffer.name.clone(), what };
            let tensor = source.tensor(&buffer.name)?;
            if tensor.shape != buffer.shape {
                return Err(wrong(format!("has shape {:?}, the model wants {:?}", tensor.shape, buffer.shape)));
            }
            if tensor.bytes.len() as u64 != tensor.dtype.bytes(&tensor.shape) {
                return Err(wrong(format!("has {} bytes, not what its shape takes", tensor.bytes.len())));
            }
            self.place(workload, id, &tensor)?;
        }
        self.card.synchronize()
    }

    /// Brings one tensor to its buffer.
    pub fn place(&mut self, workload: &Workload, id: BufferId, tensor: &Tensor<'_>) -> Result<(), EngineError> {
        let name = &workload.buffer(id).name;
        let stored = self.memory.stored(id);
        let address = self.memory.address(id);
        if stored == tensor.dtype && self.memory.on_host(id) {
            return write_host(self.card, address, tensor.bytes);
        }
        if stored == tensor.dtype {
            let rows = rows_of(self.memory, workload, id);
            // Whole rows at a time, where they lie apart.
            let piece = rows.map_or(STAGE_BYTES, |rows| STAGE_BYTES / rows.bytes * rows.bytes);
            let mut sent = 0;
            for chunk in tensor.bytes.chunks(piece) {
                match rows {
                    None => self.send(chunk, address + sent as u64, None)?,
                    Some(rows) => {
                        let part = Rows { count: chunk.len() / rows.bytes, ..rows };
                        self.send(chunk, address + (sent / rows.bytes * rows.stride) as u64, Some(part))?;
                    }
                }
                sent += chunk.len();
            }
            return Ok(());
        }
        let kind = type_number(tensor.dtype)
            .ok_or_else(|| unsupported(format!("{name} stored as {}", tensor.dtype.name())))?;
        let elements: usize = tensor.shape.iter().product();
        let element_bytes = tensor.dtype.bytes(&[1]) as usize;
        // Whole blocks of any quantization in every chunk; 8-bit integers have a scale a row.
        let scratch = self.memory.scratch.bytes;
        let mut chunk_elements = STAGE_BYTES.min(scratch as usize) / element_bytes;
        let rows = tensor.shape.first().copied().unwrap_or(1).max(1);
        let columns = elements / rows;
        if stored == DType::Int8 {
            chunk_elements = chunk_elements / columns.max(1) * columns;
            if chunk_elements == 0 {
                return Err(unsupported(format!("{name} in 8-bit integers: rows of {columns} are too long")));
            }
        }
        let arrival = self.memory.scratch.pointer;
        let scales = arrival + STAGE_BYTES as u64;
        if stored == DType::Nf4 && 4 * elements.div_ceil(64) as u64 > scratch.saturating_sub(STAGE_BYTES as u64) {
            return Err(unsupported(format!("{name} in 4 bits: {elements} elements are too many for one tensor")));
        }
        for (index, chunk) in tensor.bytes.chunks(chunk_elements * element_bytes).enumerate() {
            self.send(chunk, arrival, None)?;
            let first = (index * chunk_elements) as u64;
            let count = chunk.len() / element_bytes;
            match stored {
                DType::BF16 => {
                    let stride = columns + self.memory.spare(workload, id);
                    let arguments =
                        arguments![arrival, kind, address, first as i64, columns as i64, stride as i64, count as i64,];
                    self.launch("cast", "convert_to_bf16", count.div_ceil(256).min(8192), 256, arguments)?;
                }
                DType::F32 => {
                    let arguments = arguments![arrival, kind, address + 4 * first, count as i64];
                    self.launch("cast", "convert_to_f32", count.div_ceil(256).min(8192), 256, arguments)?;
                }
                DType::Nf4 => {
                    let codes = Nf4Parts::at(address, elements as u64).codes + first / 2;
                    let to_scales = scales + 4 * (first / 64);
                    let blocks = count.div_ceil(64).div_ceil(8);
                    let arguments = arguments![arrival, kind, codes, to_scales, count as i64];
                    self.launch("nf4", "nf4_quantize", blocks, 256, arguments)?;
                }
                DType::Int8 => {
                    let parts = Int8Parts::at(address, elements as u64, rows as u64);
                    let first_row = first / columns.max(1) as u64;
                    let arguments =
                        arguments![arrival, kind, parts.codes + first, parts.scales + 4 * first_row, columns as i32];
                    self.launch("int8", "int8_quantize", count / columns.max(1), 256, arguments)?;
                }
                DType::Fp8 => {
                    let arguments = arguments![arrival, kind, self.memory.scale(id), address + first, count as i64];
                    let blocks = count.div_ceil(16 * 256).min(8192);
                    self.launch("fp8", "fp8_from_checkpoint", blocks, 256, arguments)?;
                }
                other => return Err(unsupported(format!("{name} held as {}", other.name()))),
            }
        }
        if stored == DType::Nf4 {
            let parts = Nf4Parts::at(address, elements as u64);
            let count = elements.div_ceil(64);
            let arguments = arguments![scales, parts.offset, count as i64];
            self.launch("nf4", "nf4_offset", 1, 1024, arguments)?;
            let arguments = arguments![
                scales,
                parts.offset,
                self.tables.pointer(),
                parts.scale_codes,
                parts.second_scales,
                count as i64,
            ];
            self.launch("nf4", "nf4_quantize_scales", count.div_ceil(256), 256, arguments)?;
        }
        Ok(())
    }

    /// Starts bytes on their way, to rows that lie apart or to one place.
    fn send(&mut self, bytes: &[u8], to: u64, rows: Option<Rows>) -> Result<(), EngineError> {
        let (stage, passed, used) = &mut self.stages[self.next];
        self.next = 1 - self.next;
        if *used {
            passed.wait()?;
        }
        // Several cores read the file's pages faster than one.
        let target = &mut stage.bytes_mut()[..bytes.len()];
        const PIECE: usize = 1 << 20;
        target.par_chunks_mut(PIECE).zip(bytes.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
        match rows {
            Some(rows) => stage.send_rows(to, rows)?,
            None => stage.send(to, bytes.len())?,
        }
        passed.record()?;
        *used = true;
        Ok(())
    }

    fn launch(
        &mut self,
        file: &'static str,
        entry: &str,
        blocks: usize,
        threads: u32,
        arguments: Vec<Slot>,
    ) -> Result<(), EngineError> {
        let function = self.kernels.function(&file.into(), entry)?;
        let grid = [blocks as u32, 1, 1];
        Launch { function, grid, threads, shared_bytes: 0, arguments, entry: entry.to_string() }.run(self.card)
    }
}

/// Largest magnitude in a tensor; of bf16 and f16 by their bits, whose order is that of the magnitudes.
fn largest_magnitude(tensor: &Tensor<'_>) -> f32 {
    const PIECE: usize = 1 << 20;
    let half = || {
        let piece = |piece: &[u8]| {
            let words = piece.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]) & 0x7fff);
            words.fold(0, u16::max)
        };
        tensor.bytes.par_chunks(PIECE).map(piece).reduce(|| 0, u16::max)
    };
    match tensor.dtype {
        DType::BF16 => half::bf16::from_bits(half()).to_f32(),
        DType::F16 => half::f16::from_bits(half()).to_f32(),
        _ => {
            let word = |word: &[u8]| f32::from_le_bytes([word[0], word[1], word[2], word[3]]).abs();
            let piece = |piece: &[u8]| piece.chunks_exact(4).map(word).fold(0.0, f32::max);
            tensor.bytes.par_chunks(PIECE).map(piece).reduce(|| 0.0, f32::max)
        }
    }
}

impl Drop for Loader<'_> {
    fn drop(&mut self) {
        // The stages must not go while a copy reads them.
        let _ = self.card.synchronize();
    }
}

/// The rows of a buffer that have columns to spare; none where they lie end to end.
fn rows_of(memory: &Memory, workload: &Workload, id: BufferId) -> Option<Rows> {
    let (buffer, spare) = (workload.buffer(id), memory.spare(workload, id));
    let element = memory.stored(id).bytes(&[1]) as usize;
    let (bytes, stride) = (buffer.columns() * element, (buffer.columns() + spare) * element);
    (spare > 0).then_some(Rows { bytes, stride, count: buffer.rows() })
}

/// Fills a buffer that lies on the host, when the card is done with it.
fn write_host(card: &Card, address: u64, bytes: &[u8]) -> Result<(), EngineError> {
    card.synchronize()?;
    // SAFETY: the address is that of a buffer of this size in page-locked memory, which nothing uses now.
    let target = unsafe { std::slice::from_raw_parts_mut(address as *mut u8, bytes.len()) };
    const PIECE: usize = 1 << 20;
    target.par_chunks_mut(PIECE).zip(bytes.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
    Ok(())
}

/// Writes a buffer from bytes in its logical type.
pub(super) fn write_buffer(
    card: &Arc<Card>,
    kernels: &mut Kernels,
    memory: &Memory,
    tables: &Tables,
    workload: &Workload,
    id: BufferId,
    bytes: &[u8],
) -> Result<(), EngineError> {
    let buffer = workload.buffer(id);
    if bytes.len() as u64 != buffer.bytes() {
        return Err(failed(format!("{} bytes written to {}, which has {}", bytes.len(), buffer.name, buffer.bytes())));
    }
    if buffer.dtype.is_quantized() {
        return Err(unsupported(format!("{} is quantized and cannot be written", buffer.name)));
    }
    if memory.address(id) == 0 && !bytes.is_empty() {
        return Err(failed(format!("{} is touched by no program and has no memory", buffer.name)));
    }
    if memory.stored(id) == buffer.dtype && memory.on_host(id) {
        return write_host(card, memory.address(id), bytes);
    }
    if memory.stored(id) == buffer.dtype {
        return match rows_of(memory, workload, id) {
            Some(rows) => write_rows(card, memory.address(id), rows, bytes),
            None => write(card, memory.address(id), bytes),
        };
    }
    let tensor = Tensor { dtype: buffer.dtype, shape: buffer.shape.clone(), bytes };
    Loader::new(card, kernels, memory, tables)?.place(workload, id, &tensor)
}

/// Reads a buffer as bytes in its logical type, after all work so far.
pub(super) fn read_buffer(
    card: &Card,
    memory: &Memory,
    workload: &Workload,
    id: BufferId,
    bytes: &mut [u8],
) -> Result<(), EngineError> {
    let buffer = workload.buffer(id);
    if bytes.len() as u64 != buffer.bytes() {
        return Err(failed(format!("{} bytes read from {}, which has {}", bytes.len(), buffer.name, buffer.bytes())));
    }
    let address = memory.address(id);
    if address == 0 {
        return Err(failed(format!("{} is touched by no program and has no memory", buffer.name)));
    }
    let stored = memory.stored(id);
    if stored == buffer.dtype && memory.on_host(id) {
        card.synchronize()?;
        // SAFETY: the buffer's page-locked memory has this many bytes and lives as long as the session; the card has
        // passed everything that writes to it.
        bytes.copy_from_slice(unsafe { std::slice::from_raw_parts(address as *const u8, bytes.len()) });
        return Ok(());
    }
    if stored == DType::Fp8 {
        let (codes, scale) = bytes.split_at_mut(buffer.elements());
        read(card, address, codes)?;
        return read(card, memory.scale(id), scale);
    }
    if stored == DType::Int8 {
        let (codes, scales) = bytes.split_at_mut(buffer.elements());
        let parts = Int8Parts::at(address, codes.len() as u64, buffer.rows() as u64);
        read(card, parts.codes, codes)?;
        return read(card, parts.scales, scales);
    }
    let read_all = |bytes: &mut [u8]| match rows_of(memory, workload, id) {
        Some(rows) => read_rows(card, address, rows, bytes),
        None => read(card, address, bytes),
    };
    if stored == buffer.dtype && stored != DType::Nf4 {
        return read_all(bytes);
    }
    if stored == DType::Nf4 {
        // Codes, scale codes, second scales, offset: end to end, without the gaps they have on the card.
        let elements = buffer.elements();
        let blocks = elements.div_ceil(64);
        let parts = Nf4Parts::at(address, elements as u64);
        let (codes, rest) = bytes.split_at_mut(elements.div_ceil(2));
        let (scale_codes, rest) = rest.split_at_mut(blocks);
        let (second_scales, offset) = rest.split_at_mut(4 * blocks.div_ceil(256));
        read(card, parts.codes, codes)?;
        read(card, parts.scale_codes, scale_codes)?;
        read(card, parts.second_scales, second_scales)?;
        return read(card, parts.offset, offset);
    }
    let mut held = vec![0u8; stored.bytes(&buffer.shape) as usize];
    read_all(&mut held)?;
    let value = |index: usize| match stored {
        DType::BF16 => half::bf16::from_le_bytes([held[2 * index], held[2 * index + 1]]).to_f32(),
        _ => f32::from_le_bytes([held[4 * index], held[4 * index + 1], held[4 * index + 2], held[4 * index + 3]]),
    };
    for index in 0..buffer.elements() {
        match buffer.dtype {
            DType::F16 => {
                bytes[2 * index..2 * index + 2].copy_from_slice(&half::f16::from_f32(value(index)).to_le_bytes())
            }
            _ => bytes[4 * index..4 * index + 4].copy_from_slice(&value(index).to_le_bytes()),
        }
    }
    Ok(())
}
