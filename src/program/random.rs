//! Counter-based random numbers: a pure function of a key and a counter, so that any engine, in any order,
//! on any plan, draws the same mask.

/// Mixes 32 bits (the `lowbias32` finalizer of Chris Wellons' hash prospector).
#[inline(always)]
pub fn mix(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^= x >> 16;
    x
}

/// 32 random bits for element `(row, column)` of stream `stream` under `key` (seed low, seed high, update,
/// micro-batch). Every engine computes exactly this chain.
pub fn bits(key: [u32; 4], stream: u32, row: u32, column: u32) -> u32 {
    mix(prefix(key, stream, row) ^ column)
}

/// The part of the chain that the elements of a row share: `bits = mix(prefix ^ column)`.
pub fn prefix(key: [u32; 4], stream: u32, row: u32) -> u32 {
    let mut x = mix(key[0] ^ 0x9e37_79b9);
    x = mix(x ^ key[1]);
    x = mix(x ^ key[2]);
    x = mix(x ^ key[3]);
    x = mix(x ^ stream);
    mix(x ^ row)
}

/// Uniform in `[0, 1)`.
pub fn uniform(key: [u32; 4], stream: u32, row: u32, column: u32) -> f32 {
    to_uniform(bits(key, stream, row, column))
}

/// A number in `[0, 1)` from the upper 24 bits.
#[inline(always)]
pub fn to_uniform(bits: u32) -> f32 {
    (bits >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Stream number of a stable name (FNV-1a, 32 bits).
pub fn stream(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}
