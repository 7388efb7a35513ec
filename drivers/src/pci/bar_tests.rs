//! BARs of functions on buses made of memory.

use core::cell::RefCell;
use std::collections::BTreeMap;

use super::*;
use crate::pci::tests::{AT, FakeConfig};

/// What a function answers: words, and which of their bits can be written.
#[derive(Clone, Default)]
struct Fake {
    words: BTreeMap<u16, (u32, u32)>,
}

impl Fake {
    fn new(class: u32, header: u32) -> Fake {
        let mut fake = Fake::default();
        fake.words.insert(0, (0x1042_1af4, 0));
        fake.words.insert(4, (0x0010_0000, 0xffff));
        fake.words.insert(8, (class << 16, 0));
        fake.words.insert(0xc, (header << 16, 0));
        fake
    }

    fn device() -> Fake {
        Fake::new(0x0100, 0x80)
    }

    fn decoding(mut self) -> Fake {
        self.words.insert(4, (0x0010_0006, 0xffff));
        self
    }

    /// A BAR of the given flags (4: of 64 bits, 8: prefetchable) and size.
    fn bar(mut self, index: u16, flags: u32, size: u64, address: u64) -> Fake {
        let offset = 0x10 + 4 * index;
        let mask = !(size - 1);
        self.words.insert(offset, (address as u32 | flags, mask as u32));
        if flags & 4 != 0 {
            self.words.insert(offset + 4, ((address >> 32) as u32, (mask >> 32) as u32));
        }
        self
    }

    fn bridge(secondary: u32, memory: (u32, u32), prefetchable: (u64, u64)) -> Fake {
        let mut fake = Fake::new(0x0604, 1).decoding();
        let window =
            |(first, last): (u64, u64)| (first >> 16) as u32 & 0xfff0 | last as u32 & 0xfff0_0000;
        fake.words.insert(0x18, (secondary << 16 | secondary << 8, 0));
        fake.words.insert(0x20, (window((memory.0.into(), memory.1.into())), 0));
        fake.words.insert(0x24, (window(prefetchable) | 0x0001_0001, 0));
        fake.words.insert(0x28, ((prefetchable.0 >> 32) as u32, 0));
        fake.words.insert(0x2c, ((prefetchable.1 >> 32) as u32, 0));
        fake
    }
}

/// Nothing is forwarded.
const NOTHING: (u64, u64) = (0xfff0_0000, 0);
const NO_MEMORY: (u32, u32) = (0xfff0_0000, 0);

struct Machine {
    functions: RefCell<BTreeMap<Function, Fake>>,
    windows: std::vec::Vec<Window>,
}

fn on(bus: u8, device: u8) -> Function {
    Function { segment: 0, bus, device, function: 0 }
}

fn window(pci: u64, cpu: u64, size: u64) -> Window {
    Window { pci, cpu: PhysAddr(cpu), size, prefetchable: false }
}

const LOW: u64 = 0x1000_0000;
const HIGH: u64 = 0x80_0000_0000;

/// A machine with windows like QEMU's `virt`, the low one seen at another address.
fn machine(functions: &[(Function, Fake)]) -> Machine {
    let windows =
        [window(LOW, 0x5000_0000, 0x1000_0000), window(HIGH, HIGH, 0x80_0000_0000)].to_vec();
    Machine { functions: RefCell::new(functions.iter().cloned().collect()), windows }
}

impl ConfigSpace for Machine {
    fn read(&self, at: Function, offset: u16) -> u32 {
        let functions = self.functions.borrow();
        let Some(function) = functions.get(&at) else { return u32::MAX };
        function.words.get(&offset).map_or(0, |word| word.0)
    }

    fn write(&self, at: Function, offset: u16, value: u32) {
        let mut functions = self.functions.borrow_mut();
        let function = functions.get_mut(&at).unwrap();
        let decodes = function.words[&4].0 & 2 != 0;
        assert!(!decodes || !(0x10..0x28).contains(&offset), "{at}: BAR written while in use");
        if let Some((word, writable)) = function.words.get_mut(&offset) {
            *word = *word & !*writable | value & *writable;
        }
    }

    fn buses(&self) -> (u16, u8, u8) {
        (0, 0, 4)
    }

    fn windows(&self) -> &[Window] {
        &self.windows
    }
}

/// Remembers where registers were mapped, and maps nothing.
#[derive(Default)]
struct Mapped(RefCell<Option<PhysAddr>>);

impl Physical for Mapped {
    fn read(&self, _: PhysAddr, _: &mut [u8]) -> bool {
        false
    }

    fn map_device(&self, at: PhysAddr, _: u64) -> Option<Mmio> {
        *self.0.borrow_mut() = Some(at);
        None
    }
}

/// Where the registers at offset 0x10 of a BAR are mapped, or why they are not.
fn mapped(config: &dyn ConfigSpace, at: Function, index: u8) -> Result<u64, BarError> {
    let physical = Mapped::default();
    let result = map_bar(config, &physical, at, index, 0x10, 0x100);
    match (physical.0.take(), result) {
        (Some(PhysAddr(at)), _) => Ok(at),
        (None, Err(error)) => Err(error),
        (None, Ok(_)) => unreachable!(),
    }
}

