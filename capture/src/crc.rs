//! The CRC32 table of the core: one word per MiB, made while the core is written from its first
//! byte to its last, in constant memory.
//!
//! Two blocks of the core are written again at the end (they say that the dump is complete), so the
//! words of their chunks change afterwards. CRC32 is linear: the checksums of two messages of one
//! length differ by the checksum of their difference, taken without the initial value, so no byte
//! of the chunk need be read back.

use crc32fast::Hasher;
use format::{BLOCK, CRC_CHUNK};
use zerocopy::{FromBytes, IntoBytes};

/// Words in one block of the table.
pub const WORDS: usize = BLOCK as usize / 4;

/// One block of the table: the checksums of [`WORDS`] chunks.
pub type TableBlock = [u8; BLOCK as usize];

/// A block of zeros, which would be a large part of the payload's stack.
static ZEROS: TableBlock = [0; BLOCK as usize];

/// Builds the table. The first block is kept to the end, the others are given away as they fill.
pub struct CrcTable<'a> {
    /// Checksum of the chunk so far.
    crc: u32,
    zero_block: ZeroBlock,
    in_chunk: u64,
    chunks: u64,
    blocks: &'a mut TableBlocks,
    of_table: Hasher,
}

/// Memory for the two blocks of the table that are in the making.
pub struct TableBlocks {
    first: TableBlock,
    current: TableBlock,
}

impl Default for TableBlocks {
    fn default() -> TableBlocks {
        TableBlocks::new()
    }
}

impl TableBlocks {
    /// Zeroed blocks.
    #[must_use]
    pub const fn new() -> TableBlocks {
        TableBlocks { first: [0; BLOCK as usize], current: [0; BLOCK as usize] }
    }
}

