//! The WGSL engine against the CPU engine: every operation of every program of the tiny models, one by one on the
//! same inputs, on a software adapter (Mesa lavapipe), within core WebGPU and with the adapter's features.

mod twin;

use std::path::Path;
use std::sync::Arc;

use tune::backend::wgpu::Options;
use tune::backend::{EngineError, Session, WeightSource, cpu, read_values, wgpu};
use tune::model::{
    AdapterOptions, GenerationOptions, Method, Model, ModelConfig, RandomWeights, Recompute, TrainingOptions,
    generation_workload, names, training_workload,
};
use tune::program::plan::{PlanError, plan};
use tune::program::{Access, BufferId, DType, Kind, Plan, Target, Workload, block8, random};
use tune::train::planning::{PlanningError, Search};

const TOKENS: usize = 72;
/// Of which what lies in pieces of 128 rows has several.
const MANY_TOKENS: usize = 400;

/// Where documents begin in so many tokens of training, and the tokens; the last one is padding.
fn documents(tokens: usize) -> &'static [usize] {
    match tokens {
        TOKENS => &[0, 23, 50, TOKENS],
        MANY_TOKENS => &[0, 30, 380, 390, MANY_TOKENS],
        _ => &[],
    }
}

/// The software adapter, which `tests/mesa.sh` installs; there must be one.
fn software(portable: bool) -> Options {
    let adapters = wgpu::adapters();
    let adapter = adapters.iter().find(|adapter| adapter.software);
    let adapter = adapter.unwrap_or_else(|| panic!("no software Vulkan adapter: run tests/mesa.sh"));
    Options { adapter: Some(adapter.index), compute: Some(DType::F32), portable, narrow: None }
}

fn tiny(name: &str) -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny").join(name);
    Model::open(&folder, 0).expect("a tiny model opens")
}

fn lora(dropout: f32) -> Method {
    lora_on(None, dropout)
}

fn lora_on(weights: Option<DType>, dropout: f32) -> Method {
    let targets = names::PROJECTIONS.iter().map(|name| name.to_string()).collect();
    Method::Lora { adapter: AdapterOptions { rank: 4, targets, dropout }, weights }
}

fn training(model: &Model, method: Method, target: &Target) -> Workload {
    let recompute = vec![Recompute::None; model.config.layers];
    let options = TrainingOptions { sizes: vec![TOKENS], recompute, ..training_options(method) };
    training_workload(&model.config, &options, target).expect("a workload")
}

/// Many tokens, of layers that keep everything and of such that compute everything again.
fn long_training(model: &Model, method: Method, target: &Target) -> Workload {
    let mut recompute = vec![Recompute::None; model.config.layers];
    recompute[0] = Recompute::All;
    let options = TrainingOptions { sizes: vec![MANY_TOKENS], recompute, ..training_options(method) };
    training_workload(&model.config, &options, target).expect("a workload")
}

/// Without sizes, and what is recomputed.
fn training_options(method: Method) -> TrainingOptions {
    TrainingOptions::new(method, Vec::new(), Vec::new())
}

fn number(row: u32, column: u32) -> f32 {
    random::uniform([1, 2, 3, 4], 5, row, column)
}

