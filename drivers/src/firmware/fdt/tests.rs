//! Trees of machines, built here in the same format, good and damaged.

use std::vec::Vec;

use super::*;

/// Writes a tree.
#[derive(Default)]
struct Builder {
    structure: Vec<u8>,
    strings: Vec<u8>,
}

impl Builder {
    fn word(&mut self, word: u32) {
        self.structure.extend(word.to_be_bytes());
    }

    fn padded(&mut self, bytes: &[u8]) {
        self.structure.extend(bytes);
        self.structure.resize(self.structure.len().next_multiple_of(4), 0);
    }

    /// A node with what `inside` puts into it.
    fn node(&mut self, name: &str, inside: impl FnOnce(&mut Builder)) {
        self.word(1);
        self.padded(&[name.as_bytes(), &[0]].concat());
        inside(self);
        self.word(2);
    }

    fn bytes(&mut self, name: &str, value: &[u8]) {
        self.word(3);
        self.word(value.len() as u32);
        self.word(self.strings.len() as u32);
        self.padded(value);
        self.strings.extend(name.as_bytes());
        self.strings.push(0);
    }

    fn text(&mut self, name: &str, value: &str) {
        self.bytes(name, &[value.as_bytes(), &[0]].concat());
    }

    fn cells(&mut self, name: &str, cells: &[u32]) {
        let bytes: Vec<u8> = cells.iter().flat_map(|cell| cell.to_be_bytes()).collect();
        self.bytes(name, &bytes);
    }

    /// The cells of the bus that this node is.
    fn bus(&mut self, address: u32, size: u32) {
        self.cells("#address-cells", &[address]);
        self.cells("#size-cells", &[size]);
    }

    fn blob(mut self) -> Vec<u8> {
        self.word(9);
        let (structure, strings) = (self.structure.len() as u32, self.strings.len() as u32);
        let total = 56 + structure + strings;
        let header = [0xd00d_feed, total, 56, 56 + structure, 40, 17, 16, 0, strings, structure];
        let mut blob: Vec<u8> = header.iter().flat_map(|word: &u32| word.to_be_bytes()).collect();
        blob.extend([0; 16]);
        blob.extend(self.structure);
        blob.extend(self.strings);
        blob
    }
}

fn tree(inside: impl FnOnce(&mut Builder)) -> Vec<u8> {
    let mut builder = Builder::default();
    builder.node("", inside);
    builder.blob()
}

