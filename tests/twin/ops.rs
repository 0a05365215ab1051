//! Every operation in straight f64 loops, after its formula: slow, and independent of the engines.

use rayon::prelude::*;
use tune::program::{
    Activation, AttentionShape, BufferId, Columns, Direction, Dropout, Op, Projection, ProjectionBackward, Workload,
    random,
};

/// One value a buffer element, by buffer index.
pub struct Values<'w> {
    pub workload: &'w Workload,
    pub of: Vec<Vec<f64>>,
}

impl Values<'_> {
    fn get(&self, id: BufferId) -> &[f64] {
        &self.of[id.index()]
    }

    fn set(&mut self, id: BufferId, values: Vec<f64>) {
        assert_eq!(values.len(), self.of[id.index()].len(), "{}", self.workload.buffer(id).name);
        self.of[id.index()] = values;
    }

    fn rows(&self, id: BufferId) -> usize {
        self.workload.buffer(id).rows()
    }

    fn width(&self, id: BufferId) -> usize {
        self.workload.buffer(id).columns()
    }

    fn scalar(&self, id: BufferId) -> f64 {
        self.get(id)[0]
    }

    fn index(&self, id: BufferId, at: usize) -> usize {
        self.get(id)[at] as usize
    }

    fn columns(&self, columns: Columns) -> Vec<f64> {
        let width = self.width(columns.buffer);
        let rows = self.get(columns.buffer).chunks(width);
        rows.flat_map(|row| row[columns.start..columns.start + columns.width].to_vec()).collect()
    }

    fn set_columns(&mut self, columns: Columns, values: &[f64]) {
        let width = self.width(columns.buffer);
        let rows = self.of[columns.buffer.index()].chunks_mut(width);
        for (row, values) in rows.zip(values.chunks(columns.width)) {
            row[columns.start..columns.start + columns.width].copy_from_slice(values);
        }
    }

    fn add(&mut self, id: BufferId, values: &[f64]) {
        for (sum, value) in self.of[id.index()].iter_mut().zip(values) {
            *sum += value;
        }
    }

    /// Factor of dropout for element `(row, column)`: 0, or what keeps the mean.
    fn kept(&self, dropout: Option<Dropout>, row: usize, column: usize) -> f64 {
        let Some(dropout) = dropout else { return 1.0 };
        let key: Vec<u32> = self.get(dropout.key).iter().map(|&part| part as u32).collect();
        let key = [key[0], key[1], key[2], key[3]];
        let drawn = random::uniform(key, dropout.stream, row as u32, column as u32);
        if drawn < dropout.probability { 0.0 } else { 1.0 / (1.0 - f64::from(dropout.probability)) }
    }
}

/// `a · bᵀ` for `a` `[m, k]` and `b` `[n, k]`.
fn product(a: &[f64], b: &[f64], k: usize) -> Vec<f64> {
    let by_row = |row: &'_ [f64]| -> Vec<f64> {
        b.chunks(k).map(|column| row.iter().zip(column).map(|(x, y)| x * y).sum()).collect()
    };
    a.par_chunks(k).flat_map_iter(by_row).collect()
}

fn transposed(a: &[f64], columns: usize) -> Vec<f64> {
    (0..columns).flat_map(|column| a.iter().skip(column).step_by(columns).copied()).collect()
}

