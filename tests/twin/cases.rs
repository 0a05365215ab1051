//! The table of cases: awkward sizes of every operation.

use tune::program::{
    Activation, AdamWPart, AttentionShape, BufferId, Columns, DType, Direction, Dropout, Kind, Lora, LoraBackward, Op,
    Projection, ProjectionBackward, Target, random,
};

use super::writer::Writer;
use super::{Case, branches, from_bytes, ops, to_bytes};

/// All cases, with activations in the target's compute type.
pub fn all(target: &Target) -> Vec<Case> {
    let mut cases = Vec::new();
    embedding(target, &mut cases);
    norm(target, &mut cases);
    linear(target, &mut cases);
    rope(target, &mut cases);
    attention(target, &mut cases);
    branches::attention_branches(target, &mut cases);
    cached_attention(target, &mut cases);
    glu(target, &mut cases);
    branches::gated_branches(target, &mut cases);
    branches::attention_backward_branches(target, &mut cases);
    branches::norm_branches(target, &mut cases);
    gather(target, &mut cases);
    cross_entropy(target, &mut cases);
    optimizer(target, &mut cases);
    cases
}

/// The cases with gradients of matrices, which are held in bf16.
pub fn half_gradients(target: &Target) -> Vec<Case> {
    let target = Target { gradients: DType::BF16, ..target.clone() };
    let half = |case: &Case| case.workload.of_kind(Kind::Gradient).any(|(_, buffer)| buffer.dtype == DType::BF16);
    all(&target).into_iter().filter(half).collect()
}

const STORED: [DType; 2] = [DType::F32, DType::BF16];

fn embedding(target: &Target, cases: &mut Vec<Case>) {
    for (tokens, width, vocabulary, dtype) in
        [(1, 64, 7, DType::F32), (37, 96, 103, DType::BF16), (130, 576, 1003, DType::BF16), (33, 64, 50, DType::F16)]
    {
        let mut case = Writer::new(target, format!("embedding {tokens}x{width} {}", dtype.name()));
        let ids = case.random_integers("ids", tokens, vocabulary);
        let weight = case.weight("embedding.weight", &[vocabulary, width], dtype);
        let output = case.output("output", &[tokens, width], case.compute);
        cases.push(case.finish(Op::Embedding { ids, weight, output, scale: 1.5 }));

        let mut case = Writer::new(target, format!("embedding_backward {tokens}x{width} {}", dtype.name()));
        // Few different ids, so that rows meet.
        let ids = case.random_integers("ids", tokens, vocabulary.min(11));
        let grad_output = case.activation("grad_output", &[tokens, width]);
        let grad_weight = case.matrix_gradient("embedding.weight.grad", &[vocabulary, width]);
        cases.push(case.finish(Op::EmbeddingBackward { ids, grad_output, grad_weight, scale: 1.5 }));
    }
}

fn norm(target: &Target, cases: &mut Vec<Case>) {
    for (tokens, width, residual, offset, trained, dtype) in [
        (1, 64, false, 0.0, false, DType::F32),
        (37, 96, true, 0.0, true, DType::F32),
        (37, 576, true, 0.0, false, DType::BF16),
        (131, 2304, false, 1.0, true, DType::F32),
        (5, 4096, true, 0.0, false, DType::BF16),
    ] {
        let label = format!("{tokens}x{width} residual {residual} offset {offset} {}", dtype.name());
        let mut case = Writer::new(target, format!("rms_norm {label}"));
        let shape = [tokens, width];
        let input = case.activation("input", &shape);
        let added = residual.then(|| case.activation("residual", &shape));
        let sum = residual.then(|| case.output("sum", &shape, case.compute));
        let weight = case.weight("norm.weight", &[width], dtype);
        let output = case.output("output", &shape, case.compute);
        let inverse_rms = case.output("inverse_rms", &[tokens], DType::F32);
        let (epsilon, weight_offset) = (1e-5, offset);
        let residual_input = added;
        let op =
            Op::RmsNorm { input, residual: residual_input, sum, weight, output, inverse_rms, epsilon, weight_offset };
        cases.push(case.finish(op));

        let mut case = Writer::new(target, format!("rms_norm_backward {label} trained {trained}"));
        let grad_output = case.activation("grad_output", &shape);
        let input = case.activation("input", &shape);
        let stored = if trained { case.trainable } else { dtype };
        let weight = case.weight("norm.weight", &[width], stored);
        let x = case.inputs[input.index()].clone();
        let inverse: Vec<f64> =
            x.chunks(width).map(|row| (row.iter().map(|x| x * x).sum::<f64>() / width as f64).sqrt().recip()).collect();
        let inverse_rms = case.put("inverse_rms", &[tokens], DType::F32, Kind::Activation, &inverse);
        let residual_grad = residual.then(|| case.activation("residual_grad", &shape));
        let grad_input = case.output("grad_input", &shape, case.compute);
        let grad_weight = trained.then(|| case.gradient("norm.weight.grad", &[width]));
        cases.push(case.finish(Op::RmsNormBackward {
            grad_output,
            input,
            weight,
            inverse_rms,
            residual_grad,
            grad_input,
            grad_weight,
            weight_offset: offset,
        }));
    }
}

