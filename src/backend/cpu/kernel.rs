//! The innermost loops of matrix products: packing of the right operand, and tiles of the result.
//!
//! The right operand is packed in panels of 32 columns, `[depth][32]`, converted to f32 on the way; the left is
//! read where it lies, one number at a time for a whole vector of columns. A tile has as many rows as fit the
//! registers: 14 rows of 32 columns with AVX-512, 6 of 16 with AVX2, 4 of 16 otherwise (Goto & van de Geijn
//! 2008, "Anatomy of high-performance matrix multiplication").

/// Columns of a panel.
pub const PANEL: usize = 32;
/// Most rows of a tile.
pub const ROWS: usize = 14;

/// A tile of the result before it is scaled and stored.
#[repr(C, align(64))]
pub struct Tile(pub [[f32; PANEL]; ROWS]);

/// Where the left operand of a tile lies.
#[derive(Clone, Copy)]
pub struct Left {
    pub start: *const f32,
    pub row_stride: usize,
    pub depth_stride: usize,
}

/// Vector instructions of this processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instructions {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Instructions {
    #[inline]
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Roughly what a thread of a shared machine does, floating-point operations per second. A constant, so that
    /// plans do not change from run to run.
    pub fn rate(self) -> f64 {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => 100e9,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => 50e9,
            Self::Portable => 15e9,
        }
    }
}

/// `tile[r][c] = Σ_d left[r, d] · panel[d][c]` for `r < rows` and `c < columns`; further columns are arbitrary.
///
/// # Safety
/// `left` must be readable for `rows` times `depth` elements and `panel` hold `depth` rows of [`PANEL`].
#[inline]
pub unsafe fn tile(
    instructions: Instructions,
    (rows, depth, columns): (usize, usize, usize),
    left: Left,
    panel: &[f32],
    out: &mut Tile,
) {
    debug_assert!(rows <= ROWS && panel.len() >= depth * PANEL);
    // SAFETY: the caller's promise, and the instructions were detected.
    unsafe {
        match instructions {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 if columns > 16 => avx512_rows::<2>(rows, depth, left, panel.as_ptr(), out),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => avx512_rows::<1>(rows, depth, left, panel.as_ptr(), out),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => {
                by_parts::<6>(rows, depth, columns, left, panel, out, avx2_rows);
            }
            Instructions::Portable => {
                by_parts::<4>(rows, depth, columns, left, panel, out, portable_rows);
            }
        }
    }
}

type Part = unsafe fn(usize, usize, Left, *const f32, *mut f32);

/// A tile as parts of at most `R` rows and 16 columns.
unsafe fn by_parts<const R: usize>(
    rows: usize,
    depth: usize,
    columns: usize,
    left: Left,
    panel: &[f32],
    out: &mut Tile,
    part: Part,
) {
    for first in (0..rows).step_by(R) {
        let left = Left { start: left.start.wrapping_add(first * left.row_stride), ..left };
        for column in (0..columns).step_by(16) {
            let target = out.0[first][column..].as_mut_ptr();
            // SAFETY: the part lies in the operands and in the tile.
            unsafe { part(R.min(rows - first), depth, left, panel.as_ptr().add(column), target) };
        }
    }
}

macro_rules! by_row_count {
    ($rows:expr, $function:ident::<$($count:literal),*>, $generic:tt, $arguments:tt) => {
        match $rows {
            $($count => by_row_count!(@call $function, $count, $generic, $arguments),)*
            _ => {}
        }
    };
    (@call $function:ident, $count:literal, (), ($($argument:expr),*)) => { $function::<$count>($($argument),*) };
    (@call $function:ident, $count:literal, ($generic:ident), ($($argument:expr),*)) => {
        $function::<$count, $generic>($($argument),*)
    };
}

