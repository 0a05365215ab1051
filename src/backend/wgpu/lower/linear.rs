//! Linear layers and their gradients. Projections that lie side by side in memory run as one product.

use super::Lowering;
use super::product::{DropSite, Layout, Product, Scaling, Second, Segments};
use crate::backend::EngineError;
use crate::backend::wgpu::storage::View;
use crate::program::{BufferId, Columns, Dropout, Projection, ProjectionBackward};

/// One projection, or several that run as one.
struct Run {
    /// `[N, K]`, rows of all.
    weight: View,
    bias: Option<View>,
    /// `[T, N]`: output, or its gradient.
    output: View,
    lora: Option<Branch>,
    /// First column of each projection after the first.
    starts: Vec<usize>,
    /// Numbers of the projections.
    members: std::ops::Range<usize>,
}

#[derive(Clone, Copy)]
struct Branch {
    /// `[r, K]`, rows of all.
    a: View,
    /// `[N, r]`, rows of all.
    b: View,
    /// `[T, r]` columns of all.
    middle: View,
    rank: usize,
    scale: View,
    dropout: Option<Dropout>,
}

/// Projections are merged only where each starts at a tile.
const MERGE_COLUMNS: usize = 64;

impl Run {
    /// Takes `next` in, when it follows in every buffer.
    fn extend(&mut self, next: &Run, binding: u64) -> bool {
        let beside = |left: &View, right: &View| {
            left.place == right.place
                && left.offset == right.offset
                && left.stride == right.stride
                && left.start + left.width == right.start
        };
        let bias = match (&self.bias, &next.bias) {
            (None, None) => true,
            (Some(left), Some(right)) => left.is_followed_by(right),
            _ => false,
        };
        let lora = match (&self.lora, &next.lora) {
            (None, None) => true,
            (Some(left), Some(right)) => {
                left.rank == right.rank
                    && left.scale == right.scale
                    && left.dropout.is_none()
                    && right.dropout.is_none()
                    && left.a.is_followed_by(&right.a)
                    && left.b.is_followed_by(&right.b)
                    && beside(&left.middle, &right.middle)
            }
            _ => false,
        };
        let fits = self.weight.bytes() + next.weight.bytes() <= binding
            && self.starts.len() < 3
            && !self.weight.dtype.is_quantized();
        let tiled = self.output.width.is_multiple_of(MERGE_COLUMNS) && next.output.width.is_multiple_of(MERGE_COLUMNS);
        if !(bias
            && lora
            && fits
            && tiled
            && self.weight.is_followed_by(&next.weight)
            && beside(&self.output, &next.output))
        {
            return false;
        }
        self.starts.push(self.output.width);
        self.weight.rows += next.weight.rows;
        self.output.width += next.output.width;
        if let (Some(left), Some(right)) = (&mut self.bias, &next.bias) {
            left.rows += right.rows;
        }
        if let (Some(left), Some(right)) = (&mut self.lora, &next.lora) {
            left.a.rows += right.a.rows;
            left.b.rows += right.b.rows;
            left.middle.width += right.middle.width;
        }
        self.members.end = next.members.end;
        true
    }

    /// The part of it with these rows of activations.
    fn rows(&self, first: usize, count: usize) -> Run {
        Run {
            output: self.output.slice_rows(first, count),
            lora: self.lora.map(|lora| Branch { middle: lora.middle.slice_rows(first, count), ..lora }),
            starts: self.starts.clone(),
            members: self.members.clone(),
            ..*self
        }
    }

    /// What has a row a token.
    fn views(&self, input: View) -> Vec<View> {
        [input, self.output].into_iter().chain(self.lora.map(|lora| lora.middle)).collect()
    }

    fn segments(&self, rows: bool) -> Option<Segments> {
        let rank = self.lora.as_ref()?.rank;
        if self.starts.is_empty() {
            return None;
        }
        let mut starts = [u32::MAX as usize; 3];
        starts[..self.starts.len()].copy_from_slice(&self.starts);
        Some(Segments { rank, starts, rows })
    }

    /// Parts whose weights fit a binding: columns of the output each.
    fn parts(&self, lowering: &Lowering<'_>) -> Vec<Run> {
        let parts = lowering.parts(&self.weight);
        let single = parts.len() == 1;
        parts
            .into_iter()
            .map(|(first, weight)| Run {
                weight,
                bias: self.bias.map(|bias| bias.slice_rows(first, weight.rows)),
                output: View { start: self.output.start + first, width: weight.rows, ..self.output },
                lora: self.lora.map(|lora| Branch { b: lora.b.slice_rows(first, weight.rows), ..lora }),
                starts: if single { self.starts.clone() } else { Vec::new() },
                members: self.members.clone(),
            })
            .collect()
    }
}

fn merge(runs: Vec<Run>, binding: u64) -> Vec<Run> {
    let mut merged: Vec<Run> = Vec::new();
    for run in runs {
        if !merged.last_mut().is_some_and(|last| last.extend(&run, binding)) {
            merged.push(run);
        }
    }
    merged
}

