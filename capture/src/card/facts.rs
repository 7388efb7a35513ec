//! What is found out about the dead kernel before the card is written: where things are.
//!
//! Each part is an `Option`: what the kernel does not tell costs the lines that need it.

use core::ops::Range;

use crate::architecture::Architecture;
use crate::vmcoreinfo::Vmcoreinfo;

use super::btf::{self, Wanted};
use super::hidden::Hidden;
use super::kallsyms::Kallsyms;
use super::log::Log;
use super::memory::KernelMemory;
use super::orc;

/// A member of a structure of the kernel whose place is looked up in its types.
#[derive(Clone, Copy)]
#[repr(usize)]
pub enum Member {
    TaskPid,
    TaskComm,
    QueueCurrent,
    ModuleList,
    ModuleName,
    ModuleMemory,
    ModuleLayout,
    ModuleSymbols,
    ModuleArch,
    MemoryBase,
    MemorySize,
    LayoutBase,
    LayoutSize,
    SymbolTable,
    SymbolCount,
    SymbolNames,
    OrcIps,
    OrcEntries,
    OrcCount,
    RegistersRecord,
    RecordKind,
    ModuleObject,
    ObjectModule,
}

/// The names of them, in the same order.
const MEMBERS: [Wanted; 23] = [
    ("task_struct", "pid"),
    ("task_struct", "comm"),
    ("rq", "curr"),
    ("module", "list"),
    ("module", "name"),
    ("module", "mem"),
    ("module", "core_layout"),
    ("module", "kallsyms"),
    ("module", "arch"),
    ("module_memory", "base"),
    ("module_memory", "size"),
    ("module_layout", "base"),
    ("module_layout", "text_size"),
    ("mod_kallsyms", "symtab"),
    ("mod_kallsyms", "num_symtab"),
    ("mod_kallsyms", "strtab"),
    ("mod_arch_specific", "orc_unwind_ip"),
    ("mod_arch_specific", "orc_unwind"),
    ("mod_arch_specific", "num_orcs"),
    ("pt_regs", "stackframe"),
    ("frame_record_meta", "type"),
    ("module", "mkobj"),
    ("module_kobject", "mod"),
];

/// The symbols that are looked up.
const NAMES: [&str; 11] = [
    "__per_cpu_offset",
    "runqueues",
    "panic_cpu",
    "tainted_mask",
    "modules",
    "__start_BTF",
    "__stop_BTF",
    "__start_orc_unwind_ip",
    "__stop_orc_unwind_ip",
    "__start_orc_unwind",
    "_etext",
];

/// Where things are in the dead kernel.
pub struct Facts {
    /// Its symbol table.
    pub kallsyms: Option<Kallsyms>,
    /// What stands in for a symbol table that has functions only.
    pub hidden: Option<Hidden>,
    /// The image's code but for what ran at boot only; empty when it is not known.
    pub text: Range<u64>,
    /// Its log.
    pub log: Option<Log>,
    /// Its unwind tables (x86_64).
    pub orc: Option<orc::Table>,
    /// Where its types begin and end (BTF).
    pub types: Option<(u64, u64)>,
    /// The head of its list of modules.
    pub modules: Option<u64>,
    /// The table of where each CPU's own variables are.
    pub per_cpu: Option<u64>,
    /// The run queues, one for each CPU.
    pub run_queues: Option<u64>,
    /// Which CPU panicked (an atomic_t).
    pub panic_cpu: Option<u64>,
    /// The taint's bits (unsigned long).
    pub taint: Option<u64>,
    /// The bits that a kernel's address has set, and that a signed one may have clear (PAC, arm64).
    pub signature: u64,
    members: [Option<u32>; MEMBERS.len()],
}