/// What a linear case has beside its weights.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Parts {
    pub bias: bool,
    pub rank: Option<usize>,
    pub dropout: f32,
    pub trained: bool,
    pub needs_input_gradient: bool,
}

pub(super) const PLAIN: Parts =
    Parts { bias: false, rank: None, dropout: 0.0, trained: false, needs_input_gradient: true };

fn linear(target: &Target, cases: &mut Vec<Case>) {
    let plain = PLAIN;
    let lora = Parts { rank: Some(8), ..plain };
    let table: &[(usize, usize, &[usize], DType, Parts)] = &[
        (1, 64, &[64], DType::F32, plain),
        (1, 576, &[1536, 1536], DType::BF16, lora),
        (3, 576, &[576, 192, 192], DType::BF16, lora),
        (4, 96, &[96], DType::F16, plain),
        (37, 96, &[80], DType::F16, plain),
        (65, 700, &[300], DType::BF16, lora),
        (37, 576, &[576, 192, 192], DType::BF16, plain),
        (37, 576, &[576, 192, 192], DType::BF16, Parts { bias: true, ..lora }),
        (130, 96, &[160, 160], DType::F32, Parts { dropout: 0.3, ..lora }),
        (257, 64, &[96, 32, 32], DType::BF16, Parts { dropout: 0.1, rank: Some(16), ..plain }),
        (33, 1536, &[576], DType::BF16, Parts { rank: Some(64), ..plain }),
        // Ranks that kernels may not take, and tokens and columns of more than one tile of theirs.
        (33, 96, &[160, 32], DType::F32, Parts { rank: Some(4), ..plain }),
        (70, 64, &[136], DType::BF16, Parts { rank: Some(128), ..plain }),
        (530, 64, &[264, 200, 48], DType::BF16, Parts { rank: Some(32), ..plain }),
        (1100, 32, &[640, 640], DType::F32, Parts { rank: Some(16), ..plain }),
        (1100, 32, &[4096], DType::BF16, Parts { rank: Some(32), ..plain }),
        (64, 128, &[256], DType::F32, Parts { needs_input_gradient: false, ..lora }),
        (37, 96, &[96, 48, 48], DType::F32, Parts { bias: true, trained: true, ..plain }),
        (130, 160, &[320, 320], DType::F32, Parts { trained: true, ..plain }),
    ];
    linear_table(target, table, cases);
}

/// Tokens, inputs, outputs, and how weights are stored.
type LinearRow<'a> = (usize, usize, &'a [usize], DType, Parts);

fn linear_table(target: &Target, table: &[LinearRow], cases: &mut Vec<Case>) {
    for &(tokens, inputs, outputs, dtype, parts) in table {
        let label = format!("{tokens}x{inputs} to {outputs:?} {} {}", dtype.name(), describe(parts));
        let mut case = Writer::new(target, format!("linear {label}"));
        let input = case.activation("input", &[tokens, inputs]);
        let op = linear_op(&mut case, input, (tokens, inputs), outputs, dtype, parts);
        cases.push(case.finish(op));

        let mut case = Writer::new(target, format!("linear_backward {label}"));
        let grad_output = case.activation("grad_output", &[tokens, outputs.iter().sum()]);
        let op = linear_backward_op(&mut case, "", grad_output, (tokens, inputs), outputs, dtype, parts);
        cases.push(case.finish(op));
    }
}

