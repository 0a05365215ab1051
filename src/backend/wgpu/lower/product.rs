//! Matrix products: which kernel, in which tiles, split how.

use super::{Call, Lowering, Work};
use crate::backend::EngineError;
use crate::backend::wgpu::kernel::Element;
use crate::backend::wgpu::storage::View;
use crate::program::{DType, Dropout};

/// Which operand is stored transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `A [m, k] · B [n, k]ᵀ`: activations times a weight.
    NT,
    /// `A [m, k] · B [k, n]`: gradients times a weight.
    NN,
    /// `A [k, m]ᵀ · B [k, n]`: gradients times activations.
    TN,
}

/// What multiplies a product.
#[derive(Clone, Copy, Debug)]
pub struct Scaling {
    pub alpha: f32,
    /// f32 `[1]` in device memory: the LoRA scale.
    pub scale: Option<View>,
    /// The product is of gradients of this type and goes to a parameter's gradient.
    pub gradient: Option<DType>,
}

impl Scaling {
    pub const ONE: Scaling = Scaling { alpha: 1.0, scale: None, gradient: None };

    pub fn unscaled(gradient: DType) -> Scaling {
        Scaling { gradient: Some(gradient), ..Scaling::ONE }
    }

    pub fn by(scale: View) -> Scaling {
        Scaling { scale: Some(scale), ..Scaling::ONE }
    }
}

/// The second pair of a product, of depth `k`: `a [m, k]`.
#[derive(Clone, Copy, Debug)]
pub struct Second {
    pub a: View,
    pub b: View,
    /// `b` is stored `[n, k]`; else `[k, n]`.
    pub b_by_k: bool,
    pub k: usize,
    /// Multiplies this pair alone.
    pub scale: Option<View>,
}

/// Projections side by side, with LoRA columns of their own.
#[derive(Clone, Copy, Debug)]
pub struct Segments {
    pub rank: usize,
    /// Where the second, third and fourth begin.
    pub starts: [usize; 3],
    /// They are rows of the result, not columns.
    pub rows: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropSite {
    /// On `A`, element (m, k).
    A,
    /// On `B`, element (k, n).
    B,
    /// On the product, element (m, n).
    C,
}

/// `C = scaling · (A · B + A2 · B2) + bias (+ C)`.
#[derive(Clone, Debug)]
pub struct Product {
    pub layout: Layout,
    pub a: View,
    pub b: View,
    pub c: View,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub scaling: Scaling,
    pub second: Option<Second>,
    pub segments: Option<Segments>,
    pub bias: Option<View>,
    pub accumulate: bool,
    pub dropout: Option<(DropSite, Dropout)>,
    /// Token of the first row, for dropout.
    pub first_row: usize,
}

impl Product {
    pub fn new(layout: Layout, a: View, b: View, c: View) -> Product {
        let (m, k) = if layout == Layout::TN { (a.width, a.rows) } else { (a.rows, a.width) };
        let n = if layout == Layout::NT { b.rows } else { b.width };
        Product {
            layout,
            a,
            b,
            c,
            m,
            n,
            k,
            scaling: Scaling::ONE,
            second: None,
            segments: None,
            bias: None,
            accumulate: false,
            dropout: None,
            first_row: 0,
        }
    }

    /// What decides how fast kernels are: layout, shape, types and what is fused.
    fn key(&self) -> String {
        let Product { layout, m, n, k, .. } = self;
        let mut key = format!("{layout:?} {m}x{n}x{k} {} {}", self.a.dtype.name(), self.c.dtype.name());
        if let Some(second) = &self.second {
            key += &format!(" second {}", second.k);
            if second.b_by_k != (*layout == Layout::NT) {
                key += " across";
            }
        }
        if let Some(segments) = &self.segments {
            key += &format!(" segments {:?}", segments.starts);
        }
        let parts = [(self.bias.is_some(), "bias"), (self.accumulate, "sum"), (self.dropout.is_some(), "dropout")];
        parts.iter().filter(|part| part.0).for_each(|part| key = format!("{key} {}", part.1));
        key
    }

