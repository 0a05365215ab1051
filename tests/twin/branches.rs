//! Operations before and after linear ones with LoRA branches, as layers have them: an engine may sum for the branches while it
//! makes, or reads, what these multiply.

use tune::program::{Activation, AttentionShape, BufferId, Columns, DType, Direction, Kind, Op, Target};

use super::Case;
use super::writer::Writer;

use super::cases::{PLAIN, Parts, describe, documents, leave, linear_backward_op, linear_op, rotation};

/// Attention before a linear operation with a LoRA branch, as a layer has them: an engine may sum for the branch while it makes
/// what that reads.
pub fn attention_branches(target: &Target, cases: &mut Vec<Case>) {
    let rank = |rank| Parts { rank: Some(rank), ..PLAIN };
    type Row<'a> = (&'a [usize], usize, usize, usize, DType, Parts);
    let table: &[Row] = &[
        (&[130], 2, 1, 64, DType::BF16, rank(8)),
        (&[100, 157], 4, 2, 64, DType::BF16, rank(32)),
        (&[300, 1, 500, 299], 9, 3, 64, DType::BF16, rank(16)),
        (&[200, 57], 2, 1, 128, DType::F32, rank(24)),
        (&[500, 600], 4, 1, 128, DType::BF16, rank(16)),
        (&[257], 2, 2, 128, DType::Nf4, rank(32)),
        (&[75, 60], 2, 1, 96, DType::BF16, rank(24)),
        (&[90, 167], 4, 1, 80, DType::BF16, rank(32)),
        (&[1000, 100], 3, 3, 80, DType::BF16, rank(8)),
        (&[140, 9], 2, 1, 256, DType::BF16, rank(16)),
        // Few tokens, ranks too small and too large, and more partial sums than a pass over the output is.
        (&[70], 2, 1, 64, DType::BF16, rank(8)),
        (&[257], 2, 1, 64, DType::BF16, rank(4)),
        (&[130], 2, 1, 128, DType::BF16, rank(64)),
        (&[130], 4, 2, 16, DType::BF16, rank(16)),
        (&[130], 2, 1, 128, DType::BF16, Parts { dropout: 0.1, ..rank(16) }),
        (&[130], 2, 1, 64, DType::BF16, PLAIN),
    ];
    for &(lengths, heads, kv_heads, head_dim, dtype, parts) in table {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { heads, kv_heads, head_dim, scale, window: None, softcap: None };
        let (tokens, columns) = (lengths.iter().sum(), shape.query_columns());
        let label = format!("{lengths:?} {heads}/{kv_heads}x{head_dim} {} {}", dtype.name(), describe(parts));
        let mut case = Writer::new(target, format!("attention_branch {label}"));
        let (starts, ends) = documents(lengths);
        let qkv = case.random("qkv", &[tokens, shape.columns()], case.compute, Kind::Activation, 2.0);
        let (document_start, document_end) =
            (case.integers("document_start", &starts), case.integers("document_end", &ends));
        let output = case.output("attention", &[tokens, columns], case.compute);
        let nothing = vec![f64::NAN; tokens * heads];
        let log_sum_exp = case.put("log_sum_exp", &[tokens, heads], DType::F32, Kind::Output, &nothing);
        let linear = linear_op(&mut case, output, (tokens, columns), &[72], dtype, parts);
        let attention = Op::Attention { qkv, document_start, document_end, output, log_sum_exp, shape };
        cases.push(case.finish_all([attention, linear]));
    }
}

/// Tokens, columns of the gated product, those of what linear operations have beside it, and how weights are stored.
type GatedRow = (usize, usize, usize, DType, Activation, Parts);

