//! Weights in 4 and 8 bits as products read them: a piece of a row at a time, in f32.

use super::kernel::Instructions;
use crate::backend::quantized::{BLOCK, GROUP, NF4, Parts};
use crate::program::{DType, block8};

/// Parts of a weight lie end to end: it takes the bytes that the plan says.
pub const ALIGNMENT: u64 = 1;

/// A weight in 4-bit NormalFloat.
#[derive(Clone, Copy)]
pub struct Nf4<'a> {
    codes: &'a [u8],
    scale_codes: &'a [u8],
    group_scales: &'a [[u8; 4]],
    offset: f32,
    /// What codes of scales stand for.
    map: &'static [f32; 256],
}

impl<'a> Nf4<'a> {
    /// A `[rows, columns]` weight; none when the bytes are not its.
    pub fn new(bytes: &'a [u8], rows: usize, columns: usize) -> Option<Self> {
        let parts = Parts::of(DType::Nf4, rows, columns, ALIGNMENT);
        let part = |from: u64, to: u64| bytes.get(from as usize..to as usize);
        Some(Self {
            codes: part(0, parts.scales)?,
            scale_codes: part(parts.scales, parts.group_scales)?,
            group_scales: part(parts.group_scales, parts.offset)?.as_chunks().0,
            offset: f32::from_le_bytes(part(parts.offset, parts.end)?.try_into().ok()?),
            map: block8::Map::Signed.values(),
        })
    }

    fn scale(self, block: usize) -> f32 {
        let group = f32::from_le_bytes(self.group_scales[block / GROUP]);
        self.offset + self.map[usize::from(self.scale_codes[block])] * group
    }

    fn value(self, index: usize) -> f32 {
        let code = self.codes[index / 2] >> (4 - 4 * (index % 2)) & 15;
        NF4[usize::from(code)] * self.scale(index / BLOCK)
    }

    /// Elements from `first` on, counted over the whole weight.
    #[inline(always)]
    pub fn unpack(self, first: usize, target: &mut [f32]) {
        let kind = Instructions::best();
        let mut done = 0;
        while done < target.len() {
            let at = first + done;
            let run = (BLOCK - at % BLOCK).min(target.len() - done) & !1;
            if at % 2 == 1 || run == 0 {
                // Half a byte, whose other half is not asked for.
                target[done] = self.value(at);
                done += 1;
            } else {
                unpack_pairs(
                    kind,
                    &self.codes[at / 2..][..run / 2],
                    self.scale(at / BLOCK),
                    &mut target[done..][..run],
                );
                done += run;
            }
        }
    }
}

/// A weight in 8-bit integers.
#[derive(Clone, Copy)]
pub struct Int8<'a> {
    codes: &'a [u8],
    scales: &'a [[u8; 4]],
}

impl<'a> Int8<'a> {
    /// A `[rows, columns]` weight; none when the bytes are not its.
    pub fn new(bytes: &'a [u8], rows: usize, columns: usize) -> Option<Self> {
        let parts = Parts::of(DType::Int8, rows, columns, ALIGNMENT);
        let scales = bytes.get(parts.scales as usize..parts.end as usize)?.as_chunks().0;
        Some(Self { codes: &bytes[..parts.scales as usize], scales })
    }

    /// Elements of a row, from `first` on, counted over the whole weight.
    #[inline(always)]
    pub fn unpack(self, row: usize, first: usize, target: &mut [f32]) {
        let scale = f32::from_le_bytes(self.scales[row]);
        for (value, &code) in target.iter_mut().zip(&self.codes[first..]) {
            *value = f32::from(code as i8) * scale;
        }
    }
}

/// Two values a byte of codes, which share a scale.
#[inline(always)]
fn unpack_pairs(kind: Instructions, codes: &[u8], scale: f32, target: &mut [f32]) {
    let (whole, rest) = codes.as_chunks::<16>();
    let (vectors, tail) = target.split_at_mut(32 * whole.len());
    let vectors = vectors.as_chunks_mut::<32>().0;
    for (codes, target) in whole.iter().zip(vectors) {
        match kind {
            // SAFETY: the instructions were detected.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => unsafe { x86::avx512(codes, scale, target) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => unsafe { x86::avx2(codes, scale, target) },
            Instructions::Portable => portable(codes, scale, target),
        }
    }
    portable(rest, scale, tail);
}