/// A machine like QEMU's `virt`, as `kexec -p` leaves its tree.
fn virt() -> Vec<u8> {
    tree(|root| {
        root.bus(2, 2);
        root.text("compatible", "linux,dummy-virt");
        root.node("psci", |node| {
            node.text("method", "hvc");
            node.text("compatible", "arm,psci-1.0\0arm,psci-0.2\0arm,psci");
        });
        root.node("memory@40000000", |node| {
            node.cells("reg", &[0, 0x4000_0000, 0, 0x2000_0000]);
        });
        for at in [0x0a00_0000, 0x0a00_0200] {
            root.node(&std::format!("virtio_mmio@{at:x}"), |node| {
                node.cells("reg", &[0, at, 0, 0x200]);
                node.text("compatible", "virtio,mmio");
            });
        }
        root.node("virtio_mmio@a000400", |node| {
            node.cells("reg", &[0, 0x0a00_0400, 0, 0x200]);
            node.text("compatible", "virtio,mmio");
            node.text("status", "disabled");
        });
        root.node("pcie@10000000", |node| {
            node.text("compatible", "pci-host-ecam-generic");
            node.bus(3, 2);
            node.cells("linux,pci-domain", &[0]);
            node.cells("bus-range", &[0, 0xff]);
            node.cells("reg", &[0x40, 0x1000_0000, 0, 0x1000_0000]);
            let ports = [0x0100_0000, 0, 0, 0, 0x3eff_0000, 0, 0x1_0000];
            let memory = [0x0200_0000, 0, 0x1000_0000, 0, 0x1000_0000, 0, 0x2eff_0000];
            let wide = [0x0300_0000, 0x80, 0, 0x80, 0, 0x80, 0];
            node.cells("ranges", &[ports, memory, wide].concat());
        });
        root.node("apb-pclk", |node| {
            node.cells("phandle", &[0x8000]);
            node.cells("clock-frequency", &[24_000_000]);
        });
        root.node("pl011@9000000", |node| {
            node.cells("clocks", &[0x8000, 0x8000]);
            node.cells("reg", &[0, 0x0900_0000, 0, 0x1000]);
            node.text("compatible", "arm,pl011\0arm,primecell");
        });
        root.node("smmuv3@9050000", |node| {
            node.text("compatible", "arm,smmu-v3");
            node.cells("reg", &[0, 0x0905_0000, 0, 0x2_0000]);
        });
        root.node("timer", |node| node.text("compatible", "arm,armv8-timer\0arm,armv7-timer"));
        root.node("chosen", |node| {
            node.cells("linux,usable-memory-range", &[0, 0x5000_0000, 0, 0x20_0000]);
            node.cells("linux,initrd-start", &[0, 0x5018_0000]);
            node.cells("linux,initrd-end", &[0, 0x5018_0068]);
            node.cells("linux,elfcorehdr", &[0, 0x501f_f000, 0, 0x1000]);
            node.text("bootargs", "console=ttyAMA0 capture.level=0");
            node.text("stdout-path", "/pl011@9000000");
        });
    })
}

fn window(pci: u64, cpu: u64, size: u64, prefetchable: bool) -> Window {
    Window { pci, cpu: PhysAddr(cpu), size, prefetchable }
}

#[test]
fn facts_of_a_virt_machine_are_found() {
    let iommus = DeviceTree::read(&virt()).unwrap().firmware.iommus;
    let smmu = Iommu { kind: IommuKind::SmmuV3, base: PhysAddr(0x0905_0000) };
    assert_eq!(iommus.as_slice(), [smmu]);
    let blob = virt();
    let tree = DeviceTree::read(&blob).unwrap();
    assert_eq!(tree.bootargs, b"console=ttyAMA0 capture.level=0");
    let region = |at, size| Region { at: PhysAddr(at), size };
    assert_eq!(tree.elfcorehdr, Some(region(0x501f_f000, 0x1000)));
    assert_eq!(tree.usable_memory[..], [region(0x5000_0000, 0x20_0000)]);
    assert_eq!(tree.initrd, Some(region(0x5018_0000, 0x68)));
    assert_eq!(tree.efi, None);
    let firmware = tree.firmware;
    let base = PhysAddr(0x0900_0000);
    let uart = Uart { kind: UartKind::Pl011, base, clock_hz: Some(24_000_000), baud: None };
    assert_eq!(firmware.console, Some(uart));
    assert_eq!(firmware.virtio_mmio[..], [PhysAddr(0x0a00_0000), PhysAddr(0x0a00_0200)]);
    assert_eq!((firmware.psci, firmware.counter_hz), (Some(PsciConduit::Hvc), None));
    let [host] = &firmware.pci[..] else { panic!("{:?}", firmware.pci) };
    let base = PhysAddr(0x40_1000_0000);
    assert_eq!(host.ecam, EcamRange { base, segment: 0, first_bus: 0, last_bus: 255 });
    let memory = window(0x1000_0000, 0x1000_0000, 0x2eff_0000, false);
    let wide = window(0x80_0000_0000, 0x80_0000_0000, 0x80_0000_0000, false);
    assert_eq!(host.windows[..], [memory, wide]);
    assert_eq!(claimed_size(blob.first_chunk().unwrap()), Some(blob.len() as u32));
}

