//! VMCOREINFO out of the memory itself, for dumps without the note: QEMU's, unless the guest told QEMU
//! where it is.
//!
//! The kernel keeps the text in a page of its own (`vmcoreinfo_data`, kernel/crash_core.c, 6.1), which so
//! begins with `OSRELEASE=`. Kernels that ran before may have left theirs, and kexec has the running
//! kernel's copied. So a text is checked: the page tables that it names must lead to the kernel's names for
//! itself, and these must say the same release.

use crate::source::Memory;
use crate::{Error, PhysAddr};

use super::machine::Machine;
use super::paging;
use super::virt::VirtualMemory;
use super::vmcoreinfo::Vmcoreinfo;

/// What the text begins with.
const BEGIN: &[u8] = b"OSRELEASE=";

/// The smallest page of any kernel, and the largest: VMCOREINFO_BYTES is one of them.
const PAGE: usize = 4096;
const MAX_TEXT: usize = 64 << 10;

/// How much is looked at together, in bytes.
const STEP: u64 = 1 << 20;

/// Where the release is in `struct new_utsname` (include/uapi/linux/utsname.h).
const RELEASE: u64 = 2 * 65;

/// VMCOREINFO that was found in memory.
pub struct Found {
    /// The text.
    pub info: Vmcoreinfo<'static>,
    at: PhysAddr,
    leads_to_kernel: bool,
    others: usize,
}

impl Found {
    /// What the user should know about it.
    #[must_use]
    pub fn said(&self) -> String {
        let mut said = format!(
            "the dump has no VMCOREINFO note; that of Linux {} was found in its memory, at physical \
             address {:#x}",
            self.info.release(),
            self.at.0
        );
        if !self.leads_to_kernel {
            said += ". It does not lead to a kernel of that name: it may be another kernel's";
        }
        if self.others > 0 {
            said += &format!(
                ". {} more, of other kernels, fit as well or as badly, and were passed over",
                self.others
            );
        }
        said
    }
}

/// Looks through all of the memory.
///
/// # Errors
/// [`Error::NoVmcoreinfo`].
pub fn scan(machine: Machine, memory: &dyn Memory) -> Result<Found, Error> {
    let mut all: Vec<Found> = Vec::new();
    each_page(memory, |at, page| {
        if !page.starts_with(BEGIN) {
            return;
        }
        let Some(info) = text_at(memory, at) else { return };
        let Some(leads_to_kernel) = leads_to_kernel(machine, memory, &info) else { return };
        let found = Found { info, at, leads_to_kernel, others: 0 };
        // Copies are one; the one that was written to when the kernel crashed (CRASHTIME) is longer.
        let is_copy = |known: &&mut Found| {
            let (known, found) = (known.info.text(), found.info.text());
            known.starts_with(found) || found.starts_with(known)
        };
        match all.iter_mut().find(is_copy) {
            Some(known) if known.info.text().len() < found.info.text().len() => *known = found,
            Some(_) => {}
            None => all.push(found),
        }
    });
    if all.iter().any(|found| found.leads_to_kernel) {
        all.retain(|found| found.leads_to_kernel);
    }
    let others = all.len().saturating_sub(1);
    let crashed = all.iter().position(|found| found.info.get("CRASHTIME").is_some());
    match all.into_iter().nth(crashed.unwrap_or(0)) {
        Some(found) => Ok(Found { others, ..found }),
        None => Err(Error::NoVmcoreinfo),
    }
}

/// Shows every page that the dump has, and as much as lies with it, to `visit`.
fn each_page(memory: &dyn Memory, mut visit: impl FnMut(PhysAddr, &[u8])) {
    for range in memory.ranges() {
        let mut at = range.start;
        while at < range.end {
            let max = (range.end - at).min(STEP);
            let Ok(run) = memory.run(PhysAddr(at), max as usize) else {
                // A page that cannot be unpacked.
                at = (at - at % PAGE as u64).saturating_add(PAGE as u64);
                continue;
            };
            let first = (at.wrapping_neg() % PAGE as u64) as usize;
            for start in (first..run.len()).step_by(PAGE) {
                visit(PhysAddr(at + start as u64), &run[start..]);
            }
            at += run.len() as u64;
        }
    }
}

