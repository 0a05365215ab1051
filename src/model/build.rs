//! The pieces that every family's builder is made of: weights, inputs, projections with their backward pass.

use std::collections::BTreeSet;

use super::ModelConfig;
use super::names::{self, Module};
use crate::program::{
    BufferId, Columns, DType, Dropout, Kind, Lora, LoraBackward, NormLimits, Op, Projection, ProjectionBackward,
    Target, WorkloadBuilder, random,
};

/// LoRA on some of the projections.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterOptions {
    pub rank: usize,
    /// Names such as `q_proj`.
    pub targets: BTreeSet<String>,
    pub dropout: f32,
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trained {
    Nothing,
    Adapter,
    Weights,
}

/// A workload under construction for one model.
pub(super) struct Graph<'a> {
    pub builder: WorkloadBuilder,
    pub config: &'a ModelConfig,
    /// Type of activations.
    pub compute: DType,
    /// Type in which the weights are held.
    pub weights: DType,
    /// Type of the gradients of trained matrices.
    pub gradients: DType,
    /// Most tokens that go through an MLP at once where it is computed again.
    pub mlp_tokens: usize,
    /// Those of which its widest activation is one allocation, at most.
    pub mlp_limit: usize,
    pub adapter: Option<&'a AdapterOptions>,
    pub trained: Trained,
    /// What is not kept, for the engine does without it in the backward pass.
    pub drops: Drops,
}

/// The inputs of a program, shared by all programs of that many tokens.
#[derive(Clone, Copy)]
pub(super) struct Inputs {
    pub tokens: usize,
    pub ids: BufferId,
    pub positions: BufferId,
    pub document_start: BufferId,
    pub document_end: BufferId,
    pub targets: BufferId,
    pub token_weights: BufferId,
    pub losses: BufferId,
}

/// Projections that share an input, as the forward pass left them.
#[derive(Clone)]
pub(super) struct LinearGroup {
    name: String,
    pub output: BufferId,
    modules: Vec<Module>,
    /// `[T, rank · adapted projections]`.
    middle: Option<BufferId>,
}

/// Tokens of which the gate and up values of an MLP fit one allocation of a target: where that is not all, a multiple of 128,
/// so that parts of activations begin where a target's placements may.
fn mlp_limit(config: &ModelConfig, target: &Target) -> usize {
    let row = target.compute.bytes(&[2 * config.intermediate_size]).max(1);
    let fitting = usize::try_from(target.largest_segment / row).unwrap_or(usize::MAX);
    if fitting < 128 { fitting.max(1) } else { fitting / 128 * 128 }
}

/// What is not kept on a target although LoRA branches read it: their gradients come with others'.
#[derive(Clone, Copy, Default)]
pub(super) struct Drops {
    pub gated: bool,
    norms: Option<NormLimits>,
    columns: usize,
    /// Ranks of the branches that read the norm before attention, and that before the MLP.
    ranks: [usize; 2],
}

impl Drops {
    fn new(config: &ModelConfig, target: &Target, weights: DType, adapter: Option<&AdapterOptions>) -> Self {
        let fits = |adapter: &&AdapterOptions| {
            weights != DType::Fp8 && adapter.rank.is_multiple_of(8) && adapter.dropout == 0.0
        };
        let Some(adapter) = adapter.filter(fits) else { return Self::default() };
        let count = |names: &[&str]| names.iter().filter(|&&name| adapter.targets.contains(name)).count();
        Self {
            gated: adapter.rank <= target.gated_rank && count(names::MLP) == names::MLP.len(),
            norms: target.norms,
            columns: config.hidden_size,
            ranks: [names::QUERY_KEY_VALUE, &names::MLP[..2]].map(|names| adapter.rank * count(names)),
        }
    }

    /// Of so many tokens, whether the norm before attention is not kept, and that before the MLP.
    pub fn norms(&self, tokens: usize) -> [bool; 2] {
        self.ranks.map(|ranks| self.norms.is_some_and(|norms| norms.take((tokens, self.columns), ranks)))
    }
}

impl<'a> Graph<'a> {
    pub fn new(
        config: &'a ModelConfig,
        target: &Target,
        weights: DType,
        adapter: Option<&'a AdapterOptions>,
        trained: Trained,
    ) -> Self {
        Self {
            builder: WorkloadBuilder::new(),
            config,
            compute: target.compute,
            weights,
            gradients: target.gradients,
            mlp_tokens: target.mlp_tokens,
            mlp_limit: mlp_limit(config, target),
            adapter,
            trained,
            drops: Drops::new(config, target, weights, adapter),
        }
    }

    pub fn scalar(&mut self, name: &str, elements: usize, dtype: DType) -> BufferId {
        self.builder.persistent(name, &[elements], dtype, Kind::Scalar)
    }