#[test]
fn assigned_bars_of_both_sizes_are_reached_and_ports_are_not() {
    let config = FakeConfig::new(&[
        (0x10, 0xfeb0_0000),
        (0x14, 0xc041),
        (0x18, 0x0000_000c),
        (0x1c, 0x38),
        (0x20, 0),
    ]);
    assert_eq!(mapped(&config, AT, 0), Ok(0xfeb0_0010));
    assert_eq!(mapped(&config, AT, 1), Err(BarError::NotMemory), "ports");
    assert_eq!(mapped(&config, AT, 2), Ok(0x38_0000_0010));
    assert_eq!(mapped(&config, AT, 4), Err(BarError::NoWindow), "unassigned");
    assert_eq!(mapped(&config, AT, 6), Err(BarError::NotMemory), "no such BAR");
}

#[test]
fn addresses_on_the_bus_are_translated_through_the_windows() {
    let device = Fake::device().bar(0, 0, 0x1000, LOW + 0x4000).decoding();
    let device = device.bar(4, 4, 0x4000, HIGH + 0x8000);
    let machine = machine(&[(on(0, 1), device)]);
    assert_eq!(mapped(&machine, on(0, 1), 0), Ok(0x5000_4010));
    assert_eq!(mapped(&machine, on(0, 1), 4), Ok(HIGH + 0x8010));
}

#[test]
fn unassigned_bar_gets_a_place_that_nobody_has() {
    let neighbours = [
        (on(0, 1), Fake::device().bar(0, 0, 0x1000, LOW).decoding()),
        (on(0, 2), Fake::device().bar(4, 12, 0x4000, HIGH + 0x4000).decoding()),
        (on(0, 3), Fake::device().bar(2, 4, 0x1000, HIGH)),
        (on(0, 4), Fake::bridge(1, (LOW as u32 + 0x10_0000, LOW as u32 + 0x1f_ffff), NOTHING)),
        (on(1, 0), Fake::device().bar(0, 0, 0x1000, LOW + 0x10_0000).decoding()),
    ];
    let wanted = Fake::device().bar(0, 0, 0x10_0000, 0).bar(4, 12, 0x4000, 0);
    let functions = [&neighbours[..], &[(on(0, 5), wanted)]].concat();
    let machine = machine(&functions);
    let before = machine.functions.borrow().clone();
    assert_eq!(mapped(&machine, on(0, 5), 4), Ok(HIGH + 0x8010));
    assert_eq!(mapped(&machine, on(0, 5), 0), Ok(0x5020_0010));
    let after = machine.functions.borrow();
    assert_eq!(after[&on(0, 5)].words[&0x20].0, 0x800c);
    assert_eq!(after[&on(0, 5)].words[&0x24].0, 0x80);
    assert_eq!(after[&on(0, 5)].words[&0x10].0, LOW as u32 + 0x20_0000);
    for (at, _) in neighbours {
        assert_eq!(after[&at].words, before[&at].words, "{at} is as it was");
    }
}

#[test]
fn place_that_was_given_once_is_kept() {
    let device = Fake::device().bar(4, 4, 0x4000, 0);
    let machine = machine(&[(on(0, 1), device.clone()), (on(0, 2), device)]);
    for _ in 0..2 {
        assert_eq!(mapped(&machine, on(0, 2), 4), Ok(HIGH + 0x10));
        assert_eq!(mapped(&machine, on(0, 1), 4), Ok(HIGH + 0x4010));
        crate::pci::enable(&machine, on(0, 1), true);
    }
}

#[test]
fn address_that_somebody_else_answers_to_is_not_believed() {
    let other = Fake::device().bar(0, 0, 0x1000, LOW + 0x1000).decoding();
    let wanted = Fake::device().bar(0, 0, 0x4000, LOW);
    let machine = machine(&[(on(0, 1), other), (on(0, 2), wanted)]);
    assert_eq!(mapped(&machine, on(0, 2), 0), Ok(0x5000_4010));
}

#[test]
fn behind_bridges_only_what_all_of_them_forward_is_used() {
    let outer = (LOW as u32 + 0x10_0000, LOW as u32 + 0x3f_ffff);
    let inner = (LOW as u32 + 0x20_0000, LOW as u32 + 0x2f_ffff);
    let wide = (HIGH + 0x10_0000, HIGH + 0x1f_ffff);
    let wanted = Fake::device().bar(0, 0, 0x8_0000, 0).bar(2, 12, 0x1000, 0).bar(4, 4, 0x8_0000, 0);
    let functions = |inner| {
        machine(&[
            (on(0, 1), Fake::bridge(1, outer, wide)),
            (on(1, 0), inner),
            (on(2, 0), wanted.clone()),
        ])
    };
    let open = functions(Fake::bridge(2, inner, wide));
    assert_eq!(mapped(&open, on(2, 0), 0), Ok(0x5020_0010));
    assert_eq!(mapped(&open, on(2, 0), 2), Ok(HIGH + 0x10_0010));
    // Not prefetchable: only the low window leads there.
    assert_eq!(mapped(&open, on(2, 0), 4), Ok(0x5028_0010));

    let shut = functions(Fake::bridge(2, NO_MEMORY, NOTHING));
    assert_eq!(mapped(&shut, on(2, 0), 0), Err(BarError::NoRoom));
    assert_eq!(mapped(&shut, on(2, 0), 2), Err(BarError::NoRoom));
    assert_eq!(shut.functions.borrow()[&on(2, 0)].words[&0x10].0, 0);
}

