//! Linear operations: as few products as memory layout allows.
//!
//! Neighbouring projections whose weights lie end to end and whose outputs lie side by side run as one product.
//! Quantized weights are unpacked into scratch, a part that fits at a time. Where even the products with whole weights are
//! too short to fill the card, those of the LoRA branch run beside them.

use super::{Lowering, fp8};
use crate::backend::EngineError;
use crate::backend::cuda::command::arguments;
use crate::backend::cuda::driver::{Lane, unsupported};
use crate::backend::cuda::product::{Alpha, Matrix, Product};
use crate::program::{BufferId, DType, Dropout, Lora, LoraBackward, Projection, ProjectionBackward};

/// `Some` joined matrix when `second` follows `first` in memory row by row.
fn stacked(first: Matrix, second: Matrix) -> Option<Matrix> {
    let bytes = (first.rows * first.stride) as u64 * first.element_bytes();
    let fits = first.dtype == second.dtype
        && first.scale == second.scale
        && first.columns == second.columns
        && first.stride == second.stride
        && first.stride == first.columns
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
type Pair = (Matrix, Matrix);

/// Columns of quantized weights: (weight, first, count).
type Unpacked = Vec<(BufferId, usize, usize)>;

/// Milliseconds under which products with whole weights leave room for others beside them.
const SHORT: f32 = 0.15;

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

impl Lowering<'_> {
    /// `output = input · weightᵀ (+ bias)`, with the LoRA branch `scale · drop(input) · aᵀ · bᵀ` where there is one. The branch is
    /// written first, and the whole product adds to it before it rounds: the other way round it would be added to what is
    /// rounded to bf16 already, and mostly lost, for at the start of training it is smaller than half a step of bf16 there.
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
        let pairs: Vec<Pair> = plain.map(|(_, lora)| (self.matrix(lora.a), self.columns(lora.middle))).collect();
        self.forward_products(x, pairs, false)?;
        for (_, lora) in &adapted {
            if let Some(dropout) = lora.dropout {
                self.dropped_middle(x, lora, dropout)?;
            }
        }
        self.branches(x, projections, &adapted)?;
        // Only projections alike may be joined.
        for has_branch in [false, true] {
            let alike: Vec<&Projection> = projections.iter().filter(|p| p.lora.is_some() == has_branch).collect();
            self.whole(x, &alike, has_branch)?;
        }
        projections.iter().try_for_each(|projection| self.add_bias(projection))
    }

    /// `output = scale · middle · bᵀ`, each in columns of its own: beside each other where products are short.
    fn branches(
        &mut self,
        x: Matrix,
        projections: &[Projection],
        adapted: &[(&Projection, &Lora)],
    ) -> Result<(), EngineError> {
        let mut lanes = vec![Lane::Main];
        if adapted.len() > 1 {
            let whole = self.whole_products(x, projections)?;
            lanes.extend(self.lanes(&whole)?.into_iter().take(adapted.len() - 1));
        }
        for &lane in &lanes[1..] {
            self.order(Lane::Main, lane)?;
        }
        for (index, (projection, lora)) in adapted.iter().enumerate() {
            let branch = Product {
                left: self.columns(lora.middle),
                left_transposed: false,
                right: self.matrix(lora.b),
                right_transposed: true,
                output: self.columns(projection.output),
                alpha: Alpha::Device(self.address(lora.scale)),
                accumulate: false,
            };
            self.product_on(branch, lanes[index % lanes.len()])?;
        }
        lanes[1..].iter().try_for_each(|&lane| self.order(lane, Lane::Main))
    }

    /// Where the products of a LoRA branch run: on streams of their own where those with the whole weights are short.
    fn lanes(&mut self, whole: &[Product]) -> Result<[Lane; 2], EngineError> {
        let short = self.products.milliseconds(whole)? < SHORT;
        Ok(if short { [Lane::Side(0), Lane::Side(1)] } else { [Lane::Main; 2] })
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

    /// The products of [`Self::whole`], for timing.
    fn whole_products(&self, x: Matrix, projections: &[Projection]) -> Result<Vec<Product>, EngineError> {
        let weights: Vec<BufferId> = projections.iter().map(|projection| projection.weight).collect();
        if self.all_quantized(&weights)? {
            let part = |projection: &Projection| {
                self.quantized_forward_parts(x, projection.weight, self.columns(projection.output), false)
            };
            return Ok(projections.iter().flat_map(part).map(|(_, _, product)| product).collect());
        }
        let pairs = projections.iter().map(|p| (self.matrix(p.weight), self.columns(p.output)));
        if self.all_fp8(&weights) {
            return Ok(fp8::products(self.fp8_forward(x, pairs.collect(), false)?).collect());
        }
        Ok(join(pairs).into_iter().map(|(weight, output)| forward_product(x, weight, output, false)).collect())
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

    /// `middle = drop(x) · aᵀ`, in chunks of rows that fit the scratch.
    fn dropped_middle(&mut self, x: Matrix, lora: &Lora, dropout: Dropout) -> Result<(), EngineError> {
        let (a, middle) = (self.matrix(lora.a), self.columns(lora.middle));
        for (first, rows) in self.row_chunks(x) {
            let dropped = self.dropped(x, first, rows, dropout)?;
            self.product(Product {
                left: dropped,
                left_transposed: false,
                right: a,
                right_transposed: true,
                output: middle.slice_rows(first, rows),
                alpha: Alpha::One,
                accumulate: false,
            })?;
        }
        Ok(())
    }

    /// Rows of `drop(x)` in scratch.
    fn dropped(&mut self, x: Matrix, first: usize, rows: usize, dropout: Dropout) -> Result<Matrix, EngineError> {
        let to = Matrix::new(self.memory.scratch.pointer, DType::BF16, rows, x.columns);
        let from = x.slice_rows(first, rows);
        self.launch(
            "dropout",
            "dropout",
            [rows, x.columns.div_ceil(256), 1],
            256,
            arguments![
                from.pointer,
                to.pointer,
                self.address(dropout.key),
                dropout.stream,
                first as i32,
                x.columns as i32,
                dropout.probability,
                1.0 / (1.0 - dropout.probability),
            ],
        )?;
        Ok(to)
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
        let mut branch_first = false;
        let mut lanes = [Lane::Main; 2];
        let plain = projections.iter().all(|p| p.lora.as_ref().is_some_and(|lora| lora.dropout.is_none()));
        if let Some(grad_input) = grad_input
            && plain
        {
            let whole = self.grad_input_parts(grad_input, projections, false)?;
            let whole: Vec<Product> = whole.into_iter().map(|(_, product)| product).collect();
            let branches = self.grad_input_branches(grad_input, projections);
            branch_first = self.products.second_adds(&branches, &whole)?;
            lanes = self.lanes(&whole)?;
        }
        for lane in lanes {
            self.order(Lane::Main, lane)?;
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
        self.weight_gradients(x, pairs, Lane::Main)?;
        self.lora_backward(x, grad_input, projections, branch_first, lanes)?;
        if let Some(grad_input) = grad_input
            && branch_first
        {
            self.grad_input(grad_input, projections, true)?;
        }
        lanes.into_iter().try_for_each(|lane| self.order(lane, Lane::Main))
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
                self.unpack(weight, (0, rows), (first, count), to)?;
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
        let mut groups: Vec<(Vec<BufferId>, Matrix)> = Vec::new();
        for projection in projections {
            let grad_output = self.columns(projection.grad_output);
            if let Some((weights, last)) = groups.last_mut()
                && let Some(joined) = side_by_side(*last, grad_output)
            {
                weights.push(projection.weight);
                *last = joined;
            } else {
                groups.push((vec![projection.weight], grad_output));
            }
        }
        let scratch = self.memory.scratch.pointer;
        let mut parts = Vec::new();
        for (index, (weights, grad_output)) in groups.into_iter().enumerate() {
            let columns = grad_input.columns;
            let whole = !columns.is_multiple_of(64);
            let fitting = self.memory.scratch.bytes as usize / (2 * grad_output.columns);
            if whole && fitting < columns {
                return Err(unsupported(format!("quantized weights with rows of {columns}, not a multiple of 64")));
            }
            let column_blocks = if whole { vec![(0, columns)] } else { blocks(columns, fitting, 64) };
            for (first, count) in column_blocks {
                let unpacked = weights.iter().map(|&weight| (weight, first, count)).collect();
                let right = Matrix::new(scratch, DType::BF16, grad_output.columns, count);
                parts.push((unpacked, product(grad_output, right, grad_input.slice_columns(first, count), index)));
            }
        }
        Ok(parts)
    }

    /// `grad_input = Σ grad_middle · a` of the LoRA branches without dropout, neighbours joined.
    fn grad_input_branches(&self, grad_input: Matrix, projections: &[ProjectionBackward]) -> Vec<Product> {
        let plain = projections.iter().filter_map(|p| p.lora.as_ref()).filter(|lora| lora.dropout.is_none());
        let pairs = plain.map(|lora| (self.matrix(lora.a), self.columns(lora.grad_middle)));
        let branch = |(index, (a, grad_middle)): (usize, Pair)| Product {
            left: grad_middle,
            left_transposed: false,
            right: a,
            right_transposed: false,
            output: grad_input,
            alpha: Alpha::One,
            accumulate: index > 0,
        };
        join(pairs).into_iter().enumerate().map(branch).collect()
    }

    /// `rows += columnsᵀ · x` for each pair, neighbours joined.
    fn weight_gradients(&mut self, x: Matrix, pairs: Vec<Pair>, lane: Lane) -> Result<(), EngineError> {
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
            self.product_on(product, lane)?;
        }
        Ok(())
    }

    fn lora_backward(
        &mut self,
        x: Matrix,
        grad_input: Option<Matrix>,
        projections: &[ProjectionBackward],
        branch_first: bool,
        lanes: [Lane; 2],
    ) -> Result<(), EngineError> {
        let adapted: Vec<(&ProjectionBackward, &LoraBackward)> = projections
            .iter()
            .filter_map(|projection| projection.lora.as_ref().map(|lora| (projection, lora)))
            .collect();
        for (projection, lora) in &adapted {
            let compute = [lora.a, lora.b, lora.middle.buffer, lora.grad_middle.buffer];
            self.expect("linear_backward", &compute, DType::BF16)?;
            self.expect("linear_backward", &[lora.grad_a, lora.grad_b], DType::F32)?;
            let grad_output = self.columns(projection.grad_output);
            let scale = Alpha::Device(self.address(lora.scale));
            let grad_middle = Product {
                left: grad_output,
                left_transposed: false,
                right: self.matrix(lora.b),
                right_transposed: false,
                output: self.columns(lora.grad_middle),
                alpha: scale,
                accumulate: false,
            };
            self.product_on(grad_middle, lanes[0])?;
            let grad_b = Product {
                left: grad_output,
                left_transposed: true,
                right: self.columns(lora.middle),
                right_transposed: false,
                output: self.matrix(lora.grad_b),
                alpha: scale,
                accumulate: true,
            };
            self.product_on(grad_b, lanes[1])?;
        }
        self.order(lanes[0], Lane::Main)?;
        let plain: Vec<&LoraBackward> =
            adapted.iter().map(|(_, lora)| *lora).filter(|lora| lora.dropout.is_none()).collect();
        let pairs = plain.iter().map(|lora| (self.matrix(lora.grad_a), self.columns(lora.grad_middle))).collect();
        self.weight_gradients(x, pairs, lanes[0])?;
        if let Some(grad_input) = grad_input {
            for branch in self.grad_input_branches(grad_input, projections) {
                let accumulate = branch.accumulate || !branch_first;
                self.product(Product { accumulate, ..branch })?;
            }
        }
        for (_, lora) in adapted {
            if let Some(dropout) = lora.dropout {
                self.dropped_backward(x, grad_input, lora, dropout)?;
            }
        }
        Ok(())
    }

    /// `grad_a += gᵀ · drop(x)`, `grad_input += drop'(g · a)`, in chunks of rows that fit the scratch.
    fn dropped_backward(
        &mut self,
        x: Matrix,
        grad_input: Option<Matrix>,
        lora: &LoraBackward,
        dropout: Dropout,
    ) -> Result<(), EngineError> {
        let (a, grad_a, grad_middle) = (self.matrix(lora.a), self.matrix(lora.grad_a), self.columns(lora.grad_middle));
        for (first, rows) in self.row_chunks(x) {
            let grad_middle = grad_middle.slice_rows(first, rows);
            let dropped = self.dropped(x, first, rows, dropout)?;
            self.product(Product {
                left: grad_middle,
                left_transposed: true,
                right: dropped,
                right_transposed: false,
                output: grad_a,
                alpha: Alpha::One,
                accumulate: true,
            })?;
            let Some(grad_input) = grad_input else {
                continue;
            };
            // The dropped input is used up: its place takes g · a.
            self.product(Product {
                left: grad_middle,
                left_transposed: false,
                right: a,
                right_transposed: false,
                output: dropped,
                alpha: Alpha::One,
                accumulate: false,
            })?;
            let to = grad_input.slice_rows(first, rows);
            self.launch(
                "dropout",
                "dropout_backward",
                [rows, x.columns.div_ceil(256), 1],
                256,
                arguments![
                    dropped.pointer,
                    to.pointer,
                    self.address(dropout.key),
                    dropout.stream,
                    first as i32,
                    x.columns as i32,
                    dropout.probability,
                    1.0 / (1.0 - dropout.probability),
                ],
            )?;
        }
        Ok(())
    }

    /// Chunks of rows of a bf16 matrix that fit the scratch: (first, rows).
    fn row_chunks(&self, matrix: Matrix) -> Vec<(usize, usize)> {
        blocks(matrix.rows, self.memory.scratch.bytes as usize / (2 * matrix.columns), 64)
    }

    fn all_fp8(&self, weights: &[BufferId]) -> bool {
        weights.iter().all(|&id| self.memory.stored(id) == DType::Fp8)
    }

    /// Whether the weights are unpacked before products: all of them or none.
    fn all_quantized(&self, weights: &[BufferId]) -> Result<bool, EngineError> {
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
