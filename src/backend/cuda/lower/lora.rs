//! LoRA branches: beside the factors of the whole product in the forward pass, and both sums over the gradient of the
//! output in one pass over it in the backward pass (`kernels/lora.cu`).

use super::Lowering;
use super::gated::Gated;
use super::linear::{Pair, forward_product, join, side_by_side_groups, stacked};
use super::rotated::Rotated;
use super::tiling::{RANKS, Slices, Tiling, compiled_rank, partial_bytes};
use crate::backend::EngineError;
use crate::backend::cuda::command::arguments;
use crate::backend::cuda::compile::Variant;
use crate::backend::cuda::product::{Alpha, Matrix, Product};
use crate::program::spare::{branch_columns, gradient_ranks};
use crate::program::{BufferId, Columns, DType, Lora, LoraBackward, Op, Projection, ProjectionBackward};

/// Projections that a kernel of `lora.cu` takes at once.
pub(super) const MOST_PARTS: usize = 4;

/// Gradients that `lora_add_up` takes at once: of `a` of the branches that read a norm, and of `b` of that below.
const MOST_SUMS: usize = MOST_PARTS + 1;

/// The factors of a product that gives the gradient of an input, branches included.
pub(super) struct Below {
    /// With columns to spare.
    grad_output: Matrix,
    /// Of all branches, below each other.
    a: Matrix,
    /// Of all projections, below each other, with rows to spare; none where they are unpacked.
    weight: Option<Matrix>,
    /// The largest of the branches.
    rank: usize,
}

impl Below {
    /// The gradient of the output and, beside it, the branches'.
    fn longer(&self) -> Matrix {
        Matrix { columns: self.grad_output.columns + self.a.rows, ..self.grad_output }
    }

    /// Where the gradients of the branches' middles lie.
    pub(super) fn middles(&self, projections: &[ProjectionBackward]) -> Vec<Matrix> {
        let mut next = self.grad_output.columns;
        let loras = projections.iter().filter_map(|projection| projection.lora.as_ref());
        let place = |lora: &LoraBackward| {
            let start = next;
            next += lora.middle.width;
            self.longer().slice_columns(start, lora.middle.width)
        };
        loras.map(place).collect()
    }
}

/// A projection's side of the backward pass.
pub(super) struct Branch {
    grad_output: Matrix,
    b: Matrix,
    middle: Matrix,
    grad_middle: Matrix,
    grad_b: Matrix,
    scale: u64,
}

impl Branch {
    pub(super) fn rank(&self) -> usize {
        self.b.columns
    }

    pub(super) fn grad_b(&self) -> Matrix {
        self.grad_b
    }

    /// As `lora_norm.cu` takes it, with the place of its partial sums.
    pub(super) fn below_norm(&self, partial: u64) -> Vec<u64> {
        vec![
            self.b.pointer,
            self.middle.pointer,
            self.grad_middle.pointer,
            partial,
            self.scale,
            self.middle.stride as u64,
            self.grad_middle.stride as u64,
            self.rank() as u64,
        ]
    }

    /// Columns and rank.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.grad_output.columns, self.rank())
    }

    /// Whether rows of all matrices are read 16 bytes at a time.
    pub(super) fn is_even(&self) -> bool {
        let sizes = [self.rank(), self.grad_output.columns];
        sizes.iter().all(|size| size.is_multiple_of(8))
            && [self.grad_output, self.b, self.middle, self.grad_middle, self.grad_b].into_iter().all(even)
    }
}

/// What makes both sums over gradients of outputs, and how it shares the work.
pub(super) enum Sums<'a> {
    /// A pass of their own.
    Alone(&'a Tiling),
    /// That which makes the gradients of gate and up.
    Gated(&'a Tiling, &'a Gated),
    /// That which turns those of queries and keys.
    Rotated(&'a Slices, &'a Rotated),
}

impl Sums<'_> {
    /// Ranks that kernels are compiled for.
    fn rank(&self) -> usize {
        match self {
            Self::Alone(tiling) | Self::Gated(tiling, _) => tiling.rank,
            Self::Rotated(slices, _) => slices.slice.rank,
        }
    }

    /// Tokens of a launch.
    fn tokens(&self) -> usize {
        match self {
            Self::Alone(tiling) | Self::Gated(tiling, _) => tiling.tokens,
            Self::Rotated(slices, _) => slices.tokens,
        }
    }

    /// Strips of so many columns, and the column tiles of each where there are such.
    fn strips(&self, columns: usize) -> (usize, usize) {
        match self {
            Self::Alone(tiling) | Self::Gated(tiling, _) => (tiling.strips(columns), tiling.strip_tiles),
            Self::Rotated(slices, _) => (slices.slice.strips(columns), 0),
        }
    }

    /// Blocks that share so many tokens.
    fn blocks(&self, tokens: usize) -> usize {
        match self {
            Self::Alone(tiling) | Self::Gated(tiling, _) => tiling.token_blocks(tokens),
            Self::Rotated(slices, _) => slices.groups(tokens),
        }
    }
}

