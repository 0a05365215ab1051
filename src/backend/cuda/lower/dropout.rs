//! LoRA branches that drop elements of their input: what is left of it lies in scratch, a chunk of rows at a time.

use super::Lowering;
use super::linear::blocks;
use crate::backend::EngineError;
use crate::backend::cuda::command::arguments;
use crate::backend::cuda::product::{Alpha, Matrix, Product};
use crate::program::{DType, Dropout, Lora, LoraBackward};

impl Lowering<'_> {
    /// `middle = drop(x) · aᵀ`, in chunks of rows that fit the scratch.
    pub(super) fn dropped_middle(&mut self, x: Matrix, lora: &Lora, dropout: Dropout) -> Result<(), EngineError> {
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
        self.drop_rows("dropout", x.slice_rows(first, rows), to, first, dropout)?;
        Ok(to)
    }

    /// A kernel of dropout.cu from rows to as many others, the first of which is row `first` of the micro-batch.
    fn drop_rows(
        &mut self,
        entry: &str,
        from: Matrix,
        to: Matrix,
        first: usize,
        dropout: Dropout,
    ) -> Result<(), EngineError> {
        let arguments = arguments![
            from.pointer,
            to.pointer,
            self.address(dropout.key),
            dropout.stream,
            first as i32,
            from.columns as i32,
            dropout.probability,
            1.0 / (1.0 - dropout.probability),
        ];
        self.launch("dropout", entry, [from.rows, from.columns.div_ceil(256), 1], 256, arguments)
    }

    /// `grad_a += gᵀ · drop(x)`, `grad_input += drop'(g · a)`, in chunks of rows that fit the scratch.
    pub(super) fn dropped_backward(
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
            self.drop_rows("dropout_backward", dropped, grad_input.slice_rows(first, rows), first, dropout)?;
        }
        Ok(())
    }

    /// Chunks of rows of a bf16 matrix that fit the scratch: (first, rows).
    fn row_chunks(&self, matrix: Matrix) -> Vec<(usize, usize)> {
        blocks(matrix.rows, self.memory.scratch.bytes as usize / (2 * matrix.columns), 64)
    }
}
