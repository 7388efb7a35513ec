//! Old memory as the dump logic trusts it: what is left of the dead kernel's claims after each was
//! checked.

use core::fmt;

use heapless::Vec;

use crate::OldPhys;
use crate::architecture::Architecture;
use crate::vmcoreinfo::Vmcoreinfo;

/// Most ranges of old memory that are kept, neighbours merged. Machines of today have a few dozen.
pub const MAX_RANGES: usize = 512;

/// Most mappings of the kernel image.
pub const MAX_IMAGE_MAPPINGS: usize = 8;

/// A range of old memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where its bytes are now.
    pub source: OldPhys,
    /// The physical address that they had under the dead kernel. It differs from `source` for
    /// memory that kexec moved out of the way.
    pub phys: u64,
    /// The address at which the dead kernel's direct map had it.
    pub virt: u64,
    /// Size in bytes, not zero.
    pub size: u64,
}

impl Range {
    fn continues(&self, next: &Range) -> bool {
        self.source.0.checked_add(self.size) == Some(next.source.0)
            && self.phys.checked_add(self.size) == Some(next.phys)
            && self.virt.checked_add(self.size) == Some(next.virt)
    }

    /// The part of `phys..phys + size` that lies in this range.
    fn intersection(&self, phys: u64, size: u64) -> Option<(u64, u64)> {
        let start = self.phys.max(phys);
        let end = (self.phys + self.size).min(phys.checked_add(size)?);
        (start < end).then(|| (start, end - start))
    }
}

/// A mapping of the kernel image: the same physical memory as a part of a [`Range`], at the address
/// the kernel runs at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageMapping {
    /// Virtual address.
    pub virt: u64,
    /// Physical address, inside a [`Range`].
    pub phys: u64,
    /// Size in bytes, not zero.
    pub size: u64,
}

/// Why a claim about a range of memory is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No byte of it is in memory.
    Empty,
    /// An address and the size add up beyond 64 bits.
    Wraps,
    /// It reaches beyond what the processor can address.
    OutsideAddressSpace,
    /// It covers memory that another range covers already.
    Overlaps,
    /// More ranges than are kept.
    TooMany,
    /// A mapping of the kernel image whose memory is not in any range.
    NotInMemory,
    /// A mapping of the kernel image that VMCOREINFO contradicts.
    AgainstVmcoreinfo,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refused::Empty => "no byte of it is in memory",
            Refused::Wraps => "address and size overflow",
            Refused::OutsideAddressSpace => "outside of what the processor can address",
            Refused::Overlaps => "overlaps memory claimed before",
            Refused::TooMany => "more ranges than this payload keeps",
            Refused::NotInMemory => "the kernel image is not in this memory",
            Refused::AgainstVmcoreinfo => "VMCOREINFO places the kernel image elsewhere",
        })
    }
}

/// Old memory: ranges that exist, do not overlap and can be addressed.
pub struct OldMemory {
    ranges: Vec<Range, MAX_RANGES>,
    image: Vec<ImageMapping, MAX_IMAGE_MAPPINGS>,
    /// What the kernel tells about itself.
    pub vmcoreinfo: Vmcoreinfo,
    /// Number of claims that were not believed.
    pub dropped: u64,
    /// Whether there were more ranges than are kept: the dump will not be complete.
    pub truncated: bool,
}

impl Default for OldMemory {
    fn default() -> OldMemory {
        OldMemory::new()
    }
}

impl OldMemory {
    /// Without any memory.
    #[must_use]
    pub const fn new() -> OldMemory {
        OldMemory {
            ranges: Vec::new(),
            image: Vec::new(),
            vmcoreinfo: Vmcoreinfo::empty(),
            dropped: 0,
            truncated: false,
        }
    }

    /// The ranges of memory, in the order they were claimed.
    #[must_use]
    pub fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// The mappings of the kernel image.
    #[must_use]
    pub fn image(&self) -> &[ImageMapping] {
        &self.image
    }

