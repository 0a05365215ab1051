//! The training workload: `begin`, `micro.T`, `evaluate.T`, `update`, and where samples are wanted generation.

use super::build::{AdapterOptions, Graph, Inputs, Trained};
use super::generation::{GenerationOptions, generation_programs};
use super::layer::{Keys, Pass, Saved, Stream};
use super::names;
use super::{ModelConfig, ModelError};
use crate::program::{AdamWPart, BufferId, DType, Kind, Op, Role, Target, Workload, random};

/// What is trained and how.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// LoRA on frozen weights held as stored, or quantized.
    Lora { adapter: AdapterOptions, weights: Option<DType> },
    /// Every weight.
    Full,
}

/// What a layer's forward pass keeps for its backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recompute {
    /// Everything is kept that would have to be made again.
    None,
    /// Norms and the gated product are computed again, products are kept.
    Cheap,
    /// Only the layer's input is kept.
    All,
    /// Only the layer's input is kept, in the host's memory.
    Offload,
    /// The layer's input and attention's output are kept: over long rows attention takes most of the time.
    AllButAttention,
    /// The same, both in the host's memory.
    OffloadWithAttention,
}

impl Recompute {
    /// Whether the layer runs again before its backward pass.
    pub fn runs_again(self) -> bool {
        self >= Recompute::All
    }

    pub fn offloads(self) -> bool {
        matches!(self, Recompute::Offload | Recompute::OffloadWithAttention)
    }

    pub fn keeps_attention(self) -> bool {
        matches!(self, Recompute::AllButAttention | Recompute::OffloadWithAttention)
    }
}

#[derive(Clone, Debug)]
pub struct TrainingOptions {
    pub method: Method,
    /// Micro-batch sizes in tokens, each a program.
    pub sizes: Vec<usize>,
    /// Also make programs for evaluation.
    pub evaluate: bool,
    /// One entry a layer.
    pub recompute: Vec<Recompute>,
    pub betas: [f32; 2],
    pub epsilon: f32,
    pub weight_decay: f32,
    /// 0: no clipping.
    pub max_grad_norm: f32,
    /// Moments in 8 bits.
    pub eight_bit: bool,
    /// Programs for samples during training.
    pub generation: Option<GenerationOptions>,
}

impl TrainingOptions {
    /// With evaluation, PyTorch's defaults of AdamW, gradients clipped to a norm of 1, and no samples.
    pub fn new(method: Method, sizes: Vec<usize>, recompute: Vec<Recompute>) -> Self {
        Self {
            method,
            sizes,
            evaluate: true,
            recompute,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            eight_bit: false,
            generation: None,
        }
    }
}

/// Builds the programs of a training run.
///
/// # Errors
/// When an option does not fit the model.
pub fn training_workload(
    config: &ModelConfig,
    options: &TrainingOptions,
    target: &Target,
) -> Result<Workload, ModelError> {
    if options.recompute.len() != config.layers {
        let (given, layers) = (options.recompute.len(), config.layers);
        return Err(ModelError::Request(format!("{given} recompute choices were given for {layers} layers")));
    }
    let (weights, adapter, trained) = match &options.method {
        Method::Lora { adapter, weights } => (weights.unwrap_or(config.dtype), Some(adapter), Trained::Adapter),
        Method::Full => (target.trainable, None, Trained::Weights),
    };
    if let Some(adapter) = adapter
        && let Some(unknown) = adapter.targets.iter().find(|target| !names::PROJECTIONS.contains(&target.as_str()))
    {
        return Err(ModelError::Request(format!(
            "{unknown} is no projection of {}; there are {}",
            config.family,
            names::PROJECTIONS.join(", ")
        )));
    }
    if weights == DType::Fp8 {
        check_fp8(config, target)?;
    }
    let mut graph = Graph::new(config, target, weights, adapter, trained);
    let mut sizes = options.sizes.clone();
    sizes.sort_unstable();
    sizes.dedup();
    for &tokens in &sizes {
        micro(&mut graph, tokens, &options.recompute, target);
        if options.evaluate {
            evaluate(&mut graph, tokens, target);
        }
    }
    begin(&mut graph);
    update(&mut graph, options);
    if let Some(generation) = &options.generation {
        generation_programs(&mut graph, generation);
    }
    Ok(graph.builder.finish())
}

/// Products of 8-bit floats: the device must have them, and they take matrices with sides of multiples of 16.
fn check_fp8(config: &ModelConfig, target: &Target) -> Result<(), ModelError> {
    if target.fp8_flops.is_none() {
        return Err(ModelError::Request(format!(
            "{} has no products of 8-bit floats (NVIDIA's Ada, Hopper and newer have); use engine.precision = \"auto\" and \
             model.weights = \"auto\", or method.kind = \"qlora\" for 4-bit weights",
            target.name
        )));
    }
    let sides = [
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("query columns", config.heads * config.head_dim),
        ("key-value columns", config.kv_heads * config.head_dim),
    ];
    match sides.into_iter().find(|(_, side)| !side.is_multiple_of(16)) {
        Some((name, side)) => Err(ModelError::Request(format!(
            "8-bit floats need sides of multiples of 16, and the model's {name} is {side}; use engine.precision = \"bf16\""
        ))),
        None => Ok(()),
    }
}