/// Some documents, and random numbers in everything the programs read but the weights.
fn write_inputs(session: &mut dyn Session) {
    let buffers = session.plan().workload.buffers.clone();
    for (index, buffer) in buffers.iter().enumerate() {
        let id = BufferId(index as u32);
        let count = buffer.elements();
        let starts = documents(count);
        let document = |token: usize| starts.partition_point(|&start| start <= token) - 1;
        let part = buffer.name.rsplit('.').next().unwrap_or_default();
        let vocabulary = 500.0;
        let integers: Option<Vec<i32>> = match (buffer.kind, part) {
            (Kind::Input, "ids") => Some((0..count).map(|t| (number(t as u32, 0) * vocabulary) as i32 / 3).collect()),
            (Kind::Input, "embedding_ids") => {
                let id =
                    |t: usize| if t.is_multiple_of(7) { -1 } else { (number(t as u32, 0) * vocabulary) as i32 / 3 };
                Some((0..count).map(id).collect())
            }
            (Kind::Input, "positions") => {
                Some((0..count).map(|t| if starts.is_empty() { t } else { t - starts[document(t)] } as i32).collect())
            }
            (Kind::Input, "document_start") => Some((0..count).map(|t| starts[document(t)] as i32).collect()),
            (Kind::Input, "document_end") => Some((0..count).map(|t| starts[document(t) + 1] as i32).collect()),
            (Kind::Input, "targets") => {
                let target = |t: usize| {
                    if t.is_multiple_of(5) || t + 10 > count { -100 } else { (number(t as u32, 1) * vocabulary) as i32 }
                };
                Some((0..count).map(target).collect())
            }
            (Kind::Input, "rows") => Some(vec![0]),
            (Kind::Input, "start") => Some(vec![7]),
            (Kind::Scalar, "random_key") => Some(vec![3, 4, 5, 6]),
            _ => None,
        };
        if let Some(values) = integers {
            session.write(id, bytemuck::cast_slice(&values)).expect("written");
            continue;
        }
        let floats: Option<Vec<f32>> = match (buffer.kind, part) {
            (Kind::Weight | Kind::Constant, _) => None,
            (Kind::Scalar, "hyper") => Some(vec![1e-3, 0.1, 0.03162, 0.0]),
            (Kind::Scalar, "loss_scale") => Some(vec![1.0 / 37.0]),
            (Kind::Scalar, "lora_scale") => Some(vec![2.0]),
            (Kind::Optimizer, "exp_avg_sq") => Some((0..count).map(|i| number(id.0, i as u32) * 0.01).collect()),
            (Kind::Optimizer, _) => Some((0..count).map(|i| (number(id.0, i as u32) - 0.5) * 0.2).collect()),
            (kind, _) if buffer.dtype == DType::F32 && !kind.is_transient() => {
                Some((0..count).map(|i| (number(id.0, i as u32) - 0.5) * 0.2).collect())
            }
            _ => None,
        };
        match floats {
            Some(values) if buffer.dtype == DType::Block8 => {
                let map = if part == "exp_avg_sq" { block8::Map::Unsigned } else { block8::Map::Signed };
                let mut bytes = vec![0; buffer.bytes() as usize];
                let (scales, codes) = block8::split_mut(&mut bytes, count);
                let blocks =
                    values.chunks(block8::BLOCK).zip(scales.chunks_mut(4)).zip(codes.chunks_mut(block8::BLOCK));
                blocks.for_each(|((values, scale), codes)| block8::pack(map, values, scale, codes));
                session.write(id, &bytes).expect("written");
            }
            Some(values) => session.write(id, bytemuck::cast_slice(&values)).expect("written"),
            None => {}
        }
    }
}

fn read(session: &mut dyn Session, id: BufferId) -> Vec<u8> {
    let mut bytes = vec![0; session.plan().workload.buffer(id).bytes() as usize];
    session.read(id, &mut bytes).expect("read");
    bytes
}

