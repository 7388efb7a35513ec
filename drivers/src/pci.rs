//! PCI: finding functions, their capabilities and their registers.
//!
//! Source: PCI Local Bus Specification 3.0, chapter 6; PCI Express Base Specification 4.0, 7.5.

use core::fmt;

use crate::mmio::{Mmio, Registers};
use crate::{PhysAddr, Physical};

/// Configuration space offsets.
mod register {
    pub const ID: u16 = 0x00;
    pub const COMMAND: u16 = 0x04;
    pub const CLASS: u16 = 0x08;
    pub const HEADER_TYPE: u16 = 0x0c;
    pub const BAR0: u16 = 0x10;
    pub const CAPABILITIES: u16 = 0x34;
}

const COMMAND_MEMORY: u32 = 1 << 1;
const COMMAND_BUS_MASTER: u32 = 1 << 2;
const COMMAND_INTERRUPTS_OFF: u32 = 1 << 10;
const STATUS_CAPABILITIES: u32 = 1 << 20;

/// A capability list that is longer runs in circles: 48 is what fits into 192 bytes.
const MAX_CAPABILITIES: usize = 48;

/// Address of a PCI function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Function {
    /// Segment group.
    pub segment: u16,
    /// Bus number.
    pub bus: u8,
    /// Device number, below 32.
    pub device: u8,
    /// Function number, below 8.
    pub function: u8,
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Function { segment, bus, device, function } = self;
        write!(f, "{segment:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

/// Access to configuration space, by whatever means the machine has.
pub trait ConfigSpace {
    /// Reads the aligned word at `offset`; all ones where nothing answers.
    fn read(&self, at: Function, offset: u16) -> u32;

    /// Writes the aligned word at `offset`.
    fn write(&self, at: Function, offset: u16, value: u32);

    /// The buses that can be reached: segment, first bus, last bus.
    fn buses(&self) -> (u16, u8, u8);
}

/// Memory-mapped configuration space (ECAM), one function of 4 KiB mapped at a time.
pub struct Ecam<'a, M: MapPage> {
    /// The range as firmware describes it.
    pub range: crate::firmware::EcamRange,
    /// How to reach it.
    pub pages: &'a M,
}

/// Maps single pages of device registers for a moment.
pub trait MapPage {
    /// Maps the page of registers at `at` and calls `with` with it. `None` when it cannot be
    /// mapped. Not to be nested.
    fn with_page<T>(&self, at: PhysAddr, with: impl FnOnce(&Mmio) -> T) -> Option<T>;
}

impl<M: MapPage> Ecam<'_, M> {
    fn page(&self, at: Function) -> Option<PhysAddr> {
        let range = &self.range;
        let inside =
            at.segment == range.segment && (range.first_bus..=range.last_bus).contains(&at.bus);
        let function =
            u64::from(at.bus) << 20 | u64::from(at.device) << 15 | u64::from(at.function) << 12;
        inside.then(|| PhysAddr(range.base.0.wrapping_add(function)))
    }
}

impl<M: MapPage> ConfigSpace for Ecam<'_, M> {
    fn read(&self, at: Function, offset: u16) -> u32 {
        self.page(at)
            .and_then(|page| self.pages.with_page(page, |page| page.read32(offset.into())))
            .unwrap_or(u32::MAX)
    }

    fn write(&self, at: Function, offset: u16, value: u32) {
        if let Some(page) = self.page(at) {
            self.pages.with_page(page, |page| page.write32(offset.into(), value));
        }
    }

    fn buses(&self) -> (u16, u8, u8) {
        (self.range.segment, self.range.first_bus, self.range.last_bus)
    }
}

/// Calls `each` with every function on every bus.
pub fn each_function(config: &dyn ConfigSpace, each: &mut dyn FnMut(Function)) {
    let (segment, first, last) = config.buses();
    for bus in first..=last {
        for device in 0..32 {
            let at = |function| Function { segment, bus, device, function };
            if !present(config, at(0)) {
                continue;
            }
            each(at(0));
            let multi = config.read(at(0), register::HEADER_TYPE) & 1 << 23 != 0;
            for function in 1..if multi { 8 } else { 1 } {
                if present(config, at(function)) {
                    each(at(function));
                }
            }
        }
    }
}

fn present(config: &dyn ConfigSpace, at: Function) -> bool {
    config.read(at, register::ID) as u16 != u16::MAX
}

/// What a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class and subclass: 0x0604 is a bridge to another PCI bus.
    pub class: u16,
}

/// Reads what the function is.
#[must_use]
pub fn identity(config: &dyn ConfigSpace, at: Function) -> Identity {
    let id = config.read(at, register::ID);
    let class = (config.read(at, register::CLASS) >> 16) as u16;
    Identity { vendor: id as u16, device: (id >> 16) as u16, class }
}

/// Lets the function answer to its memory registers, and be bus master or not. Interrupts stay off.
pub fn enable(config: &dyn ConfigSpace, at: Function, bus_master: bool) {
    let command = config.read(at, register::COMMAND) & 0xffff;
    let command = (command | COMMAND_MEMORY | COMMAND_INTERRUPTS_OFF) & !COMMAND_BUS_MASTER;
    let master = if bus_master { COMMAND_BUS_MASTER } else { 0 };
    // The upper half is status, where writing ones would clear bits: write zeros.
    config.write(at, register::COMMAND, command | master);
}

