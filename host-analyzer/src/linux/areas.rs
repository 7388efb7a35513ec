//! The memory areas of a process: what it has mapped where.

use std::collections::HashSet;

use crate::kernel::Kernel;
use crate::{Error, ReadContext, ReadError, VirtAddr, bytes};

/// More areas than a process may have (vm.max_map_count is 65530 unless somebody raised it).
const MAX_AREAS: usize = 1 << 22;
/// More levels than a maple tree has: 16 slots each, so 10 levels hold all of them.
const MAX_DEPTH: u32 = 16;

/// A memory area (struct vm_area_struct).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Address of the structure.
    pub address: VirtAddr,
    /// First address of the area.
    pub start: u64,
    /// The first address after it.
    pub end: u64,
    /// vm_flags.
    pub flags: u64,
    /// The struct file that is mapped; null for anonymous memory.
    pub file: VirtAddr,
}

/// The areas of a process, and what could not be read.
#[derive(Clone, Debug, Default)]
pub struct Areas {
    /// The areas in ascending order.
    pub list: Vec<Area>,
    /// What is missing, one sentence each.
    pub problems: Vec<String>,
}

/// Where the members of the structures lie.
pub struct AreaLayout {
    start: u64,
    end: u64,
    flags: u64,
    file: u64,
    tree: Tree,
}

/// How the areas of a process are kept.
enum Tree {
    /// A list: mm_struct.mmap and vm_area_struct.vm_next (to 6.0).
    List { first: u64, next: u64 },
    /// A maple tree: mm_struct.mm_mt (6.1 on).
    Maple(Maple),
}

/// Where things lie in a maple tree (include/linux/maple_tree.h, 6.1 and 6.12), in bytes.
struct Maple {
    /// In struct mm_struct.
    root: u64,
    /// Pivots (offset, number) and slots (offset, number) of nodes for ranges, and of those with gaps.
    range: Node,
    gaps: Node,
}

#[derive(Clone, Copy)]
struct Node {
    pivots: (u64, usize),
    slots: (u64, usize),
}

impl AreaLayout {
    /// Looks the members up in the kernel's types.
    ///
    /// # Errors
    /// [`Error::NoMember`], [`Error::NoTypes`].
    pub fn new(kernel: &Kernel<'_>) -> Result<AreaLayout, Error> {
        let area = "vm_area_struct";
        let tree = match kernel.field("mm_struct", "mm_mt")? {
            Some(_) => Tree::Maple(Maple::new(kernel)?),
            None => Tree::List {
                first: kernel.offset("mm_struct", "mmap")?,
                next: kernel.offset(area, "vm_next")?,
            },
        };
        Ok(AreaLayout {
            start: kernel.offset(area, "vm_start")?,
            end: kernel.offset(area, "vm_end")?,
            flags: kernel.offset(area, "vm_flags")?,
            file: kernel.offset(area, "vm_file")?,
            tree,
        })
    }

    /// The areas of the address space `space`, the address of a struct mm_struct.
    ///
    /// # Errors
    /// [`Error::Read`] when not even the first one can be found.
    pub fn read(&self, kernel: &Kernel<'_>, space: VirtAddr) -> Result<Areas, Error> {
        let mut areas = Areas::default();
        let addresses = match &self.tree {
            Tree::List { first, next } => {
                let first = kernel.memory().pointer(space.offset(*first));
                let walk = super::list::chain(kernel.memory(), first.reading("the areas")?, *next);
                areas.problems.extend(walk.broken);
                walk.nodes
            }
            Tree::Maple(maple) => {
                let root = kernel.memory().u64(space.offset(maple.root)).reading("the areas")?;
                let mut walk =
                    MapleWalk { kernel, maple, seen: HashSet::new(), entries: Vec::new() };
                walk.entry(root, (0, u64::MAX), 0, &mut areas.problems);
                walk.entries
            }
        };
        for address in addresses {
            match self.area(kernel, address) {
                Ok(area) => areas.list.push(area),
                Err(error) => areas.problems.push(format!("area {address:#x}: {error}")),
            }
        }
        Ok(areas)
    }

    fn area(&self, kernel: &Kernel<'_>, address: VirtAddr) -> Result<Area, ReadError> {
        let word = |offset| kernel.memory().u64(address.offset(offset));
        let (start, end) = (word(self.start)?, word(self.end)?);
        let (flags, file) = (word(self.flags)?, VirtAddr(word(self.file)?));
        Ok(Area { address, start, end, flags, file })
    }
}

impl Maple {
    fn new(kernel: &Kernel<'_>) -> Result<Maple, Error> {
        let node = |kind: &str| {
            let array = |member: &str| {
                let missing = || Error::NoMember(format!("struct {kind} with member {member}"));
                let field = kernel.field(kind, member)?.ok_or_else(missing)?;
                let count = kernel.types()?.array_of(field.kind).ok_or_else(missing)?.1;
                Ok::<_, Error>((field.offset as u64, count.min(64)))
            };
            Ok::<_, Error>(Node { pivots: array("pivot")?, slots: array("slot")? })
        };
        Ok(Maple {
            root: kernel.offset("mm_struct", "mm_mt.ma_root")?,
            range: node("maple_range_64")?,
            gaps: node("maple_arange_64")?,
        })
    }
}

struct MapleWalk<'a, 'd> {
    kernel: &'a Kernel<'d>,
    maple: &'a Maple,
    seen: HashSet<u64>,
    entries: Vec<VirtAddr>,
}

impl MapleWalk<'_, '_> {
    /// What an entry leads to, which stands for the indices `min` to `max`.
    fn entry(
        &mut self,
        entry: u64,
        (min, max): (u64, u64),
        depth: u32,
        problems: &mut Vec<String>,
    ) {
        // Internal entries have 2 in their lower bits, small ones are reserved (xa_is_node).
        let is_node = entry & 3 == 2 && entry > 4096;
        if !is_node {
            if entry & 3 == 0 && entry != 0 {
                self.entries.push(VirtAddr(entry));
            }
            return;
        }
        let too_many = depth > MAX_DEPTH || self.entries.len() >= MAX_AREAS;
        if too_many || !self.seen.insert(entry) {
            problems.push(format!("the tree of areas runs in a circle at {entry:#x}"));
            return;
        }
        // Nodes are aligned to 256 bytes; bits 3 to 6 of a pointer to one say of what kind it is.
        let (at, kind) = (VirtAddr(entry & !0xff), entry >> 3 & 0xf);
        let node = match kind {
            1 | 2 => self.maple.range,
            3 => self.maple.gaps,
            _ => {
                problems.push(format!("a node of areas is of the unknown kind {kind}"));
                return;
            }
        };
        let read = |(offset, count): (u64, usize)| {
            self.kernel.memory().bytes(at.offset(offset), count * 8)
        };
        let (pivots, slots) = match (read(node.pivots), read(node.slots)) {
            (Ok(pivots), Ok(slots)) => (pivots.into_owned(), slots.into_owned()),
            (Err(error), _) | (_, Err(error)) => {
                problems.push(format!("areas from {min:#x} to {max:#x}: {error}"));
                return;
            }
        };
        let mut first = min;
        for index in 0..node.slots.1 {
            // The last slot in use has no pivot, a pivot of 0, or one that is the end of the node.
            let pivot = bytes::u64_at(&pivots, index * 8).filter(|&it| it != 0 || index == 0);
            let last = pivot.unwrap_or(max).min(max);
            let slot = bytes::u64_at(&slots, index * 8).unwrap_or(0);
            self.entry(slot, (first, last), depth + 1, problems);
            if last >= max {
                break;
            }
            first = last + 1;
        }
    }
}
