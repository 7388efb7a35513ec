//! `elfcorehdr`: the ELF headers in which the dead kernel describes its memory.
//!
//! kexec places them in the crash region; the kernel may have rewritten them since (memory and CPU
//! hotplug). Every field is an allegation: what is impossible is dropped with a message, and the
//! rest is dumped.
//!
//! Source: crashdump-elf.c of kexec-tools 2.0.25, kernel/kexec_file.c and fs/proc/vmcore.c of
//! kernel 6.1.

use core::fmt;

use format::note::{Note, Notes, VMCOREINFO};
use goblin::{elf32, elf64};

use crate::architecture::Architecture;
use crate::old::{ImageMapping, OldMemory, Range};
use crate::{Machine, OldPhys};

/// Most program headers that are read. The kernel writes at most
/// CONFIG_CRASH_MAX_MEMORY_RANGES (8192) and two per possible CPU.
pub const MAX_HEADERS: u64 = 65_536;

/// Most bytes of one PT_NOTE that are read: a per-CPU buffer is below 1 KiB, VMCOREINFO below 4 KiB.
pub const MAX_NOTE_BYTES: usize = 8 * 1024;

/// Program headers that are named on the console when they are dropped; a slow line would take
/// hours for those of a hostile `elfcorehdr`.
const NAMED_HEADERS: u64 = 8;
const FIRST_UNNAMED: u64 = NAMED_HEADERS + 1;

/// Why there is nothing that could be dumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// No `elfcorehdr=` that could be understood: kexec did not load this as a crash kernel.
    Missing,
    /// The headers lie outside of what the processor can address.
    OutsideAddressSpace,
    /// The headers cannot be read.
    Unreadable,
    /// The memory does not begin with an ELF header.
    NotElf,
    /// An ELF header of another kind: class, byte order, version or type.
    Foreign,
    /// Program headers of an impossible size.
    HeaderSize(u16),
    /// More program headers than any kernel writes.
    TooManyHeaders(u64),
    /// No memory is left after everything impossible was dropped.
    NoMemory,
    /// The dead kernel encrypted its memory (AMD SME), which this payload cannot read.
    Encrypted,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Missing => f.write_str("no elfcorehdr= on the command line: load with kexec -p"),
            Error::OutsideAddressSpace => {
                f.write_str("elfcorehdr lies outside of what the processor can address")
            }
            Error::Unreadable => f.write_str("elfcorehdr cannot be read"),
            Error::NotElf => f.write_str("no ELF header at elfcorehdr"),
            Error::Foreign => f.write_str("the header at elfcorehdr is not an ELF core's"),
            Error::HeaderSize(size) => write!(f, "elfcorehdr has program headers of {size} bytes"),
            Error::TooManyHeaders(count) => {
                write!(
                    f,
                    "elfcorehdr claims {count} program headers, at most {MAX_HEADERS} are read"
                )
            }
            Error::NoMemory => f.write_str("elfcorehdr describes no memory that could be dumped"),
            Error::Encrypted => f.write_str(
                "memory is encrypted (SME), which this payload cannot read: boot with mem_encrypt=off",
            ),
        }
    }
}

/// A program header of either class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct ProgramHeader {
    kind: u32,
    offset: u64,
    virt: u64,
    phys: u64,
    file_size: u64,
    memory_size: u64,
}

/// The headers of an `elfcorehdr` that was checked as a whole; each header is still an allegation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elfcorehdr {
    table: u64,
    count: u64,
    wide: bool,
    limit: u64,
    architecture: Architecture,
}

/// The fields of an ELF header that matter here, of either class.
struct FileHeader {
    kind: u16,
    table: u64,
    sections: u64,
    entry_size: u16,
    entries: u16,
}

impl Elfcorehdr {
    /// Checks the header at `at` of a kernel of `architecture`, whatever machine the header names.
    /// `limit` is the first address that the processor cannot address.
    ///
    /// # Errors
    /// [`Error`] when the header is none, or not one of a core.
    pub fn open(
        machine: &mut dyn Machine,
        architecture: Architecture,
        at: OldPhys,
        limit: u64,
    ) -> Result<Elfcorehdr, Error> {
        if at.0.checked_add(4096).is_none_or(|end| end > limit) {
            return Err(Error::OutsideAddressSpace);
        }
        let mut bytes = [0; elf64::header::SIZEOF_EHDR];
        machine.read_old(at, &mut bytes).map_err(|_| Error::Unreadable)?;
        if bytes[..4] != *b"\x7fELF" {
            return Err(Error::NotElf);
        }
        let wide = match bytes[4] {
            elf64::header::ELFCLASS64 => true,
            elf64::header::ELFCLASS32 => false,
            _ => return Err(Error::Foreign),
        };
        let header = FileHeader::read(&bytes, wide);
        if bytes[5] != 1 || bytes[6] != 1 || header.kind != elf64::header::ET_CORE {
            return Err(Error::Foreign);
        }
        let size = if wide { elf64::program_header::SIZEOF_PHDR } else { ELF32_PHDR };
        if usize::from(header.entry_size) != size {
            return Err(Error::HeaderSize(header.entry_size));
        }
        let count = match header.entries {
            0xffff => extended_count(machine, at, &header, limit, wide)?,
            count => u64::from(count),
        };
        if count > MAX_HEADERS {
            return Err(Error::TooManyHeaders(count));
        }
        let table = at.0.checked_add(header.table).ok_or(Error::OutsideAddressSpace)?;
        if table.checked_add(count * size as u64).is_none_or(|end| end > limit) {
            return Err(Error::OutsideAddressSpace);
        }
        Ok(Elfcorehdr { table, count, wide, limit, architecture })
    }

