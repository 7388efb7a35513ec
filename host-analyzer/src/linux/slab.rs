//! Which slab cache an object lies in.
//!
//! The struct page of its page, by way of the memory sections (include/linux/mmzone.h, 6.1), says whether
//! that is part of a slab, and of which cache. The numbers are those of VMCOREINFO.

use std::cell::RefCell;
use std::collections::HashMap;

use crate::VirtAddr;
use crate::kernel::Kernel;

use super::Linux;

/// Bits of section_mem_map that are no part of the address (SECTION_MAP_LAST_BIT, 6.12).
const SECTION_FLAGS: u64 = 0x3f;
/// Most characters of a cache's name.
const NAME: usize = 64;

/// Finds the caches of objects.
pub struct Slabs<'l, 'k, 'd> {
    linux: &'l Linux<'k, 'd>,
    layout: Option<Layout>,
    /// The names of caches, by their addresses.
    names: RefCell<HashMap<VirtAddr, Option<String>>>,
}

/// Where things lie.
struct Layout {
    sections: VirtAddr,
    /// Sections in each of the tables that `sections` points to; 0 when they are all in one.
    per_root: u64,
    section_size: u64,
    /// Offset of the address of a section's pages.
    mem_map: u64,
    section_bits: u32,
    page_bits: u32,
    page_size: u64,
    /// Offset of the address of a compound page's first page, which has bit 0 set.
    head: u64,
    mark: Mark,
    /// Offset of a slab's cache.
    cache: u64,
    /// Offset of a cache's name.
    name: u64,
}

/// What says that a page belongs to a slab.
enum Mark {
    /// A bit of the word at this offset.
    Flag(u64, u32),
    /// The type at this offset, from 6.10 on.
    Type(u64, u32),
}

impl<'l, 'k, 'd> Slabs<'l, 'k, 'd> {
    /// The slabs of `linux`.
    #[must_use]
    pub fn new(linux: &'l Linux<'k, 'd>) -> Slabs<'l, 'k, 'd> {
        let layout = Layout::new(linux.kernel());
        Slabs { linux, layout, names: RefCell::default() }
    }

    /// The name of the cache with the object that `at`, an address in the direct map, lies in. `None` when it
    /// lies in no slab, or what would tell is not there.
    #[must_use]
    pub fn cache_of(&self, at: VirtAddr) -> Option<String> {
        let layout = self.layout.as_ref().filter(|_| at.0 >> 63 == 1)?;
        let memory = self.linux.kernel().memory();
        let phys = memory.translate(at).ok()?.phys;
        // The kernel's image and vmalloc lead to the same memory, and no slab is there.
        if self.linux.direct_map(phys)? != at {
            return None;
        }
        let page = layout.page(self.linux.kernel(), phys.0 >> layout.page_bits)?;
        let head = memory.u64(page.offset(layout.head)).ok()?;
        let first = if head & 1 != 0 { VirtAddr(head - 1) } else { page };
        let is_slab = match layout.mark {
            Mark::Flag(offset, bit) => memory.u64(first.offset(offset)).ok()? >> bit & 1 != 0,
            Mark::Type(offset, wanted) => {
                let kind = memory.u32(first.offset(offset)).ok()?;
                // From 6.12 on the type is the uppermost byte; before, each type is a bit that is clear.
                let mask = if wanted.trailing_zeros() >= 24 { 0xff << 24 } else { u32::MAX };
                kind & mask == wanted
            }
        };
        if !is_slab {
            return None;
        }
        let cache = memory.pointer(first.offset(layout.cache)).ok()?;
        let name = || memory.string(memory.pointer(cache.offset(layout.name)).ok()?, NAME).ok();
        self.names.borrow_mut().entry(cache).or_insert_with(name).clone()
    }
}

impl Layout {
    fn new(kernel: &Kernel<'_>) -> Option<Layout> {
        let (info, types) = (kernel.vmcoreinfo(), kernel.types().ok()?);
        let offset = |name: &str| info.offset(name).map(|it| it as u64);
        let bits = |name: &str| info.number(name).and_then(|it| u32::try_from(it).ok());
        let member = |name, path| types.member(name, path).map(|it| it.offset as u64);
        let page_bits = info.page_size().trailing_zeros();
        let section_size = info.size("mem_section")? as u64;
        // One table for all, unless there are more roots than sections would fit into.
        let most = bits("MAX_PHYSMEM_BITS")?.checked_sub(bits("SECTION_SIZE_BITS")?)?;
        let is_table = info.length("mem_section")? == 1u64.checked_shl(most)?;
        let kind = || {
            let wanted = info.number("PAGE_SLAB_MAPCOUNT_VALUE")?;
            Some(Mark::Type(offset("page._mapcount")?, wanted as u32))
        };
        let flag = || Some(Mark::Flag(offset("page.flags")?, bits("PG_slab")?));
        // 7.1 calls it compound_info.
        let head = offset("page.compound_head").or_else(|| member("page", "compound_info"))?;
        Some(Layout {
            sections: info.symbol("mem_section")?,
            per_root: if is_table { 0 } else { info.page_size() / section_size.max(1) },
            section_size,
            mem_map: offset("mem_section.section_mem_map")?,
            section_bits: bits("SECTION_SIZE_BITS").filter(|bits| *bits < 64)?,
            page_bits,
            page_size: info.size("page")? as u64,
            head,
            mark: kind().or_else(flag)?,
            // Before 5.17 slabs were described in struct page itself.
            cache: member("slab", "slab_cache").or_else(|| member("page", "slab_cache"))?,
            name: member("kmem_cache", "name")?,
        })
    }

    /// The struct page of a page frame.
    fn page(&self, kernel: &Kernel<'_>, pfn: u64) -> Option<VirtAddr> {
        let memory = kernel.memory();
        let number = pfn >> (self.section_bits.checked_sub(self.page_bits)?);
        let section = match self.per_root {
            0 => self.sections.offset(number.checked_mul(self.section_size)?),
            per_root => {
                let root = self.sections.offset(number / per_root * 8);
                memory.pointer(root).ok()?.offset(number % per_root * self.section_size)
            }
        };
        let coded = memory.u64(section.offset(self.mem_map)).ok()? & !SECTION_FLAGS;
        // It is the address that page frame 0 would have.
        (coded != 0).then(|| VirtAddr(coded).offset(pfn.wrapping_mul(self.page_size)))
    }
}