impl Lowering<'_> {
    /// Columns beside input and weights in which the branches of a linear operation have their place, if they do.
    pub(super) fn room_beside(&self, input: BufferId, projections: &[Projection]) -> Option<usize> {
        let columns = branch_columns(self.workload, projections)?;
        let spare = |id: BufferId| self.memory.spare(self.workload, id);
        let unpacked = |id: BufferId| matches!(self.memory.stored(id), DType::Nf4 | DType::Int8);
        let weights = projections.iter().map(|projection| projection.weight);
        let few = projections.len() <= MOST_PARTS;
        let room = few && spare(input) >= columns && weights.into_iter().all(|id| unpacked(id) || spare(id) == columns);
        room.then_some(columns)
    }

    /// `output = [x | scale · middle] · [weight | b]ᵀ`, with the branches in `columns` columns beside the factors.
    pub(super) fn whole_with_branches(
        &mut self,
        x: Matrix,
        projections: &[Projection],
        columns: usize,
    ) -> Result<(), EngineError> {
        let longer = Matrix { columns: x.columns + columns, ..x };
        // Of x once, with the first product.
        let mut tokens = x.rows;
        let (mut offset, mut first_row) = (0, 0);
        let mut places = Vec::new();
        for projection in projections {
            let rows = self.rows(projection.weight);
            if let Some(lora) = &projection.lora {
                let (middle, rank) = (self.columns(lora.middle), lora.middle.width);
                let (b, scale) = (self.address(lora.b), self.address(lora.scale));
                places.push([
                    middle.pointer,
                    b,
                    scale,
                    middle.stride as u64,
                    words(offset, rank),
                    words(first_row, rows),
                ]);
                offset += rank;
            }
            first_row += rows;
        }
        let weights: Vec<BufferId> = projections.iter().map(|projection| projection.weight).collect();
        if !self.all_quantized(&weights)? {
            let pairs = projections.iter().map(|p| (self.matrix(p.weight), self.columns(p.output)));
            let mut first_row = 0;
            for (weight, output) in join(pairs) {
                let longer_weight = Matrix { columns: x.columns + columns, ..weight };
                self.place_beside(&places, (x, tokens), (weight, first_row), columns)?;
                self.product(forward_product(longer, longer_weight, output, false))?;
                (tokens, first_row) = (0, first_row + weight.rows);
            }
            return Ok(());
        }
        let stride = x.columns + columns;
        let scratch = self.memory.scratch.pointer;
        let mut group_start = 0;
        let outputs: Vec<(BufferId, Matrix)> = projections.iter().map(|p| (p.weight, self.columns(p.output))).collect();
        for (group, output) in side_by_side_groups(outputs) {
            let rows: usize = group.iter().map(|&weight| self.rows(weight)).sum();
            for (first, count) in self.unpacked_blocks(rows, stride) {
                // The block's share of each weight.
                let mut start = 0;
                for &weight in &group {
                    let end = start + self.rows(weight);
                    let (from, to) = (first.max(start), (first + count).min(end));
                    if from < to {
                        let at = scratch + (2 * stride * (from - first)) as u64;
                        self.unpack(weight, (from - start, to - from), (0, x.columns), (at, stride))?;
                    }
                    start = end;
                }
                let block = Matrix { stride, ..Matrix::new(scratch, DType::BF16, count, x.columns) };
                self.place_beside(&places, (x, tokens), (block, group_start + first), columns)?;
                let longer_block = Matrix { columns: stride, ..block };
                self.product(forward_product(longer, longer_block, output.slice_columns(first, count), false))?;
                tokens = 0;
            }
            group_start += rows;
        }
        Ok(())
    }

    /// Fills the spare columns of `tokens` rows of x, and of a weight's rows, which begin at row `first_row` of all
    /// projections' below each other.
    fn place_beside(
        &mut self,
        places: &[[u64; 6]],
        (x, tokens): (Matrix, usize),
        (weight, first_row): (Matrix, usize),
        columns: usize,
    ) -> Result<(), EngineError> {
        let mut table = places.concat();
        table.resize(6 * MOST_PARTS, 0);
        let beside = |matrix: Matrix| matrix.pointer + matrix.columns as u64 * matrix.element_bytes();
        let threads = (tokens + weight.rows) * columns / 8;
        let arguments = arguments![
            table.into_boxed_slice(),
            places.len() as i32,
            beside(x),
            x.stride as i64,
            tokens as i32,
            beside(weight),
            weight.stride as i64,
            weight.rows as i32,
            first_row as i32,
            columns as i32,
        ];
        let widest = places.iter().map(|place| (place[4] >> 32) as usize).max().unwrap_or(0);
        self.launch_variant(&variant(widest), "lora_place", [threads.div_ceil(256), 1, 1], 256, 0, arguments)
    }

    /// A branch's middle from `parts` partial sums, f32 `[parts, T, r]` in the library's scratch.
    pub(super) fn finish_middle(&mut self, middle: Matrix, parts: usize) -> Result<(), EngineError> {
        let (tokens, rank) = (middle.rows, middle.columns);
        let arguments = arguments![
            self.products.workspace().0,
            parts as i32,
            middle.pointer,
            middle.stride as i64,
            tokens as i32,
            rank as i32,
        ];
        let grid = [(tokens * rank / 4).div_ceil(256), 1, 1];
        self.launch_variant(&variant(rank), "lora_middle_finish", grid, 256, 0, arguments)
    }

    /// The gradients of the branches, and their share of the input's, which is added where the whole product's is there.
    pub(super) fn lora_backward(
        &mut self,
        x: Matrix,
        grad_input: Option<Matrix>,
        projections: &[ProjectionBackward],
        branch_first: bool,
    ) -> Result<(), EngineError> {
        let loras: Vec<&LoraBackward> = projections.iter().filter_map(|p| p.lora.as_ref()).collect();
        let middles: Vec<Matrix> = loras.iter().map(|lora| self.columns(lora.grad_middle)).collect();
        self.branch_sums(projections, &middles)?;
        let plain = loras.iter().zip(middles).filter(|(lora, _)| lora.dropout.is_none());
        let pairs = plain.map(|(lora, middle)| (self.matrix(lora.grad_a), middle)).collect();
        self.weight_gradients(x, pairs)?;
        if let Some(grad_input) = grad_input {
            for branch in self.grad_input_branches(grad_input, projections) {
                let accumulate = branch.accumulate || !branch_first;
                self.product(Product { accumulate, ..branch })?;
            }
        }
        for lora in loras {
            if let Some(dropout) = lora.dropout {
                self.dropped_backward(x, grad_input, lora, dropout)?;
            }
        }
        Ok(())
    }

    /// The factors of `grad_input = [grad_output | g] · [weight; a]`, where there is room for the branches beside them.
    pub(super) fn room_below(&self, projections: &[ProjectionBackward]) -> Option<Below> {
        gradient_ranks(self.workload, projections)?;
        let grad_output = self.matrix(projections.first()?.grad_output.buffer);
        let loras = projections.iter().filter_map(|projection| projection.lora.as_ref());
        let rank = loras.clone().map(|lora| lora.middle.width).max()?;
        let mut a = loras.map(|lora| self.matrix(lora.a));
        let first = a.next()?;
        let a = a.try_fold(first, stacked)?;
        let columns = grad_output.columns + a.rows;
        let mut weights = projections.iter().map(|projection| projection.weight);
        let unpacked = |id: BufferId| matches!(self.memory.stored(id), DType::Nf4 | DType::Int8);
        let weight = if weights.clone().all(unpacked) {
            // Odd rows are unpacked whole.
            let row = self.width(weights.next()?);
            let fits = 2 * (columns * row) as u64 <= self.memory.scratch.bytes;
            (row.is_multiple_of(64) || fits).then_some(None)?
        } else {
            let first = self.matrix(weights.next()?);
            let whole = weights.try_fold(first, |whole, id| stacked(whole, self.matrix(id)))?;
            let last = projections.last()?.weight;
            Some((self.memory.spare_rows(last) >= a.rows).then_some(whole)?)
        };
        (columns <= grad_output.stride).then_some(Below { grad_output, a, weight, rank })
    }

    /// All gradients of a linear operation of which only branches are trained, with `g` beside the gradient of the output and
    /// `a` below the weight.
    pub(super) fn backward_with_branches(
        &mut self,
        x: Matrix,
        grad_input: Matrix,
        projections: &[ProjectionBackward],
        below: Below,
    ) -> Result<(), EngineError> {
        let (middles, longer) = (below.middles(projections), below.longer());
        let Below { grad_output, a, weight, rank } = below;
        let loras: Vec<&LoraBackward> = projections.iter().filter_map(|p| p.lora.as_ref()).collect();
        self.branch_sums(projections, &middles)?;
        if self.reader.is_none() && self.above.is_none() {
            self.weight_gradients(x, loras.iter().map(|lora| self.matrix(lora.grad_a)).zip(middles).collect())?;
        }
        let product = |right: Matrix, output: Matrix| Product {
            left: longer,
            left_transposed: false,
            right,
            right_transposed: false,
            output,
            alpha: Alpha::One,
            accumulate: false,
        };
        let rows = grad_output.columns;
        if let Some(weight) = weight {
            let longer = Matrix { rows: rows + a.rows, ..weight };
            self.copy_rows(a, longer.slice_rows(rows, a.rows), rank)?;
            return self.product(product(longer, grad_input));
        }
        for (first, count) in self.unpacked_columns(longer.columns, grad_input.columns)? {
            let block = Matrix::new(self.memory.scratch.pointer, DType::BF16, longer.columns, count);
            let mut start = 0;
            for projection in projections {
                let own = self.rows(projection.weight);
                let to = block.slice_rows(start, own).pointer;
                self.unpack(projection.weight, (0, own), (first, count), (to, count))?;
                start += own;
            }
            self.copy_rows(a.slice_columns(first, count), block.slice_rows(rows, a.rows), rank)?;
            self.product(product(block, grad_input.slice_columns(first, count)))?;
        }
        Ok(())
    }

    /// Where the gradients of the branches' middles lie, and whether that is beside the gradient of the output.
    pub(super) fn grad_middles(
        &self,
        grad_input: Option<BufferId>,
        projections: &[ProjectionBackward],
    ) -> (Vec<Matrix>, bool) {
        if let Some(below) = grad_input.and_then(|_| self.room_below(projections)) {
            return (below.middles(projections), true);
        }
        let loras = projections.iter().filter_map(|projection| projection.lora.as_ref());
        (loras.map(|lora| self.columns(lora.grad_middle)).collect(), false)
    }

    /// The branches' sides of the backward pass, with the gradients of their middles in these places.
    pub(super) fn branches(
        &self,
        projections: &[ProjectionBackward],
        middles: &[Matrix],
    ) -> Result<Vec<Branch>, EngineError> {
        let adapted = projections.iter().filter_map(|p| p.lora.as_ref().map(|lora| (p.grad_output, lora)));
        let branch = |((grad_output, lora), &grad_middle): ((Columns, &LoraBackward), &Matrix)| {
            let compute = [lora.a, lora.b, lora.middle.buffer, lora.grad_middle.buffer];
            self.expect("linear_backward", &compute, DType::BF16)?;
            self.expect("linear_backward", &[lora.grad_a, lora.grad_b], DType::F32)?;
            Ok(Branch {
                grad_output: self.columns(grad_output),
                b: self.matrix(lora.b),
                middle: self.columns(lora.middle),
                grad_middle,
                grad_b: self.matrix(lora.grad_b),
                scale: self.address(lora.scale),
            })
        };
        adapted.zip(middles).map(branch).collect()
    }

    /// `middles = scale · grad_output · b` and the gradients of b, where they did not come with the gradient of the output.
    fn branch_sums(&mut self, projections: &[ProjectionBackward], middles: &[Matrix]) -> Result<(), EngineError> {
        let summed = |projection: &ProjectionBackward| {
            [self.summed, self.summed_below].contains(&Some(projection.grad_output.buffer))
        };
        if projections.first().is_some_and(summed) {
            return Ok(());
        }
        let branches = self.branches(projections, middles)?;
        for branches in branches.chunks(MOST_PARTS) {
            let sizes: Vec<_> = branches.iter().map(Branch::size).collect();
            let rows = branches[0].grad_output.rows;
            let tiling = branches.iter().all(Branch::is_even).then(|| Tiling::new(rows, &sizes, &self.room()));
            match tiling.flatten() {
                Some(tiling) => self.output_sums(branches, &Sums::Alone(&tiling))?,
                None => self.output_products(branches)?,
            }
        }
        Ok(())
    }

    /// `grad_middle = scale · grad_output · b` and `grad_b += scale · grad_outputᵀ · middle` from one pass over the gradient of
    /// the output, or from the kernel that makes it; partial sums lie in the library's scratch.
    pub(super) fn output_sums(&mut self, branches: &[Branch], sums: &Sums) -> Result<(), EngineError> {
        let Some(rows) = branches.first().map(|branch| branch.grad_output.rows) else { return Ok(()) };
        let variant = variant(sums.rank());
        for first in (0..rows).step_by(sums.tokens()) {
            let tokens = sums.tokens().min(rows - first);
            let blocks = sums.blocks(tokens);
            let mut next = self.products.workspace().0;
            let (mut table, mut strips, mut pieces) = (Vec::new(), 0, 0);
            for branch in branches {
                let columns = branch.grad_output.columns;
                let (own_strips, strip_tiles) = sums.strips(columns);
                let (of_middle, bytes) = partial_bytes(own_strips, blocks, (columns, branch.rank()), tokens);
                let from = |matrix: Matrix| matrix.slice_rows(first, tokens).pointer;
                table.extend([
                    from(branch.grad_output),
                    branch.b.pointer,
                    from(branch.middle),
                    from(branch.grad_middle),
                    next,
                    next + of_middle as u64,
                    branch.grad_b.pointer,
                    branch.scale,
                    branch.grad_output.stride as u64,
                    branch.middle.stride as u64,
                    branch.grad_middle.stride as u64,
                    words(columns, branch.rank()),
                    words(own_strips, strip_tiles),
                ]);
                next += bytes.next_multiple_of(256) as u64;
                strips += own_strips;
                pieces = pieces.max(((tokens + columns) * branch.rank() / 4).div_ceil(256));
            }
            table.resize(13 * MOST_PARTS, 0);
            let table = table.into_boxed_slice();
            match sums {
                Sums::Gated(tiling, gated) => self.gated_sums(gated, tiling, table.clone(), next, (first, tokens))?,
                Sums::Rotated(slices, rotated) => {
                    self.rotated_sums(rotated, slices, table.clone(), strips, (first, tokens))?;
                }
                Sums::Alone(tiling) => {
                    let (entry, given) =
                        (format!("lora_backward_{}", tiling.tiles), arguments![table.clone(), tokens as i32]);
                    let shared = Tiling::shared_bytes(tiling.rank, tiling.tiles);
                    self.launch_variant(&variant, &entry, [strips, blocks, 1], 256, shared, given)?;
                }
            }
            let given = arguments![table, tokens as i32, blocks as i32];
            self.launch_variant(&variant, "lora_finish", [pieces, branches.len(), 1], 256, 0, given)?;
        }
        Ok(())
    }

    /// `to += Σ partial` for lists of matrices, those of a list below each other in each of `count` partial sums from an address
    /// on. `rank`: what kernels are compiled for, or less.
    pub(super) fn add_up(&mut self, count: usize, lists: &[(u64, &[Matrix])], rank: usize) -> Result<(), EngineError> {
        let quads = |matrix: &Matrix| matrix.rows * matrix.columns / 4;
        let (mut table, mut most) = (Vec::new(), 0);
        for &(partial, matrices) in lists {
            let apart: usize = matrices.iter().map(quads).sum();
            let mut from = partial;
            for matrix in matrices {
                table.extend([from, matrix.pointer, apart as u64, quads(matrix) as u64]);
                from += 16 * quads(matrix) as u64;
                most = quads(matrix).max(most);
            }
        }
        let gradients = table.len() / 4;
        debug_assert!(gradients <= MOST_SUMS, "{gradients} gradients");
        table.resize(4 * MOST_SUMS, 0);
        let given = arguments![table.into_boxed_slice(), count as i32];
        self.launch_variant(&variant(rank), "lora_add_up", [most.div_ceil(256), gradients, 1], 256, 0, given)
    }

    /// Rows of a matrix to another place. `rank`: what kernels are compiled for, or less.
    pub(super) fn copy_rows(&mut self, from: Matrix, to: Matrix, rank: usize) -> Result<(), EngineError> {
        let given = arguments![
            from.pointer,
            from.stride as i64,
            to.pointer,
            to.stride as i64,
            from.rows as i32,
            from.columns as i32,
        ];
        let grid = [(from.rows * from.columns / 8).div_ceil(256), 1, 1];
        self.launch_variant(&variant(rank), "lora_rows", grid, 256, 0, given)
    }

    /// The same as products of the library's, each of which passes over the gradient of the output.
    fn output_products(&mut self, branches: &[Branch]) -> Result<(), EngineError> {
        for branch in branches {
            self.product(Product {
                left: branch.grad_output,
                left_transposed: false,
                right: branch.b,
                right_transposed: false,
                output: branch.grad_middle,
                alpha: Alpha::Device(branch.scale),
                accumulate: false,
            })?;
            self.product(Product {
                left: branch.grad_output,
                left_transposed: true,
                right: branch.middle,
                right_transposed: false,
                output: branch.grad_b,
                alpha: Alpha::Device(branch.scale),
                accumulate: true,
            })?;
        }
        Ok(())
    }

    /// `grad_input = Σ grad_middle · a` of the LoRA branches without dropout, neighbours joined.
    pub(super) fn grad_input_branches(&self, grad_input: Matrix, projections: &[ProjectionBackward]) -> Vec<Product> {
        let plain = projections.iter().filter_map(|p| p.lora.as_ref()).filter(|lora| lora.dropout.is_none());
        let pairs = plain.map(|lora| (self.matrix(lora.a), self.columns(lora.grad_middle)));
        let branch = |(index, (a, grad_middle)): (usize, Pair)| Product {
            left: grad_middle,
            left_transposed: false,
            right: a,
            right_transposed: false,
            output: grad_input,
            alpha: Alpha::One,
            accumulate: index > 0,
        };
        join(pairs).into_iter().enumerate().map(branch).collect()
    }
}