/// Runs each step of each program on the reference's inputs, and compares what it wrote.
fn check(reference: &mut dyn Session, session: &mut dyn Session, tolerance: f64) {
    write_inputs(reference);
    write_inputs(session);
    let workload = session.plan().workload.clone();
    let mut worst: Vec<(f64, String)> = Vec::new();
    for (program, entry) in workload.programs.iter().enumerate() {
        for (number, step) in entry.steps.iter().enumerate() {
            let accesses = step.op.accesses();
            for &(id, access) in &accesses {
                let frozen = workload.buffer(id).kind == Kind::Constant || workload.buffer(id).dtype.is_quantized();
                if access != Access::Write && !frozen {
                    let bytes = read(reference, id);
                    session.write(id, &bytes).expect("written");
                }
            }
            reference.run_steps(program, number..number + 1).expect("runs");
            session.run_steps(program, number..number + 1).expect("runs");
            for &(id, access) in &accesses {
                let buffer = workload.buffer(id);
                // What logits hold afterwards is the engine's own business.
                if access == Access::Read || buffer.kind == Kind::Workspace {
                    continue;
                }
                let [want, got] = [read(reference, id), read(session, id)].map(|bytes| match buffer.dtype {
                    DType::Block8 => {
                        let second = buffer.name.ends_with("exp_avg_sq");
                        let map = if second { block8::Map::Unsigned } else { block8::Map::Signed };
                        block8::decode(map, &bytes, buffer.elements())
                    }
                    dtype => {
                        assert_eq!(dtype, DType::F32);
                        bytemuck::pod_collect_to_vec(&bytes)
                    }
                });
                // A value between two codes may go to either.
                let tolerance = if buffer.dtype == DType::Block8 { 1e-2 } else { tolerance };
                let norm = want.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                let difference = want.iter().zip(&got).map(|(&x, &y)| f64::from(x - y).powi(2)).sum::<f64>().sqrt();
                let error = difference / (norm + 1e-12);
                if error.is_nan() || error > tolerance {
                    worst.push((error, format!("{}: {} ({}): {}", entry.name, step.name, step.op.name(), buffer.name)));
                }
            }
        }
    }
    assert!(worst.is_empty(), "{} beyond {tolerance}:\n{}", worst.len(), {
        worst.iter().take(12).map(|(error, what)| format!("{error:.1e} {what}\n")).collect::<String>()
    });
}

/// Runs every program as a whole, and compares gradients and what the host reads: nothing is put right in between.
fn check_whole(reference: &mut dyn Session, session: &mut dyn Session, tolerance: f64) {
    write_inputs(reference);
    write_inputs(session);
    let workload = session.plan().workload.clone();
    for (program, entry) in workload.programs.iter().enumerate() {
        reference.run(program).expect("runs");
        session.run(program).expect("runs");
        for (index, buffer) in workload.buffers.iter().enumerate() {
            if !matches!(buffer.kind, Kind::Gradient | Kind::Output) || buffer.dtype != DType::F32 {
                continue;
            }
            let want: Vec<f32> = bytemuck::pod_collect_to_vec(&read(reference, BufferId(index as u32)));
            let got: Vec<f32> = bytemuck::pod_collect_to_vec(&read(session, BufferId(index as u32)));
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
            let size = norm(&mut want.iter().map(|&x| f64::from(x)));
            let error = norm(&mut want.iter().zip(&got).map(|(&x, &y)| f64::from(x) - f64::from(y))) / (size + 1e-12);
            assert!(error <= tolerance, "after {}, {} is off by {error:.1e}", entry.name, buffer.name);
        }
    }
}

fn open_on(model: &Model, workload: Workload, options: &Options) -> impl Session {
    let target = wgpu::target(options).expect("a target");
    wgpu::open(plan(workload, target).expect("a plan"), model.weights.clone(), options).expect("opens")
}

fn compare(model: &Model, workload: impl Fn(&Target) -> Workload, options: &Options) {
    // The reference runs the same operations, on buffers as large as they must be.
    let workload = workload(&wgpu::target(options).expect("a target"));
    let whole = plan(workload.clone(), cpu::target().expect("a target")).expect("a plan");
    let mut reference = cpu::open(whole, model.weights.clone()).expect("opens");
    let mut session = open_on(model, workload, options);
    check(&mut reference, &mut session, 1e-5);
    check_whole(&mut reference, &mut session, 1e-4);
}