/// Gated products before linear operations with LoRA branches, as an MLP has them: an engine may sum for the branches while
/// it makes what they read.
pub fn gated_branches(target: &Target, cases: &mut Vec<Case>) {
    let rank = |rank| Parts { rank: Some(rank), ..PLAIN };
    let table = [
        (1, 64, 32, DType::F32, Activation::Silu, rank(8)),
        (37, 96, 64, DType::BF16, Activation::GeluTanh, rank(8)),
        (257, 264, 96, DType::BF16, Activation::Silu, rank(16)),
        (530, 200, 64, DType::BF16, Activation::GeluTanh, rank(32)),
        (130, 1536, 192, DType::F32, Activation::Silu, rank(24)),
        (1100, 648, 64, DType::BF16, Activation::Silu, rank(16)),
        // A block of a large card works through more than one tile of these.
        (1100, 2056, 8, DType::BF16, Activation::Silu, rank(16)),
        (1100, 3464, 16, DType::BF16, Activation::GeluTanh, rank(32)),
        (130, 300, 64, DType::BF16, Activation::Silu, rank(4)),
        (257, 256, 64, DType::BF16, Activation::Silu, rank(64)),
        (130, 256, 64, DType::BF16, Activation::Silu, Parts { dropout: 0.1, ..rank(16) }),
        (130, 256, 64, DType::BF16, Activation::Silu, Parts { needs_input_gradient: false, ..rank(16) }),
        (257, 512, 128, DType::Nf4, Activation::Silu, rank(16)),
        (130, 256, 64, DType::BF16, Activation::Silu, PLAIN),
    ];
    table.into_iter().for_each(|row| gated_row(target, row, cases));
    for (row, kept) in [
        ((1, 64, 32, DType::F32, Activation::Silu, rank(8)), false),
        ((257, 264, 96, DType::BF16, Activation::Silu, rank(16)), false),
        ((300, 264, 96, DType::BF16, Activation::GeluTanh, rank(16)), true),
        ((530, 200, 64, DType::BF16, Activation::GeluTanh, rank(24)), false),
        ((1100, 2056, 64, DType::BF16, Activation::Silu, rank(16)), false),
        ((1100, 3464, 64, DType::BF16, Activation::Silu, rank(32)), true),
        ((257, 512, 128, DType::Nf4, Activation::Silu, rank(16)), false),
        ((130, 256, 64, DType::BF16, Activation::Silu, rank(64)), false),
        ((130, 256, 64, DType::BF16, Activation::Silu, Parts { dropout: 0.1, ..rank(16) }), false),
    ] {
        cases.push(mlp_backward(target, row, kept));
    }
}

/// The same with four tiles of tokens a block, and with more tokens than one launch has room for.
pub fn wide_gated_branches(target: &Target) -> Vec<Case> {
    let rank = |rank| Parts { rank: Some(rank), ..PLAIN };
    let mut cases = Vec::new();
    for row in [
        (1100, 5640, 8, DType::BF16, Activation::Silu, rank(16)),
        (1100, 28_680, 8, DType::BF16, Activation::Silu, rank(24)),
    ] {
        gated_row(target, row, &mut cases);
        cases.push(mlp_backward(target, row, false));
    }
    cases
}

