//! Matrices and their products.
//!
//! Work is split into blocks whose sizes depend on shapes alone, and inside a block a product runs on one
//! thread: results are the same bits for any number of threads.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::elementary::vectorized;
use super::kernel::{self, Instructions, Left, PANEL, ROWS, Tile};
use super::quantized::{Int8, Nf4};

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

    fn at(self, row: usize, column: usize) -> f32 {
        assert!(row < self.rows && column < self.columns);
        // SAFETY: the element lies in the matrix.
        unsafe { *self.start.add(row * self.row_stride + column * self.column_stride) }
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

/// The right side of a product.
#[derive(Clone, Copy)]
pub enum Right<'a> {
    Matrix(Matrix<'a>),
    /// A block of a weight.
    Weight {
        weight: Weight<'a>,
        rows: (usize, usize),
        columns: (usize, usize),
    },
    /// A block of a weight, transposed.
    WeightTransposed {
        weight: Weight<'a>,
        rows: (usize, usize),
        columns: (usize, usize),
    },
}

impl<'a> From<Matrix<'a>> for Right<'a> {
    fn from(matrix: Matrix<'a>) -> Self {
        Self::Matrix(matrix)
    }
}

impl Right<'_> {
    /// Rows and columns.
    fn shape(&self) -> (usize, usize) {
        match self {
            Right::Matrix(matrix) => (matrix.rows, matrix.columns),
            Right::Weight { rows, columns, .. } => (rows.1 - rows.0, columns.1 - columns.0),
            Right::WeightTransposed { rows, columns, .. } => (columns.1 - columns.0, rows.1 - rows.0),
        }
    }

    /// Packs up to [`PANEL`] columns.
    #[inline(always)]
    fn pack(&self, kind: Instructions, depth: Range<usize>, columns: Range<usize>, panel: &mut [f32]) {
        match *self {
            Right::Matrix(matrix) => {
                let part = matrix.part(depth.clone(), columns.clone());
                if part.column_stride == 1 {
                    for (d, target) in panel.chunks_exact_mut(PANEL).take(depth.len()).enumerate() {
                        target[..columns.len()].copy_from_slice(part.row(d));
                        target[columns.len()..].fill(0.0);
                    }
                } else if part.row_stride == 1 {
                    let part = part.transposed();
                    let mut rows = [&ZEROS[..depth.len()]; PANEL];
                    rows.iter_mut().take(part.rows).enumerate().for_each(|(c, row)| *row = part.row(c));
                    kernel::pack_transposed(kind, &rows, depth.len(), panel);
                } else {
                    for (d, target) in panel.chunks_exact_mut(PANEL).take(depth.len()).enumerate() {
                        for (c, target) in target.iter_mut().enumerate() {
                            *target = if c < columns.len() { part.at(d, c) } else { 0.0 };
                        }
                    }
                }
            }
            Right::Weight { weight, rows, columns: all } => {
                let from = all.0 + columns.start..all.0 + columns.end;
                for (d, target) in depth.zip(panel.chunks_exact_mut(PANEL)) {
                    weight.convert(rows.0 + d, from.clone(), &mut target[..columns.len()]);
                    target[columns.len()..].fill(0.0);
                }
            }
            Right::WeightTransposed { weight, rows, columns: all } => {
                let (first, start) = (rows.0 + columns.start, all.0 + depth.start);
                let count = columns.len();
                let range =
                    |c: usize| (first + c) * weight.columns + start..(first + c) * weight.columns + start + depth.len();
                match weight.values {
                    Values::F32(values) => {
                        let mut rows = [&ZEROS[..depth.len()]; PANEL];
                        rows.iter_mut().take(count).enumerate().for_each(|(c, row)| *row = &values[range(c)]);
                        kernel::pack_transposed(kind, &rows, depth.len(), panel);
                    }
                    Values::BF16(values) => {
                        let mut rows = [bytemuck::cast_slice(&ZEROS[..depth.len().div_ceil(2)]); PANEL];
                        let row_bits = |c: usize| bytemuck::cast_slice(&values[range(c)]);
                        rows.iter_mut().take(count).enumerate().for_each(|(c, row)| *row = row_bits(c));
                        kernel::pack_transposed_bf16(kind, &rows, depth.len(), panel);
                    }
                    // Unpacked into a piece of 32 rows that stays near.
                    Values::F16(_) | Values::Nf4(_) | Values::Int8(_) => {
                        let mut piece = [[0.0; PIECE]; PANEL];
                        for from in (0..depth.len()).step_by(PIECE) {
                            let length = PIECE.min(depth.len() - from);
                            let columns = start + from..start + from + length;
                            for (c, row) in piece.iter_mut().take(count).enumerate() {
                                weight.convert(first + c, columns.clone(), &mut row[..length]);
                            }
                            let rows = std::array::from_fn(|c| &piece[c][..length]);
                            kernel::pack_transposed(kind, &rows, length, &mut panel[from * PANEL..]);
                        }
                    }
                }
            }
        }
    }
}

/// Depth packed at a time.
const DEPTH: usize = 640;
/// Rows that fill a panel up.
static ZEROS: [f32; DEPTH] = [0.0; DEPTH];
/// Columns packed at a time.
const WIDTH: usize = 256;
/// Elements of a row that are unpacked before they are transposed: a block of NF4.
const PIECE: usize = 64;

