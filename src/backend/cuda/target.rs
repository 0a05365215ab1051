//! The card as plain data: of the card present, or of known ones.

use super::driver::{CardFacts, unsupported};
use super::product::WORKSPACE_BYTES;
use crate::backend::EngineError;
use crate::program::{DType, Rates, Target};

/// A card that can be planned for without having it.
#[derive(Clone, Copy, Debug)]
pub struct KnownCard {
    /// Part of the name that the driver gives.
    pub name: &'static str,
    pub memory_gib: f64,
    /// bf16 matrix products with f32 sums, TFLOP/s: measured on the H100; for the others the vendor's dense figure
    /// times the share that the H100 reaches of its own.
    pub matrix_tflops: f64,
    /// Memory, TB/s, by the same rule.
    pub bandwidth_tbs: f64,
    /// Whether it multiplies 8-bit floats: from Ada and Hopper on.
    pub fp8: bool,
    /// Between card and host, GB/s: measured on the H100 (PCIe 5.0 with 16 lanes), half of it for PCIe 4.0.
    pub bus_gbs: f64,
}

/// Products of 8-bit floats over those of bf16, measured on the H100 (1,318 and 750 TFLOP/s).
const FP8_SPEEDUP: f64 = 1.757;

const fn card(name: &'static str, memory_gib: f64, matrix_tflops: f64, bandwidth_tbs: f64) -> KnownCard {
    KnownCard { name, memory_gib, matrix_tflops, bandwidth_tbs, fp8: true, bus_gbs: 24.0 }
}

const fn fifth_bus(card: KnownCard) -> KnownCard {
    KnownCard { bus_gbs: 48.0, ..card }
}

const fn ampere(name: &'static str, memory_gib: f64, matrix_tflops: f64, bandwidth_tbs: f64) -> KnownCard {
    KnownCard { fp8: false, ..card(name, memory_gib, matrix_tflops, bandwidth_tbs) }
}

/// Cards by name; a more specific name comes before one that it contains.
pub const KNOWN_CARDS: &[KnownCard] = &[
    fifth_bus(card("H200", 140.4, 750.0, 4.3)),
    fifth_bus(card("H100 PCIe", 79.6, 570.0, 1.8)),
    fifth_bus(card("H100", 79.6, 750.0, 2.99)),
    fifth_bus(card("B200", 179.0, 1700.0, 7.0)),
    ampere("A100-SXM4-80GB", 79.3, 240.0, 1.8),
    ampere("A100-SXM4-40GB", 39.6, 240.0, 1.4),
    ampere("A100", 79.3, 240.0, 1.7),
    card("L40S", 44.5, 275.0, 0.77),
    card("L4", 22.0, 90.0, 0.27),
    ampere("A10", 22.1, 95.0, 0.54),
    ampere("A6000", 47.5, 120.0, 0.69),
    fifth_bus(card("RTX 5090", 31.4, 160.0, 1.6)),
    fifth_bus(card("RTX 5080", 15.5, 85.0, 0.86)),
    fifth_bus(card("RTX 5070 Ti", 15.5, 66.0, 0.8)),
    fifth_bus(card("RTX 5070", 11.6, 46.0, 0.6)),
    card("RTX 4090", 23.5, 125.0, 0.9),
    card("RTX 4080", 15.6, 74.0, 0.65),
    card("RTX 4070", 11.6, 44.0, 0.45),
    card("RTX 4060 Ti", 15.6, 33.0, 0.26),
    card("RTX 4060", 7.6, 23.0, 0.24),
    ampere("RTX 3090", 23.5, 54.0, 0.84),
    ampere("RTX 3080", 9.6, 45.0, 0.68),
    ampere("RTX 3060", 11.6, 19.0, 0.32),
];

/// Bytes that driver and context take on the card beside what the engine allocates, roughly.
const CONTEXT_BYTES: u64 = 600 << 20;

/// What the driver takes for an operation of a captured program, which is a straight line: full fine-tuning of 135M took
/// less than 8 MiB for 550 operations.
const GRAPH_BYTES: u64 = 8 << 10;

impl KnownCard {
    /// The card that a name means, as the driver or a user writes it.
    pub fn named(name: &str) -> Option<&'static KnownCard> {
        let name = name.to_lowercase();
        KNOWN_CARDS.iter().find(|card| name.contains(&card.name.to_lowercase()))
    }

    /// A target for this card with nothing else on it, in a machine that has as much memory to spare, or 16 GiB.
    pub fn target(&self) -> Target {
        let memory = (self.memory_gib * f64::from(1 << 30)) as u64 - CONTEXT_BYTES;
        let target =
            describe(self.name.to_string(), memory, self.matrix_tflops, self.bandwidth_tbs, self.fp8, self.bus_gbs);
        Target { host_memory: Some(memory.max(16 << 30)), ..target }
    }
}

/// The target of an open card, with the memory that is free on it now.
///
/// # Errors
/// When a library is missing, there is no such card, or it is too old.
pub fn target(ordinal: usize) -> Result<Target, EngineError> {
    super::require_libraries()?;
    let cards = super::cards()?;
    let facts: &CardFacts = cards
        .get(ordinal)
        .ok_or_else(|| unsupported(format!("there is no card {ordinal}; the driver shows {}", cards.len())))?;
    super::compile::architecture(facts.capability)?;
    let (free, _) = super::driver::Card::open(ordinal)?.memory()?;
    // An unknown card: by its size, on the safe side.
    let multiprocessors = f64::from(facts.multiprocessors);
    let (tflops, bandwidth, bus) = KnownCard::named(&facts.name)
        .map_or((multiprocessors * 0.8, multiprocessors * 0.006, 24.0), |card| {
            (card.matrix_tflops, card.bandwidth_tbs, card.bus_gbs)
        });
    // What was free may not be used to the last byte: the driver takes some for kernels as they are loaded.
    let fp8 = facts.capability >= (8, 9);
    let target = describe(facts.name.clone(), free.saturating_sub(150 << 20), tflops, bandwidth, fp8, bus);
    // The rest is for files on their way and for others.
    let host_memory = sysinfo::System::new().ok().map(|mut system| {
        system.refresh_memory();
        system.available_memory() / 5 * 3
    });
    Ok(Target { host_memory, ..target })
}

fn describe(name: String, memory: u64, matrix_tflops: f64, bandwidth_tbs: f64, fp8: bool, bus_gbs: f64) -> Target {
    Target {
        name,
        engine: super::ENGINE,
        memory: Some(memory),
        largest_segment: u64::MAX,
        largest_buffer: u64::MAX,
        alignment: 256,
        compute: DType::BF16,
        trainable: DType::BF16,
        gradients: DType::F32,
        // A tile of products apart where updates of short rows end: what no row fills is computed for nothing.
        micro_sizes: (2..=16).map(|tiles| 128 * tiles).chain([2560, 3072, 4096, 8192, 16384, 32768]).collect(),
        rates: Rates {
            flops: matrix_tflops * 1e12,
            attention_flops: matrix_tflops * 0.65e12,
            bandwidth: bandwidth_tbs * 1e12,
            per_op: 3e-6,
        },
        fp8_flops: fp8.then_some(matrix_tflops * FP8_SPEEDUP * 1e12),
        library_workspace: WORKSPACE_BYTES + (8 << 20),
        graph_bytes: GRAPH_BYTES,
        bus_bandwidth: bus_gbs * 1e9,
        host_memory: None,
        logits_bytes: 256 << 20,
        mlp_tokens: usize::MAX,
    }
}
