//! Linear operations: as few products as memory layout allows.
//!
//! Neighbouring projections whose weights lie end to end and whose outputs lie side by side run as one product, with their
//! LoRA branches where rows have columns to spare for them. Quantized weights are unpacked into scratch, a part that fits
//! at a time.

use super::{Lowering, fp8};
use crate::backend::EngineError;
use crate::backend::cuda::command::arguments;
use crate::backend::cuda::driver::unsupported;
use crate::backend::cuda::product::{Alpha, Matrix, Product};
use crate::program::{BufferId, DType, Lora, Projection, ProjectionBackward};

/// `Some` joined matrix when `second` follows `first` in memory row by row.
pub(super) fn stacked(first: Matrix, second: Matrix) -> Option<Matrix> {
    let bytes = (first.rows * first.stride) as u64 * first.element_bytes();
    let fits = first.dtype == second.dtype
        && first.scale == second.scale
        && first.columns == second.columns
        && first.stride == second.stride
        && first.pointer + bytes == second.pointer;
    fits.then(|| Matrix { rows: first.rows + second.rows, ..first })
}

/// `Some` joined matrix when `second` lies right of `first` in the same rows.
fn side_by_side(first: Matrix, second: Matrix) -> Option<Matrix> {
    let bytes = first.columns as u64 * first.element_bytes();
    let fits = first.dtype == second.dtype
        && first.rows == second.rows
        && first.stride == second.stride
        && first.pointer + bytes == second.pointer;
    fits.then(|| Matrix { columns: first.columns + second.columns, ..first })
}

/// A pair of matrices of one product: stacked rows of the first go with columns of the second.
pub(super) type Pair = (Matrix, Matrix);

/// Columns of quantized weights: (weight, first, count).
type Unpacked = Vec<(BufferId, usize, usize)>;

/// Joins neighbours of a list where both matrices touch.
pub(super) fn join(pairs: impl IntoIterator<Item = Pair>) -> Vec<Pair> {
    let mut joined: Vec<Pair> = Vec::new();
    for (rows, columns) in pairs {
        if let Some(last) = joined.last_mut()
            && let (Some(both_rows), Some(both_columns)) = (stacked(last.0, rows), side_by_side(last.1, columns))
        {
            *last = (both_rows, both_columns);
        } else {
            joined.push((rows, columns));
        }
    }
    joined
}

/// Weights whose matrices lie side by side, with the matrices as one.
pub(super) fn side_by_side_groups(parts: impl IntoIterator<Item = (BufferId, Matrix)>) -> Vec<(Vec<BufferId>, Matrix)> {
    let mut groups: Vec<(Vec<BufferId>, Matrix)> = Vec::new();
    for (weight, matrix) in parts {
        if let Some((weights, last)) = groups.last_mut()
            && let Some(joined) = side_by_side(*last, matrix)
        {
            weights.push(weight);
            *last = joined;
        } else {
            groups.push((vec![weight], matrix));
        }
    }
    groups
}

