//! Where a kernel of each architecture has its image in virtual memory.

use crate::vmcoreinfo::Vmcoreinfo;

/// The architecture of the dead kernel, which is the payload's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// x86_64.
    X86_64,
    /// arm64.
    Aarch64,
}

/// Start of the kernel image's mapping on x86_64, whatever KASLR did (__START_KERNEL_map in
/// arch/x86/include/asm/page_64_types.h, kernel 6.1).
const X86_64_IMAGE_BASE: u64 = 0xffff_ffff_8000_0000;

/// KERNEL_IMAGE_SIZE where VMCOREINFO does not tell it: 1 GiB, the size with KASLR (same file).
const X86_64_IMAGE_SIZE: i64 = 1 << 30;

/// The image is mapped by pages of 2 MiB on x86_64, and in segments of 64 KiB on arm64
/// (SEGMENT_ALIGN in arch/arm64/include/asm/memory.h, kernel 6.1).
const X86_64_ALIGN: u64 = 2 << 20;
const AARCH64_ALIGN: u64 = 64 << 10;

impl Architecture {
    /// The ELF machine number (e_machine).
    #[must_use]
    pub fn elf_machine(self) -> u16 {
        match self {
            Architecture::X86_64 => goblin::elf::header::EM_X86_64,
            Architecture::Aarch64 => goblin::elf::header::EM_AARCH64,
        }
    }

    /// Where VMCOREINFO says that the kernel image's address `virt` is in physical memory: on
    /// x86_64 `virt - __START_KERNEL_map + phys_base`, on arm64 `virt - kimage_voffset`.
    pub(crate) fn image_phys(self, vmcoreinfo: &Vmcoreinfo, virt: u64) -> Option<u64> {
        match self {
            Architecture::X86_64 => {
                let phys_base = vmcoreinfo.number("phys_base")?;
                virt.checked_sub(X86_64_IMAGE_BASE)?.checked_add_signed(phys_base)
            }
            Architecture::Aarch64 => {
                let offset = vmcoreinfo.number("kimage_voffset")?;
                Some(virt.wrapping_sub(offset as u64))
            }
        }
    }

    /// The kernel image's address, if a header that maps `virt` to `phys` is about the image and
    /// not about the direct map.
    ///
    /// ELF32 headers (`wide` is false) of a 64-bit kernel hold the lower half of their virtual
    /// addresses only.
    pub(crate) fn image_address(
        self,
        vmcoreinfo: &Vmcoreinfo,
        wide: bool,
        virt: u64,
        phys: u64,
    ) -> Option<u64> {
        match self {
            Architecture::X86_64 if wide => (virt >= X86_64_IMAGE_BASE).then_some(virt),
            Architecture::X86_64 => {
                // The image runs in the topmost 2 GiB, so its address is sign-extended; but with
                // KASLR the direct map can have such a lower half as well, so VMCOREINFO decides.
                let in_upper_half = virt >= X86_64_IMAGE_BASE & u64::from(u32::MAX);
                let full = X86_64_IMAGE_BASE | virt;
                let is_image = match self.image_phys(vmcoreinfo, full) {
                    Some(told) => told == phys,
                    None => virt != phys,
                };
                (in_upper_half && is_image).then_some(full)
            }
            Architecture::Aarch64 => {
                let told = self.image_phys(vmcoreinfo, virt) == Some(phys);
                (wide && (told || aarch64_image_half(vmcoreinfo, virt))).then_some(virt)
            }
        }
    }

    /// The address at which the direct map has the memory at `phys`, where VMCOREINFO tells it: on
    /// arm64 `(phys - PHYS_OFFSET) | PAGE_OFFSET` (arch/arm64/include/asm/memory.h).
    ///
    /// kexec-tools needs `/proc/kallsyms` to know it, and where that lacks `_text` writes addresses
    /// near zero (measured with 2.0.25 on kernel 6.1). On x86_64 its addresses are right.
    pub(crate) fn direct_map(self, vmcoreinfo: &Vmcoreinfo, phys: u64) -> Option<u64> {
        match self {
            Architecture::X86_64 => None,
            Architecture::Aarch64 => {
                let offset = vmcoreinfo.number("PHYS_OFFSET")?;
                let bits = vmcoreinfo.number("VA_BITS").filter(is_possible_width)?;
                let image_is_upper = aarch64_image_half(vmcoreinfo, u64::MAX);
                let page_offset = u64::MAX << if image_is_upper { bits } else { bits - 1 };
                Some(phys.wrapping_sub(offset as u64) | page_offset)
            }
        }
    }

