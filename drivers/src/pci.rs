//! PCI: finding functions, their capabilities and their registers.
//!
//! Source: PCI Local Bus Specification 3.0, chapter 6; PCI Express Base Specification 4.0, 7.5.

mod bar;

use core::fmt;

pub use bar::{BarError, map_bar};

use crate::PhysAddr;
use crate::firmware::{PciHost, Window};
use crate::mmio::{Mmio, Registers};

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

/// Capabilities of interrupts that are sent as messages, and the bits that allow them, in the word that the
/// capability begins with (PCI 3.0, 6.8.1.3 and 6.8.2.3).
const CAPABILITY_MSI: u8 = 0x05;
const CAPABILITY_MSI_X: u8 = 0x11;
const MSI_ENABLE: u32 = 1 << 16;
const MSI_X_ENABLE: u32 = 1 << 31;

/// Where extended capabilities begin; that of virtual functions, its control register and the bit there that
/// makes them exist (PCIe 4.0, 7.6.3 and 9.3.3).
const EXTENDED: u16 = 0x100;
const EXTENDED_SR_IOV: u16 = 0x0010;
const SR_IOV_CONTROL: u16 = 0x08;
const VF_ENABLE: u32 = 1 << 0;

/// A list of extended capabilities that is longer runs in circles: these fit into 3840 bytes.
const MAX_EXTENDED: usize = 480;

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

    /// Where the processor sees the memory behind the host bridge. When that is not known there are
    /// none, and addresses on the bus are the processor's.
    fn windows(&self) -> &[Window] {
        &[]
    }
}

/// Memory-mapped configuration space (ECAM), one function of 4 KiB mapped at a time.
pub struct Ecam<'a, M: MapPage> {
    /// The host bridge as firmware describes it.
    pub host: &'a PciHost,
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
        let range = &self.host.ecam;
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
            self.pages.with_page(page, |page| {
                page.write32(offset.into(), value);
                // Configuration writes must have arrived before anything that relies on them, and
                // device memory may post them (PCI Express Base 4.0, 2.4.1): a read waits for it.
                page.read32(offset.into())
            });
        }
    }

    fn buses(&self) -> (u16, u8, u8) {
        let range = &self.host.ecam;
        (range.segment, range.first_bus, range.last_bus)
    }

    fn windows(&self) -> &[Window] {
        &self.host.windows
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
    /// Programming interface: which kind of its class it is.
    pub interface: u8,
}

/// Reads what the function is.
#[must_use]
pub fn identity(config: &dyn ConfigSpace, at: Function) -> Identity {
    let id = config.read(at, register::ID);
    let class = config.read(at, register::CLASS);
    let (class, interface) = ((class >> 16) as u16, (class >> 8) as u8);
    Identity { vendor: id as u16, device: (id >> 16) as u16, class, interface }
}

/// Lets the function answer to its memory registers, and be bus master or not. Interrupts stay off.
pub fn enable(config: &dyn ConfigSpace, at: Function, bus_master: bool) {
    let command = config.read(at, register::COMMAND) & 0xffff;
    let command = (command | COMMAND_MEMORY | COMMAND_INTERRUPTS_OFF) & !COMMAND_BUS_MASTER;
    let master = if bus_master { COMMAND_BUS_MASTER } else { 0 };
    // The upper half is status, where writing ones would clear bits: write zeros.
    config.write(at, register::COMMAND, command | master);
}

/// Takes the bus from a function that nobody shut down, so that it writes to memory no more, and from its
/// virtual functions, which have no id to be found by. Bridges keep theirs: what lies behind them needs it.
pub fn stop_bus_master(config: &dyn ConfigSpace, at: Function) {
    stop_virtual_functions(config, at);
    if config.read(at, register::HEADER_TYPE) >> 16 & 0x7f == 0 {
        let command = config.read(at, register::COMMAND) & 0xffff;
        config.write(at, register::COMMAND, command & !COMMAND_BUS_MASTER);
    }
}

