//! The copies of the core's head: which one of each block counts, and whether together they are what the
//! payload says the head is.

use std::cell::Cell;
use std::collections::BTreeMap;

use format::BLOCK;

/// What is known of the blocks of the head. Their bytes are in the store.
#[derive(Default)]
pub struct HeadCopies {
    /// The sequence number and the CRC32 of the copy of each block that counts.
    copies: BTreeMap<u64, (u32, u32)>,
    /// Sequence number of the first end that was heard: what comes later is as it is in the end.
    ended: Option<u32>,
    /// CRC32 of so many blocks, until one of them changes.
    crc: Cell<Option<(u64, u32)>>,
}

/// Whether sequence number `one` is after `other`, or the same. Numbers wrap around.
fn is_not_before(one: u32, other: u32) -> bool {
    one.wrapping_sub(other) <= u32::MAX / 2
}

impl HeadCopies {
    /// Hears of a copy of a block. Returns whether it counts: it was not sent before the one that is there.
    pub fn take(&mut self, block: u64, sequence: u32, bytes: &[u8]) -> bool {
        if self.copies.get(&block).is_some_and(|&(known, _)| !is_not_before(sequence, known)) {
            return false;
        }
        self.copies.insert(block, (sequence, format::crc32(bytes)));
        self.crc.set(None);
        true
    }

    /// The head ends before this block.
    pub fn forget_from(&mut self, block: u64) {
        self.copies.split_off(&block);
        self.crc.set(None);
    }

    /// An end was heard.
    pub fn ended(&mut self, sequence: u32) {
        self.ended.get_or_insert(sequence);
    }

    /// CRC32 of the first `blocks` blocks; `None` when not all of them are there.
    pub fn crc(&self, blocks: u64) -> Option<u32> {
        if let Some((of, crc)) = self.crc.get()
            && of == blocks
        {
            return Some(crc);
        }
        let mut whole = crc32fast::Hasher::new();
        for block in 0..blocks {
            let &(_, crc) = self.copies.get(&block)?;
            whole.combine(&crc32fast::Hasher::new_with_initial_len(crc, BLOCK));
        }
        let crc = whole.finalize();
        self.crc.set(Some((blocks, crc)));
        Some(crc)
    }

    /// Of the first `blocks` blocks those whose copy may not be the last one.
    pub fn doubtful(&self, blocks: u64) -> impl Iterator<Item = u64> {
        let is_final = |sequence| self.ended.is_some_and(|end| is_not_before(sequence, end));
        let sure = move |block: &u64| {
            self.copies.get(block).is_some_and(|&(sequence, _)| is_final(sequence))
        };
        (0..blocks).filter(move |block| !sure(block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_that_was_sent_later_counts_even_when_numbers_wrap() {
        let mut head = HeadCopies::default();
        assert!(head.take(0, u32::MAX - 1, &[1; 4096]));
        assert!(head.take(0, 3, &[2; 4096]));
        assert!(!head.take(0, u32::MAX, &[1; 4096]));
        assert_eq!(head.crc(1), Some(format::crc32(&[2; 4096])));
        assert_eq!(head.crc(2), None);
    }

    #[test]
    fn crc_of_the_head_is_that_of_its_bytes() {
        let bytes: Vec<u8> = (0..3 * 4096u32).map(|byte| (byte % 251) as u8).collect();
        let mut head = HeadCopies::default();
        for (block, bytes) in bytes.chunks(4096).enumerate() {
            head.take(block as u64, 0, bytes);
        }
        assert_eq!(head.crc(3), Some(format::crc32(&bytes)));
    }

    #[test]
    fn blocks_sent_before_the_end_are_in_doubt() {
        let mut head = HeadCopies::default();
        head.take(0, 5, &[0; 4096]);
        head.ended(9);
        head.take(1, 10, &[0; 4096]);
        assert_eq!(head.doubtful(3).collect::<Vec<_>>(), [0, 2]);
    }
}
