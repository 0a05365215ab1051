//! Projections with a LoRA branch, forward and backward.

use std::ops::Range;

use rayon::prelude::*;

use super::elementary::vectorized;
use super::product::{Into, Matrix, MatrixMut, Right, Values, Weight, blocks, multiply, with_scratch};
use crate::program::random;

/// Output columns of one task.
const COLUMNS: usize = 128;
/// Tokens of one task where a product is narrow.
const TOKENS: usize = 64;
/// Up to this many tokens a weight is read once, row by row.
const FEW_TOKENS: usize = 4;

/// The mask of a LoRA branch's input.
#[derive(Clone, Copy)]
pub struct Mask {
    pub probability: f32,
    pub key: [u32; 4],
    pub stream: u32,
}

impl Mask {
    fn kept(self, prefix: u32, column: usize) -> bool {
        random::to_uniform(random::mix(prefix ^ column as u32)) >= self.probability
    }

    /// `target = drop(source)` for one row, whose first column is `first`.
    fn apply(self, row: usize, first: usize, source: &[f32], target: &mut [f32]) {
        let prefix = random::prefix(self.key, self.stream, row as u32);
        let factor = 1.0 / (1.0 - self.probability);
        vectorized(
            #[inline(always)]
            || {
                for (i, (target, &value)) in target.iter_mut().zip(source).enumerate() {
                    *target = if self.kept(prefix, first + i) { value * factor } else { 0.0 };
                }
            },
        );
    }

    /// `target += drop'(gradient)` for one row.
    fn add(self, row: usize, first: usize, gradient: &[f32], target: &mut [f32]) {
        let prefix = random::prefix(self.key, self.stream, row as u32);
        let factor = 1.0 / (1.0 - self.probability);
        vectorized(
            #[inline(always)]
            || {
                for (i, (target, &value)) in target.iter_mut().zip(gradient).enumerate() {
                    *target += if self.kept(prefix, first + i) { value * factor } else { 0.0 };
                }
            },
        );
    }
}

pub struct Branch<'a> {
    pub a: Matrix<'a>,
    pub b: Matrix<'a>,
    pub middle: MatrixMut<'a>,
    pub scale: f32,
    pub mask: Option<Mask>,
}

pub struct Projection<'a> {
    pub weight: Weight<'a>,
    pub bias: Option<&'a [f32]>,
    pub output: MatrixMut<'a>,
    pub branch: Option<Branch<'a>>,
}

pub fn forward(input: Matrix, projections: &[Projection]) {
    let mut narrow: Vec<(&Branch, Range<usize>)> = Vec::new();
    for branch in projections.iter().filter_map(|projection| projection.branch.as_ref()) {
        narrow.extend(blocks(input.rows, TOKENS).map(|rows| (branch, rows)));
    }
    narrow.into_par_iter().for_each(|(branch, rows)| {
        // SAFETY: each task writes its own rows of its own branch.
        let mut middle = unsafe { branch.middle.part(rows.clone(), 0..branch.middle.columns) };
        let source = input.rows(rows.clone());
        let Some(mask) = branch.mask else {
            return multiply(&mut middle, source, branch.a.transposed(), 1.0, Into::Replace);
        };
        with_scratch(source.rows * source.columns, |scratch| {
            for (row, target) in scratch.chunks_exact_mut(source.columns).enumerate() {
                mask.apply(rows.start + row, 0, source.row(row), target);
            }
            multiply(&mut middle, Matrix::new(scratch, source.columns), branch.a.transposed(), 1.0, Into::Replace);
        });
    });
    let mut wide: Vec<(&Projection, Range<usize>)> = Vec::new();
    for projection in projections {
        wide.extend(blocks(projection.weight.rows, COLUMNS).map(|columns| (projection, columns)));
    }
    wide.into_par_iter().for_each(|(projection, columns)| {
        // SAFETY: each task writes its own columns of its own projection.
        let mut output = unsafe { projection.output.part(0..input.rows, columns.clone()) };
        times_transposed(&mut output, input, projection.weight, columns.clone());
        if let Some(bias) = projection.bias {
            for row in 0..output.rows {
                for (value, bias) in output.row(row).iter_mut().zip(&bias[columns.clone()]) {
                    *value += bias;
                }
            }
        }
        if let Some(branch) = &projection.branch {
            let b = branch.b.rows(columns).transposed();
            multiply(&mut output, branch.middle.as_matrix(), b, branch.scale, Into::Add);
        }
    });
}

