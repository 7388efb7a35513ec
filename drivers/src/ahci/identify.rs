//! What a disk says of itself: the data of IDENTIFY DEVICE (ATA8-ACS 7.16; the words are those of
//! its table 29, those about SATA of Serial ATA Revision 3.0, 13.2.1).

use crate::ahci::OpenError;

/// Size of the data in bytes.
pub const IDENTIFY_BYTES: usize = 512;

/// Blocks that 48-bit addresses reach.
const MOST_BLOCKS: u64 = 1 << 48;

/// What a disk is, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Size of a logical sector in bytes: a power of two from 512 to 4096.
    pub block_size: u32,
    /// Number of logical sectors.
    pub blocks: u64,
    /// How many queued commands it takes at once, at most 32; `None` without native command queuing.
    pub queue_depth: Option<u16>,
    /// Whether it knows FLUSH CACHE EXT.
    pub has_flush: bool,
}

impl Identity {
    /// Reads the data.
    ///
    /// # Errors
    /// [`OpenError`] when the disk cannot be written with this driver, or cannot be at all.
    pub fn parse(data: &[u8; IDENTIFY_BYTES]) -> Result<Identity, OpenError> {
        let word = |index: usize| u16::from_le_bytes([data[2 * index], data[2 * index + 1]]);
        let has = |index, bit: u32| word(index) & 1 << bit != 0;
        // Words 83 and 106 say by their upper bits whether they mean anything.
        let valid = |index| word(index) >> 14 == 0b01;
        if has(0, 15) {
            return Err(OpenError::NoDisk);
        }
        let (dma, addresses_of_48_bits) = (has(49, 8), valid(83) && has(83, 10));
        let has_flush = valid(83) && has(83, 13);
        // FLUSH CACHE EXT goes with 48-bit addresses. Without it a cache may keep what we write.
        let keeps = has(85, 5) && !has_flush;
        if !dma || !addresses_of_48_bits || keeps {
            return Err(OpenError::Unsupported);
        }
        if has(128, 2) {
            return Err(OpenError::Locked);
        }
        let long_sectors = valid(106) && has(106, 12);
        let words = u32::from(word(118)) << 16 | u32::from(word(117));
        let block_size = if long_sectors { words.checked_mul(2) } else { Some(512) };
        let block_size = block_size.filter(|size| matches!(size, 512 | 1024 | 2048 | 4096));
        let blocks = (100..104).rev().fold(0, |sum, index| sum << 16 | u64::from(word(index)));
        let sata = !matches!(word(76), 0 | u16::MAX);
        let queue_depth = (sata && has(76, 8)).then(|| (word(75) & 0x1f) + 1);
        match block_size {
            Some(block_size) if blocks > 0 && blocks <= MOST_BLOCKS => {
                Ok(Identity { block_size, blocks, queue_depth, has_flush })
            }
            _ => Err(OpenError::Config),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A disk of `sectors` logical sectors of `block_size` bytes.
    pub fn data(block_size: u32, sectors: u64, queue_depth: Option<u16>) -> [u8; IDENTIFY_BYTES] {
        let mut data = [0; IDENTIFY_BYTES];
        put(&mut data, 49, 1 << 9 | 1 << 8);
        put(&mut data, 82, 1 << 5);
        put(&mut data, 83, 1 << 14 | 1 << 13 | 1 << 12 | 1 << 10);
        put(&mut data, 85, 1 << 5);
        for (index, shift) in (100..104).zip([0, 16, 32, 48]) {
            put(&mut data, index, (sectors >> shift) as u16);
        }
        if block_size != 512 {
            put(&mut data, 106, 1 << 14 | 1 << 12);
            put(&mut data, 117, (block_size / 2) as u16);
        }
        put(&mut data, 76, 0b110);
        if let Some(depth) = queue_depth {
            put(&mut data, 75, depth - 1);
            put(&mut data, 76, 1 << 8 | 0b110);
        }
        data
    }

    /// Sets a word.
    pub fn put(data: &mut [u8; IDENTIFY_BYTES], index: usize, word: u16) {
        data[2 * index..][..2].copy_from_slice(&word.to_le_bytes());
    }

    fn with(changes: &[(usize, u16)]) -> Result<Identity, OpenError> {
        let mut data = data(512, 1 << 40, Some(32));
        for &(index, word) in changes {
            put(&mut data, index, word);
        }
        Identity::parse(&data)
    }

    #[test]
    fn disk_says_how_large_it_is_and_how_many_commands_it_takes() {
        let identity = with(&[]).unwrap();
        let expected =
            Identity { block_size: 512, blocks: 1 << 40, queue_depth: Some(32), has_flush: true };
        assert_eq!(identity, expected);
        assert_eq!(with(&[(75, 0)]).unwrap().queue_depth, Some(1));
        assert_eq!(Identity::parse(&data(512, 1, None)).unwrap().queue_depth, None);
        let parallel_ata = with(&[(76, u16::MAX)]).unwrap();
        assert_eq!(parallel_ata.queue_depth, None);
    }

    #[test]
    fn sectors_are_512_bytes_unless_the_disk_says_otherwise() {
        assert_eq!(Identity::parse(&data(4096, 9, None)).unwrap().block_size, 4096);
        // Long physical sectors behind logical ones of 512 bytes.
        assert_eq!(with(&[(106, 1 << 14 | 1 << 13 | 3)]).unwrap().block_size, 512);
        assert_eq!(with(&[(106, 0xffff), (117, 2048)]).unwrap().block_size, 512, "not valid");
        for words in [0, 255, 260, 4096] {
            let odd = with(&[(106, 1 << 14 | 1 << 12), (117, words)]);
            assert_eq!(odd, Err(OpenError::Config), "{words} words");
        }
        let huge = with(&[(106, 1 << 14 | 1 << 12), (117, 256), (118, 0x8000)]);
        assert_eq!(huge, Err(OpenError::Config));
    }

    #[test]
    fn disks_that_this_driver_cannot_write_are_refused() {
        let lba48 = 1 << 14 | 1 << 13;
        assert_eq!(with(&[(0, 1 << 15)]), Err(OpenError::NoDisk));
        assert_eq!(with(&[(49, 1 << 9)]), Err(OpenError::Unsupported), "no DMA");
        assert_eq!(with(&[(83, lba48)]), Err(OpenError::Unsupported), "28-bit addresses");
        assert_eq!(with(&[(83, 0xffff)]), Err(OpenError::Unsupported), "no word at all");
        assert_eq!(with(&[(128, 1 << 2 | 1)]), Err(OpenError::Locked));
        assert_eq!(with(&[(101, 0), (102, 0), (103, 0)]), Err(OpenError::Config), "no sectors");
        assert_eq!(with(&[(103, 2)]), Err(OpenError::Config), "more than addresses reach");
    }

    #[test]
    fn cache_that_cannot_be_flushed_must_be_off() {
        let no_flush = 1 << 14 | 1 << 10;
        assert_eq!(with(&[(83, no_flush)]), Err(OpenError::Unsupported));
        assert!(!with(&[(83, no_flush), (85, 0)]).unwrap().has_flush);
    }

    #[test]
    fn nothing_that_a_disk_says_is_too_much() {
        for byte in 0..=255 {
            let _ = Identity::parse(&[byte; IDENTIFY_BYTES]);
        }
    }
}
