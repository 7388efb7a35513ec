//! Base address registers: where a function's memory is, and giving it a place where it has none.
//!
//! Linux has normally assigned every BAR. One that was reset, or plugged in too late, gets a place
//! here, within what firmware says the host bridge forwards, what every bridge on the way forwards,
//! and where no other function is. Nothing is moved, and no bridge is set up anew. Not seen are the
//! BARs of virtual functions (SR-IOV) and enabled expansion ROMs.
//!
//! Source: PCI Local Bus Specification 3.0, 6.2.5; PCI-to-PCI Bridge Architecture Specification 1.2,
//! 3.2.5.

use core::fmt;

use heapless::Vec;

use crate::firmware::Window;
use crate::mmio::Mmio;
use crate::pci::{COMMAND_MEMORY, ConfigSpace, Function, each_function, identity, register};
use crate::{PhysAddr, Physical};

/// Most bridges between the host bridge and a function.
const MAX_BRIDGES: usize = 8;

/// Most other ranges within a window among which a place is looked for.
const MAX_TAKEN: usize = 64;

/// Class of a host bridge, whose memory must not be turned off even for a moment.
const HOST_BRIDGE: u16 = 0x0600;

/// Registers of bridges.
mod bridge {
    pub const BUSES: u16 = 0x18;
    pub const MEMORY: u16 = 0x20;
    pub const PREFETCHABLE: u16 = 0x24;
    pub const PREFETCHABLE_BASE_UPPER: u16 = 0x28;
    pub const PREFETCHABLE_LIMIT_UPPER: u16 = 0x2c;
}

/// Why the registers behind a BAR cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarError {
    /// There is no such BAR, or it is for ports.
    NotMemory,
    /// It has no address, and firmware does not say which ones there are.
    NoWindow,
    /// It has no address, and there is no free one that the host bridge and the bridges on the way
    /// forward.
    NoRoom,
    /// It has no address, and does not take one.
    Stuck,
    /// Its address, or the part of it that was asked for, cannot be that of device registers.
    Unmappable,
}

impl fmt::Display for BarError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BarError::NotMemory => "its registers are not in memory",
            BarError::NoWindow => {
                "its registers have no address, and firmware does not tell which are free"
            }
            BarError::NoRoom => "its registers have no address, and no free one leads to it",
            BarError::Stuck => "its registers have no address and take none",
            BarError::Unmappable => "its registers have an address where none can be",
        })
    }
}

/// Maps `size` bytes at `offset` of the registers in BAR `index`. An unassigned BAR gets an address
/// first; the function's memory decoding is left as it was.
///
/// # Errors
/// [`BarError`] when they cannot be reached.
pub fn map_bar(
    config: &dyn ConfigSpace,
    physical: &dyn Physical,
    at: Function,
    index: u8,
    offset: u64,
    size: u64,
) -> Result<Mmio, BarError> {
    let bar = Bar::read(config, at, index).ok_or(BarError::NotMemory)?;
    let end = offset.checked_add(size).ok_or(BarError::Unmappable)?;
    if !offset.is_multiple_of(4) {
        return Err(BarError::Unmappable);
    }
    let found = if is_assigned(config, at, &bar) {
        reached_at(config.windows(), bar.address, end)
    } else {
        None
    };
    let base = match found {
        Some(base) => base,
        None if bar.address != 0 && config.windows().is_empty() => {
            return Err(BarError::Unmappable);
        }
        None => {
            let address = assign(config, at, &bar)?;
            reached_at(config.windows(), address, end).ok_or(BarError::Unmappable)?
        }
    };
    physical.map_device(PhysAddr(base.0 + offset), size).ok_or(BarError::Unmappable)
}

/// A BAR for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bar {
    /// Where it is in configuration space.
    offset: u16,
    /// Whether the next BAR holds the upper half of its address.
    wide: bool,
    prefetchable: bool,
    /// Address on the bus; 0 when it has none.
    address: u64,
}

impl Bar {
    /// BAR `index` of the function; `None` when there is none, or one for ports.
    fn read(config: &dyn ConfigSpace, at: Function, index: u8) -> Option<Bar> {
        let bars = match config.read(at, register::HEADER_TYPE) >> 16 & 0x7f {
            0 => 6,
            1 => 2,
            _ => 0,
        };
        let offset = register::BAR0 + 4 * u16::from(index);
        let low = if index < bars { config.read(at, offset) } else { u32::MAX };
        let (wide, high) = match low & 0b111 {
            0b000 => (false, 0),
            0b100 if index + 1 < bars => (true, config.read(at, offset + 4)),
            _ => return None,
        };
        let address = u64::from(high) << 32 | u64::from(low & !0xf);
        Some(Bar { offset, wide, prefetchable: low & 0b1000 != 0, address })
    }

    fn write(&self, config: &dyn ConfigSpace, at: Function, address: u64) {
        config.write(at, self.offset, address as u32);
        if self.wide {
            config.write(at, self.offset + 4, (address >> 32) as u32);
        }
    }