/// `output = input · weight[rows]ᵀ`.
pub fn times_transposed(output: &mut MatrixMut, input: Matrix, weight: Weight, rows: Range<usize>) {
    if input.rows <= FEW_TOKENS {
        return few_tokens(output, input, weight, rows);
    }
    let right = Right::WeightTransposed { weight, rows: (rows.start, rows.end), columns: (0, weight.columns) };
    multiply(output, input, right, 1.0, Into::Replace);
}

/// The same for a few tokens, bound by memory: each weight is read once and never stored as f32.
fn few_tokens(output: &mut MatrixMut, input: Matrix, weight: Weight, rows: Range<usize>) {
    let columns = weight.columns;
    with_scratch(columns, |scratch| {
        for (at, row) in rows.enumerate() {
            let range = row * columns..(row + 1) * columns;
            if !matches!(weight.values, Values::F32(_) | Values::BF16(_)) {
                vectorized(
                    #[inline(always)]
                    || weight.convert(row, 0..columns, scratch),
                );
            }
            for token in 0..input.rows {
                let x = input.row(token);
                output.row(token)[at] = match weight.values {
                    Values::F32(values) => dot(x, &values[range.clone()], |&w| w),
                    Values::BF16(values) => {
                        dot(x, &values[range.clone()], |w| f32::from_bits(u32::from(w.to_bits()) << 16))
                    }
                    Values::F16(_) | Values::Nf4(_) | Values::Int8(_) => dot(x, scratch, |&w| w),
                };
            }
        }
    });
}

fn dot<T>(x: &[f32], weights: &[T], value: impl Fn(&T) -> f32) -> f32 {
    let (x, weights) = (x, &weights[..x.len()]);
    vectorized(
        #[inline(always)]
        || super::elementary::sum(x.len(), |i| x[i] * value(&weights[i])),
    )
}

pub struct BranchBackward<'a> {
    pub a: Matrix<'a>,
    pub b: Matrix<'a>,
    pub middle: Matrix<'a>,
    pub grad_middle: MatrixMut<'a>,
    pub grad_a: MatrixMut<'a>,
    pub grad_b: MatrixMut<'a>,
    pub scale: f32,
    pub mask: Option<Mask>,
}

pub struct ProjectionBackward<'a> {
    pub weight: Weight<'a>,
    pub grad_output: Matrix<'a>,
    pub grad_weight: Option<MatrixMut<'a>>,
    pub grad_bias: Option<MatrixMut<'a>>,
    pub branch: Option<BranchBackward<'a>>,
}