    /// Whether A's rows, as stored, can be read four elements at a time.
    fn a_by_fours(&self) -> bool {
        let along = if self.layout == Layout::TN { self.m } else { self.k };
        self.a.by_fours() && along.is_multiple_of(4)
    }

    fn b_by_fours(&self) -> bool {
        let along = if self.layout == Layout::NT { self.k } else { self.n };
        self.b.by_fours() && along.is_multiple_of(4)
    }
}

/// A workgroup's tile, and how its threads or subgroups share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    bm: usize,
    bn: usize,
    bk: usize,
    share: Share,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Share {
    /// A thread's part of the tile, in fours.
    Threads { tm4: usize, tn4: usize },
    /// Subgroups down and across, on cooperative matrices.
    Subgroups { down: usize, across: usize, stage: Stage, read: Read },
}

/// How tiles come to workgroup memory (`matmul_cooperative.wgsl`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Double,
    Ahead,
    Plain,
}

/// What a thread reads at once: 8 bytes or 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Read {
    Narrow,
    Wide,
}

impl Read {
    fn halves(self) -> usize {
        if self == Read::Narrow { 4 } else { 8 }
    }
}

const fn threads(bm: usize, bn: usize, bk: usize, tm4: usize, tn4: usize) -> Tile {
    Tile { bm, bn, bk, share: Share::Threads { tm4, tn4 } }
}

const fn subgroups(bm: usize, bn: usize, bk: usize, down: usize, across: usize) -> Tile {
    Tile { bm, bn, bk, share: Share::Subgroups { down, across, stage: Stage::Ahead, read: Read::Narrow } }
}

/// Tiles on cooperative matrices that are measured, and how each is staged; with reads of 16 bytes wherever they can be
/// (`bench/LOG-wgsl.md`: the fastest of all that were tried on an H100 are here).
const COOPERATIVE: [(Tile, &[Stage]); 14] = [
    (subgroups(128, 128, 32, 2, 2), &[Stage::Ahead, Stage::Plain]),
    (subgroups(128, 256, 32, 2, 4), &[Stage::Ahead]),
    (subgroups(256, 128, 32, 4, 2), &[Stage::Ahead]),
    (subgroups(128, 128, 16, 2, 2), &[Stage::Double]),
    (subgroups(64, 128, 32, 2, 2), &[Stage::Ahead]),
    (subgroups(64, 64, 32, 2, 2), &[Stage::Ahead]),
    (subgroups(64, 64, 64, 2, 2), &[Stage::Ahead]),
    (subgroups(32, 64, 64, 1, 2), &[Stage::Ahead]),
    // Thin results of long sums: LoRA.
    (subgroups(32, 128, 64, 1, 4), &[Stage::Ahead]),
    (subgroups(128, 32, 64, 4, 1), &[Stage::Ahead]),
    (subgroups(128, 16, 64, 4, 1), &[Stage::Ahead, Stage::Plain]),
    (subgroups(64, 16, 64, 4, 1), &[Stage::Ahead]),
    (subgroups(16, 128, 64, 1, 4), &[Stage::Ahead, Stage::Plain]),
    (subgroups(16, 64, 64, 1, 4), &[Stage::Ahead]),
];

/// Thread tiles that are measured where there are no cooperative matrices.
const THREADS: [Tile; 4] =
    [threads(64, 64, 16, 2, 2), threads(128, 128, 16, 2, 2), threads(64, 64, 32, 1, 1), threads(32, 64, 32, 1, 1)];