/// `out = factor · left · right`, or `out += ...`, on this thread.
pub fn multiply<'a>(
    out: &mut MatrixMut,
    left: Matrix,
    right: impl std::convert::Into<Right<'a>>,
    factor: f32,
    into: Into,
) {
    let right = right.into();
    let (depth, columns) = right.shape();
    assert!(out.rows == left.rows && out.columns == columns && left.columns == depth);
    if out.rows == 0 || columns == 0 {
        return;
    }
    if depth == 0 {
        if into == Into::Replace {
            out.fill(0.0);
        }
        return;
    }
    let kind = Instructions::best();
    let mut packed = PACKED.take();
    for (number, depth) in even(depth, DEPTH).enumerate() {
        let into = if number == 0 { into } else { Into::Add };
        for first in (0..columns).step_by(WIDTH) {
            let width = WIDTH.min(columns - first);
            let panels = width.div_ceil(PANEL);
            let panel_size = depth.len() * PANEL;
            if packed.len() < panels * panel_size {
                packed.resize(DEPTH * WIDTH, 0.0);
            }
            let packed = &mut packed[..panels * panel_size];
            vectorized(
                #[inline(always)]
                || {
                    for (at, panel) in (first..first + width).step_by(PANEL).zip(packed.chunks_exact_mut(panel_size)) {
                        right.pack(kind, depth.clone(), at..(at + PANEL).min(columns), panel);
                    }
                },
            );
            block(kind, out, left.columns(depth.clone()), packed, first..first + width, factor, into);
        }
    }
    PACKED.set(packed);
}

/// All rows of some columns, from the packed right side.
fn block(
    kind: Instructions,
    out: &mut MatrixMut,
    left: Matrix,
    packed: &[f32],
    columns: Range<usize>,
    factor: f32,
    into: Into,
) {
    let depth = left.columns;
    let mut tile = Tile([[0.0; PANEL]; ROWS]);
    vectorized(
        #[inline(always)]
        || {
            for rows in even(left.rows, ROWS) {
                let operand = Left {
                    start: left.start.wrapping_add(rows.start * left.row_stride),
                    row_stride: left.row_stride,
                    depth_stride: left.column_stride,
                };
                for (first, panel) in columns.clone().step_by(PANEL).zip(packed.chunks_exact(depth * PANEL)) {
                    let width = PANEL.min(columns.end - first);
                    // SAFETY: the rows and all of the depth lie in `left`, and the panel has that depth.
                    unsafe { kernel::tile(kind, (rows.len(), depth, width), operand, panel, &mut tile) };
                    for (row, sums) in rows.clone().zip(&tile.0) {
                        let target = &mut out.row(row)[first..first + width];
                        match into {
                            Into::Replace => target.iter_mut().zip(sums).for_each(|(t, sum)| *t = factor * sum),
                            Into::Add => target.iter_mut().zip(sums).for_each(|(t, sum)| *t += factor * sum),
                        }
                    }
                }
            }
        },
    );
}

/// Ranges of nearly the same size, at most `most`.
fn even(length: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let count = length.div_ceil(most);
    (0..count).map(move |i| i * length / count..(i + 1) * length / count)
}

/// Elements of a weight as they are stored.
#[derive(Clone, Copy)]
pub enum Values<'a> {
    F32(&'a [f32]),
    BF16(&'a [bf16]),
    F16(&'a [f16]),
    Nf4(Nf4<'a>),
    Int8(Int8<'a>),
}

/// A `[rows, columns]` matrix that products read; stays in its storage type.
#[derive(Clone, Copy)]
pub struct Weight<'a> {
    pub values: Values<'a>,
    pub rows: usize,
    pub columns: usize,
}

impl<'a> Weight<'a> {
    /// Part of a row in f32.
    #[inline(always)]
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
            Values::Nf4(values) => values.unpack(range.start, target),
            Values::Int8(values) => values.unpack(row, range.start, target),
        }
    }
}

/// Blocks for tasks: of about `target` elements, multiples of a panel, an even number of them where there are
/// several. They depend on the length alone, never on the number of threads.
pub fn blocks(length: usize, target: usize) -> impl Iterator<Item = Range<usize>> {
    let count = length.div_ceil(target);
    let count = if count > 1 { count.next_multiple_of(2) } else { 1 };
    let size = length.div_ceil(count).next_multiple_of(PANEL);
    (0..length).step_by(size).map(move |start| start..(start + size).min(length))
}

thread_local! {
    static PACKED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// The largest scratch that any thread asked for, and the largest that all of them have.
static LARGEST: AtomicUsize = AtomicUsize::new(0);
static EVERYWHERE: AtomicUsize = AtomicUsize::new(0);

/// Lends scratch memory of the thread; it grows to the largest size asked for and stays. Contents are arbitrary.
pub fn with_scratch<R>(length: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut scratch = SCRATCH.take();
    if scratch.len() < length {
        scratch.resize(length, 0.0);
        LARGEST.fetch_max(length, Ordering::Relaxed);
    }
    let result = work(&mut scratch[..length]);
    SCRATCH.set(scratch);
    result
}

/// Gives every thread the scratch that the largest task so far needed: which thread takes which task changes from
/// run to run, and later runs are not to allocate.
pub fn grow_scratch_everywhere() {
    let largest = LARGEST.load(Ordering::Relaxed);
    if EVERYWHERE.fetch_max(largest, Ordering::Relaxed) >= largest {
        return;
    }
    let grow = || {
        with_scratch(largest, |_| ());
        let mut packed = PACKED.take();
        if packed.len() < DEPTH * WIDTH {
            packed.resize(DEPTH * WIDTH, 0.0);
        }
        PACKED.set(packed);
    };
    rayon::broadcast(|_| grow());
    grow();
}
