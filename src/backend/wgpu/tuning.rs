//! Chooses kernels by measurement, once per adapter: each candidate for a piece of work is run on noise in the session's
//! own buffers before the weights are loaded, held against the first candidate's result, and timed. A candidate that
//! does not compile or does not agree is never chosen: fast paths are proved on the adapter that they run on.

use std::time::Instant;

use half::f16;
use rayon::prelude::*;

use super::adapter::{ENGINE, Gpu};
use super::kernel::{Binding, Element, Kernel};
use super::lower::{Choices, Dispatch, Facts, Lowering, Question, Work};
use super::session::{Launch, Memory, bind_group, compile, dispatch_all, pack};
use super::storage::{Storage, View};
use crate::backend::EngineError;
use crate::program::{BufferId, DType, Kind, Op, Plan};

/// Largest norm of the difference over the norm between two candidates: sums of f16 products in another order.
const AGREEMENT: f64 = 5e-3;

/// Bytes of a result that are compared, from its start and from its end.
const SAMPLE: u64 = 1 << 20;

/// Seconds that a measurement should take.
const MEASURED: f64 = 3e-3;

/// A question with every candidate's dispatches.
pub struct Trial {
    question: Question,
    result: View,
    attempts: Vec<Attempt>,
}

struct Attempt {
    kernels: Vec<Kernel>,
    dispatches: Vec<Dispatch>,
}

/// Every candidate of every question, and the bytes of scratch that they want.
///
/// # Errors
/// As lowering.
pub fn trials(
    plan: &Plan,
    storage: &Storage,
    facts: &Facts,
    questions: Vec<Question>,
) -> Result<(Vec<Trial>, u64), EngineError> {
    let (mut trials, mut scratch) = (Vec::new(), 0);
    for question in questions {
        let mut attempts = Vec::new();
        let mut result = None;
        for name in &question.candidates {
            let choices = Choices::from([(question.key.clone(), name.clone())]);
            let mut lowering = Lowering::new(plan, storage, facts.clone(), &choices);
            lowering.work(&question.work)?;
            result = Some(lowering.result(&question.work));
            scratch = scratch.max(lowering.scratch);
            attempts.push(Attempt { kernels: lowering.kernels, dispatches: lowering.dispatches });
        }
        if let Some(result) = result {
            trials.push(Trial { question, result, attempts });
        }
    }
    Ok((trials, scratch))
}

/// Answers every question, and leaves the buffers zeroed.
///
/// # Errors
/// When the device fails.
pub fn measure(
    gpu: &Gpu,
    memory: &Memory,
    plan: &Plan,
    storage: &Storage,
    trials: &[Trial],
) -> Result<Choices, EngineError> {
    let kernels: Vec<&Kernel> = trials.iter().flat_map(|t| &t.attempts).flat_map(|a| &a.kernels).collect();
    kernels.par_iter().for_each(|kernel| {
        // A candidate that does not compile is left out below.
        let _ = compile(gpu, kernel);
    });
    let bench = Bench { gpu, memory, storage, plan };
    bench.fill_all()?;
    let mut choices = Choices::new();
    for trial in trials {
        let chosen = bench.decide(trial)?;
        choices.insert(trial.question.key.clone(), trial.question.candidates[chosen].clone());
    }
    let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    memory.all().for_each(|buffer| encoder.clear_buffer(buffer, 0, None));
    gpu.queue.submit([encoder.finish()]);
    gpu.wait()?;
    Ok(choices)
}

struct Bench<'a> {
    gpu: &'a Gpu,
    memory: &'a Memory,
    storage: &'a Storage,
    plan: &'a Plan,
}

