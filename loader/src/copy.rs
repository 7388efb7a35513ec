//! Copies a core out of an area: verified a MiB at a time, written sparsely.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use format::{BLOCK, CRC_CHUNK, crc32};

use crate::core_file::{FLAG_INCOMPLETE, FLAGS_OFFSET};
use crate::device::ReadAt;

/// What is to be copied.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Size of the core in bytes.
    pub size: u64,
    /// CRC32 of every MiB of it; `None` when there are none to check against.
    pub checksums: Option<Vec<u32>>,
    /// Set the bit in the copy's ELF header that says: not complete.
    pub flag_incomplete: bool,
}

/// What is wrong with a piece of the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Its checksum is wrong.
    Checksum,
    /// The medium does not give it back. Blocks of 4 KiB that it does not give are zeros in the copy.
    Unreadable,
}

/// A run of damaged MiB, both ends belonging to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// First MiB, counted from 0.
    pub first: u64,
    /// Last MiB.
    pub last: u64,
    /// What is wrong with them.
    pub fault: Fault,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "MiB {}", self.first)?;
        } else {
            write!(f, "MiB {} to {}", self.first, self.last)?;
        }
        f.write_str(match self.fault {
            Fault::Checksum => ": wrong checksum",
            Fault::Unreadable => ": not readable",
        })
    }
}

/// Copies the first `plan.size` bytes of `source` into the empty file `target`, and tells `progress`
/// how many bytes are done. Zero blocks become holes. Goes on after damage, and returns all of it.
///
/// # Errors
/// The target could not be written.
pub fn copy<Source: ReadAt + ?Sized>(
    source: &Source,
    plan: &Plan,
    target: &File,
    mut progress: impl FnMut(u64),
) -> io::Result<Vec<Damage>> {
    let mut damage = Vec::new();
    let mut buffer = vec![0; CRC_CHUNK as usize];
    for index in 0..plan.size.div_ceil(CRC_CHUNK) {
        let offset = index * CRC_CHUNK;
        let length = CRC_CHUNK.min(plan.size - offset);
        let bytes = &mut buffer[..length as usize];
        if let Some(fault) = read_verified(source, plan, index, bytes) {
            record(&mut damage, index, fault);
        }
        if plan.flag_incomplete && index == 0 && bytes.starts_with(b"\x7fELF") {
            bytes[FLAGS_OFFSET] |= FLAG_INCOMPLETE;
        }
        write_sparse(target, bytes, offset)?;
        progress(offset + length);
    }
    target.set_len(plan.size)?;
    Ok(damage)
}

/// Fills `bytes` with the MiB number `index`.
fn read_verified<Source: ReadAt + ?Sized>(
    source: &Source,
    plan: &Plan,
    index: u64,
    bytes: &mut [u8],
) -> Option<Fault> {
    let offset = index * CRC_CHUNK;
    if source.read_at(bytes, offset).is_err() {
        read_what_can_be_read(source, bytes, offset);
        return Some(Fault::Unreadable);
    }
    let checksums = plan.checksums.as_ref()?;
    let right = checksums.get(index as usize).is_some_and(|&checksum| checksum == crc32(bytes));
    (!right).then_some(Fault::Checksum)
}

fn read_what_can_be_read<Source: ReadAt + ?Sized>(source: &Source, bytes: &mut [u8], start: u64) {
    for (index, block) in bytes.chunks_mut(BLOCK as usize).enumerate() {
        if source.read_at(block, start + index as u64 * BLOCK).is_err() {
            block.fill(0);
        }
    }
}

fn record(damage: &mut Vec<Damage>, index: u64, fault: Fault) {
    match damage.last_mut() {
        Some(last) if last.last + 1 == index && last.fault == fault => last.last = index,
        _ => damage.push(Damage { first: index, last: index, fault }),
    }
}