/// The backward pass of a whole MLP, whose gated product is made again, or (`kept`) was kept, for the branch that read it.
fn mlp_backward(target: &Target, row: GatedRow, kept: bool) -> Case {
    let (tokens, width, hidden, dtype, activation, parts) = row;
    let label = format!("{tokens}x{width} {activation:?} and {hidden} {} {}", dtype.name(), describe(parts));
    let mut case = Writer::new(target, format!("mlp_backward {label} kept {kept}"));
    let gate_up = case.random("gate_up", &[tokens, 2 * width], case.compute, Kind::Activation, 3.0);
    // What is written lives to the end, where it is read.
    let lasting = |case: &mut Writer, name: &str, columns: usize| {
        let nothing = vec![f64::NAN; tokens * columns];
        case.put(name, &[tokens, columns], case.compute, Kind::Output, &nothing)
    };
    let glu = if kept { lasting(&mut case, "glu", width) } else { case.output("glu", &[tokens, width], case.compute) };
    let grad_glu = lasting(&mut case, "grad_glu", width);
    // The gradient of the stream, which the next norm reads too: it lives on.
    let gradient = case.activation("gradient", &[tokens, hidden]);
    let grad_gate_up = case.output("grad_gate_up", &[tokens, 2 * width], case.compute);
    case.given = Kind::Input;
    let frozen = Parts { needs_input_gradient: false, ..parts };
    let mut down = linear_backward_op(&mut case, "down.", gradient, (tokens, width), &[hidden], dtype, frozen);
    if let Op::LinearBackward { input, grad_input, .. } = &mut down {
        (*input, *grad_input) = (glu, Some(grad_glu));
    }
    let gate_and_up = linear_backward_op(&mut case, "", grad_gate_up, (tokens, hidden), &[width, width], dtype, parts);
    let Op::LinearBackward { grad_input: Some(grad_norm), .. } = gate_and_up else { unreachable!("asked for") };
    let norm = Op::RmsNormBackward {
        grad_output: grad_norm,
        input: case.activation("stream", &[tokens, hidden]),
        weight: case.weight("norm.weight", &[hidden], dtype),
        inverse_rms: case.random("inverse_rms", &[tokens], DType::F32, Kind::Input, 0.5),
        residual_grad: Some(gradient),
        grad_input: case.output("grad_stream", &[tokens, hidden], case.compute),
        grad_weight: None,
        weight_offset: 0.0,
    };
    case.finish_all([
        Op::Glu { gate_up, output: glu, activation },
        down,
        Op::GluBackward { grad_output: grad_glu, gate_up, grad_gate_up, activation },
        gate_and_up,
        norm,
    ])
}

fn gated_row(target: &Target, row: GatedRow, cases: &mut Vec<Case>) {
    let (tokens, width, hidden, dtype, activation, parts) = row;
    let label = format!("{tokens}x{width} {activation:?} and {hidden} {} {}", dtype.name(), describe(parts));
    let mut case = Writer::new(target, format!("gated {label}"));
    let gate_up = case.random("gate_up", &[tokens, 2 * width], case.compute, Kind::Activation, 3.0);
    let output = case.output("glu", &[tokens, width], case.compute);
    let linear = linear_op(&mut case, output, (tokens, width), &[hidden], dtype, parts);
    cases.push(case.finish_all([Op::Glu { gate_up, output, activation }, linear]));

    let mut case = Writer::new(target, format!("gated_backward {label}"));
    let grad_output = case.activation("grad_glu", &[tokens, width]);
    let gate_up = case.random("gate_up", &[tokens, 2 * width], case.compute, Kind::Activation, 3.0);
    let grad_gate_up = case.output("grad_gate_up", &[tokens, 2 * width], case.compute);
    case.given = Kind::Input;
    let linear = linear_backward_op(&mut case, "", grad_gate_up, (tokens, hidden), &[width, width], dtype, parts);
    cases.push(case.finish_all([Op::GluBackward { grad_output, gate_up, grad_gate_up, activation }, linear]));
}

/// Tokens, heads, key-value heads, dimensions of a head, columns of the stream, how weights are stored, and what linear
/// operations have beside them.
type AttentionRow = (usize, usize, usize, usize, usize, DType, Parts);

