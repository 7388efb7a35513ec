//! The kernel's virtual memory.

use std::borrow::Cow;
use std::cell::Cell;
use std::ops::Range;

use crate::source::Memory;
use crate::{PhysAddr, ReadError, VirtAddr, bytes};

use super::paging::{Mapping, PageTables};
use super::sparse::{self, Sparse};

/// The smallest page of memory, in bytes: what is missing from a dump is missing in units of this.
const PAGE: u64 = 4096;

/// The largest object that is read at once. Tables of a kernel are a few megabytes; anything
/// beyond this is a broken length.
const MAX_OBJECT: usize = 256 << 20;

/// The kernel's virtual memory: its page tables over the machine's memory.
pub struct VirtualMemory<'a> {
    memory: &'a dyn Memory,
    tables: Box<dyn PageTables>,
    image: Option<ImageFile<'a>>,
}

/// The parts of the kernel's image that never change, as its file has them.
pub struct ImageFile<'a> {
    /// Where each part lies, and its bytes.
    pub parts: Vec<(VirtAddr, &'a [u8])>,
    /// Whether the dump lacked something that was taken from here.
    pub used: Cell<bool>,
}

impl<'a> ImageFile<'a> {
    /// The bytes from `at` on, at most `max` of them and at least one.
    fn run(&self, at: VirtAddr, max: usize) -> Option<&'a [u8]> {
        let found = self.parts.iter().find_map(|(start, bytes)| {
            let skip = usize::try_from(at.0.checked_sub(start.0)?).ok()?;
            let rest = bytes.get(skip..).filter(|rest| !rest.is_empty())?;
            Some(&rest[..rest.len().min(max)])
        });
        self.used.set(self.used.get() || found.is_some());
        found
    }
}

impl<'a> VirtualMemory<'a> {
    /// The address space that `tables` describe.
    #[must_use]
    pub fn new(memory: &'a dyn Memory, tables: Box<dyn PageTables>) -> VirtualMemory<'a> {
        VirtualMemory { memory, tables, image: None }
    }

    /// The same; what the dump lacks of the kernel's constant parts comes from `image`.
    #[must_use]
    pub fn with_image(self, image: ImageFile<'a>) -> VirtualMemory<'a> {
        VirtualMemory { image: Some(image), ..self }
    }

    /// Whether something that the dump lacks was taken from the kernel's file.
    #[must_use]
    pub fn has_used_image(&self) -> bool {
        self.image.as_ref().is_some_and(|image| image.used.get())
    }

    /// The physical memory below.
    #[must_use]
    pub fn physical(&self) -> &'a dyn Memory {
        self.memory
    }

    /// The page tables.
    #[must_use]
    pub fn tables(&self) -> &dyn PageTables {
        &*self.tables
    }

    /// The address space of a process, whose top page table is at `root`, over the same memory.
    #[must_use]
    pub fn of_process(&self, root: PhysAddr) -> VirtualMemory<'a> {
        VirtualMemory::new(self.memory, self.tables.of_process(root))
    }

    /// Where `at` leads. Where a page table is missing from the dump, the kernel's image and the
    /// direct map are found by arithmetic or by the dump's own headers.
    ///
    /// # Errors
    /// [`ReadError::NotMapped`], [`ReadError::NoPageTable`].
    pub fn translate(&self, at: VirtAddr) -> Result<Mapping, ReadError> {
        self.tables.translate(self.memory, at).or_else(|error| match error {
            ReadError::NoPageTable(_) => {
                let known = self.tables.by_arithmetic(at).or_else(|| self.memory.linear(at));
                let length = 4096 - at.0 % 4096;
                known.map(|phys| Mapping { phys, length }).ok_or(error)
            }
            _ => Err(error),
        })
    }

