//! The facts that a dump needs from the device tree which the payload was started with.
//!
//! The tree is the dead kernel's own with a few additions by `kexec -p`: foreign bytes, of which
//! every one is checked. A node that makes no sense leaves its fact unknown and spoils no other.
//!
//! Source: Devicetree Specification 0.4; the bindings named at each fact, in
//! Documentation/devicetree/bindings of Linux 6.1; drivers/of/fdt.c and arch/arm64/mm/init.c there.

mod tree;

use heapless::Vec;

use crate::PhysAddr;
use crate::firmware::efi::{Efi, MemoryMap};
use crate::firmware::{
    EcamRange, Firmware, Iommu, IommuKind, PciHost, PsciConduit, Region, Uart, UartKind, Window,
};
use tree::{Cells, Node, Tree, region, registers, sees_memory_in_place, translate};

pub use tree::claimed_size;

/// Most bytes that a tree may have (Documentation/arm64/booting.rst, Linux 6.1).
pub const MAX_SIZE: u32 = 2 << 20;

/// Most ranges of `linux,usable-memory-range` (drivers/of/fdt.c, MAX_USABLE_RANGES).
const MAX_USABLE: usize = 2;

/// Most `ranges` of a host bridge that are looked at.
const MAX_RANGES: usize = 16;

/// What the tree tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceTree<'a> {
    /// The command line, as it stands: any bytes but zero.
    pub bootargs: &'a [u8],
    /// The ELF header of the dead kernel's memory: `/chosen/linux,elfcorehdr`.
    pub elfcorehdr: Option<Region>,
    /// What was loaded as the initrd: `/chosen/linux,initrd-start` and `-end`.
    pub initrd: Option<Region>,
    /// The memory that was reserved for us: `/chosen/linux,usable-memory-range`.
    pub usable_memory: Vec<Region, MAX_USABLE>,
    /// Where UEFI firmware left its tables: `/chosen/linux,uefi-*`.
    pub efi: Option<Efi>,
    /// What is not about us.
    pub firmware: Firmware,
}

