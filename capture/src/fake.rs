//! A machine and a disk made of memory, for the tests of this crate.

use std::collections::BTreeMap;
use std::format;
use std::string::String;
use std::vec;
use std::vec::Vec;

use core::fmt;

use crate::{Disk, DiskError, Machine, OldPhys, Unreadable};

/// First physical address that the fake processor cannot address.
pub const LIMIT: u64 = 1 << 36;

/// Memory in pieces, and what was said.
#[derive(Clone, Default)]
pub struct FakeMachine {
    pieces: BTreeMap<u64, Vec<u8>>,
    /// Pages that cannot be read.
    pub poisoned: Vec<u64>,
    /// Lines of the console.
    pub said: Vec<String>,
    /// How often memory was read.
    pub reads: u64,
    /// Bytes that were read.
    pub bytes_read: u64,
    /// Microseconds that reading a page takes.
    pub us_per_page: u64,
    /// When the time is over, in microseconds.
    pub time_is_over_us: Option<u64>,
}

impl FakeMachine {
    /// Puts `bytes` at `at`; pieces must not overlap.
    pub fn put(&mut self, at: u64, bytes: Vec<u8>) {
        self.pieces.insert(at, bytes);
    }

    /// Memory of `size` bytes at `at`, different everywhere.
    pub fn put_pattern(&mut self, at: u64, size: u64) {
        let byte = |index: u64| (index * 7 + (at + index) / 4096) as u8;
        self.put(at, (0..size).map(byte).collect());
    }

    /// What lies at `at`.
    pub fn bytes(&self, at: u64, size: u64) -> Option<&[u8]> {
        let (&start, piece) = self.pieces.range(..=at).next_back()?;
        let from = (at - start) as usize;
        piece.get(from..from.checked_add(size as usize)?)
    }

    /// Whether a line with `text` in it was said.
    pub fn has_said(&self, text: &str) -> bool {
        self.said.iter().any(|line| line.contains(text))
    }
}

impl Machine for FakeMachine {
    fn read_old(&mut self, at: OldPhys, into: &mut [u8]) -> Result<(), Unreadable> {
        self.reads += 1;
        self.bytes_read += into.len() as u64;
        let end = at.0 + into.len() as u64;
        if self.poisoned.iter().any(|&page| page < end && at.0 < page + 4096) {
            return Err(Unreadable);
        }
        let bytes = self.bytes(at.0, into.len() as u64).ok_or(Unreadable)?;
        into.copy_from_slice(bytes);
        Ok(())
    }

    fn now_us(&self) -> u64 {
        self.said.len() as u64 * 1000 + self.bytes_read / 4096 * self.us_per_page
    }

    fn is_time_over(&self) -> bool {
        self.time_is_over_us.is_some_and(|end| self.now_us() >= end)
    }

    fn say(&mut self, line: fmt::Arguments<'_>) {
        self.said.push(format!("{line}"));
    }
}

/// A disk whose device takes old memory from `old`.
pub struct FakeDisk<'a> {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Size of a sector.
    pub sector_size: u32,
    /// Writes it still takes before it fails.
    pub writes_left: usize,
    /// Where it refuses a write, once: the next flush tells.
    pub refuses_once: Option<u64>,
    refused: bool,
    /// Offsets of the writes, in order; `None` for a flush.
    pub log: Vec<Option<u64>>,
    old: &'a FakeMachine,
}

impl<'a> FakeDisk<'a> {
    /// A disk of `size` zeros.
    pub fn new(size: u64, old: &'a FakeMachine) -> FakeDisk<'a> {
        let bytes = vec![0; size as usize];
        FakeDisk {
            bytes,
            sector_size: 512,
            writes_left: usize::MAX,
            refuses_once: None,
            refused: false,
            log: Vec::new(),
            old,
        }
    }

    fn place(&mut self, offset: u64, size: u64) -> Result<&mut [u8], DiskError> {
        assert_eq!(offset % 4096, 0, "write at {offset:#x}");
        assert_eq!(size % 4096, 0, "write of {size:#x} bytes");
        if self.writes_left == 0 {
            return Err(DiskError::Failed);
        }
        self.writes_left -= 1;
        self.log.push(Some(offset));
        self.bytes.get_mut(offset as usize..(offset + size) as usize).ok_or(DiskError::Range)
    }
}

impl Disk for FakeDisk<'_> {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn sector_size(&self) -> u32 {
        self.sector_size
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        let range = offset as usize..offset as usize + into.len();
        into.copy_from_slice(self.bytes.get(range).ok_or(DiskError::Range)?);
        Ok(())
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        if self.refuses_once.take_if(|it| *it == offset).is_some() {
            self.refused = true;
            return Ok(());
        }
        self.place(offset, bytes.len() as u64)?.copy_from_slice(bytes);
        Ok(())
    }

    fn write_old(&mut self, offset: u64, from: OldPhys, size: u64) -> Result<(), DiskError> {
        let old = self.old;
        let bytes = old.bytes(from.0, size).expect("the device is given memory that exists");
        self.place(offset, size)?.copy_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        self.log.push(None);
        let refused = core::mem::take(&mut self.refused);
        if self.writes_left == 0 || refused { Err(DiskError::Failed) } else { Ok(()) }
    }
}

/// An ELF note.
pub fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let sizes = [name.len() as u32 + 1, desc.len() as u32, kind];
    let mut bytes: Vec<u8> = sizes.iter().flat_map(|field| field.to_le_bytes()).collect();
    bytes.extend_from_slice(name);
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend_from_slice(desc);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A program header of an `elfcorehdr`: type, offset, virtual and physical address, size.
pub type Claim = (u32, u64, u64, u64, u64);

/// An `elfcorehdr` with these program headers.
pub fn elfcorehdr64(claims: &[Claim]) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend_from_slice(&[4, 0, 62, 0, 1, 0, 0, 0]);
    for field in [0u64, 64, 0] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    bytes.extend_from_slice(&[0; 4]);
    for field in [64u16, 56, claims.len() as u16, 0, 0, 0] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    for &(kind, offset, virt, phys, size) in claims {
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        for field in [offset, virt, phys, size, size, 0] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
    }
    bytes
}