pub fn run(values: &mut Values, op: &Op) {
    match op {
        Op::Embedding { ids, weight, output, scale } => {
            let width = values.width(*weight);
            let mut out = Vec::new();
            for token in 0..values.rows(*ids) {
                let id = values.index(*ids, token);
                out.extend(values.get(*weight)[id * width..][..width].iter().map(|w| w * f64::from(*scale)));
            }
            values.set(*output, out);
        }
        Op::EmbeddingBackward { ids, grad_output, grad_weight, scale } => {
            let width = values.width(*grad_weight);
            for token in 0..values.rows(*ids) {
                let id = values.index(*ids, token);
                for column in 0..width {
                    let grad = values.get(*grad_output)[token * width + column];
                    values.of[grad_weight.index()][id * width + column] += grad * f64::from(*scale);
                }
            }
        }
        Op::RmsNorm { input, residual, sum, weight, output, inverse_rms, epsilon, weight_offset } => {
            let mut x = values.get(*input).to_vec();
            if let Some(residual) = residual {
                x.iter_mut().zip(values.get(*residual)).for_each(|(x, r)| *x += r);
            }
            let weight = values.get(*weight);
            let width = weight.len();
            let inverse: Vec<f64> = x
                .chunks(width)
                .map(|row| {
                    let mean = row.iter().map(|x| x * x).sum::<f64>() / width as f64;
                    1.0 / (mean + f64::from(*epsilon)).sqrt()
                })
                .collect();
            let scaled =
                |(i, x): (usize, &f64)| x * inverse[i / width] * (f64::from(*weight_offset) + weight[i % width]);
            let out = x.iter().enumerate().map(scaled).collect();
            values.set(*output, out);
            values.set(*inverse_rms, inverse);
            if let Some(sum) = sum {
                values.set(*sum, x);
            }
        }
        Op::RmsNormBackward {
            grad_output,
            input,
            weight,
            inverse_rms,
            residual_grad,
            grad_input,
            grad_weight,
            weight_offset,
        } => {
            let (grad, x, inverse) = (values.get(*grad_output), values.get(*input), values.get(*inverse_rms));
            let weight = values.get(*weight);
            let width = weight.len();
            let mut out = vec![0.0; x.len()];
            let mut weight_sums = vec![0.0; width];
            for row in 0..inverse.len() {
                let n = |i: usize| x[row * width + i] * inverse[row];
                let d = |i: usize| grad[row * width + i] * (f64::from(*weight_offset) + weight[i]);
                let mean = (0..width).map(|i| d(i) * n(i)).sum::<f64>() / width as f64;
                for i in 0..width {
                    let past = residual_grad.map_or(0.0, |id| values.get(id)[row * width + i]);
                    out[row * width + i] = past + inverse[row] * (d(i) - n(i) * mean);
                    weight_sums[i] += grad[row * width + i] * n(i);
                }
            }
            values.set(*grad_input, out);
            if let Some(grad_weight) = grad_weight {
                values.add(*grad_weight, &weight_sums);
            }
        }
        Op::Linear { input, projections } => {
            for projection in projections {
                linear(values, *input, projection);
            }
        }
        Op::LinearBackward { input, grad_input, projections } => {
            if let Some(grad_input) = grad_input {
                values.of[grad_input.index()].fill(0.0);
            }
            for projection in projections {
                linear_backward(values, *input, *grad_input, projection);
            }
        }
        Op::Rope { tensor, positions, inverse_frequency, head_dim, rotary_dim, scale, direction } => {
            let mut x = values.columns(*tensor);
            let sign = if *direction == Direction::Forward { 1.0 } else { -1.0 };
            for (token, row) in x.chunks_mut(tensor.width).enumerate() {
                for head in row.chunks_mut(*head_dim) {
                    for i in 0..rotary_dim / 2 {
                        let angle = values.get(*positions)[token] * values.get(*inverse_frequency)[i];
                        let (cosine, sine) = (angle.cos() * f64::from(*scale), sign * angle.sin() * f64::from(*scale));
                        let (a, b) = (head[i], head[i + rotary_dim / 2]);
                        head[i] = a * cosine - b * sine;
                        head[i + rotary_dim / 2] = b * cosine + a * sine;
                    }
                }
            }
            values.set_columns(*tensor, &x);
        }
        Op::Attention { qkv, document_start, output, log_sum_exp, shape, .. } => {
            let (mut out, mut lse) = (Vec::new(), Vec::new());
            for (token, &start) in values.get(*document_start).iter().enumerate() {
                for head in 0..shape.heads {
                    let row = AttentionRow::new(values.get(*qkv), shape, token, head, start as usize);
                    let (p, sum) = row.probabilities(shape);
                    lse.push(sum);
                    for i in 0..shape.head_dim {
                        out.push(row.seen().zip(&p).map(|(s, p)| p * row.value(s, i)).sum());
                    }
                }
            }
            values.set(*output, out);
            values.set(*log_sum_exp, lse);
        }
        Op::AttentionBackward {
            grad_output, qkv, output, log_sum_exp, document_start, delta, grad_qkv, shape, ..
        } => {
            let (d, tokens) = (shape.head_dim, values.rows(*qkv));
            let mut grad = vec![0.0; tokens * shape.columns()];
            let mut deltas = Vec::new();
            for token in 0..tokens {
                for head in 0..shape.heads {
                    let start = values.index(*document_start, token);
                    let row = AttentionRow::new(values.get(*qkv), shape, token, head, start);
                    let at = token * shape.query_columns() + head * d;
                    let (dy, y) = (&values.get(*grad_output)[at..at + d], &values.get(*output)[at..at + d]);
                    let lse = values.get(*log_sum_exp)[token * shape.heads + head];
                    let mean: f64 = dy.iter().zip(y).map(|(a, b)| a * b).sum();
                    deltas.push(mean);
                    for s in row.seen() {
                        let (score, slope) = row.score(shape, s);
                        let p = (score - lse).exp();
                        let dp: f64 = (0..d).map(|i| dy[i] * row.value(s, i)).sum();
                        let ds = p * (dp - mean) * slope * f64::from(shape.scale);
                        for (i, &dy) in dy.iter().enumerate() {
                            grad[row.query_at + i] += ds * row.qkv[row.key_at(s) + i];
                            grad[row.key_at(s) + i] += ds * row.qkv[row.query_at + i];
                            grad[row.value_at(s) + i] += p * dy;
                        }
                    }
                }
            }
            values.set(*delta, deltas);
            values.set(*grad_qkv, grad);
        }
        Op::CachedAttention { qkv, cache_key, cache_value, start, output, shape } => {
            let (tokens, start) = (values.rows(*qkv), values.index(*start, 0));
            let (queries, kv, columns) = (shape.query_columns(), shape.kv_columns(), shape.columns());
            for token in 0..tokens {
                let row = values.get(*qkv)[token * columns..][..columns].to_vec();
                let at = (start + token) * kv;
                values.of[cache_key.index()][at..at + kv].copy_from_slice(&row[queries..queries + kv]);
                values.of[cache_value.index()][at..at + kv].copy_from_slice(&row[queries + kv..]);
            }
            // As attention over one document whose first queries are not asked for.
            let mut all = vec![0.0; (start + tokens) * columns];
            for position in 0..start + tokens {
                let row = &mut all[position * columns..][..columns];
                row[queries..queries + kv].copy_from_slice(&values.get(*cache_key)[position * kv..][..kv]);
                row[queries + kv..].copy_from_slice(&values.get(*cache_value)[position * kv..][..kv]);
                if position >= start {
                    row[..queries].copy_from_slice(&values.get(*qkv)[(position - start) * columns..][..queries]);
                }
            }
            let mut out = Vec::new();
            for position in start..start + tokens {
                for head in 0..shape.heads {
                    let row = AttentionRow::new(&all, shape, position, head, 0);
                    let (p, _) = row.probabilities(shape);
                    for i in 0..shape.head_dim {
                        out.push(row.seen().zip(&p).map(|(s, p)| p * row.value(s, i)).sum());
                    }
                }
            }
            values.set(*output, out);
        }
        Op::Glu { gate_up, output, activation } => {
            let width = values.width(*output);
            let rows = values.get(*gate_up).chunks(2 * width);
            let out = rows.flat_map(|row| (0..width).map(|i| activate(*activation, row[i]) * row[width + i])).collect();
            values.set(*output, out);
        }
        Op::GluBackward { grad_output, gate_up, grad_gate_up, activation } => {
            let width = values.width(*grad_output);
            let mut out = Vec::new();
            for (row, grad) in values.get(*gate_up).chunks(2 * width).zip(values.get(*grad_output).chunks(width)) {
                out.extend((0..width).map(|i| grad[i] * row[width + i] * slope(*activation, row[i])));
                out.extend((0..width).map(|i| grad[i] * activate(*activation, row[i])));
            }
            values.set(*grad_gate_up, out);
        }
        Op::GatherRows { input, rows, output } => {
            let width = values.width(*input);
            let mut out = Vec::new();
            for at in 0..values.rows(*rows) {
                out.extend_from_slice(&values.get(*input)[values.index(*rows, at) * width..][..width]);
            }
            values.set(*output, out);
        }
        Op::LinearCrossEntropy {
            input,
            weight,
            targets,
            token_weights,
            scale,
            losses,
            loss_sum,
            grad_input,
            grad_weight,
            softcap,
            ..
        } => {
            let (tokens, hidden, vocabulary) = (values.rows(*input), values.width(*input), values.rows(*weight));
            let (mut all_losses, mut total) = (vec![0.0; tokens], 0.0);
            let mut input_grad = vec![0.0; tokens * hidden];
            let mut weight_grad = vec![0.0; vocabulary * hidden];
            for token in 0..tokens {
                let target = values.get(*targets)[token];
                if target < 0.0 {
                    continue;
                }
                let x = &values.get(*input)[token * hidden..][..hidden];
                let raw = product(x, values.get(*weight), hidden);
                let cap = |z: f64| softcap.map_or(z, |cap| f64::from(cap) * (z / f64::from(cap)).tanh());
                let z: Vec<f64> = raw.iter().map(|&z| cap(z)).collect();
                let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let lse = most + z.iter().map(|z| (z - most).exp()).sum::<f64>().ln();
                all_losses[token] = lse - z[target as usize];
                let factor = values.scalar(*scale) * values.get(*token_weights)[token];
                total += factor * all_losses[token];
                for v in 0..vocabulary {
                    let onehot = if v == target as usize { 1.0 } else { 0.0 };
                    let slope = softcap.map_or(1.0, |cap| 1.0 - (z[v] / f64::from(cap)).powi(2));
                    let dz = factor * ((z[v] - lse).exp() - onehot) * slope;
                    for i in 0..hidden {
                        input_grad[token * hidden + i] += dz * values.get(*weight)[v * hidden + i];
                        weight_grad[v * hidden + i] += dz * x[i];
                    }
                }
            }
            values.set(*losses, all_losses);
            values.add(*loss_sum, &[total]);
            if let Some(grad_input) = grad_input {
                values.set(*grad_input, input_grad);
            }
            if let Some(grad_weight) = grad_weight {
                values.add(*grad_weight, &weight_grad);
            }
        }
        Op::Cast { pairs } => {
            for (from, to) in pairs {
                values.set(*to, values.get(*from).to_vec());
            }
        }
        Op::Wait { .. } => {}
        Op::Zero { buffers } => {
            for id in buffers {
                values.of[id.index()].fill(0.0);
            }
        }
        Op::GradientNorm { gradients, norm } => {
            let total: f64 = gradients.iter().flat_map(|id| values.get(*id)).map(|g| g * g).sum();
            values.set(*norm, vec![total.sqrt()]);
        }
        Op::AdamW { parts, norm, hyper, betas, epsilon, weight_decay, max_grad_norm, .. } => {
            let norm = values.scalar(*norm);
            if !norm.is_finite() {
                return;
            }
            let limit = f64::from(*max_grad_norm);
            let clip = if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) } else { 1.0 };
            let [rate, correction1, root2] = [0, 1, 2].map(|i| values.get(*hyper)[i]);
            let betas = betas.map(f64::from);
            for part in parts {
                for i in 0..values.get(part.parameter).len() {
                    let g = values.get(part.gradient)[i] * clip;
                    let m = betas[0] * values.get(part.first_moment)[i] + (1.0 - betas[0]) * g;
                    let v = betas[1] * values.get(part.second_moment)[i] + (1.0 - betas[1]) * g * g;
                    let mut p = values.get(part.parameter)[i];
                    p -= rate * f64::from(*weight_decay) * p;
                    p -= rate / correction1 * m / (v.sqrt() / root2 + f64::from(*epsilon));
                    values.of[part.parameter.index()][i] = p;
                    values.of[part.first_moment.index()][i] = m;
                    values.of[part.second_moment.index()][i] = v;
                }
            }
        }
    }
}