#[cfg(target_arch = "x86_64")]
unsafe fn avx512_rows<const V: usize>(rows: usize, depth: usize, left: Left, panel: *const f32, out: &mut Tile) {
    let out = out.0.as_mut_ptr().cast();
    // SAFETY: as the caller's.
    unsafe {
        by_row_count!(
            rows,
            avx512_tile::<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>,
            (V),
            (depth, left, panel, out)
        )
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512_tile<const R: usize, const V: usize>(depth: usize, left: Left, panel: *const f32, out: *mut f32) {
    use std::arch::x86_64::*;
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    let (mut left_at, mut panel_at) = (left.start, panel);
    for _ in 0..depth {
        // SAFETY: `depth` rows of the panel and `R · depth` elements of the left operand are readable.
        unsafe {
            let right: [__m512; V] = std::array::from_fn(|v| _mm512_loadu_ps(panel_at.add(16 * v)));
            for (r, sums) in sums.iter_mut().enumerate() {
                let factor = _mm512_set1_ps(*left_at.add(r * left.row_stride));
                for v in 0..V {
                    sums[v] = _mm512_fmadd_ps(factor, right[v], sums[v]);
                }
            }
            panel_at = panel_at.add(PANEL);
            left_at = left_at.wrapping_add(left.depth_stride);
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (v, sum) in sums.iter().enumerate() {
            // SAFETY: the tile has `R` rows of `PANEL`.
            unsafe { _mm512_storeu_ps(out.add(r * PANEL + 16 * v), *sum) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
unsafe fn avx2_rows(rows: usize, depth: usize, left: Left, panel: *const f32, out: *mut f32) {
    // SAFETY: as the caller's.
    unsafe { by_row_count!(rows, avx2_tile::<1, 2, 3, 4, 5, 6>, (), (depth, left, panel, out)) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_tile<const R: usize>(depth: usize, left: Left, panel: *const f32, out: *mut f32) {
    use std::arch::x86_64::*;
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    let (mut left_at, mut panel_at) = (left.start, panel);
    for _ in 0..depth {
        // SAFETY: as in `avx512_tile`.
        unsafe {
            let right = [_mm256_loadu_ps(panel_at), _mm256_loadu_ps(panel_at.add(8))];
            for (r, sums) in sums.iter_mut().enumerate() {
                let factor = _mm256_broadcast_ss(&*left_at.add(r * left.row_stride));
                sums[0] = _mm256_fmadd_ps(factor, right[0], sums[0]);
                sums[1] = _mm256_fmadd_ps(factor, right[1], sums[1]);
            }
            panel_at = panel_at.add(PANEL);
            left_at = left_at.wrapping_add(left.depth_stride);
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: as in `avx512_tile`.
        unsafe {
            _mm256_storeu_ps(out.add(r * PANEL), sums[0]);
            _mm256_storeu_ps(out.add(r * PANEL + 8), sums[1]);
        }
    }
}

unsafe fn portable_rows(rows: usize, depth: usize, left: Left, panel: *const f32, out: *mut f32) {
    // SAFETY: as the caller's.
    unsafe { by_row_count!(rows, portable_tile::<1, 2, 3, 4>, (), (depth, left, panel, out)) }
}

unsafe fn portable_tile<const R: usize>(depth: usize, left: Left, panel: *const f32, out: *mut f32) {
    let mut sums = [[0.0f32; 16]; R];
    for d in 0..depth {
        // SAFETY: as in `avx512_tile`.
        unsafe {
            let right = &*panel.add(d * PANEL).cast::<[f32; 16]>();
            for (r, sums) in sums.iter_mut().enumerate() {
                let factor = *left.start.add(r * left.row_stride + d * left.depth_stride);
                for (sum, &right) in sums.iter_mut().zip(right) {
                    // Fused where the baseline of the architecture has the instruction.
                    *sum =
                        if cfg!(target_arch = "aarch64") { factor.mul_add(right, *sum) } else { *sum + factor * right };
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: as in `avx512_tile`.
        unsafe { out.add(r * PANEL).copy_from_nonoverlapping(sums.as_ptr(), 16) };
    }
}

/// Transposes rows of f32: `panel[d][c] = rows[c][d]`.
pub fn pack_transposed(instructions: Instructions, rows: &[&[f32]; PANEL], depth: usize, panel: &mut [f32]) {
    assert!(panel.len() >= depth * PANEL && rows.iter().all(|row| row.len() >= depth));
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if instructions == Instructions::Avx512 {
        done = depth / 16 * 16;
        for half in 0..2 {
            for d in (0..done).step_by(16) {
                let from = std::array::from_fn(|c| rows[16 * half + c][d..].as_ptr().cast());
                // SAFETY: 16 elements from `d` on are in each row, and 16 rows of the panel are there.
                unsafe { x86::transpose_f32(from, panel.as_mut_ptr().add(d * PANEL + 16 * half)) };
            }
        }
    }
    let _ = instructions;
    for d in done..depth {
        let target = &mut panel[d * PANEL..(d + 1) * PANEL];
        for (target, row) in target.iter_mut().zip(rows) {
            *target = row[d];
        }
    }
}

/// The same for rows of bf16, given as bits.
pub fn pack_transposed_bf16(instructions: Instructions, rows: &[&[u16]; PANEL], depth: usize, panel: &mut [f32]) {
    assert!(panel.len() >= depth * PANEL && rows.iter().all(|row| row.len() >= depth));
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if instructions == Instructions::Avx512 {
        done = depth / 32 * 32;
        for half in 0..2 {
            for d in (0..done).step_by(32) {
                let from = std::array::from_fn(|c| rows[16 * half + c][d..].as_ptr().cast());
                // SAFETY: 32 elements from `d` on are in each row, and 32 rows of the panel are there.
                unsafe { x86::transpose_bf16(from, panel.as_mut_ptr().add(d * PANEL + 16 * half)) };
            }
        }
    }
    let _ = instructions;
    for d in done..depth {
        let target = &mut panel[d * PANEL..(d + 1) * PANEL];
        for (target, row) in target.iter_mut().zip(rows) {
            *target = f32::from_bits(u32::from(row[d]) << 16);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::PANEL;
    use std::arch::x86_64::*;

    /// Transposes 16 vectors of 16 words.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
        // Written out: arrays indexed in loops would live on the stack.
        macro_rules! pairs {
            ($($i:literal)*) => { [$(
                _mm512_unpacklo_epi32(rows[$i], rows[$i + 1]), _mm512_unpackhi_epi32(rows[$i], rows[$i + 1]),
            )*] };
        }
        let a = pairs!(0 2 4 6 8 10 12 14);
        macro_rules! quadruples {
            ($($i:literal)*) => { [$(
                _mm512_unpacklo_epi64(a[$i], a[$i + 2]), _mm512_unpackhi_epi64(a[$i], a[$i + 2]),
                _mm512_unpacklo_epi64(a[$i + 1], a[$i + 3]), _mm512_unpackhi_epi64(a[$i + 1], a[$i + 3]),
            )*] };
        }
        // b[4i + j]: column j (and j + 4, j + 8, j + 12 in the further quarters) of rows 4i..4i + 4.
        let b = quadruples!(0 4 8 12);
        macro_rules! halves {
            ($quarters:literal, $($j:literal)*) => { [$( (
                _mm512_shuffle_i32x4::<$quarters>(b[$j], b[4 + $j]),
                _mm512_shuffle_i32x4::<$quarters>(b[8 + $j], b[12 + $j]),
            ) ),*] };
        }
        let even = halves!(0b10_00_10_00, 0 1 2 3);
        let odd = halves!(0b11_01_11_01, 0 1 2 3);
        macro_rules! columns {
            ($($half:ident $quarters:literal $j:literal,)*) => { [$(
                _mm512_shuffle_i32x4::<$quarters>($half[$j].0, $half[$j].1)
            ),*] };
        }
        columns!(
            even 0b10_00_10_00 0, even 0b10_00_10_00 1, even 0b10_00_10_00 2, even 0b10_00_10_00 3,
            odd 0b10_00_10_00 0, odd 0b10_00_10_00 1, odd 0b10_00_10_00 2, odd 0b10_00_10_00 3,
            even 0b11_01_11_01 0, even 0b11_01_11_01 1, even 0b11_01_11_01 2, even 0b11_01_11_01 3,
            odd 0b11_01_11_01 0, odd 0b11_01_11_01 1, odd 0b11_01_11_01 2, odd 0b11_01_11_01 3,
        )
    }

    /// # Safety
    /// Each pointer leads to 16 words; `out` has 16 rows of [`PANEL`], of which 16 words each are written.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn transpose_f32(rows: [*const i32; 16], out: *mut f32) {
        // SAFETY: the caller's promise.
        let rows = rows.map(|row| unsafe { _mm512_loadu_si512(row.cast()) });
        for (d, column) in transpose(rows).into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { _mm512_storeu_si512(out.add(d * PANEL).cast(), column) };
        }
    }

    /// Pairs of bf16 are transposed as words, then split.
    ///
    /// # Safety
    /// Each pointer leads to 32 bf16; `out` has 32 rows of [`PANEL`], of which 16 words each are written.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn transpose_bf16(rows: [*const i32; 16], out: *mut f32) {
        // SAFETY: the caller's promise.
        let rows = rows.map(|row| unsafe { _mm512_loadu_si512(row.cast()) });
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        for (pair, column) in transpose(rows).into_iter().enumerate() {
            let (even, odd) = (_mm512_slli_epi32::<16>(column), _mm512_and_si512(column, upper));
            // SAFETY: the caller's promise.
            unsafe {
                _mm512_storeu_si512(out.add(2 * pair * PANEL).cast(), even);
                _mm512_storeu_si512(out.add((2 * pair + 1) * PANEL).cast(), odd);
            }
        }
    }
}

/// What this processor can run.
#[cfg(test)]
pub fn every_kind() -> Vec<Instructions> {
    let mut kinds = vec![Instructions::Portable];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            kinds.push(Instructions::Avx2);
        }
        if is_x86_feature_detected!("avx512f") {
            kinds.push(Instructions::Avx512);
        }
    }
    kinds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_of_every_size_agree_with_a_plain_loop() {
        let number = |i: usize| (i * 37 % 101) as f32 - 50.0;
        for kind in every_kind() {
            for rows in 1..=ROWS {
                for (depth, columns) in [(1, 32), (7, 5), (40, 17), (33, 16)] {
                    let left: Vec<f32> = (0..rows * depth).map(number).collect();
                    let panel: Vec<f32> = (0..depth * PANEL).map(|i| number(i + 5)).collect();
                    let mut out = Tile([[f32::NAN; PANEL]; ROWS]);
                    let operand = Left { start: left.as_ptr(), row_stride: depth, depth_stride: 1 };
                    // SAFETY: the operands have these sizes.
                    unsafe { tile(kind, (rows, depth, columns), operand, &panel, &mut out) };
                    for r in 0..rows {
                        for c in 0..columns {
                            let expected: f32 = (0..depth).map(|d| left[r * depth + d] * panel[d * PANEL + c]).sum();
                            assert_eq!(out.0[r][c], expected, "{kind:?} {rows}x{depth}x{columns} at {r}, {c}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn packing_transposes() {
        for kind in every_kind() {
            for depth in [64, 75, 5] {
                let values: Vec<f32> = (0..PANEL * depth).map(|i| (i % 251) as f32).collect();
                let bits: Vec<u16> = values.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
                let mut panels = [vec![f32::NAN; depth * PANEL], vec![f32::NAN; depth * PANEL]];
                let rows: [&[f32]; PANEL] = std::array::from_fn(|c| &values[c * depth..(c + 1) * depth]);
                pack_transposed(kind, &rows, depth, &mut panels[0]);
                let rows: [&[u16]; PANEL] = std::array::from_fn(|c| &bits[c * depth..(c + 1) * depth]);
                pack_transposed_bf16(kind, &rows, depth, &mut panels[1]);
                for panel in panels {
                    for (i, &found) in panel.iter().enumerate() {
                        let (d, c) = (i / PANEL, i % PANEL);
                        assert_eq!(found, values[c * depth + d], "{kind:?} depth {depth} at {d}, {c}");
                    }
                }
            }
        }
    }
}
