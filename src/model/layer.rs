//! A decoder layer of the Llama kind, forward and backward side by side:
//!
//! ```text
//! x1 = x + delta          n1 = norm(x1)   qkv = rope(linear(n1))   a = attention(qkv)   o = linear(a)
//! x2 = x1 + o             n2 = norm(x2)   gu = linear(n2)          s = glu(gu)          d = linear(s)
//! ```
//!
//! `delta` is the MLP's output of the layer before, added by the norm that reads it. The layer gives `(x2, d)`.

use super::build::{Graph, Inputs, LinearGroup};
use super::names::{self, LayerModules};
use super::training::Recompute;
use crate::program::{AttentionShape, BufferId, Columns, DType, Direction, Kind, Op};

/// The stream between layers: the residual and what the next norm adds to it.
#[derive(Clone, Copy)]
pub(super) struct Stream {
    pub residual: BufferId,
    pub delta: Option<BufferId>,
}

/// A norm's result and what its backward pass reads.
#[derive(Clone, Copy)]
pub(super) struct Norm {
    /// Input with the delta added.
    pub sum: BufferId,
    pub output: BufferId,
    pub inverse_rms: BufferId,
}

/// Which pass through a layer is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    /// Nothing is kept.
    Inference,
    /// The first pass of training.
    Training(Recompute),
    /// Once more before the backward pass: the MLP there.
    Again,
}

/// What the backward pass of a layer reads.
pub(super) struct Saved {
    norm1: Norm,
    qkv: LinearGroup,
    attention: BufferId,
    log_sum_exp: BufferId,
    output: LinearGroup,
    norm2: Norm,
    /// One part, or chunks of tokens one after the other.
    mlp: Vec<Mlp>,
    recompute: Recompute,
    /// The layer's input in the host's memory.
    input: Offloaded,
    /// The output of attention there.
    attention_output: Offloaded,
}

/// A tensor that waits in the host's memory.
#[derive(Clone, Copy, Default)]
struct Offloaded {
    host: Option<BufferId>,
    /// Where it is on its way back to.
    returning: Option<BufferId>,
}

/// What attention gave the first time.
#[derive(Clone, Copy)]
struct Attended {
    output: BufferId,
    log_sum_exp: BufferId,
    /// Where the output comes from, if it is on its way.
    host: Option<BufferId>,
}

/// The MLP of some tokens.
struct Mlp {
    first: usize,
    tokens: usize,
    gate_up: LinearGroup,
    glu: BufferId,
    down: LinearGroup,
}

/// How attention reaches its keys and values.
#[derive(Clone, Copy)]
pub(super) enum Keys {
    /// Those of the micro-batch, within documents.
    Documents(Inputs),
    /// A cache of `capacity` positions; `start` of them are filled.
    Cache { positions: BufferId, start: BufferId, capacity: usize },
}

impl Keys {
    fn positions(self) -> BufferId {
        match self {
            Keys::Documents(inputs) => inputs.positions,
            Keys::Cache { positions, .. } => positions,
        }
    }
}