impl<'a> DeviceTree<'a> {
    /// Reads the tree in `blob`. `None` when there is none.
    #[must_use]
    pub fn read(blob: &'a [u8]) -> Option<DeviceTree<'a>> {
        let tree = Tree::open(blob)?;
        let mut facts = DeviceTree::default();
        let mut stdout = None;
        let mut walk = tree.walk();
        while let Some(path) = walk.next() {
            match path {
                [root, chosen] if chosen.is_named(b"chosen") => {
                    facts.take_chosen(root, chosen);
                    stdout = chosen.text("stdout-path").or(chosen.text("linux,stdout-path"));
                }
                _ => take_device(&mut facts.firmware, path),
            }
        }
        facts.firmware.console = console(tree, stdout.unwrap_or(b"serial0"));
        Some(facts)
    }

    /// `/chosen` (chosen.yaml of dt-schema; Documentation/arm/uefi.rst for UEFI).
    fn take_chosen(&mut self, root: &Node<'a>, chosen: &Node<'a>) {
        self.bootargs = chosen.text("bootargs").unwrap_or(&[]);
        let regions = |name, index| region(chosen.property(name)?, index, root.cells());
        self.elfcorehdr = regions("linux,elfcorehdr", 0);
        self.initrd = chosen.number("linux,initrd-start").and_then(|start| {
            let end = chosen.number("linux,initrd-end")?;
            Some(Region { at: PhysAddr(start), size: end.checked_sub(start)? })
        });
        for index in 0..MAX_USABLE {
            if let Some(usable) = regions("linux,usable-memory-range", index) {
                let _ = self.usable_memory.push(usable);
            }
        }
        self.efi = chosen.number("linux,uefi-system-table").map(|system_table| Efi {
            system_table: PhysAddr(system_table),
            memory_map: memory_map(chosen),
        });
    }
}

fn memory_map(chosen: &Node<'_>) -> Option<MemoryMap> {
    Some(MemoryMap {
        at: PhysAddr(chosen.number("linux,uefi-mmap-start")?),
        size: chosen.word("linux,uefi-mmap-size")?,
        descriptor_size: chosen.word("linux,uefi-mmap-desc-size")?,
    })
}

/// Whether the node and everything above it may be used.
fn enabled(path: &[Node<'_>]) -> bool {
    path.iter().all(Node::enabled)
}

/// Takes the facts of the device that `path` leads to, if it is one that matters.
fn take_device(firmware: &mut Firmware, path: &[Node<'_>]) {
    let Some(node) = path.last() else { return };
    let Some(compatible) = node.property("compatible") else { return };
    for name in compatible.split(|&byte| byte == 0) {
        match name {
            // virtio/mmio.yaml
            b"virtio,mmio" if enabled(path) && sees_memory_in_place(path) => {
                if let Some(registers) = registers(path) {
                    let _ = firmware.virtio_mmio.push(registers.at);
                }
            }
            // pci/host-generic-pci.yaml
            b"pci-host-ecam-generic" if enabled(path) && sees_memory_in_place(path) => {
                let next = firmware.pci.len() as u16;
                if let Some(host) = pci_host(path, next) {
                    let _ = firmware.pci.push(host);
                }
            }
            // iommu/arm,smmu-v3.yaml
            b"arm,smmu-v3" if enabled(path) => {
                if let Some(registers) = registers(path) {
                    let iommu = Iommu { kind: IommuKind::SmmuV3, base: registers.at };
                    firmware.add_iommu(iommu);
                }
            }
            // arm/psci.yaml; version 0.1 cannot reset.
            b"arm,psci-1.0" | b"arm,psci-0.2" if enabled(path) => {
                firmware.psci = match node.text("method") {
                    Some(b"hvc") => Some(PsciConduit::Hvc),
                    Some(b"smc") => Some(PsciConduit::Smc),
                    _ => None,
                };
            }
            // timer/arm,arch_timer.yaml
            b"arm,armv8-timer" | b"arm,armv7-timer" => {
                firmware.counter_hz =
                    node.word("clock-frequency").filter(|&hz| hz != 0).map(u64::from);
            }
            _ => continue,
        }
        return;
    }
}

/// The host bridge that `path` leads to. Its registers begin with its first bus, and its segment is
/// `next` when it does not say.
fn pci_host(path: &[Node<'_>], next: u16) -> Option<PciHost> {
    const BUS_SHIFT: u32 = 20;
    let (node, parents) = path.split_last()?;
    let Region { at, size } = registers(path)?;
    let buses = node.number("bus-range").unwrap_or(0xff);
    let first_bus = u8::try_from(buses >> 32).ok()?;
    let fitting = (size >> BUS_SHIFT).checked_sub(1)?.saturating_add(first_bus.into());
    let last_bus = u8::try_from(fitting.min(buses & 0xffff_ffff).min(0xff)).ok()?;
    let segment = node.word("linux,pci-domain").map_or(Some(next), |domain| domain.try_into().ok());
    let base = PhysAddr(at.0.wrapping_sub(u64::from(first_bus) << BUS_SHIFT));
    let ecam = EcamRange { base, segment: segment?, first_bus, last_bus };
    if first_bus > last_bus {
        return None;
    }
    let (parent_cells, _) = parents.last()?.cells();
    let mut host = PciHost { ecam, windows: Vec::new() };
    let mut ranges = Cells(node.property("ranges").unwrap_or(&[]));
    for _ in 0..MAX_RANGES {
        let Some((space, window)) = window(&mut ranges, parents, parent_cells) else { break };
        if let (0b10 | 0b11, Some(window)) = (space, window) {
            let _ = host.windows.push(window);
        }
    }
    Some(host)
}

/// The next entry of a host bridge's `ranges`: its address space (1 ports, 2 memory, 3 memory with
/// addresses of 64 bits), and the window if the processor sees it (IEEE 1275 PCI binding, 2.2.1.1).
fn window(
    ranges: &mut Cells<'_>,
    parents: &[Node<'_>],
    parent_cells: u32,
) -> Option<(u64, Option<Window>)> {
    let high = ranges.take(1)?;
    let pci = ranges.take(2)?;
    let parent = ranges.take(parent_cells)?;
    let size = ranges.take(2)?;
    let prefetchable = high & 1 << 30 != 0;
    let window = translate(parents, PhysAddr(parent), size)
        .filter(|_| size != 0 && pci.checked_add(size).is_some())
        .map(|cpu| Window { pci, cpu, size, prefetchable });
    Some((high >> 24 & 0b11, window))
}

/// The serial port that `stdout` names, which is a path or an alias, and options behind a colon
/// (section 3.6).
fn console(tree: Tree<'_>, stdout: &[u8]) -> Option<Uart> {
    let mut parts = stdout.splitn(2, |&byte| byte == b':');
    let name = parts.next()?;
    let baud = parts.next().and_then(speed);
    let path = if name.starts_with(b"/") { name } else { alias(tree, name)? };
    let uart = tree.find(|nodes| leads_to(nodes, path), |nodes| uart(tree, nodes))?;
    Some(Uart { baud, ..uart })
}

/// The speed at the beginning of options like `115200n8`.
fn speed(options: &[u8]) -> Option<u32> {
    let mut speed = 0u32;
    for digit in options.iter().take_while(|byte| byte.is_ascii_digit()) {
        speed = speed.checked_mul(10)?.checked_add(u32::from(digit - b'0'))?;
    }
    (speed != 0).then_some(speed)
}

fn alias<'a>(tree: Tree<'a>, name: &[u8]) -> Option<&'a [u8]> {
    let name = core::str::from_utf8(name).ok()?;
    let aliases = |path: &[Node<'a>]| matches!(path, [_, node] if node.is_named(b"aliases"));
    tree.find(aliases, |path| path.last()?.text(name))
}

/// Whether `nodes` are those that `path` names.
fn leads_to(nodes: &[Node<'_>], path: &[u8]) -> bool {
    let mut names = path.split(|&byte| byte == b'/').filter(|name| !name.is_empty());
    let below_root = nodes.iter().skip(1);
    below_root.into_iter().all(|node| names.next().is_some_and(|name| node.is_named(name)))
        && names.next().is_none()
}

/// The serial port that `path` leads to (serial/pl011.yaml, arm,sbsa-uart.yaml, 8250.yaml,
/// snps-dw-apb-uart.yaml).
fn uart(tree: Tree<'_>, path: &[Node<'_>]) -> Option<Uart> {
    let node = path.last()?;
    let kind =
        node.property("compatible")?.split(|&byte| byte == 0).find_map(|name| match name {
            b"arm,pl011" => Some(UartKind::Pl011),
            b"arm,sbsa-uart" => Some(UartKind::Sbsa),
            b"ns16550a" | b"ns16550" | b"snps,dw-apb-uart" => ns16550(node),
            _ => None,
        })?;
    let registers = registers(path).filter(|_| enabled(path))?;
    let offset = node.word("reg-offset").unwrap_or(0);
    let base = PhysAddr(registers.at.0.checked_add(offset.into())?);
    Some(Uart { kind, base, clock_hz: clock(tree, node), baud: None })
}

fn ns16550(node: &Node<'_>) -> Option<UartKind> {
    let register_shift = node.word("reg-shift").unwrap_or(0);
    let register_width = node.word("reg-io-width").unwrap_or(1);
    let known = register_shift <= 3 && matches!(register_width, 1 | 4);
    known.then_some(UartKind::Ns16550 {
        register_shift: register_shift as u8,
        register_width: register_width as u8,
    })
}

/// The frequency of a device's first clock: told by the device, or by a clock that never changes.
fn clock(tree: Tree<'_>, node: &Node<'_>) -> Option<u32> {
    let told = node.word("clock-frequency").filter(|&hz| hz != 0);
    let wanted = node.word("clocks");
    told.or_else(|| {
        wanted.filter(|&phandle| phandle != 0)?;
        let is_clock =
            |path: &[Node<'_>]| path.last().is_some_and(|node| node.word("phandle") == wanted);
        tree.find(is_clock, |path| path.last()?.word("clock-frequency").filter(|&hz| hz != 0))
    })
}

#[cfg(test)]
mod tests;
