//! Registers of callers, by call frame information (DWARF 5, 6.4): `.debug_frame`.

use std::cell::OnceCell;

use gimli::{
    BaseAddresses, CfaRule, CieOrFde, DebugFrame, DebugFrameOffset, EndianSlice, LittleEndian,
    Register, RegisterRule, UnwindContext, UnwindSection, UnwindTableRow, Vendor,
};

use crate::VirtAddr;
use crate::kernel::machine::Machine;
use crate::kernel::registers::{Registers, is_kept, stack_pointer};
use crate::kernel::virt::VirtualMemory;
use crate::kernel::vmlinux::Vmlinux;

use super::Reader;

/// Call frame information of a vmlinux.
pub(super) struct CallFrames<'a> {
    section: DebugFrame<Reader<'a>>,
    bases: BaseAddresses,
    /// Start, end, and where it is described, of every function, sorted.
    functions: OnceCell<Vec<(u64, u64, DebugFrameOffset)>>,
}

/// What leads from a frame to its caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// The canonical frame address: the stack pointer before the call.
    pub cfa: u64,
    /// The caller's registers, as far as they are known.
    pub registers: Registers,
    /// Where on the stack the return address is.
    pub slot: Option<VirtAddr>,
    /// The return address itself, where it is in a register.
    pub link: Option<u64>,
}

impl<'a> CallFrames<'a> {
    pub(super) fn new(vmlinux: &'a Vmlinux) -> CallFrames<'a> {
        let data = vmlinux.section(".debug_frame");
        let mut section = DebugFrame::from(EndianSlice::new(data, LittleEndian));
        section.set_address_size(8);
        // Both architectures' tables: the one rule of arm64's own says whether x30 is signed.
        section.set_vendor(Vendor::AArch64);
        CallFrames { section, bases: BaseAddresses::default(), functions: OnceCell::new() }
    }

    /// The caller of a function at `pc` (as the vmlinux has it) with these registers. `None` when nothing
    /// is said of that address, or the registers that it takes are not known.
    pub(super) fn caller(
        &self,
        machine: Machine,
        memory: &VirtualMemory<'_>,
        pc: u64,
        registers: &Registers,
    ) -> Option<Caller> {
        let functions = self.functions.get_or_init(|| self.read_functions());
        let after = functions.partition_point(|&(start, _, _)| start <= pc);
        let &(_, end, at) = functions.get(after.checked_sub(1)?)?;
        if pc >= end {
            return None;
        }
        let cie = |section: &DebugFrame<_>, bases: &_, at| section.cie_from_offset(bases, at);
        let entry = self.section.fde_from_offset(&self.bases, at, cie).ok()?;
        let mut context = UnwindContext::new();
        let row =
            entry.unwind_info_for_address(&self.section, &self.bases, &mut context, pc).ok()?;
        apply(row, entry.cie().return_address_register(), machine, memory, registers)
    }

    fn read_functions(&self) -> Vec<(u64, u64, DebugFrameOffset)> {
        let mut functions = Vec::new();
        let mut entries = self.section.entries(&self.bases);
        while let Ok(Some(entry)) = entries.next() {
            let CieOrFde::Fde(partial) = entry else { continue };
            let cie = |section: &DebugFrame<_>, bases: &_, at| section.cie_from_offset(bases, at);
            if let Ok(entry) = partial.parse(cie) {
                let at = DebugFrameOffset(entry.offset());
                functions.push((entry.initial_address(), entry.end_address(), at));
            }
        }
        functions.sort_unstable_by_key(|&(start, _, _)| start);
        functions
    }
}

fn apply(
    row: &UnwindTableRow<usize>,
    link: Register,
    machine: Machine,
    memory: &VirtualMemory<'_>,
    registers: &Registers,
) -> Option<Caller> {
    // Expressions occur in hand-written code only.
    let CfaRule::RegisterAndOffset { register, offset } = *row.cfa() else { return None };
    let cfa = registers.get(register.0)?.wrapping_add_signed(offset);
    let slot = |offset: i64| VirtAddr(cfa.wrapping_add_signed(offset));
    let value = |number: u16| match row.register(Register(number)) {
        Some(RegisterRule::Offset(offset)) => memory.u64(slot(offset)).ok(),
        Some(RegisterRule::ValOffset(offset)) => Some(slot(offset).0),
        Some(RegisterRule::Register(other)) => registers.get(other.0),
        Some(RegisterRule::SameValue) => registers.get(number),
        // Nothing said: unchanged, for those that a function must give back.
        None if is_kept(machine, number) => registers.get(number),
        _ => None,
    };
    let mut known: Registers =
        (0..32).filter(|&it| it != link.0).filter_map(|it| Some((it, value(it)?))).collect();
    known.set(stack_pointer(machine), cfa);
    let (slot, link) = match row.register(link) {
        Some(RegisterRule::Offset(offset)) => (Some(slot(offset)), None),
        None | Some(RegisterRule::SameValue) => (None, registers.get(link.0)),
        _ => (None, None),
    };
    Some(Caller { cfa, registers: known, slot, link })
}