/// Whether rows of a matrix are read 16 bytes at a time.
pub(super) fn even(matrix: Matrix) -> bool {
    matrix.pointer.is_multiple_of(16) && matrix.stride.is_multiple_of(8)
}

/// Whether the bytes from the first to the last of one lie among those of the other.
pub(super) fn overlap(one: Matrix, other: Matrix) -> bool {
    // The last row ends with its columns: what comes after it is another's.
    let elements = |matrix: Matrix| matrix.rows.saturating_sub(1) * matrix.stride + matrix.columns;
    let end = |matrix: Matrix| matrix.pointer + elements(matrix) as u64 * matrix.element_bytes();
    one.pointer < end(other) && other.pointer < end(one)
}

/// The branch without dropout of a linear operation on `activation`, where it has no projection but one.
pub(super) fn only_branch(activation: BufferId, op: &Op) -> Option<&Lora> {
    let Op::Linear { input, projections } = op else { return None };
    let [Projection { lora: Some(lora), .. }] = projections.as_slice() else { return None };
    (*input == activation && lora.dropout.is_none()).then_some(lora)
}

/// `lora.cu` for branches of this rank; of those that are too wide for its backward pass only `lora_place` is used.
fn variant(rank: usize) -> Variant {
    let rank = compiled_rank(&RANKS, rank).unwrap_or(RANKS[0]);
    Variant { file: "lora", defines: vec![("RANK", rank.to_string())] }
}

