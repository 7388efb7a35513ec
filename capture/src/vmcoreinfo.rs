//! VMCOREINFO: the `KEY=value` lines in which a kernel tells about itself.
//!
//! Source: kernel/crash_core.c and arch/x86/kernel/machine_kexec_64.c, kernel 6.1.

use heapless::Vec;

/// Most bytes of VMCOREINFO that are kept. The kernels of today write about 3.2 KiB.
pub const MAX: usize = 6 * 1024;

/// The text of a VMCOREINFO note; empty when there was none.
#[derive(Debug, Default)]
pub struct Vmcoreinfo {
    text: Vec<u8, MAX>,
}

impl Vmcoreinfo {
    /// Without any line.
    #[must_use]
    pub const fn empty() -> Vmcoreinfo {
        Vmcoreinfo { text: Vec::new() }
    }

    /// Takes over the descriptor of a note, at most [`MAX`] bytes of it.
    pub fn set(&mut self, desc: &[u8]) {
        self.text.clear();
        for &byte in desc.iter().take(MAX) {
            let _ = self.text.push(byte);
        }
    }

    /// The text.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.text
    }

    /// Whether there is no line.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// The value of the line `key=value`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.text.split(|&byte| byte == b'\n').find_map(|line| {
            let value = line.strip_prefix(key.as_bytes())?.strip_prefix(b"=")?;
            core::str::from_utf8(value).ok()
        })
    }

    /// The address in the line `SYMBOL(name)=hex`.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<u64> {
        u64::from_str_radix(self.wrapped("SYMBOL", name)?, 16).ok()
    }

    /// The number in the line `NUMBER(name)=number`: decimal, which may be negative, or hexadecimal behind `0x`.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<i64> {
        let value = self.wrapped("NUMBER", name)?;
        match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok().map(|value| value as i64),
            None => value.parse().ok(),
        }
    }

    /// The size or count in the line `KIND(name)=decimal`: `OFFSET`, `SIZE` (both in bytes), `LENGTH`.
    #[must_use]
    pub fn value(&self, kind: &str, name: &str) -> Option<u64> {
        self.wrapped(kind, name)?.parse().ok()
    }

    /// The addresses in all lines `SYMBOL(name)=hex`.
    pub fn symbols(&self) -> impl Iterator<Item = u64> {
        self.text.split(|&byte| byte == b'\n').filter_map(|line| {
            let (_, value) =
                core::str::from_utf8(line).ok()?.strip_prefix("SYMBOL(")?.split_once(")=")?;
            u64::from_str_radix(value, 16).ok()
        })
    }

    fn wrapped(&self, kind: &str, name: &str) -> Option<&str> {
        self.text.split(|&byte| byte == b'\n').find_map(|line| {
            let rest = line.strip_prefix(kind.as_bytes())?.strip_prefix(b"(")?;
            let value = rest.strip_prefix(name.as_bytes())?.strip_prefix(b")=")?;
            core::str::from_utf8(value).ok()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_whole_or_not_at_all() {
        let mut info = Vmcoreinfo::empty();
        info.set(
            b"OSRELEASE=6.1.0-50-cloud-amd64\nPAGESIZE=4096\nSYMBOL(_stext)=ffffffff9c200000\n\
              NUMBER(phys_base)=-12582912\nNUMBER(KERNEL_IMAGE_SIZE)=1073741824\nNUMBER(x)=0x10",
        );
        assert_eq!(info.get("OSRELEASE"), Some("6.1.0-50-cloud-amd64"));
        assert_eq!(info.get("OSRELEAS"), None);
        assert_eq!(info.symbol("_stext"), Some(0xffff_ffff_9c20_0000));
        assert_eq!(info.number("phys_base"), Some(-12_582_912));
        assert_eq!(info.number("KERNEL_IMAGE_SIZE"), Some(1 << 30));
        assert_eq!(info.number("x"), Some(16));
        assert_eq!(info.symbol("phys_base"), None);
    }
}
