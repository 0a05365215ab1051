//! The generation workload: `prefill.T` and `decode` over key-value caches.

use super::build::{AdapterOptions, Graph, Trained};
use super::layer::{Keys, Pass, Stream};
use super::training::embedding;
use super::{ModelConfig, ModelError, names};
use crate::program::{Columns, DType, Kind, Op, Projection, Role, Target, Workload};

#[derive(Clone, Debug, PartialEq)]
pub struct GenerationOptions {
    /// Positions that the cache holds.
    pub capacity: usize,
    /// Tokens of the prefill programs; `decode` (one token) is always made.
    pub prefill_sizes: Vec<usize>,
}

/// Builds the programs of generation, on an adapter where one is given.
///
/// # Errors
/// When an option does not fit the model.
pub fn generation_workload(
    config: &ModelConfig,
    options: &GenerationOptions,
    adapter: Option<&AdapterOptions>,
    weights: Option<DType>,
    target: &Target,
) -> Result<Workload, ModelError> {
    if options.capacity == 0 {
        return Err(ModelError::Request("the cache needs room for at least one token".into()));
    }
    let weights = weights.unwrap_or(config.dtype);
    let mut graph = Graph::new(config, target, weights, adapter, Trained::Nothing);
    generation_programs(&mut graph, options);
    refresh(&mut graph);
    Ok(graph.builder.finish())
}

/// Emits `prefill.T` for every size and `decode`.
pub(super) fn generation_programs(graph: &mut Graph, options: &GenerationOptions) {
    for &tokens in &options.prefill_sizes {
        generation_program(graph, &format!("prefill.{tokens}"), Role::Prefill, tokens, options.capacity);
    }
    generation_program(graph, "decode", Role::Decode, 1, options.capacity);
}

fn generation_program(graph: &mut Graph, name: &str, role: Role, tokens: usize, capacity: usize) {
    let config = graph.config;
    let mut input = |part: &str, elements: usize| {
        graph.builder.persistent(&format!("inputs.{tokens}.{part}"), &[elements], DType::I32, Kind::Input)
    };
    let (ids, positions) = (input("ids", tokens), input("positions", tokens));
    let (rows, start) = (input("rows", 1), input("start", 1));
    let logits = graph.builder.persistent("logits", &[1, config.vocab_size], DType::F32, Kind::Output);
    graph.builder.begin(name, role, tokens);
    let mut stream = Stream { residual: embedding(graph, ids), delta: None };
    for layer in 0..config.layers {
        stream = graph.layer(layer, stream, Keys::Cache { positions, start, capacity }, Pass::Inference).0;
    }
    let norm = graph.norm("final_norm", names::FINAL_NORM, stream);
    let row = graph.activation("head.input", 1, config.hidden_size);
    graph.builder.push("head.row", Op::GatherRows { input: norm.output, rows, output: row });
    let weight = graph.weight(names::head(config), &[config.vocab_size, config.hidden_size], false);
    let output = Columns { buffer: logits, start: 0, width: config.vocab_size };
    let projection = Projection { weight, bias: None, output, lora: None };
    graph.builder.push("head", Op::Linear { input: row, projections: vec![projection] });
    graph.builder.end();
}

/// Copies the adapter to the compute type, once after it was written.
fn refresh(graph: &mut Graph) {
    let Some(adapter) = graph.adapter.filter(|_| graph.compute != DType::F32) else {
        return;
    };
    let mut pairs = Vec::new();
    for layer in 0..graph.config.layers {
        for module in names::LayerModules::new(graph.config, layer).all() {
            if !adapter.targets.contains(module.projection()) {
                continue;
            }
            let shapes = [[adapter.rank, module.inputs], [module.outputs, adapter.rank]];
            for (name, shape) in [module.lora_a(), module.lora_b()].into_iter().zip(shapes) {
                let from = graph.builder.persistent(&name, &shape, DType::F32, Kind::Adapter);
                let copy = format!("{name}.compute");
                let to = graph.builder.persistent(&copy, &shape, graph.compute, Kind::Adapter);
                pairs.push((from, to));
            }
        }
    }
    graph.builder.begin("refresh", Role::Update, 0);
    graph.builder.push("adapter.cast", Op::Cast { pairs });
    graph.builder.end();
}