    /// Bytes in all ranges.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.ranges.iter().map(|range| range.size).sum()
    }

    /// Takes over a range, if its addresses can be believed: all its bytes below `limit`, the
    /// first address beyond what the processor can address.
    ///
    /// # Errors
    /// [`Refused`] says why not.
    pub fn add_range(&mut self, range: Range, limit: u64) -> Result<(), Refused> {
        if range.size == 0 {
            return Err(Refused::Empty);
        }
        let end = |start: u64| start.checked_add(range.size - 1).ok_or(Refused::Wraps);
        end(range.virt)?;
        if end(range.source.0)? >= limit || end(range.phys)? >= limit {
            return Err(Refused::OutsideAddressSpace);
        }
        let overlaps = self.ranges.iter().any(|known| {
            let apart = |a: u64, b: u64| a + known.size <= b || b + range.size <= a;
            !apart(known.source.0, range.source.0) || !apart(known.phys, range.phys)
        });
        if overlaps {
            return Err(Refused::Overlaps);
        }
        match self.ranges.last_mut() {
            Some(last) if last.continues(&range) => {
                last.size += range.size;
                Ok(())
            }
            _ => self.ranges.push(range).map_err(|_| {
                self.truncated = true;
                Refused::TooMany
            }),
        }
    }

    /// Takes over a mapping of the kernel image, if it lies in memory and VMCOREINFO does not
    /// contradict it. A mapping whose memory lies in several ranges becomes several mappings.
    ///
    /// # Errors
    /// [`Refused`] says why not.
    pub fn add_image(
        &mut self,
        architecture: Architecture,
        claim: ImageMapping,
    ) -> Result<(), Refused> {
        if claim.size == 0 {
            return Err(Refused::Empty);
        }
        claim.virt.checked_add(claim.size - 1).ok_or(Refused::Wraps)?;
        claim.phys.checked_add(claim.size - 1).ok_or(Refused::Wraps)?;
        let told = architecture.image_phys(&self.vmcoreinfo, claim.virt);
        if told.is_some_and(|phys| phys != claim.phys) {
            return Err(Refused::AgainstVmcoreinfo);
        }
        let covered: u64 = self.intersections(claim).map(|part| part.size).sum();
        if covered != claim.size {
            return Err(Refused::NotInMemory);
        }
        let mut parts = Vec::<ImageMapping, MAX_IMAGE_MAPPINGS>::new();
        for part in self.intersections(claim) {
            parts.push(part).map_err(|_| Refused::TooMany)?;
        }
        self.image.extend_from_slice(&parts).map_err(|_| Refused::TooMany)
    }

    /// The kernel image's mapping as VMCOREINFO alone tells it, for when `elfcorehdr` has no
    /// header for it or a wrong one. It ends no later than the memory that it lies in.
    #[must_use]
    pub fn image_from_vmcoreinfo(&self, architecture: Architecture) -> Option<ImageMapping> {
        let (virt, end) = architecture.image_from_vmcoreinfo(&self.vmcoreinfo)?;
        let phys = architecture.image_phys(&self.vmcoreinfo, virt)?;
        let most = end.checked_sub(virt)?;
        let (start, size) = self.ranges.iter().find_map(|range| range.intersection(phys, most))?;
        (start == phys).then_some(ImageMapping { virt, phys, size })
    }

    fn intersections(&self, claim: ImageMapping) -> impl Iterator<Item = ImageMapping> {
        self.ranges.iter().filter_map(move |range| {
            let (phys, size) = range.intersection(claim.phys, claim.size)?;
            Some(ImageMapping { virt: claim.virt + (phys - claim.phys), phys, size })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Architecture::X86_64;

    const LIMIT: u64 = 1 << 40;

    fn range(phys: u64, size: u64) -> Range {
        let virt = phys.wrapping_add(0xffff_8880_0000_0000);
        Range { source: OldPhys(phys), phys, virt, size }
    }

    fn memory(ranges: &[(u64, u64)]) -> OldMemory {
        let mut old = OldMemory::new();
        for &(phys, size) in ranges {
            old.add_range(range(phys, size), LIMIT).unwrap();
        }
        old
    }

    #[test]
    fn neighbours_become_one_range() {
        let old = memory(&[(0x1000, 0x1000), (0x2000, 0x3000), (0x10000, 0x1000)]);
        assert_eq!(old.ranges(), [range(0x1000, 0x4000), range(0x10000, 0x1000)]);
        assert_eq!(old.size(), 0x5000);
    }

    #[test]
    fn impossible_ranges_are_refused_one_by_one() {
        let mut old = memory(&[(0x1000, 0x4000)]);
        let refused = [
            (range(0x8000, 0), Refused::Empty),
            (range(LIMIT - 0x1000, 0x2000), Refused::OutsideAddressSpace),
            (range(u64::MAX - 0xfff, 0x2000), Refused::Wraps),
            (range(0x4000, 0x1000), Refused::Overlaps),
            (range(0, 0x10000), Refused::Overlaps),
            (Range { phys: 0x9000, ..range(0x1000, 0x1000) }, Refused::Overlaps),
            (Range { virt: u64::MAX - 5, ..range(0x9000, 0x1000) }, Refused::Wraps),
        ];
        for (claim, why) in refused {
            assert_eq!(old.add_range(claim, LIMIT), Err(why), "{claim:?}");
        }
        assert_eq!(old.ranges(), [range(0x1000, 0x4000)]);
    }

    #[test]
    fn more_ranges_than_are_kept_are_refused_and_the_others_stand() {
        let mut old = OldMemory::new();
        for index in 0..MAX_RANGES as u64 {
            old.add_range(range(index * 0x2000, 0x1000), LIMIT).unwrap();
        }
        assert_eq!(old.add_range(range(0x1000_0000, 0x1000), LIMIT), Err(Refused::TooMany));
        assert_eq!((old.ranges().len(), old.truncated), (MAX_RANGES, true));
    }

    #[test]
    fn image_mapping_must_lie_in_memory_and_agree_with_vmcoreinfo() {
        let mut old = memory(&[(0x10_0000, 0x1000_0000)]);
        old.vmcoreinfo.set(b"NUMBER(phys_base)=-16777216\n");
        let claim = ImageMapping { virt: 0xffff_ffff_8200_0000, phys: 0x100_0000, size: 0x40_0000 };
        assert_eq!(old.add_image(X86_64, claim), Ok(()));
        assert_eq!(old.image(), [claim]);
        let moved = ImageMapping { phys: 0x200_0000, ..claim };
        assert_eq!(old.add_image(X86_64, moved), Err(Refused::AgainstVmcoreinfo));
        let large = ImageMapping { size: 0x2000_0000, ..claim };
        assert_eq!(old.add_image(X86_64, large), Err(Refused::NotInMemory));
        // What kexec-tools writes on a kernel whose /proc/kallsyms lacks _text.
        let garbage = ImageMapping { virt: u64::MAX - 0xfff, phys: 0, size: u64::MAX };
        assert_eq!(old.add_image(X86_64, garbage), Err(Refused::Wraps));
    }

    #[test]
    fn image_mapping_across_two_ranges_becomes_two() {
        let mut old = OldMemory::new();
        old.add_range(range(0x10_0000, 0x10_0000), LIMIT).unwrap();
        old.add_range(Range { virt: 0x7000_0000, ..range(0x20_0000, 0x10_0000) }, LIMIT).unwrap();
        let virt = 0xffff_ffff_8000_0000;
        old.add_image(X86_64, ImageMapping { virt, phys: 0x18_0000, size: 0x10_0000 }).unwrap();
        let parts = [
            ImageMapping { virt, phys: 0x18_0000, size: 0x8_0000 },
            ImageMapping { virt: virt + 0x8_0000, phys: 0x20_0000, size: 0x8_0000 },
        ];
        assert_eq!(old.image(), parts);
    }

    #[test]
    fn image_mapping_comes_from_vmcoreinfo_when_the_header_is_missing() {
        let mut old = memory(&[(0, 0x9f000), (0x10_0000, 0x1ff0_0000)]);
        assert_eq!(old.image_from_vmcoreinfo(X86_64), None);
        old.vmcoreinfo.set(
            b"SYMBOL(_stext)=ffffffff9c200000\nNUMBER(phys_base)=-452984832\n\
              NUMBER(KERNEL_IMAGE_SIZE)=1073741824\n",
        );
        let virt = 0xffff_ffff_9c20_0000;
        let phys = 0x1c20_0000 - 452_984_832;
        let size = (0x1ff0_0000 + 0x10_0000 - phys).min(0xffff_ffff_c000_0000 - virt);
        assert_eq!(old.image_from_vmcoreinfo(X86_64), Some(ImageMapping { virt, phys, size }));
    }
}