impl Bench<'_> {
    /// Index of the fastest candidate that agrees with the first.
    fn decide(&self, trial: &Trial) -> Result<usize, EngineError> {
        let mut reference: Option<Vec<f32>> = None;
        let mut best = (0, f64::INFINITY);
        for (index, attempt) in trial.attempts.iter().enumerate() {
            let compiled: Result<Vec<_>, _> = attempt.kernels.iter().map(|kernel| compile(self.gpu, kernel)).collect();
            let Ok(compiled) = compiled else { continue };
            let (packed, offsets) = pack(&attempt.dispatches);
            let parameters = self.gpu.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("trial"),
                size: (packed.len() as u64).next_multiple_of(256),
                usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            });
            self.gpu.queue.write_buffer(&parameters, 0, &packed);
            let launches: Vec<Launch> = attempt
                .dispatches
                .iter()
                .zip(&offsets)
                .map(|(dispatch, &offset)| Launch {
                    kernel: dispatch.kernel,
                    bindings: bind_group(
                        self.gpu,
                        &compiled[dispatch.kernel],
                        self.memory,
                        &parameters,
                        dispatch,
                        offset,
                    ),
                    grid: dispatch.grid,
                })
                .collect();
            let run = |repeats: usize| -> Result<f64, EngineError> {
                let begun = Instant::now();
                let mut encoder = self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                for _ in 0..repeats {
                    dispatch_all(&mut encoder, &compiled, &launches);
                }
                self.gpu.queue.submit([encoder.finish()]);
                self.gpu.wait()?;
                Ok(begun.elapsed().as_secs_f64() / repeats as f64)
            };
            self.inputs(&trial.question.work)?;
            self.fill(&trial.result)?;
            run(1)?;
            let found = self.sample(&trial.result)?;
            match &reference {
                None => reference = Some(found),
                Some(expected) if agrees(&found, expected) => {}
                Some(_) => continue,
            }
            let once = run(1)?;
            if once > 3.0 * best.1 + 3e-4 {
                continue;
            }
            let repeats = ((MEASURED / once) as usize).clamp(1, 64);
            let seconds = run(repeats)?.min(run(repeats)?);
            if seconds < best.1 {
                best = (index, seconds);
            }
        }
        Ok(best.0)
    }

    /// Noise everywhere, and numbers that mean something where noise would not.
    fn fill_all(&self) -> Result<(), EngineError> {
        for buffer in self.memory.all() {
            self.noise(buffer, 0, buffer.size())?;
        }
        for (index, buffer) in self.plan.workload.buffers.iter().enumerate() {
            if buffer.kind == Kind::Scalar && buffer.dtype == DType::F32 {
                self.write(&self.storage.view(BufferId(index as u32)), &vec![1.0f32; buffer.elements()]);
            }
        }
        self.gpu.wait()
    }

    /// One document, and sums of exponentials that keep probabilities below 1.
    fn inputs(&self, work: &Work) -> Result<(), EngineError> {
        let Work::Attention(op) = work else { return Ok(()) };
        let (start, end, sums) = match op.as_ref() {
            Op::Attention { document_start, document_end, .. } => (document_start, document_end, None),
            Op::AttentionBackward { document_start, document_end, log_sum_exp, .. } => {
                (document_start, document_end, Some(log_sum_exp))
            }
            _ => return Ok(()),
        };
        let rows = self.storage.view(*start).elements();
        self.write(&self.storage.view(*start), &vec![0i32; rows]);
        self.write(&self.storage.view(*end), &vec![rows as i32; rows]);
        if let Some(sums) = sums {
            let view = self.storage.view(*sums);
            self.write(&view, &vec![4.0f32; view.elements()]);
        }
        self.gpu.wait()
    }

    fn write<T: bytemuck::Pod>(&self, view: &View, values: &[T]) {
        self.gpu.queue.write_buffer(self.memory.buffer(view.place), view.offset, bytemuck::cast_slice(values));
    }

    fn fill(&self, view: &View) -> Result<(), EngineError> {
        self.noise(self.memory.buffer(view.place), view.offset, view.bytes().next_multiple_of(4))
    }

    fn noise(&self, buffer: &wgpu::Buffer, offset: u64, bytes: u64) -> Result<(), EngineError> {
        let binding = Binding { name: "output", element: Element::U32, vector: false, writable: true };
        let kernel = Kernel {
            file: "noise",
            constants: Default::default(),
            bindings: vec![binding],
            parameters: vec![("count", false)],
        };
        let compiled = compile(self.gpu, &kernel)?;
        let part = super::adapter::binding_limit(&self.gpu.limits);
        let mut encoder = self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for first in (0..bytes).step_by(part as usize) {
            let length = part.min(bytes - first);
            let count = (length / 4) as u32;
            let parameters = self.gpu.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("noise"),
                size: 256,
                usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            });
            self.gpu.queue.write_buffer(&parameters, 0, &count.to_le_bytes());
            let part = |buffer, offset, size| {
                wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer,
                    offset,
                    size: std::num::NonZeroU64::new(size),
                })
            };
            let bindings = self.gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &compiled.layout,
                entries: &[
                    wgpu::BindGroupEntry { binding: 0, resource: part(&parameters, 0, 16) },
                    wgpu::BindGroupEntry { binding: 1, resource: part(buffer, offset + first, length) },
                ],
            });
            let grid = [count.div_ceil(256).clamp(1, 4096), 1, 1];
            dispatch_all(&mut encoder, std::slice::from_ref(&compiled), &[Launch { kernel: 0, bindings, grid }]);
        }
        self.gpu.queue.submit([encoder.finish()]);
        self.gpu.failure.check()
    }

    /// The first and the last part of a result.
    fn sample(&self, view: &View) -> Result<Vec<f32>, EngineError> {
        let bytes = view.bytes() / 4 * 4;
        let half = SAMPLE.min(bytes);
        let staging = self.gpu.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("sample"),
            size: 2 * half,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let buffer = self.memory.buffer(view.place);
        let mut encoder = self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(buffer, view.offset, &staging, 0, half);
        encoder.copy_buffer_to_buffer(buffer, view.offset + bytes - half, &staging, half, half);
        self.gpu.queue.submit([encoder.finish()]);
        let slice = staging.slice(..);
        slice.map_async(wgpu::MapMode::Read, |_| ());
        self.gpu.wait()?;
        let failed = |error: String| EngineError::Device { engine: ENGINE, what: format!("reading a trial: {error}") };
        let mapped = slice.get_mapped_range().map_err(|error| failed(error.to_string()))?;
        Ok(match view.dtype {
            DType::F16 => mapped.as_chunks::<2>().0.iter().map(|&word| f16::from_le_bytes(word).to_f32()).collect(),
            _ => mapped.as_chunks::<4>().0.iter().map(|&word| f32::from_le_bytes(word)).collect(),
        })
    }
}

