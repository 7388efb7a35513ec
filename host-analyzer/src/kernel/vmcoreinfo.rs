//! VMCOREINFO: the text in which a kernel describes itself to whoever reads its dump.
//!
//! Lines are `KEY=value` (kernel/crash_core.c, 6.1). SYMBOL and KERNELOFFSET are hexadecimal
//! without a prefix, OFFSET, SIZE and LENGTH decimal, NUMBER decimal and possibly negative, or
//! hexadecimal with a prefix.

use std::borrow::Cow;

use crate::{Error, VirtAddr};

/// The text, kept as it is; lines are looked for when they are asked for.
pub struct Vmcoreinfo<'a> {
    text: Cow<'a, str>,
}

impl<'a> Vmcoreinfo<'a> {
    /// The text of a note's descriptor.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Vmcoreinfo<'a> {
        let end = memchr::memchr(0, bytes).unwrap_or(bytes.len());
        Vmcoreinfo { text: String::from_utf8_lossy(&bytes[..end]) }
    }

    /// The same with a text of its own.
    #[must_use]
    pub fn into_owned(self) -> Vmcoreinfo<'static> {
        Vmcoreinfo { text: Cow::Owned(self.text.into_owned()) }
    }

    /// All of the text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The lines, as the kernel wrote them.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.text.lines()
    }

    /// The value of the line `key=`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    }

    /// SYMBOL(name): the address of a symbol, KASLR applied.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<VirtAddr> {
        let value = self.get(&format!("SYMBOL({name})"))?;
        u64::from_str_radix(value, 16).ok().map(VirtAddr)
    }

    /// All SYMBOL lines: names and addresses.
    pub fn symbols(&self) -> impl Iterator<Item = (&str, VirtAddr)> {
        self.text.lines().filter_map(|line| {
            let (name, value) = line.strip_prefix("SYMBOL(")?.split_once(")=")?;
            Some((name, VirtAddr(u64::from_str_radix(value, 16).ok()?)))
        })
    }

    /// NUMBER(name). Hexadecimal ones (arm64 writes some so) fill all 64 bits.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<i64> {
        let value = self.get(&format!("NUMBER({name})"))?;
        match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok().map(|number| number as i64),
            None => value.parse().ok(),
        }
    }

    /// Size of a page in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.get("PAGESIZE").and_then(|size| size.parse().ok()).unwrap_or(4096)
    }

    /// OFFSET(name), in bytes.
    #[must_use]
    pub fn offset(&self, name: &str) -> Option<usize> {
        self.get(&format!("OFFSET({name})"))?.parse().ok()
    }

    /// SIZE(name), in bytes.
    #[must_use]
    pub fn size(&self, name: &str) -> Option<usize> {
        self.get(&format!("SIZE({name})"))?.parse().ok()
    }

    /// LENGTH(name): the number of an array's elements.
    #[must_use]
    pub fn length(&self, name: &str) -> Option<u64> {
        self.get(&format!("LENGTH({name})"))?.parse().ok()
    }

    /// The kernel's release, as `uname -r` says it.
    #[must_use]
    pub fn release(&self) -> &str {
        self.get("OSRELEASE").unwrap_or("unknown")
    }

    /// How far KASLR moved the kernel's text; 0 when it did not.
    #[must_use]
    pub fn kernel_offset(&self) -> u64 {
        self.get("KERNELOFFSET").and_then(|it| u64::from_str_radix(it, 16).ok()).unwrap_or(0)
    }

    /// A SYMBOL that cannot be done without.
    ///
    /// # Errors
    /// [`Error::VmcoreinfoKey`].
    pub fn need_symbol(&self, name: &str) -> Result<VirtAddr, Error> {
        let missing = || Error::VmcoreinfoKey(format!("SYMBOL({name})"), "it is missing");
        self.symbol(name).ok_or_else(missing)
    }

    /// An OFFSET that cannot be done without.
    ///
    /// # Errors
    /// [`Error::VmcoreinfoKey`].
    pub fn need_offset(&self, name: &str) -> Result<usize, Error> {
        let missing = || Error::VmcoreinfoKey(format!("OFFSET({name})"), "it is missing");
        self.offset(name).ok_or_else(missing)
    }

    /// A SIZE that cannot be done without.
    ///
    /// # Errors
    /// [`Error::VmcoreinfoKey`].
    pub fn need_size(&self, name: &str) -> Result<usize, Error> {
        let missing = || Error::VmcoreinfoKey(format!("SIZE({name})"), "it is missing");
        self.size(name).ok_or_else(missing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"OSRELEASE=6.1.0\nSYMBOL(_stext)=ffffffff91200000\nNUMBER(phys_base)=-5\n\
                          OFFSET(list_head.next)=0\nNUMBER(PHYS_OFFSET)=0xffff578500000000\n\
                          KERNELOFFSET=10200000\n\0rest";

    #[test]
    fn lines_are_found_by_their_whole_key() {
        let info = Vmcoreinfo::new(TEXT);
        assert_eq!(info.release(), "6.1.0");
        assert_eq!(info.symbol("_stext"), Some(VirtAddr(0xffff_ffff_9120_0000)));
        assert_eq!(info.number("phys_base"), Some(-5));
        assert_eq!(info.number("PHYS_OFFSET"), Some(0xffff_5785_0000_0000_u64 as i64));
        assert_eq!(info.symbols().next(), Some(("_stext", VirtAddr(0xffff_ffff_9120_0000))));
        assert_eq!(info.offset("list_head.next"), Some(0));
        assert_eq!(info.kernel_offset(), 0x1020_0000);
        assert_eq!(info.symbol("_stex"), None);
        assert_eq!(info.get("rest"), None);
    }

    #[test]
    fn missing_line_is_named() {
        let error = Vmcoreinfo::new(TEXT).need_symbol("prb").unwrap_err();
        assert!(error.to_string().contains("SYMBOL(prb)"));
    }
}
