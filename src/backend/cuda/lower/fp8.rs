//! Linear operations on frozen weights in 8-bit floats.
//!
//! Both factors are e4m3 with one scale each. The library takes 8-bit factors only with the summed dimension along
//! their rows: weights lie right for the forward pass; for the gradient of the input they are transposed into scratch,
//! a block of columns at a time. That reads and writes a byte a weight (about an eighth of the product's time at 4,096
//! tokens), where a second copy would double the weights and a product in bf16 would take twice as long.

use super::Lowering;
use super::linear::{blocks, forward_product, join};
use crate::backend::EngineError;
use crate::backend::cuda::command::arguments;
use crate::backend::cuda::driver::unsupported;
use crate::backend::cuda::product::{Alpha, Matrix, Product};
use crate::program::DType;

/// Blocks that look for the largest magnitude.
const LARGEST_BLOCKS: usize = 512;
/// Blocks that quantize.
const QUANTIZE_BLOCKS: usize = 1056;

/// A launch on the way to a product.
pub(super) enum Part {
    /// Rows of bf16 as 8-bit floats.
    Quantize {
        from: Matrix,
        to: Matrix,
    },
    /// Columns of a weight from `first`, as rows of `to`.
    Transpose {
        weight: Matrix,
        first: usize,
        to: Matrix,
    },
    Product(Product),
}

impl Lowering<'_> {
    /// `columns (+)= x · rowsᵀ` for each pair, neighbours joined.
    pub(super) fn fp8_forward(
        &self,
        x: Matrix,
        pairs: Vec<(Matrix, Matrix)>,
        accumulate: bool,
    ) -> Result<Vec<Part>, EngineError> {
        let pairs = join(pairs);
        let mut parts = Vec::new();
        for (first, rows) in self.operand_rows(x)? {
            let (from, to) = (x.slice_rows(first, rows), self.operand(rows, x.columns)?);
            parts.push(Part::Quantize { from, to });
            for &(weight, output) in &pairs {
                fits_products(weight)?;
                parts.push(Part::Product(forward_product(to, weight, output.slice_rows(first, rows), accumulate)));
            }
        }
        Ok(parts)
    }

    /// `grad_input (+)= Σ columns · rows`, neighbours joined.
    pub(super) fn fp8_grad_input(
        &self,
        grad_input: Matrix,
        pairs: Vec<(Matrix, Matrix)>,
        accumulate: bool,
    ) -> Result<Vec<Part>, EngineError> {
        let mut parts = Vec::new();
        for (index, (weight, grad_output)) in join(pairs).into_iter().enumerate() {
            fits_products(weight)?;
            let row_blocks = self.operand_rows(grad_output)?;
            let fitting = self.memory.fp8()?.weight_bytes as usize / weight.rows;
            let mut quantized = None;
            for (first_column, columns) in blocks(weight.columns, fitting, 64) {
                let to = Matrix::new(self.memory.fp8()?.weight, DType::Fp8, columns, weight.rows);
                let transposed = Matrix { scale: weight.scale, ..to };
                parts.push(Part::Transpose { weight, first: first_column, to: transposed });
                for &(first, rows) in &row_blocks {
                    let to = self.operand(rows, grad_output.columns)?;
                    if quantized.replace((first, rows)) != Some((first, rows)) {
                        parts.push(Part::Quantize { from: grad_output.slice_rows(first, rows), to });
                    }
                    parts.push(Part::Product(Product {
                        left: to,
                        left_transposed: false,
                        right: transposed,
                        right_transposed: true,
                        output: grad_input.slice_rows(first, rows).slice_columns(first_column, columns),
                        alpha: Alpha::One,
                        accumulate: accumulate || index > 0,
                    }));
                }
            }
        }
        Ok(parts)
    }

    pub(super) fn run_fp8(&mut self, parts: Vec<Part>) -> Result<(), EngineError> {
        let scratch = self.memory.fp8()?;
        for part in parts {
            match part {
                Part::Quantize { from, to } => {
                    let largest = LARGEST_BLOCKS.min(from.rows);
                    let arguments = arguments![
                        from.pointer,
                        from.stride as i64,
                        from.rows as i32,
                        from.columns as i32,
                        scratch.largest,
                    ];
                    self.launch("fp8", "fp8_largest", [largest, 1, 1], 256, arguments)?;
                    let arguments = arguments![
                        from.pointer,
                        from.stride as i64,
                        from.rows as i32,
                        from.columns as i32,
                        scratch.largest,
                        largest as i32,
                        to.pointer,
                        to.scale,
                    ];
                    self.launch("fp8", "fp8_quantize", [QUANTIZE_BLOCKS.min(from.rows), 1, 1], 256, arguments)?;
                }
                Part::Transpose { weight, first, to } => {
                    let arguments = arguments![
                        weight.pointer,
                        weight.rows as i32,
                        weight.stride as i64,
                        first as i64,
                        to.rows as i32,
                        to.pointer,
                    ];
                    let grid = [to.rows.div_ceil(64), weight.rows.div_ceil(64), 1];
                    self.launch("fp8", "fp8_transpose", grid, 256, arguments)?;
                }
                Part::Product(product) => self.product(product)?,
            }
        }
        Ok(())
    }

    /// Blocks of rows that fit the scratch: (first, rows).
    fn operand_rows(&self, matrix: Matrix) -> Result<Vec<(usize, usize)>, EngineError> {
        if !matrix.columns.is_multiple_of(16) || !matrix.stride.is_multiple_of(8) || !matrix.pointer.is_multiple_of(16)
        {
            return Err(unsupported(format!("8-bit products with rows of {} that start anywhere", matrix.columns)));
        }
        Ok(blocks(matrix.rows, self.memory.fp8()?.operand_bytes as usize / matrix.columns, 64))
    }

    /// Where the quantized factor of a product lies.
    fn operand(&self, rows: usize, columns: usize) -> Result<Matrix, EngineError> {
        let scratch = self.memory.fp8()?;
        Ok(Matrix { scale: scratch.scale, ..Matrix::new(scratch.operand, DType::Fp8, rows, columns) })
    }
}

/// The products of a list of parts.
pub(super) fn products(parts: Vec<Part>) -> impl Iterator<Item = Product> {
    parts.into_iter().filter_map(|part| match part {
        Part::Product(product) => Some(product),
        _ => None,
    })
}

fn fits_products(weight: Matrix) -> Result<(), EngineError> {
    if weight.rows.is_multiple_of(16) && weight.columns.is_multiple_of(16) {
        return Ok(());
    }
    Err(unsupported(format!("8-bit weights of {} x {}, which are not multiples of 16", weight.rows, weight.columns)))
}
