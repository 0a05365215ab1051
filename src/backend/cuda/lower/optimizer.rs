//! Gradient norm and AdamW: sets of tensors in one launch.

use super::Lowering;
use super::elementwise::push_pieces;
use crate::backend::EngineError;
use crate::backend::cuda::command::arguments;
use crate::backend::cuda::driver::{DeviceMemory, unsupported};
use crate::program::{AdamWPart, BufferId, DType, Op, block8};

/// Elements of a piece in `gradient_norm_partial`.
const NORM_PIECE: usize = 8192;
/// Elements of a piece in the AdamW kernels.
const ADAM_PIECE: usize = 2048;

impl Lowering<'_> {
    pub(super) fn gradient_norm(&mut self, gradients: &[BufferId], norm: BufferId) -> Result<(), EngineError> {
        let (mut parts, mut pieces) = (Vec::new(), Vec::new());
        for &gradient in gradients {
            let elements = self.workload.buffer(gradient).elements();
            push_pieces(&mut pieces, (parts.len() / 3) as u32, elements, NORM_PIECE);
            parts.extend([self.address(gradient), elements as u64, u64::from(self.half("gradient_norm", gradient)?)]);
        }
        let blocks = pieces.len() / 2;
        let parts = self.keep(bytemuck::cast_slice(&parts), "a table of gradients")?;
        let pieces = self.keep(bytemuck::cast_slice(&pieces), "a table of pieces")?;
        let partial = DeviceMemory::new(self.card, 8 * blocks as u64, "partial norms")?;
        let pointer = partial.pointer;
        self.kept.push(partial);
        let arguments = arguments![parts, pieces, pointer];
        self.launch("adamw", "gradient_norm_partial", [blocks, 1, 1], 256, arguments)?;
        let arguments = arguments![pointer, blocks as i32, self.address(norm)];
        self.launch("adamw", "gradient_norm_finish", [1, 1, 1], 1024, arguments)
    }

    /// Whether a gradient is held in bf16 instead of f32.
    fn half(&self, op: &str, gradient: BufferId) -> Result<bool, EngineError> {
        match self.memory.stored(gradient) {
            DType::F32 => Ok(false),
            DType::BF16 => Ok(true),
            other => Err(unsupported(format!("{op} of gradients in {}", other.name()))),
        }
    }

    pub(super) fn adamw(&mut self, op: &Op) -> Result<(), EngineError> {
        let Op::AdamW { parts, norm, hyper, key, betas, epsilon, weight_decay, max_grad_norm } = op else {
            return Ok(());
        };
        let kind = |part: &AdamWPart| (self.memory.stored(part.parameter), self.memory.stored(part.first_moment));
        let mut kinds: Vec<(DType, DType)> = parts.iter().map(kind).collect();
        kinds.sort_by_key(|(parameter, moment)| (parameter.name(), moment.name()));
        kinds.dedup();
        let selected: Vec<Vec<&AdamWPart>> =
            kinds.iter().map(|wanted| parts.iter().filter(|part| kind(part) == *wanted).collect()).collect();
        for ((parameter, moment), parts) in kinds.into_iter().zip(selected) {
            let file = match moment {
                DType::F32 => "adamw",
                DType::Block8 => "adamw8",
                other => return Err(unsupported(format!("AdamW with moments in {}", other.name()))),
            };
            if !matches!(parameter, DType::F32 | DType::BF16) {
                return Err(unsupported(format!("AdamW on parameters in {}", parameter.name())));
            }
            let (mut table, mut pieces) = (Vec::new(), Vec::new());
            for part in parts {
                let second = [part.second_moment];
                self.expect("AdamW", &second, moment)?;
                let half = u64::from(self.half("AdamW", part.gradient)?);
                let elements = self.workload.buffer(part.parameter).elements() as u64;
                push_pieces(&mut pieces, (table.len() / 8) as u32, elements as usize, ADAM_PIECE);
                let (first, second) = (self.address(part.first_moment), self.address(part.second_moment));
                // Scales of 8-bit moments come before the codes.
                let codes = if moment == DType::Block8 { block8::scale_bytes(elements as usize) as u64 } else { 0 };
                table.extend([
                    self.address(part.parameter),
                    self.address(part.gradient),
                    first + codes,
                    second + codes,
                    first,
                    second,
                    elements,
                    u64::from(part.stream) | half << 32,
                ]);
            }
            let blocks = pieces.len() / 2;
            let table = self.keep(bytemuck::cast_slice(&table), "a table of parameters")?;
            let pieces = self.keep(bytemuck::cast_slice(&pieces), "a table of pieces")?;
            let arguments = arguments![
                table,
                pieces,
                self.address(*norm),
                self.address(*hyper),
                self.address(*key),
                self.tables.pointer(),
                betas[0],
                betas[1],
                *epsilon,
                *weight_decay,
                *max_grad_norm,
            ];
            let entry = format!("{file}_{}", parameter.name());
            self.launch("adamw", &entry, [blocks, 1, 1], 256, arguments)?;
        }
        Ok(())
    }
}