    /// How many bytes a header that maps the kernel image from `virt` on begins too early: on arm64
    /// kexec-tools begins at `_text`, but what lies there, the Image's header, is not mapped, and
    /// vmalloc may use its addresses (declare_kernel_vmas in arch/arm64/mm/mmu.c, kernel 6.12).
    pub(crate) fn unmapped_head(self, vmcoreinfo: &Vmcoreinfo, virt: u64) -> u64 {
        let text = match self {
            Architecture::X86_64 => None,
            Architecture::Aarch64 => vmcoreinfo.symbol("_stext"),
        };
        let ahead = text.and_then(|text| (text & !(AARCH64_ALIGN - 1)).checked_sub(virt));
        ahead.filter(|&ahead| ahead <= AARCH64_ALIGN).unwrap_or(0)
    }

    /// First and last address (exclusive) of the kernel image, as VMCOREINFO alone tells it.
    ///
    /// It names the image's start but not its end. On x86_64 the addresses behind the image are
    /// kept for it, up to KERNEL_IMAGE_SIZE. On arm64 other mappings follow, so there the end is
    /// behind the last symbol of the image that is named.
    pub(crate) fn image_from_vmcoreinfo(self, vmcoreinfo: &Vmcoreinfo) -> Option<(u64, u64)> {
        let text = vmcoreinfo.symbol("_stext")?;
        match self {
            Architecture::X86_64 => {
                let most = vmcoreinfo.number("KERNEL_IMAGE_SIZE").unwrap_or(X86_64_IMAGE_SIZE);
                let end = X86_64_IMAGE_BASE.checked_add(u64::try_from(most).ok()?)?;
                Some((text & !(X86_64_ALIGN - 1), end))
            }
            Architecture::Aarch64 => {
                // What the Image has before _stext, its header, is not mapped there: addresses
                // before it can be those of stacks.
                let start = text & !(AARCH64_ALIGN - 1);
                let near = |symbol: &u64| (start..start.saturating_add(1 << 30)).contains(symbol);
                let last = vmcoreinfo.symbols().filter(near).max()?;
                Some((start, (last & !(AARCH64_ALIGN - 1)).checked_add(AARCH64_ALIGN)?))
            }
        }
    }
}

/// Whether arm64 kernels can have addresses of that many bits.
fn is_possible_width(bits: &i64) -> bool {
    (36..=52).contains(bits)
}

