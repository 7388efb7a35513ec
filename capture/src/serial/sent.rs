//! Which blocks were sent already.

use heapless::Vec;

/// Runs that are kept as such, and the least blocks of one.
const RUNS: usize = 256;
const LONG: u64 = 16;
/// Places for single blocks; a power of two.
const PLACES: usize = 1 << 14;
/// How many of them are filled at most: a search stays short.
const MOST: usize = PLACES / 4 * 3;

/// A set of blocks that takes the same memory on every machine. When it is full, it forgets: such a
/// block is sent twice.
pub struct Sent {
    runs: Vec<(u64, u64), RUNS>,
    /// Numbers of blocks plus one, each at the first free place from its hash on; 0 is free.
    places: [u32; PLACES],
    filled: usize,
}

impl Default for Sent {
    fn default() -> Sent {
        Sent::new()
    }
}

impl Sent {
    /// The empty set.
    #[must_use]
    pub const fn new() -> Sent {
        Sent { runs: Vec::new(), places: [0; PLACES], filled: 0 }
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.places.fill(0);
        self.filled = 0;
    }

    /// Adds `count` blocks from `first` on.
    pub fn add(&mut self, first: u64, count: u64) {
        let end = first.saturating_add(count);
        if count >= LONG && self.runs.push((first, end)).is_ok() {
            return;
        }
        for block in first..end {
            if self.filled == MOST {
                return;
            }
            let Some(key) = key(block) else { return };
            let place = self.place(key);
            if self.places[place] == 0 {
                self.places[place] = key;
                self.filled += 1;
            }
        }
    }

    /// How many blocks from `first` on, at most `most` (not 0), are alike, and whether they are in the set.
    #[must_use]
    pub fn alike(&self, first: u64, most: u64) -> (bool, u64) {
        let limit = first.saturating_add(most);
        if let Some(end) = self.long_run(first) {
            return (true, end.min(limit) - first);
        }
        // Up to where the next long run begins, single blocks decide.
        let begins = self.runs.iter().map(|&(start, _)| start).filter(|&start| start > first);
        let limit = begins.min().unwrap_or(limit).min(limit);
        if self.filled == 0 {
            return (false, limit - first);
        }
        let has = self.has_single(first);
        let end = (first + 1..limit).find(|&block| self.has_single(block) != has);
        (has, end.unwrap_or(limit) - first)
    }

    /// The end of a long run that `block` is in.
    fn long_run(&self, block: u64) -> Option<u64> {
        self.runs
            .iter()
            .filter(|&&(start, end)| start <= block && block < end)
            .map(|run| run.1)
            .max()
    }

    fn has_single(&self, block: u64) -> bool {
        key(block).is_some_and(|key| self.places[self.place(key)] == key)
    }

    /// Where `key` is, or would go. There always is a free place.
    fn place(&self, key: u32) -> usize {
        // Multiplicative hashing (Knuth, TAOCP volume 3, 6.4): the upper bits are well mixed.
        let mut place = (key.wrapping_mul(0x9e37_79b1) >> (u32::BITS - PLACES.ilog2())) as usize;
        while self.places[place] != 0 && self.places[place] != key {
            place = (place + 1) % PLACES;
        }
        place
    }
}

/// What stands for a block in the table; `None` beyond 16 TiB.
fn key(block: u64) -> Option<u32> {
    u32::try_from(block).ok()?.checked_add(1)
}

#[cfg(test)]
mod tests {
    use std::boxed::Box;
    use std::vec::Vec;

    use super::*;

    /// The runs of blocks in `0..limit` that are not in the set.
    fn missing(sent: &Sent, limit: u64) -> Vec<(u64, u64)> {
        let (mut at, mut missing) = (0, Vec::new());
        while at < limit {
            let (has, count) = sent.alike(at, limit - at);
            assert!(count > 0);
            if !has {
                missing.push((at, count));
            }
            at += count;
        }
        missing
    }

    #[test]
    fn single_blocks_and_long_runs_are_remembered() {
        let mut sent = Box::new(Sent::new());
        assert_eq!(missing(&sent, 1 << 40), [(0, 1 << 40)]);
        sent.add(10, 1);
        sent.add(100, 50);
        sent.add(120, 60);
        sent.add(12, 3);
        assert_eq!(missing(&sent, 200), [(0, 10), (11, 1), (15, 85), (180, 20)]);
        sent.clear();
        assert_eq!(missing(&sent, 200), [(0, 200)]);
    }

    #[test]
    fn set_that_is_full_forgets_and_stays_quick() {
        let mut sent = Box::new(Sent::new());
        for block in 0..100_000 {
            sent.add(block * 3, 1);
        }
        assert_eq!(sent.filled, MOST);
        assert!((0..MOST as u64).all(|block| sent.has_single(block * 3)));
        assert!(!sent.has_single(99_999 * 3));
        sent.add(u64::MAX - 3, 9);
    }
}