/// Writes the runs of blocks that are not all zeros; the rest stays a hole.
fn write_sparse(target: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];
    let is_zero = |block: &[u8]| block == &ZEROS[..block.len()];
    let mut at = 0;
    let mut blocks = bytes.chunks(BLOCK as usize).peekable();
    while let Some(block) = blocks.next() {
        let start = at;
        at += block.len();
        if is_zero(block) {
            continue;
        }
        while let Some(block) = blocks.next_if(|block| !is_zero(block)) {
            at += block.len();
        }
        target.write_all_at(&bytes[start..at], offset + start as u64)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;

    /// A medium with one unreadable block.
    struct Faulty {
        bytes: Vec<u8>,
        bad_block: u64,
    }

    impl ReadAt for Faulty {
        fn size(&self) -> u64 {
            self.bytes.len() as u64
        }

        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            let blocks = offset / BLOCK..(offset + buffer.len() as u64).div_ceil(BLOCK);
            if blocks.contains(&self.bad_block) {
                return Err(io::Error::other("unrecoverable read error"));
            }
            self.bytes[..].read_at(buffer, offset)
        }
    }

    /// `blocks` blocks of which every third is zeros; the last is cut short.
    fn core(blocks: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for index in 0..blocks {
            bytes.extend([if index % 3 == 0 { 0 } else { index as u8 | 1 }; BLOCK as usize]);
        }
        bytes.truncate(bytes.len() - 100);
        bytes
    }

    fn plan(bytes: &[u8]) -> Plan {
        Plan {
            size: bytes.len() as u64,
            checksums: Some(bytes.chunks(CRC_CHUNK as usize).map(crc32).collect()),
            flag_incomplete: false,
        }
    }

    fn copied(target: &mut File) -> Vec<u8> {
        let mut bytes = Vec::new();
        target.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn copy_equals_the_original_and_zero_blocks_take_no_space() {
        let mut bytes = core(700);
        bytes[4 * 4096..600 * 4096].fill(0);
        let mut target = tempfile::tempfile().unwrap();
        let mut done = Vec::new();
        let damage = copy(&bytes[..], &plan(&bytes), &target, |bytes| done.push(bytes)).unwrap();
        assert_eq!(damage, []);
        assert_eq!(copied(&mut target), bytes);
        assert_eq!(done, [1 << 20, 2 << 20, bytes.len() as u64]);
        assert!(target.metadata().unwrap().blocks() * 512 < 150 * 4096, "the file is not sparse");
    }

    #[test]
    fn core_that_ends_in_zeros_keeps_its_length() {
        let bytes = vec![0; 3 << 20];
        let target = tempfile::tempfile().unwrap();
        copy(&bytes[..], &plan(&bytes), &target, |_| ()).unwrap();
        assert_eq!(target.metadata().unwrap().len(), 3 << 20);
    }

    #[test]
    fn damaged_pieces_are_all_found_and_joined() {
        let mut bytes = core(6 * 256);
        let plan = plan(&bytes);
        for offset in [5000, (1 << 20) + 1, (2 << 20) - 1, 5 << 20] {
            bytes[offset] ^= 4;
        }
        let target = tempfile::tempfile().unwrap();
        let damage = copy(&bytes[..], &plan, &target, |_| ()).unwrap();
        let texts: Vec<_> = damage.iter().map(Damage::to_string).collect();
        assert_eq!(texts, ["MiB 0 to 1: wrong checksum", "MiB 5: wrong checksum"]);
    }

    #[test]
    fn unreadable_block_costs_one_block() {
        let bytes = core(600);
        let faulty = Faulty { bytes: bytes.clone(), bad_block: 301 };
        let mut target = tempfile::tempfile().unwrap();
        let damage = copy(&faulty, &plan(&bytes), &target, |_| ()).unwrap();
        assert_eq!(damage, [Damage { first: 1, last: 1, fault: Fault::Unreadable }]);
        let mut expected = bytes;
        expected[301 * 4096..302 * 4096].fill(0);
        assert_eq!(copied(&mut target), expected);
    }
}