fn dropped(values: &Values, input: BufferId, dropout: Option<Dropout>) -> Vec<f64> {
    let width = values.width(input);
    let x = values.get(input).iter().enumerate();
    x.map(|(i, x)| x * values.kept(dropout, i / width, i % width)).collect()
}

fn linear(values: &mut Values, input: BufferId, projection: &Projection) {
    let (k, n) = (values.width(input), projection.output.width);
    let mut out = product(values.get(input), values.get(projection.weight), k);
    if let Some(bias) = projection.bias {
        out.iter_mut().enumerate().for_each(|(i, out)| *out += values.get(bias)[i % n]);
    }
    if let Some(lora) = &projection.lora {
        let middle = product(&dropped(values, input, lora.dropout), values.get(lora.a), k);
        values.set_columns(lora.middle, &middle);
        let branch = product(&middle, values.get(lora.b), lora.middle.width);
        let scale = values.scalar(lora.scale);
        out.iter_mut().zip(branch).for_each(|(out, branch)| *out += scale * branch);
    }
    values.set_columns(projection.output, &out);
}

fn linear_backward(values: &mut Values, input: BufferId, grad_input: Option<BufferId>, p: &ProjectionBackward) {
    let (k, n, tokens) = (values.width(input), p.grad_output.width, values.rows(input));
    let dy = values.columns(p.grad_output);
    let dy_t = transposed(&dy, n);
    let x_t = transposed(values.get(input), k);
    let mut dx = product(&dy, &transposed(values.get(p.weight), k), n);
    if let Some(grad_weight) = p.grad_weight {
        values.add(grad_weight, &product(&dy_t, &x_t, tokens));
    }
    if let Some(grad_bias) = p.grad_bias {
        let sums: Vec<f64> = dy_t.chunks(tokens).map(|column| column.iter().sum()).collect();
        values.add(grad_bias, &sums);
    }
    if let Some(lora) = &p.lora {
        let rank = lora.middle.width;
        let scale = values.scalar(lora.scale);
        let g: Vec<f64> = product(&dy, &transposed(values.get(lora.b), rank), n).iter().map(|g| g * scale).collect();
        values.set_columns(lora.grad_middle, &g);
        let x = dropped(values, input, lora.dropout);
        values.add(lora.grad_a, &product(&transposed(&g, rank), &transposed(&x, k), tokens));
        let middle_t = transposed(&values.columns(lora.middle), rank);
        let grad_b: Vec<f64> = product(&dy_t, &middle_t, tokens).iter().map(|g| g * scale).collect();
        values.add(lora.grad_b, &grad_b);
        let branch = product(&g, &transposed(values.get(lora.a), k), rank);
        for (i, (dx, branch)) in dx.iter_mut().zip(branch).enumerate() {
            *dx += branch * values.kept(lora.dropout, i / k, i % k);
        }
    }
    if let Some(grad_input) = grad_input {
        values.add(grad_input, &dx);
    }
}

fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
    }
}

/// By central difference: no second formula to get wrong.
fn slope(activation: Activation, x: f64) -> f64 {
    const STEP: f64 = 1e-5;
    (activate(activation, x + STEP) - activate(activation, x - STEP)) / (2.0 * STEP)
}

/// One query of one head.
struct AttentionRow<'a> {
    qkv: &'a [f64],
    columns: usize,
    first: usize,
    token: usize,
    query_at: usize,
    key_column: usize,
    value_column: usize,
    head_dim: usize,
}

impl<'a> AttentionRow<'a> {
    fn new(qkv: &'a [f64], shape: &AttentionShape, token: usize, head: usize, document: usize) -> Self {
        let first = shape.window.map_or(document, |window| document.max((token + 1).saturating_sub(window)));
        let kv_head = head / (shape.heads / shape.kv_heads);
        let key_column = shape.heads * shape.head_dim + kv_head * shape.head_dim;
        Self {
            qkv,
            columns: shape.columns(),
            first,
            token,
            query_at: token * shape.columns() + head * shape.head_dim,
            key_column,
            value_column: key_column + shape.kv_heads * shape.head_dim,
            head_dim: shape.head_dim,
        }
    }

    fn seen(&self) -> std::ops::RangeInclusive<usize> {
        self.first..=self.token
    }

    fn key_at(&self, s: usize) -> usize {
        s * self.columns + self.key_column
    }

    fn value_at(&self, s: usize) -> usize {
        s * self.columns + self.value_column
    }

    fn value(&self, s: usize, i: usize) -> f64 {
        self.qkv[self.value_at(s) + i]
    }

    /// Score and slope of the cap.
    fn score(&self, shape: &AttentionShape, s: usize) -> (f64, f64) {
        let dot: f64 = (0..self.head_dim).map(|i| self.qkv[self.query_at + i] * self.qkv[self.key_at(s) + i]).sum();
        let scaled = dot * f64::from(shape.scale);
        match shape.softcap.map(f64::from) {
            None => (scaled, 1.0),
            Some(cap) => {
                let t = (scaled / cap).tanh();
                (cap * t, 1.0 - t * t)
            }
        }
    }

    fn probabilities(&self, shape: &AttentionShape) -> (Vec<f64>, f64) {
        let scores: Vec<f64> = self.seen().map(|s| self.score(shape, s).0).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = most + scores.iter().map(|s| (s - most).exp()).sum::<f64>().ln();
        (scores.iter().map(|s| (s - lse).exp()).collect(), lse)
    }
}
