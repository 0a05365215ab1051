//! Chooses kernels by measurement, once per adapter: each candidate for a piece of work is run on noise in the session's
//! own buffers before the weights are loaded, held against the first candidate's result, and timed. A candidate that
//! does not compile or does not agree is never chosen: fast paths are proved on the adapter that they run on.

use std::sync::Arc;
use std::time::Instant;

use half::f16;
use rayon::prelude::*;

use super::adapter::{Compiled, ENGINE, Gpu};
use super::kernel::{Binding, Element, Kernel};
use super::lower::{Choices, Dispatch, Facts, Lowering, Question, Work};
use super::memory::Memory;
use super::session::{Launch, bind_group, compile, dispatch_all, pack};
use super::storage::{Storage, View};
use crate::backend::EngineError;
use crate::program::{BufferId, DType, Kind, Op, Plan};

/// Largest norm of the difference over the norm between two candidates: sums of f16 products in another order.
const AGREEMENT: f64 = 5e-3;

/// Bytes of a result that are compared, from its start and from its end.
const SAMPLE: u64 = 1 << 20;

/// Seconds that a measurement should take.
const MEASURED: f64 = 2e-3;

/// Measurements of each candidate that is near the fastest, in turn with the others, every other time backwards: clocks drift.
const ROUNDS: usize = 5;

/// A candidate is near while its first run took at most this many times the fastest's, or this many seconds more.
const NEAR: (f64, f64) = (1.5, 1e-4);

/// Seconds of work before the first measurement: an idle card runs at a fraction of its clock.
const WARM: f64 = 0.3;

/// What was found of one candidate.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    /// What it was a candidate for.
    pub key: String,
    pub candidate: String,
    pub verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// It does not compile.
    Refused,
    /// Norm of the difference to the first candidate's result over its norm.
    Differs(f64),
    /// Seconds of its first run, far from the fastest.
    Slow(f64),
    /// Seconds, the least of several.
    Took(f64),
}

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
) -> Result<(Choices, Vec<Measurement>), EngineError> {
    let kernels: Vec<&Kernel> = trials.iter().flat_map(|t| &t.attempts).flat_map(|a| &a.kernels).collect();
    kernels.par_iter().for_each(|kernel| {
        // A candidate that does not compile is left out below.
        let _ = compile(gpu, kernel);
    });
    let bench = Bench { gpu, memory, storage, plan };
    bench.fill_all()?;
    let begun = Instant::now();
    while begun.elapsed().as_secs_f64() < WARM {
        bench.fill_all()?;
    }
    let (mut choices, mut measurements) = (Choices::new(), Vec::new());
    for trial in trials {
        let Question { key, candidates, .. } = &trial.question;
        let (chosen, verdicts) = bench.decide(trial)?;
        choices.insert(key.clone(), candidates[chosen].clone());
        measurements.extend(candidates.iter().zip(verdicts).map(|(candidate, verdict)| Measurement {
            key: key.clone(),
            candidate: candidate.clone(),
            verdict,
        }));
    }
    let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    memory.all().for_each(|buffer| encoder.clear_buffer(buffer, 0, None));
    gpu.queue.submit([encoder.finish()]);
    gpu.wait()?;
    Ok((choices, measurements))
}

/// Index of the fastest of `count` candidates whose result agrees with the first's, and what was found of each.
/// `result` runs a candidate and gives its result with the seconds it took, or none if it does not compile; `seconds`
/// measures it. Where the first has no result, or one that is no number, nothing can be held against it: it stays.
fn contest(
    count: usize,
    mut result: impl FnMut(usize) -> Result<Option<(Vec<f32>, f64)>, EngineError>,
    mut seconds: impl FnMut(usize, f64) -> Result<f64, EngineError>,
) -> Result<(usize, Vec<Verdict>), EngineError> {
    let mut verdicts = vec![Verdict::Refused; count];
    let Some((expected, once)) = result(0)? else { return Ok((0, verdicts)) };
    verdicts[0] = Verdict::Slow(once);
    for (index, verdict) in verdicts.iter_mut().enumerate().skip(1) {
        if let Some((found, once)) = result(index)? {
            let difference = difference(&found, &expected);
            *verdict = if difference <= AGREEMENT { Verdict::Slow(once) } else { Verdict::Differs(difference) };
        }
    }
    let first_run = |verdict: &Verdict| match verdict {
        Verdict::Slow(once) => *once,
        _ => f64::INFINITY,
    };
    let fastest = verdicts.iter().map(first_run).fold(f64::INFINITY, f64::min);
    let near: Vec<(usize, f64)> = verdicts.iter().map(first_run).enumerate().collect();
    let mut near: Vec<(usize, f64)> =
        near.into_iter().filter(|entry| entry.1 <= fastest * NEAR.0 || entry.1 <= fastest + NEAR.1).collect();
    for _ in 0..ROUNDS {
        for &(index, once) in &near {
            let took = seconds(index, once)?;
            let best = if let Verdict::Took(before) = verdicts[index] { took.min(before) } else { took };
            verdicts[index] = Verdict::Took(best);
        }
        near.reverse();
    }
    let took = |index: &usize| if let Verdict::Took(took) = verdicts[*index] { took } else { f64::INFINITY };
    let chosen = (0..count).min_by(|a, b| took(a).total_cmp(&took(b))).unwrap_or(0);
    Ok((chosen, verdicts))
}