/// Linear operations on frozen weights that an engine quantizes on loading.
pub fn quantized(target: &Target) -> Vec<Case> {
    let plain = PLAIN;
    let lora = Parts { rank: Some(8), ..plain };
    let mut cases = Vec::new();
    for dtype in [DType::Nf4, DType::Int8] {
        let table: &[LinearRow] = &[
            (1, 64, &[64], dtype, plain),
            (1, 576, &[1536, 1536], dtype, lora),
            (3, 576, &[576, 192, 192], dtype, lora),
            (37, 576, &[576, 192, 192], dtype, Parts { bias: true, ..lora }),
            (130, 1536, &[576], dtype, Parts { dropout: 0.1, rank: Some(16), ..plain }),
            // More scales than one group of them has, in rows of more than one depth of packing.
            (33, 2048, &[600], dtype, lora),
            // Blocks of 64 go on from row to row.
            (5, 100, &[72], dtype, lora),
            (65, 700, &[300], dtype, lora),
            (33, 36, &[24, 8], dtype, Parts { needs_input_gradient: false, ..lora }),
        ];
        linear_table(target, table, &mut cases);
    }
    cases
}

/// The same in rows of an odd number of columns, which start in the middle of a byte of two codes.
pub fn odd_rows(target: &Target) -> Vec<Case> {
    let lora = Parts { bias: false, rank: Some(8), dropout: 0.0, trained: false, needs_input_gradient: true };
    let mut cases = Vec::new();
    for dtype in [DType::Nf4, DType::Int8] {
        linear_table(target, &[(2, 77, &[33], dtype, lora), (37, 641, &[95], dtype, lora)], &mut cases);
    }
    cases
}

pub(super) fn describe(parts: Parts) -> String {
    let mut words = Vec::new();
    if parts.bias {
        words.push("bias".to_string());
    }
    if let Some(rank) = parts.rank {
        words.push(format!("rank {rank}"));
    }
    if parts.dropout > 0.0 {
        words.push(format!("dropout {}", parts.dropout));
    }
    if parts.trained {
        words.push("trained".to_string());
    }
    if !parts.needs_input_gradient {
        words.push("first".to_string());
    }
    words.join(" ")
}

fn dropout(case: &mut Writer, parts: Parts, index: usize) -> Option<Dropout> {
    let key = case.key();
    let stream = random::stream(&format!("projection {index}"));
    (parts.dropout > 0.0).then_some(Dropout { probability: parts.dropout, key, stream })
}

pub(super) fn linear_op(
    case: &mut Writer,
    input: BufferId,
    (tokens, inputs): (usize, usize),
    outputs: &[usize],
    dtype: DType,
    parts: Parts,
) -> Op {
    let stored = if parts.trained { case.trainable } else { dtype };
    let output = case.output("output", &[tokens, outputs.iter().sum()], case.compute);
    let middle = parts.rank.map(|rank| case.output("middle", &[tokens, rank * outputs.len()], case.compute));
    let scale = case.scalar("lora_scale", 0.75);
    let mut projections = Vec::new();
    let mut column = 0;
    for (index, &width) in outputs.iter().enumerate() {
        let weight = case.weight(&format!("{index}.weight"), &[width, inputs], stored);
        let bias = parts.bias.then(|| case.weight(&format!("{index}.bias"), &[width], stored));
        let lora = parts.rank.zip(middle).map(|(rank, buffer)| Lora {
            a: case.adapter(&format!("{index}.lora_A.weight"), &[rank, inputs]),
            b: case.adapter(&format!("{index}.lora_B.weight"), &[width, rank]),
            middle: Columns { buffer, start: index * rank, width: rank },
            scale,
            dropout: dropout(case, parts, index),
        });
        let output = Columns { buffer: output, start: column, width };
        projections.push(Projection { weight, bias, output, lora });
        column += width;
    }
    Op::Linear { input, projections }
}