/// The text that begins at `at`, up to its end.
fn text_at(memory: &dyn Memory, at: PhysAddr) -> Option<Vmcoreinfo<'static>> {
    let mut bytes = Vec::new();
    while bytes.len() < MAX_TEXT && memchr::memchr(0, &bytes).is_none() {
        let here = at.offset(bytes.len() as u64);
        let Ok(run) = memory.run(here, PAGE - here.0 as usize % PAGE) else { break };
        bytes.extend_from_slice(&run);
    }
    let info = Vmcoreinfo::new(&bytes).into_owned();
    info.get("SYMBOL(_stext)").is_some().then_some(info)
}

/// Whether the page tables of `info` lead to the name of the same kernel; `None` when it has no tables.
fn leads_to_kernel(machine: Machine, memory: &dyn Memory, info: &Vmcoreinfo<'_>) -> Option<bool> {
    let tables = paging::for_kernel(machine, info).ok()?;
    let names = || {
        let at = info.symbol("init_uts_ns")?.offset(info.offset("uts_namespace.name")? as u64);
        let space = VirtualMemory::new(memory, tables);
        space.string(at.offset(RELEASE), 65).ok()
    };
    Some(names().is_some_and(|release| release == info.release()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeMemory;

    const BASE: u64 = 0xffff_ffff_8100_0000;

    /// Memory in which a kernel of this release names itself.
    fn kernel(release: &str) -> FakeMemory {
        let mut memory = FakeMemory::new(0x20_0000);
        memory.mapped(BASE & !0x1f_ffff, 0x10_0000);
        memory.put(0x5000 + RELEASE, release.as_bytes());
        memory
    }

    /// The text of a kernel of this release whose tables are at `tables`.
    fn text(release: &str, tables: u64) -> String {
        format!(
            "OSRELEASE={release}\nPAGESIZE=4096\nSYMBOL(init_uts_ns)={:x}\nOFFSET(uts_namespace.name)=0\n\
             SYMBOL(swapper_pg_dir)={:x}\nSYMBOL(_stext)={BASE:x}\nNUMBER(phys_base)=0\n\
             NUMBER(pgtable_l5_enabled)=0\n",
            BASE + 0x5000,
            0xffff_ffff_8000_0000 + tables,
        )
    }

    #[test]
    fn text_that_leads_to_the_kernel_is_chosen() {
        let mut memory = kernel("6.1.0");
        memory.put(0x1_0000, text("6.1.0", 0x10_3000).as_bytes());
        memory.put(0x2_0000, text("5.4.0", 0x10_0000).as_bytes());
        memory.put(0x3_0000, text("6.1.0", 0x10_0000).as_bytes());
        let copy = text("6.1.0", 0x10_0000) + "CRASHTIME=5\n";
        memory.put(0x4_0000, copy.as_bytes());
        memory.put(0x5_0010, text("6.1.0", 0x10_0000).as_bytes());
        let found = scan(Machine::X86_64, &memory).unwrap();
        assert_eq!((found.at, found.info.get("CRASHTIME")), (PhysAddr(0x4_0000), Some("5")));
        let said = "the dump has no VMCOREINFO note; that of Linux 6.1.0 was found in its memory, at \
                    physical address 0x40000";
        assert_eq!(found.said(), said);
    }

    #[test]
    fn texts_that_lead_nowhere_are_better_than_none_and_are_told() {
        let mut memory = FakeMemory::new(0x20_0000);
        memory.put(0x1_0000, text("6.1.0", 0x10_0000).as_bytes());
        memory.put(0x2_0000, text("5.4.0", 0x10_0000).as_bytes());
        memory.put(0x3_0000, b"OSRELEASE=but not VMCOREINFO");
        let said = scan(Machine::X86_64, &memory).unwrap().said();
        assert!(said.contains("may be another kernel's. 1 more"), "{said}");
    }

    #[test]
    fn memory_without_any_is_an_error() {
        let error = scan(Machine::X86_64, &kernel("6.1.0")).err().unwrap();
        assert!(error.to_string().contains("no VMCOREINFO"), "{error}");
    }
}