/// A board whose devices lie on a bus with addresses of its own.
fn board() -> Vec<u8> {
    tree(|root| {
        root.bus(2, 1);
        root.node("aliases", |node| {
            node.text("serial0", "/soc/bus@10000/serial@200");
            node.text("serial1", "/uart");
        });
        root.node("chosen", |node| {
            node.text("stdout-path", "serial0:1500000n8");
            node.cells("linux,uefi-system-table", &[1, 0x2000]);
            node.cells("linux,uefi-mmap-start", &[0, 0x3000]);
            node.cells("linux,uefi-mmap-size", &[0x960]);
            node.cells("linux,uefi-mmap-desc-size", &[0x30]);
        });
        root.node("uart", |node| {
            node.text("compatible", "arm,sbsa-uart");
            node.cells("reg", &[0, 0x7000, 0x1000]);
        });
        root.node("soc", |soc| {
            soc.text("compatible", "simple-bus");
            soc.bus(1, 1);
            soc.cells("ranges", &[0, 8, 0, 0x1000, 0x1_0000, 0x9, 0, 0x10_0000]);
            soc.node("bus@10000", |bus| {
                bus.bus(1, 1);
                bus.cells("ranges", &[0, 0x1_0000, 0x1000]);
                bus.node("serial@200", |node| {
                    node.text("compatible", "vendor,special-uart\0snps,dw-apb-uart");
                    node.cells("reg", &[0x200, 0x100]);
                    node.cells("reg-shift", &[2]);
                    node.cells("reg-io-width", &[4]);
                    node.cells("clock-frequency", &[1_843_200]);
                });
                bus.node("virtio@f80", |node| {
                    node.text("compatible", "virtio,mmio");
                    node.cells("reg", &[0xf80, 0x100]);
                });
            });
            soc.node("pcie@20000", |node| {
                node.text("compatible", "pci-host-ecam-generic");
                node.bus(3, 2);
                node.cells("bus-range", &[4, 9]);
                node.cells("reg", &[0x2_0000, 0x8_0000]);
            });
            soc.node("pcie@30000", |node| {
                node.text("compatible", "pci-host-ecam-generic");
                node.bus(3, 2);
                node.cells("bus-range", &[4, 9]);
                node.cells("reg", &[0x3_0000, 0x20_0000]);
            });
            soc.node("timer", |node| {
                node.text("compatible", "arm,armv8-timer");
                node.cells("clock-frequency", &[50_000_000]);
            });
        });
        root.node("private", |private| {
            private.bus(1, 1);
            private.node("virtio@0", |node| {
                node.text("compatible", "virtio,mmio");
                node.cells("reg", &[0, 0x100]);
            });
        });
        root.node("disabled", |node| {
            node.bus(1, 1);
            node.bytes("ranges", &[]);
            node.text("status", "disabled");
            node.node("virtio@0", |node| {
                node.text("compatible", "virtio,mmio");
                node.cells("reg", &[0, 0x100]);
            });
        });
        root.node("psci", |node| {
            node.text("compatible", "arm,psci-0.2");
            node.text("method", "smc");
        });
    })
}

#[test]
fn addresses_are_translated_through_every_bus() {
    let blob = board();
    let firmware = DeviceTree::read(&blob).unwrap().firmware;
    let uart = Uart {
        kind: UartKind::Ns16550 { register_shift: 2, register_width: 4 },
        base: PhysAddr(0x9_0000_0200),
        clock_hz: Some(1_843_200),
        baud: Some(1_500_000),
    };
    assert_eq!(firmware.console, Some(uart));
    assert_eq!(firmware.psci, Some(PsciConduit::Smc));
    assert_eq!(firmware.counter_hz, Some(50_000_000));
    assert!(firmware.virtio_mmio.is_empty(), "beyond a range, unmapped, or disabled");
}

