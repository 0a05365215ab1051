//! What the engine launches for the steps that `bench/LOG-wgsl.md` has figures of, on adapters that are not here: a figure
//! stands as long as the same kernels run with the same parameters on the same ranges.

use super::kernel::Kernel;
use super::lower::{Choices, Dispatch, Facts, HALF_GRADIENT_FACTOR, Lowering, Question};
use super::storage::{Limits, Place, Storage};
use crate::model::{AdapterOptions, Method, ModelConfig, Recompute, TrainingOptions, names, training_workload};
use crate::program::plan::plan;
use crate::program::{DType, Plan, Rates, Target};

/// An H100 through Vulkan, or what core WebGPU promises of any card.
fn card(portable: bool) -> (Facts, Target) {
    let binding = if portable { 128 << 20 } else { 2_147_483_644 & !255 };
    let facts = Facts {
        f16: !portable,
        subgroups: !portable,
        cooperative: !portable,
        limits: Limits { binding, buffer: if portable { 256 << 20 } else { 4_292_870_144 & !255 } },
        workgroup_bytes: if portable { 16 << 10 } else { 48 << 10 },
        software: false,
        workgroups: 256,
        measures: true,
        loop_limit: None,
        gradient_factor: HALF_GRADIENT_FACTOR,
    };
    let target = Target {
        name: "a card".into(),
        engine: super::adapter::ENGINE,
        memory: None,
        largest_segment: binding,
        alignment: 256,
        compute: if portable { DType::F32 } else { DType::F16 },
        trainable: DType::F32,
        gradients: DType::F32,
        micro_sizes: vec![256],
        rates: Rates { flops: 150e12, attention_flops: 50e12, bandwidth: 1.5e12, per_op: 1e-5 },
        fp8_flops: None,
        library_workspace: 0,
        graph_bytes: 0,
        bus_bandwidth: 24e9,
        host_memory: None,
        logits_bytes: binding.min(512 << 20),
        mlp_tokens: usize::MAX,
        gated_rank: 0,
        norms: None,
    };
    (facts, target)
}

fn config(model: &str) -> ModelConfig {
    let path = format!("{}/tests/fixtures/configs/{model}.json", env!("CARGO_MANIFEST_DIR"));
    let mut config = ModelConfig::parse(&std::fs::read_to_string(path).expect("a file")).expect("a configuration");
    config.dtype = DType::BF16;
    config
}

fn planned(model: &str, tokens: usize, recompute: Recompute, method: Method, target: &Target) -> Plan {
    let config = config(model);
    let options = TrainingOptions {
        evaluate: false,
        ..TrainingOptions::new(method, vec![tokens], vec![recompute; config.layers])
    };
    let workload = training_workload(&config, &options, target).expect("a workload");
    plan(workload, target.clone()).expect("a plan")
}

fn lora(weights: Option<DType>) -> Method {
    let targets = names::PROJECTIONS.iter().map(|name| name.to_string()).collect();
    Method::Lora { adapter: AdapterOptions { rank: 16, targets, dropout: 0.0 }, weights }
}

struct Lowered {
    kernels: Vec<Kernel>,
    dispatches: Vec<Dispatch>,
    questions: Vec<Question>,
}

/// All programs by rules, and what would be measured.
fn lowered(plan: &Plan, facts: &Facts) -> Lowered {
    let (storage, choices) = (Storage::new(plan, facts.limits, facts.f16), Choices::new());
    let mut lowering = Lowering::new(plan, &storage, facts.clone(), &choices);
    for step in plan.workload.programs.iter().flat_map(|program| &program.steps) {
        lowering.op(&step.op).unwrap_or_else(|error| panic!("{}: {error}", step.name));
    }
    let Lowering { kernels, dispatches, questions, .. } = lowering;
    Lowered { kernels, dispatches, questions }
}

/// FNV-1a.
struct Fingerprint(u64);

impl Fingerprint {
    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn dispatches(&mut self, kernels: &[Kernel], dispatches: &[Dispatch]) {
        for Dispatch { kernel, bindings, parameters, scaled, grid } in dispatches {
            let wgsl = kernels[*kernel].wgsl().expect("a shader");
            // Words about it change nothing.
            let lines = wgsl.lines().map(|line| line.split("//").next().unwrap_or_default().trim());
            lines.filter(|line| !line.is_empty()).for_each(|line| self.add(line.as_bytes()));
            self.add(format!("{bindings:?} {grid:?} {scaled}").as_bytes());
            self.add(parameters);
        }
    }