    /// The architecture of the dead kernel.
    #[must_use]
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Takes over into `old` everything in the headers that can be believed, VMCOREINFO first, and
    /// says on the console what was dropped and why.
    ///
    /// # Errors
    /// [`Error::NoMemory`] when nothing is left.
    pub fn collect(
        &self,
        machine: &mut dyn Machine,
        scratch: &mut [u8],
        old: &mut OldMemory,
    ) -> Result<(), Error> {
        self.each_note(machine, scratch, &mut |note| {
            if note.name == VMCOREINFO && old.vmcoreinfo.is_empty() {
                old.vmcoreinfo.set(note.desc);
            }
        });
        if old.vmcoreinfo.number("sme_mask").is_some_and(|mask| mask != 0) {
            return Err(Error::Encrypted);
        }
        self.take_ranges(machine, old);
        if old.ranges().is_empty() {
            return Err(Error::NoMemory);
        }
        self.take_image(machine, old);
        Ok(())
    }

    fn take_ranges(&self, machine: &mut dyn Machine, old: &mut OldMemory) {
        let mut corrected = false;
        self.each_load(machine, &mut |machine, index, load| {
            if self.image_address(load, old).is_some() {
                return;
            }
            let told = self.architecture.direct_map(&old.vmcoreinfo, load.phys);
            let virt = told.unwrap_or(load.virt);
            let (source, phys, size) = (OldPhys(load.offset), load.phys, load.file_size);
            let range = Range { source, phys, virt, size };
            let taken = take(machine, old, index, load, |old| old.add_range(range, self.limit));
            corrected |= taken && virt != load.virt;
        });
        if corrected {
            machine.say(format_args!("virtual addresses of memory corrected by VMCOREINFO"));
        }
    }

    fn take_image(&self, machine: &mut dyn Machine, old: &mut OldMemory) {
        self.each_load(machine, &mut |machine, index, load| {
            if let Some(virt) = self.image_address(load, old) {
                let ahead = self.architecture.unmapped_head(&old.vmcoreinfo, virt);
                let claim = ImageMapping {
                    virt: virt + ahead,
                    phys: load.offset.wrapping_add(ahead),
                    size: load.file_size.saturating_sub(ahead),
                };
                take(machine, old, index, load, |old| old.add_image(self.architecture, claim));
            }
        });
        if !old.image().is_empty() {
            return;
        }
        let derived = old.image_from_vmcoreinfo(self.architecture);
        match derived.map(|mapping| (mapping, old.add_image(self.architecture, mapping))) {
            Some((mapping, Ok(()))) => machine.say(format_args!(
                "kernel image mapping taken from VMCOREINFO: {:#x} at {:#x}, {} KiB",
                mapping.virt,
                mapping.phys,
                mapping.size >> 10
            )),
            _ => machine.say(format_args!("no mapping of the kernel image is known")),
        }
    }

    /// The virtual address of the kernel image, if that is what the header maps and not memory.
    fn image_address(&self, load: &ProgramHeader, old: &OldMemory) -> Option<u64> {
        self.architecture.image_address(&old.vmcoreinfo, self.wide, load.virt, load.offset)
    }

