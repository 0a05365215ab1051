//! Matrix products through cuBLASLt: algorithms chosen by measurement once per shape, then fixed.
//!
//! All matrices are row-major. cuBLASLt is column-major, where the same memory is the transpose; the product is
//! therefore asked for as `outputᵀ = rightᵀ · leftᵀ`.

use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};

use super::driver::{Card, DeviceMemory, During, Event, failed, version as driver_version};
use super::tuning::{Algorithm, Tuning};
use crate::backend::EngineError;
use crate::program::DType;

/// A row-major matrix in device memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Matrix {
    pub pointer: u64,
    pub dtype: DType,
    pub rows: usize,
    pub columns: usize,
    /// Elements between rows.
    pub stride: usize,
    /// Where the scale of 8-bit floats lies: one f32.
    pub scale: u64,
}

impl Matrix {
    /// A contiguous matrix.
    pub fn new(pointer: u64, dtype: DType, rows: usize, columns: usize) -> Self {
        Self { pointer, dtype, rows, columns, stride: columns, scale: 0 }
    }

    pub fn element_bytes(&self) -> u64 {
        match self.dtype {
            DType::F32 => 4,
            DType::Fp8 => 1,
            _ => 2,
        }
    }

    /// Some of the rows.
    pub fn slice_rows(&self, first: usize, rows: usize) -> Self {
        debug_assert!(first + rows <= self.rows);
        let pointer = self.pointer + (first * self.stride) as u64 * self.element_bytes();
        Self { pointer, rows, ..*self }
    }

    /// Some of the columns.
    pub fn slice_columns(&self, first: usize, columns: usize) -> Self {
        debug_assert!(first + columns <= self.columns);
        Self { pointer: self.pointer + first as u64 * self.element_bytes(), columns, ..*self }
    }

    /// Largest power of two, up to 256, that divides address and row length in bytes.
    fn alignment(&self) -> u32 {
        let bits = self.pointer | (self.stride as u64 * self.element_bytes()) | 256;
        1 << bits.trailing_zeros()
    }
}

/// What multiplies a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Alpha {
    One,
    /// An f32 in device memory.
    Device(u64),
}

/// `output (+)= alpha · op(left) · op(right)`; `op` transposes where asked.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Product {
    pub left: Matrix,
    pub left_transposed: bool,
    pub right: Matrix,
    pub right_transposed: bool,
    pub output: Matrix,
    pub alpha: Alpha,
    /// Adds to the output instead of replacing it.
    pub accumulate: bool,
}

impl Product {
    /// Rows, columns and summed dimension.
    fn sizes(&self) -> (usize, usize, usize) {
        let turn = |matrix: &Matrix, transposed: bool| {
            if transposed { (matrix.columns, matrix.rows) } else { (matrix.rows, matrix.columns) }
        };
        let (rows, inner) = turn(&self.left, self.left_transposed);
        let (_, columns) = turn(&self.right, self.right_transposed);
        (rows, columns, inner)
    }

    pub fn flops(&self) -> u64 {
        let (m, n, k) = self.sizes();
        2 * m as u64 * n as u64 * k as u64
    }

    /// Rows, columns and summed dimension, the factors' type, and what of them is transposed.
    pub fn shape(&self) -> String {
        let (rows, columns, summed) = self.sizes();
        let mark = |transposed: bool| if transposed { "t" } else { "n" };
        let (left, right) = (mark(self.left_transposed), mark(self.right_transposed));
        format!("product {rows} x {columns} x {summed} {} {left}{right}", self.left.dtype.name())
    }

    fn check(&self) -> Result<(), EngineError> {
        let (m, n, _) = self.sizes();
        let left_inner = if self.left_transposed { self.left.rows } else { self.left.columns };
        let right_inner = if self.right_transposed { self.right.columns } else { self.right.rows };
        // 8-bit factors have their scales, and the summed dimension along their rows.
        let fp8 = self.left.dtype == DType::Fp8
            && self.left.scale != 0
            && self.right.scale != 0
            && !self.left_transposed
            && self.right_transposed;
        let types = self.left.dtype == self.right.dtype
            && (matches!(self.left.dtype, DType::BF16 | DType::F32) || fp8)
            && matches!(self.output.dtype, DType::BF16 | DType::F32);
        if left_inner == right_inner && (self.output.rows, self.output.columns) == (m, n) && types {
            return Ok(());
        }
        Err(failed(format!("matrices do not fit together: {self:?}")))
    }

