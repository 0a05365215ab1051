//! The order of rows: shuffles and held-out rows as pure functions of the seed.

use crate::program::random;

/// The order of `n` rows in an epoch: a Fisher-Yates shuffle keyed by seed and epoch, or the file's order.
pub fn order(n: usize, seed: u64, epoch: u64, shuffle: bool) -> Vec<usize> {
    if shuffle { permutation(n, seed, epoch, "data.order") } else { (0..n).collect() }
}

/// Which of `n` rows are held out for evaluation: `fraction` of them, at least one, never all; in the file's order.
/// Depends on nothing but the arguments, so that an experiment's runs hold out the same rows.
pub fn held_out(n: usize, fraction: f64, seed: u64) -> Vec<bool> {
    let mut held = vec![false; n];
    if fraction > 0.0 && n > 1 {
        let count = ((n as f64 * fraction).round() as usize).clamp(1, n - 1);
        for &row in &permutation(n, seed, 0, "data.held_out")[..count] {
            held[row] = true;
        }
    }
    held
}

/// Rows drawn for one of several sources: `count` of `n`, the first ones of a keyed shuffle, in the file's order.
/// Past `n` rows repeat, each as often as the next give or take one.
pub(super) fn draw(n: usize, count: usize, seed: u64, source: usize) -> Vec<usize> {
    if n == 0 {
        return Vec::new();
    }
    let shuffled = permutation(n, seed, source as u64, "data.draw");
    let mut rows: Vec<usize> = (0..count).map(|i| shuffled[i % n]).collect();
    rows.sort_unstable();
    rows
}

fn permutation(n: usize, seed: u64, epoch: u64, name: &str) -> Vec<usize> {
    let key = [seed as u32, (seed >> 32) as u32, epoch as u32, (epoch >> 32) as u32];
    let stream = random::stream(name);
    let mut rows: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        let high = u64::from(random::bits(key, stream, last as u32, 0));
        let low = u64::from(random::bits(key, stream, last as u32, 1));
        // 64 random bits times the range, upper half: the bias is below n / 2^64.
        let pick = (u128::from(high << 32 | low) * (last as u128 + 1)) >> 64;
        rows.swap(last, pick as usize);
    }
    rows
}
