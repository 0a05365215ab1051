//! Device memory of a session, and copies between it and the host.

use super::adapter::{ENGINE, Gpu};
use super::storage::Place;
use crate::backend::EngineError;
use crate::program::plan::Pieces;

/// Bytes that are copied to or from the host at once.
pub(super) const TRANSFER_BYTES: u64 = 64 << 20;

pub(super) struct Memory {
    pub segments: Vec<wgpu::Buffer>,
    /// Where buffers in pieces lie in the segments.
    pub pieces: Vec<Pieces>,
    pub slabs: Vec<SlabBuffers>,
    pub scratch: Option<wgpu::Buffer>,
    pub unpacked: Option<wgpu::Buffer>,
    pub tables: wgpu::Buffer,
    /// What the host reads through.
    pub staging: Option<wgpu::Buffer>,
}

/// A slab.
pub(super) struct SlabBuffers {
    /// Bytes of each but the last.
    pub bytes: u64,
    pub buffers: Vec<wgpu::Buffer>,
}

impl Memory {
    /// Everything that programs write or read but the tables.
    pub fn all(&self) -> impl Iterator<Item = &wgpu::Buffer> {
        let slabs = self.slabs.iter().flat_map(|slab| &slab.buffers);
        self.segments.iter().chain(slabs).chain(&self.scratch).chain(&self.unpacked)
    }

    /// The wgpu buffer that has the byte at `offset` of a place, and where in it.
    pub fn at(&self, place: Place, offset: u64) -> (&wgpu::Buffer, u64) {
        let whole = match place {
            Place::Slab(index) => {
                let slab = &self.slabs[index];
                return (&slab.buffers[(offset / slab.bytes) as usize], offset % slab.bytes);
            }
            Place::Pieces(index) => {
                let (segment, offset, _) = self.pieces[index].at(offset);
                return (&self.segments[segment], offset);
            }
            Place::Segment(index) => &self.segments[index],
            Place::Scratch => self.scratch.as_ref().expect("allocated where a dispatch uses it"),
            Place::Tables => &self.tables,
            Place::Unpacked => self.unpacked.as_ref().expect("allocated where a dispatch uses it"),
        };
        (whole, offset)
    }

    /// Bytes from `offset` on that lie in one wgpu buffer, at most `bytes`.
    pub fn together(&self, place: Place, offset: u64, bytes: u64) -> u64 {
        match place {
            Place::Slab(index) => bytes.min(self.slabs[index].bytes - offset % self.slabs[index].bytes),
            Place::Pieces(index) => bytes.min(self.pieces[index].at(offset).2),
            _ => bytes,
        }
    }

    /// Copies bytes to a place; a length that is no multiple of 4 is padded (entries have room for it).
    pub fn upload(&self, gpu: &Gpu, place: Place, offset: u64, bytes: &[u8]) -> Result<(), EngineError> {
        let whole = bytes.len() / 4 * 4;
        let mut first = 0;
        while first < whole {
            let at = offset + first as u64;
            let count = self.together(place, at, TRANSFER_BYTES.min((whole - first) as u64)) as usize;
            let (buffer, start) = self.at(place, at);
            gpu.queue.write_buffer(buffer, start, &bytes[first..first + count]);
            first += count;
        }
        if whole < bytes.len() {
            let mut last = [0; 4];
            last[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
            let (buffer, start) = self.at(place, offset + whole as u64);
            gpu.queue.write_buffer(buffer, start, &last);
        }
        gpu.failure.check()
    }

    /// Copies from a place, after all work so far, through memory that the host reads.
    pub fn download(
        &mut self,
        gpu: &Gpu,
        name: &str,
        place: Place,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), EngineError> {
        let failed = |what: String| EngineError::Device { engine: ENGINE, what: format!("reading {name}: {what}") };
        let transfer = TRANSFER_BYTES.min(gpu.limits.max_buffer_size & !255);
        let wanted = transfer.min((bytes.len() as u64).next_multiple_of(256));
        let staging = match self.staging.take().filter(|staging| staging.size() >= wanted) {
            Some(staging) => staging,
            None => gpu.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("read"),
                size: wanted,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            }),
        };
        let mut first = 0;
        while first < bytes.len() {
            let at = offset + first as u64;
            let count = self.together(place, at, transfer.min((bytes.len() - first) as u64));
            let size = count.next_multiple_of(4);
            let (buffer, start) = self.at(place, at);
            let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.copy_buffer_to_buffer(buffer, start, &staging, 0, size);
            gpu.queue.submit([encoder.finish()]);
            let slice = staging.slice(..size);
            let (sender, receiver) = std::sync::mpsc::channel();
            slice.map_async(wgpu::MapMode::Read, move |result| {
                let _ = sender.send(result);
            });
            gpu.wait()?;
            receiver.recv().map_err(|error| failed(error.to_string()))?.map_err(|error| failed(error.to_string()))?;
            {
                let mapped = slice.get_mapped_range().map_err(|error| failed(error.to_string()))?;
                bytes[first..][..count as usize].copy_from_slice(&mapped[..count as usize]);
            }
            staging.unmap();
            first += count as usize;
        }
        self.staging = Some(staging);
        Ok(())
    }
}