/// `input` is there where something is trained.
pub fn backward(input: Option<Matrix>, grad_input: Option<&MatrixMut>, projections: &[ProjectionBackward]) {
    let Some(first) = projections.first() else { return };
    let (tokens, width) = (first.grad_output.rows, first.weight.columns);
    let with_branch =
        || projections.iter().filter_map(|projection| projection.branch.as_ref().map(|branch| (projection, branch)));
    let mut narrow: Vec<(Matrix, &BranchBackward, Range<usize>)> = Vec::new();
    for (projection, branch) in with_branch() {
        narrow.extend(blocks(tokens, TOKENS).map(|rows| (projection.grad_output, branch, rows)));
    }
    narrow.into_par_iter().for_each(|(grad_output, branch, rows)| {
        // SAFETY: each task writes its own rows of its own branch.
        let mut out = unsafe { branch.grad_middle.part(rows.clone(), 0..branch.grad_middle.columns) };
        multiply(&mut out, grad_output.rows(rows), branch.b, branch.scale, Into::Replace);
    });

    let mut wide: Vec<(&ProjectionBackward, Range<usize>)> = Vec::new();
    for projection in projections {
        if projection.grad_weight.is_some() || projection.grad_bias.is_some() || projection.branch.is_some() {
            wide.extend(blocks(projection.weight.rows, COLUMNS).map(|rows| (projection, rows)));
        }
    }
    wide.into_par_iter().for_each(|(projection, rows)| {
        let grad_output = projection.grad_output.columns(rows.clone());
        if let Some(branch) = &projection.branch {
            // SAFETY: each task writes its own rows of its own branch.
            let mut out = unsafe { branch.grad_b.part(rows.clone(), 0..branch.grad_b.columns) };
            multiply(&mut out, grad_output.transposed(), branch.middle, branch.scale, Into::Add);
        }
        if let (Some(grad_weight), Some(input)) = (&projection.grad_weight, input) {
            // SAFETY: each task writes its own rows of its own gradient.
            let mut out = unsafe { grad_weight.part(rows.clone(), 0..grad_weight.columns) };
            multiply(&mut out, grad_output.transposed(), input, 1.0, Into::Add);
        }
        if let Some(grad_bias) = &projection.grad_bias {
            // SAFETY: each task writes its own elements of its own gradient.
            let mut out = unsafe { grad_bias.part(rows.clone(), 0..1) };
            add_column_sums(&mut out, grad_output);
        }
    });

    let columns: Vec<Range<usize>> = blocks(width, COLUMNS).collect();
    columns.into_par_iter().for_each(|columns| {
        if let Some(grad_input) = grad_input {
            // SAFETY: each task writes its own columns.
            let mut out = unsafe { grad_input.part(0..tokens, columns.clone()) };
            for (index, projection) in projections.iter().enumerate() {
                let into = if index == 0 { Into::Replace } else { Into::Add };
                times(&mut out, projection.grad_output, projection.weight, columns.clone(), into);
                if let Some(branch) = &projection.branch {
                    add_branch(&mut out, branch, columns.clone());
                }
            }
        }
        let Some(input) = input else { return };
        for (_, branch) in with_branch() {
            // SAFETY: each task writes its own columns of each gradient.
            let mut out = unsafe { branch.grad_a.part(0..branch.grad_a.rows, columns.clone()) };
            add_grad_a(&mut out, branch, input, columns.clone());
        }
    });
}

/// `out = left · weight[:, columns]`, or `out += ...`.
pub fn times(out: &mut MatrixMut, left: Matrix, weight: Weight, columns: Range<usize>, into: Into) {
    let right = Right::Weight { weight, rows: (0, weight.rows), columns: (columns.start, columns.end) };
    multiply(out, left, right, 1.0, into);
}

fn add_branch(out: &mut MatrixMut, branch: &BranchBackward, columns: Range<usize>) {
    let g = branch.grad_middle.as_matrix();
    let a = branch.a.columns(columns.clone());
    let Some(mask) = branch.mask else {
        return multiply(out, g, a, 1.0, Into::Add);
    };
    with_scratch(TOKENS * columns.len(), |scratch| {
        for start in (0..g.rows).step_by(TOKENS) {
            let rows = start..(start + TOKENS).min(g.rows);
            let mut product = MatrixMut::new(&mut scratch[..rows.len() * columns.len()], columns.len());
            multiply(&mut product, g.rows(rows.clone()), a, 1.0, Into::Replace);
            for (at, row) in rows.enumerate() {
                mask.add(row, columns.start, product.row(at), out.row(row));
            }
        }
    });
}

fn add_grad_a(out: &mut MatrixMut, branch: &BranchBackward, input: Matrix, columns: Range<usize>) {
    let g = branch.grad_middle.as_matrix();
    let source = input.columns(columns.clone());
    let Some(mask) = branch.mask else {
        return multiply(out, g.transposed(), source, 1.0, Into::Add);
    };
    with_scratch(TOKENS * columns.len(), |scratch| {
        for start in (0..g.rows).step_by(TOKENS) {
            let rows = start..(start + TOKENS).min(g.rows);
            let dropped = &mut scratch[..rows.len() * columns.len()];
            for (row, target) in rows.clone().zip(dropped.chunks_exact_mut(columns.len())) {
                mask.apply(row, columns.start, source.row(row), target);
            }
            multiply(out, g.rows(rows).transposed(), Matrix::new(dropped, columns.len()), 1.0, Into::Add);
        }
    });
}

/// Adds the sums of the columns of `values` to `out`, one a row.
fn add_column_sums(out: &mut MatrixMut, values: Matrix) {
    for column in 0..values.columns {
        let total: f64 = (0..values.rows).map(|row| f64::from(values.row(row)[column])).sum();
        out.row(column)[0] += total as f32;
    }
}