struct Ready {
    compiled: Vec<Arc<Compiled>>,
    launches: Vec<Launch>,
}

struct Bench<'a> {
    gpu: &'a Gpu,
    memory: &'a Memory,
    storage: &'a Storage,
    plan: &'a Plan,
}

impl Bench<'_> {
    /// Index of the fastest candidate that agrees with the first, and what was found of each.
    fn decide(&self, trial: &Trial) -> Result<(usize, Vec<Verdict>), EngineError> {
        self.inputs(&trial.question.work)?;
        let prepared: Vec<_> = trial.attempts.iter().map(|attempt| self.prepare(attempt)).collect();
        contest(
            prepared.len(),
            |index| {
                let Some(attempt) = &prepared[index] else { return Ok(None) };
                self.fill(&trial.result)?;
                self.run(attempt, 1)?;
                let found = self.sample(&trial.result)?;
                Ok(Some((found, self.run(attempt, 1)?)))
            },
            |index, once| {
                let Some(attempt) = &prepared[index] else { return Ok(f64::INFINITY) };
                self.run(attempt, ((MEASURED / once) as usize).clamp(1, 64))
            },
        )
    }

    /// An attempt ready to run; none if a kernel of it does not compile.
    fn prepare(&self, attempt: &Attempt) -> Option<Ready> {
        let compiled: Result<Vec<_>, _> = attempt.kernels.iter().map(|kernel| compile(self.gpu, kernel)).collect();
        let compiled = compiled.ok()?;
        let (packed, offsets) = pack(&attempt.dispatches);
        let parameters = self.gpu.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("trial"),
            size: (packed.len() as u64).next_multiple_of(256),
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        self.gpu.queue.write_buffer(&parameters, 0, &packed);
        let launch = |(dispatch, &offset): (&Dispatch, &u64)| Launch {
            kernel: dispatch.kernel,
            bindings: bind_group(self.gpu, &compiled[dispatch.kernel], self.memory, &parameters, dispatch, offset),
            grid: dispatch.grid,
        };
        let launches = attempt.dispatches.iter().zip(&offsets).map(launch).collect();
        Some(Ready { compiled, launches })
    }

    /// Seconds of one of `repeats` runs.
    fn run(&self, attempt: &Ready, repeats: usize) -> Result<f64, EngineError> {
        let begun = Instant::now();
        let mut encoder = self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for _ in 0..repeats {
            dispatch_all(&mut encoder, &attempt.compiled, &attempt.launches);
        }
        self.gpu.queue.submit([encoder.finish()]);
        self.gpu.wait()?;
        Ok(begun.elapsed().as_secs_f64() / repeats as f64)
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

    /// Noise in what the work reads: an earlier trial may have left its result there, and results of results outgrow
    /// f16 within a few trials. For attention one document, and sums of exponentials that keep probabilities below 1.
    fn inputs(&self, work: &Work) -> Result<(), EngineError> {
        let op = match work {
            Work::Product(product) => {
                let second = product.second.map(|second| [second.a, second.b]);
                let views = [product.a, product.b].into_iter().chain(second.into_iter().flatten()).chain(product.bias);
                return views.into_iter().try_for_each(|view| self.fill(&view));
            }
            Work::Attention(op) | Work::Norm(op) => op,
        };
        let view = |id: &BufferId| self.storage.view(*id);
        let (start, end) = match op.as_ref() {
            Op::Attention { qkv, document_start, document_end, .. } => {
                self.fill(&view(qkv))?;
                (view(document_start), view(document_end))
            }
            Op::AttentionBackward { grad_output, qkv, output, document_start, document_end, log_sum_exp, .. } => {
                [grad_output, qkv, output].into_iter().try_for_each(|id| self.fill(&view(id)))?;
                let sums = view(log_sum_exp);
                self.write(&sums, &vec![4.0f32; sums.elements()]);
                (view(document_start), view(document_end))
            }
            Op::RmsNorm { input, residual, weight, .. } => {
                return residual.iter().chain([input, weight]).try_for_each(|id| self.fill(&view(id)));
            }
            _ => return Ok(()),
        };
        self.write(&start, &vec![0i32; start.elements()]);
        self.write(&end, &vec![end.elements() as i32; end.elements()]);
        self.gpu.wait()
    }

    fn write<T: bytemuck::Pod>(&self, view: &View, values: &[T]) {
        let (buffer, offset) = self.memory.at(view.place, view.offset);
        self.gpu.queue.write_buffer(buffer, offset, bytemuck::cast_slice(values));
    }

    fn fill(&self, view: &View) -> Result<(), EngineError> {
        let bytes = view.bytes().next_multiple_of(4);
        let mut first = 0;
        while first < bytes {
            let (buffer, offset) = self.memory.at(view.place, view.offset + first);
            let count = self.memory.together(view.place, view.offset + first, bytes - first);
            self.noise(buffer, offset, count)?;
            first += count;
        }
        Ok(())
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

    /// The first and the last part of a result, or of its first piece.
    fn sample(&self, view: &View) -> Result<Vec<f32>, EngineError> {
        let bytes = self.memory.together(view.place, view.offset, view.bytes()) / 4 * 4;
        let half = SAMPLE.min(bytes);
        let staging = self.gpu.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("sample"),
            size: 2 * half,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let (buffer, offset) = self.memory.at(view.place, view.offset);
        let mut encoder = self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(buffer, offset, &staging, 0, half);
        encoder.copy_buffer_to_buffer(buffer, offset + bytes - half, &staging, half, half);
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

/// Norm of the difference over the norm; infinite where either holds what is no number.
fn difference(found: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = found.iter().zip(expected).map(|(&a, &b)| square(a - b)).sum();
    let norm: f64 = expected.iter().map(|&b| square(b)).sum();
    let relative = (difference / norm.max(1e-30)).sqrt();
    if relative.is_finite() && found.len() == expected.len() { relative } else { f64::INFINITY }
}

/// The choices as lines `work = kernel`.
pub fn text(choices: &Choices) -> String {
    choices.iter().map(|(key, name)| format!("{key} = {name}\n")).collect()
}

/// The choices with what they were made with, for a later session to repeat.
pub fn table(choices: &Choices, made_with: &str) -> String {
    format!("{MADE_WITH}{made_with}\n{}", text(choices))
}

/// Reads what [`table`] wrote; nothing where it was made with something else: choices are proved on the adapter that they
/// run on.
pub fn given(table: &str, made_with: &str) -> Choices {
    let (first, choices) = table.split_once('\n').unwrap_or_default();
    if first.strip_prefix(MADE_WITH) == Some(made_with) { parse(choices) } else { Choices::new() }
}

/// How a table begins.
const MADE_WITH: &str = "made with ";

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
    fn a_table_counts_only_for_what_it_was_made_with() {
        let choices = Choices::from([("NT 4x5x6 f16 f32".to_string(), "128x128x32 threads 2x2".to_string())]);
        assert_eq!(given(&table(&choices, "one"), "one"), choices);
        assert_eq!(given(&table(&choices, "one"), "another"), Choices::new());
        assert_eq!(given(&text(&choices), "one"), Choices::new());
    }

    #[test]
    fn what_is_not_a_number_agrees_with_nothing() {
        assert!(difference(&[1.0, 2.0], &[1.0, 2.001]) <= AGREEMENT);
        assert!(difference(&[1.0, 2.0], &[1.0, 2.1]) > AGREEMENT);
        assert_eq!(difference(&[f32::NAN, 2.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(difference(&[f32::INFINITY, 2.0], &[f32::INFINITY, 2.0]), f64::INFINITY);
    }

    /// A contest between candidates that give a value, or do not compile, and take so many milliseconds.
    fn held(candidates: &[(Option<f32>, f64)]) -> (usize, Vec<Verdict>) {
        let result = |index: usize| Ok(candidates[index].0.map(|value| (vec![1.0, value], candidates[index].1 * 1e-3)));
        contest(candidates.len(), result, |index, _| Ok(candidates[index].1 * 1e-3)).expect("no device fails")
    }

    #[test]
    fn the_fastest_candidate_that_agrees_is_kept() {
        let (chosen, verdicts) = held(&[(Some(2.0), 4.0), (Some(2.0), 1.5), (Some(2.001), 1.2), (Some(2.0), 1.3)]);
        assert_eq!(chosen, 2);
        assert!(matches!(verdicts[0], Verdict::Slow(_)), "far from the fastest, it is not measured again");
        assert!(verdicts[1..].iter().all(|verdict| matches!(verdict, Verdict::Took(_))));
    }

    #[test]
    fn a_wrong_candidate_or_one_that_does_not_compile_is_never_kept() {
        let (chosen, verdicts) = held(&[(Some(2.0), 4.0), (Some(3.0), 0.1), (None, 0.1), (Some(f32::NAN), 0.1)]);
        assert_eq!(chosen, 0);
        assert!(matches!(verdicts[1], Verdict::Differs(by) if by > 0.1));
        assert_eq!(verdicts[2], Verdict::Refused);
        assert_eq!(verdicts[3], Verdict::Differs(f64::INFINITY));
    }

    #[test]
    fn without_a_first_result_nothing_is_trusted() {
        assert_eq!(held(&[(None, 4.0), (Some(2.0), 1.0)]).0, 0);
        assert_eq!(held(&[(Some(f32::INFINITY), 4.0), (Some(f32::INFINITY), 1.0)]).0, 0);
    }

    #[test]
    fn a_candidate_slowed_once_is_measured_again() {
        let mut given = 0;
        let mut seconds = |index: usize, _: f64| {
            given += 1;
            Ok(if index == 1 && given == 2 { 5e-3 } else { [2e-3, 1e-3][index] })
        };
        let (chosen, _) = contest(2, |_| Ok(Some((vec![1.0], 2e-3))), &mut seconds).expect("no device fails");
        assert_eq!(chosen, 1);
    }

    /// What an adapter might be asked to compile, candidates and all, for layers that tiles divide and for ragged ones.
    fn kernels(facts: &Facts, compute: DType) -> std::collections::BTreeSet<Kernel> {
        use crate::model::{
            AdapterOptions, GenerationOptions, Method, ModelConfig, Recompute, TrainingOptions, names,
            training_workload,
        };
        let options = super::super::Options { adapter: Some(0), compute: Some(compute), portable: false, narrow: None };
        let widest = super::super::target(&options).expect("a software Vulkan adapter: run tests/mesa.sh");
        let mut kernels = std::collections::BTreeSet::new();
        // The last two with bindings of so few bytes that activations lie in pieces, and with dropout and a window.
        let layers = [
            (256, 512, None, None),
            (256, 1024, Some(DType::Nf4), None),
            (192, 324, Some(DType::Int8), None),
            (192, 324, None, None),
            (192, 96, None, Some(200 << 10)),
            (120, 56, None, Some(140 << 10)),
        ];
        for (hidden, intermediate, weights, binding) in layers {
            let mut target = widest.clone();
            let mut facts = facts.clone();
            if let Some(binding) = binding {
                (target.largest_segment, target.logits_bytes, facts.limits.binding) = (binding, binding, binding);
            }
            let (architecture, family) = match binding {
                None => ("LlamaForCausalLM", "llama"),
                Some(_) => ("MistralForCausalLM", "mistral"),
            };
            let config = serde_json::json!({
                "architectures": [architecture], "model_type": family, "hidden_size": hidden, "sliding_window": 150,
                "intermediate_size": intermediate, "num_hidden_layers": 1, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": hidden / 4, "vocab_size": 1024, "rms_norm_eps": 1e-5,
                "rope_theta": 1e4, "max_position_embeddings": 4096, "tie_word_embeddings": true, "hidden_act": "silu",
                "torch_dtype": "bfloat16",
            });
            let config = ModelConfig::parse(&config.to_string()).expect("a configuration");
            let targets = names::PROJECTIONS.iter().map(|name| name.to_string()).collect();
            let lora = Method::Lora {
                adapter: AdapterOptions { rank: 16, targets, dropout: if binding.is_some() { 0.1 } else { 0.0 } },
                weights,
            };
            for method in [lora, Method::Full] {
                let options = TrainingOptions {
                    generation: Some(GenerationOptions { capacity: 64, prefill_sizes: vec![16] }),
                    ..TrainingOptions::new(method, vec![512], vec![Recompute::None])
                };
                let workload = training_workload(&config, &options, &target).expect("a workload");
                let plan = crate::program::plan::plan(workload, target.clone()).expect("a plan");
                let storage = Storage::new(&plan, facts.limits, facts.f16);
                let none = Choices::new();
                let mut lowering = Lowering::new(&plan, &storage, facts.clone(), &none);
                for step in plan.workload.programs.iter().flat_map(|program| &program.steps) {
                    lowering.op(&step.op).expect("lowered");
                }
                kernels.extend(lowering.kernels);
                let (trials, _) = trials(&plan, &storage, &facts, lowering.questions).expect("trials");
                kernels.extend(trials.into_iter().flat_map(|trial| trial.attempts).flat_map(|attempt| attempt.kernels));
            }
        }
        kernels
    }

    fn facts(f16: bool, subgroups: bool, cooperative: bool) -> Facts {
        Facts {
            f16,
            subgroups,
            cooperative,
            limits: super::super::storage::Limits { binding: 1 << 30, buffer: 1 << 40 },
            workgroup_bytes: if cooperative { 48 << 10 } else { 16 << 10 },
            software: false,
            workgroups: 256,
            measures: true,
            loop_limit: None,
            gradient_factor: super::super::lower::HALF_GRADIENT_FACTOR,
        }
    }

    /// The module of a kernel, checked.
    fn checked(kernel: &Kernel) -> (naga::Module, naga::valid::ModuleInfo) {
        let text = kernel.wgsl().expect("expands");
        let module = naga::front::wgsl::parse_str(&text)
            .unwrap_or_else(|error| panic!("{kernel:?}: {}", error.emit_to_string(&text)));
        let mut validator =
            naga::valid::Validator::new(naga::valid::ValidationFlags::all(), naga::valid::Capabilities::all());
        let info =
            validator.validate(&module).unwrap_or_else(|error| panic!("{kernel:?}: {}", error.emit_to_string(&text)));
        (module, info)
    }

    /// No adapter here has cooperative matrices; the WGSL of kernels for them is checked.
    #[test]
    fn kernels_for_cooperative_matrices_are_valid() {
        let kernels = kernels(&facts(true, true, true), DType::F16);
        let cooperative = |kernel: &&Kernel| kernel.file == "matmul_cooperative";
        let has = |name: &str| kernels.iter().filter(cooperative).filter(|k| k.constants.contains_key(name)).count();
        for constant in
            ["WIDE", "WHOLE", "AHEAD", "PLAIN", "DOUBLE", "SECOND", "SPLIT", "SEGMENTED", "A_BY_K", "B_BY_K"]
        {
            assert!(has(constant) > 0, "no kernel has {constant}");
        }
        assert!(kernels.iter().filter(cooperative).any(|kernel| !kernel.constants.contains_key("WIDE")));
        kernels.iter().for_each(|kernel| {
            checked(kernel);
        });
    }

    /// What adapters of Metal and DX12 would be given, translated as wgpu does it: core WebGPU, and f16 with subgroups.
    #[test]
    fn every_kernel_can_be_translated_for_metal_and_dx12() {
        use naga::back::{hlsl, msl};
        let portable = kernels(&facts(false, false, false), DType::F32);
        let half = kernels(&facts(true, true, false), DType::F16);
        assert!(portable.len() > 40 && half.len() > 40, "{} and {} kernels", portable.len(), half.len());
        for constant in ["RANGES", "MORE", "LATER_ROWS", "RAGGED", "WINDOW"] {
            assert!(portable.iter().any(|kernel| kernel.constants.contains_key(constant)), "no kernel has {constant}");
        }
        for kernel in portable.union(&half) {
            let (module, info) = checked(kernel);
            let options = msl::Options { lang_version: (3, 0), fake_missing_bindings: true, ..Default::default() };
            let written = msl::write_string(&module, &info, &options, &msl::PipelineOptions::default());
            let (text, _) = written.unwrap_or_else(|error| panic!("Metal: {kernel:?}: {error}"));
            assert!(text.contains("kernel"), "{text}");
            // Shader model 6.2 is the first with 16-bit floats.
            let options = hlsl::Options { shader_model: hlsl::ShaderModel::V6_2, ..Default::default() };
            let (mut text, pipeline) = (String::new(), hlsl::PipelineOptions::default());
            let written = hlsl::Writer::new(&mut text, &options, &pipeline).write(&module, &info, None);
            written.unwrap_or_else(|error| panic!("DX12: {kernel:?}: {error}"));
            assert!(text.contains("numthreads"), "{text}");
        }
    }
}