impl<'a> CrcTable<'a> {
    /// The table of an empty core, to be built in `blocks`.
    #[must_use]
    pub fn new(blocks: &'a mut TableBlocks) -> CrcTable<'a> {
        blocks.first.fill(0);
        blocks.current.fill(0);
        CrcTable {
            crc: 0,
            zero_block: ZeroBlock::new(),
            in_chunk: 0,
            chunks: 0,
            blocks,
            of_table: Hasher::new(),
        }
    }

    /// Number of chunks finished.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Takes the next bytes of the core; they must not cross the end of a chunk. When they fill a
    /// block of the table other than the first, returns it with its index.
    pub fn add(&mut self, bytes: &[u8]) -> Option<(u64, &TableBlock)> {
        self.crc = match Words::ref_from_bytes(bytes) {
            Ok(words) if is_zero(words) => self.zero_block.append_to(self.crc),
            Ok(words) => append_words(self.crc, words),
            Err(_) => append(self.crc, bytes),
        };
        self.in_chunk += bytes.len() as u64;
        if self.in_chunk < CRC_CHUNK {
            return None;
        }
        self.end_chunk();
        let (block, word) = self.position();
        (word == 0 && block > 1).then(|| (block - 1, &self.blocks.current))
    }

    /// Ends the core. Returns the last block of the table with its index, unless that is the first.
    pub fn finish(&mut self) -> Option<(u64, &TableBlock)> {
        let ended_here = self.in_chunk > 0;
        if ended_here {
            self.end_chunk();
        }
        match self.position() {
            // The block was filled by the chunk that just ended, and not given away yet.
            (block, 0) if ended_here && block > 1 => Some((block - 1, &self.blocks.current)),
            (_, 0) | (0, _) => None,
            (block, word) => {
                self.blocks.current[word * 4..].fill(0);
                Some((block, &self.blocks.current))
            }
        }
    }

    /// The block and the word in it where the next checksum goes.
    fn position(&self) -> (u64, usize) {
        (self.chunks / WORDS as u64, (self.chunks % WORDS as u64) as usize)
    }

    fn end_chunk(&mut self) {
        let (block, word) = self.position();
        let crc = core::mem::take(&mut self.crc).to_le_bytes();
        let table = if block == 0 { &mut self.blocks.first } else { &mut self.blocks.current };
        table[word * 4..][..4].copy_from_slice(&crc);
        if block > 0 {
            self.of_table.update(&crc);
        }
        self.chunks += 1;
        self.in_chunk = 0;
    }

    /// Accounts for a block of the core, at byte `at` of it, that is written again after the end:
    /// `before` is what was added for it, `after` what it is now. `core_size` is the size of the
    /// whole core.
    ///
    /// Only chunks in the first block of the table can change; returns whether this one could.
    pub fn replace(&mut self, core_size: u64, at: u64, before: &[u8], after: &[u8]) -> bool {
        let chunk = at / CRC_CHUNK;
        if chunk >= (WORDS as u64).min(self.chunks) {
            return false;
        }
        let chunk_start = chunk * CRC_CHUNK;
        let chunk_size = CRC_CHUNK.min(core_size - chunk_start);
        let prefix = at - chunk_start;
        let suffix = chunk_size - prefix - before.len() as u64;
        let mut difference = Hasher::new();
        add_zeros(&mut difference, prefix);
        for (old, new) in before.iter().zip(after) {
            difference.update(&[old ^ new]);
        }
        add_zeros(&mut difference, suffix);
        let mut zeros = Hasher::new();
        add_zeros(&mut zeros, chunk_size);
        let change = difference.finalize() ^ zeros.finalize();
        for (byte, change) in
            self.blocks.first[chunk as usize * 4..].iter_mut().zip(change.to_le_bytes())
        {
            *byte ^= change;
        }
        true
    }

    /// The first block of the table and the checksum of the whole table; to be asked at the end.
    #[must_use]
    pub fn first_block(&self) -> (&TableBlock, u32) {
        let words = self.chunks.min(WORDS as u64) as usize;
        let mut whole = Hasher::new();
        whole.update(&self.blocks.first[..words * 4]);
        whole.combine(&self.of_table);
        (&self.blocks.first, whole.finalize())
    }
}

/// The checksum of a message with the checksum `crc` and `bytes` behind it.
fn append(crc: u32, bytes: &[u8]) -> u32 {
    let mut hasher = Hasher::new_with_initial(crc);
    hasher.update(bytes);
    hasher.finalize()
}

/// A block that is aligned: byte by byte it would be slow, and so the compiler for aarch64 reads it
/// where it does not know that.
type Words = [u64; BLOCK as usize / 8];

/// Words that are done with at once.
const GROUP: usize = 4;

/// The same for a whole block, and several times as fast, for want of tables.
///
/// A message's remainder does not change when a multiple of the polynomial is added to it anywhere. One
/// such multiple has five terms alone: 1, and what lies 145, 183, 211 and 300 bits behind it. So each
/// word is made zero by adding it to what lies so far behind, until only the last ones are left.
/// (Sam Russell, "Chorba: A novel CRC32 implementation", 2024.)
fn append_words(crc: u32, block: &Words) -> u32 {
    let (most, last) = block.split_at(block.len() - 2 * GROUP);
    let (groups, _) = most.as_chunks();
    // What is still to be added to the next five words: at first how every checksum begins.
    let mut ahead = [u64::from(!crc), 0, 0, 0, 0];
    for &[a, b, c, d] in groups {
        let [a, b, c, d] = [a, b, c, d].map(u64::from_le);
        let a = Behind::of(a ^ ahead[0]);
        let b = Behind::of(b ^ ahead[1]);
        let c = Behind::of(c ^ ahead[2] ^ a.0);
        let d = Behind::of(d ^ ahead[3] ^ a.1 ^ b.0);
        ahead =
            [ahead[4] ^ a.2 ^ b.1 ^ c.0, a.3 ^ b.2 ^ c.1 ^ d.0, b.3 ^ c.2 ^ d.1, c.3 ^ d.2, d.3];
    }
    let mut rest = [0; 2 * GROUP];
    rest.copy_from_slice(last);
    for (word, ahead) in rest.iter_mut().zip(ahead) {
        *word ^= ahead.to_le();
    }
    // Ones where a checksum begins with zeros, for its beginning is among what was added.
    append(!0, rest.as_bytes())
}

/// What a word adds to the second to the fifth word behind it.
struct Behind(u64, u64, u64, u64);

impl Behind {
    fn of(word: u64) -> Behind {
        Behind(
            word << (145 - 128) ^ word << (183 - 128),
            word >> (192 - 145) ^ word >> (192 - 183) ^ word << (211 - 192),
            word >> (256 - 211) ^ word << (300 - 256),
            word >> (320 - 300),
        )
    }
}

/// Whether a block is all zeros, as most of a machine's memory often is. Others differ within their
/// first bytes as a rule.
fn is_zero(block: &Words) -> bool {
    let (groups, _) = block.as_chunks();
    groups.iter().all(|[a, b, c, d, e, f, g, h]| a | b | c | d | e | f | g | h == 0)
}

/// What a block of zeros does to the checksum of what comes before it. As CRC32 is linear, that is
/// the sum of what it does to each bit: 32 words, an order of magnitude faster than its bytes.
struct ZeroBlock {
    of_nothing: u32,
    of_bit: [u32; 32],
}

impl ZeroBlock {
    fn new() -> ZeroBlock {
        let of_nothing = append(0, &ZEROS);
        let of_bit = core::array::from_fn(|bit| append(1 << bit, &ZEROS) ^ of_nothing);
        ZeroBlock { of_nothing, of_bit }
    }

