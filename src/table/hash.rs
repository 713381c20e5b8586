//! How the table finds an inode: a hash with random seeds. A `u64` key costs two multiplications, and one more to
//! choose the shard.
//!
//! Each table has random seeds, so that nobody can prepare inode numbers that collide. The hash is not cryptographic:
//! an attacker who finds collisions all the same makes opens slow.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash, Hasher};

#[derive(Clone, Copy)]
pub(super) struct Seeds {
    start: u64,
    multiplier: u64,
}

impl Seeds {
    pub(super) fn random() -> Self {
        let random = RandomState::new();
        Self {
            start: random.hash_one(0),
            multiplier: random.hash_one(1) | 1,
        }
    }

    /// Which of `shards` shards a key belongs to; `shards` is a power of two. This uses the state before `finish`,
    /// because the map inside the shard uses the result of `finish`. The state is less mixed, so some shards may get
    /// several times as many keys as others.
    #[inline]
    #[allow(clippy::cast_possible_truncation, reason = "the remainder fits")]
    pub(super) fn shard_of(&self, key: &impl Hash, shards: u8) -> u8 {
        let mut hasher = self.build_hasher();
        key.hash(&mut hasher);
        (hasher.state >> 56) as u8 % shards
    }
}

impl BuildHasher for Seeds {
    type Hasher = Folding;

    #[inline]
    fn build_hasher(&self) -> Folding {
        Folding {
            state: self.start,
            seeds: *self,
        }
    }
}

pub(super) struct Folding {
    state: u64,
    seeds: Seeds,
}

/// Combines both halves of the product, so that each bit of the input can affect every bit of the output.
#[inline]
#[allow(clippy::cast_possible_truncation, reason = "the halves of a product")]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

impl Hasher for Folding {
    #[inline]
    fn write_u64(&mut self, word: u64) {
        self.state = fold(self.state ^ word, self.seeds.multiplier);
    }

    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_ne_bytes(word));
        }
        // Tells apart keys that differ only in the padding of the last chunk.
        self.write_u64(bytes.len() as u64);
    }

    /// Folds once more: after one multiplication, numbers at equal distances are spread evenly for most seeds, but not
    /// for all.
    #[inline]
    fn finish(&self) -> u64 {
        fold(self.state, self.seeds.start | 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Inode numbers as servers choose them: consecutive, aligned addresses, or with a generation in the high bits.
    #[test]
    #[allow(clippy::cast_possible_truncation)]
    fn spreads_inode_numbers() {
        const SHARDS: u8 = 64;
        const EACH: usize = 256;
        let sequences: [fn(u64) -> u64; 4] = [
            |n| n,
            |n| n << 6,
            |n| 0x7f00_0000_0000 + n * 4096,
            |n| n << 48,
        ];
        // Several seeds, to find sequences that some seeds spread badly.
        for sequence in sequences.into_iter().cycle().take(8 * sequences.len()) {
            let seeds = Seeds::random();
            let (mut shards, mut low) = ([0; SHARDS as usize], [0; SHARDS as usize]);
            for n in 0..u64::from(SHARDS) * EACH as u64 {
                shards[usize::from(seeds.shard_of(&sequence(n), SHARDS))] += 1;
                low[seeds.hash_one(sequence(n)) as usize % low.len()] += 1;
            }
            // Random hashes would exceed these 6 standard deviations once in 10^9.
            for count in low {
                assert!((EACH - 96..=EACH + 96).contains(&count), "{low:?}");
            }
            for count in shards {
                assert!(count < shards.len() * EACH / 2, "{shards:?}");
            }
        }
    }

    #[test]
    fn tells_keys_apart() {
        let seeds = Seeds::random();
        let distinct = |hashes: &[u64]| {
            let set: std::collections::HashSet<_> = hashes.iter().collect();
            assert_eq!(set.len(), hashes.len(), "{hashes:?}");
        };
        distinct(
            &["", "\0", "a", "a\0", "a\0\0", "aaaaaaaa", "aaaaaaaaa"].map(|s| seeds.hash_one(s)),
        );
        distinct(&[(0_u8, 1_u32), (1, 0), (0, 0), (1, 1)].map(|pair| seeds.hash_one(pair)));
        distinct(&[(0_u16, 1_usize), (1, 0), (0, 0), (1, 1)].map(|pair| seeds.hash_one(pair)));
        let other = Seeds::random();
        assert_ne!(seeds.hash_one(1_u64), other.hash_one(1_u64));
    }
}