impl Lowering<'_> {
    pub(super) fn linear(&mut self, input: BufferId, projections: &[Projection]) -> Result<(), EngineError> {
        let input = self.view(input);
        let runs = projections.iter().enumerate().map(|(number, projection)| Run {
            weight: self.view(projection.weight),
            bias: projection.bias.map(|bias| self.view(bias)),
            output: self.columns(&projection.output),
            lora: projection.lora.as_ref().map(|lora| Branch {
                a: self.view(lora.a),
                b: self.view(lora.b),
                middle: self.columns(&lora.middle),
                rank: lora.middle.width,
                scale: self.view(lora.scale),
                dropout: lora.dropout.filter(|dropout| dropout.probability > 0.0),
            }),
            starts: Vec::new(),
            members: number..number + 1,
        });
        let runs = merge(runs.collect(), self.facts.limits.binding);
        for run in &runs {
            let ranges = self.row_ranges(&run.views(input), usize::MAX);
            if let Some(lora) = &run.lora {
                for &(first, count) in &ranges {
                    let target = lora.middle.slice_rows(first, count);
                    let mut middle = Product::new(Layout::NT, input.slice_rows(first, count), lora.a, target);
                    middle.dropout = lora.dropout.map(|dropout| (DropSite::A, dropout));
                    middle.first_row = first;
                    self.product(&middle)?;
                }
            }
            for part in run.parts(self) {
                let (layout, weight) = self.weight_in_place(input, &part.weight, part.output)?;
                for &(first, count) in &ranges {
                    let part = part.rows(first, count);
                    let mut product = Product::new(layout, input.slice_rows(first, count), weight, part.output);
                    product.bias = part.bias;
                    product.segments = part.segments(false);
                    product.second = part.lora.as_ref().map(|lora| Second {
                        a: lora.middle,
                        b: lora.b,
                        b_by_k: true,
                        k: lora.rank,
                        scale: Some(lora.scale),
                    });
                    self.product(&product)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn linear_backward(
        &mut self,
        input: BufferId,
        grad_input: Option<BufferId>,
        projections: &[ProjectionBackward],
    ) -> Result<(), EngineError> {
        let input = self.view(input);
        let runs = projections.iter().enumerate().map(|(number, projection)| Run {
            weight: self.view(projection.weight),
            bias: None,
            output: self.columns(&projection.grad_output),
            lora: projection.lora.as_ref().map(|lora| Branch {
                a: self.view(lora.a),
                b: self.view(lora.b),
                middle: self.columns(&lora.grad_middle),
                rank: lora.middle.width,
                scale: self.view(lora.scale),
                dropout: lora.dropout.filter(|dropout| dropout.probability > 0.0),
            }),
            starts: Vec::new(),
            members: number..number + 1,
        });
        let runs = merge(runs.collect(), self.facts.limits.binding);
        let grad_input = grad_input.map(|id| self.view(id));
        let views = |run: &Run| -> Vec<View> { run.views(input).into_iter().chain(grad_input).collect() };
        let ranges = self.row_ranges(&runs.iter().flat_map(views).collect::<Vec<View>>(), usize::MAX);
        for projection in projections {
            for &range in &ranges {
                self.parameter_gradients(&input, projection, range)?;
            }
        }
        let mut written = false;
        for run in &runs {
            if let Some(lora) = &run.lora {
                for &range in &ranges {
                    self.lora_gradients(&input, run, lora, &projections[run.members.clone()], range)?;
                }
            }
            let Some(grad_input) = grad_input else { continue };
            for (number, part) in run.parts(self).iter().enumerate() {
                let weight = self.unpacked(&part.weight)?;
                for &(first, count) in &ranges {
                    let part = part.rows(first, count);
                    let target = grad_input.slice_rows(first, count);
                    let mut product = Product::new(Layout::NN, part.output, weight, target);
                    product.accumulate = written;
                    if let Some(lora) = part.lora.filter(|lora| number == 0 && lora.dropout.is_none()) {
                        let (k, b_by_k) = (lora.middle.width, false);
                        product.second = Some(Second { a: lora.middle, b: lora.a, b_by_k, k, scale: None });
                    }
                    self.product(&product)?;
                }
                written = true;
            }
            let Some(lora) = run.lora.filter(|lora| lora.dropout.is_some()) else { continue };
            for &(first, count) in &ranges {
                let target = grad_input.slice_rows(first, count);
                let mut product = Product::new(Layout::NN, lora.middle.slice_rows(first, count), lora.a, target);
                product.accumulate = true;
                product.dropout = lora.dropout.map(|dropout| (DropSite::C, dropout));
                product.first_row = first;
                self.product(&product)?;
            }
        }
        Ok(())
    }

    /// Gradients of a trained weight and bias, from a range of rows.
    fn parameter_gradients(
        &mut self,
        input: &View,
        projection: &ProjectionBackward,
        (first_row, count): (usize, usize),
    ) -> Result<(), EngineError> {
        let grad_output = self.columns(&projection.grad_output).slice_rows(first_row, count);
        let input = input.slice_rows(first_row, count);
        if let Some(grad_weight) = projection.grad_weight {
            for (first, part) in self.parts(&self.view(grad_weight)) {
                let columns = View { start: grad_output.start + first, width: part.rows, ..grad_output };
                let mut product = Product::new(Layout::TN, columns, input, part);
                product.accumulate = true;
                product.scaling = Scaling::unscaled(grad_output.dtype);
                self.product(&product)?;
            }
        }
        if let Some(grad_bias) = projection.grad_bias {
            self.column_sum(&grad_output, None, &self.view(grad_bias))?;
        }
        Ok(())
    }

    /// `g = scale · grad_output · b`, `grad_b += scale · grad_outputᵀ · middle`, `grad_a += gᵀ · drop(input)`, for a range of
    /// rows.
    fn lora_gradients(
        &mut self,
        input: &View,
        run: &Run,
        lora: &Branch,
        members: &[ProjectionBackward],
        (first, count): (usize, usize),
    ) -> Result<(), EngineError> {
        let columns = |lowering: &Self, columns: &Columns| lowering.columns(columns).slice_rows(first, count);
        let (input, output) = (input.slice_rows(first, count), run.output.slice_rows(first, count));
        let mut grads: Vec<(View, View, View, View)> = Vec::new();
        for projection in members {
            let Some(own) = &projection.lora else { continue };
            let grad_output = columns(self, &projection.grad_output);
            let mut product = Product::new(Layout::NN, grad_output, self.view(own.b), columns(self, &own.grad_middle));
            product.scaling = Scaling::by(lora.scale);
            self.product(&product)?;
            let own = (self.view(own.grad_a), self.view(own.grad_b), columns(self, &own.middle), grad_output);
            grads.push(own);
        }
        let Some(&(mut grad_a, mut grad_b, middle, _)) = grads.first() else { return Ok(()) };
        let follow = grads.windows(2).all(|pair| {
            pair[0].0.is_followed_by(&pair[1].0)
                && pair[0].1.is_followed_by(&pair[1].1)
                && pair[0].2.start + pair[0].2.width == pair[1].2.start
                && pair[0].2.offset == pair[1].2.offset
                && pair[0].2.place == pair[1].2.place
        });
        let scaling = |grad: &View| Scaling { gradient: Some(grad.dtype), ..Scaling::by(lora.scale) };
        if follow {
            for next in &grads[1..] {
                grad_a.rows += next.0.rows;
                grad_b.rows += next.1.rows;
            }
            let mut product = Product::new(Layout::TN, output, middle, grad_b);
            product.segments = run.segments(true);
            product.accumulate = true;
            product.scaling = scaling(&output);
            self.product(&product)?;
            let mut product = Product::new(Layout::TN, lora.middle.slice_rows(first, count), input, grad_a);
            product.accumulate = true;
            product.scaling = Scaling::unscaled(lora.middle.dtype);
            product.dropout = lora.dropout.map(|dropout| (DropSite::B, dropout));
            product.first_row = first;
            return self.product(&product);
        }
        for (projection, (grad_a, grad_b, middle, grad_output)) in members.iter().zip(grads) {
            let Some(own) = &projection.lora else { continue };
            let mut product = Product::new(Layout::TN, grad_output, middle, grad_b);
            product.accumulate = true;
            product.scaling = scaling(&grad_output);
            self.product(&product)?;
            let grad_middle = columns(self, &own.grad_middle);
            let mut product = Product::new(Layout::TN, grad_middle, input, grad_a);
            product.accumulate = true;
            product.scaling = Scaling::unscaled(grad_middle.dtype);
            product.dropout = lora.dropout.map(|dropout| (DropSite::B, dropout));
            product.first_row = first;
            self.product(&product)?;
        }
        Ok(())
    }

    /// How `output = input · weightᵀ` is multiplied, and the weight as it is then read. On cooperative matrices a product is
    /// faster where tiles read both operands row by row of the depth, which a quantized weight allows: it is unpacked the
    /// other way round.
    fn weight_in_place(&mut self, input: View, weight: &View, output: View) -> Result<(Layout, View), EngineError> {
        if self.transposes(weight) {
            let transposed = self.transposed(weight);
            if self.is_cooperative(&Product::new(Layout::NN, input, transposed, output)) {
                self.dequantize_transposed(weight, &transposed)?;
                return Ok((Layout::NN, transposed));
            }
        }
        Ok((Layout::NT, self.unpacked(weight)?))
    }

    /// A weight that kernels can read: itself, or unpacked into scratch.
    pub(super) fn unpacked(&mut self, weight: &View) -> Result<View, EngineError> {
        if !weight.dtype.is_quantized() {
            return Ok(*weight);
        }
        self.dequantize(weight)
    }
}