impl Tile {
    fn constants(&self, call: &mut Call) {
        let Tile { bm, bn, bk, .. } = *self;
        call.constant("BM", bm as u32).constant("BN", bn as u32).constant("BK", bk as u32);
        match self.share {
            Share::Threads { tm4, tn4 } => {
                call.constant("TM4", tm4 as u32).constant("TN4", tn4 as u32);
                let threads = (bm / (tm4 * 4)) * (bn / (tn4 * 4));
                let (a, b) = (bm * bk / 16, bn * bk / 16);
                call.constant("A_ROUNDS", a.div_ceil(threads) as u32).flag("A_PARTIAL", !a.is_multiple_of(threads));
                call.constant("B_ROUNDS", b.div_ceil(threads) as u32).flag("B_PARTIAL", !b.is_multiple_of(threads));
            }
            Share::Subgroups { down, across, stage, read } => {
                let threads = down * across * 32;
                let stage = match stage {
                    Stage::Double => "DOUBLE",
                    Stage::Ahead => "AHEAD",
                    Stage::Plain => "PLAIN",
                };
                call.constant(stage, 1).constant("HALF", 1).constant("COOPERATIVE", 1);
                call.flag("WIDE", read == Read::Wide);
                call.constant("SM", down as u32).constant("SN", across as u32);
                call.constant("FM", (bm / down / 16) as u32).constant("FN", (bn / across / 16) as u32);
                call.constant("K_FRAGMENTS", (bk / 16) as u32);
                call.constant("A_LOADS", (bm * bk / read.halves() / threads) as u32);
                call.constant("B_LOADS", (bn * bk / read.halves() / threads) as u32);
                call.constant("SECOND_LOADS", (bm.max(bn) * bk / 4).div_ceil(threads) as u32);
            }
        }
    }

    /// Iterations of loops that a step takes, with the tests that end them.
    fn iterations(&self) -> usize {
        2 + self.bk
    }

    fn name(&self) -> String {
        let Tile { bm, bn, bk, share } = self;
        match share {
            Share::Threads { tm4, tn4 } => format!("{bm}x{bn}x{bk} threads {tm4}x{tn4}"),
            Share::Subgroups { down, across, stage, read } => {
                format!("{bm}x{bn}x{bk} subgroups {down}x{across} {stage:?} {read:?}")
            }
        }
    }

    /// Whether tiles of cooperative matrices fit workgroup memory and share out evenly among threads.
    fn fits(&self, workgroup_bytes: u32) -> bool {
        let Share::Subgroups { down, across, stage, read } = self.share else { return true };
        let threads = down * across * 32;
        let even = |elements: usize| elements.is_multiple_of(threads * read.halves());
        let copies = if stage == Stage::Double { 2 } else { 1 };
        // Whichever way the operands are stored, with the padding.
        let bytes = |long: usize| 2 * ((long + 8) * self.bk).max(long * (self.bk + 8));
        let shared = copies * (bytes(self.bm) + bytes(self.bn)) + down * across * 1024;
        even(self.bm * self.bk) && even(self.bn * self.bk) && shared <= workgroup_bytes as usize
    }

    fn is_cooperative(&self) -> bool {
        matches!(self.share, Share::Subgroups { .. })
    }

    fn read(&self) -> Read {
        match self.share {
            Share::Threads { .. } => Read::Narrow,
            Share::Subgroups { read, .. } => read,
        }
    }

    /// Whether tiles cover the result and the depth exactly.
    fn divides(&self, product: &Product) -> bool {
        product.m.is_multiple_of(self.bm) && product.n.is_multiple_of(self.bn) && product.k.is_multiple_of(self.bk)
    }

    fn count(&self, product: &Product) -> usize {
        product.m.div_ceil(self.bm) * product.n.div_ceil(self.bn)
    }
}

/// Whether projections side by side start at whole tiles, the tile is not mostly beyond the matrix, and reads of 16 bytes
/// stay within rows.
fn suits(tile: &Tile, product: &Product) -> bool {
    let aligned = product.segments.is_none_or(|segments| {
        let unit = if segments.rows { tile.bm } else { tile.bn };
        segments.starts.iter().all(|&start| start == u32::MAX as usize || start.is_multiple_of(unit))
    });
    let by_eights =
        |view: &View| view.dtype == DType::F16 && view.stride.is_multiple_of(8) && view.start.is_multiple_of(8);
    let wide = tile.divides(product)
        && by_eights(&product.a)
        && by_eights(&product.b)
        && product.segments.is_none_or(|segments| segments.rank.is_multiple_of(8));
    aligned
        && (tile.bm < 2 * product.m || tile.bm == 16)
        && (tile.bn < 2 * product.n || tile.bn == 16)
        && (tile.read() == Read::Narrow || wide)
}