    /// Everything that the choice of an algorithm may depend on.
    fn key(&self) -> String {
        let matrix = |matrix: &Matrix, transposed: bool| {
            format!(
                "{}x{}/{}:{}@{}{}",
                matrix.rows,
                matrix.columns,
                matrix.stride,
                matrix.dtype.name(),
                matrix.alignment(),
                if transposed { "t" } else { "" }
            )
        };
        format!(
            "{} {} {} {}{}",
            matrix(&self.left, self.left_transposed),
            matrix(&self.right, self.right_transposed),
            matrix(&self.output, false),
            if self.accumulate { "+" } else { "=" },
            if self.alpha == Alpha::One { "" } else { "a" }
        )
    }
}

/// A product with its descriptors and algorithm, ready to launch.
pub(super) struct Prepared {
    pub product: Product,
    operation: sys::cublasLtMatmulDesc_t,
    right: sys::cublasLtMatrixLayout_t,
    left: sys::cublasLtMatrixLayout_t,
    output: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
    alpha: u64,
    beta: u64,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // SAFETY: made in `Products::describe`, destroyed only here; launches copy what they need.
        unsafe {
            let _ = result::destroy_matrix_layout(self.right);
            let _ = result::destroy_matrix_layout(self.left);
            let _ = result::destroy_matrix_layout(self.output);
            let _ = result::destroy_matmul_desc(self.operation);
        }
    }
}

/// Bytes of scratch that cuBLASLt may use. With a quarter of it the products of a 135M model took 5% longer.
pub(super) const WORKSPACE_BYTES: u64 = 32 << 20;

/// How many of the library's proposals are timed.
const CANDIDATES: usize = 8;

/// The open library.
pub(super) struct Products {
    card: Arc<Card>,
    handle: sys::cublasLtHandle_t,
    workspace: DeviceMemory,
    /// f32 0 and 1.
    constants: DeviceMemory,
    tuning: Tuning,
    /// Shapes whose entry the library was asked about.
    checked: HashSet<String>,
    /// Answers of [`Products::second_adds`].
    orders: HashMap<String, bool>,
}

impl Drop for Products {
    fn drop(&mut self) {
        let _ = self.card.bind();
        // SAFETY: made in `new`, destroyed only here.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn type_of(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        DType::Fp8 => sys::cudaDataType_t::CUDA_R_8F_E4M3,
        _ => sys::cudaDataType_t::CUDA_R_16BF,
    }
}

impl Products {
    /// `tuning`: a table that an earlier session gave.
    pub fn new(card: &Arc<Card>, tuning: Option<&str>) -> Result<Self, EngineError> {
        let made_with = format!(
            "{}, driver for CUDA {}, cuBLASLt {}, workspace {WORKSPACE_BYTES}",
            card.name,
            driver_version(),
            version()
        );
        let handle = result::create_handle().during("starting cuBLASLt")?;
        Ok(Self {
            card: card.clone(),
            handle,
            workspace: DeviceMemory::new(card, WORKSPACE_BYTES, "cuBLASLt's workspace")?,
            constants: DeviceMemory::with(card, bytemuck::cast_slice(&[0.0f32, 1.0]), "constants")?,
            tuning: Tuning::new(made_with, super::compile::made_with()?, tuning),
            checked: HashSet::new(),
            orders: HashMap::new(),
        })
    }

    /// Clusters of so many blocks among which sums are shared.
    pub fn clusters(&mut self, blocks: usize, find: impl FnOnce() -> usize) -> usize {
        self.tuning.clusters(blocks, find)
    }