fn check_twins(options: Options) {
    let target = wgpu::target(&options).expect("a target");
    let open = |plan: Plan, weights: Arc<dyn WeightSource>| -> Result<Box<dyn Session>, EngineError> {
        Ok(Box::new(wgpu::open(plan, weights, &options)?))
    };
    twin::check_engine(&target, &open, "");
    twin::check_losses_that_are_no_number(&target, &open);
}

#[test]
fn every_operation_agrees_with_its_twin_within_core_webgpu() {
    check_twins(software(true));
}

#[test]
fn linear_operations_on_quantized_weights_agree_with_their_twins() {
    let options = software(true);
    let target = wgpu::target(&options).expect("a target");
    let open = |plan: Plan, weights: Arc<dyn WeightSource>| -> Result<Box<dyn Session>, EngineError> {
        Ok(Box::new(wgpu::open(plan, weights, &options)?))
    };
    twin::check_cases(twin::cases::quantized(&target), &target, &open, "");
    twin::check_cases(twin::cases::odd_rows(&target), &target, &open, "");
}

#[test]
fn every_operation_agrees_with_its_twin_in_f16() {
    check_twins(Options { compute: Some(DType::F16), ..software(false) });
}

#[test]
fn every_operation_of_lora_training_agrees_with_the_cpu_engine() {
    for portable in [true, false] {
        let model = tiny("llama");
        compare(&model, |target| training(&model, lora(0.0), target), &software(portable));
    }
}

/// Of layers that train nothing the inputs are not kept.
#[test]
fn lora_on_a_few_projections_agrees_with_the_cpu_engine() {
    let model = tiny("llama");
    for names in [["q_proj", "v_proj"], ["o_proj", "up_proj"]] {
        let targets = names.into_iter().map(String::from).collect();
        let method = Method::Lora { adapter: AdapterOptions { rank: 4, targets, dropout: 0.0 }, weights: None };
        for workload in [training, long_training] {
            compare(&model, |target| workload(&model, method.clone(), target), &software(true));
        }
    }
}

#[test]
fn lora_training_on_quantized_weights_agrees_with_the_cpu_engine() {
    let model = tiny("llama");
    for dtype in [DType::Nf4, DType::Int8] {
        compare(&model, |target| training(&model, lora_on(Some(dtype), 0.0), target), &software(true));
    }
}

#[test]
fn dropout_draws_the_same_mask_as_the_cpu_engine() {
    let model = tiny("llama");
    compare(&model, |target| training(&model, lora(0.1), target), &software(true));
}

#[test]
fn every_operation_of_full_training_agrees_with_the_cpu_engine() {
    let model = tiny("qwen2");
    compare(&model, |target| training(&model, Method::Full, target), &software(true));
}

/// With 8-bit states too, of parameters in more than one binding.
#[test]
fn optimizer_states_in_8_bits_agree_with_the_cpu_engine() {
    let model = tiny("qwen2");
    let workload = |model: &Model, target: &Target| {
        let options = TrainingOptions {
            sizes: vec![TOKENS],
            recompute: vec![Recompute::None; model.config.layers],
            eight_bit: true,
            ..training_options(Method::Full)
        };
        training_workload(&model.config, &options, target).expect("a workload")
    };
    compare(&model, |target| workload(&model, target), &software(true));
    let narrow = Options { narrow: Some([100 << 10, 400 << 10]), ..software(true) };
    compare(&model, |target| workload(&model, target), &narrow);
    // Four times the words: the states of the embedding are above a binding too.
    let config = ModelConfig { vocab_size: 2048, ..model.config.clone() };
    let weights = Arc::new(RandomWeights::new(&config, 7));
    let wordy = Model { folder: None, config, weights, random_weights: true, eos_token_ids: Vec::new() };
    compare(&wordy, |target| workload(&wordy, target), &narrow);
    // And where the embedding itself fits a buffer.
    let narrow = Options { narrow: Some([100 << 10, 1 << 20]), ..software(true) };
    compare(&wordy, |target| workload(&wordy, target), &narrow);
}

