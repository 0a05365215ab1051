//! Elementary functions that compilers can vectorize, and sums over lanes.

/// Runs `work` with the widest vector instructions of this processor. A closure given to it is marked
/// `#[inline(always)]`: only what is inlined is compiled for those instructions.
#[inline(always)]
pub fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// `eˣ` to about one unit in the last place: `2ⁿ · e^r` with `|r| <= ln 2 / 2` and a polynomial of degree six
/// (Cephes `expf`).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4;
    let r = r - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4_f32;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let value = p * (r * r) + r + 1.0;
    // Two factors, so that results near the ends of the range are not lost.
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = exponent >> 1;
    let power = |e: i32| f32::from_bits((e.wrapping_add(127) << 23) as u32);
    value * power(half) * power(exponent.wrapping_sub(half))
}

#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Hyperbolic tangent (Cephes `tanhf`): a polynomial near zero, where the formula with `exp` cancels.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let z = x * x;
    let mut p = -5.704_988_6e-3_f32;
    p = p * z + 2.063_909e-2;
    p = p * z - 5.373_971_5e-2;
    p = p * z + 1.333_144_2e-1;
    p = p * z - 3.333_328e-1;
    let near = p * z * x + x;
    let small = exp(-2.0 * x.abs());
    let far = ((1.0 - small) / (1.0 + small)).copysign(x);
    if z < 0.390_625 { near } else { far }
}

const LANES: usize = 16;

/// Sum of `term(i)` for `i < length`, in sixteen partial sums.
#[inline(always)]
pub fn sum(length: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = length / LANES * LANES;
    let mut at = 0;
    while at < whole {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += term(at + lane);
        }
        at += LANES;
    }
    for (lane, total) in lanes.iter_mut().enumerate().take(length - whole) {
        *total += term(whole + lane);
    }
    lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>() as f32
}

/// Largest of `values`; NaN when one of them is.
#[inline(always)]
pub fn maximum(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if value > *lane || value.is_nan() { value } else { *lane };
        }
    }
    let rest = chunks.remainder().iter().copied();
    lanes.into_iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| if b > a || b.is_nan() { b } else { a })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_tanh_agree_with_f64() {
        for step in -2000..2000 {
            let x = step as f32 * 0.0437;
            let exact = f64::from(x).exp();
            if (1e-37..3e38).contains(&exact) {
                assert!((f64::from(exp(x)) / exact - 1.0).abs() < 3e-7, "exp({x})");
            }
            let exact = f64::from(x / 20.0).tanh();
            assert!((f64::from(tanh(x / 20.0)) - exact).abs() <= 2e-7 * exact.abs(), "tanh({x} / 20)");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan() && tanh(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_maxima_take_every_element() {
        let values: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(sum(values.len(), |i| values[i]), 666.0);
        assert_eq!(maximum(&values), 36.0);
        assert!(maximum(&[1.0, f32::NAN, 3.0]).is_nan());
    }
}
