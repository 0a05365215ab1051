//! The operations: what a training or generation step is made of.
//!
//! Each variant says what it computes, the shapes of its buffers, and (through [`Op::accesses`]) what it
//! reads, writes and updates. `T` is the number of tokens in the micro-batch, `H` the hidden size, `V` the
//! vocabulary, `r` the LoRA rank. Sums are taken in f32 or wider whatever the storage type. An engine must
//! implement every variant; the twin that judges it lives in `tests/`.

use serde::Serialize;

use super::{BufferId, Columns};

/// How an operation touches a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    /// Every element is written; what was there does not matter.
    Write,
    /// Read and written: changed in place or accumulated into.
    Update,
}

/// A frozen or trained matrix with an optional bias and an optional LoRA branch:
/// `output = input · weightᵀ + bias + scale · (drop(input) · aᵀ) · bᵀ` (Hu et al. 2021, arXiv 2106.09685).
#[derive(Clone, Debug, Serialize)]
pub struct Projection {
    /// `[N, K]`.
    pub weight: BufferId,
    /// `[N]`.
    pub bias: Option<BufferId>,
    /// `[T, N]` columns of the output.
    pub output: Columns,
    pub lora: Option<Lora>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Lora {
    /// `[r, K]`.
    pub a: BufferId,
    /// `[N, r]`.
    pub b: BufferId,
    /// `[T, r]` columns: `drop(input) · aᵀ`, before scaling; kept for the backward pass.
    pub middle: Columns,
    /// f32 `[1]`: alpha / rank (alpha / √rank with rsLoRA); 0 gives the base model.
    pub scale: BufferId,
    pub dropout: Option<Dropout>,
}

/// Dropout on the input of a LoRA branch. Element `(token, column)` is kept when
/// [`random::uniform`](super::random::uniform) of the key and the element is at least `probability`, and then
/// multiplied by `1 / (1 - probability)`. The token is the row in the micro-batch.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Dropout {
    pub probability: f32,
    /// u32 `[4]`: seed low, seed high, update, micro-batch.
    pub key: BufferId,
    /// Hash of the projection's stable name: the same in forward, recompute and backward.
    pub stream: u32,
}

#[derive(Clone, Debug, Serialize)]
pub struct ProjectionBackward {
    /// `[N, K]`.
    pub weight: BufferId,
    /// `[T, N]` columns.
    pub grad_output: Columns,
    /// `[N, K]`, accumulates `grad_outputᵀ · input`.
    pub grad_weight: Option<BufferId>,
    /// `[N]`, accumulates the column sums of `grad_output`.
    pub grad_bias: Option<BufferId>,
    pub lora: Option<LoraBackward>,
}

/// With `g = scale · grad_output · b` (`[T, r]`): `grad_a += gᵀ · drop(input)`,
/// `grad_b += scale · grad_outputᵀ · middle`, `grad_input += drop'(g · a)`.
#[derive(Clone, Debug, Serialize)]
pub struct LoraBackward {
    pub a: BufferId,
    pub b: BufferId,
    /// `[T, r]` columns, from the forward pass.
    pub middle: Columns,
    /// `[T, r]` columns of workspace for `g`.
    pub grad_middle: Columns,
    /// f32 `[r, K]`, accumulated.
    pub grad_a: BufferId,
    /// f32 `[N, r]`, accumulated.
    pub grad_b: BufferId,
    pub scale: BufferId,
    pub dropout: Option<Dropout>,
}

/// Layout and masking of attention. Queries, keys and values lie side by side in one row:
/// `heads · head_dim` query columns, then `kv_heads · head_dim` of keys, then as many of values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Multiplies the scores, usually `1 / √head_dim`.
    pub scale: f32,
    /// A token sees itself and the `window - 1` tokens before it.
    pub window: Option<usize>,
    /// `c · tanh(score / c)` after scaling (Gemma 2).
    pub softcap: Option<f32>,
}

impl AttentionShape {
    pub fn query_columns(&self) -> usize {
        self.heads * self.head_dim
    }