impl Lowering<'_> {
    /// `output = input · weightᵀ (+ bias)`, with the LoRA branch `scale · drop(input) · aᵀ · bᵀ` where there is one: in the same
    /// product where there is room for it beside input and weight. Elsewhere the branch is written first, and the whole
    /// product adds to it before it rounds: the other way round it would be added to what is rounded to bf16 already, and
    /// mostly lost, for at the start of training it is smaller than half a step of bf16 there.
    pub(super) fn linear(&mut self, input: BufferId, projections: &[Projection]) -> Result<(), EngineError> {
        self.expect("linear", &[input], DType::BF16)?;
        let x = self.matrix(input);
        let adapted: Vec<(&Projection, &Lora)> = projections
            .iter()
            .filter_map(|projection| projection.lora.as_ref().map(|lora| (projection, lora)))
            .collect();
        for (_, lora) in &adapted {
            self.expect("linear", &[lora.a, lora.b, lora.middle.buffer], DType::BF16)?;
        }
        let plain = adapted.iter().filter(|(_, lora)| lora.dropout.is_none());
        if self.summed != Some(input) {
            let pairs: Vec<Pair> = plain.map(|(_, lora)| (self.matrix(lora.a), self.columns(lora.middle))).collect();
            self.forward_products(x, pairs, false)?;
        }
        for (_, lora) in &adapted {
            if let Some(dropout) = lora.dropout {
                self.dropped_middle(x, lora, dropout)?;
            }
        }
        if let Some(columns) = self.room_beside(input, projections) {
            self.whole_with_branches(x, projections, columns)?;
            return projections.iter().try_for_each(|projection| self.add_bias(projection));
        }
        for (projection, lora) in &adapted {
            self.product(Product {
                left: self.columns(lora.middle),
                left_transposed: false,
                right: self.matrix(lora.b),
                right_transposed: true,
                output: self.columns(projection.output),
                alpha: Alpha::Device(self.address(lora.scale)),
                accumulate: false,
            })?;
        }
        // Only projections alike may be joined.
        for has_branch in [false, true] {
            let alike: Vec<&Projection> = projections.iter().filter(|p| p.lora.is_some() == has_branch).collect();
            self.whole(x, &alike, has_branch)?;
        }
        projections.iter().try_for_each(|projection| self.add_bias(projection))
    }

    /// The products with the whole weights; `accumulate` where the LoRA branch is there already.
    fn whole(&mut self, x: Matrix, projections: &[&Projection], accumulate: bool) -> Result<(), EngineError> {
        let weights: Vec<BufferId> = projections.iter().map(|projection| projection.weight).collect();
        if self.all_quantized(&weights)? {
            for projection in projections {
                self.quantized_forward(x, projection.weight, self.columns(projection.output), accumulate)?;
            }
            return Ok(());
        }
        let pairs = projections.iter().map(|p| (self.matrix(p.weight), self.columns(p.output))).collect();
        self.forward_products(x, pairs, accumulate)
    }

    /// `columns (+)= x · rowsᵀ` for each pair, neighbours joined.
    fn forward_products(&mut self, x: Matrix, pairs: Vec<Pair>, accumulate: bool) -> Result<(), EngineError> {
        if pairs.iter().any(|(weight, _)| weight.dtype == DType::Fp8) {
            let parts = self.fp8_forward(x, pairs, accumulate)?;
            return self.run_fp8(parts);
        }
        join(pairs).into_iter().try_for_each(|(w, output)| self.product(forward_product(x, w, output, accumulate)))
    }

    fn add_bias(&mut self, projection: &Projection) -> Result<(), EngineError> {
        let Some(bias) = projection.bias else {
            return Ok(());
        };
        self.expect("linear with a bias", &[projection.output.buffer], DType::BF16)?;
        let output = self.columns(projection.output);
        let kind = match self.memory.stored(bias) {
            kind @ (DType::BF16 | DType::F32) => kind.name(),
            other => return Err(unsupported(format!("a bias in {}", other.name()))),
        };
        let arguments = arguments![output.pointer, output.stride as i64, self.address(bias), output.columns as i32];
        let grid = [output.rows, output.columns.div_ceil(256), 1];
        self.launch("bias", &format!("bias_{kind}"), grid, 256, arguments)
    }

    pub(super) fn linear_backward(
        &mut self,
        input: BufferId,
        grad_input: Option<BufferId>,
        projections: &[ProjectionBackward],
    ) -> Result<(), EngineError> {
        self.expect("linear_backward", &[input], DType::BF16)?;
        self.expect("linear_backward", grad_input.as_slice(), DType::BF16)?;
        let x = self.matrix(input);
        let grad_input = grad_input.map(|id| self.matrix(id));
        if let Some(grad_input) = grad_input
            && let Some(below) = self.room_below(projections)
        {
            let outputs: Vec<BufferId> = projections.iter().map(|projection| projection.grad_output.buffer).collect();
            self.expect("linear_backward", &outputs, DType::BF16)?;
            return self.backward_with_branches(x, grad_input, projections, below);
        }
        let mut branch_first = false;
        let plain = projections.iter().all(|p| p.lora.as_ref().is_some_and(|lora| lora.dropout.is_none()));
        if let Some(grad_input) = grad_input
            && plain
        {
            let whole = self.grad_input_parts(grad_input, projections, false)?;
            let whole: Vec<Product> = whole.into_iter().map(|(_, product)| product).collect();
            let branches = self.grad_input_branches(grad_input, projections);
            branch_first = self.products.second_adds(&branches, &whole)?;
        }
        if let Some(grad_input) = grad_input
            && !branch_first
        {
            self.grad_input(grad_input, projections, false)?;
        }
        let mut pairs = Vec::new();
        for projection in projections {
            let grad_output = self.columns(projection.grad_output);
            self.expect("linear_backward", &[projection.grad_output.buffer], DType::BF16)?;
            if let Some(grad_weight) = projection.grad_weight {
                pairs.push((self.matrix(grad_weight), grad_output));
            }
            if let Some(grad_bias) = projection.grad_bias {
                self.column_sum(grad_output, grad_bias)?;
            }
        }
        self.weight_gradients(x, pairs)?;
        self.lora_backward(x, grad_input, projections, branch_first)?;
        match grad_input {
            Some(grad_input) if branch_first => self.grad_input(grad_input, projections, true),
            _ => Ok(()),
        }
    }

    /// `grad_input (+)= Σ grad_output · weight`.
    fn grad_input(
        &mut self,
        grad_input: Matrix,
        projections: &[ProjectionBackward],
        accumulate: bool,
    ) -> Result<(), EngineError> {
        let weights: Vec<BufferId> = projections.iter().map(|projection| projection.weight).collect();
        if self.all_fp8(&weights) {
            let pairs = projections.iter().map(|p| (self.matrix(p.weight), self.columns(p.grad_output))).collect();
            let parts = self.fp8_grad_input(grad_input, pairs, accumulate)?;
            return self.run_fp8(parts);
        }
        let scratch = self.memory.scratch.pointer;
        for (unpacked, product) in self.grad_input_parts(grad_input, projections, accumulate)? {
            let mut to = scratch;
            for (weight, first, count) in unpacked {
                let rows = self.rows(weight);
                self.unpack(weight, (0, rows), (first, count), (to, count))?;
                to += (2 * rows * count) as u64;
            }
            self.product(product)?;
        }
        Ok(())
    }

    /// The products of [`Self::grad_input`], each with the columns of quantized weights to unpack before it:
    /// (weight, first, count). Of quantized weights a block of columns at a time, with the rows of all projections whose
    /// output gradients lie side by side.
    fn grad_input_parts(
        &self,
        grad_input: Matrix,
        projections: &[ProjectionBackward],
        accumulate: bool,
    ) -> Result<Vec<(Unpacked, Product)>, EngineError> {
        let weights: Vec<BufferId> = projections.iter().map(|projection| projection.weight).collect();
        let product = |left: Matrix, right: Matrix, output: Matrix, index: usize| Product {
            left,
            left_transposed: false,
            right,
            right_transposed: false,
            output,
            alpha: Alpha::One,
            accumulate: accumulate || index > 0,
        };
        if !self.all_quantized(&weights)? {
            let pairs = projections.iter().map(|p| (self.matrix(p.weight), self.columns(p.grad_output)));
            if self.all_fp8(&weights) {
                let parts = self.fp8_grad_input(grad_input, pairs.collect(), accumulate)?;
                return Ok(fp8::products(parts).map(|product| (Vec::new(), product)).collect());
            }
            let parts = join(pairs).into_iter().enumerate();
            return Ok(parts.map(|(index, (w, grad))| (Vec::new(), product(grad, w, grad_input, index))).collect());
        }
        let groups = side_by_side_groups(projections.iter().map(|p| (p.weight, self.columns(p.grad_output))));
        let scratch = self.memory.scratch.pointer;
        let mut parts = Vec::new();
        for (index, (weights, grad_output)) in groups.into_iter().enumerate() {
            let column_blocks = self.unpacked_columns(grad_output.columns, grad_input.columns)?;
            for (first, count) in column_blocks {
                let unpacked = weights.iter().map(|&weight| (weight, first, count)).collect();
                let right = Matrix::new(scratch, DType::BF16, grad_output.columns, count);
                parts.push((unpacked, product(grad_output, right, grad_input.slice_columns(first, count), index)));
            }
        }
        Ok(parts)
    }

    /// Blocks of columns of unpacked weights with so many rows that fit the scratch: (first, count).
    pub(super) fn unpacked_columns(&self, rows: usize, columns: usize) -> Result<Vec<(usize, usize)>, EngineError> {
        let whole = !columns.is_multiple_of(64);
        let fitting = self.memory.scratch.bytes as usize / (2 * rows);
        if whole && fitting < columns {
            return Err(unsupported(format!("quantized weights with rows of {columns}, not a multiple of 64")));
        }
        Ok(if whole { vec![(0, columns)] } else { blocks(columns, fitting, 64) })
    }

    /// `rows += columnsᵀ · x` for each pair, neighbours joined.
    pub(super) fn weight_gradients(&mut self, x: Matrix, pairs: Vec<Pair>) -> Result<(), EngineError> {
        for (gradient, grad_output) in join(pairs) {
            let product = Product {
                left: grad_output,
                left_transposed: true,
                right: x,
                right_transposed: false,
                output: gradient,
                alpha: Alpha::One,
                accumulate: true,
            };
            self.product(product)?;
        }
        Ok(())
    }

    fn all_fp8(&self, weights: &[BufferId]) -> bool {
        weights.iter().all(|&id| self.memory.stored(id) == DType::Fp8)
    }

    /// Whether the weights are unpacked before products: all of them or none.
    pub(super) fn all_quantized(&self, weights: &[BufferId]) -> Result<bool, EngineError> {
        if self.all_fp8(weights) {
            return Ok(false);
        }
        let mut quantized = 0;
        for &id in weights {
            match self.memory.stored(id) {
                DType::BF16 => {}
                DType::Nf4 | DType::Int8 => quantized += 1,
                other => {
                    let name = &self.workload.buffer(id).name;
                    return Err(unsupported(format!(
                        "{name} held in {}; products take bf16, nf4, int8 and fp8, plain or quantized in one operation",
                        other.name()
                    )));
                }
            }
        }
        match quantized {
            0 => Ok(false),
            all if all == weights.len() => Ok(true),
            _ => Err(unsupported("a linear operation on quantized and plain weights together")),
        }
    }
}