/// The kernel files that an operation's branches take.
pub(in crate::backend::cuda) fn files(op: &Op) -> Vec<Variant> {
    let ranks: Vec<usize> = match op {
        Op::Linear { projections, .. } => {
            projections.iter().filter_map(|p| p.lora.as_ref()).map(|lora| lora.middle.width).collect()
        }
        Op::LinearBackward { projections, .. } => {
            projections.iter().filter_map(|p| p.lora.as_ref()).map(|lora| lora.middle.width).collect()
        }
        _ => Vec::new(),
    };
    ranks.into_iter().max().map(variant).into_iter().collect()
}

/// Two integers of a kernel's struct in one word.
pub(super) fn words(low: usize, high: usize) -> u64 {
    low as u64 | (high as u64) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_at_the_end_of_rows_do_not_reach_beyond_the_last() {
        let rows = Matrix { stride: 96, ..Matrix::new(4096, DType::BF16, 10, 32) };
        let beside = Matrix { columns: 64, ..rows.slice_columns(32, 0) };
        let after = Matrix::new(4096 + 10 * 96 * 2, DType::F32, 10, 4);
        assert!(overlap(rows, beside), "they share rows");
        assert!(!overlap(beside, after) && !overlap(after, beside));
        assert!(overlap(after, Matrix::new(after.pointer + 156, DType::BF16, 1, 8)));
    }
}
