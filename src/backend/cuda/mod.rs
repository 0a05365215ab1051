//! The CUDA engine: the kernels in `kernels/`, matrix products by cuBLASLt, each program one graph.
//!
//! Nothing of CUDA is needed at build time, and nothing at run time unless this engine is asked for: libraries are
//! found and loaded by [`library`], kernels compiled for the card present by [`compile`] and kept.
//! A session lowers every operation to launches when it opens, and then only replays them.

mod ceilings;
mod command;
pub mod compile;
mod doctor;
mod driver;
mod known;
pub mod library;
mod lower;
mod memory;
mod nvrtc;
mod product;
mod session;
mod tables;
mod target;
mod tuning;
mod weights;

pub use ceilings::{Ceilings, ceilings};
pub use doctor::{Fix, doctor, fix};
pub use driver::CardFacts;
pub use known::{KNOWN_CARDS, KnownCard, NoCard};
pub use lower::attention::{backward_sizes, forward_sizes};
pub use session::{CudaSession, TimedLaunch, compile_ahead};
pub use target::target;

use std::path::PathBuf;
use std::sync::Arc;

use super::{EngineError, WeightSource};
use crate::program::Plan;

pub(crate) const ENGINE: &str = "cuda";

/// Opens a session on card `ordinal`.
///
/// # Errors
/// When a library is missing, the card is too old or too full, a weight is missing, or an operation has no kernel.
pub fn open(plan: Plan, weights: Arc<dyn WeightSource>, ordinal: usize) -> Result<CudaSession, EngineError> {
    CudaSession::open(plan, weights.as_ref(), ordinal, None)
}

/// As [`open`], with the tuning table that an earlier session gave ([`Session::tuning`](super::Session::tuning)): where
/// card, driver and library are the same, results are the same bits.
///
/// # Errors
/// As [`open`].
pub fn open_tuned(
    plan: Plan,
    weights: Arc<dyn WeightSource>,
    ordinal: usize,
    tuning: Option<&str>,
) -> Result<CudaSession, EngineError> {
    CudaSession::open(plan, weights.as_ref(), ordinal, tuning)
}

/// The cards that the driver shows; none when there is no driver.
///
/// # Errors
/// When there is a driver and it does not start.
pub fn cards() -> Result<Vec<CardFacts>, EngineError> {
    let driver = library::find().iter().any(|found| found.library == library::Library::Driver && found.path.is_some());
    if !driver {
        return Ok(Vec::new());
    }
    driver::cards()
}

/// A card that this machine has, this engine has kernels for, and libraries are there for; it is not opened.
///
/// # Errors
/// What of this does not hold.
pub fn usable(ordinal: usize) -> Result<CardFacts, EngineError> {
    let cards = cards()?;
    if cards.is_empty() {
        // Without a driver there are no cards either.
        require_libraries()?;
    }
    let count = cards.len();
    let card = cards.into_iter().nth(ordinal);
    let card =
        card.ok_or_else(|| driver::unsupported(format!("there is no card {ordinal}; the driver shows {count}")))?;
    // An old card is of no use with the libraries either.
    compile::architecture(card.architecture)?;
    require_libraries()?;
    Ok(card)
}

/// Fails, saying what to do, when a library is missing.
fn require_libraries() -> Result<(), EngineError> {
    match library::missing() {
        None => match (driver::too_old(), library::conflict()) {
            (Some(what), _) => Err(driver::unsupported(format!("{what}; update it, or use --device wgpu"))),
            (None, Some(what)) => Err(driver::unsupported(what)),
            (None, None) => Ok(()),
        },
        Some(missing @ library::Library::Driver) => {
            Err(driver::unsupported(format!("{} is not on this machine", missing.name())))
        }
        Some(library) => Err(driver::unsupported(format!(
            "{} was not found; `tune doctor --fix` brings NVIDIA's own libraries",
            library.name()
        ))),
    }
}

/// The user's private folder for compiled kernels and tuning tables.
fn cache_folder() -> Option<PathBuf> {
    directories::ProjectDirs::from("", "", "tune").map(|folders| folders.cache_dir().join("cuda"))
}