impl Lowering<'_> {
    pub(super) fn product(&mut self, product: &Product) -> Result<(), EngineError> {
        if product.m == 0 || product.n == 0 {
            return Ok(());
        }
        let tile = self.chosen_tile(product);
        let tiles = tile.count(product);
        let steps = product.k.div_ceil(tile.bk);
        let wanted = self.facts.workgroups as usize;
        let splittable = product.second.is_none()
            && product.bias.is_none()
            && !product.dropout.is_some_and(|(site, _)| site == DropSite::C);
        let splits = if splittable && tiles * 2 <= wanted {
            // A part sums at least 128 terms, and all parts together take a modest scratch.
            let most = (steps * tile.bk / 128).max(1);
            let bound = self.facts.limits.binding as usize / (4 * product.m * product.n);
            (wanted / tiles).min(most).min(bound).clamp(1, 64)
        } else {
            1
        };
        let splits = match self.facts.loop_limit {
            Some(limit) if splittable => splits.max((steps * tile.iterations()).div_ceil(limit)),
            _ => splits,
        };
        let split_steps = steps.div_ceil(splits);
        let splits = steps.div_ceil(split_steps.max(1)).max(1);
        let c = if splits > 1 { self.scratch(splits * product.m * product.n) } else { product.c };
        let mut call = self.call(if tile.is_cooperative() { "matmul_cooperative" } else { "matmul" });
        tile.constants(&mut call);
        call.flag("A_BY_K", product.layout != Layout::TN).flag("B_BY_K", product.layout == Layout::NT);
        call.flag("EXACT", product.k.is_multiple_of(tile.bk)).flag("SPLIT", splits > 1);
        let vector_a = product.a_by_fours();
        let vector_b = product.b_by_fours();
        // Strides that are constants leave addresses to the compiler.
        let whole = tile.is_cooperative() && tile.divides(product);
        if whole {
            call.constant("WHOLE", 1);
            call.constant("A_STRIDE", product.a.stride as u32).constant("B_STRIDE", product.b.stride as u32);
        }
        let vector_c = product.n.is_multiple_of(4)
            && (splits > 1 || (c.by_fours() && product.bias.is_none_or(|bias| bias.elements().is_multiple_of(4))));
        self.bind_read(&mut call, "a", &product.a, vector_a, tile.read());
        self.bind_read(&mut call, "b", &product.b, vector_b, tile.read());
        call.flag("VECTOR_A", vector_a).flag("VECTOR_B", vector_b).flag("VECTOR_C", vector_c);
        self.bind_as(&mut call, "c", &c, vector_c);
        call.number("m", product.m).number("n", product.n).number("k", product.k);
        call.number("a_stride", product.a.stride).number("a_start", product.a.start);
        call.number("b_stride", product.b.stride).number("b_start", product.b.start);
        call.number("c_stride", c.stride).number("c_start", c.start);
        call.number("split_steps", split_steps);
        if let Some(second) = &product.second {
            call.constant("SECOND", 1);
            self.bind_as(&mut call, "a2", &second.a, tile.is_cooperative());
            // Stored the other way round than the tile, it is read an element at a time.
            let along = second.b_by_k == (product.layout == Layout::NT);
            self.bind_as(&mut call, "b2", &second.b, tile.is_cooperative() && along);
            call.flag("B2_BY_K", second.b_by_k);
            if let Some(scale) = &second.scale {
                call.constant("SCALE_SECOND", 1);
                self.bind(&mut call, "scale", scale);
            }
            call.number("k2", second.k);
            call.number("a2_stride", second.a.stride).number("a2_start", second.a.start);
            call.number("b2_stride", second.b.stride).number("b2_start", second.b.start);
        }
        if let Some(segments) = &product.segments {
            call.constant("SEGMENTED", 1).flag("SEGMENT_ROWS", segments.rows).number("rank", segments.rank);
            call.number("segment1", segments.starts[0]).number("segment2", segments.starts[1]);
            call.number("segment3", segments.starts[2]);
        }
        if let Some(bias) = &product.bias {
            call.constant("BIAS", 1);
            self.bind_as(&mut call, "bias", bias, vector_c);
        }
        if let Some((site, dropout)) = &product.dropout {
            call.constant("DROPOUT", 1).flag("DROP_A", *site == DropSite::A);
            call.flag("DROP_B", *site == DropSite::B).flag("DROP_C", *site == DropSite::C);
            self.bind(&mut call, "key", &self.view(dropout.key));
            call.number("stream", dropout.stream as usize).float("probability", dropout.probability);
            call.float("keep_scale", 1.0 / (1.0 - dropout.probability));
            if product.first_row > 0 {
                call.constant("LATER_ROWS", 1).number("first_row", product.first_row);
            }
        }
        let mut alpha = product.scaling.alpha;
        if splits == 1 {
            call.flag("ACCUMULATE", product.accumulate);
            alpha *= self.bind_scaling(&mut call, &product.scaling);
        }
        call.float("alpha", alpha);
        let second_steps = product.second.map_or(0, |second| second.k.div_ceil(tile.bk));
        call.iterations((split_steps + second_steps) * tile.iterations());
        self.launch(call, [product.n.div_ceil(tile.bn), product.m.div_ceil(tile.bm), splits])?;
        if splits > 1 {
            let target = View { width: product.n, rows: product.m, ..product.c };
            self.partial_sum(&c, splits, &target, &product.scaling, product.accumulate)?;
        }
        Ok(())
    }

    fn bind_read(&self, call: &mut Call, name: &'static str, view: &View, vector: bool, read: Read) {
        match read {
            Read::Narrow => self.bind_as(call, name, view, vector),
            Read::Wide => self.bind_element(call, name, view, Element::F16Words, 16),
        }
    }

    fn bind_scaling(&self, call: &mut Call, scaling: &Scaling) -> f32 {
        if let Some(scale) = &scaling.scale {
            call.constant("SCALE", 1);
            self.bind(call, "scale", scale);
        }
        scaling.gradient.map_or(1.0, |dtype| self.bind_unscale(call, dtype))
    }

    /// Adds `layers` of partial sums into `target`.
    pub(super) fn partial_sum(
        &mut self,
        parts: &View,
        layers: usize,
        target: &View,
        scaling: &Scaling,
        accumulate: bool,
    ) -> Result<(), EngineError> {
        let mut call = self.call("partial_sum");
        self.bind(&mut call, "parts", parts);
        self.bind(&mut call, "output", target);
        call.flag("ACCUMULATE", accumulate);
        let alpha = scaling.alpha * self.bind_scaling(&mut call, scaling);
        call.number("rows", target.rows).number("columns", target.width).number("layers", layers);
        call.number("stride", target.stride).number("start", target.start).float("alpha", alpha);
        self.launch(call, [(target.rows * target.width).div_ceil(256), 1, 1])
    }

    /// The tile that was measured to be the fastest, else the one that rules give.
    fn chosen_tile(&mut self, product: &Product) -> Tile {
        let rule = self.tile(product);
        if !self.facts.measures {
            return rule;
        }
        // Sums in another order: what the others are held against.
        let mut tiles = vec![self.thread_tile(product)];
        if self.is_cooperative(product) {
            tiles.push(rule);
            tiles.extend(self.cooperative_tiles(product));
        } else if product.m > 16 && product.n > 16 {
            tiles.extend(THREADS.into_iter().filter(|tile| suits(tile, product)));
        }
        let mut distinct: Vec<Tile> = Vec::new();
        tiles.into_iter().for_each(|tile| {
            if !distinct.contains(&tile) {
                distinct.push(tile);
            }
        });
        let default = distinct.iter().position(|&tile| tile == rule).unwrap_or(0);
        let names = distinct.iter().map(Tile::name).collect();
        let chosen = self.choose(product.key(), names, default, || Work::Product(Box::new(product.clone())));
        distinct[chosen]
    }

    /// Tiles on cooperative matrices that the product can run in.
    fn cooperative_tiles(&self, product: &Product) -> Vec<Tile> {
        let thin = product.m <= 64 || product.n <= 64;
        let mut tiles: Vec<Tile> = Vec::new();
        for (tile, stages) in COOPERATIVE {
            let Share::Subgroups { down, across, .. } = tile.share else { continue };
            // Thin tiles are for thin products, and the other way round.
            if (tile.bm.min(tile.bn) < 64) != thin && (tile.bm, tile.bn) != (64, 64) {
                continue;
            }
            for &stage in stages {
                let share = Share::Subgroups { down, across, stage, read: Read::Narrow };
                tiles.extend(self.widest(Tile { share, ..tile }, product));
            }
        }
        tiles
    }

    fn tile(&self, product: &Product) -> Tile {
        if !self.is_cooperative(product) {
            return self.thread_tile(product);
        }
        let tile = self.cooperative_tile(product);
        self.widest(tile, product).unwrap_or(tile)
    }

    /// The tile with the widest reads that the product allows; none if it does not fit at all.
    fn widest(&self, tile: Tile, product: &Product) -> Option<Tile> {
        let Share::Subgroups { down, across, stage, .. } = tile.share else { return Some(tile) };
        [Read::Wide, Read::Narrow]
            .map(|read| Tile { share: Share::Subgroups { down, across, stage, read }, ..tile })
            .into_iter()
            .find(|tile| tile.fits(self.facts.workgroup_bytes) && suits(tile, product))
    }

    fn thread_tile(&self, product: &Product) -> Tile {
        if product.n <= 16 {
            threads(64, 16, 32, 1, 1)
        } else if product.m <= 16 {
            threads(16, 64, 32, 1, 1)
        } else if self.facts.software {
            // What vectors of a processor like: 1.5 times the small thread tiles under lavapipe.
            let large = product.segments.is_none() && product.m > 64 && product.n > 64;
            if large { threads(128, 128, 16, 4, 4) } else { threads(64, 64, 16, 4, 4) }
        } else if product.segments.is_some() || product.m <= 64 || product.n <= 64 || self.is_small(product) {
            threads(64, 64, 16, 2, 2)
        } else {
            threads(128, 128, 16, 2, 2)
        }
    }

    /// Too small to fill the device with large tiles.
    fn is_small(&self, product: &Product) -> bool {
        product.m.div_ceil(128) * product.n.div_ceil(128) < self.facts.workgroups as usize
    }

    /// Whether the product can run on cooperative matrices: f16 activations, everything in fours, no dropout.
    pub(super) fn is_cooperative(&self, product: &Product) -> bool {
        let second = product.second.is_none_or(|second| {
            second.k.is_multiple_of(4)
                && second.a.by_fours()
                && second.b.by_fours()
                && (product.layout == Layout::NT || product.n.is_multiple_of(4))
        });
        self.facts.cooperative
            && product.a.dtype == DType::F16
            && product.dropout.is_none()
            && product.m >= 16
            && product.n >= 4
            && product.a_by_fours()
            && product.b_by_fours()
            && product.n.is_multiple_of(4)
            && product.c.by_fours()
            && product.bias.is_none_or(|bias| bias.elements().is_multiple_of(4))
            && second
    }

    fn cooperative_tile(&self, product: &Product) -> Tile {
        // Projections side by side start at multiples of a tile.
        let aligned = product.segments.is_none_or(|segments| {
            segments.starts.iter().all(|&start| start == u32::MAX as usize || start.is_multiple_of(128))
        });
        let large = subgroups(128, 128, 32, 2, 2);
        if product.n <= 16 {
            subgroups(if aligned { 128 } else { 64 }, 16, 32, if aligned { 4 } else { 2 }, 1)
        } else if product.m <= 16 {
            subgroups(16, 128, 32, 1, 4)
        } else if aligned
            && product.m > 64
            && product.n > 64
            && large.count(product) * 10 >= self.facts.workgroups as usize * 6
            && self.facts.workgroup_bytes >= 26 << 10
        {
            large
        } else {
            subgroups(64, 64, 32, 2, 2)
        }
    }
}
