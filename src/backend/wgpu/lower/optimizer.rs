//! Work on many tensors at once: casts, zeroes, the gradient norm, AdamW. Tensors that follow each other in every
//! buffer involved are one range and one dispatch.

use super::Lowering;
use crate::backend::EngineError;
use crate::backend::wgpu::storage::View;
use crate::backend::wgpu::tables;
use crate::program::{BufferId, DType, Op, block8};

/// Slab entries start at multiples of this many elements.
const UNIT: usize = 128;

impl Lowering<'_> {
    pub(super) fn optimizer(&mut self, op: &Op) -> Result<(), EngineError> {
        match op {
            Op::Cast { pairs } => {
                let pairs = pairs.iter().map(|&(from, to)| [self.view(from), self.view(to)]).collect();
                for [from, to] in self.ranges(pairs, UNIT) {
                    let mut call = self.call("cast");
                    self.bind(&mut call, "input", &from);
                    self.bind(&mut call, "output", &to);
                    call.number("count", from.stride);
                    self.launch(call, [groups(from.stride), 1, 1])?;
                }
                Ok(())
            }
            Op::Zero { buffers } => {
                // As words: a buffer of halves with an odd count has room for one more.
                let buffers = buffers.iter().map(|&id| [self.view(id)]).collect();
                for [range] in self.ranges(buffers, UNIT) {
                    let words = (range.bytes() as usize).div_ceil(4);
                    let mut call = self.call("zero");
                    let words_view = View { dtype: DType::U32, stride: words, width: words, ..range };
                    self.bind(&mut call, "output", &words_view);
                    call.number("count", words);
                    self.launch(call, [groups(words), 1, 1])?;
                }
                Ok(())
            }
            Op::GradientNorm { gradients, norm } => {
                let gradients = gradients.iter().map(|&id| [self.view(id)]).collect();
                let ranges = self.ranges(gradients, UNIT);
                let total = ranges.iter().map(|[range]| norm_groups(range.stride)).sum();
                let parts = self.scratch(total);
                let mut first = 0;
                for [range] in ranges {
                    let count = norm_groups(range.stride);
                    let mut call = self.reducing("gradient_norm");
                    self.bind(&mut call, "gradient", &range);
                    self.bind(&mut call, "parts", &parts);
                    call.number("count", range.stride).number("first_part", first);
                    self.launch(call, [count, 1, 1])?;
                    first += count;
                }
                let mut call = self.reducing("gradient_norm_total");
                self.bind(&mut call, "parts", &parts);
                self.bind(&mut call, "norm", &self.view(*norm));
                call.number("count", total);
                self.launch(call, [1, 1, 1])
            }
            Op::AdamW { parts, norm, hyper, betas, epsilon, weight_decay, max_grad_norm, .. } => {
                let plan = self.plan;
                let eight_bit = |id: BufferId| plan.workload.buffer(id).dtype == DType::Block8;
                for part in parts.iter().filter(|part| eight_bit(part.first_moment)) {
                    let both = [self.view(part.parameter), self.view(part.gradient)];
                    let states = [self.view(part.first_moment), self.view(part.second_moment)];
                    let refused = |why: String| {
                        let name = &plan.workload.buffer(part.parameter).name;
                        let what = format!("8-bit states of {name}: {why}; use train.optimizer = \"adamw\"");
                        EngineError::Unsupported { engine: super::super::adapter::ENGINE, what }
                    };
                    // Both states are cut alike, if they are.
                    let cut = self.cut(&states[0]);
                    let (rows, bytes) = cut.map_or((states[0].rows, states[0].bytes()), |cut| (cut.rows, cut.bytes));
                    let binding = self.facts.limits.binding;
                    if bytes > binding {
                        return Err(refused(format!(
                            "they take {bytes} bytes, and the adapter binds at most {binding}"
                        )));
                    }
                    let piece = rows * states[0].stride;
                    let mut first = 0usize;
                    for [parameter, gradient] in self.ranges_in_pieces(vec![both], block8::BLOCK, Some(piece)) {
                        if !first.is_multiple_of(block8::BLOCK) {
                            return Err(refused("the adapter's memory cuts the parameter within a block".into()));
                        }
                        let [first_moment, second_moment] = states.map(|state| View {
                            offset: state.offset + (first / piece) as u64 * bytes,
                            rows: rows.min(state.rows - first / piece * rows),
                            ..state
                        });
                        let mut call = self.call("adamw_block8");
                        self.bind(&mut call, "parameter", &parameter);
                        self.bind(&mut call, "gradient", &gradient);
                        self.bind_words(&mut call, "first_moment", &first_moment);
                        self.bind_words(&mut call, "second_moment", &second_moment);
                        self.bind(&mut call, "norm", &self.view(*norm));
                        self.bind(&mut call, "hyper", &self.view(*hyper));
                        self.bind(&mut call, "table", &tables::view());
                        call.number("count", parameter.stride).float("max_grad_norm", *max_grad_norm);
                        call.float("beta1", betas[0]).float("beta2", betas[1]);
                        call.float("epsilon", *epsilon).float("weight_decay", *weight_decay);
                        let blocks = parameter.stride.div_ceil(block8::BLOCK);
                        call.number("blocks", blocks);
                        call.number("all_blocks", first_moment.elements().div_ceil(block8::BLOCK));
                        call.number("first_block", first % piece / block8::BLOCK);
                        self.launch(call, [blocks.min(65535), blocks.div_ceil(65535), 1])?;
                        first += parameter.stride;
                    }
                }
                let views = parts
                    .iter()
                    .filter(|part| !eight_bit(part.first_moment))
                    .map(|part| [part.parameter, part.gradient, part.first_moment, part.second_moment])
                    .map(|ids| ids.map(|id| self.view(id)))
                    .collect();
                for [parameter, gradient, first, second] in self.ranges(views, UNIT) {
                    if !matches!(parameter.dtype, DType::F32) {
                        return Err(EngineError::Unsupported {
                            engine: super::super::adapter::ENGINE,
                            what: format!("training {} parameters: it trains f32 ones", parameter.dtype.name()),
                        });
                    }
                    let mut call = self.call("adamw");
                    self.bind(&mut call, "parameter", &parameter);
                    self.bind(&mut call, "gradient", &gradient);
                    self.bind(&mut call, "first_moment", &first);
                    self.bind(&mut call, "second_moment", &second);
                    self.bind(&mut call, "norm", &self.view(*norm));
                    self.bind(&mut call, "hyper", &self.view(*hyper));
                    call.number("count", parameter.stride).float("max_grad_norm", *max_grad_norm);
                    call.float("beta1", betas[0]).float("beta2", betas[1]);
                    call.float("epsilon", *epsilon).float("weight_decay", *weight_decay);
                    self.launch(call, [groups(parameter.stride), 1, 1])?;
                }
                Ok(())
            }
            _ => unreachable!("not an operation on many tensors"),
        }
    }

    /// Flat ranges that cover `tensors`: neighbours joined, padding between them included, and cut where a binding or a piece of
    /// memory ends, at multiples of `unit` elements for a binding. All views of a range have the same number of elements.
    fn ranges<const N: usize>(&self, tensors: Vec<[View; N]>, unit: usize) -> Vec<[View; N]> {
        self.ranges_in_pieces(tensors, unit, None)
    }

    /// The same, cut besides after every so many elements of a tensor that is alone.
    fn ranges_in_pieces<const N: usize>(
        &self,
        tensors: Vec<[View; N]>,
        unit: usize,
        piece: Option<usize>,
    ) -> Vec<[View; N]> {
        let mut ranges: Vec<[View; N]> = Vec::new();
        for views in tensors {
            let views = views.map(|view| view.flat());
            if let Some(last) = ranges.last_mut() {
                let padded = last[0].stride.next_multiple_of(UNIT);
                let follows = last.iter().zip(&views).all(|(left, right)| {
                    left.place == right.place
                        && left.dtype == right.dtype
                        && left.offset + left.dtype.bytes(&[padded]) == right.offset
                });
                if follows {
                    for (left, right) in last.iter_mut().zip(&views) {
                        left.stride = padded + right.stride;
                        left.width = left.stride;
                    }
                    continue;
                }
            }
            ranges.push(views);
        }
        let most = |range: &[View; N]| {
            let widest = range.iter().map(|view| view.dtype.bytes(&[unit])).max().unwrap_or(1);
            ((self.facts.limits.binding / widest) as usize * unit).max(unit)
        };
        let mut parts = Vec::new();
        for range in ranges {
            // A tensor that is cut is alone in its slab.
            let own = |view: &View| Some((self.cut(view)?.bytes / view.dtype.bytes(&[1])) as usize);
            let pieces: Vec<usize> = range.iter().filter_map(own).chain(piece).collect();
            let mut first = 0;
            while first < range[0].stride {
                let ends = pieces.iter().map(|piece| piece - first % piece);
                let count = ends.fold(most(&range).min(range[0].stride - first), usize::min);
                parts.push(range.map(|view| {
                    let offset = view.offset + view.dtype.bytes(&[first]);
                    View { offset, stride: count, width: count, ..view }
                }));
                first += count;
            }
        }
        parts
    }
}

fn groups(count: usize) -> usize {
    count.div_ceil(256).min(16384)
}

fn norm_groups(count: usize) -> usize {
    count.div_ceil(2048).min(1024)
}