    /// A tensor of the checkpoint. Only matrices of projections are ever quantized.
    pub fn weight(&mut self, name: &str, shape: &[usize], quantizable: bool) -> BufferId {
        let mut dtype = if self.weights.is_quantized() && !quantizable { self.config.dtype } else { self.weights };
        // Frozen matrices are held in the type that products take.
        let frozen = self.trained != Trained::Weights;
        if frozen && self.compute == DType::BF16 && shape.len() > 1 && matches!(dtype, DType::F32 | DType::F16) {
            dtype = DType::BF16;
        }
        self.builder.persistent(name, shape, dtype, Kind::Weight)
    }

    /// The gradient of a trained weight, where weights are trained.
    pub fn weight_gradient(&mut self, name: &str, shape: &[usize]) -> Option<BufferId> {
        (self.trained == Trained::Weights).then(|| self.gradient(name, shape))
    }

    /// The gradient of a trained tensor: f32, but for matrices of the model where the target holds those in less.
    pub fn gradient(&mut self, name: &str, shape: &[usize]) -> BufferId {
        let whole = self.trained != Trained::Weights || shape.len() < 2;
        let dtype = if whole { DType::F32 } else { self.gradients };
        self.builder.persistent(&format!("{name}.grad"), shape, dtype, Kind::Gradient)
    }

    pub fn inputs(&mut self, tokens: usize) -> Inputs {
        let mut input = |part: &str, dtype: DType, kind: Kind| {
            self.builder.persistent(&format!("inputs.{tokens}.{part}"), &[tokens], dtype, kind)
        };
        Inputs {
            tokens,
            ids: input("ids", DType::I32, Kind::Input),
            positions: input("positions", DType::I32, Kind::Input),
            document_start: input("document_start", DType::I32, Kind::Input),
            document_end: input("document_end", DType::I32, Kind::Input),
            targets: input("targets", DType::I32, Kind::Input),
            token_weights: input("token_weights", DType::F32, Kind::Input),
            losses: input("losses", DType::F32, Kind::Output),
        }
    }

    /// An activation `[tokens, columns]` in the compute type.
    pub fn activation(&mut self, name: &str, tokens: usize, columns: usize) -> BufferId {
        self.builder.activation(name, &[tokens, columns], self.compute)
    }

    pub fn workspace(&mut self, name: &str, shape: &[usize], dtype: DType) -> BufferId {
        self.builder.transient(name, shape, dtype, Kind::Workspace)
    }

    pub fn rows(&self, buffer: BufferId) -> usize {
        self.builder.buffer(buffer).rows()
    }

    fn rank(&self, module: &Module) -> Option<usize> {
        self.adapter.filter(|adapter| adapter.targets.contains(module.projection())).map(|adapter| adapter.rank)
    }

    /// A LoRA matrix as the products read it: the f32 original, or its copy in the compute type.
    fn lora_matrix(&mut self, name: &str, shape: &[usize]) -> BufferId {
        let original = self.builder.persistent(name, shape, DType::F32, Kind::Adapter);
        if self.compute == DType::F32 {
            return original;
        }
        self.builder.persistent(&format!("{name}.compute"), shape, self.compute, Kind::Adapter)
    }

    fn lora_gradient(&mut self, name: &str, shape: &[usize]) -> BufferId {
        self.builder.persistent(&format!("{name}.grad"), shape, DType::F32, Kind::Gradient)
    }

    /// Dropout of a branch. Masks count tokens from the start of an operation: where one takes the tokens from `first` on of many,
    /// it draws from a stream of its own.
    fn dropout(&mut self, module: &Module, first: usize) -> Option<Dropout> {
        let part = if first == 0 { String::new() } else { format!(" from token {first}") };
        let probability = self.adapter.map_or(0.0, |adapter| adapter.dropout);
        let trains = self.trained == Trained::Adapter;
        (trains && probability > 0.0).then(|| Dropout {
            probability,
            key: self.scalar("random_key", 4, DType::U32),
            stream: random::stream(&format!("{}{part}", module.path)),
        })
    }

    /// The first token of an operation between these buffers, where they are parts of larger ones.
    fn first_token(&self, buffers: [BufferId; 2]) -> usize {
        buffers.iter().filter_map(|&id| self.builder.buffer(id).within).map(|(_, first)| first).max().unwrap_or(0)
    }

    /// Emits projections that share `input`; their outputs lie side by side in one new buffer.
    /// `training`: whether dropout is on.
    pub fn linear(&mut self, name: &str, input: BufferId, modules: Vec<Module>, training: bool) -> LinearGroup {
        let width: usize = modules.iter().map(|module| module.outputs).sum();
        let output = self.activation(name, self.rows(input), width);
        self.linear_to(output, name, input, modules, training)
    }

