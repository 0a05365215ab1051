//! Head and cross-entropy, chunk by chunk of tokens, and in parts of the vocabulary where the head is larger than
//! a binding.

use super::Lowering;
use super::product::{Layout, Product, Scaling};
use crate::backend::EngineError;
use crate::backend::wgpu::storage::View;
use crate::program::{DType, Op};

impl Lowering<'_> {
    pub(super) fn linear_cross_entropy(&mut self, op: &Op) -> Result<(), EngineError> {
        let Op::LinearCrossEntropy {
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
        } = op
        else {
            unreachable!("not the loss")
        };
        let (input, weight, logits) = (self.view(*input), self.view(*weight), self.view(*logits));
        let (targets, token_weights, losses) = (self.view(*targets), self.view(*token_weights), self.view(*losses));
        let (scale, loss_sum) = (self.view(*scale), self.view(*loss_sum));
        let grad_input = grad_input.map(|id| self.view(id));
        let grad_weight = grad_weight.map(|id| self.view(id));
        let gradient = grad_input.is_some() || grad_weight.is_some();
        let half = gradient && self.gradient_scale.is_some();
        let chunk = logits.rows.min(input.rows);
        // Chunks of each range, counted from its start.
        let views: Vec<View> = [input].into_iter().chain(grad_input).collect();
        let chunks: Vec<(usize, usize, usize, usize)> = self
            .row_ranges(&views, usize::MAX)
            .into_iter()
            .flat_map(|(start, count)| {
                (0..count).step_by(chunk).map(move |first| (start, count, first, chunk.min(count - first)))
            })
            .collect();
        for (range, count, first, rows) in chunks {
            let chunk_input = input.slice_rows(range, count).skip_rows(first, rows);
            let logits = View { rows, ..logits };
            for (start, part) in self.parts(&weight) {
                let columns = View { start, width: part.rows, ..logits };
                let part = self.unpacked(&part)?;
                self.product(&Product::new(Layout::NT, chunk_input, part, columns))?;
            }
            let mut call = self.reducing("cross_entropy");
            call.flag("GRADIENT", gradient).flag("HALF_GRADIENT", half);
            self.bind(&mut call, "logits", &logits);
            self.bind(&mut call, "targets", &targets);
            self.bind(&mut call, "token_weights", &token_weights);
            self.bind(&mut call, "losses", &losses);
            self.bind(&mut call, "scale", &scale);
            call.number("first_token", range + first).number("vocabulary", logits.stride);
            if let Some(half) = self.gradient_scale {
                call.scaled = true;
                call.float("factor", half.factor);
            }
            if let Some(softcap) = softcap {
                call.constant("SOFTCAP", 1).float("softcap", *softcap);
            }
            self.launch(call, [rows, 1, 1])?;
            if let Some(grad_input) = &grad_input {
                for (start, part) in self.parts(&weight) {
                    let columns = View { start, width: part.rows, ..logits };
                    let part = self.unpacked(&part)?;
                    let target = grad_input.slice_rows(range, count).skip_rows(first, rows);
                    let mut product = Product::new(Layout::NN, columns, part, target);
                    product.accumulate = start > 0;
                    self.product(&product)?;
                }
            }
            if let Some(grad_weight) = &grad_weight {
                for (start, part) in self.parts(grad_weight) {
                    let columns = View { start, width: part.rows, ..logits };
                    let mut product = Product::new(Layout::TN, columns, chunk_input, part);
                    product.accumulate = true;
                    product.scaling = if half { Scaling::unscaled(DType::F16) } else { Scaling::ONE };
                    self.product(&product)?;
                }
            }
        }
        let mut call = self.reducing("loss_sum");
        self.bind(&mut call, "losses", &losses);
        self.bind(&mut call, "token_weights", &token_weights);
        self.bind(&mut call, "scale", &scale);
        self.bind(&mut call, "loss_sum", &loss_sum);
        call.number("tokens", input.rows);
        self.launch(call, [1, 1, 1])
    }
}