fn stop_virtual_functions(config: &dyn ConfigSpace, at: Function) {
    let mut next = EXTENDED;
    for _ in 0..MAX_EXTENDED {
        let word = config.read(at, next);
        // Nothing here, or a function without extended capabilities.
        if matches!(word, 0 | u32::MAX) {
            return;
        }
        if word as u16 == EXTENDED_SR_IOV && next <= 0xff0 {
            // The upper half is status, where writing ones would clear bits.
            let control = config.read(at, next + SR_IOV_CONTROL) & 0xffff;
            if control & VF_ENABLE != 0 {
                config.write(at, next + SR_IOV_CONTROL, control & !VF_ENABLE);
            }
        }
        next = (word >> 20) as u16 & 0xffc;
        if next < EXTENDED {
            return;
        }
    }
}

/// Takes from a function the interrupts that it sends as messages, which the dead kernel allowed. To be
/// called before it is bus master again.
pub fn stop_messages(config: &dyn ConfigSpace, at: Function) {
    find_capability(config, at, &mut |id, offset| {
        let enable = match id {
            CAPABILITY_MSI => MSI_ENABLE,
            CAPABILITY_MSI_X => MSI_X_ENABLE,
            _ => return None::<()>,
        };
        let word = config.read(at, offset);
        config.write(at, offset, word & !enable);
        None
    });
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::firmware::EcamRange;
    use core::cell::{Cell, RefCell};
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
        let expected = Identity { vendor: 0x1af4, device: 0x1042, class: 0x0100, interface: 0 };
        assert_eq!(identity(&config, AT), expected);
    }

    /// Remembers which page was asked for, and has none.
    #[derive(Default)]
    struct NoPages(Cell<Option<PhysAddr>>);

    impl MapPage for NoPages {
        fn with_page<T>(&self, at: PhysAddr, _: impl FnOnce(&Mmio) -> T) -> Option<T> {
            self.0.set(Some(at));
            None
        }
    }

    #[test]
    fn configuration_space_above_4_gib_has_a_page_for_every_function_of_every_bus() {
        let page = |base, first_bus, bus| {
            let ecam = EcamRange { base: PhysAddr(base), segment: 2, first_bus, last_bus: 0x7f };
            let host = PciHost { ecam, windows: heapless::Vec::new() };
            let pages = NoPages::default();
            let space = Ecam { host: &host, pages: &pages };
            let at = Function { segment: 2, bus, device: 31, function: 7 };
            assert_eq!(space.read(at, 0), u32::MAX);
            assert_eq!(space.buses(), (2, first_bus, 0x7f));
            pages.0.get()
        };
        assert_eq!(page(0x40_1000_0000, 0, 0), Some(PhysAddr(0x40_100f_f000)));
        assert_eq!(page(0x40_1000_0000, 0, 0x7f), Some(PhysAddr(0x40_17ff_f000)));
        assert_eq!(page(0x40_1000_0000, 0, 0x80), None, "beyond the last bus");
        // Registers at 0x3000_0000 that begin with bus 0x40: bus 0 would lie before them.
        assert_eq!(page(0x3000_0000 - (0x40 << 20), 0x40, 0x41), Some(PhysAddr(0x301f_f000)));
        assert_eq!(page(0x10_0000u64.wrapping_sub(2 << 20), 2, 2), Some(PhysAddr(0x1f_f000)));
        assert_eq!(page(0x3000_0000, 0x40, 0x3f), None, "before the first bus");
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
    fn interrupts_that_are_sent_as_messages_are_stopped_and_nothing_else() {
        let words = [(4, 1 << 20), (0x34, 0x40), (0x40, 0x8081_5005), (0x50, 0xc03f_6011)];
        let config = FakeConfig::new(&words);
        config.words.borrow_mut().insert(0x60, 0x8001_0010);
        stop_messages(&config, AT);
        let after = [0x40, 0x50, 0x60].map(|offset| config.read(AT, offset));
        assert_eq!(after, [0x8080_5005, 0x403f_6011, 0x8001_0010]);
    }

    #[test]
    fn virtual_functions_are_switched_off() {
        let config =
            FakeConfig::new(&[(0x100, 0x1401_0001), (0x140, 0x1001_0010), (0x148, 0x1_0019)]);
        stop_bus_master(&config, AT);
        assert_eq!(config.read(AT, 0x148), 0x18);
        assert_eq!(config.read(AT, 0x108), 0, "the first capability is another one");
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