/// The backward pass around attention where linear operations have LoRA branches, as layers have it: an engine may sum for the
/// branches while it makes or reads what they multiply.
pub fn attention_backward_branches(target: &Target, cases: &mut Vec<Case>) {
    let rank = |rank| Parts { rank: Some(rank), ..PLAIN };
    let table = [
        (37, 2, 1, 64, 64, DType::F32, rank(8)),
        (130, 4, 2, 64, 96, DType::BF16, rank(8)),
        (257, 3, 1, 128, 64, DType::F32, rank(16)),
        (130, 6, 2, 96, 64, DType::BF16, rank(16)),
        (257, 9, 3, 64, 64, DType::BF16, rank(24)),
        (1100, 12, 2, 64, 32, DType::BF16, rank(32)),
        (1100, 6, 2, 128, 32, DType::BF16, rank(16)),
        (130, 4, 2, 64, 64, DType::BF16, rank(64)),
        (130, 4, 2, 64, 64, DType::BF16, Parts { dropout: 0.1, ..rank(16) }),
        (257, 4, 2, 64, 64, DType::BF16, Parts { needs_input_gradient: false, ..rank(16) }),
        (257, 4, 2, 64, 128, DType::Nf4, rank(16)),
        (130, 4, 2, 64, 64, DType::BF16, PLAIN),
    ];
    for row in table {
        cases.push(rope_row(target, row));
        cases.push(attention_row(target, row));
    }
}

fn attention_label((tokens, heads, kv_heads, head_dim, hidden, dtype, parts): AttentionRow) -> String {
    format!("{tokens}x{heads}/{kv_heads}x{head_dim} and {hidden} {} {}", dtype.name(), describe(parts))
}

/// The gradients of queries and keys, turned back, and those of the linear operation that made them and the values.
fn rope_row(target: &Target, row: AttentionRow) -> Case {
    let (tokens, heads, kv_heads, head_dim, hidden, dtype, parts) = row;
    let mut case = Writer::new(target, format!("rope_backward_branches {}", attention_label(row)));
    let outputs = [heads, kv_heads, kv_heads].map(|heads| heads * head_dim);
    let grad_qkv = case.activation("grad_qkv", &[tokens, outputs.iter().sum()]);
    case.given = Kind::Input;
    let rope = rope_backward_op(&mut case, grad_qkv, (tokens, heads + kv_heads, head_dim));
    let linear = linear_backward_op(&mut case, "", grad_qkv, (tokens, hidden), &outputs, dtype, parts);
    case.finish_all([rope, linear])
}

fn rope_backward_op(case: &mut Writer, grad_qkv: BufferId, (tokens, heads, head_dim): (usize, usize, usize)) -> Op {
    let (positions, inverse_frequency) = rotation(case, tokens, head_dim);
    let tensor = Columns { buffer: grad_qkv, start: 0, width: heads * head_dim };
    let (rotary_dim, scale, direction) = (head_dim, 1.25, Direction::Backward);
    Op::Rope { tensor, positions, inverse_frequency, head_dim, rotary_dim, scale, direction }
}