fn agrees(found: &[f32], expected: &[f32]) -> bool {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = found.iter().zip(expected).map(|(&a, &b)| square(a - b)).sum();
    let norm: f64 = expected.iter().map(|&b| square(b)).sum();
    // NaN disagrees.
    (difference / norm.max(1e-30)).sqrt() <= AGREEMENT
}

/// The choices as lines `work = kernel`.
pub fn text(choices: &Choices) -> String {
    choices.iter().map(|(key, name)| format!("{key} = {name}\n")).collect()
}

/// Reads what [`text`] wrote; lines that are none are left aside.
pub fn parse(text: &str) -> Choices {
    text.lines().filter_map(|line| line.split_once(" = ")).map(|(key, name)| (key.into(), name.into())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_lines() {
        let choices = Choices::from([("NT 4x5x6 f16 f32".to_string(), "128x128x32 threads 2x2".to_string())]);
        assert_eq!(parse(&text(&choices)), choices);
    }

    #[test]
    fn what_is_not_a_number_agrees_with_nothing() {
        assert!(agrees(&[1.0, 2.0], &[1.0, 2.001]));
        assert!(!agrees(&[1.0, 2.0], &[1.0, 2.1]));
        assert!(!agrees(&[f32::NAN, 2.0], &[1.0, 2.0]));
    }
}
