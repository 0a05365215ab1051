//! Frozen weights in 4-bit floats or 8-bit integers: unpacked into scratch, a part that fits at a time, before the product
//! that takes them.

use super::Lowering;
use super::linear::{blocks, forward_product};
use crate::backend::EngineError;
use crate::backend::cuda::command::arguments;
use crate::backend::cuda::driver::unsupported;
use crate::backend::cuda::memory::{Int8Parts, Nf4Parts};
use crate::backend::cuda::product::Matrix;
use crate::program::{BufferId, DType};

/// Rows that a block of `nf4_dequantize` and `int8_dequantize` works through.
const ROWS_OF_BLOCK: usize = 8;

impl Lowering<'_> {
    /// Unpacks a block of a quantized weight to rows `stride` elements apart from `to` on.
    pub(super) fn unpack(
        &mut self,
        weight: BufferId,
        (first_row, rows): (usize, usize),
        (first_column, columns): (usize, usize),
        (to, stride): (u64, usize),
    ) -> Result<(), EngineError> {
        let length = self.width(weight);
        if self.memory.stored(weight) == DType::Int8 {
            let parts =
                Int8Parts::at(self.address(weight), (self.rows(weight) * length) as u64, self.rows(weight) as u64);
            let whole = |columns: usize| columns.is_multiple_of(8);
            let width = if whole(length) && whole(first_column) && whole(columns) { 8 } else { 1 };
            let arguments = arguments![
                parts.codes,
                parts.scales,
                to,
                stride as i64,
                length as i64,
                first_row as i64,
                first_column as i64,
                columns as i32,
                rows as i32,
            ];
            let grid = [columns.div_ceil(width * 128), rows.div_ceil(ROWS_OF_BLOCK), 1];
            return self.launch("int8", &format!("int8_dequantize_{width}"), grid, 128, arguments);
        }
        let parts = Nf4Parts::at(self.address(weight), (self.rows(weight) * length) as u64);
        let tables = self.tables.pointer();
        if length.is_multiple_of(64) && first_column.is_multiple_of(64) && columns.is_multiple_of(64) {
            let arguments = arguments![
                parts.codes,
                parts.scale_codes,
                parts.second_scales,
                parts.offset,
                tables,
                to,
                stride as i64,
                length as i64,
                first_row as i64,
                first_column as i64,
                columns as i32,
                rows as i32,
            ];
            let grid = [columns.div_ceil(8 * 128), rows.div_ceil(ROWS_OF_BLOCK), 1];
            return self.launch("nf4", "nf4_dequantize", grid, 128, arguments);
        }
        if columns != length {
            return Err(unsupported(format!("4-bit weights with rows of {length}, not a multiple of 64")));
        }
        let elements = rows * length;
        let arguments = arguments![
            parts.codes,
            parts.scale_codes,
            parts.second_scales,
            parts.offset,
            tables,
            to,
            stride as i64,
            length as i64,
            (first_row * length) as i64,
            elements as i64,
        ];
        self.launch("nf4", "nf4_dequantize_any", [elements.div_ceil(256), 1, 1], 256, arguments)
    }

    /// `output (+)= x · weightᵀ`, a block of the weight's rows at a time.
    pub(super) fn quantized_forward(
        &mut self,
        x: Matrix,
        weight: BufferId,
        output: Matrix,
        accumulate: bool,
    ) -> Result<(), EngineError> {
        let columns = self.width(weight);
        let scratch = self.memory.scratch.pointer;
        for (first, count) in self.unpacked_blocks(self.rows(weight), columns) {
            self.unpack(weight, (first, count), (0, columns), (scratch, columns))?;
            let block = Matrix::new(scratch, DType::BF16, count, columns);
            self.product(forward_product(x, block, output.slice_columns(first, count), accumulate))?;
        }
        Ok(())
    }

    /// Blocks of unpacked rows that fit the scratch: (first, count).
    pub(super) fn unpacked_blocks(&self, rows: usize, columns: usize) -> Vec<(usize, usize)> {
        blocks(rows, self.memory.scratch.bytes as usize / (2 * columns), 128)
    }
}
