//! A device as plain data: enough to plan for it without opening it.

use serde::{Deserialize, Serialize};

use super::DType;

/// Measured speeds, for time estimates.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Rates {
    /// Matrix products, floating-point operations per second.
    pub flops: f64,
    /// Attention forward, floating-point operations per second; backward it is taken to reach three quarters of that.
    pub attention_flops: f64,
    /// Device memory, bytes per second.
    pub bandwidth: f64,
    /// Fixed cost of one operation, seconds.
    pub per_op: f64,
}

/// The name of an engine. An alias, for serde takes a reference in a field to borrow from its input.
pub type EngineName = &'static str;

/// The limits and wishes of an engine on a device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Target {
    /// Shown to the user: `CPU, 2 threads`, `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// `cpu`, `wgpu` or `cuda`.
    #[serde(deserialize_with = "engine")]
    pub engine: EngineName,
    /// Bytes a plan may use; none when only the machine's memory limits it.
    pub memory: Option<u64>,
    /// Largest arena segment, bytes.
    pub largest_segment: u64,
    /// Alignment of every placement, bytes.
    pub alignment: u64,
    /// Type of activations and their gradients.
    pub compute: DType,
    /// Type of trainable parameters in full fine-tuning.
    pub trainable: DType,
    /// Type of the gradients of matrices in full fine-tuning; those of vectors are f32.
    pub gradients: DType,
    /// Micro-batch sizes, ascending, as multiples to choose from.
    pub micro_sizes: Vec<usize>,
    pub rates: Rates,
    /// Products of 8-bit floats, floating-point operations per second; none where the device has no such products.
    pub fp8_flops: Option<f64>,
    /// Workspace that libraries take beside the arena, bytes.
    pub library_workspace: u64,
    /// What an operation of a program takes on the device once the program is captured, bytes.
    pub graph_bytes: u64,
    /// Between device and host, bytes per second.
    pub bus_bandwidth: f64,
    /// Bytes that layers may leave in the host's memory; none where it is not known.
    pub host_memory: Option<u64>,
    /// Most bytes that the logits of one head chunk may take.
    pub logits_bytes: u64,
    /// Most tokens that go through an MLP at once where its values are computed again for the backward pass.
    pub mlp_tokens: usize,
    /// Largest rank of the LoRA branches of an MLP whose backward pass does without the gated product
    /// ([`Program::does_without`](super::Program::does_without)); 0 where none does.
    pub gated_rank: usize,
    /// Norms whose result the backward pass does without; none where there are none.
    pub norms: Option<NormLimits>,
}

/// Which norms' results the backward pass does without, for the gradients of the LoRA branches that read them come with theirs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct NormLimits {
    /// Columns are cut into at most so many slices alike, multiples of 16 of at most so many columns.
    pub most_slices: usize,
    pub widest_slice: usize,
    /// Of the branches that read one, together.
    pub most_ranks: usize,
    /// Bytes of the result.
    pub least_bytes: usize,
}

impl NormLimits {
    /// Whether a norm of so many rows and columns is one, read by branches of these ranks together.
    pub fn take(&self, (rows, columns): (usize, usize), ranks: usize) -> bool {
        self.slices(columns).is_some()
            && (1..=self.most_ranks).contains(&ranks)
            && 2 * rows * columns >= self.least_bytes
    }

    /// The fewest slices of so many columns.
    pub fn slices(&self, columns: usize) -> Option<usize> {
        let fits = |slices: &usize| columns.is_multiple_of(16 * slices) && columns / slices <= self.widest_slice;
        (1..=self.most_slices).find(fits)
    }
}

/// The engine of a written target, which names one of this program's.
fn engine<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<EngineName, D::Error> {
    let name = String::deserialize(deserializer)?;
    let known = ["cpu", "wgpu", "cuda"].into_iter().find(|known| *known == name);
    known.ok_or_else(|| serde::de::Error::custom(format!("{name} is no engine")))
}

impl Target {
    /// Whether kernels read and write page-locked host memory: frozen embeddings, optimizer states and layer inputs
    /// may then lie there.
    pub fn reaches_host(&self) -> bool {
        self.engine == "cuda"
    }

    /// Tokens of which a micro-batch beyond the usual sizes is a multiple: what tiles on cooperative matrices divide.
    pub fn token_unit(&self) -> usize {
        if self.engine == "wgpu" { 64 } else { 1 }
    }

    /// Whether copies between device and host run beside other operations.
    pub fn copies_beside(&self) -> bool {
        self.engine == "cuda"
    }

    /// Whether products take quantized weights only unpacked: a pass over them in each operation.
    pub fn unpacks_weights(&self) -> bool {
        self.engine == "cuda"
    }

    /// Whether quantized weights are unpacked one at a time into a buffer of their own.
    pub fn unpacks_apart(&self) -> bool {
        self.engine == "wgpu"
    }

    /// Whether the operations of training work on ranges of rows one after the other, so that what has a row a token may lie
    /// in pieces.
    pub fn works_on_rows(&self) -> bool {
        self.engine == "wgpu"
    }

    /// Whether a product takes LoRA branches beside its factors, in columns that their rows have to spare.
    pub fn branches_beside(&self) -> bool {
        self.engine == "cuda"
    }

    /// Whether arithmetic goes on while memory is waited for. A CPU's products first convert the weights, then compute.
    pub fn overlaps_memory(&self) -> bool {
        self.engine != "cpu"
    }

    /// Whether an element-wise operation may write its result over its own input.
    pub fn works_in_place(&self) -> bool {
        self.engine == "cuda"
    }
}
