//! Head and cross-entropy in chunks of tokens.

use super::{Lowering, vector};
use crate::backend::EngineError;
use crate::backend::cuda::command::arguments;
use crate::backend::cuda::driver::unsupported;
use crate::backend::cuda::product::{Alpha, Matrix, Product};
use crate::program::{DType, Op};

impl Lowering<'_> {
    pub(super) fn head(&mut self, op: &Op) -> Result<(), EngineError> {
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
            return Ok(());
        };
        self.expect("linear_cross_entropy", &[*input, *weight], DType::BF16)?;
        self.expect("linear_cross_entropy", grad_input.as_slice(), DType::BF16)?;
        let backward = grad_input.is_some() || grad_weight.is_some();
        let (input, weight) = (self.matrix(*input), self.matrix(*weight));
        let mut logits = self.matrix(*logits);
        if backward {
            // The gradient of the logits takes their place and is a factor of bf16 products.
            logits.dtype = DType::BF16;
        }
        if !matches!(logits.dtype, DType::BF16 | DType::F32) {
            return Err(unsupported(format!("logits in {}", logits.dtype.name())));
        }
        let vocabulary = logits.columns;
        let width = vector(vocabulary, &[logits.pointer]);
        let entry = format!("cross_entropy_{width}_{}", logits.dtype.name());
        let mut first = 0;
        while first < input.rows {
            let rows = logits.rows.min(input.rows - first);
            let chunk = logits.slice_rows(0, rows);
            let chunk_input = input.slice_rows(first, rows);
            self.product(Product {
                left: chunk_input,
                left_transposed: false,
                right: weight,
                right_transposed: true,
                output: chunk,
                alpha: Alpha::One,
                accumulate: false,
            })?;
            let offset = 4 * first as u64;
            let arguments = arguments![
                chunk.pointer,
                chunk.stride as i64,
                self.address(*targets) + offset,
                self.address(*token_weights) + offset,
                self.address(*scale),
                self.address(*losses) + offset,
                vocabulary as i32,
                softcap.unwrap_or(0.0),
                i32::from(backward),
            ];
            self.launch("cross_entropy", &entry, [rows, 1, 1], 1024, arguments)?;
            if let Some(grad_input) = grad_input {
                let output: Matrix = self.matrix(*grad_input).slice_rows(first, rows);
                self.product(Product {
                    left: chunk,
                    left_transposed: false,
                    right: weight,
                    right_transposed: false,
                    output,
                    alpha: Alpha::One,
                    accumulate: false,
                })?;
            }
            if let Some(grad_weight) = grad_weight {
                let output = self.matrix(*grad_weight);
                self.product(Product {
                    left: chunk,
                    left_transposed: true,
                    right: chunk_input,
                    right_transposed: false,
                    output,
                    alpha: Alpha::One,
                    accumulate: true,
                })?;
            }
            first += rows;
        }
        let arguments = arguments![
            self.address(*losses),
            self.address(*targets),
            self.address(*token_weights),
            self.address(*scale),
            self.address(*loss_sum),
            input.rows as i32,
        ];
        self.launch("cross_entropy", "loss_sum", [1, 1, 1], 1024, arguments)
    }
}