    fn value(&self, config: &dyn ConfigSpace, at: Function) -> u64 {
        let high = if self.wide { config.read(at, self.offset + 4) } else { 0 };
        u64::from(high) << 32 | u64::from(config.read(at, self.offset) & !0xf)
    }

    /// How many bytes it covers. To be asked while the function does not decode memory. `None` when
    /// it answers nonsense.
    fn size(&self, config: &dyn ConfigSpace, at: Function) -> Option<u64> {
        self.write(config, at, u64::MAX);
        let mask = self.value(config, at);
        self.write(config, at, self.address);
        let size = if self.wide { mask } else { mask | 0xffff_ffff << 32 }.wrapping_neg();
        (mask != 0 && size.is_power_of_two()).then_some(size)
    }
}

/// Addresses on the bus, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    first: u64,
    last: u64,
}

impl Range {
    /// `None` when it would be empty or run over the end.
    fn of_size(first: u64, size: u64) -> Option<Range> {
        Some(Range { first, last: first.checked_add(size.checked_sub(1)?)? })
    }

    fn common(self, other: Range) -> Option<Range> {
        let Range { first, last } = other;
        let common = Range { first: self.first.max(first), last: self.last.min(last) };
        (common.first <= common.last).then_some(common)
    }
}

/// Where the processor sees `size` bytes at `address` of the bus.
fn reached_at(windows: &[Window], address: u64, size: u64) -> Option<PhysAddr> {
    if windows.is_empty() {
        return address.checked_add(size).map(|_| PhysAddr(address));
    }
    windows.iter().find_map(|window| {
        let offset = address.checked_sub(window.pci)?;
        let inside = offset.checked_add(size).is_some_and(|end| end <= window.size);
        inside.then(|| window.cpu.0.checked_add(offset)).flatten().map(PhysAddr)
    })
}

fn decodes_memory(config: &dyn ConfigSpace, at: Function) -> bool {
    config.read(at, register::COMMAND) & COMMAND_MEMORY != 0
}

/// Runs `what` while the function does not answer to memory addresses.
fn undecoded<T>(config: &dyn ConfigSpace, at: Function, what: impl FnOnce() -> T) -> T {
    let command = config.read(at, register::COMMAND) & 0xffff;
    config.write(at, register::COMMAND, command & !COMMAND_MEMORY);
    let result = what();
    config.write(at, register::COMMAND, command);
    result
}

/// Whether the BAR's address is to be believed: it has one, and either the function answers to it
/// or at least nobody else does.
fn is_assigned(config: &dyn ConfigSpace, at: Function, bar: &Bar) -> bool {
    if bar.address == 0 {
        return false;
    }
    if decodes_memory(config, at) || config.windows().is_empty() {
        return true;
    }
    let own = undecoded(config, at, || bar.size(config, at))
        .and_then(|size| Range::of_size(bar.address, size));
    let Some(own) = own else { return false };
    let Some(path) = bridges(config, at) else { return false };
    taken(config, own, (at, bar.offset), &path).is_some_and(|taken| taken.is_empty())
}

/// Gives a BAR an address that leads to it and that nobody else has.
fn assign(config: &dyn ConfigSpace, at: Function, bar: &Bar) -> Result<u64, BarError> {
    if config.windows().is_empty() {
        return Err(BarError::NoWindow);
    }
    let size = undecoded(config, at, || bar.size(config, at)).ok_or(BarError::Stuck)?;
    let path = bridges(config, at).ok_or(BarError::NoRoom)?;
    let address = place(config, at, bar, size, &path).ok_or(BarError::NoRoom)?;
    let value = undecoded(config, at, || {
        bar.write(config, at, address);
        bar.value(config, at)
    });
    if value == address { Ok(address) } else { Err(BarError::Stuck) }
}

/// A free address for a BAR of `size` bytes; above 4 GiB if it can be there.
fn place(
    config: &dyn ConfigSpace,
    at: Function,
    bar: &Bar,
    size: u64,
    path: &[Function],
) -> Option<u64> {
    const LOW: Range = Range { first: 0, last: u32::MAX as u64 };
    const HIGH: Range = Range { first: 1 << 32, last: u64::MAX };
    for part in [HIGH, LOW] {
        for window in config.windows() {
            let usable = (bar.wide || part == LOW) && (bar.prefetchable || !window.prefetchable);
            for through_prefetchable in [true, false] {
                if !usable || through_prefetchable && !bar.prefetchable {
                    continue;
                }
                let within = Range::of_size(window.pci, window.size)
                    .and_then(|window| window.common(part))
                    .and_then(|range| forwarded(config, path, range, through_prefetchable));
                let Some(within) = within else { continue };
                let taken = taken(config, within, (at, bar.offset), path);
                if let Some(address) = taken.and_then(|taken| gap(within, size, &taken)) {
                    return Some(address);
                }
            }
        }
    }
    None
}