#[test]
fn function_on_a_bus_that_no_bridge_leads_to_is_refused() {
    let wanted = Fake::device().bar(0, 0, 0x1000, 0);
    let lost = machine(&[(on(3, 0), wanted.clone())]);
    assert_eq!(mapped(&lost, on(3, 0), 0), Err(BarError::NoRoom));
    // Two bridges that claim to lie behind each other.
    let anywhere = (LOW as u32, LOW as u32 + 0xfff_ffff);
    let circle = machine(&[
        (on(2, 0), Fake::bridge(3, anywhere, NOTHING)),
        (on(3, 1), Fake::bridge(2, anywhere, NOTHING)),
        (on(3, 0), wanted),
    ]);
    assert_eq!(mapped(&circle, on(3, 0), 0), Err(BarError::NoRoom));
}

#[test]
fn bar_that_is_too_large_or_takes_no_address_is_refused() {
    let large = Fake::device().bar(0, 0, 0x2000_0000, 0).bar(1, 0, 0x4000_0000, 0);
    let mut stuck = Fake::device().bar(0, 0, 0x1000, 0);
    stuck.words.insert(0x10, (0, 0));
    let machine = machine(&[(on(0, 1), large), (on(0, 2), stuck)]);
    assert_eq!(mapped(&machine, on(0, 1), 0), Err(BarError::NoRoom));
    assert_eq!(mapped(&machine, on(0, 2), 0), Err(BarError::Stuck));
}

#[test]
fn registers_beyond_the_window_or_misaligned_are_refused() {
    let device = Fake::device().bar(0, 0, 0x1000, LOW).decoding();
    let machine = machine(&[(on(0, 1), device)]);
    let physical = Mapped::default();
    let map = |offset, size| map_bar(&machine, &physical, on(0, 1), 0, offset, size).err();
    assert_eq!(map(u64::MAX - 3, 8), Some(BarError::Unmappable));
    assert_eq!(map(2, 8), Some(BarError::Unmappable));
    assert_eq!(map(0x1000_0000, 8), Some(BarError::Unmappable));
    assert_eq!(*physical.0.borrow(), None);
}

#[test]
fn window_with_too_many_neighbours_is_left_alone() {
    let mut functions = std::vec::Vec::new();
    for index in 0..80u8 {
        let address = LOW + 0x1000 * u64::from(index);
        let device = Fake::device().bar(0, 0, 0x1000, address).decoding();
        functions.push((on(index / 32, index % 32), device));
    }
    functions.push((on(0, 31), Fake::device().bar(0, 0, 0x1000, 0)));
    assert_eq!(mapped(&machine(&functions), on(0, 31), 0), Err(BarError::NoRoom));
}

#[test]
fn gaps_at_both_ends_are_found_and_nothing_runs_over() {
    let range = |first, last| Range { first, last };
    let all = range(0x1000, 0x4fff);
    assert_eq!(gap(all, 0x1000, &[range(0x2000, 0x4fff)]), Some(0x1000));
    assert_eq!(gap(all, 0x1000, &[range(0, 0x2fff), range(0x3000, 0x3fff)]), Some(0x4000));
    assert_eq!(gap(all, 0x2000, &[range(0x2000, 0x2000)]), None);
    assert_eq!(gap(range(0, 0xfff), 0x1000, &[]), None, "address 0 means none");
    assert_eq!(gap(range(u64::MAX - 0xfff, u64::MAX), 0x1000, &[range(0, u64::MAX)]), None);
    assert_eq!(gap(range(u64::MAX - 0xffe, u64::MAX), 1 << 63, &[]), None);
}

#[test]
fn windows_of_bridges_are_read_as_they_are_meant() {
    let bridge = Fake::bridge(1, (0x1000_0000, 0x102f_ffff), (0x80_0000_0000, 0x81_ffff_ffff));
    let machine = machine(&[(on(0, 1), bridge), (on(0, 2), Fake::bridge(2, NO_MEMORY, NOTHING))]);
    let range = |first, last| Some(Range { first, last });
    assert_eq!(memory_window(&machine, on(0, 1)), range(0x1000_0000, 0x102f_ffff));
    assert_eq!(prefetchable_window(&machine, on(0, 1)), range(0x80_0000_0000, 0x81_ffff_ffff));
    assert_eq!(memory_window(&machine, on(0, 2)), None);
    assert_eq!(prefetchable_window(&machine, on(0, 2)), None);
}
