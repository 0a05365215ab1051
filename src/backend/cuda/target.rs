//! The card as plain data: of the card present, or of known ones.

use super::driver::shared_bytes;
use super::known::KnownCard;
use super::lower::{gated_rank, has_clusters, norm_limits};
use super::product::WORKSPACE_BYTES;
use crate::backend::EngineError;
use crate::program::{DType, Rates, Target};

/// Bytes that driver and context take on the card beside what the engine allocates, roughly.
const CONTEXT_BYTES: u64 = 600 << 20;

/// What the driver takes for an operation of a captured program, which is a straight line: full fine-tuning of 135M took
/// less than 8 MiB for 550 operations.
const GRAPH_BYTES: u64 = 8 << 10;

impl KnownCard {
    /// A target for this card with nothing else on it, in a machine that has as much memory to spare, or 16 GiB.
    pub fn target(&self) -> Target {
        let memory = (self.memory_gib * f64::from(1 << 30)) as u64 - CONTEXT_BYTES;
        let target =
            describe(self.name.to_string(), memory, self.matrix_tflops, self.bandwidth_tbs, self.fp8, self.bus_gbs);
        let shared = shared_bytes(match (self.server, self.fp8) {
            (true, true) => (9, 0),
            (true, false) => (8, 0),
            (false, _) => (8, 6),
        });
        let host_memory = Some(memory.max(16 << 30));
        with_kernels(Target { host_memory, ..target }, shared, self.server && self.fp8)
    }
}

/// The target of an open card, with the memory that is free on it now.
///
/// # Errors
/// When a library is missing, there is no such card, or it is too old.
pub fn target(ordinal: usize) -> Result<Target, EngineError> {
    let facts = super::usable(ordinal)?;
    let card = super::driver::Card::open(ordinal)?;
    let (free, _) = card.memory()?;
    // An unknown card: by its size, on the safe side.
    let multiprocessors = f64::from(facts.multiprocessors);
    let (tflops, bandwidth, bus) = KnownCard::named(&facts.name)
        .map_or((multiprocessors * 0.8, multiprocessors * 0.006, 24.0), |card| {
            (card.matrix_tflops, card.bandwidth_tbs, card.bus_gbs)
        });
    // What was free may not be used to the last byte: the driver takes some for kernels as they are loaded.
    let fp8 = facts.has_fp8();
    let target = describe(facts.name.clone(), free.saturating_sub(150 << 20), tflops, bandwidth, fp8, bus);
    // The rest is for files on their way and for others.
    let host_memory = sysinfo::System::new().ok().map(|mut system| {
        system.refresh_memory();
        // A container may have less than the machine.
        let own = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
        system.available_memory().min(own) / 5 * 3
    });
    Ok(with_kernels(Target { host_memory, ..target }, card.shared_bytes, has_clusters(&card)))
}

/// The target with what kernels on a card with so much shared memory a block do without.
fn with_kernels(target: Target, shared: usize, has_clusters: bool) -> Target {
    Target { gated_rank: gated_rank(shared), norms: norm_limits(has_clusters, shared), ..target }
}

/// Products of 8-bit floats over those of bf16, measured on the H100 (1,318 and 750 TFLOP/s).
const FP8_SPEEDUP: f64 = 1.757;

fn describe(name: String, memory: u64, matrix_tflops: f64, bandwidth_tbs: f64, fp8: bool, bus_gbs: f64) -> Target {
    Target {
        name,
        engine: super::ENGINE,
        memory: Some(memory),
        largest_segment: u64::MAX,
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
        gated_rank: 0,
        norms: None,
    }
}
