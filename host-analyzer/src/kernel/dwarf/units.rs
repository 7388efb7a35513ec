//! Compilation units: which one an address or an entry is in. Each is parsed once.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use gimli::{DebugAranges, DebugInfoOffset, Dwarf, EndianSlice, LittleEndian, Unit};

use crate::kernel::vmlinux::Vmlinux;

use super::Reader;

/// A unit that was parsed.
pub(super) type Known<'a> = Rc<Unit<Reader<'a>>>;

/// The units of a vmlinux.
pub(super) struct Units<'a> {
    pub(super) dwarf: Dwarf<Reader<'a>>,
    aranges: DebugAranges<Reader<'a>>,
    /// Address, length and unit of every range of addresses, sorted.
    ranges: OnceCell<Vec<(u64, u64, DebugInfoOffset)>>,
    /// Where each unit begins, sorted.
    starts: OnceCell<Vec<usize>>,
    known: RefCell<BTreeMap<usize, Known<'a>>>,
}

impl<'a> Units<'a> {
    pub(super) fn new(vmlinux: &'a Vmlinux) -> Units<'a> {
        let reader = |name: &str| EndianSlice::new(vmlinux.section(name), LittleEndian);
        let load = |id: gimli::SectionId| Ok::<_, gimli::Error>(reader(id.name()));
        Units {
            dwarf: Dwarf::load(load).unwrap_or_default(),
            aranges: DebugAranges::from(reader(".debug_aranges")),
            ranges: OnceCell::new(),
            starts: OnceCell::new(),
            known: RefCell::default(),
        }
    }

    /// The unit with the code at `pc`, an address as the vmlinux has it.
    pub(super) fn with_code(&self, pc: u64) -> gimli::Result<Option<Known<'a>>> {
        let ranges = self.ranges.get_or_init(|| self.read_aranges());
        let after = ranges.partition_point(|&(start, _, _)| start <= pc);
        let last = after.checked_sub(1).and_then(|index| ranges.get(index));
        match last {
            Some(&(start, length, at)) if pc - start < length => self.at(at.0).map(Some),
            _ => Ok(None),
        }
    }

    /// The unit with the entry at `offset` of .debug_info.
    pub(super) fn with_entry(&self, offset: usize) -> gimli::Result<Option<Known<'a>>> {
        let before = self.known.borrow().range(..=offset).next_back().map(|(_, it)| it.clone());
        let holds =
            |unit: &Known<'a>| DebugInfoOffset(offset).to_unit_offset(&unit.header).is_some();
        if let Some(unit) = before.filter(holds) {
            return Ok(Some(unit));
        }
        let starts = self.starts.get_or_init(|| self.read_starts());
        let after = starts.partition_point(|&start| start <= offset);
        let start = after.checked_sub(1).and_then(|index| starts.get(index));
        let unit = start.map(|&start| self.at(start)).transpose()?;
        Ok(unit.filter(holds))
    }

    fn at(&self, start: usize) -> gimli::Result<Known<'a>> {
        if let Some(known) = self.known.borrow().get(&start) {
            return Ok(known.clone());
        }
        let unit = Rc::new(self.dwarf.unit(self.dwarf.unit_header(DebugInfoOffset(start))?)?);
        self.known.borrow_mut().insert(start, unit.clone());
        Ok(unit)
    }

    /// What cannot be read is left out.
    fn read_aranges(&self) -> Vec<(u64, u64, DebugInfoOffset)> {
        let mut ranges = Vec::new();
        let mut headers = self.aranges.headers();
        while let Ok(Some(header)) = headers.next() {
            let mut entries = header.entries();
            while let Ok(Some(entry)) = entries.next() {
                ranges.push((entry.address(), entry.length(), header.debug_info_offset()));
            }
        }
        ranges.sort_unstable_by_key(|&(start, _, _)| start);
        ranges
    }

    fn read_starts(&self) -> Vec<usize> {
        let mut starts = Vec::new();
        let mut units = self.dwarf.units();
        while let Ok(Some(header)) = units.next() {
            starts.extend(header.debug_info_offset().map(|at| at.0));
        }
        starts
    }
}