    fn describe(&self, product: Product) -> Result<Prepared, EngineError> {
        product.check()?;
        let layout = |matrix: &Matrix| {
            let (rows, columns) = (matrix.columns as u64, matrix.rows as u64);
            result::create_matrix_layout(type_of(matrix.dtype), rows, columns, matrix.stride as i64)
                .during("describing a matrix")
        };
        let operation =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)
                .during("describing a product")?;
        let set = |attribute, value: i32| {
            // SAFETY: the descriptor is alive and the attribute is an i32.
            unsafe { result::set_matmul_desc_attribute(operation, attribute, (&raw const value).cast(), 4) }
                .during("describing a product")
        };
        let transposed = |yes: bool| if yes { 1 } else { 0 };
        use sys::cublasLtMatmulDescAttributes_t as A;
        set(A::CUBLASLT_MATMUL_DESC_POINTER_MODE, sys::cublasLtPointerMode_t::CUBLASLT_POINTER_MODE_DEVICE as i32)?;
        set(A::CUBLASLT_MATMUL_DESC_TRANSA, transposed(product.right_transposed))?;
        set(A::CUBLASLT_MATMUL_DESC_TRANSB, transposed(product.left_transposed))?;
        for (attribute, scale) in [
            (A::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, product.right.scale),
            (A::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, product.left.scale),
        ] {
            if scale != 0 {
                // SAFETY: the descriptor is alive and the attribute is a device pointer.
                unsafe { result::set_matmul_desc_attribute(operation, attribute, (&raw const scale).cast(), 8) }
                    .during("describing a product's scales")?;
            }
        }
        let (zero, one) = (self.constants.pointer, self.constants.pointer + 4);
        Ok(Prepared {
            operation,
            right: layout(&product.right)?,
            left: layout(&product.left)?,
            output: layout(&product.output)?,
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            alpha: match product.alpha {
                Alpha::One => one,
                Alpha::Device(pointer) => pointer,
            },
            beta: if product.accumulate { one } else { zero },
            product,
        })
    }

    /// Bytes of scratch on the device.
    pub fn allocated(&self) -> u64 {
        self.workspace.bytes
    }

    /// Where the library's scratch lies, and its bytes: free for kernels between products.
    pub fn workspace(&self) -> (u64, u64) {
        (self.workspace.pointer, self.workspace.bytes)
    }

    /// Describes a product and chooses its algorithm: from the table, else by timing the library's proposals on
    /// the product's own memory, whose output is overwritten.
    pub fn prepare(&mut self, product: Product) -> Result<Prepared, EngineError> {
        let mut prepared = self.describe(product)?;
        let key = prepared.product.key();
        if let Some(chosen) = self.tuning.get(&key) {
            prepared.algorithm.data = chosen.data;
            if self.checked.contains(&key) || self.takes(&prepared) {
                self.checked.insert(key);
                return Ok(prepared);
            }
        }
        let mut best: Option<(f32, [u64; 8])> = None;
        for candidate in self.proposals(&prepared)? {
            prepared.algorithm = candidate;
            if let Ok(milliseconds) = self.time(&prepared, best.map_or(f32::INFINITY, |(fastest, _)| fastest))
                && best.is_none_or(|(fastest, _)| milliseconds < fastest)
            {
                best = Some((milliseconds, candidate.data));
            }
        }
        let (milliseconds, data) =
            best.ok_or_else(|| failed(format!("cuBLASLt has no algorithm for {:?}", prepared.product)))?;
        let rate = prepared.product.flops() as f64 / f64::from(milliseconds) * 1e-9;
        tracing::debug!("product {key}: {milliseconds:.4} ms, {rate:.0} TFLOP/s");
        prepared.algorithm.data = data;
        self.checked.insert(key.clone());
        self.tuning.insert(key, Algorithm { data, milliseconds });
        Ok(prepared)
    }

    /// Of two sets of products that add up in the same outputs: whether it takes less time to let `first` write and
    /// `second` add than the other way round. By the times in the table, so that the answer repeats with it.
    pub fn second_adds(&mut self, first: &[Product], second: &[Product]) -> Result<bool, EngineError> {
        let key: String = first.iter().chain(second).map(|product| product.key() + ";").collect();
        if let Some(&known) = self.orders.get(&key) {
            return Ok(known);
        }
        let in_order = self.time_of(first, false)? + self.time_of(second, true)?;
        let in_reverse = self.time_of(second, false)? + self.time_of(first, true)?;
        self.orders.insert(key, in_order < in_reverse);
        Ok(in_order < in_reverse)
    }

    /// Milliseconds of the products as they are, or all of them adding to their outputs.
    fn time_of(&mut self, products: &[Product], adding: bool) -> Result<f32, EngineError> {
        let mut sum = 0.0;
        for product in products {
            let product = Product { accumulate: product.accumulate || adding, ..product.clone() };
            let key = product.key();
            self.prepare(product)?;
            sum += self.tuning.get(&key).map_or(0.0, |chosen| chosen.milliseconds);
        }
        Ok(sum)
    }

    /// The table of this session's choices.
    pub fn tuning(&self) -> String {
        self.tuning.text()
    }

    /// Keeps the choices for later sessions.
    pub fn keep_tuning(&mut self) {
        self.tuning.keep();
    }

    /// Whether the library runs the product with the algorithm that it is given.
    fn takes(&self, prepared: &Prepared) -> bool {
        // SAFETY: a struct of plain numbers, for which zero bytes are valid.
        let mut result: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        // SAFETY: all descriptors are alive.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle,
                prepared.operation,
                prepared.right,
                prepared.left,
                prepared.output,
                prepared.output,
                &prepared.algorithm,
                &mut result,
            )
        };
        status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && result.workspaceSize as u64 <= WORKSPACE_BYTES
    }

    fn proposals(&self, prepared: &Prepared) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, EngineError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as A;
        let preference = result::create_matmul_pref().during("describing a preference")?;
        let set = |attribute, value: *const c_void, bytes| {
            // SAFETY: the preference is alive and `value` points to that many bytes.
            unsafe { result::set_matmul_pref_attribute(preference, attribute, value, bytes) }
                .during("describing a preference")
        };
        let workspace = WORKSPACE_BYTES;
        let mut outcome =
            set(A::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), size_of::<u64>());
        let product = &prepared.product;
        for (attribute, matrix) in [
            (A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &product.right),
            (A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &product.left),
            (A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &product.output),
            (A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &product.output),
        ] {
            let alignment = matrix.alignment();
            outcome = outcome.and_then(|()| set(attribute, (&raw const alignment).cast(), size_of::<u32>()));
        }
        let mut found = 0;
        // SAFETY: an array of plain numbers, for which zero bytes are valid.
        let mut results: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] = unsafe { std::mem::zeroed() };
        let outcome = outcome.and_then(|()| {
            // SAFETY: all descriptors are alive; `results` has room for the number asked for.
            unsafe {
                sys::cublasLtMatmulAlgoGetHeuristic(
                    self.handle,
                    prepared.operation,
                    prepared.right,
                    prepared.left,
                    prepared.output,
                    prepared.output,
                    preference,
                    CANDIDATES as i32,
                    results.as_mut_ptr(),
                    &mut found,
                )
            }
            .result()
            .during(&format!("asking cuBLASLt for algorithms for {:?}", prepared.product))
        });
        // SAFETY: created above, destroyed only here.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        outcome?;
        Ok(results[..found as usize]
            .iter()
            .filter(|entry| {
                entry.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && entry.workspaceSize as u64 <= workspace
            })
            .map(|entry| entry.algo)
            .collect())
    }

    /// Milliseconds of the fastest of a few launches; of fewer where the first is far from `best`.
    fn time(&self, prepared: &Prepared, best: f32) -> Result<f32, EngineError> {
        let (start, end) = (Event::new(&self.card)?, Event::new(&self.card)?);
        self.launch(prepared)?;
        let mut fastest = f32::INFINITY;
        for _ in 0..3 {
            start.record()?;
            self.launch(prepared)?;
            end.record()?;
            end.wait()?;
            fastest = fastest.min(start.milliseconds_until(&end)?);
            if fastest > 1.3 * best {
                break;
            }
        }
        Ok(fastest)
    }

    pub fn launch(&self, prepared: &Prepared) -> Result<(), EngineError> {
        let product = &prepared.product;
        // SAFETY: descriptors are alive, and the matrices lie in memory of the session.
        unsafe {
            result::matmul(
                self.handle,
                prepared.operation,
                prepared.alpha as *const c_void,
                prepared.beta as *const c_void,
                product.right.pointer as *const c_void,
                prepared.right,
                product.left.pointer as *const c_void,
                prepared.left,
                product.output.pointer as *const c_void,
                prepared.output,
                product.output.pointer as *mut c_void,
                prepared.output,
                &prepared.algorithm,
                self.workspace.pointer as *mut c_void,
                self.workspace.bytes as usize,
                self.card.stream.cast(),
            )
        }
        .during(&format!("the product {:?}", prepared.product))
    }
}

/// Version of cuBLASLt in use.
pub(super) fn version() -> usize {
    // SAFETY: takes no arguments; the caller has made sure that the library is there.
    unsafe { sys::cublasLtGetVersion() }
}