/// A model most of whose matrices, and whose caches, are above the limits that it is given: they lie in several buffers, and
/// every operation works on their parts.
#[test]
fn tensors_above_every_limit_are_cut() {
    const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 4100, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "torch_dtype": "float32", "hidden_act": "silu", "tie_word_embeddings": false}"#;
    let config = ModelConfig::parse(CONFIG).expect("a configuration");
    let weights = Arc::new(RandomWeights::new(&config, 7));
    let model = Model { folder: None, config, weights, random_weights: true, eos_token_ids: Vec::new() };
    // Of what training and generation have, only vectors and projections of 256 columns and rows fit a buffer.
    let options = Options { narrow: Some([320 << 10, 400 << 10]), ..software(true) };
    for method in [lora(0.0), lora_on(Some(DType::Nf4), 0.0), Method::Full] {
        compare(&model, |target| training(&model, method.clone(), target), &options);
    }
    let generation = GenerationOptions { capacity: 1024, prefill_sizes: vec![16] };
    let workload = |target: &Target| generation_workload(&model.config, &generation, None, None, target);
    compare(&model, |target| workload(target).expect("a workload"), &options);
}

/// What has a row a token lies in pieces, none of them a binding's worth: every operation works on ranges of rows, and
/// attention on ranges of queries and of keys. Documents begin, end and go on across their ends.
#[test]
fn activations_above_a_binding_lie_in_pieces() {
    // Pieces of 128 rows, of weights two of which are above a binding too.
    const LLAMA: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 272,
        "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 1,
        "head_dim": 32, "vocab_size": 500, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "torch_dtype": "float32", "hidden_act": "silu", "tie_word_embeddings": false}"#;
    // Of heads that no four elements divide, and a window; pieces of 256 rows, and parts of the MLP that begin within one.
    const MISTRAL: &str = r#"{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 180,
        "intermediate_size": 84, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 1,
        "head_dim": 30, "vocab_size": 500, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "torch_dtype": "float32", "hidden_act": "silu", "tie_word_embeddings": false, "sliding_window": 100}"#;
    let open = |config: &str| {
        let config = ModelConfig::parse(config).expect("a configuration");
        let weights = Arc::new(RandomWeights::new(&config, 7));
        Model { folder: None, config, weights, random_weights: true, eos_token_ids: Vec::new() }
    };
    let planned = |model: &Model, method: Method, options: &Options| {
        let target = wgpu::target(options).expect("a target");
        let workload = long_training(model, method, &target);
        let laid_out = plan(workload.clone(), target.clone()).expect("a plan");
        assert!(laid_out.pieces.len() > 10, "{} buffers lie in pieces", laid_out.pieces.len());
        assert!(laid_out.segments.iter().all(|&bytes| bytes <= target.largest_segment));
        workload
    };
    let (llama, mistral) = (open(LLAMA), open(MISTRAL));
    let narrow = |binding: u64| Options { narrow: Some([binding, 400 << 10]), ..software(true) };
    for method in [lora(0.0), lora(0.1), lora_on(Some(DType::Nf4), 0.0), Method::Full] {
        compare(&llama, |_| planned(&llama, method.clone(), &narrow(140 << 10)), &narrow(140 << 10));
    }
    // Of pieces of 128 rows too, where the window does not reach from every piece to the first.
    for binding in [260 << 10, 140 << 10] {
        compare(&mistral, |_| planned(&mistral, lora(0.0), &narrow(binding)), &narrow(binding));
    }

    // In f16 beside the same programs on buffers as large as they must be.
    let half = Options { compute: Some(DType::F16), ..software(false) };
    let pieces = Options { narrow: Some([140 << 10, 400 << 10]), ..half };
    for method in [lora(0.0), lora_on(Some(DType::Nf4), 0.0)] {
        let workload = planned(&llama, method, &pieces);
        let mut whole = open_on(&llama, workload.clone(), &half);
        check_whole(&mut whole, &mut open_on(&llama, workload, &pieces), 5e-3);
    }
}