impl Graph<'_> {
    pub fn attention_shape(&self, layer: usize) -> AttentionShape {
        AttentionShape {
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
            scale: 1.0 / (self.config.head_dim as f32).sqrt(),
            window: self.config.windows[layer],
            softcap: None,
        }
    }

    /// `norm(stream)` with the weight of that name; the sum is stored when there is a delta.
    pub fn norm(&mut self, name: &str, weight: &str, stream: Stream) -> Norm {
        let tokens = self.rows(stream.residual);
        let hidden = self.config.hidden_size;
        let sum = stream.delta.map(|_| self.activation(&format!("{name}.sum"), tokens, hidden));
        let output = self.activation(name, tokens, hidden);
        let inverse_rms = self.builder.activation(&format!("{name}.inverse_rms"), &[tokens], DType::F32);
        let weight = self.weight(weight, &[hidden], false);
        let op = Op::RmsNorm {
            input: stream.residual,
            residual: stream.delta,
            sum,
            weight,
            output,
            inverse_rms,
            epsilon: self.config.norm_epsilon,
            weight_offset: 0.0,
        };
        self.builder.push(name, op);
        Norm { sum: sum.unwrap_or(stream.residual), output, inverse_rms }
    }

    /// The norm with its result made again from its sum.
    fn norm_again(&mut self, name: &str, weight: &str, norm: Norm) -> Norm {
        let stream = Stream { residual: norm.sum, delta: None };
        Norm { output: self.norm(&format!("{name}.again"), weight, stream).output, ..norm }
    }

    /// Gradient of a norm's sum from that of its output and that which reaches the sum past the norm.
    pub fn norm_backward(
        &mut self,
        name: &str,
        weight_name: &str,
        norm: Norm,
        grad_output: BufferId,
        residual_grad: Option<BufferId>,
    ) -> BufferId {
        let tokens = self.rows(norm.sum);
        let hidden = self.config.hidden_size;
        let grad_input = self.activation(&format!("{name}.grad_input"), tokens, hidden);
        let op = Op::RmsNormBackward {
            grad_output,
            input: norm.sum,
            weight: self.weight(weight_name, &[hidden], false),
            inverse_rms: norm.inverse_rms,
            residual_grad,
            grad_input,
            grad_weight: self.weight_gradient(weight_name, &[hidden]),
            weight_offset: 0.0,
        };
        self.builder.push(&format!("{name}.backward"), op);
        grad_input
    }

    fn rope(&mut self, name: &str, qkv: BufferId, positions: BufferId, direction: Direction) {
        let head_dim = self.config.head_dim;
        let inverse_frequency =
            self.builder.constant("rope.inverse_frequency", &self.config.rope.inverse_frequencies(head_dim));
        let width = (self.config.heads + self.config.kv_heads) * head_dim;
        let op = Op::Rope {
            tensor: Columns { buffer: qkv, start: 0, width },
            positions,
            inverse_frequency,
            head_dim,
            rotary_dim: head_dim,
            scale: 1.0,
            direction,
        };
        self.builder.push(name, op);
    }

    /// The layer's forward pass. The MLP works through the tokens in chunks where its activations would be beyond an
    /// allocation, and where nothing of it is kept if the target asks for it.
    pub fn layer(&mut self, layer: usize, stream: Stream, keys: Keys, pass: Pass) -> (Stream, Saved) {
        let training = pass != Pass::Inference;
        let mut saved = self.attention_block(layer, stream, keys, pass, None);
        let tokens = self.rows(saved.norm2.output);
        let most = if training && !saved.recompute.runs_again() { tokens } else { self.mlp_tokens };
        let most = most.min(self.mlp_limit);
        let name = format!("layers.{layer}.mlp.down");
        let delta = self.activation(&name, tokens, self.config.hidden_size);
        let mut first = 0;
        while first < tokens {
            let count = most.clamp(1, tokens - first);
            let gate_up = self.gate_up(layer, saved.norm2.output, first, count, training);
            let glu = self.glu(&format!("layers.{layer}.mlp.glu"), gate_up.output);
            let output = self.part(delta, first, count);
            let modules = LayerModules::new(self.config, layer);
            let down = self.linear_to(output, &name, glu, modules.down, training);
            saved.mlp.push(Mlp { first, tokens: count, gate_up, glu, down });
            first += count;
        }
        if let Some(host) = saved.attention_output.host {
            self.wait(&format!("layers.{layer}.attn.offload.wait"), saved.attention, host);
        }
        (Stream { residual: saved.norm2.sum, delta: Some(delta) }, saved)
    }

    /// Some rows of a buffer; the buffer itself where that is all.
    fn part(&mut self, buffer: BufferId, first: usize, rows: usize) -> BufferId {
        if rows == self.rows(buffer) { buffer } else { self.builder.rows_of(buffer, first, rows) }
    }

    /// Gate and up of the MLP for some tokens.
    fn gate_up(&mut self, layer: usize, input: BufferId, first: usize, tokens: usize, training: bool) -> LinearGroup {
        let input = self.part(input, first, tokens);
        let modules = LayerModules::new(self.config, layer);
        self.linear(&format!("layers.{layer}.mlp.gate_up"), input, modules.gate_up, training)
    }

    /// The layer up to the MLP's norm. `attended`: what attention gave the first time, where that was kept.
    fn attention_block(
        &mut self,
        layer: usize,
        stream: Stream,
        keys: Keys,
        pass: Pass,
        attended: Option<Attended>,
    ) -> Saved {
        let training = pass != Pass::Inference;
        let recompute = if let Pass::Training(recompute) = pass { recompute } else { Recompute::None };
        let name = format!("layers.{layer}");
        let modules = LayerModules::new(self.config, layer);
        let norm1 = self.norm(&format!("{name}.norm1"), &names::input_norm(layer), stream);
        // On its way to the host while attention runs, through which the input lives anyway.
        let host = recompute.offloads().then(|| self.offload(layer, "input", norm1.sum));
        let input = Offloaded { host, returning: None };
        let qkv = self.linear(&format!("{name}.attn.qkv"), norm1.output, modules.qkv, training);
        self.rope(&format!("{name}.attn.rope"), qkv.output, keys.positions(), Direction::Forward);
        let (attention, log_sum_exp) = match attended {
            Some(Attended { output, log_sum_exp, host }) => {
                if let Some(host) = host {
                    self.wait(&format!("{name}.attn.bring_back.wait"), output, host);
                }
                (output, log_sum_exp)
            }
            None => self.attention(layer, qkv.output, keys),
        };
        // On its way to the host while the MLP runs.
        let away = recompute.offloads() && recompute.keeps_attention();
        let host = away.then(|| self.offload(layer, "attn", attention));
        let attention_output = Offloaded { host, returning: None };
        let output = self.linear(&format!("{name}.attn.out"), attention, modules.output, training);
        let middle = Stream { residual: norm1.sum, delta: Some(output.output) };
        let norm2 = self.norm(&format!("{name}.norm2"), &names::post_attention_norm(layer), middle);
        if let Some(host) = input.host {
            self.wait(&format!("{name}.offload.wait"), norm1.sum, host);
        }
        let mlp = Vec::new();
        Saved { norm1, qkv, attention, log_sum_exp, output, norm2, mlp, recompute, input, attention_output }
    }

    /// Attention over the projected queries, keys and values: output and logarithms of the sums.
    fn attention(&mut self, layer: usize, qkv: BufferId, keys: Keys) -> (BufferId, BufferId) {
        let name = format!("layers.{layer}");
        let shape = self.attention_shape(layer);
        let tokens = self.rows(qkv);
        let output = self.activation(&format!("{name}.attn"), tokens, shape.query_columns());
        let log_sum_exp =
            self.builder.activation(&format!("{name}.attn.log_sum_exp"), &[tokens, shape.heads], DType::F32);
        let op = match keys {
            Keys::Documents(inputs) => Op::Attention {
                qkv,
                document_start: inputs.document_start,
                document_end: inputs.document_end,
                output,
                log_sum_exp,
                shape,
            },
            Keys::Cache { start, capacity, .. } => {
                let mut cache = |part: &str| {
                    let size = [capacity, shape.kv_columns()];
                    self.builder.persistent(&format!("{name}.cache.{part}"), &size, self.compute, Kind::Cache)
                };
                let (cache_key, cache_value) = (cache("key"), cache("value"));
                Op::CachedAttention { qkv, cache_key, cache_value, start, output, shape }
            }
        };
        self.builder.push(&format!("{name}.attn"), op);
        (output, log_sum_exp)
    }

    /// Starts sending a tensor of a layer to the host's memory.
    fn offload(&mut self, layer: usize, part: &str, tensor: BufferId) -> BufferId {
        let (tokens, columns) = (self.rows(tensor), self.builder.buffer(tensor).columns());
        let name = format!("micro.{tokens}:layers.{layer}.{part}");
        let host = self.builder.persistent(&name, &[tokens, columns], self.compute, Kind::Offload);
        self.builder.push(&format!("layers.{layer}.{part}.offload"), Op::Cast { pairs: vec![(tensor, host)] });
        host
    }

    fn wait(&mut self, name: &str, device: BufferId, host: BufferId) {
        self.builder.push(name, Op::Wait { buffers: vec![device, host] });
    }

    /// Where a tensor that was kept lies on the device, and in the host's memory if it is on its way from there: it starts
    /// now if it has not before.
    fn arriving(
        &mut self,
        layer: usize,
        part: &str,
        offloaded: Offloaded,
        kept: BufferId,
    ) -> (BufferId, Option<BufferId>) {
        match (offloaded.host, offloaded.returning) {
            (None, _) => (kept, None),
            (Some(host), Some(returning)) => (returning, Some(host)),
            (Some(host), None) => (self.bring_back(layer, part, host), Some(host)),
        }
    }

    /// Starts bringing a tensor of a layer back.
    fn bring_back(&mut self, layer: usize, part: &str, host: BufferId) -> BufferId {
        let (tokens, columns) = (self.rows(host), self.builder.buffer(host).columns());
        let tensor = self.activation(&format!("layers.{layer}.{part}.again"), tokens, columns);
        self.builder.push(&format!("layers.{layer}.{part}.bring_back"), Op::Cast { pairs: vec![(host, tensor)] });
        tensor
    }

    fn glu(&mut self, name: &str, gate_up: BufferId) -> BufferId {
        let tokens = self.rows(gate_up);
        let output = self.activation(name, tokens, self.config.intermediate_size);
        self.builder.push(name, Op::Glu { gate_up, output, activation: self.config.activation });
        output
    }

    /// The layer's backward pass: from the gradient of its stream (the same for residual and delta) to that of the
    /// stream it was given, or none when `need_input` is false. `before`: the layer before, of which what waits on the host
    /// starts on its way back.
    pub fn layer_backward(
        &mut self,
        layer: usize,
        mut saved: Saved,
        gradient: BufferId,
        inputs: Inputs,
        before: Option<&mut Saved>,
        need_input: bool,
    ) -> Option<BufferId> {
        let name = format!("layers.{layer}");
        let (mut mlp, recompute) = (std::mem::take(&mut saved.mlp), saved.recompute);
        // Norms, and below the gated product, that are not kept: made where the engine turns out not to do without them.
        let [norm1_again, norm2_again] = match recompute {
            Recompute::None => {
                let [norm1, norm2] = self.drops.norms(self.rows(saved.norm1.output));
                [norm1 && need_input, norm2]
            }
            Recompute::Cheap => [true; 2],
            _ => [false; 2],
        };
        if norm2_again {
            let weight = names::post_attention_norm(layer);
            saved.norm2 = self.norm_again(&format!("{name}.norm2"), &weight, saved.norm2);
        }
        match recompute {
            Recompute::None => {}
            Recompute::Cheap => {
                for part in &mut mlp {
                    if self.trains(&part.down) {
                        part.glu = self.glu(&format!("{name}.mlp.glu.again"), part.gate_up.output);
                    }
                }
            }
            Recompute::All | Recompute::Offload | Recompute::AllButAttention | Recompute::OffloadWithAttention => {
                let (residual, host) = self.arriving(layer, "input", saved.input, saved.norm1.sum);
                let attended = recompute.keeps_attention().then(|| {
                    let (output, host) = self.arriving(layer, "attn", saved.attention_output, saved.attention);
                    Attended { output, log_sum_exp: saved.log_sum_exp, host }
                });
                if let Some(host) = host {
                    self.wait(&format!("{name}.input.bring_back.wait"), residual, host);
                }
                let stream = Stream { residual, delta: None };
                saved = self.attention_block(layer, stream, Keys::Documents(inputs), Pass::Again, attended);
            }
        }
        let shape = self.attention_shape(layer);
        let tokens = self.rows(saved.norm2.output);
        let grad_norm2 = self.activation(&format!("{name}.mlp.gate_up.grad_input"), tokens, self.config.hidden_size);
        for mut part in mlp {
            if recompute.runs_again() {
                part.gate_up = self.gate_up(layer, saved.norm2.output, part.first, part.tokens, true);
                if self.trains(&part.down) {
                    part.glu = self.glu(&format!("{name}.mlp.glu"), part.gate_up.output);
                }
            } else if recompute == Recompute::None && self.drops.gated {
                part.glu = self.glu(&format!("{name}.mlp.glu.again"), part.gate_up.output);
            }
            let grad_output = self.part(gradient, part.first, part.tokens);
            let grad_glu = self.linear_backward(&part.down, part.glu, grad_output, true).expect("asked for");
            let width = 2 * self.config.intermediate_size;
            let grad_gate_up = self.activation(&format!("{name}.mlp.grad_gate_up"), part.tokens, width);
            let op = Op::GluBackward {
                grad_output: grad_glu,
                gate_up: part.gate_up.output,
                grad_gate_up,
                activation: self.config.activation,
            };
            self.builder.push(&format!("{name}.mlp.glu.backward"), op);
            let input = self.part(saved.norm2.output, part.first, part.tokens);
            let grad_input = self.part(grad_norm2, part.first, part.tokens);
            self.linear_backward_to(Some(grad_input), &part.gate_up, input, grad_gate_up);
        }
        let weight = names::post_attention_norm(layer);
        let grad_x2 = self.norm_backward(&format!("{name}.norm2"), &weight, saved.norm2, grad_norm2, Some(gradient));
        // The wide buffers of the gated product are gone, attention takes a while.
        if let Some(before) = before {
            for (part, tensor) in [("input", &mut before.input), ("attn", &mut before.attention_output)] {
                tensor.returning = tensor.host.map(|host| self.bring_back(layer - 1, part, host));
            }
        }
        if norm1_again {
            saved.norm1 = self.norm_again(&format!("{name}.norm1"), &names::input_norm(layer), saved.norm1);
        }
        let grad_attention = self.linear_backward(&saved.output, saved.attention, grad_x2, true).expect("asked for");
        let grad_qkv = self.activation(&format!("{name}.attn.grad_qkv"), tokens, shape.columns());
        let delta = self.workspace(&format!("{name}.attn.delta"), &[tokens, shape.heads], DType::F32);
        let op = Op::AttentionBackward {
            grad_output: grad_attention,
            qkv: saved.qkv.output,
            output: saved.attention,
            log_sum_exp: saved.log_sum_exp,
            document_start: inputs.document_start,
            document_end: inputs.document_end,
            delta,
            grad_qkv,
            shape,
        };
        self.builder.push(&format!("{name}.attn.backward"), op);
        self.rope(&format!("{name}.attn.rope.backward"), grad_qkv, inputs.positions, Direction::Backward);
        let grad_norm1 = self.linear_backward(&saved.qkv, saved.norm1.output, grad_qkv, need_input)?;
        let weight = names::input_norm(layer);
        Some(self.norm_backward(&format!("{name}.norm1"), &weight, saved.norm1, grad_norm1, Some(grad_x2)))
    }
}
