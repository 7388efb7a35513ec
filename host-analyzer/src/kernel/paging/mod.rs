//! The kernel's page tables: virtual to physical, per architecture.

mod aarch64;
mod x86_64;

use crate::source::Memory;
use crate::{Error, PhysAddr, ReadError, VirtAddr, bytes};

use super::machine::Machine;
use super::vmcoreinfo::Vmcoreinfo;

pub use aarch64::{Arm64PageTables, Granule};
pub use x86_64::X86PageTables;

/// Where a virtual address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The physical address.
    pub phys: PhysAddr,
    /// How many bytes from it on the same leaf entry maps; at least one.
    pub length: u64,
}

/// An entry that a walk comes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// How many further levels of tables there can be below: 0 at the last one.
    pub level: u32,
    /// Where the entry lies.
    pub slot: PhysAddr,
    /// What it is.
    pub value: u64,
}

/// An architecture's page tables.
pub trait PageTables {
    /// Walks the tables for `at`, and calls `each` with every entry on the way, the last one included.
    ///
    /// # Errors
    /// [`ReadError::NotMapped`], or [`ReadError::NoPageTable`] when a table is not in the dump.
    fn walk(
        &self,
        memory: &dyn Memory,
        at: VirtAddr,
        each: &mut dyn FnMut(Entry),
    ) -> Result<Mapping, ReadError>;

    /// Where `at` leads.
    ///
    /// # Errors
    /// As [`PageTables::walk`].
    fn translate(&self, memory: &dyn Memory, at: VirtAddr) -> Result<Mapping, ReadError> {
        self.walk(memory, at, &mut |_| {})
    }

    /// Levels of tables.
    fn levels(&self) -> u32;

    /// Bytes that an entry maps, `level` levels above the last.
    fn span(&self, level: u32) -> u64;

    /// The lowest address that the tables may map, of those that are not below `at`.
    fn next_possible(&self, at: VirtAddr) -> VirtAddr;

    /// The physical address in an entry that is not absent, of a page or of the next table.
    fn target(&self, entry: u64) -> PhysAddr;

    /// The names of the attributes that are set in an entry that maps a page.
    fn attributes(&self, entry: u64) -> Vec<&'static str>;

    /// The tables of a process, whose top one is at `root`.
    fn of_process(&self, root: PhysAddr) -> Box<dyn PageTables>;

    /// The physical address of an address in the kernel's image (and in the direct map, where
    /// VMCOREINFO says where it is) by arithmetic alone; for dumps that lost their page tables.
    fn by_arithmetic(&self, at: VirtAddr) -> Option<PhysAddr>;
}

/// The tables that a kernel of this machine ran on, as VMCOREINFO describes them.
///
/// # Errors
/// [`Error::VmcoreinfoKey`] names the line that is missing or makes no sense.
pub fn for_kernel(machine: Machine, info: &Vmcoreinfo<'_>) -> Result<Box<dyn PageTables>, Error> {
    Ok(match machine {
        Machine::X86_64 => Box::new(X86PageTables::from_vmcoreinfo(info)?),
        Machine::Aarch64 => Box::new(Arm64PageTables::from_vmcoreinfo(info)?),
    })
}

fn read_entry(memory: &dyn Memory, at: PhysAddr) -> Option<u64> {
    memory.run(at, 8).ok().and_then(|run| bytes::u64_at(&run, 0))
}