/// Takes the bus from a function that nobody shut down, so that it writes to memory no more.
/// Bridges keep theirs: what lies behind them needs it.
pub fn stop_bus_master(config: &dyn ConfigSpace, at: Function) {
    if config.read(at, register::HEADER_TYPE) >> 16 & 0x7f == 0 {
        let command = config.read(at, register::COMMAND) & 0xffff;
        config.write(at, register::COMMAND, command & !COMMAND_BUS_MASTER);
    }
}

/// Calls `each` with id and offset of every capability of the function, until it gives a value.
pub fn find_capability<T>(
    config: &dyn ConfigSpace,
    at: Function,
    each: &mut dyn FnMut(u8, u16) -> Option<T>,
) -> Option<T> {
    if config.read(at, register::COMMAND) & STATUS_CAPABILITIES == 0 {
        return None;
    }
    let mut next = config.read(at, register::CAPABILITIES) as u16 & 0xfc;
    for _ in 0..MAX_CAPABILITIES {
        if next < 0x40 {
            return None;
        }
        let word = config.read(at, next);
        if let Some(found) = each(word as u8, next) {
            return Some(found);
        }
        next = (word >> 8) as u16 & 0xfc;
    }
    None
}

/// Address of the memory registers in BAR `index`; `None` when it is unassigned or in port space.
#[must_use]
pub fn memory_bar(config: &dyn ConfigSpace, at: Function, index: u8) -> Option<PhysAddr> {
    if index > 5 {
        return None;
    }
    let offset = register::BAR0 + 4 * u16::from(index);
    let low = config.read(at, offset);
    let high = match low & 0b111 {
        0b000 => 0,
        0b100 if index < 5 => config.read(at, offset + 4),
        _ => return None,
    };
    let address = u64::from(high) << 32 | u64::from(low & !0xf);
    (address != 0 && low != u32::MAX).then_some(PhysAddr(address))
}

/// Maps `size` bytes at `offset` of the registers in BAR `index`.
pub fn map_bar(
    config: &dyn ConfigSpace,
    physical: &dyn Physical,
    at: Function,
    index: u8,
    offset: u64,
    size: u64,
) -> Option<Mmio> {
    let base = memory_bar(config, at, index)?;
    if !offset.is_multiple_of(4) {
        return None;
    }
    physical.map_device(PhysAddr(base.0.checked_add(offset)?), size)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use core::cell::RefCell;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    /// Configuration space with one function; what was never set reads as zero.
    pub struct FakeConfig {
        pub at: Function,
        pub words: RefCell<BTreeMap<u16, u32>>,
    }

    pub const AT: Function = Function { segment: 0, bus: 0, device: 3, function: 0 };

    impl FakeConfig {
        pub fn new(words: &[(u16, u32)]) -> FakeConfig {
            FakeConfig { at: AT, words: RefCell::new(words.iter().copied().collect()) }
        }
    }

    impl ConfigSpace for FakeConfig {
        fn read(&self, at: Function, offset: u16) -> u32 {
            if at != self.at {
                return u32::MAX;
            }
            self.words.borrow().get(&offset).copied().unwrap_or(0)
        }

        fn write(&self, at: Function, offset: u16, value: u32) {
            if at == self.at {
                self.words.borrow_mut().insert(offset, value);
            }
        }

        fn buses(&self) -> (u16, u8, u8) {
            (0, 0, 1)
        }
    }

    #[test]
    fn only_what_answers_is_enumerated() {
        let config = FakeConfig::new(&[(0, 0x1042_1af4), (8, 0x0100_0001)]);
        let mut found = Vec::new();
        each_function(&config, &mut |at| found.push(at));
        assert_eq!(found, [AT]);
        let expected = Identity { vendor: 0x1af4, device: 0x1042, class: 0x0100 };
        assert_eq!(identity(&config, AT), expected);
    }

    #[test]
    fn capability_list_that_runs_in_circles_ends() {
        let config = FakeConfig::new(&[(4, 1 << 20), (0x34, 0x40), (0x40, 0x5009), (0x50, 0x4009)]);
        let mut seen = 0;
        let none = find_capability(&config, AT, &mut |id, _| {
            assert_eq!(id, 9);
            seen += 1;
            None::<()>
        });
        assert_eq!((none, seen), (None, MAX_CAPABILITIES));
    }

    #[test]
    fn bars_of_both_sizes_are_read_and_ports_and_unassigned_ones_are_not() {
        let config = FakeConfig::new(&[
            (0x10, 0xfeb0_0000),
            (0x14, 0xc041),
            (0x18, 0x0000_000c),
            (0x1c, 0x38),
            (0x20, 0),
        ]);
        assert_eq!(memory_bar(&config, AT, 0), Some(PhysAddr(0xfeb0_0000)));
        assert_eq!(memory_bar(&config, AT, 1), None, "ports");
        assert_eq!(memory_bar(&config, AT, 2), Some(PhysAddr(0x38_0000_0000)));
        assert_eq!(memory_bar(&config, AT, 4), None, "unassigned");
        assert_eq!(memory_bar(&config, AT, 6), None, "no such BAR");
    }

    #[test]
    fn bus_mastering_is_taken_from_functions_and_left_to_bridges() {
        let config = FakeConfig::new(&[(4, 0x0010_0507)]);
        stop_bus_master(&config, AT);
        assert_eq!(config.read(AT, 4), 0x0503);
        let bridge = FakeConfig::new(&[(4, 0x0010_0507), (0xc, 0x0001_0000)]);
        stop_bus_master(&bridge, AT);
        assert_eq!(bridge.read(AT, 4), 0x0010_0507);
    }
}