/// From the gradient of what attention adds to the stream to that of the stream, or, where that is not needed, to those of the
/// linear operation before attention.
fn attention_row(target: &Target, row: AttentionRow) -> Case {
    let (tokens, heads, kv_heads, head_dim, hidden, dtype, parts) = row;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let shape = AttentionShape { heads, kv_heads, head_dim, scale, window: None, softcap: None };
    let mut case = Writer::new(target, format!("attention_backward_branch {}", attention_label(row)));
    let columns = shape.query_columns();
    let output = case.output("attention", &[tokens, columns], case.compute);
    // The gradient of the stream, which the next norm reads too: it lives on.
    let gradient = case.activation("gradient", &[tokens, hidden]);
    case.given = Kind::Input;
    let qkv = case.random("qkv", &[tokens, shape.columns()], case.compute, Kind::Input, 2.0);
    let (starts, ends) = documents(&[tokens - 30, 30]);
    let (document_start, document_end) =
        (case.integers("document_start", &starts), case.integers("document_end", &ends));
    let log_sum_exp = case.random("log_sum_exp", &[tokens, heads], DType::F32, Kind::Input, 1.0);
    let forward = Op::Attention { qkv, document_start, document_end, output, log_sum_exp, shape };
    leave(&mut case, &forward, [output, log_sum_exp]);
    let nothing = vec![f64::NAN; tokens * columns];
    let grad_output = case.put("grad_attention", &[tokens, columns], case.compute, Kind::Output, &nothing);
    let frozen = Parts { needs_input_gradient: false, ..parts };
    let mut out = linear_backward_op(&mut case, "out.", gradient, (tokens, columns), &[hidden], dtype, frozen);
    if let Op::LinearBackward { input, grad_input, .. } = &mut out {
        (*input, *grad_input) = (output, Some(grad_output));
    }
    let delta = case.workspace("delta", &[tokens, heads], DType::F32);
    let grad_qkv = case.output("grad_qkv", &[tokens, shape.columns()], case.compute);
    let attention = Op::AttentionBackward {
        grad_output,
        qkv,
        output,
        log_sum_exp,
        document_start,
        document_end,
        delta,
        grad_qkv,
        shape,
    };
    let rope = rope_backward_op(&mut case, grad_qkv, (tokens, heads + kv_heads, head_dim));
    let outputs = [heads, kv_heads, kv_heads].map(|heads| heads * head_dim);
    let linear = linear_backward_op(&mut case, "", grad_qkv, (tokens, hidden), &outputs, dtype, parts);
    let grad_norm = if let Op::LinearBackward { grad_input, .. } = &linear { *grad_input } else { None };
    let norm = grad_norm.map(|grad_output| Op::RmsNormBackward {
        grad_output,
        input: case.activation("stream", &[tokens, hidden]),
        weight: case.weight("norm.weight", &[hidden], dtype),
        inverse_rms: case.random("inverse_rms", &[tokens], DType::F32, Kind::Input, 0.5),
        residual_grad: Some(gradient),
        grad_input: case.output("grad_stream", &[tokens, hidden], case.compute),
        grad_weight: None,
        weight_offset: 0.0,
    });
    case.finish_all([out, attention, rope, linear].into_iter().chain(norm))
}

/// Tokens, columns, those that linear operations make of the norm, those of what the linear operation below reads (0: there is
/// none), whether the norm is made again for the backward pass, how weights are stored, and what linear operations have.
type NormRow<'a> = (usize, usize, &'a [usize], usize, bool, DType, Parts);

/// Norms between linear operations with LoRA branches, as layers have them: an engine may sum for the branches while it makes the
/// norm, or its gradient.
pub fn norm_branches(target: &Target, cases: &mut Vec<Case>) {
    let rank = |rank| Parts { rank: Some(rank), ..PLAIN };
    let table: &[NormRow] = &[
        (37, 96, &[64, 32], 64, true, DType::F32, rank(8)),
        // Enough rows that an engine takes them with the branches.
        (2050, 4096, &[8, 8, 8], 16, true, DType::BF16, rank(16)),
        (2081, 4096, &[8, 8], 16, false, DType::F32, rank(16)),
        (4100, 2048, &[16, 8, 8], 0, true, DType::BF16, rank(16)),
        (2740, 3072, &[8, 8, 8], 8, true, DType::Nf4, rank(8)),
        // Ranks that are too much for both, or for one; dropout, and columns that have no slices.
        (530, 512, &[8, 8], 16, true, DType::BF16, rank(32)),
        (2740, 3072, &[8, 8], 16, false, DType::BF16, rank(24)),
        (530, 512, &[8, 8, 8], 16, true, DType::BF16, Parts { dropout: 0.1, ..rank(16) }),
        (130, 5120, &[8, 8], 16, true, DType::BF16, rank(16)),
    ];
    for &row in table {
        cases.push(norm_backward_row(target, row));
    }
    for &row in &[table[0], table[1], (4100, 2048, &[16, 16], 0, false, DType::F32, rank(16)), table[5]] {
        cases.push(norm_row(target, row));
    }
}

fn norm_label((tokens, hidden, outputs, below, again, dtype, parts): NormRow) -> String {
    let again = if again { " again" } else { "" };
    format!("{tokens}x{hidden} to {outputs:?} from {below} {} {}{again}", dtype.name(), describe(parts))
}

