//! Matrix products: which kernel, in which tiles, split how.

use super::{Call, Lowering};
use crate::backend::EngineError;
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

/// The second pair of a product, of depth `k`: `a [m, k]`, `b` in the layout of the first.
#[derive(Clone, Copy, Debug)]
pub struct Second {
    pub a: View,
    pub b: View,
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
        }
    }
}

/// A workgroup's tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    bm: usize,
    bn: usize,
    bk: usize,
    /// A thread's part of the tile, in fours.
    tm4: usize,
    tn4: usize,
}

impl Lowering<'_> {
    pub(super) fn product(&mut self, product: &Product) -> Result<(), EngineError> {
        if product.m == 0 || product.n == 0 {
            return Ok(());
        }
        let tile = self.tile(product);
        let tiles = product.m.div_ceil(tile.bm) * product.n.div_ceil(tile.bn);
        let steps = product.k.div_ceil(tile.bk);
        let wanted = self.facts.workgroups as usize;
        let splittable = product.second.is_none()
            && product.bias.is_none()
            && !product.dropout.is_some_and(|(site, _)| site == DropSite::C);
        let splits = if splittable && tiles * 2 <= wanted {
            // A part sums at least 128 terms, and all parts together take a modest scratch.
            let most = (steps * tile.bk / 128).max(1);
            (wanted / tiles).min(most).clamp(1, 64)
        } else {
            1
        };
        let split_steps = steps.div_ceil(splits);
        let splits = steps.div_ceil(split_steps.max(1)).max(1);
        let c = if splits > 1 { self.scratch(splits * product.m * product.n) } else { product.c };
        let mut call = self.call("matmul");
        call.constant("BM", tile.bm as u32).constant("BN", tile.bn as u32).constant("BK", tile.bk as u32);
        call.constant("TM4", tile.tm4 as u32).constant("TN4", tile.tn4 as u32);
        call.flag("A_BY_K", product.layout != Layout::TN).flag("B_BY_K", product.layout == Layout::NT);
        call.flag("EXACT", product.k.is_multiple_of(tile.bk)).flag("SPLIT", splits > 1);
        let vector_a = self.operand(&mut call, "a", &product.a, if product.layout == Layout::TN { product.m } else { product.k });
        let vector_b = self.operand(&mut call, "b", &product.b, if product.layout == Layout::NT { product.k } else { product.n });
        let vector_c = product.n.is_multiple_of(4)
            && (splits > 1 || (c.by_fours() && product.bias.is_none_or(|bias| bias.elements().is_multiple_of(4))));
        call.flag("VECTOR_A", vector_a).flag("VECTOR_B", vector_b).flag("VECTOR_C", vector_c);
        self.bind_as(&mut call, "c", &c, vector_c);
        call.number("m", product.m).number("n", product.n).number("k", product.k);
        call.number("a_stride", product.a.stride).number("a_start", product.a.start);
        call.number("b_stride", product.b.stride).number("b_start", product.b.start);
        call.number("c_stride", c.stride).number("c_start", c.start);
        call.number("split_steps", split_steps);
        if let Some(second) = &product.second {
            call.constant("SECOND", 1);
            self.bind(&mut call, "a2", &second.a);
            self.bind(&mut call, "b2", &second.b);
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
            call.constant("DROPOUT", 1);
            call.flag("DROP_A", *site == DropSite::A).flag("DROP_B", *site == DropSite::B).flag("DROP_C", *site == DropSite::C);
            self.bind(&mut call, "key", &self.view(dropout.key));
            call.number("stream", dropout.stream as usize).float("probability", dropout.probability);
            call.float("keep_scale", 1.0 / (1.0 - dropout.probability));
        }
        let mut alpha = product.scaling.alpha;
        if splits == 1 {
            call.flag("ACCUMULATE", product.accumulate);
            alpha *= self.bind_scaling(&mut call, &product.scaling);
        }
        call.float("alpha", alpha);
        self.launch(call, [product.n.div_ceil(tile.bn), product.m.div_ceil(tile.bm), splits])?;
        if splits > 1 {
            let target = View { width: product.n, rows: product.m, ..product.c };
            self.partial_sum(&c, splits, &target, &product.scaling, product.accumulate)?;
        }
        Ok(())
    }

    /// Binds an operand by fours where its rows and the extent that runs along them allow.
    fn operand(&self, call: &mut Call, name: &'static str, view: &View, along: usize) -> bool {
        let vector = view.by_fours() && along.is_multiple_of(4);
        self.bind_as(call, name, view, vector);
        vector
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

    fn tile(&self, product: &Product) -> Tile {
        if product.n <= 16 {
            Tile { bm: 64, bn: 16, bk: 32, tm4: 1, tn4: 1 }
        } else if product.m <= 16 {
            Tile { bm: 16, bn: 64, bk: 32, tm4: 1, tn4: 1 }
        } else if product.segments.is_some() || product.m <= 64 || product.n <= 64 || self.small(product) {
            Tile { bm: 64, bn: 64, bk: 16, tm4: 2, tn4: 2 }
        } else {
            Tile { bm: 128, bn: 128, bk: 16, tm4: 2, tn4: 2 }
        }
    }

    /// Too small to fill the device with large tiles.
    fn small(&self, product: &Product) -> bool {
        product.m.div_ceil(128) * product.n.div_ceil(128) < self.facts.workgroups as usize
    }
}
