//! Compression that is as good as the line leaves time for.

use alloc::boxed::Box;

use miniz_oxide::DataFormat;
use miniz_oxide::deflate::core::{CompressorOxide, TDEFLFlush, TDEFLStatus, compress};

/// Levels of DEFLATE, from none to the best that is worth its time.
const LEVELS: [u8; 4] = [0, 1, 6, 9];

/// The next level is tried when the time that packing saves on the line is more than so many times what
/// packing takes; it takes up to so many times as long.
const SLOWER: u64 = 4;

/// A compressor. It is made once: nothing is allocated later.
pub struct Compressor {
    state: Box<CompressorOxide>,
    /// Index of the level in use.
    level: usize,
    /// Frames for which no higher one is tried.
    hold: u32,
}

/// How many frames a level that was too slow is not tried again.
const HOLD: u32 = 64;

impl Compressor {
    /// A compressor that begins with the level for a line of unknown speed.
    #[must_use]
    pub fn new() -> Compressor {
        let level = LEVELS.len() - 2;
        let mut state = Box::<CompressorOxide>::default();
        state.set_format_and_level(DataFormat::Raw, LEVELS[level]);
        Compressor { state, level, hold: 0 }
    }

    /// Packs `bytes` into `into` as one DEFLATE stream. `None` when that would not make them shorter.
    pub fn pack(&mut self, bytes: &[u8], into: &mut [u8]) -> Option<usize> {
        if LEVELS[self.level] == 0 {
            return None;
        }
        self.state.reset();
        let (status, _, packed) = compress(&mut self.state, bytes, into, TDEFLFlush::Finish);
        (status == TDEFLStatus::Done && packed < bytes.len()).then_some(packed)
    }

    /// Chooses the level for the next frames, when packing the last one took `packing` microseconds and
    /// saved `saved` of them on the line. The line waits while the processor packs, so that only what
    /// saves more than it takes is worth it.
    pub fn adapt(&mut self, packing: u64, saved: u64) {
        let before = self.level;
        let is_worth_more = packing.saturating_mul(SLOWER) < saved || before == 0;
        if packing > saved && before > 0 {
            self.level = before - 1;
            self.hold = HOLD;
        } else if is_worth_more && self.hold == 0 {
            self.level = (before + 1).min(LEVELS.len() - 1);
        }
        self.hold = self.hold.saturating_sub(1);
        if self.level != before {
            self.state.set_format_and_level(DataFormat::Raw, LEVELS[self.level]);
        }
    }
}

impl Default for Compressor {
    fn default() -> Compressor {
        Compressor::new()
    }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use miniz_oxide::inflate::decompress_to_vec;

    use super::*;

    #[test]
    fn every_level_that_compresses_gives_the_bytes_back() {
        let bytes: Vec<u8> = (0..16_384u32).map(|index| (index / 7 * index % 61) as u8).collect();
        let mut compressor = Compressor::new();
        let mut sizes = Vec::new();
        for level in 1..LEVELS.len() {
            compressor.level = level - 1;
            compressor.adapt(1, 1000);
            assert_eq!(compressor.level, level);
            let mut packed = vec![0; bytes.len()];
            let size = compressor.pack(&bytes, &mut packed).unwrap();
            assert_eq!(decompress_to_vec(&packed[..size]).unwrap(), bytes);
            sizes.push(size);
        }
        assert!(sizes.is_sorted_by(|worse, better| worse >= better), "{sizes:?}");
    }

    #[test]
    fn what_does_not_shrink_is_left_as_it_is() {
        let mut seed = 1u32;
        let mut noise = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as u8
        };
        let bytes: Vec<u8> = (0..4096).map(|_| noise()).collect();
        assert_eq!(Compressor::new().pack(&bytes, &mut [0; 4096]), None);
    }

    #[test]
    fn fast_line_ends_without_compression_and_a_slow_one_with_the_best() {
        let mut compressor = Compressor::new();
        (0..4).for_each(|_| compressor.adapt(100, 50));
        assert_eq!(compressor.pack(&[0; 4096], &mut [0; 4096]), None);
        compressor.adapt(5, 0);
        assert_eq!(compressor.level, 0, "what was too slow a moment ago is not tried again");
        let tried = (0..HOLD).any(|_| {
            compressor.adapt(5, 0);
            compressor.level == 1
        });
        assert!(tried, "but later it is");
        (0..2).for_each(|_| compressor.adapt(100, 5000));
        assert_eq!(compressor.level, LEVELS.len() - 1);
        compressor.adapt(100, 300);
        assert_eq!(compressor.level, LEVELS.len() - 1, "neither too slow nor too quick");
    }
}
