//! Every byte layout that two of our programs share.
//!
//! The payload writes these bytes on a crashed machine, `loader` and `host-analyzer` read them
//! somewhere else, perhaps years later. So this crate has no behaviour beyond laying bytes out and
//! checking them, needs no allocator and knows no device. `docs/format.md` describes the same
//! layouts byte by byte; the golden tests here hold the two together.
//!
//! All integers are little-endian, whatever the architecture of either side.

#![no_std]
#![forbid(unsafe_code)]

pub mod area;
pub mod frame;
pub mod gpt;
pub mod handoff;
pub mod mbr;
pub mod note;
pub mod record;

#[cfg(test)]
extern crate std;

/// Page and block granule of everything on disk, in bytes: page data lies at multiples of it, so
/// that a device takes it by DMA straight from old memory whatever its sector size (512 or 4096).
pub const BLOCK: u64 = 4096;

/// Bytes of the core that one word of the CRC32 table covers.
pub const CRC_CHUNK: u64 = 1 << 20;

/// CRC32 (IEEE 802.3, as in zlib) of `bytes`: the checksum used in every format of ours.
#[must_use]
pub fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}