    /// As [`Self::linear`], into a buffer that is there.
    pub fn linear_to(
        &mut self,
        output: BufferId,
        name: &str,
        input: BufferId,
        modules: Vec<Module>,
        training: bool,
    ) -> LinearGroup {
        let tokens = self.rows(input);
        let ranks: usize = modules.iter().filter_map(|module| self.rank(module)).sum();
        let middle = (ranks > 0).then(|| self.activation(&format!("{name}.lora"), tokens, ranks));
        let mut projections = Vec::new();
        let (mut column, mut rank_column) = (0, 0);
        let first = self.first_token([input, output]);
        for module in &modules {
            let weight = self.weight(&module.weight(), &[module.outputs, module.inputs], true);
            let bias = module.bias.then(|| self.weight(&module.bias(), &[module.outputs], false));
            let lora = self.rank(module).zip(middle).map(|(rank, buffer)| {
                let lora = Lora {
                    a: self.lora_matrix(&module.lora_a(), &[rank, module.inputs]),
                    b: self.lora_matrix(&module.lora_b(), &[module.outputs, rank]),
                    middle: Columns { buffer, start: rank_column, width: rank },
                    scale: self.scalar("lora_scale", 1, DType::F32),
                    dropout: if training { self.dropout(module, first) } else { None },
                };
                rank_column += rank;
                lora
            });
            let output = Columns { buffer: output, start: column, width: module.outputs };
            projections.push(Projection { weight, bias, output, lora });
            column += module.outputs;
        }
        self.builder.push(name, Op::Linear { input, projections });
        LinearGroup { name: name.to_string(), output, modules, middle }
    }

    /// Whether something of a group is trained: only then its backward pass reads the input.
    pub fn trains(&self, group: &LinearGroup) -> bool {
        self.trained == Trained::Weights || group.middle.is_some()
    }

    /// Emits the backward pass of a group. `input` is the forward input (recomputed perhaps); returns its gradient
    /// when `need_input`.
    pub fn linear_backward(
        &mut self,
        group: &LinearGroup,
        input: BufferId,
        grad_output: BufferId,
        need_input: bool,
    ) -> Option<BufferId> {
        let (tokens, columns) = (self.rows(input), self.builder.buffer(input).columns());
        let grad_input = need_input.then(|| self.activation(&format!("{}.grad_input", group.name), tokens, columns));
        self.linear_backward_to(grad_input, group, input, grad_output);
        grad_input
    }

    /// As [`Self::linear_backward`], into a buffer that is there.
    pub fn linear_backward_to(
        &mut self,
        grad_input: Option<BufferId>,
        group: &LinearGroup,
        input: BufferId,
        grad_output: BufferId,
    ) {
        let tokens = self.rows(input);
        let name = format!("{}.backward", group.name);
        let grad_middle = group.middle.map(|middle| {
            let ranks = self.builder.buffer(middle).columns();
            self.workspace(&format!("{}.grad_lora", group.name), &[tokens, ranks], self.compute)
        });
        let mut projections = Vec::new();
        let (mut column, mut rank_column) = (0, 0);
        let first = self.first_token([input, grad_output]);
        for module in &group.modules {
            let shape = [module.outputs, module.inputs];
            let weight = self.weight(&module.weight(), &shape, true);
            let grad_weight = self.weight_gradient(&module.weight(), &shape);
            let grad_bias = if module.bias { self.weight_gradient(&module.bias(), &[module.outputs]) } else { None };
            let buffers = group.middle.zip(grad_middle);
            let lora = self.rank(module).zip(buffers).map(|(rank, (middle, grad_middle))| {
                let (shape_a, shape_b) = ([rank, module.inputs], [module.outputs, rank]);
                let lora = LoraBackward {
                    a: self.lora_matrix(&module.lora_a(), &shape_a),
                    b: self.lora_matrix(&module.lora_b(), &shape_b),
                    middle: Columns { buffer: middle, start: rank_column, width: rank },
                    grad_middle: Columns { buffer: grad_middle, start: rank_column, width: rank },
                    grad_a: self.lora_gradient(&module.lora_a(), &shape_a),
                    grad_b: self.lora_gradient(&module.lora_b(), &shape_b),
                    scale: self.scalar("lora_scale", 1, DType::F32),
                    dropout: self.dropout(module, first),
                };
                rank_column += rank;
                lora
            });
            let grad_output = Columns { buffer: grad_output, start: column, width: module.outputs };
            column += module.outputs;
            projections.push(ProjectionBackward { weight, grad_output, grad_weight, grad_bias, lora });
        }
        // Without an input gradient, an adapter or trained weights there is nothing to do.
        let trains = projections.iter().any(|p| p.grad_weight.is_some() || p.lora.is_some());
        if grad_input.is_some() || trains {
            self.builder.push(&name, Op::LinearBackward { input, grad_input, projections });
        }
    }
}