pub(super) fn linear_backward_op(
    case: &mut Writer,
    prefix: &str,
    grad_output: BufferId,
    (tokens, inputs): (usize, usize),
    outputs: &[usize],
    dtype: DType,
    parts: Parts,
) -> Op {
    let stored = if parts.trained { case.trainable } else { dtype };
    let called = |name: &str| format!("{prefix}{name}");
    let input = case.activation(&called("input"), &[tokens, inputs]);
    let grad_input =
        parts.needs_input_gradient.then(|| case.output(&called("grad_input"), &[tokens, inputs], case.compute));
    let ranks = parts.rank.unwrap_or(0) * outputs.len();
    let buffers = (ranks > 0).then(|| {
        let middle = case.activation(&called("middle"), &[tokens, ranks]);
        (middle, case.workspace(&called("grad_middle"), &[tokens, ranks], case.compute))
    });
    let scale = case.scalar("lora_scale", 0.75);
    let mut projections = Vec::new();
    let mut column = 0;
    for (index, &width) in outputs.iter().enumerate() {
        let shape = [width, inputs];
        let weight = case.weight(&format!("{prefix}{index}.weight"), &shape, stored);
        let grad_weight = parts.trained.then(|| case.matrix_gradient(&format!("{prefix}{index}.weight.grad"), &shape));
        let with_bias = parts.trained && parts.bias;
        let grad_bias = with_bias.then(|| case.gradient(&format!("{prefix}{index}.bias.grad"), &[width]));
        let lora = parts.rank.zip(buffers).map(|(rank, (middle, grad_middle))| LoraBackward {
            a: case.adapter(&format!("{prefix}{index}.lora_A.weight"), &[rank, inputs]),
            b: case.adapter(&format!("{prefix}{index}.lora_B.weight"), &[width, rank]),
            middle: Columns { buffer: middle, start: index * rank, width: rank },
            grad_middle: Columns { buffer: grad_middle, start: index * rank, width: rank },
            grad_a: case.gradient(&format!("{prefix}{index}.lora_A.weight.grad"), &[rank, inputs]),
            grad_b: case.gradient(&format!("{prefix}{index}.lora_B.weight.grad"), &[width, rank]),
            scale,
            dropout: dropout(case, parts, index),
        });
        let grad_output = Columns { buffer: grad_output, start: column, width };
        projections.push(ProjectionBackward { weight, grad_output, grad_weight, grad_bias, lora });
        column += width;
    }
    Op::LinearBackward { input, grad_input, projections }
}

/// Positions of tokens, and the constants of a rotation of so many dimensions.
pub(super) fn rotation(case: &mut Writer, tokens: usize, rotary_dim: usize) -> (BufferId, BufferId) {
    let positions: Vec<usize> = (0..tokens).map(|token| token * 61 % 1999).collect();
    let positions = case.integers("positions", &positions);
    let half = rotary_dim / 2;
    let frequencies: Vec<f32> = (0..half).map(|i| 1e4f32.powf(-(i as f32) / half as f32)).collect();
    let inverse_frequency = case.builder.constant("inverse_frequency", &frequencies);
    case.inputs.push(frequencies.iter().map(|&f| f64::from(f)).collect());
    (positions, inverse_frequency)
}

fn rope(target: &Target, cases: &mut Vec<Case>) {
    for (tokens, heads, other, head_dim, rotary_dim) in
        [(1, 2, 1, 64, 64), (37, 3, 2, 80, 80), (130, 4, 1, 128, 64), (33, 1, 2, 256, 256)]
    {
        for direction in [Direction::Forward, Direction::Backward] {
            let name = format!("rope {tokens}x{heads}x{head_dim} of which {rotary_dim} {direction:?}");
            let mut case = Writer::new(target, name);
            // The last heads of the buffer, which are values, are left alone.
            let buffer = case.activation("qkv", &[tokens, (heads + other) * head_dim]);
            let (positions, inverse_frequency) = rotation(&mut case, tokens, rotary_dim);
            let tensor = Columns { buffer, start: 0, width: heads * head_dim };
            let op = Op::Rope { tensor, positions, inverse_frequency, head_dim, rotary_dim, scale: 1.25, direction };
            cases.push(case.finish(op));
        }
    }
}

/// Start and end of every token's document, from the documents' lengths.
pub(super) fn documents(lengths: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let (mut starts, mut ends, mut at) = (Vec::new(), Vec::new(), 0);
    for &length in lengths {
        starts.extend(vec![at; length]);
        ends.extend(vec![at + length; length]);
        at += length;
    }
    (starts, ends)
}

/// What an operation of the forward pass leaves in these buffers, as the storage types hold it.
pub(super) fn leave(case: &mut Writer, forward: &Op, buffers: [BufferId; 2]) {
    let workload = case.builder.workload().clone();
    let mut twin = ops::Values { workload: &workload, of: case.inputs.clone() };
    ops::run(&mut twin, forward);
    for id in buffers {
        let (dtype, values) = (workload.buffer(id).dtype, &twin.of[id.index()]);
        case.inputs[id.index()] = from_bytes(dtype, "", &to_bytes(dtype, "", values), values.len());
    }
}