    fn append_to(&self, crc: u32) -> u32 {
        let bits = self.of_bit.iter().enumerate();
        bits.filter(|(bit, _)| crc >> bit & 1 != 0).fold(self.of_nothing, |all, (_, one)| all ^ one)
    }
}

fn add_zeros(hasher: &mut Hasher, mut count: u64) {
    while count > 0 {
        let some = count.min(ZEROS.len() as u64);
        hasher.update(&ZEROS[..some as usize]);
        count -= some;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    #[test]
    fn block_of_zeros_does_to_a_checksum_what_its_bytes_do() {
        let zero_block = ZeroBlock::new();
        for crc in [0, 1, 0x8000_0000, 0x1234_5678, u32::MAX] {
            assert_eq!(zero_block.append_to(crc), append(crc, &[0; BLOCK as usize]));
        }
        let mut block: Words = [0; BLOCK as usize / 8];
        assert!(is_zero(&block));
        block[BLOCK as usize / 8 - 1] = 1 << 63;
        assert!(!is_zero(&block));
    }

    #[test]
    fn block_is_summed_up_as_its_bytes_are() {
        let mut block: Words = [0; BLOCK as usize / 8];
        for bit in 0..BLOCK as usize * 8 {
            block[bit / 64] = (1u64 << (bit % 64)).to_le();
            assert_eq!(append_words(!0, &block), append(!0, block.as_bytes()), "bit {bit}");
            block[bit / 64] = 0;
        }
        block.as_mut_bytes().copy_from_slice(&core(BLOCK as usize));
        for crc in [0, 1, 0x8000_0000, 0x1234_5678, u32::MAX] {
            assert_eq!(append_words(crc, &block), append(crc, block.as_bytes()));
        }
    }

    /// The table as a file would hold it, and the checksum the builder gives for it.
    fn build(core: &[u8], piece: usize, replaced: Option<(usize, &[u8])>) -> (Vec<u8>, u32) {
        let mut memory = TableBlocks::new();
        let mut table = CrcTable::new(&mut memory);
        let mut blocks = BTreeMap::new();
        for bytes in core.chunks(piece) {
            if let Some((index, block)) = table.add(bytes) {
                blocks.insert(index, *block);
            }
        }
        if let Some((index, block)) = table.finish() {
            blocks.insert(index, *block);
        }
        if let Some((at, after)) = replaced {
            let before = &core[at..at + after.len()];
            assert!(table.replace(core.len() as u64, at as u64, before, after));
        }
        let chunks = table.chunks() as usize;
        let (first, crc) = table.first_block();
        blocks.insert(0, *first);
        let bytes: Vec<u8> = blocks.into_values().flatten().take(chunks * 4).collect();
        (bytes, crc)
    }

    fn expected(core: &[u8]) -> Vec<u8> {
        core.chunks(CRC_CHUNK as usize).flat_map(|c| format::crc32(c).to_le_bytes()).collect()
    }

    fn core(size: usize) -> Vec<u8> {
        (0..size).map(|index| (index * 7 + index / 4096) as u8).collect()
    }

    #[test]
    fn each_word_is_the_checksum_of_its_mib() {
        for size in [4096, 1 << 20, (3 << 20) + 4096] {
            let core = core(size);
            let (table, crc) = build(&core, 4096, None);
            assert_eq!(table, expected(&core), "core of {size} bytes");
            assert_eq!(crc, format::crc32(&table));
        }
    }

    /// Builds the table of a core of `whole` chunks and `odd` bytes; checks that its blocks come
    /// once each, in order, and hold what they should.
    fn assert_long_table(whole: u64, odd: usize) {
        let mut memory = TableBlocks::new();
        let mut table = CrcTable::new(&mut memory);
        let mut chunk = core(CRC_CHUNK as usize);
        let (mut words, mut blocks) = (Vec::new(), Vec::new());
        for index in 0..whole + u64::from(odd > 0) {
            chunk[..8].copy_from_slice(&index.to_le_bytes());
            let bytes = if index == whole { &chunk[..odd] } else { &chunk[..] };
            words.extend_from_slice(&format::crc32(bytes).to_le_bytes());
            if let Some((index, block)) = table.add(bytes) {
                blocks.push((index, *block));
            }
        }
        if let Some((index, block)) = table.finish() {
            blocks.push((index, *block));
        }
        let (first, crc) = table.first_block();
        let mut written = first.to_vec();
        for (number, (index, block)) in blocks.iter().enumerate() {
            assert_eq!(*index, number as u64 + 1);
            written.extend_from_slice(block);
        }
        assert!(written.len() < words.len() + BLOCK as usize, "a block too many");
        assert!(written[..words.len()] == words, "{whole} chunks and {odd} bytes");
        assert_eq!(crc, format::crc32(&words));
    }

    #[test]
    fn table_of_more_than_one_block_is_given_away_in_order() {
        assert_long_table(2054, 4096);
    }

    #[test]
    fn core_that_ends_where_a_block_of_the_table_ends_is_written_whole() {
        for blocks in [1, 2] {
            assert_long_table(blocks * WORDS as u64, 0);
            assert_long_table(blocks * WORDS as u64 - 1, 4096);
        }
    }

    #[test]
    fn block_written_again_changes_the_word_as_if_it_had_been_so_from_the_start() {
        let mut before = core((2 << 20) + 8192);
        for at in [0, 4096, (1 << 20) - 4096, 2 << 20, (2 << 20) + 4096] {
            let after: Vec<u8> = (0..4096).map(|index| (index * 13) as u8).collect();
            let (table, crc) = build(&before, 4096, Some((at, &after)));
            before[at..at + 4096].copy_from_slice(&after);
            assert_eq!(table, expected(&before), "block at {at:#x}");
            assert_eq!(crc, format::crc32(&table));
        }
    }
}