    /// The `length` bytes at `at`: borrowed from the dump when they lie together in it.
    ///
    /// # Errors
    /// [`ReadError`] names the first byte that could not be read, or a length that cannot be.
    pub fn bytes(&self, at: VirtAddr, length: usize) -> Result<Cow<'a, [u8]>, ReadError> {
        if length > MAX_OBJECT {
            return Err(ReadError::TooLong(length as u64));
        }
        let together = self.extent(at, length).ok().filter(|it| it.length >= length as u64);
        let run = together.and_then(|it| self.memory.run(it.phys, length.max(1)).ok());
        match run {
            Some(run) if run.len() >= length => Ok(run),
            _ => self.copied(at, length).map(Cow::Owned),
        }
    }

    /// The `length` bytes at `at`, as far as they are in the dump.
    ///
    /// # Errors
    /// [`ReadError::TooLong`].
    pub fn sparse(&self, at: VirtAddr, length: usize) -> Result<Sparse<'a>, ReadError> {
        match self.bytes(at, length) {
            Ok(bytes) => return Ok(Sparse::whole(bytes)),
            Err(error @ ReadError::TooLong(_)) => return Err(error),
            Err(_) => {}
        }
        let (mut out, mut holes) = (Vec::new(), Vec::<Range<usize>>::new());
        while out.len() < length {
            let (start, left) = (out.len(), length - out.len());
            let here = at.offset(start as u64);
            match self.run(here, left) {
                Ok(run) => out.extend_from_slice(&run),
                Err(_) => {
                    let end = start + left.min((PAGE - here.0 % PAGE) as usize);
                    out.resize(end, sparse::FILLER);
                    match holes.last_mut() {
                        Some(last) if last.end == start => last.end = end,
                        _ => holes.push(start..end),
                    }
                }
            }
        }
        Ok(Sparse::with_holes(out, holes))
    }

    /// The bytes from `at` on, as far as they lie together in the dump, at most `max` of them and at
    /// least one.
    ///
    /// # Errors
    /// [`ReadError`] when not even the first one is there.
    pub fn together(&self, at: VirtAddr, max: usize) -> Result<Cow<'a, [u8]>, ReadError> {
        let mut extent = self.translate(at)?;
        while extent.length < max as u64 {
            match self.translate(at.offset(extent.length)) {
                Ok(next) if next.phys == extent.phys.offset(extent.length) => {
                    extent.length += next.length;
                }
                _ => break,
            }
        }
        self.memory.run(extent.phys, max.min(extent.length as usize))
    }

    /// Reads up to `length` bytes: fewer where the memory ends. Empty when there are none.
    #[must_use]
    pub fn bytes_up_to(&self, at: VirtAddr, length: usize) -> Vec<u8> {
        let mut out = Vec::new();
        while out.len() < length {
            let Ok(run) = self.run(at.offset(out.len() as u64), length - out.len()) else { break };
            out.extend_from_slice(&run);
        }
        out
    }

    /// The 64-bit word at `at`.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn u64(&self, at: VirtAddr) -> Result<u64, ReadError> {
        self.fixed(at).map(u64::from_le_bytes)
    }

    /// The pointer at `at`.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn pointer(&self, at: VirtAddr) -> Result<VirtAddr, ReadError> {
        self.u64(at).map(VirtAddr)
    }

    /// The 32-bit word at `at`.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn u32(&self, at: VirtAddr) -> Result<u32, ReadError> {
        self.fixed(at).map(u32::from_le_bytes)
    }

    /// The zero-terminated text at `at`, at most `max` bytes of it.
    ///
    /// # Errors
    /// [`ReadError`] when not even its first byte is there.
    pub fn string(&self, at: VirtAddr, max: usize) -> Result<String, ReadError> {
        self.run(at, 1)?;
        Ok(bytes::c_string(&self.bytes_up_to(at, max)))
    }

    fn fixed<const N: usize>(&self, at: VirtAddr) -> Result<[u8; N], ReadError> {
        let found = self.bytes(at, N)?;
        bytes::array(&found, 0).ok_or(ReadError::NotMapped(at))
    }

    /// The longest mapping from `at` on whose pages lie together in physical memory, as far as
    /// `length` needs it.
    fn extent(&self, at: VirtAddr, length: usize) -> Result<Mapping, ReadError> {
        let mut extent = self.translate(at)?;
        while extent.length < length as u64 {
            let next = self.translate(at.offset(extent.length))?;
            if next.phys != extent.phys.offset(extent.length) {
                break;
            }
            extent.length += next.length;
        }
        Ok(extent)
    }

    fn run(&self, at: VirtAddr, max: usize) -> Result<Cow<'a, [u8]>, ReadError> {
        let found = self
            .translate(at)
            .and_then(|mapping| self.memory.run(mapping.phys, max.min(mapping.length as usize)));
        found.or_else(|error| {
            let rest_of_page = (PAGE - at.0 % PAGE) as usize;
            let image = self.image.as_ref().filter(|_| error.is_lost());
            image.and_then(|it| it.run(at, max.min(rest_of_page))).map(Cow::Borrowed).ok_or(error)
        })
    }

    fn copied(&self, at: VirtAddr, length: usize) -> Result<Vec<u8>, ReadError> {
        let mut out = Vec::with_capacity(length.min(1 << 20));
        while out.len() < length {
            out.extend_from_slice(&self.run(at.offset(out.len() as u64), length - out.len())?);
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeMemory;

    const VIRT: u64 = 0xffff_8880_0000_0000;

    #[test]
    fn bytes_that_lie_together_are_borrowed() {
        let mut memory = FakeMemory::new(0x10000);
        let tables = memory.mapped(VIRT, 0x1000);
        memory.put(0x8ffe, b"across");
        let space = memory.space(tables);
        let bytes = space.bytes(VirtAddr(VIRT + 0x8ffe), 6).unwrap();
        assert!(matches!(bytes, Cow::Borrowed(b"across")));
    }

    #[test]
    fn bytes_in_scattered_pages_are_put_together() {
        let mut memory = FakeMemory::new(0x10000);
        // Two neighbouring pages, mapped to pages 9 and 8 in turn.
        let tables = memory.mapped(VIRT, 0x1000);
        memory.put_u64(0x3000, 0x4001);
        memory.put_u64(0x4000, 0x9001);
        memory.put_u64(0x4008, 0x8001);
        memory.put(0x9ffd, b"put");
        memory.put(0x8000, b" together");
        let space = memory.space(tables);
        assert_eq!(space.bytes(VirtAddr(VIRT + 0xffd), 12).unwrap(), &b"put together"[..]);
        assert_eq!(space.string(VirtAddr(VIRT + 0xffd), 64).unwrap(), "put together");
    }

    #[test]
    fn page_that_is_not_in_the_dump_is_named() {
        let mut memory = FakeMemory::new(0x10000);
        let tables = memory.mapped(VIRT, 0x1000);
        memory.punch(0x9000);
        let space = memory.space(tables);
        let missing = ReadError::NotInDump(PhysAddr(0x9000));
        assert_eq!(space.bytes(VirtAddr(VIRT + 0x8ffe), 6).unwrap_err(), missing);
        assert_eq!(space.bytes_up_to(VirtAddr(VIRT + 0x8ffe), 6).len(), 2);
        assert!(space.u64(VirtAddr(VIRT + 0x8ffc)).is_err());
    }

    #[test]
    fn impossible_lengths_are_refused_before_memory_is_taken_for_them() {
        let mut memory = FakeMemory::new(0x10000);
        let tables = memory.mapped(VIRT, 0x1000);
        let huge = memory.space(tables).bytes(VirtAddr(VIRT), usize::MAX);
        assert!(matches!(huge, Err(ReadError::TooLong(_))));
    }
}
