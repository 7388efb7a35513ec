//! Addresses as people write them: numbers in hexadecimal, symbols, and either with something added.

use crate::kernel::Kernel;
use crate::linux::Linux;
use crate::linux::percpu::PerCpu;
use crate::{Error, VirtAddr};

/// The number that `text` is in hexadecimal, with `0x` in front of it or not.
#[must_use]
pub fn hexadecimal(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    // `+1` is a number for the standard library.
    let clean = digits.bytes().all(|it| it.is_ascii_hexdigit());
    u64::from_str_radix(digits, 16).ok().filter(|_| clean)
}

/// The number that `text` is: decimal, or hexadecimal with `0x` in front.
#[must_use]
pub fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(_) => hexadecimal(text),
        None => text.parse().ok(),
    }
}

/// The address that `text` names: `ffff888003a40000`, `jiffies`, `init_task+0x40`, `runqueues:1` (the copy
/// of CPU 1). A word that can be both a symbol and a number is a number if it looks like an address of
/// the kernel.
///
/// # Errors
/// [`Error::NoPlace`], and whatever keeps symbols from being found.
pub fn place(linux: &Linux<'_, '_>, text: &str) -> Result<VirtAddr, Error> {
    let (text, cpu) = match text.split_once(':') {
        Some((text, cpu)) => (text, Some(cpu)),
        None => (text, None),
    };
    let (base, added) = split(text);
    let none = || Error::NoPlace(text.to_owned());
    let added = match added {
        Some((sign, digits)) => {
            let value = number(digits).or_else(|| hexadecimal(digits)).ok_or_else(none)?;
            if sign == '-' { value.wrapping_neg() } else { value }
        }
        None => 0,
    };
    let literal = hexadecimal(base);
    let at = match literal.filter(|it| base.starts_with("0x") || it >> 47 != 0) {
        Some(at) => VirtAddr(at),
        None => match symbol(linux, base)? {
            Some(at) => at,
            None => VirtAddr(literal.ok_or_else(none)?),
        },
    };
    let at = match cpu {
        Some(cpu) => {
            let cpu = cpu.parse().map_err(|_| none())?;
            let copy = linux.percpu().map(|percpu: &PerCpu| percpu.address(at, cpu))?;
            copy.ok_or_else(none)?
        }
        None => at,
    };
    Ok(at.offset(added))
}

/// What is added, if anything; a sign in front belongs to what it is in front of.
fn split(text: &str) -> (&str, Option<(char, &str)>) {
    let sign = text.char_indices().skip(1).find(|(_, it)| matches!(it, '+' | '-'));
    match sign {
        Some((at, sign)) => (&text[..at], Some((sign, &text[at + 1..]))),
        None => (text, None),
    }
}

/// The address of a symbol of the kernel's image or of a module.
///
/// # Errors
/// [`Error::NoSymbols`].
pub fn symbol(linux: &Linux<'_, '_>, name: &str) -> Result<Option<VirtAddr>, Error> {
    let kernel: &Kernel<'_> = linux.kernel();
    if let Some(at) = kernel.symbol(name)? {
        return Ok(Some(at));
    }
    let mut found = None;
    for module in &linux.modules().list {
        module.each_symbol(kernel, &mut |_, it, at| {
            if found.is_none() && it == name {
                found = Some(at);
            }
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_told_from_words() {
        assert_eq!(hexadecimal("0xffff888003a40000"), Some(0xffff_8880_03a4_0000));
        assert_eq!(hexadecimal("+1"), None);
        assert_eq!(hexadecimal(""), None);
        assert_eq!((number("10"), number("0x10"), number("ff")), (Some(10), Some(16), None));
    }

    #[test]
    fn what_is_added_is_told_from_the_name() {
        assert_eq!(split("init_task+0x40"), ("init_task", Some(('+', "0x40"))));
        assert_eq!(split("jiffies"), ("jiffies", None));
        assert_eq!(split("-5"), ("-5", None));
        assert_eq!(split("ü+1"), ("ü", Some(('+', "1"))));
    }
}