fn attention(target: &Target, cases: &mut Vec<Case>) {
    type Row<'a> = (&'a [usize], usize, usize, usize, Option<usize>, Option<f32>);
    let table: &[Row] = &[
        (&[1], 1, 1, 64, None, None),
        (&[37], 3, 1, 64, None, None),
        (&[1, 1, 30, 2, 65, 1], 4, 2, 64, None, None),
        (&[130], 2, 2, 80, None, None),
        (&[64, 64], 9, 3, 64, None, None),
        (&[200, 57], 2, 1, 128, None, None),
        (&[96], 2, 1, 256, None, None),
        (&[75, 60], 2, 1, 96, None, None),
        (&[50, 41], 2, 1, 192, None, None),
        (&[140, 9], 4, 2, 256, Some(50), Some(30.0)),
        (&[150, 20], 2, 2, 64, Some(17), None),
        (&[260], 2, 1, 128, Some(100), Some(20.0)),
        (&[70], 2, 2, 64, Some(1), None),
        (&[90, 45], 4, 1, 80, None, Some(5.0)),
        (&[33], 2, 2, 16, None, None),
    ];
    for &(lengths, heads, kv_heads, head_dim, window, softcap) in table {
        let tokens = lengths.iter().sum();
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { heads, kv_heads, head_dim, scale, window, softcap };
        let mut label = format!("{lengths:?} {heads}/{kv_heads}x{head_dim}");
        if let Some(window) = window {
            label += &format!(" window {window}");
        }
        if let Some(cap) = softcap {
            label += &format!(" softcap {cap}");
        }
        let (starts, ends) = documents(lengths);
        let open = |case: &mut Writer| {
            let size = 2.0;
            let qkv = case.random("qkv", &[tokens, shape.columns()], case.compute, Kind::Activation, size);
            (qkv, case.integers("document_start", &starts), case.integers("document_end", &ends))
        };
        let mut case = Writer::new(target, format!("attention {label}"));
        let (qkv, document_start, document_end) = open(&mut case);
        let output = case.output("output", &[tokens, shape.query_columns()], case.compute);
        let log_sum_exp = case.output("log_sum_exp", &[tokens, heads], DType::F32);
        let forward = Op::Attention { qkv, document_start, document_end, output, log_sum_exp, shape };
        cases.push(case.finish(forward.clone()));

        let mut case = Writer::new(target, format!("attention_backward {label}"));
        let (qkv, document_start, document_end) = open(&mut case);
        let output = case.output("output", &[tokens, shape.query_columns()], case.compute);
        let log_sum_exp = case.output("log_sum_exp", &[tokens, heads], DType::F32);
        leave(&mut case, &forward, [output, log_sum_exp]);
        let grad_output = case.activation("grad_output", &[tokens, shape.query_columns()]);
        let delta = case.workspace("delta", &[tokens, heads], DType::F32);
        let grad_qkv = case.output("grad_qkv", &[tokens, shape.columns()], case.compute);
        cases.push(case.finish(Op::AttentionBackward {
            grad_output,
            qkv,
            output,
            log_sum_exp,
            document_start,
            document_end,
            delta,
            grad_qkv,
            shape,
        }));
    }
}

fn cached_attention(target: &Target, cases: &mut Vec<Case>) {
    for (tokens, start, capacity, heads, kv_heads, head_dim, window, softcap) in [
        (1, 0, 64, 2, 1, 64, None, None),
        (1, 77, 128, 9, 3, 64, None, None),
        (37, 0, 64, 4, 2, 64, None, None),
        (70, 31, 128, 2, 2, 80, None, None),
        (1, 300, 512, 2, 1, 128, Some(50), None),
        (33, 64, 97, 2, 1, 256, None, Some(20.0)),
    ] {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { heads, kv_heads, head_dim, scale, window, softcap };
        let name = format!("cached_attention {tokens} from {start} of {capacity} {heads}/{kv_heads}x{head_dim}");
        let mut case = Writer::new(target, name);
        let qkv = case.activation("qkv", &[tokens, shape.columns()]);
        let cache = [capacity, shape.kv_columns()];
        let cache_key = case.random("cache.key", &cache, case.compute, Kind::Cache, 1.0);
        let cache_value = case.random("cache.value", &cache, case.compute, Kind::Cache, 1.0);
        let start = case.integers("start", &[start]);
        let output = case.output("output", &[tokens, shape.query_columns()], case.compute);
        cases.push(case.finish(Op::CachedAttention { qkv, cache_key, cache_value, start, output, shape }));
    }
}