/// The first address in `within` from which on `size` bytes are free. Every step goes beyond one of
/// `taken`, so there are no more steps than of those.
fn gap(within: Range, size: u64, taken: &[Range]) -> Option<u64> {
    // Address 0 means "none".
    let mut first = within.first.max(1).checked_next_multiple_of(size)?;
    loop {
        let wanted = Range::of_size(first, size).filter(|wanted| wanted.last <= within.last)?;
        let blocking = taken.iter().filter(|taken| taken.common(wanted).is_some());
        match blocking.map(|taken| taken.last).max() {
            None => return Some(first),
            Some(last) => first = last.checked_add(1)?.checked_next_multiple_of(size)?,
        }
    }
}

/// The bridges on the way to a function, the nearest first. `None` when it is not known how the
/// function is reached.
fn bridges(config: &dyn ConfigSpace, at: Function) -> Option<Vec<Function, MAX_BRIDGES>> {
    let (_, root, _) = config.buses();
    let mut path = Vec::new();
    let mut bus = at.bus;
    while bus != root {
        let mut above = None;
        each_function(config, &mut |candidate| {
            let secondary = (config.read(candidate, bridge::BUSES) >> 8) as u8;
            // Buses are numbered downwards, so that this cannot run in circles.
            if is_bridge(config, candidate) && secondary == bus && candidate.bus < bus {
                above = Some(candidate);
            }
        });
        path.push(above?).ok()?;
        bus = above?.bus;
    }
    Some(path)
}

fn is_bridge(config: &dyn ConfigSpace, at: Function) -> bool {
    config.read(at, register::HEADER_TYPE) >> 16 & 0x7f == 1
}

/// The part of `range` that all bridges of `path` forward, through their windows for prefetchable
/// memory or through the others.
fn forwarded(
    config: &dyn ConfigSpace,
    path: &[Function],
    range: Range,
    prefetchable: bool,
) -> Option<Range> {
    path.iter().try_fold(range, |range, &at| {
        let window = if prefetchable { prefetchable_window } else { memory_window };
        window(config, at).filter(|_| decodes_memory(config, at))?.common(range)
    })
}

/// The addresses that a bridge forwards, in units of 1 MiB.
fn memory_window(config: &dyn ConfigSpace, at: Function) -> Option<Range> {
    let word = config.read(at, bridge::MEMORY);
    let first = u64::from(word & 0xfff0) << 16;
    let last = u64::from(word & 0xfff0_0000 | 0xf_ffff);
    (first <= last).then_some(Range { first, last })
}

/// The same for prefetchable memory, whose addresses may be of 64 bits.
fn prefetchable_window(config: &dyn ConfigSpace, at: Function) -> Option<Range> {
    let word = config.read(at, bridge::PREFETCHABLE);
    let upper = |register| if word & 0xf == 1 { config.read(at, register) } else { 0 };
    let first = u64::from(upper(bridge::PREFETCHABLE_BASE_UPPER)) << 32;
    let last = u64::from(upper(bridge::PREFETCHABLE_LIMIT_UPPER)) << 32;
    let first = first | u64::from(word & 0xfff0) << 16;
    let last = last | u64::from(word & 0xfff0_0000 | 0xf_ffff);
    (first <= last).then_some(Range { first, last })
}

/// What is taken of `within`: by BARs other than `own`, and by bridges that are not on the `path`.
/// `None` when that is too much to remember.
fn taken(
    config: &dyn ConfigSpace,
    within: Range,
    own: (Function, u16),
    path: &[Function],
) -> Option<Vec<Range, MAX_TAKEN>> {
    let mut taken = Vec::new();
    let mut complete = true;
    each_function(config, &mut |at| {
        let mut add = |range: Option<Range>| {
            if let Some(range) = range.and_then(|range| range.common(within)) {
                complete &= taken.push(range).is_ok();
            }
        };
        if is_bridge(config, at) && !path.contains(&at) {
            add(memory_window(config, at));
            add(prefetchable_window(config, at));
        }
        let mut index = 0;
        while index < 6 {
            let bar = Bar::read(config, at, index);
            if let Some(bar) = bar.filter(|bar| bar.address != 0 && own != (at, bar.offset)) {
                add(covered(config, at, &bar));
            }
            index += if bar.is_some_and(|bar| bar.wide) { 2 } else { 1 };
        }
    });
    complete.then_some(taken)
}

/// The addresses that a BAR covers. Where its size cannot be asked, it is at most its alignment.
fn covered(config: &dyn ConfigSpace, at: Function, bar: &Bar) -> Option<Range> {
    let asked = identity(config, at).class != HOST_BRIDGE;
    let size = asked.then(|| undecoded(config, at, || bar.size(config, at))).flatten();
    let size = size.unwrap_or(1 << bar.address.trailing_zeros());
    Range::of_size(bar.address, size)
}

#[cfg(test)]
#[path = "bar_tests.rs"]
mod tests;