/// What a session takes is in the plan, partial sums and parameters of launches too; what opening it would be refused for the plan
/// refuses, with what would fit.
#[test]
fn the_plan_knows_what_a_session_takes_and_what_it_is_refused() {
    let options = software(true);
    let model = tiny("llama");
    let search = |config, longest_row| {
        let target = wgpu::target(&options).expect("a target");
        let facts = Some(wgpu::facts(&options).expect("facts"));
        Search { facts, ..Search::new(config, training_options(lora(0.0)), target, longest_row, longest_row) }
    };
    let (plan, _) = search(&model.config, 200).run().expect("a plan");
    let peak = plan.summary.peak_bytes;
    let session = wgpu::open(plan, model.weights.clone(), &options).expect("opens");
    let taken = session.allocated_bytes();
    assert!(taken <= peak && taken * 10 >= peak * 7, "{taken} of {peak} planned");

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/configs/smollm2-135m.json");
    let config = ModelConfig::parse(&std::fs::read_to_string(path).expect("a file")).expect("a configuration");
    let refused = search(&config, 8000).run().expect_err("Mesa's shaders end their loops before");
    let PlanningError::Plan(PlanError::Refused { what, fits }) = refused else { panic!("{refused}") };
    assert!(what.contains("attention") && what.contains("iterations"), "{what}");
    let length = fits.iter().find_map(|setting| setting.strip_prefix("data.max_length = "));
    let length: usize = length.and_then(|length| length.parse().ok()).unwrap_or_else(|| panic!("{fits:?}"));
    search(&config, length).run().expect("what was proposed is not refused");
}

/// f16 gradients carry a scale that parameters' gradients do not have; one that overflows is seen in them, and made smaller.
#[test]
fn the_scale_of_f16_gradients_leaves_no_trace() {
    let model = tiny("llama");
    let options = Options { compute: Some(DType::F16), ..software(false) };
    let target = wgpu::target(&options).expect("a target");
    for method in [lora(0.0), Method::Full] {
        let workload = training(&model, method, &target);
        let named = |name: &str| workload.programs.iter().position(|program| program.name.starts_with(name));
        // Adapters have copies in f16, which are made first.
        let programs: Vec<usize> = ["refresh", "begin", "micro"].into_iter().filter_map(named).collect();
        let gradients: Vec<BufferId> = workload.of_kind(Kind::Gradient).map(|(id, _)| id).collect();
        let plan = plan(workload.clone(), target.clone()).expect("a plan");
        let mut session = wgpu::open(plan, model.weights.clone(), &options).expect("a session");
        write_inputs(&mut session);
        let size = |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let mut at_scale = |scale: f32| -> Vec<f32> {
            session.set_gradient_scale(scale).expect("it is set");
            assert_eq!(session.gradient_scale(), Some(scale));
            programs.iter().for_each(|&program| session.run(program).expect("it runs"));
            let values = |id: &BufferId| read_values::<f32>(&mut session, *id).expect("gradients");
            gradients.iter().flat_map(values).collect()
        };
        let expected = at_scale(64.0);
        assert!(size(&expected) > 1e-3);
        for scale in [16.0, 0.25, 256.0] {
            let found = at_scale(scale);
            let difference: Vec<f32> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
            let off = size(&difference) / size(&expected);
            assert!(off < 5e-3, "at {scale} gradients are off by {off}");
        }
        assert!(at_scale(1e9).iter().any(|value| !value.is_finite()));
    }
}

#[test]
fn generation_agrees_with_the_cpu_engine() {
    let model = tiny("qwen2");
    let options = GenerationOptions { capacity: 96, prefill_sizes: vec![16] };
    compare(
        &model,
        |target| generation_workload(&model.config, &options, None, None, target).expect("a workload"),
        &software(true),
    );
}