/// A norm and the linear operation that reads it.
fn norm_row(target: &Target, row: NormRow) -> Case {
    let (tokens, hidden, outputs, _, residual, dtype, parts) = row;
    let mut case = Writer::new(target, format!("norm_branches {}", norm_label(row)));
    let (norm, output) = norm_op(&mut case, (tokens, hidden), residual, dtype);
    let linear = linear_op(&mut case, output, (tokens, hidden), outputs, dtype, parts);
    case.finish_all([norm, linear])
}

fn norm_op(case: &mut Writer, (tokens, hidden): (usize, usize), residual: bool, dtype: DType) -> (Op, BufferId) {
    let shape = [tokens, hidden];
    let input = case.activation("stream", &shape);
    let residual = residual.then(|| case.activation("delta", &shape));
    // These live to the end, where they are read.
    let nothing = vec![f64::NAN; tokens * hidden];
    let sum = residual.map(|_| case.put("sum", &shape, case.compute, Kind::Output, &nothing));
    let inverse_rms = case.put("inverse_rms", &[tokens], DType::F32, Kind::Output, &nothing[..tokens]);
    let weight = case.weight("norm.weight", &[hidden], if dtype.is_quantized() { DType::BF16 } else { dtype });
    let output = case.output("normed", &shape, case.compute);
    let op = Op::RmsNorm { input, residual, sum, weight, output, inverse_rms, epsilon: 1e-5, weight_offset: 0.0 };
    (op, output)
}

/// The gradients of the linear operation that read a norm, of the norm, and of the linear operation whose result was added to the
/// stream before it.
fn norm_backward_row(target: &Target, row: NormRow) -> Case {
    let (tokens, hidden, outputs, below, again, dtype, parts) = row;
    let mut case = Writer::new(target, format!("norm_backward_branches {}", norm_label(row)));
    let (norm, mut output) = norm_op(&mut case, (tokens, hidden), again, dtype);
    case.given = Kind::Input;
    let Op::RmsNorm { input, sum, weight, inverse_rms, .. } = norm else { unreachable!("a norm") };
    let mut ops = vec![norm];
    let stream = sum.unwrap_or(input);
    if again {
        output = case.output("normed.again", &[tokens, hidden], case.compute);
        let inverse_rms = case.output("inverse_rms.again", &[tokens], DType::F32);
        let (residual, sum) = (None, None);
        let (epsilon, weight_offset) = (1e-5, 0.0);
        ops.push(Op::RmsNorm { input: stream, residual, sum, weight, output, inverse_rms, epsilon, weight_offset });
    }
    // Made here, as by what comes before it in a layer: only what is made has room beside its rows.
    let columns = outputs.iter().sum();
    let gradient = case.output("grad_outputs", &[tokens, columns], case.compute);
    ops.push(Op::RmsNorm {
        input: case.activation("grad_outputs.given", &[tokens, columns]),
        residual: None,
        sum: None,
        weight: case.weight("grad_outputs.weight", &[columns], DType::BF16),
        output: gradient,
        inverse_rms: case.output("grad_outputs.inverse_rms", &[tokens], DType::F32),
        epsilon: 1e-5,
        weight_offset: 0.0,
    });
    let mut above = linear_backward_op(&mut case, "", gradient, (tokens, hidden), outputs, dtype, parts);
    let Op::LinearBackward { input, grad_input: Some(grad_normed), .. } = &mut above else { unreachable!("asked for") };
    *input = output;
    let (grad_output, residual_grad) = (*grad_normed, Some(case.activation("gradient", &[tokens, hidden])));
    let grad_input = case.output("grad_stream", &[tokens, hidden], case.compute);
    ops.push(above);
    ops.push(Op::RmsNormBackward {
        grad_output,
        input: stream,
        weight,
        inverse_rms,
        residual_grad,
        grad_input,
        grad_weight: None,
        weight_offset: 0.0,
    });
    if below > 0 {
        ops.push(linear_backward_op(&mut case, "below.", grad_input, (tokens, below), &[hidden], dtype, parts));
    }
    case.finish_all(ops)
}