    /// Of all programs by rules, and of every candidate that is measured.
    fn of(plan: &Plan, facts: &Facts) -> u64 {
        let mut fingerprint = Fingerprint(0xcbf2_9ce4_8422_2325);
        let storage = Storage::new(plan, facts.limits, facts.f16);
        let Lowered { kernels, dispatches, questions } = lowered(plan, facts);
        fingerprint.dispatches(&kernels, &dispatches);
        for question in questions {
            for candidate in &question.candidates {
                let choices = Choices::from([(question.key.clone(), candidate.clone())]);
                let mut lowering = Lowering::new(plan, &storage, facts.clone(), &choices);
                lowering.work(&question.work).expect("it is lowered");
                fingerprint.dispatches(&lowering.kernels, &lowering.dispatches);
            }
        }
        fingerprint.0
    }
}

/// Where one of these numbers changes, other kernels run in that step on a card: measure it again, write the figure to the
/// log, and the number here.
#[test]
fn the_steps_with_figures_launch_what_was_measured() {
    #[rustfmt::skip]
    let steps = [
        ("135m", "smollm2-135m", 4096, Recompute::None, lora(None), false, 0xcb07_2d35_b4c4_b1f4),
        ("1b", "llama-3.2-1b", 8192, Recompute::None, lora(None), false, 0x357e_98a8_7441_2746),
        ("8b", "llama-3.1-8b", 4096, Recompute::All, lora(None), false, 0xe655_e51c_4fd3_6d9f),
        ("8b qlora", "llama-3.1-8b", 4096, Recompute::All, lora(Some(DType::Nf4)), false, 0xc5ec_fde6_2c68_1fe0),
        ("135m portable", "smollm2-135m", 4096, Recompute::None, lora(None), true, 0x8917_a4d6_726e_df57),
        ("135m portable, full", "smollm2-135m", 4096, Recompute::None, Method::Full, true, 0x4f51_d24d_c216_5e65),
    ];
    let mut changed = Vec::new();
    for (name, model, tokens, recompute, method, portable, known) in steps {
        let (facts, target) = card(portable);
        let found = Fingerprint::of(&planned(model, tokens, recompute, method, &target), &facts);
        if found != known {
            changed.push(format!("{name}: {found:#018x}"));
        }
    }
    assert!(changed.is_empty(), "{changed:#?}");
}

/// Core WebGPU binds 128 MiB, and a launch has at most 65,535 workgroups each way: neither bounds a row.
#[test]
fn rows_above_every_limit_of_core_webgpu_are_lowered() {
    let (facts, target) = card(true);
    let cases = [
        ("llama-3.1-8b", 40_000, lora(None)),
        ("llama-3.1-8b", 12_288, lora(Some(DType::Nf4))),
        ("smollm2-135m", 70_000, lora(None)),
        ("smollm2-135m", 40_000, Method::Full),
    ];
    for (model, tokens, method) in cases {
        let plan = planned(model, tokens, Recompute::All, method, &target);
        assert!(!plan.pieces.is_empty() && plan.segments.iter().all(|&bytes| bytes <= facts.limits.binding));
        facts.workspace(&plan).unwrap_or_else(|error| panic!("{model}, {tokens} tokens: {error}"));
        let alive = plan.summary.programs.iter().map(|program| program.arena_bytes).max().unwrap_or(0) >> 20;
        let arena = plan.segments.iter().sum::<u64>() >> 20;
        println!("{model}, {tokens} tokens: an arena of {arena} MiB for {alive} MiB alive at once");
        for Dispatch { bindings, .. } in lowered(&plan, &facts).dispatches {
            for (place, offset, bytes) in bindings {
                assert!(offset.is_multiple_of(256) && bytes <= facts.limits.binding, "{place:?} {offset} {bytes}");
                if let Place::Segment(segment) = place {
                    assert!(offset + bytes <= plan.segments[segment], "{place:?} {offset} {bytes}");
                }
            }
        }
    }
    // Where bindings are large, many rows are no reason to leave cooperative matrices.
    let (facts, target) = card(false);
    let plan = planned("smollm2-135m", 70_016, Recompute::All, lora(None), &target);
    let lowered = lowered(&plan, &facts);
    assert!(lowered.questions.iter().any(|question| question.key.starts_with("attention 70016 tokens")));
}