/// `recompute` has an entry a layer in training, and none otherwise.
fn forward(graph: &mut Graph, inputs: Inputs, recompute: &[Recompute]) -> (Stream, Vec<Saved>) {
    let mut stream = Stream { residual: embedding(graph, inputs.ids), delta: None };
    let mut saved = Vec::new();
    for layer in 0..graph.config.layers {
        let pass = recompute.get(layer).map_or(Pass::Inference, |&recompute| Pass::Training(recompute));
        let (next, kept) = graph.layer(layer, stream, Keys::Documents(inputs), pass);
        stream = next;
        saved.push(kept);
    }
    (stream, saved)
}

pub(super) fn embedding(graph: &mut Graph, ids: BufferId) -> BufferId {
    let shape = [graph.config.vocab_size, graph.config.hidden_size];
    let tokens = graph.rows(ids);
    let output = graph.activation("embedding", tokens, graph.config.hidden_size);
    let weight = graph.weight(names::EMBEDDING, &shape, false);
    graph.builder.push("embedding", Op::Embedding { ids, weight, output, scale: 1.0 });
    output
}

/// Rows of a product's tile: what is over a multiple of it costs as much as a whole tile.
const TILE: usize = 128;

/// Tokens of a chunk of the head: as few chunks as `most` allows, alike, of whole tiles.
fn head_chunk(most: usize, tokens: usize) -> usize {
    let most = if most >= TILE { most / TILE * TILE } else { most.max(1) };
    let chunks = tokens.div_ceil(most).max(1);
    tokens.div_ceil(chunks).next_multiple_of(TILE).min(most).min(tokens)
}

/// Emits head and loss; returns the gradient of the head's input when `training`.
fn head(graph: &mut Graph, inputs: Inputs, input: BufferId, training: bool, target: &Target) -> Option<BufferId> {
    let shape = [graph.config.vocab_size, graph.config.hidden_size];
    let name = names::head(graph.config);
    let weight = graph.weight(name, &shape, false);
    let row_bytes = graph.compute.bytes(&[graph.config.vocab_size]);
    let chunk = head_chunk((target.logits_bytes / row_bytes) as usize, inputs.tokens);
    let logits = graph.workspace("head.logits", &[chunk, graph.config.vocab_size], graph.compute);
    let grad_input = training.then(|| graph.activation("head.grad_input", inputs.tokens, graph.config.hidden_size));
    let op = Op::LinearCrossEntropy {
        input,
        weight,
        targets: inputs.targets,
        token_weights: inputs.token_weights,
        scale: graph.scalar("loss_scale", 1, DType::F32),
        losses: inputs.losses,
        loss_sum: graph.scalar("loss_sum", 1, DType::F32),
        grad_input,
        grad_weight: if training { graph.weight_gradient(name, &shape) } else { None },
        logits,
        softcap: None,
    };
    graph.builder.push("head", op);
    grad_input
}

fn micro(graph: &mut Graph, tokens: usize, recompute: &[Recompute], target: &Target) {
    let inputs = graph.inputs(tokens);
    graph.builder.begin(&format!("micro.{tokens}"), Role::Micro, tokens);
    let (stream, mut saved) = forward(graph, inputs, recompute);
    let norm = graph.norm("final_norm", names::FINAL_NORM, stream);
    let grad_norm = head(graph, inputs, norm.output, true, target).expect("training");
    let mut gradient = graph.norm_backward("final_norm", names::FINAL_NORM, norm, grad_norm, None);
    let trains_embedding = graph.trained == Trained::Weights;
    while let Some(kept) = saved.pop() {
        let layer = saved.len();
        let need_input = layer > 0 || trains_embedding;
        match graph.layer_backward(layer, kept, gradient, inputs, saved.last_mut(), need_input) {
            Some(next) => gradient = next,
            None => break,
        }
    }
    let shape = [graph.config.vocab_size, graph.config.hidden_size];
    if let Some(grad_weight) = graph.weight_gradient(names::EMBEDDING, &shape) {
        let name = format!("inputs.{tokens}.embedding_ids");
        let ids = graph.builder.persistent(&name, &[tokens], DType::I32, Kind::Input);
        let op = Op::EmbeddingBackward { ids, grad_output: gradient, grad_weight, scale: 1.0 };
        graph.builder.push("embedding.backward", op);
    }
    graph.builder.end();
}

