//! What a card does at most, measured: what the times of kernels are held against.

use super::command::{Launch, arguments};
use super::compile::Kernels;
use super::driver::{Card, DeviceMemory, Event, Lane, copy};
use super::product::{Alpha, Matrix, Product, Products};
use crate::backend::EngineError;
use crate::program::DType;

/// Rates of a card.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// A large copy on the card, bytes read and written a second.
    pub copy: f64,
    /// A large product of bf16 matrices, floating-point operations a second.
    pub bf16: f64,
    /// The same of 8-bit floats, where the card has them.
    pub fp8: Option<f64>,
}

/// Bytes of the copy, and of the memory that holds the factors of a product.
const BYTES: u64 = 1 << 30;

/// Rows and columns of the factors.
const SIDE: usize = 8192;

const REPEATS: usize = 10;

/// Measures a card; it takes a second and 2 GiB.
///
/// # Errors
/// When a library is missing, or the card is too old, too full or fails.
pub fn ceilings(ordinal: usize) -> Result<Ceilings, EngineError> {
    super::require_libraries()?;
    let card = Card::open(ordinal)?;
    let mut kernels = Kernels::new(&card)?;
    let what = "measuring the card";
    let (from, to) = (DeviceMemory::new(&card, BYTES, what)?, DeviceMemory::new(&card, BYTES, what)?);
    // Zeros would run faster than real data.
    let function = kernels.function(&"cast".into(), "fill_noise")?;
    let arguments = arguments![from.pointer, (BYTES / 4) as i64];
    let grid = [1024, 1, 1];
    Launch { function, grid, threads: 256, shared_bytes: 0, arguments, entry: "fill_noise".into() }.run(&card)?;
    let (start, end) = (Event::new(&card)?, Event::new(&card)?);
    let median = |run: &dyn Fn() -> Result<(), EngineError>| {
        run()?;
        let mut seconds = Vec::new();
        for _ in 0..REPEATS {
            start.record()?;
            run()?;
            end.record()?;
            end.wait()?;
            seconds.push(f64::from(start.milliseconds_until(&end)?) * 1e-3);
        }
        seconds.sort_by(f64::total_cmp);
        Ok::<f64, EngineError>(seconds[REPEATS / 2])
    };
    let copied = median(&|| copy(&card, Lane::Main, from.pointer, to.pointer, BYTES))?;
    let mut products = Products::new(&card, None)?;
    let one = DeviceMemory::with(&card, &1.0f32.to_le_bytes(), what)?;
    let mut rate = |dtype: DType| {
        let scale = if dtype == DType::Fp8 { one.pointer } else { 0 };
        let factor = |at: u64| Matrix { scale, ..Matrix::new(from.pointer + at, dtype, SIDE, SIDE) };
        let product = Product {
            left: factor(0),
            left_transposed: false,
            right: factor(BYTES / 2),
            right_transposed: true,
            output: Matrix::new(to.pointer, DType::BF16, SIDE, SIDE),
            alpha: Alpha::One,
            accumulate: false,
        };
        let prepared = products.prepare(product)?;
        let seconds = median(&|| products.launch(&prepared))?;
        Ok::<f64, EngineError>(prepared.product.flops() as f64 / seconds)
    };
    let bf16 = rate(DType::BF16)?;
    let fp8 = if card.capability >= (8, 9) { Some(rate(DType::Fp8)?) } else { None };
    card.synchronize()?;
    Ok(Ceilings { copy: 2.0 * BYTES as f64 / copied, bf16, fp8 })
}
