//! Matrices, and their products through `gemm`.
//!
//! Work is split into blocks whose sizes depend on shapes alone, and inside a block a product runs on one
//! thread: results are the same bits for any number of threads.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A strided f32 matrix to read.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    start: *const f32,
    pub rows: usize,
    pub columns: usize,
    row_stride: usize,
    column_stride: usize,
    life: PhantomData<&'a [f32]>,
}

/// A strided f32 matrix to write; its rows are contiguous.
pub struct MatrixMut<'a> {
    start: *mut f32,
    pub rows: usize,
    pub columns: usize,
    stride: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `Matrix` stands for a shared slice, a `MatrixMut` for an exclusive one.
unsafe impl Send for Matrix<'_> {}
// SAFETY: as above.
unsafe impl Sync for Matrix<'_> {}
// SAFETY: as above.
unsafe impl Send for MatrixMut<'_> {}
// SAFETY: as above; writing through a shared `MatrixMut` needs the unsafe `part`.
unsafe impl Sync for MatrixMut<'_> {}

impl<'a> Matrix<'a> {
    /// All of `values`, in rows of `columns`.
    pub fn new(values: &'a [f32], columns: usize) -> Self {
        let columns = columns.max(1);
        Self {
            start: values.as_ptr(),
            rows: values.len() / columns,
            columns,
            row_stride: columns,
            column_stride: 1,
            life: PhantomData,
        }
    }

    /// # Safety
    /// The rows lie in memory that may be read for `'a`.
    pub unsafe fn from_raw(start: *const f32, rows: usize, columns: usize, stride: usize) -> Self {
        Self { start, rows, columns, row_stride: stride, column_stride: 1, life: PhantomData }
    }

    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    pub fn part(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(rows.end <= self.rows && columns.end <= self.columns);
        let offset = rows.start * self.row_stride + columns.start * self.column_stride;
        Self { start: self.start.wrapping_add(offset), rows: rows.len(), columns: columns.len(), ..self }
    }

    pub fn rows(self, rows: Range<usize>) -> Self {
        self.part(rows, 0..self.columns)
    }

    pub fn columns(self, columns: Range<usize>) -> Self {
        self.part(0..self.rows, columns)
    }

    /// One row, where columns are contiguous.
    pub fn row(self, row: usize) -> &'a [f32] {
        assert!(row < self.rows && self.column_stride == 1);
        // SAFETY: the row lies in the matrix.
        unsafe { std::slice::from_raw_parts(self.start.add(row * self.row_stride), self.columns) }
    }
}

impl<'a> MatrixMut<'a> {
    pub fn new(values: &'a mut [f32], columns: usize) -> Self {
        let columns = columns.max(1);
        Self { rows: values.len() / columns, start: values.as_mut_ptr(), columns, stride: columns, life: PhantomData }
    }

    /// # Safety
    /// The rows lie in memory that nothing else touches for `'a`.
    pub unsafe fn from_raw(start: *mut f32, rows: usize, columns: usize, stride: usize) -> Self {
        Self { start, rows, columns, stride, life: PhantomData }
    }

    pub fn as_matrix(&self) -> Matrix<'_> {
        // SAFETY: reading is allowed while `self` is borrowed.
        unsafe { Matrix::from_raw(self.start, self.rows, self.columns, self.stride) }
    }

    /// A block to write.
    ///
    /// # Safety
    /// Blocks that are alive at the same time must not overlap, nor be read through [`Self::as_matrix`].
    pub unsafe fn part(&self, rows: Range<usize>, columns: Range<usize>) -> MatrixMut<'_> {
        assert!(rows.end <= self.rows && columns.end <= self.columns);
        MatrixMut {
            start: self.start.wrapping_add(rows.start * self.stride + columns.start),
            rows: rows.len(),
            columns: columns.len(),
            stride: self.stride,
            life: PhantomData,
        }
    }

    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        // SAFETY: the row lies in the matrix, which is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.columns) }
    }

    pub fn fill(&mut self, value: f32) {
        for row in 0..self.rows {
            self.row(row).fill(value);
        }
    }
}

/// Whether a product replaces what it is written to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Into {
    Replace,
    Add,
}

/// `out = factor · left · right`, or `out += ...`, on this thread.
pub fn multiply(out: &mut MatrixMut, left: Matrix, right: Matrix, factor: f32, into: Into) {
    assert!(out.rows == left.rows && out.columns == right.columns && left.columns == right.rows);
    if out.rows == 0 || out.columns == 0 {
        return;
    }
    if left.columns == 0 {
        if into == Into::Replace {
            out.fill(0.0);
        }
        return;
    }
    // SAFETY: the three matrices are valid for their shapes and strides, and `out` is borrowed exclusively.
    unsafe {
        gemm::gemm(
            out.rows,
            out.columns,
            left.columns,
            out.start,
            1,
            out.stride as isize,
            into == Into::Add,
            left.start,
            left.column_stride as isize,
            left.row_stride as isize,
            right.start,
            right.column_stride as isize,
            right.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Elements of a weight as they are stored.
#[derive(Clone, Copy)]
pub enum Values<'a> {
    F32(&'a [f32]),
    BF16(&'a [bf16]),
    F16(&'a [f16]),
}

/// A `[rows, columns]` matrix that products read; stays in its storage type.
#[derive(Clone, Copy)]
pub struct Weight<'a> {
    pub values: Values<'a>,
    pub rows: usize,
    pub columns: usize,
}

impl<'a> Weight<'a> {
    /// A block in f32: in place where it is stored so, else converted into `scratch`.
    pub fn block<'s>(self, rows: Range<usize>, columns: Range<usize>, scratch: &'s mut [f32]) -> Matrix<'s>
    where
        'a: 's,
    {
        if let Values::F32(values) = self.values {
            return Matrix::new(values, self.columns).part(rows, columns);
        }
        let width = columns.len();
        let scratch = &mut scratch[..rows.len() * width];
        for (row, target) in rows.zip(scratch.chunks_exact_mut(width)) {
            self.convert(row, columns.clone(), target);
        }
        Matrix::new(scratch, width)
    }

    /// Part of a row in f32.
    pub fn convert(self, row: usize, columns: Range<usize>, target: &mut [f32]) {
        let range = row * self.columns + columns.start..row * self.columns + columns.end;
        match self.values {
            Values::F32(values) => target.copy_from_slice(&values[range]),
            Values::BF16(values) => {
                for (target, value) in target.iter_mut().zip(&values[range]) {
                    *target = f32::from_bits(u32::from(value.to_bits()) << 16);
                }
            }
            Values::F16(values) => values[range].convert_to_f32_slice(target),
        }
    }

    /// Scratch that [`Self::block`] needs, in f32 elements.
    pub fn scratch(self, rows: usize, columns: usize) -> usize {
        if matches!(self.values, Values::F32(_)) { 0 } else { rows * columns }
    }
}

/// Even blocks of about `target` elements, multiples of 16, whatever the number of threads.
pub fn blocks(length: usize, target: usize) -> impl Iterator<Item = Range<usize>> {
    let count = length.div_ceil(target).max(1);
    let size = length.div_ceil(count).next_multiple_of(16);
    (0..length).step_by(size).map(move |start| start..(start + size).min(length))
}

thread_local! {
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Lends scratch memory of the thread; it grows to the largest size asked for and stays. Contents are arbitrary.
pub fn with_scratch<R>(length: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut scratch = SCRATCH.take();
    if scratch.len() < length {
        scratch.resize(length, 0.0);
    }
    let result = work(&mut scratch[..length]);
    SCRATCH.set(scratch);
    result
}