impl Facts {
    /// Finds them.
    pub fn find(
        memory: &mut KernelMemory<'_>,
        architecture: Architecture,
        info: &Vmcoreinfo,
    ) -> Facts {
        let kallsyms = Kallsyms::find(memory, info);
        let mut found = kallsyms.map(|it| it.find_all(memory, &NAMES)).unwrap_or_default();
        let mut hidden = match found {
            // A table that has functions only, and among them the end of the code.
            [None, .., Some(text_end)] => Some(Hidden::find(memory, info, text_end)),
            _ => None,
        };
        if let Some(hidden) = hidden {
            let others = hidden.find_all(memory, &NAMES);
            found.iter_mut().zip(others).for_each(|(slot, other)| *slot = slot.or(other));
        }
        let [
            per_cpu,
            run_queues,
            panic_cpu,
            taint,
            modules,
            types,
            types_end,
            ips,
            ips_end,
            entries,
            text_end,
        ] = found;
        let types = types.zip(types_end);
        let members = match types {
            Some(section) => {
                let is_hidden = hidden.is_some();
                let enough = |found: &_| is_enough(architecture, is_hidden, found);
                btf::offsets(memory, section, &MEMBERS, &enough)
            }
            None => [None; MEMBERS.len()],
        };
        let member =
            |member: Member| members.get(member as usize).copied().flatten().map(u64::from);
        let link = member(Member::ModuleList);
        let itself = member(Member::ModuleObject)
            .zip(member(Member::ObjectModule))
            .and_then(|(object, module)| object.checked_add(module));
        let modules = match (&mut hidden, link, itself) {
            (Some(hidden), Some(link), Some(itself)) if modules.is_none() => {
                hidden.find_modules(memory, link, itself)
            }
            _ => modules,
        };
        let orc = match (architecture, ips.zip(ips_end), entries) {
            (Architecture::X86_64, Some(ips), Some(entries)) => {
                orc::Table::of_image(memory, ips, entries)
            }
            _ => None,
        };
        Facts {
            kallsyms,
            hidden,
            text: info.symbol("_stext").unwrap_or(0)..text_end.unwrap_or(0),
            log: Log::find(memory, info),
            orc,
            types,
            modules,
            per_cpu,
            run_queues,
            panic_cpu,
            taint,
            signature: signature(info),
            members,
        }
    }

    /// Finds the addresses of `names`, each into the slot of the same index.
    pub fn find_all<const N: usize>(
        &self,
        memory: &mut KernelMemory<'_>,
        names: &[&str; N],
    ) -> [Option<u64>; N] {
        let mut found = match self.kallsyms {
            Some(table) => table.find_all(memory, names),
            None => [None; N],
        };
        if let Some(hidden) = self.hidden {
            let others = hidden.find_all(memory, names);
            found.iter_mut().zip(others).for_each(|(slot, other)| *slot = slot.or(other));
        }
        found
    }

    /// Where a member lies in its structure, in bytes.
    pub fn member(&self, member: Member) -> Option<u64> {
        self.members.get(member as usize).copied().flatten().map(u64::from)
    }
}

/// Whether all members are known that this kernel can have: on x86_64 those of modules' text as it is
/// from 6.4 on, or as it was. An arm64 kernel may have all of the others and no kinds of records. Where a
/// module points to itself matters only when the list of them has no symbol.
fn is_enough(
    architecture: Architecture,
    is_hidden: bool,
    found: &[Option<u32>; MEMBERS.len()],
) -> bool {
    use Member::*;
    let has = |members: &[Member]| {
        members.iter().all(|&member| found.get(member as usize).is_some_and(Option::is_some))
    };
    let text = has(&[ModuleMemory, MemoryBase, MemorySize])
        || has(&[ModuleLayout, LayoutBase, LayoutSize]);
    let rest = match architecture {
        Architecture::X86_64 => has(&[ModuleArch, OrcIps, OrcEntries, OrcCount]),
        Architecture::Aarch64 => has(&[RegistersRecord, RecordKind]),
    };
    let module =
        has(&[ModuleList, ModuleName, ModuleSymbols, SymbolTable, SymbolCount, SymbolNames]);
    let hidden = !is_hidden || has(&[ModuleObject, ObjectModule]);
    text && rest && module && hidden && has(&[TaskPid, TaskComm, QueueCurrent])
}

/// The kernel's mask covers all bits that are not translated (arch/arm64/include/asm/pointer_auth.h,
/// 6.12). One of 0 says that it does not sign; where there is none, addresses are as wide as TCR_EL1
/// says.
fn signature(info: &Vmcoreinfo) -> u64 {
    let by_width = || {
        let bits = 64u32.checked_sub(u32::try_from(info.number("TCR_EL1_T1SZ")?).ok()?)?;
        u64::MAX.checked_shl(bits)
    };
    let mask = info.number("KERNELPACMASK").map(|mask| mask as u64);
    mask.or_else(by_width).unwrap_or(0)
}