fn glu(target: &Target, cases: &mut Vec<Case>) {
    for (tokens, width) in [(1, 64), (37, 96), (130, 1536)] {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let mut case = Writer::new(target, format!("glu {tokens}x{width} {activation:?}"));
            let gate_up = case.random("gate_up", &[tokens, 2 * width], case.compute, Kind::Activation, 6.0);
            let output = case.output("output", &[tokens, width], case.compute);
            cases.push(case.finish(Op::Glu { gate_up, output, activation }));

            let mut case = Writer::new(target, format!("glu_backward {tokens}x{width} {activation:?}"));
            let grad_output = case.activation("grad_output", &[tokens, width]);
            let gate_up = case.random("gate_up", &[tokens, 2 * width], case.compute, Kind::Activation, 6.0);
            let grad_gate_up = case.output("grad_gate_up", &[tokens, 2 * width], case.compute);
            cases.push(case.finish(Op::GluBackward { grad_output, gate_up, grad_gate_up, activation }));
        }
    }
}

fn gather(target: &Target, cases: &mut Vec<Case>) {
    for (tokens, rows, width) in [(1, 1, 64), (130, 7, 576)] {
        let mut case = Writer::new(target, format!("gather_rows {rows} of {tokens}x{width}"));
        let input = case.activation("input", &[tokens, width]);
        let rows_buffer = case.random_integers("rows", rows, tokens);
        let output = case.output("output", &[rows, width], case.compute);
        cases.push(case.finish(Op::GatherRows { input, rows: rows_buffer, output }));
    }
}

fn cross_entropy(target: &Target, cases: &mut Vec<Case>) {
    #[derive(Clone, Copy, PartialEq, Debug)]
    enum Pass {
        Evaluate,
        Frozen,
        Trained,
    }
    for (tokens, hidden, vocabulary, chunk, every, softcap, pass, dtype) in [
        (1, 64, 1003, 1, 1, None, Pass::Frozen, DType::F32),
        (37, 96, 1003, 16, 3, None, Pass::Frozen, DType::BF16),
        (130, 64, 1003, 37, 2, None, Pass::Trained, DType::F32),
        (64, 96, 512, 64, 1, Some(4.0), Pass::Trained, DType::F32),
        (70, 64, 1003, 32, 4, None, Pass::Evaluate, DType::BF16),
        // A vocabulary so long that its sum takes more rounds than a software adapter gives a shader's loops.
        (17, 193, 40_013, 17, 1, None, Pass::Frozen, DType::BF16),
        // No token has a target.
        (32, 64, 1003, 32, 1000, None, Pass::Frozen, DType::F32),
    ] {
        let name = format!(
            "linear_cross_entropy {tokens}x{hidden} to {vocabulary} chunk {chunk} every {every} {pass:?} {}",
            dtype.name()
        );
        let mut case = Writer::new(target, name);
        let input = case.random("input", &[tokens, hidden], case.compute, Kind::Activation, 3.0);
        let stored = if pass == Pass::Trained { case.trainable } else { dtype };
        let weight = case.weight("head.weight", &[vocabulary, hidden], stored);
        let drawn = case.draw(tokens);
        let targets: Vec<f64> = (0..tokens)
            .map(|token| {
                let target = ((drawn[token] + 1.0) / 2.0 * vocabulary as f64).floor();
                if (token + 1) % every == 0 { target } else { -100.0 }
            })
            .collect();
        let targets = case.put("targets", &[tokens], DType::I32, Kind::Input, &targets);
        let weights: Vec<f64> = case.draw(tokens).iter().map(|w| 1.0 + 0.5 * w).collect();
        let token_weights = case.put("token_weights", &[tokens], DType::F32, Kind::Input, &weights);
        let scale = case.scalar("loss_scale", 1.0 / 29.0);
        let loss_sum = case.scalar("loss_sum", 0.5);
        let losses = case.put("losses", &[tokens], DType::F32, Kind::Output, &vec![f64::NAN; tokens]);
        let backward = pass != Pass::Evaluate;
        let grad_input = backward.then(|| case.output("grad_input", &[tokens, hidden], case.compute));
        let grad_weight =
            (pass == Pass::Trained).then(|| case.matrix_gradient("head.weight.grad", &[vocabulary, hidden]));
        let logits = case.workspace("logits", &[chunk, vocabulary], case.compute);
        cases.push(case.finish(Op::LinearCrossEntropy {
            input,
            weight,
            targets,
            token_weights,
            scale,
            losses,
            loss_sum,
            grad_input,
            grad_weight,
            logits,
            softcap,
        }));
    }
}