#[test]
fn configuration_space_begins_with_the_first_bus_and_ends_with_its_registers() {
    let board = |size: u32| {
        tree(|root| {
            root.bus(1, 1);
            root.node("pcie@30000000", |node| {
                node.text("compatible", "pci-host-ecam-generic");
                node.cells("bus-range", &[4, 9]);
                node.cells("reg", &[0x3000_0000, size]);
                node.cells("ranges", &[0x4200_0000, 0, 0x1000, 0x5000_0000, 0, 0x100]);
            });
        })
    };
    let hosts = |size| DeviceTree::read(&board(size)).unwrap().firmware.pci;
    let [host] = &hosts(0x20_0000)[..] else { panic!() };
    let base = PhysAddr(0x3000_0000 - (4 << 20));
    assert_eq!(host.ecam, EcamRange { base, segment: 0, first_bus: 4, last_bus: 5 });
    assert_eq!(host.windows[..], [window(0x1000, 0x5000_0000, 0x100, true)]);
    assert_eq!(hosts(0x4000_0000)[0].ecam.last_bus, 9);
    assert!(hosts(0x8_0000).is_empty(), "less than one bus");
}

#[test]
fn devices_that_see_memory_elsewhere_are_left_alone() {
    let disks = |child: u32| {
        let blob = tree(|root| {
            root.bus(2, 2);
            root.node("soc", |soc| {
                soc.text("compatible", "simple-bus");
                soc.bus(1, 1);
                soc.bytes("ranges", &[]);
                soc.cells(
                    "dma-ranges",
                    &[0, 0, 0, 0x4000_0000, child, 0, 0x4000_0000, 0x4000_0000],
                );
                soc.node("virtio@a000000", |disk| {
                    disk.text("compatible", "virtio,mmio");
                    disk.cells("reg", &[0xa00_0000, 0x200]);
                });
            });
            root.node("pcie@10000000", |host| {
                host.text("compatible", "pci-host-ecam-generic");
                host.bus(3, 2);
                host.cells("reg", &[0x40, 0x1000_0000, 0, 0x1000_0000]);
                host.cells("dma-ranges", &[0x4300_0000, 0, child, 0, 0x4000_0000, 0, 0x4000_0000]);
            });
        });
        let facts = DeviceTree::read(&blob).unwrap().firmware;
        (facts.virtio_mmio.len(), facts.pci.len())
    };
    assert_eq!(disks(0x4000_0000), (1, 1));
    assert_eq!(disks(0), (0, 0));
}

#[test]
fn tables_of_uefi_are_found() {
    let blob = board();
    let memory_map = Some(MemoryMap { at: PhysAddr(0x3000), size: 0x960, descriptor_size: 0x30 });
    let efi = Efi { system_table: PhysAddr(0x1_0000_2000), memory_map };
    assert_eq!(DeviceTree::read(&blob).unwrap().efi, Some(efi));
}

#[test]
fn console_without_a_path_is_the_first_alias() {
    let with = |chosen: &str| {
        tree(|root| {
            root.bus(1, 1);
            root.node("aliases", |node| node.text("serial0", "/uart@100"));
            root.node("chosen", |node| match chosen {
                "" => {}
                path => node.text("stdout-path", path),
            });
            root.node("uart@100", |node| {
                node.text("compatible", "arm,sbsa-uart");
                node.cells("reg", &[0x100, 0x100]);
            });
            root.node("timer", |_| {});
        })
    };
    let console = |chosen| DeviceTree::read(&with(chosen)).unwrap().firmware.console;
    let base = PhysAddr(0x100);
    let uart = Some(Uart { kind: UartKind::Sbsa, base, clock_hz: None, baud: None });
    assert_eq!(console(""), uart);
    assert_eq!(console("/uart"), uart);
    assert_eq!(console("/uart@100:n8"), uart);
    for wrong in ["/uart@200", "/uart@100/more", "/timer", "serial1", "/", ":115200", "//:"] {
        assert_eq!(console(wrong), None, "{wrong}");
    }
}