/// `output (+)= x · weightᵀ`.
pub(super) fn forward_product(x: Matrix, weight: Matrix, output: Matrix, accumulate: bool) -> Product {
    Product {
        left: x,
        left_transposed: false,
        right: weight,
        right_transposed: true,
        output,
        alpha: Alpha::One,
        accumulate,
    }
}

/// Cuts `total` into as few blocks of at most `most` as go, evenly, at multiples of `unit` where they fit.
pub(super) fn blocks(total: usize, most: usize, unit: usize) -> Vec<(usize, usize)> {
    if total <= most {
        return vec![(0, total)];
    }
    let most = if most >= unit { most / unit * unit } else { most.max(1) };
    let count = total.div_ceil(most);
    let even = total.div_ceil(count).next_multiple_of(if most >= unit { unit } else { 1 }).min(most);
    (0..total).step_by(even).map(|first| (first, even.min(total - first))).collect()
}

#[cfg(test)]
mod tests {
    use super::blocks;

    #[test]
    fn blocks_cover_everything_once_and_stay_below_the_limit() {
        for (total, most, unit) in [(28672, 1170, 64), (100, 1000, 64), (4097, 1024, 128), (10, 3, 64), (1, 1, 64)] {
            let cut = blocks(total, most, unit);
            assert_eq!(cut.iter().map(|(_, count)| count).sum::<usize>(), total);
            assert!(cut.iter().all(|&(first, count)| count <= most && (first % unit == 0 || most < unit)));
            assert!(cut.windows(2).all(|pair| pair[0].0 + pair[0].1 == pair[1].0));
        }
    }
}
