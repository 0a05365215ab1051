//! What an operation becomes: launches with all their arguments, in order.

use std::ffi::c_void;

use cudarc::driver::{result, sys};

use std::rc::Rc;

use super::driver::{Card, During, Event, Lane, copy, zero};
use super::product::{Matrix, Prepared, Products};
use crate::backend::EngineError;
use crate::program::DType;

/// A kernel argument, where the driver finds it.
#[derive(Clone)]
pub(super) enum Slot {
    /// Up to eight bytes; the kernel reads as many as its parameter has.
    Word(u64),
    /// A description of a matrix for the tensor memory accelerator.
    Map(Box<TensorMap>),
    /// A struct, in words.
    Table(Box<[u64]>),
}

/// A tensor map, as the driver encodes it.
#[derive(Clone)]
#[repr(align(128))]
pub(super) struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// Boxes of `rows` rows and 64 columns of a bf16 matrix, in the 128-byte swizzle; rows and columns outside read
    /// as zeros.
    pub fn new(matrix: &Matrix, rows: u32) -> Result<Self, EngineError> {
        use sys::{
            CUtensorMapDataType_enum as Type, CUtensorMapFloatOOBfill_enum as Outside,
            CUtensorMapInterleave_enum as Interleave, CUtensorMapL2promotion_enum as Promotion,
            CUtensorMapSwizzle_enum as Swizzle,
        };
        // SAFETY: plain numbers, for which zero bytes are valid.
        let mut map = Self(unsafe { std::mem::zeroed() });
        let sizes = [matrix.columns as u64, matrix.rows as u64];
        let strides = [2 * matrix.stride as u64];
        let (shape, steps) = ([64, rows], [1, 1]);
        // SAFETY: all arrays have the rank's length (strides one less), and `map` is 64-byte aligned.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map.0,
                Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                matrix.pointer as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                shape.as_ptr(),
                steps.as_ptr(),
                Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                Outside::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .during(&format!("describing {matrix:?} for tensor copies"))?;
        Ok(map)
    }
}

pub(super) trait Argument {
    fn slot(self) -> Slot;
}

impl Argument for TensorMap {
    fn slot(self) -> Slot {
        Slot::Map(Box::new(self))
    }
}

/// A struct of words, taken by value.
impl Argument for Box<[u64]> {
    fn slot(self) -> Slot {
        Slot::Table(self)
    }
}

/// Pointers.
impl Argument for u64 {
    fn slot(self) -> Slot {
        Slot::Word(self)
    }
}

impl Argument for i64 {
    fn slot(self) -> Slot {
        Slot::Word(self as u64)
    }
}

impl Argument for i32 {
    fn slot(self) -> Slot {
        Slot::Word(u64::from(self as u32))
    }
}

impl Argument for u32 {
    fn slot(self) -> Slot {
        Slot::Word(u64::from(self))
    }
}

impl Argument for f32 {
    fn slot(self) -> Slot {
        Slot::Word(u64::from(self.to_bits()))
    }
}

/// The arguments of a launch, in the order of the kernel's parameters. Types must match the kernel's.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => {
        vec![$($crate::backend::cuda::command::Argument::slot($value)),*]
    };
}
pub(super) use arguments;

pub(super) struct Launch {
    pub function: sys::CUfunction,
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared_bytes: u32,
    pub arguments: Vec<Slot>,
    /// Entry name, for errors.
    pub entry: String,
}

pub(super) enum Command {
    Launch(Launch),
    Product(Box<Prepared>),
    Zero {
        pointer: u64,
        bytes: u64,
    },
    Copy {
        from: u64,
        to: u64,
        bytes: u64,
        lane: Lane,
    },
    /// Marks a point of a stream.
    Mark(Rc<Event>, Lane),
    /// A stream waits for a marked point.
    Hold(Rc<Event>, Lane),
}

impl Command {
    pub fn run(&self, card: &Card, products: &Products) -> Result<(), EngineError> {
        match self {
            Command::Launch(launch) => launch.run(card),
            Command::Product(prepared) => products.launch(prepared),
            Command::Zero { pointer, bytes } => zero(card, *pointer, *bytes),
            Command::Copy { from, to, bytes, lane } => copy(card, *lane, *from, *to, *bytes),
            Command::Mark(event, lane) => event.record_on(*lane),
            Command::Hold(event, lane) => event.hold(*lane),
        }
    }

    /// Runs it on the main stream, wherever it belongs; nothing else is on its way.
    pub fn run_alone(&self, card: &Card, products: &Products) -> Result<(), EngineError> {
        match self {
            Command::Copy { from, to, bytes, .. } => copy(card, Lane::Main, *from, *to, *bytes),
            Command::Mark(..) | Command::Hold(..) => Ok(()),
            Command::Launch(_) | Command::Product(_) | Command::Zero { .. } => self.run(card, products),
        }
    }

    /// What it is, the arithmetic of a product, and whether that is in 8-bit floats; none of what only orders others.
    pub fn describe(&self) -> Option<(String, u64, bool)> {
        match self {
            Command::Launch(launch) => Some((launch.entry.clone(), 0, false)),
            Command::Product(prepared) => {
                let product = &prepared.product;
                Some((product.shape(), product.flops(), product.left.dtype == DType::Fp8))
            }
            Command::Zero { .. } => Some(("zero".into(), 0, false)),
            Command::Copy { .. } => Some(("copy".into(), 0, false)),
            Command::Mark(..) | Command::Hold(..) => None,
        }
    }
}

impl Launch {
    pub fn run(&self, card: &Card) -> Result<(), EngineError> {
        if self.grid.contains(&0) {
            return Ok(());
        }
        let address = |slot: &Slot| match slot {
            Slot::Word(word) => std::ptr::from_ref(word).cast_mut().cast::<c_void>(),
            Slot::Map(map) => std::ptr::from_ref::<TensorMap>(map).cast_mut().cast(),
            Slot::Table(words) => words.as_ptr().cast_mut().cast(),
        };
        let mut parameters: Vec<*mut c_void> = self.arguments.iter().map(address).collect();
        // SAFETY: the function is loaded; the driver copies the arguments before it returns; they were written to
        // match the kernel's parameters, and the pointers among them lead into memory of the session.
        unsafe {
            result::launch_kernel(
                self.function,
                (self.grid[0], self.grid[1], self.grid[2]),
                (self.threads, 1, 1),
                self.shared_bytes,
                card.stream,
                &mut parameters,
            )
        }
        .during(&format!("launching {}", self.entry))
    }
}