#[test]
fn damaged_and_cut_trees_do_no_harm() {
    for blob in [virt(), board()] {
        for at in 0..blob.len() {
            for damage in [0x01, 0x02, 0x03, 0x10, 0x80, 0xff] {
                let mut damaged = blob.clone();
                damaged[at] ^= damage;
                let _ = DeviceTree::read(&damaged);
            }
            let _ = DeviceTree::read(&blob[..at]);
            let _ = DeviceTree::read(&blob[at..]);
        }
        for at in (0..blob.len() - 3).step_by(4) {
            for word in [0u32, 1, 2, 3, 4, 9, 0x7fff_ffff, u32::MAX, u32::MAX - 3] {
                let mut damaged = blob.clone();
                damaged[at..at + 4].copy_from_slice(&word.to_be_bytes());
                let _ = DeviceTree::read(&damaged);
            }
        }
    }
}

#[test]
fn facts_before_the_damage_are_kept() {
    let mut blob = virt();
    let found = |blob: &[u8]| DeviceTree::read(blob).unwrap().firmware;
    let timer = blob.windows(6).position(|some| some == b"timer\0").unwrap();
    blob[timer - 4..timer].copy_from_slice(&77u32.to_be_bytes());
    assert_eq!(found(&blob).virtio_mmio, found(&virt()).virtio_mmio);
    assert_eq!(DeviceTree::read(&blob).unwrap().elfcorehdr, None);
}

#[test]
fn nodes_that_lie_too_deep_are_skipped_and_those_after_them_are_not() {
    fn deep(builder: &mut Builder, depth: usize) {
        if depth > 0 {
            builder.node("virtio", |node| {
                node.bus(1, 1);
                node.bytes("ranges", &[]);
                node.text("compatible", "virtio,mmio");
                node.cells("reg", &[depth as u32, 1]);
                deep(node, depth - 1);
            });
        }
    }
    let blob = tree(|root| {
        root.bus(1, 1);
        deep(root, 100);
        root.node("psci", |node| {
            node.text("compatible", "arm,psci-0.2");
            node.text("method", "smc");
        });
    });
    let firmware = DeviceTree::read(&blob).unwrap().firmware;
    assert_eq!(firmware.psci, Some(PsciConduit::Smc));
    assert_eq!(firmware.virtio_mmio.len(), tree::MAX_DEPTH - 1);
}

#[test]
fn names_longer_than_the_specification_allows_spoil_nothing() {
    let blob = tree(|root| {
        root.bus(2, 2);
        root.node("usb@fe800000-with-a-name-of-more-than-31-characters", |node| {
            node.bytes("snps,dis-del-phy-power-chg-quirk", &[]);
        });
        root.node("chosen", |node| node.cells("linux,elfcorehdr", &[0, 0x1000, 0, 0x2000]));
    });
    assert!(DeviceTree::read(&blob).unwrap().elfcorehdr.is_some());
}

#[test]
fn what_is_not_a_tree_is_refused() {
    assert_eq!(DeviceTree::read(&[]), None);
    assert_eq!(DeviceTree::read(&[0; 64]), None);
    let mut other = virt();
    other[23] = 2;
    assert_eq!(DeviceTree::read(&other), None, "version 2");
    assert_eq!(claimed_size(&[0; 8]), None);
}

#[test]
fn tree_that_is_made_to_cost_time_costs_little() {
    let blob = tree(|root| {
        root.bus(1, 1);
        root.node("bus", |bus| {
            bus.cells("ranges", &[1; 300_000]);
            for _ in 0..30_000 {
                bus.bytes("x", &[]);
            }
            for _ in 0..5_000 {
                bus.node("v", |node| {
                    node.text("compatible", "virtio,mmio");
                    node.cells("reg", &[0, 0, 8]);
                });
            }
        });
    });
    assert!(DeviceTree::read(&blob).unwrap().firmware.virtio_mmio.is_empty());
}
