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

/// An architecture's page tables.
pub trait PageTables {
    /// Walks the tables for `at`.
    ///
    /// # Errors
    /// [`ReadError::NotMapped`], or [`ReadError::NoPageTable`] when a table is not in the dump.
    fn translate(&self, memory: &dyn Memory, at: VirtAddr) -> Result<Mapping, ReadError>;

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