/// Whether `virt` is in the half of the kernel's addresses that holds the image and not the direct
/// map: the upper one since kernel 5.4, the lower one before (arch/arm64/include/asm/memory.h).
fn aarch64_image_half(vmcoreinfo: &Vmcoreinfo, virt: u64) -> bool {
    let bits = vmcoreinfo.number("VA_BITS").filter(is_possible_width).unwrap_or(48);
    // A kernel for 52 bits also runs where there are fewer, and keeps to that layout
    // (VA_BITS_MIN: 47 with pages of 16 KiB).
    let least = if vmcoreinfo.get("PAGESIZE") == Some("16384") { 47 } else { 48 };
    let middle = u64::MAX << (if bits > 48 { least } else { bits } - 1);
    let image_is_upper = vmcoreinfo.symbol("_stext").is_none_or(|text| text >= middle);
    (virt >= middle) == image_is_upper
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vmcoreinfo(text: &str) -> Vmcoreinfo {
        let mut vmcoreinfo = Vmcoreinfo::empty();
        vmcoreinfo.set(text.as_bytes());
        vmcoreinfo
    }

    /// As kernels of Debian 12 and 13 on arm64 write it, with 48 and with 52 bits.
    const VA48: &str = "SYMBOL(_stext)=ffffa0e6dce10000\nNUMBER(VA_BITS)=48\n\
        NUMBER(kimage_voffset)=0xffffa0e69ca00000\nSYMBOL(prb)=ffffa0e6df4f2c10\n\
        SYMBOL(mem_section)=ffff0000deadbeef\n";

    #[test]
    fn arm64_image_is_told_from_the_direct_map_in_every_layout() {
        let is_image = |text: &str, virt, phys| {
            Architecture::Aarch64.image_address(&vmcoreinfo(text), true, virt, phys).is_some()
        };
        assert!(is_image(VA48, 0xffff_a0e6_dce0_0000, 0x4040_0000));
        assert!(!is_image(VA48, 0xffff_0000_0000_0000, 0x4000_0000));
        // The kernel says otherwise, but this is not the direct map: a claim about the image, to
        // be refused as one.
        assert!(is_image(VA48, 0xffff_a0e6_dce0_0000, 0x5040_0000));
        let va39 = "NUMBER(VA_BITS)=39\nSYMBOL(_stext)=ffffffc008010000\n";
        assert!(!is_image(va39, 0xffff_ff80_0000_0000, 0x4000_0000));
        assert!(is_image(va39, 0xffff_ffc0_0800_0000, 0x4000_0000));
        let va52 = "NUMBER(VA_BITS)=52\nSYMBOL(_stext)=ffff800080010000\n";
        assert!(!is_image(va52, 0xfff0_0000_0000_0000, 0x4000_0000));
        assert!(!is_image(va52, 0xffff_0000_0000_0000, 0x4000_0000));
        assert!(is_image(va52, 0xffff_8000_8000_0000, 0x4000_0000));
        let va52_16k = "PAGESIZE=16384\nNUMBER(VA_BITS)=52\nSYMBOL(_stext)=ffffc00080010000\n";
        assert!(!is_image(va52_16k, 0xffff_8000_8000_0000, 0x4000_0000));
        let before_5_4 = "NUMBER(VA_BITS)=48\nSYMBOL(_stext)=ffff000008081000\n";
        assert!(!is_image(before_5_4, 0xffff_8000_0000_0000, 0x4000_0000));
        assert!(is_image(before_5_4, 0xffff_0000_0808_0000, 0x4008_0000));
        assert!(!is_image("", 0xffff_0000_0000_0000, 0x4000_0000));
        assert!(is_image("", 0xffff_8000_1000_0000, 0x4000_0000));
    }

    #[test]
    fn arm64_image_header_before_stext_is_not_mapped() {
        let head = |virt| Architecture::Aarch64.unmapped_head(&vmcoreinfo(VA48), virt);
        assert_eq!(head(0xffff_a0e6_dce0_0000), 0x1_0000);
        assert_eq!(head(0xffff_a0e6_dce1_0000), 0);
        assert_eq!(head(0xffff_a0e6_dc00_0000), 0, "too far away to be that");
        assert_eq!(head(u64::MAX), 0);
        let info = vmcoreinfo("SYMBOL(_stext)=ffffffff81010000\n");
        assert_eq!(Architecture::X86_64.unmapped_head(&info, 0xffff_ffff_8100_0000), 0);
    }

    #[test]
    fn arm64_direct_map_is_computed_in_every_layout() {
        let at = |text: &str, phys| Architecture::Aarch64.direct_map(&vmcoreinfo(text), phys);
        let va48 = "NUMBER(VA_BITS)=48\nNUMBER(PHYS_OFFSET)=0x40000000\n\
            SYMBOL(_stext)=ffffa0e6dce10000\n";
        assert_eq!(at(va48, 0x4020_0000), Some(0xffff_0000_0020_0000));
        // KASLR moves the direct map by moving PHYS_OFFSET, below zero even.
        let kaslr = "NUMBER(VA_BITS)=48\nNUMBER(PHYS_OFFSET)=0xffffbea500000000\n";
        assert_eq!(at(kaslr, 0x4000_0000), Some(0xffff_415b_4000_0000));
        // A kernel for 52 bits where the processor has 48.
        let narrow = "NUMBER(VA_BITS)=52\nNUMBER(PHYS_OFFSET)=0xfff1000040000000\n";
        assert_eq!(at(narrow, 0x4000_0000), Some(0xffff_0000_0000_0000));
        let before_5_4 = "NUMBER(VA_BITS)=48\nNUMBER(PHYS_OFFSET)=0x40000000\n\
            SYMBOL(_stext)=ffff000008081000\n";
        assert_eq!(at(before_5_4, 0x4000_0000), Some(0xffff_8000_0000_0000));
        assert_eq!(at("NUMBER(VA_BITS)=99\nNUMBER(PHYS_OFFSET)=0\n", 0), None);
        assert_eq!(at("", 0x4000_0000), None);
        assert_eq!(Architecture::X86_64.direct_map(&vmcoreinfo(va48), 0), None);
    }

    #[test]
    fn arm64_image_from_vmcoreinfo_ends_behind_its_last_symbol() {
        let info = vmcoreinfo(VA48);
        let image = Architecture::Aarch64.image_from_vmcoreinfo(&info);
        assert_eq!(image, Some((0xffff_a0e6_dce1_0000, 0xffff_a0e6_df50_0000)));
        let phys = Architecture::Aarch64.image_phys(&info, 0xffff_a0e6_dce0_0000);
        assert_eq!(phys, Some(0x4040_0000));
        assert_eq!(Architecture::Aarch64.image_from_vmcoreinfo(&vmcoreinfo("")), None);
        let end = vmcoreinfo("SYMBOL(_stext)=ffffffffffff0000\n");
        assert_eq!(Architecture::Aarch64.image_from_vmcoreinfo(&end), None);
    }
}