    pub fn kv_columns(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Columns of a query-key-value row.
    pub fn columns(&self) -> usize {
        self.query_columns() + 2 * self.kv_columns()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))`.
    GeluTanh,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    Forward,
    Backward,
}

/// One trainable tensor of an optimizer step. All four have the same number of elements.
#[derive(Clone, Debug, Serialize)]
pub struct AdamWPart {
    pub parameter: BufferId,
    pub gradient: BufferId,
    /// f32 or [`DType::Block8`](super::DType::Block8).
    pub first_moment: BufferId,
    pub second_moment: BufferId,
    /// Random-number stream for stochastic rounding when the parameter is bf16.
    pub stream: u32,
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Op {
    /// `output[t] = scale · weight[ids[t]]`.
    Embedding {
        /// i32 `[T]`.
        ids: BufferId,
        /// `[V, H]`.
        weight: BufferId,
        /// `[T, H]`.
        output: BufferId,
        scale: f32,
    },
    /// `grad_weight[ids[t]] += scale · grad_output[t]` where `ids[t] >= 0`, in the order of `t` (deterministic).
    EmbeddingBackward {
        /// i32 `[T]`; negative for tokens whose row is not trained from here, such as padding.
        ids: BufferId,
        grad_output: BufferId,
        grad_weight: BufferId,
        scale: f32,
    },
    /// `x = input + residual` (stored in `sum`; without a residual `x = input`),
    /// `output = x / √(mean(x²) + epsilon) · (weight_offset + weight)` (Zhang & Sennrich 2019, arXiv 1910.07467).
    RmsNorm {
        /// `[T, H]`.
        input: BufferId,
        residual: Option<BufferId>,
        /// `[T, H]`, there exactly when `residual` is.
        sum: Option<BufferId>,
        /// `[H]`.
        weight: BufferId,
        /// `[T, H]`.
        output: BufferId,
        /// f32 `[T]`.
        inverse_rms: BufferId,
        epsilon: f32,
        weight_offset: f32,
    },
    /// With `n = x · inverse_rms` and `d = grad_output · (weight_offset + weight)`:
    /// `grad_input = residual_grad + inverse_rms · (d - n · mean(d · n))`, `grad_weight += Σ_t grad_output · n`.
    RmsNormBackward {
        grad_output: BufferId,
        /// `x` of the forward pass: `sum`, or `input` where there was no residual.
        input: BufferId,
        weight: BufferId,
        inverse_rms: BufferId,
        /// Gradient that reaches `x` past the norm.
        residual_grad: Option<BufferId>,
        grad_input: BufferId,
        grad_weight: Option<BufferId>,
        weight_offset: f32,
    },
    /// Projections that share an input.
    Linear {
        /// `[T, K]`.
        input: BufferId,
        projections: Vec<Projection>,
    },
    LinearBackward {
        /// `[T, K]`; read where a weight or a branch is trained.
        input: BufferId,
        /// `[T, K]`, written with the sum over the projections; none where nothing before needs it.
        grad_input: Option<BufferId>,
        projections: Vec<ProjectionBackward>,
    },
    /// Rotary position embedding in place (Su et al. 2021, arXiv 2104.09864), in the half-split layout of
    /// Transformers: dimension `i` is paired with `i + rotary_dim / 2`. `Backward` rotates the other way.
    Rope {
        /// Columns of whole heads.
        tensor: Columns,
        /// i32 `[T]`.
        positions: BufferId,
        /// f32 `[rotary_dim / 2]`.
        inverse_frequency: BufferId,
        head_dim: usize,
        rotary_dim: usize,
        /// Multiplies cosine and sine.
        scale: f32,
        direction: Direction,
    },
    /// Causal attention within documents: token `t` sees `s` when
    /// `max(document_start[t], t - window + 1) <= s <= t`.
    Attention {
        /// `[T, shape.columns()]`.
        qkv: BufferId,
        /// i32 `[T]`: first token of the document that `t` belongs to.
        document_start: BufferId,
        /// i32 `[T]`: one past the last token of that document.
        document_end: BufferId,
        /// `[T, heads · head_dim]`.
        output: BufferId,
        /// f32 `[T, heads]`: natural logarithm of the sum of exponentials of the scaled (capped) scores.
        log_sum_exp: BufferId,
        shape: AttentionShape,
    },
    /// Recomputes probabilities from `log_sum_exp` (Dao 2023, arXiv 2307.08691).
    AttentionBackward {
        /// `[T, heads · head_dim]`.
        grad_output: BufferId,
        qkv: BufferId,
        output: BufferId,
        log_sum_exp: BufferId,
        document_start: BufferId,
        document_end: BufferId,
        /// f32 `[T, heads]` of workspace: `Σ grad_output · output`.
        delta: BufferId,
        /// `[T, shape.columns()]`, every element written.
        grad_qkv: BufferId,
        shape: AttentionShape,
    },
    /// Attention of generation. Rows `0..T` of `qkv` are the tokens at positions `start..start + T`: their keys
    /// and values are stored in the cache, and each attends to all positions up to its own.
    CachedAttention {
        qkv: BufferId,
        /// `[capacity, kv_heads · head_dim]`.
        cache_key: BufferId,
        cache_value: BufferId,
        /// i32 `[1]`.
        start: BufferId,
        output: BufferId,
        shape: AttentionShape,
    },
    /// `output = activation(gate) · up`; `gate_up` holds `I` gate columns, then `I` up columns.
    Glu {
        /// `[T, 2 I]`.
        gate_up: BufferId,
        /// `[T, I]`.
        output: BufferId,
        activation: Activation,
    },
    GluBackward {
        grad_output: BufferId,
        gate_up: BufferId,
        grad_gate_up: BufferId,
        activation: Activation,
    },
    /// `output[i] = input[rows[i]]`.
    GatherRows {
        input: BufferId,
        /// i32 `[n]`.
        rows: BufferId,
        output: BufferId,
    },
    /// Head and cross-entropy in chunks of tokens, so that the logits of the whole micro-batch never exist; the
    /// backward pass is fused in. With `z = softcap(input · weightᵀ)`:
    /// `losses[t] = logsumexp(z) - z[targets[t]]`, 0 where `targets[t] < 0`;
    /// `loss_sum += scale · Σ token_weights[t] · losses[t]`;
    /// `dz = scale · token_weights[t] · (softmax(z) - onehot)`, `grad_input = dz · weight`, `grad_weight += dzᵀ · input`.
    LinearCrossEntropy {
        /// `[T, H]`.
        input: BufferId,
        /// `[V, H]`.
        weight: BufferId,
        /// i32 `[T]`: the next token, or -100 where no loss is taken (labels are shifted already).
        targets: BufferId,
        /// f32 `[T]`.
        token_weights: BufferId,
        /// f32 `[1]`: one over the label tokens of the whole update.
        scale: BufferId,
        /// f32 `[T]`.
        losses: BufferId,
        /// f32 `[1]`, accumulated.
        loss_sum: BufferId,
        /// `[T, H]`; rows without a target are zero.
        grad_input: Option<BufferId>,
        /// `[V, H]`, accumulated.
        grad_weight: Option<BufferId>,
        /// `[chunk, V]` of workspace, in the compute type or f32.
        logits: BufferId,
        softcap: Option<f32>,
    },
    /// `to = from`, converted; sets of tensors in one launch. A copy to or from a buffer in the host's memory
    /// ([`Kind::Offload`](super::Kind::Offload)) may run beside what follows: neither end is touched before a [`Op::Wait`]
    /// has named both.
    Cast {
        pairs: Vec<(BufferId, BufferId)>,
    },
    /// Waits for the copies between these buffers. It changes nothing; that it reads them keeps their places theirs.
    Wait {
        buffers: Vec<BufferId>,
    },
    Zero {
        buffers: Vec<BufferId>,
    },
    /// `norm = √Σ g²` over all the gradients.
    GradientNorm {
        gradients: Vec<BufferId>,
        /// f32 `[1]`.
        norm: BufferId,
    },
    /// AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) on all tensors at once. `g = gradient · c` with
    /// `c = min(1, max_grad_norm / (norm + 1e-6))` (1 when `max_grad_norm` is 0), then
    /// `p -= rate · weight_decay · p`, `m = β₁ m + (1-β₁) g`, `v = β₂ v + (1-β₂) g²`,
    /// `p -= rate / correction₁ · m / (√v / √correction₂ + epsilon)`, where `correctionᵢ = 1 - βᵢ^step`.
    /// Changes nothing when `norm` is not finite. bf16 parameters are rounded stochastically.
    AdamW {
        parts: Vec<AdamWPart>,
        /// f32 `[1]`.
        norm: BufferId,
        /// f32 `[4]`: rate, correction₁, √correction₂, unused.
        hyper: BufferId,
        /// u32 `[4]`, see [`Dropout::key`].
        key: BufferId,
        betas: [f32; 2],
        epsilon: f32,
        weight_decay: f32,
        max_grad_norm: f32,
    },
}