#[inline(always)]
fn portable(codes: &[u8], scale: f32, target: &mut [f32]) {
    for (&code, pair) in codes.iter().zip(target.as_chunks_mut::<2>().0) {
        *pair = [NF4[usize::from(code >> 4)] * scale, NF4[usize::from(code & 15)] * scale];
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::NF4;
    use std::arch::x86_64::*;

    /// Codes one a byte, in order: of the first eight bytes, then of the others.
    #[inline]
    #[target_feature(enable = "sse2")]
    fn apart(codes: &[u8; 16]) -> [__m128i; 2] {
        // SAFETY: 16 bytes are readable.
        let bytes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
        let low = _mm_set1_epi8(15);
        let (first, second) = (_mm_and_si128(_mm_srli_epi16::<4>(bytes), low), _mm_and_si128(bytes, low));
        [_mm_unpacklo_epi8(first, second), _mm_unpackhi_epi8(first, second)]
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn avx512(codes: &[u8; 16], scale: f32, target: &mut [f32; 32]) {
        // SAFETY: the table has 16 values.
        let levels = unsafe { _mm512_loadu_ps(NF4.as_ptr()) };
        for (codes, target) in apart(codes).into_iter().zip(target.as_chunks_mut::<16>().0) {
            let values = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), levels);
            // SAFETY: 16 values are writable.
            unsafe { _mm512_storeu_ps(target.as_mut_ptr(), _mm512_mul_ps(values, _mm512_set1_ps(scale))) };
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn avx2(codes: &[u8; 16], scale: f32, target: &mut [f32; 32]) {
        // SAFETY: the table has twice 8 values.
        let (lower, upper) = unsafe { (_mm256_loadu_ps(NF4.as_ptr()), _mm256_loadu_ps(NF4.as_ptr().add(8))) };
        let [first, second] = apart(codes);
        let eights = [first, _mm_srli_si128::<8>(first), second, _mm_srli_si128::<8>(second)];
        for (codes, target) in eights.into_iter().zip(target.as_chunks_mut::<8>().0) {
            let codes = _mm256_cvtepu8_epi32(codes);
            let (low, high) = (_mm256_permutevar8x32_ps(lower, codes), _mm256_permutevar8x32_ps(upper, codes));
            // The code's fourth bit says which half of the table.
            let half = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            let values = _mm256_mul_ps(_mm256_blendv_ps(low, high, half), _mm256_set1_ps(scale));
            // SAFETY: 8 values are writable.
            unsafe { _mm256_storeu_ps(target.as_mut_ptr(), values) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernel::every_kind;
    use super::*;

    #[test]
    fn every_instruction_set_unpacks_the_same_values() {
        let codes: Vec<u8> = (0..41).map(|i| (i * 37 + 11) as u8).collect();
        let mut expected = vec![0.0; 82];
        portable(&codes, 0.37, &mut expected);
        assert_eq!(expected[..2], [NF4[0] * 0.37, NF4[11] * 0.37]);
        for kind in every_kind() {
            let mut found = vec![f32::NAN; 82];
            unpack_pairs(kind, &codes, 0.37, &mut found);
            assert_eq!(found, expected, "{kind:?}");
        }
    }

    #[test]
    fn any_piece_of_a_weight_is_the_same_as_in_the_whole() {
        let (rows, columns) = (5, 77);
        let bytes: Vec<u8> = (0..DType::Nf4.bytes(&[rows, columns])).map(|i| (i * 73 % 63) as u8).collect();
        let weight = Nf4::new(&bytes, rows, columns).expect("a weight");
        let whole: Vec<f32> = (0..rows * columns).map(|index| weight.value(index)).collect();
        for (first, count) in [(0, 385), (1, 200), (63, 2), (64, 64), (77, 77), (154, 33), (384, 1), (5, 0)] {
            let mut piece = vec![f32::NAN; count];
            weight.unpack(first, &mut piece);
            assert_eq!(piece, whole[first..first + count], "{count} from {first} on");
        }
    }
}
