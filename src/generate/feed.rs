//! How tokens are cut into runs of the fixed-size prefill and decode programs.

/// One run of a program: its size, and how many of its rows hold tokens. The rest is padding that writes cache
/// rows past the sequence, which later tokens overwrite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub size: usize,
    pub tokens: usize,
}

/// Cuts `count` tokens, behind `start` tokens that the cache holds, into chunks of `sizes` (ascending, the first
/// is 1). Padding never reaches past `capacity`, the cache's rows: there smaller programs take over.
///
/// # Panics
/// When the tokens do not fit into the cache: the caller has made room.
pub fn chunks(mut start: usize, mut count: usize, capacity: usize, sizes: &[usize]) -> Vec<Chunk> {
    assert!(start + count <= capacity, "{start} + {count} tokens in a cache of {capacity}");
    let mut list = Vec::new();
    while count > 0 {
        let fits = |size: &&usize| start + **size <= capacity;
        let whole = sizes.iter().filter(fits).find(|&&size| size >= count);
        let size = *whole.or_else(|| sizes.iter().rev().find(fits)).expect("a size of 1 fits");
        let tokens = count.min(size);
        list.push(Chunk { size, tokens });
        start += tokens;
        count -= tokens;
    }
    list
}

/// Tokens at the start of `tokens` that `cached` holds already; always leaves one to run, for its logits.
pub fn reusable(cached: &[u32], tokens: &[u32]) -> usize {
    let same = cached.iter().zip(tokens).take_while(|(a, b)| a == b).count();
    same.min(tokens.len().saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(start: usize, count: usize, capacity: usize) -> Vec<(usize, usize)> {
        chunks(start, count, capacity, &[1, 16, 64]).into_iter().map(|chunk| (chunk.size, chunk.tokens)).collect()
    }

    #[test]
    fn the_smallest_program_that_holds_them_takes_the_rest() {
        assert_eq!(list(0, 1, 128), [(1, 1)]);
        assert_eq!(list(0, 10, 128), [(16, 10)]);
        assert_eq!(list(0, 16, 128), [(16, 16)]);
        assert_eq!(list(0, 17, 128), [(64, 17)]);
        assert_eq!(list(3, 70, 128), [(64, 64), (16, 6)]);
    }

    #[test]
    fn padding_never_passes_the_end_of_the_cache() {
        assert_eq!(list(118, 3, 128), [(1, 1), (1, 1), (1, 1)]);
        assert_eq!(list(100, 28, 128), [(16, 16), (1, 1)].into_iter().chain([(1, 1); 11]).collect::<Vec<_>>());
        assert_eq!(list(64, 64, 128), [(64, 64)]);
    }

    #[test]
    fn every_cover_is_whole_and_inside() {
        for start in 0..40 {
            for count in 0..=(40 - start) {
                let mut at = start;
                for chunk in chunks(start, count, 40, &[1, 4, 16]) {
                    assert!(at + chunk.size <= 40 && chunk.tokens <= chunk.size);
                    at += chunk.tokens;
                }
                assert_eq!(at, start + count);
            }
        }
    }

    #[test]
    fn a_common_prefix_is_reused_but_for_the_last_token() {
        assert_eq!(reusable(&[1, 2, 3], &[1, 2, 3, 4]), 3);
        assert_eq!(reusable(&[1, 2, 3], &[1, 2, 3]), 2);
        assert_eq!(reusable(&[1, 2, 3, 4], &[1, 9]), 1);
        assert_eq!(reusable(&[], &[1]), 0);
    }
}