    /// Calls `each` with every note that a CPU or the kernel left, in the order of the headers.
    /// A CPU that never saved its registers has none.
    pub fn each_note(
        &self,
        machine: &mut dyn Machine,
        scratch: &mut [u8],
        each: &mut dyn FnMut(&Note<'_>),
    ) {
        for index in 0..self.count {
            if let Some(bytes) = self.notes(machine, index, scratch) {
                Notes::new(bytes).for_each(|note| each(&note));
            }
        }
    }

    /// The number of program headers.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The notes that program header `index` leads to, as much of them as fits into `scratch`: nothing when
    /// they cannot be read. `None` when it leads to none.
    pub fn notes<'s>(
        &self,
        machine: &mut dyn Machine,
        index: u64,
        scratch: &'s mut [u8],
    ) -> Option<&'s [u8]> {
        let header = self.header(machine, index)?;
        let end = header.offset.checked_add(header.file_size);
        if header.kind != elf64::program_header::PT_NOTE || end.is_none_or(|end| end > self.limit) {
            return None;
        }
        let size = usize::try_from(header.file_size).unwrap_or(usize::MAX).min(scratch.len());
        let bytes = &mut scratch[..size];
        let readable = machine.read_old(OldPhys(header.offset), bytes).is_ok();
        Some(if readable { bytes } else { &[] })
    }

    fn each_load(
        &self,
        machine: &mut dyn Machine,
        each: &mut dyn FnMut(&mut dyn Machine, u64, &ProgramHeader),
    ) {
        for index in 0..self.count {
            if let Some(header) = self.header(machine, index)
                && header.kind == elf64::program_header::PT_LOAD
            {
                each(machine, index, &header);
            }
        }
    }

    fn header(&self, machine: &mut dyn Machine, index: u64) -> Option<ProgramHeader> {
        let mut bytes = [0; elf64::program_header::SIZEOF_PHDR];
        let size = if self.wide { bytes.len() } else { ELF32_PHDR };
        let at = OldPhys(self.table + index * size as u64);
        machine.read_old(at, &mut bytes[..size]).ok()?;
        Some(if self.wide {
            let mut raw = elf64::program_header::ProgramHeader::default();
            plain::copy_from_bytes(&mut raw, &bytes).ok()?;
            ProgramHeader {
                kind: raw.p_type,
                offset: raw.p_offset,
                virt: raw.p_vaddr,
                phys: raw.p_paddr,
                file_size: raw.p_filesz,
                memory_size: raw.p_memsz,
            }
        } else {
            let mut raw = elf32::program_header::ProgramHeader::default();
            plain::copy_from_bytes(&mut raw, &bytes[..size]).ok()?;
            ProgramHeader {
                kind: raw.p_type,
                offset: raw.p_offset.into(),
                virt: raw.p_vaddr.into(),
                phys: raw.p_paddr.into(),
                file_size: raw.p_filesz.into(),
                memory_size: raw.p_memsz.into(),
            }
        })
    }
}

const ELF32_PHDR: usize = elf32::program_header::SIZEOF_PHDR;

impl FileHeader {
    fn read(bytes: &[u8; elf64::header::SIZEOF_EHDR], wide: bool) -> FileHeader {
        if wide {
            let raw = elf64::header::Header::from_bytes(bytes);
            FileHeader {
                kind: raw.e_type,
                table: raw.e_phoff,
                sections: raw.e_shoff,
                entry_size: raw.e_phentsize,
                entries: raw.e_phnum,
            }
        } else {
            let mut head = [0; elf32::header::SIZEOF_EHDR];
            head.copy_from_slice(&bytes[..elf32::header::SIZEOF_EHDR]);
            let raw = elf32::header::Header::from_bytes(&head);
            FileHeader {
                kind: raw.e_type,
                table: raw.e_phoff.into(),
                sections: raw.e_shoff.into(),
                entry_size: raw.e_phentsize,
                entries: raw.e_phnum,
            }
        }
    }
}

/// PN_XNUM: the real number of program headers is sh_info of section header 0.
fn extended_count(
    machine: &mut dyn Machine,
    at: OldPhys,
    header: &FileHeader,
    limit: u64,
    wide: bool,
) -> Result<u64, Error> {
    // sh_info lies 44 bytes into an Elf64_Shdr and 28 bytes into an Elf32_Shdr.
    let field = if wide { 44 } else { 28 };
    let info =
        at.0.checked_add(header.sections)
            .and_then(|section| section.checked_add(field))
            .filter(|info| info.checked_add(4).is_some_and(|end| end <= limit))
            .ok_or(Error::OutsideAddressSpace)?;
    let mut bytes = [0; 4];
    machine.read_old(OldPhys(info), &mut bytes).map_err(|_| Error::Unreadable)?;
    Ok(u32::from_le_bytes(bytes).into())
}

/// Takes over the claim of a header by `add`. One that it does not believe is counted and told.
/// Returns whether it was taken.
fn take(
    machine: &mut dyn Machine,
    old: &mut OldMemory,
    index: u64,
    load: &ProgramHeader,
    add: impl FnOnce(&mut OldMemory) -> Result<(), crate::old::Refused>,
) -> bool {
    // An empty PT_LOAD is odd but claims nothing.
    if load.file_size == 0 && load.memory_size == 0 {
        return false;
    }
    let Err(why) = add(old) else { return true };
    old.dropped += 1;
    match old.dropped {
        0..=NAMED_HEADERS => machine.say(format_args!(
            "program header {index} dropped (address {:#x}, physical {:#x}, size {:#x}): {why}",
            load.virt, load.offset, load.file_size
        )),
        FIRST_UNNAMED => machine.say(format_args!("more program headers dropped, not named")),
        _ => {}
    }
    false
}

#[cfg(test)]
#[path = "elfcorehdr_tests.rs"]
mod tests;
