//! The kernel's image in memory, as far as it is there: for what can only be found by its shape.

use std::borrow::Cow;

use crate::VirtAddr;

use super::virt::VirtualMemory;
use super::vmcoreinfo::Vmcoreinfo;

/// A stretch of the kernel's image that lies together in memory.
pub struct Piece<'a> {
    /// Its first address.
    pub start: VirtAddr,
    /// What is there.
    pub bytes: Cow<'a, [u8]>,
}

/// More than any kernel's image takes.
const IMAGE_SIZE: u64 = 512 << 20;
/// What is looked at behind the last place that VMCOREINFO names.
const MARGIN: u64 = 1 << 20;
/// Holes in the image (freed initialization code) are skipped in steps of this.
const STEP: u64 = 4096;

/// The kernel's image, from `_stext` to a little behind the last symbol in VMCOREINFO, as far as it
/// is mapped and in the dump.
pub fn pieces<'a>(memory: &VirtualMemory<'a>, info: &Vmcoreinfo<'_>) -> Vec<Piece<'a>> {
    let Some(first) = info.symbol("_stext") else { return Vec::new() };
    let inside = |at: &VirtAddr| at.0.wrapping_sub(first.0) < IMAGE_SIZE;
    let last = info.symbols().map(|(_, at)| at).filter(inside).max().unwrap_or(first);
    let length = (last.0 - first.0).saturating_add(MARGIN);
    let mut pieces = Vec::new();
    let mut skip = 0;
    while skip < length {
        let start = first.offset(skip);
        match memory.together(start, (length - skip) as usize) {
            Ok(bytes) => {
                skip += bytes.len() as u64;
                pieces.push(Piece { start, bytes });
            }
            Err(_) => skip += STEP - start.0 % STEP,
        }
    }
    pieces
}
