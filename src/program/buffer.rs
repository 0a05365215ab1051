//! Buffers: the named, typed arrays that operations read and write.

use serde::{Deserialize, Serialize};

/// How the elements of a buffer are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    F32,
    F16,
    BF16,
    I32,
    U32,
    /// 4-bit NormalFloat with double-quantized block scales, as bitsandbytes stores it
    /// (Dettmers et al. 2023, arXiv 2305.14314): blocks of 64, scales in blocks of 256.
    Nf4,
    /// 8-bit integers with one f32 scale a row.
    Int8,
    /// 8-bit floats (e4m3) with one f32 scale a tensor.
    Fp8,
    /// Block-wise 8-bit optimizer state (Dettmers et al. 2022, arXiv 2110.02861):
    /// blocks of 256 codes, one f32 scale a block.
    Block8,
}

impl DType {
    /// Bytes that a tensor of this shape takes, scales included.
    pub fn bytes(self, shape: &[usize]) -> u64 {
        let elements: u64 = shape.iter().map(|&n| n as u64).product();
        match self {
            DType::F32 | DType::I32 | DType::U32 => elements * 4,
            DType::F16 | DType::BF16 => elements * 2,
            DType::Nf4 => {
                let blocks = elements.div_ceil(64);
                elements.div_ceil(2) + blocks + blocks.div_ceil(256) * 4 + 4
            }
            DType::Int8 => elements + 4 * shape.first().copied().unwrap_or(1) as u64,
            DType::Fp8 => elements + 4,
            DType::Block8 => elements + elements.div_ceil(256) * 4,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::I32 => "i32",
            DType::U32 => "u32",
            DType::Nf4 => "nf4",
            DType::Int8 => "int8",
            DType::Fp8 => "fp8",
            DType::Block8 => "block8",
        }
    }

    pub fn is_quantized(self) -> bool {
        matches!(self, DType::Nf4 | DType::Int8 | DType::Fp8)
    }
}

/// What a buffer is for: it decides how long the buffer lives and where its bytes are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A tensor of the checkpoint, read at the start; trainable in full fine-tuning.
    Weight,
    /// A LoRA matrix, or its copy in the compute type.
    Adapter,
    /// The gradient of a trainable tensor, summed over the micro-batches of an update.
    Gradient,
    Optimizer,
    /// Key-value cache of generation.
    Cache,
    /// Written by the host before a program runs: token ids, positions, targets.
    Input,
    /// Read by the host after a program ran: logits, losses.
    Output,
    /// A few numbers: learning rate, loss, norms, random seed.
    Scalar,
    /// A table fixed when the workload is built, such as rotary frequencies.
    Constant,
    /// A layer's input on its way from the forward to the backward pass, kept in the host's memory where the engine
    /// can ([`Target::reaches_host`](super::Target::reaches_host)).
    Offload,
    /// A value inside one program; its memory is shared with others once it is dead.
    Activation,
    /// Scratch space that one operation uses while it runs.
    Workspace,
}

impl Kind {
    /// Transient buffers belong to one program and live in the arena; all others persist.
    pub fn is_transient(self) -> bool {
        matches!(self, Kind::Activation | Kind::Workspace)
    }

    pub fn name(self) -> &'static str {
        match self {
            Kind::Weight => "weights",
            Kind::Adapter => "adapter",
            Kind::Gradient => "gradients",
            Kind::Optimizer => "optimizer",
            Kind::Cache => "cache",
            Kind::Input => "inputs",
            Kind::Output => "outputs",
            Kind::Scalar => "scalars",
            Kind::Constant => "constants",
            Kind::Offload => "offloaded",
            Kind::Activation => "activations",
            Kind::Workspace => "workspace",
        }
    }
}

/// Index of a buffer in [`Workload::buffers`](super::Workload::buffers).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct BufferId(pub u32);

impl BufferId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A named array of a fixed shape, row-major.
#[derive(Clone, Debug, Serialize)]
pub struct Buffer {
    /// The checkpoint's name for a weight (`model.layers.3.mlp.up_proj.weight`), else what it holds
    /// (`layers.3.attn.qkv`).
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: DType,
    pub kind: Kind,
    /// Of a buffer that is some rows of another, transient one: which, and from what row on.
    pub within: Option<(BufferId, usize)>,
}

impl Buffer {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// First dimension; 1 for a scalar.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Elements of one row: the distance between rows.
    pub fn columns(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(&self.shape)
    }
}

/// A block of columns of a `[rows, columns]` buffer, every row of it.
///
/// Projections that share an input write side by side into one wide buffer, so that an engine may
/// run them as one product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Columns {
    pub buffer: BufferId,
    pub start: usize,
    pub width: usize,
}