fn evaluate(graph: &mut Graph, tokens: usize, target: &Target) {
    let inputs = graph.inputs(tokens);
    graph.builder.begin(&format!("evaluate.{tokens}"), Role::Evaluate, tokens);
    let (stream, _) = forward(graph, inputs, &[]);
    let norm = graph.norm("final_norm", names::FINAL_NORM, stream);
    head(graph, inputs, norm.output, false, target);
    graph.builder.end();
}

/// Names of the trained tensors, in a fixed order.
fn trained_parameters(graph: &Graph) -> Vec<String> {
    let modules = (0..graph.config.layers)
        .flat_map(|layer| names::LayerModules::new(graph.config, layer).all().cloned().collect::<Vec<_>>());
    match (graph.trained, graph.adapter) {
        (Trained::Adapter, Some(adapter)) => modules
            .filter(|module| adapter.targets.contains(module.projection()))
            .flat_map(|module| [module.lora_a(), module.lora_b()])
            .collect(),
        (Trained::Weights, _) => names::weights(graph.config).into_iter().map(|weight| weight.name).collect(),
        _ => Vec::new(),
    }
}

/// `begin` zeroes gradients and the loss before the first micro-batch of an update or an evaluation.
fn begin(graph: &mut Graph) {
    let loss = graph.scalar("loss_sum", 1, DType::F32);
    graph.builder.begin("begin", Role::Update, 0);
    let mut buffers = vec![loss];
    for name in trained_parameters(graph) {
        let shape = parameter_shape(graph, &name);
        buffers.push(graph.gradient(&name, &shape));
    }
    graph.builder.push("zero", Op::Zero { buffers });
    graph.builder.end();
}

fn update(graph: &mut Graph, options: &TrainingOptions) {
    let names = trained_parameters(graph);
    let moment = if options.eight_bit { DType::Block8 } else { DType::F32 };
    let kind = if graph.trained == Trained::Weights { Kind::Weight } else { Kind::Adapter };
    graph.builder.begin("update", Role::Update, 0);
    let mut parts = Vec::new();
    let mut copies = Vec::new();
    for name in &names {
        let shape = parameter_shape(graph, name);
        let dtype = if kind == Kind::Weight { graph.weights } else { DType::F32 };
        let parameter = graph.builder.persistent(name, &shape, dtype, kind);
        let gradient = graph.gradient(name, &shape);
        let mut state =
            |part: &str| graph.builder.persistent(&format!("{name}.{part}"), &shape, moment, Kind::Optimizer);
        let (first_moment, second_moment) = (state("exp_avg"), state("exp_avg_sq"));
        parts.push(AdamWPart { parameter, gradient, first_moment, second_moment, stream: random::stream(name) });
        if kind == Kind::Adapter && graph.compute != DType::F32 {
            let compute = graph.compute;
            let copy = graph.builder.persistent(&format!("{name}.compute"), &shape, compute, Kind::Adapter);
            copies.push((parameter, copy));
        }
    }
    let norm = graph.scalar("grad_norm", 1, DType::F32);
    let gradients = parts.iter().map(|part| part.gradient).collect();
    graph.builder.push("gradient_norm", Op::GradientNorm { gradients, norm });
    let op = Op::AdamW {
        parts,
        norm,
        hyper: graph.scalar("hyper", 4, DType::F32),
        key: graph.scalar("random_key", 4, DType::U32),
        betas: options.betas,
        epsilon: options.epsilon,
        weight_decay: options.weight_decay,
        max_grad_norm: options.max_grad_norm,
    };
    graph.builder.push("optimizer", op);
    if !copies.is_empty() {
        graph.builder.push("adapter.cast", Op::Cast { pairs: copies.clone() });
    }
    graph.builder.end();
    if !copies.is_empty() {
        graph.builder.begin("refresh", Role::Update, 0);
        graph.builder.push("adapter.cast", Op::Cast { pairs: copies });
        graph.builder.end();
    }
}

fn parameter_shape(graph: &Graph, name: &str) -> Vec<usize> {
    if graph.trained == Trained::Weights {
        let weights = names::weights(graph.config);
        return weights.into_iter().find(|weight| weight.name == name).map(|weight| weight.shape).expect("a weight");
    }
    let rank = graph.adapter.expect("an adapter is trained").rank;
    let (path, is_a) = match name.strip_suffix(".lora_A.weight") {
        Some(path) => (path, true),
        None => (name.strip_suffix(".lora_B.weight").expect("a LoRA matrix"), false),
    };
    let layer: usize = path.split('.').nth(2).and_then(|part| part.parse().ok()).expect("a layer");
    let modules = names::LayerModules::new(graph.config, layer);
    let module = modules.all().find(|module| module.path == path).expect("a module");
    if is_a { vec![rank, module.inputs] } else { vec![module.outputs, rank] }
}