fn optimizer(target: &Target, cases: &mut Vec<Case>) {
    let mut case = Writer::new(target, "zero".to_string());
    let buffers = vec![case.gradient("a.grad", &[37, 5]), case.scalar("loss_sum", 3.0)];
    cases.push(case.finish(Op::Zero { buffers }));

    let mut case = Writer::new(target, "gradient_norm".to_string());
    let gradients =
        vec![case.matrix_gradient("a.grad", &[37, 5]), case.gradient("b.grad", &[9001]), case.gradient("c.grad", &[1])];
    let norm = case.scalar("grad_norm", f64::NAN);
    cases.push(case.finish(Op::GradientNorm { gradients, norm }));

    for stored in STORED {
        if stored == DType::BF16 && target.compute == DType::F32 {
            continue;
        }
        let to = if stored == DType::BF16 { target.compute } else { DType::F32 };
        let mut case = Writer::new(target, format!("cast to {}", to.name()));
        let mut pairs = Vec::new();
        for (index, shape) in [[8usize, 576], [37, 3]].iter().enumerate() {
            let from = case.random(&format!("{index}.lora_A.weight"), shape, DType::F32, Kind::Adapter, 1.0);
            let nothing = vec![f64::NAN; shape.iter().product()];
            let to = case.put(&format!("{index}.lora_A.weight.compute"), shape, to, Kind::Adapter, &nothing);
            pairs.push((from, to));
        }
        cases.push(case.finish(Op::Cast { pairs }));
    }

    for (moment, max_grad_norm, norm) in [
        (DType::F32, 1.0, 2.5),
        (DType::F32, 0.0, 2.5),
        (DType::F32, 1.0, f64::INFINITY),
        (DType::Block8, 1.0, 2.5),
        (DType::Block8, 1.0, f64::NAN),
    ] {
        let name = format!("adamw {} clip {max_grad_norm} norm {norm}", moment.name());
        let mut case = Writer::new(target, name);
        let mut parts = Vec::new();
        for (index, shape) in [vec![8usize, 576], vec![37, 3], vec![1], vec![70_000]].iter().enumerate() {
            let name = format!("{index}.lora_A.weight");
            let parameter = case.random(&name, shape, DType::F32, Kind::Adapter, 1.0);
            let kind = if shape.len() > 1 { case.gradients } else { DType::F32 };
            let gradient = case.random(&format!("{name}.grad"), shape, kind, Kind::Gradient, 1.0);
            // The largest of each block is positive: such blocks are the same packed twice.
            let mut first: Vec<f64> = case.draw(shape.iter().product()).iter().map(|v| 0.3 * v).collect();
            first.iter_mut().step_by(256).for_each(|value| *value = 0.3);
            let first_moment = case.put(&format!("{name}.exp_avg"), shape, moment, Kind::Optimizer, &first);
            let second: Vec<f64> = case.draw(shape.iter().product()).iter().map(|v| 0.05 * v * v + 1e-4).collect();
            let second_moment = case.put(&format!("{name}.exp_avg_sq"), shape, moment, Kind::Optimizer, &second);
            parts.push(AdamWPart { parameter, gradient, first_moment, second_moment, stream: random::stream(&name) });
        }
        let norm = case.scalar("grad_norm", norm);
        let hyper = case.put("hyper", &[4], DType::F32, Kind::Scalar, &[1e-2, 0.271, 0.0547, 0.0]);
        let key = case.key();
        let betas = [0.9, 0.999];
        let (epsilon, weight_decay) = (1e-8, 0.1);
        cases.push(case.finish(Op::AdamW { parts, norm, hyper, key, betas, epsilon, weight_decay, max_grad_norm }));
    }
}
