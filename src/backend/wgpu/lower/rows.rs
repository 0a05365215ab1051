//! Operations that treat rows one by one: embedding, norms, rotary positions, gated units.

use super::{Call, Lowering, MOST_WORKGROUPS};
use crate::backend::EngineError;
use crate::backend::wgpu::storage::View;
use crate::program::{Activation, Direction, Op};

impl Lowering<'_> {
    pub(super) fn rows(&mut self, op: &Op) -> Result<(), EngineError> {
        match op {
            Op::Embedding { ids, weight, output, scale } => {
                let (ids, weight, output) = (self.view(*ids), self.view(*weight), self.view(*output));
                for (first_row, part) in self.parts(&weight) {
                    let part = self.unpacked(&part)?;
                    for (first, count) in self.row_ranges(&[ids, output], MOST_WORKGROUPS) {
                        let mut call = self.call("embedding");
                        self.bind(&mut call, "ids", &ids.slice_rows(first, count));
                        self.bind(&mut call, "weight", &part);
                        self.bind(&mut call, "output", &output.slice_rows(first, count));
                        call.number("first", first_row).number("rows", part.rows).number("columns", part.stride);
                        call.float("scale", *scale);
                        self.launch(call, [count, 1, 1])?;
                    }
                }
                Ok(())
            }
            Op::EmbeddingBackward { ids, grad_output, grad_weight, scale } => {
                let (ids, grad_output, weight) = (self.view(*ids), self.view(*grad_output), self.view(*grad_weight));
                for (first_row, part) in self.parts(&weight) {
                    for (first, count) in self.row_ranges(&[ids, grad_output], MOST_WORKGROUPS) {
                        let mut call = self.call("embedding_backward");
                        self.bind(&mut call, "ids", &ids.slice_rows(first, count));
                        self.bind(&mut call, "grad_output", &grad_output.slice_rows(first, count));
                        self.bind(&mut call, "grad_weight", &part);
                        let unscale = self.bind_unscale(&mut call, grad_output.dtype);
                        call.number("first", first_row).number("rows", part.rows).number("columns", part.stride);
                        call.number("tokens", count).float("scale", *scale * unscale);
                        call.iterations((part.stride.div_ceil(128) + 1) * (count + 2));
                        self.launch(call, [count, 1, 1])?;
                    }
                }
                Ok(())
            }
            Op::RmsNorm { input, residual, sum, weight, output, inverse_rms, epsilon, weight_offset } => {
                self.choose_sums(op);
                let [input, output, inverse_rms] = [input, output, inverse_rms].map(|id| self.view(*id));
                let sums = residual.zip(*sum).map(|(residual, sum)| [self.view(residual), self.view(sum)]);
                let views: Vec<View> =
                    [input, output, inverse_rms].into_iter().chain(sums.into_iter().flatten()).collect();
                for (first, count) in self.row_ranges(&views, MOST_WORKGROUPS) {
                    let mut call = self.reducing("rms_norm");
                    self.bind(&mut call, "input", &input.slice_rows(first, count));
                    if let Some([residual, sum]) = sums {
                        call.constant("RESIDUAL", 1);
                        self.bind(&mut call, "residual", &residual.slice_rows(first, count));
                        self.bind(&mut call, "sum", &sum.slice_rows(first, count));
                    }
                    self.bind(&mut call, "weight", &self.view(*weight));
                    self.bind(&mut call, "output", &output.slice_rows(first, count));
                    self.bind(&mut call, "inverse_rms", &inverse_rms.slice_rows(first, count));
                    call.number("columns", input.stride).float("epsilon", *epsilon);
                    call.float("weight_offset", *weight_offset);
                    self.launch(call, [count, 1, 1])?;
                }
                Ok(())
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
                let (grad, input, inverse) = (self.view(*grad_output), self.view(*input), self.view(*inverse_rms));
                let (grad_input, residual) = (self.view(*grad_input), residual_grad.map(|id| self.view(id)));
                if let Some(grad_weight) = grad_weight {
                    let grad_weight = self.view(*grad_weight);
                    self.column_sum(&grad, Some((&input, &inverse)), &grad_weight)?;
                }
                let views: Vec<View> = [grad, input, inverse, grad_input].into_iter().chain(residual).collect();
                for (first, count) in self.row_ranges(&views, MOST_WORKGROUPS) {
                    let mut call = self.reducing("rms_norm_backward");
                    self.bind(&mut call, "grad_output", &grad.slice_rows(first, count));
                    self.bind(&mut call, "input", &input.slice_rows(first, count));
                    self.bind(&mut call, "weight", &self.view(*weight));
                    self.bind(&mut call, "inverse_rms", &inverse.slice_rows(first, count));
                    if let Some(residual) = residual {
                        call.constant("RESIDUAL", 1);
                        self.bind(&mut call, "residual_grad", &residual.slice_rows(first, count));
                    }
                    self.bind(&mut call, "grad_input", &grad_input.slice_rows(first, count));
                    call.number("columns", input.stride).float("weight_offset", *weight_offset);
                    self.launch(call, [count, 1, 1])?;
                }
                Ok(())
            }
            Op::Rope { tensor, positions, inverse_frequency, head_dim, rotary_dim, scale, direction } => {
                let (tensor, positions) = (self.columns(tensor), self.view(*positions));
                for (first, count) in self.row_ranges(&[tensor, positions], MOST_WORKGROUPS) {
                    let mut call = self.call("rope");
                    self.bind(&mut call, "tensor", &tensor.slice_rows(first, count));
                    self.bind(&mut call, "positions", &positions.slice_rows(first, count));
                    self.bind(&mut call, "inverse_frequency", &self.view(*inverse_frequency));
                    call.number("stride", tensor.stride).number("start", tensor.start);
                    call.number("heads", tensor.width / head_dim).number("head_dim", *head_dim);
                    call.number("rotary", *rotary_dim).float("scale", *scale);
                    call.float("sign", if *direction == Direction::Forward { 1.0 } else { -1.0 });
                    self.launch(call, [count, 1, 1])?;
                }
                Ok(())
            }
            Op::Glu { gate_up, output, activation } => {
                let (gate_up, output) = (self.view(*gate_up), self.view(*output));
                for (first, count) in self.row_ranges(&[output, gate_up], MOST_WORKGROUPS) {
                    let (mut call, groups) = self.gated("glu", &output, *activation);
                    let vector = output.stride.is_multiple_of(4);
                    self.bind_as(&mut call, "gate_up", &gate_up.slice_rows(first, count), vector);
                    self.bind_as(&mut call, "output", &output.slice_rows(first, count), vector);
                    self.launch(call, [groups, count, 1])?;
                }
                Ok(())
            }
            Op::GluBackward { grad_output, gate_up, grad_gate_up, activation } => {
                let [grad, gate_up, result] = [grad_output, gate_up, grad_gate_up].map(|id| self.view(*id));
                for (first, count) in self.row_ranges(&[grad, gate_up, result], MOST_WORKGROUPS) {
                    let (mut call, groups) = self.gated("glu_backward", &grad, *activation);
                    let vector = grad.stride.is_multiple_of(4);
                    self.bind_as(&mut call, "grad_output", &grad.slice_rows(first, count), vector);
                    self.bind_as(&mut call, "gate_up", &gate_up.slice_rows(first, count), vector);
                    self.bind_as(&mut call, "grad_gate_up", &result.slice_rows(first, count), vector);
                    self.launch(call, [groups, count, 1])?;
                }
                Ok(())
            }
            Op::GatherRows { input, rows, output } => {
                let (input, rows) = (self.view(*input), self.view(*rows));
                let mut call = self.call("gather_rows");
                self.bind(&mut call, "input", &input);
                self.bind(&mut call, "rows", &rows);
                self.bind(&mut call, "output", &self.view(*output));
                call.number("rows", input.rows).number("columns", input.stride);
                self.launch(call, [rows.elements(), 1, 1])
            }
            _ => unreachable!("not an operation on rows"),
        }
    }

    fn gated(&self, file: &'static str, narrow: &View, activation: Activation) -> (Call, usize) {
        let width = if narrow.stride.is_multiple_of(4) { 4 } else { 1 };
        let mut call = self.call(file);
        call.flag("SILU", activation == Activation::Silu).flag("VECTOR", width == 4).constant("WIDTH", width as u32);
        call.number("columns", narrow.stride);
        (call, narrow.stride.div_ceil(256 * width))
    }

    /// Parts of a table that fit a binding and lie in one piece, each with its first row; of a quantized one, once they are
    /// unpacked.
    pub(super) fn parts(&self, table: &View) -> Vec<(usize, View)> {
        let quantized = table.dtype.is_quantized();
        let dtype = if quantized { self.unpacked_type() } else { table.dtype };
        let row = dtype.bytes(&[1, table.stride]).max(1);
        let piece = self.cut(table).map_or(table.rows, |cut| cut.rows);
        let most = match row * table.rows as u64 <= self.facts.limits.binding {
            true => table.rows,
            false => ((self.facts.limits.binding / row) as usize / 128 * 128).max(128),
        };
        let mut parts = Vec::new();
        let mut first = 0;
        while first < table.rows {
            let count = most.min(table.rows - first).min(piece - first % piece);
            parts.push((first, if quantized { table.skip_rows(first, count) } else { table.slice_rows(first, count) }));
            first += count;
        }
        parts
    }

    /// `target[column] += Σ_row grad[row, column]`, with `norm` times `input · inverse_rms`.
    pub(super) fn column_sum(
        &mut self,
        grad: &View,
        norm: Option<(&View, &View)>,
        target: &View,
    ) -> Result<(), EngineError> {
        let target = View { rows: 1, stride: grad.width, start: 0, width: grad.width, ..*target };
        let views: Vec<View> = [*grad].into_iter().chain(norm.into_iter().flat_map(|(i, r)| [*i, *r])).collect();
        for (first, count) in self.row_ranges(&views, usize::MAX) {
            let part_rows = count.div_ceil(64).max(16);
            let layers = count.div_ceil(part_rows);
            let parts = self.scratch(layers * grad.width);
            let mut call = self.call("column_sum");
            self.bind(&mut call, "grad", &grad.slice_rows(first, count));
            if let Some((input, inverse)) = norm {
                call.constant("NORM", 1);
                self.bind(&mut call, "input", &input.slice_rows(first, count));
                self.bind(&mut call, "inverse_rms", &inverse.slice_rows(first, count));
            }
            self.bind(&mut call, "parts", &parts);
            call.number("rows", count).number("columns", grad.width).number("part_rows", part_rows);
            call.number("stride", grad.stride).number("start", grad.start);
            self.launch(call, [grad.width.div_ceil(64), layers, 1])?;
            self.partial_sum(&parts, layers, &target, &super::product::Scaling::unscaled(grad.dtype), true)?;
        }
        Ok(())
    }
}
