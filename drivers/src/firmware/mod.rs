//! What firmware tells about the machine, in terms that no source of it owns.
//!
//! [`acpi`] and [`fdt`] each fill in a [`Firmware`] what they know and what nobody has filled in
//! before; [`efi`] leads from the one to the other. What firmware says is believed no further than
//! that devices are looked for there: every driver checks what it finds.

pub mod acpi;
pub mod efi;
pub mod fdt;

use heapless::Vec;

use crate::PhysAddr;

/// Most PCI host bridges that are remembered; further ones are left out.
pub const MAX_PCI_HOSTS: usize = 8;

/// Most memory windows of a PCI host bridge that are remembered.
pub const MAX_WINDOWS: usize = 3;

/// Most virtio-mmio devices that are remembered: as many as QEMU's `virt` machine has.
pub const MAX_VIRTIO_MMIO: usize = 32;

/// Most IOMMUs that are remembered: large machines have one for each root complex.
pub const MAX_IOMMUS: usize = 32;

/// Most generic watchdogs that are remembered.
pub const MAX_WATCHDOGS: usize = 4;

/// The facts that a dump needs. What is not known is `None` or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firmware {
    /// The serial port that firmware calls its console.
    pub console: Option<Uart>,
    /// Host bridges of PCI, each with its own configuration space.
    pub pci: Vec<PciHost, MAX_PCI_HOSTS>,
    /// Addresses of the registers of virtio devices without a bus.
    pub virtio_mmio: Vec<PhysAddr, MAX_VIRTIO_MMIO>,
    /// IOMMUs.
    pub iommus: Vec<Iommu, MAX_IOMMUS>,
    /// Whether there are more.
    pub more_iommus: bool,
    /// Generic watchdogs of ARM machines.
    pub watchdogs: Vec<WatchdogFrames, MAX_WATCHDOGS>,
    /// How PSCI is called (ARM DEN 0022), version 0.2 or newer.
    pub psci: Option<PsciConduit>,
    /// Frequency of the ARM generic timer in Hz, for processors whose CNTFRQ_EL0 was never set.
    pub counter_hz: Option<u64>,
    /// The counter's control registers, whose word at 0x20 is the frequency too (ARM DDI 0487,
    /// I5.6, CNTFID0). On many machines only the secure world can read them.
    pub counter_control: Option<PhysAddr>,
    /// Port of the ACPI power management timer: 3 579 545 Hz, at least 24 bits.
    pub pm_timer: Option<u16>,
    /// The reset register's port and the value to write. A register in memory or in PCI
    /// configuration space stays unknown: a wrong one would write to the dead kernel's memory, and
    /// the machine has other ways to restart.
    pub reset: Option<(u16, u8)>,
    /// How to switch off.
    pub soft_off: Option<SoftOff>,
}

impl Firmware {
    /// Takes an IOMMU; one that is known already is no second one.
    fn add_iommu(&mut self, iommu: Iommu) {
        if !self.iommus.contains(&iommu) {
            self.more_iommus |= self.iommus.push(iommu).is_err();
        }
    }
}

/// Where the registers of a generic watchdog are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchdogFrames {
    /// The frame that it is petted by.
    pub refresh: PhysAddr,
    /// The frame that says whether it runs.
    pub control: PhysAddr,
}

/// An IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Iommu {
    /// Whose it is.
    pub kind: IommuKind,
    /// Address of its first register.
    pub base: PhysAddr,
}

/// Kinds of IOMMUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IommuKind {
    /// Intel's VT-d.
    VtD,
    /// AMD's I/O virtualization.
    AmdVi,
    /// Arm's SMMU, version 3.
    SmmuV3,
}

/// A serial port with registers in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uart {
    /// What kind of port it is.
    pub kind: UartKind,
    /// Address of its first register.
    pub base: PhysAddr,
    /// Frequency in Hz that its speed is divided from.
    pub clock_hz: Option<u32>,
    /// Speed in bits per second that firmware set up.
    pub baud: Option<u32>,
}

/// Kinds of serial ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UartKind {
    /// ARM PrimeCell UART (ARM DDI 0183).
    Pl011,
    /// The part of a PL011 that ARM's server base system architecture demands (ARM DEN 0029,
    /// appendix B): it cannot be set up, only used.
    Sbsa,
    /// 16550 and its relatives.
    Ns16550 {
        /// Registers are `1 << register_shift` bytes apart.
        register_shift: u8,
        /// Bytes of an access: 1 or 4.
        register_width: u8,
    },
}

/// The instruction that calls PSCI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PsciConduit {
    /// `hvc #0`: a hypervisor answers.
    Hvc,
    /// `smc #0`: the secure monitor answers.
    Smc,
}

/// A PCI host bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciHost {
    /// Its configuration space.
    pub ecam: EcamRange,
    /// Where the processor reaches the memory of what is behind it. Empty when firmware does not
    /// say; PCI addresses then are the processor's.
    pub windows: Vec<Window, MAX_WINDOWS>,
}

/// A range of memory-mapped PCI configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EcamRange {
    /// Address of bus 0, even if that bus is not in the range.
    pub base: PhysAddr,
    /// PCI segment group.
    pub segment: u16,
    /// First bus.
    pub first_bus: u8,
    /// Last bus.
    pub last_bus: u8,
}

/// A range of PCI memory addresses as the processor sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First address on the bus.
    pub pci: u64,
    /// The same byte's address for the processor.
    pub cpu: PhysAddr,
    /// Size in bytes.
    pub size: u64,
    /// Whether reads have no side effects: a BAR that is not prefetchable does not belong here.
    pub prefetchable: bool,
}

/// What to write where to enter the ACPI state S5, soft off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SoftOff {
    /// PM1a control port.
    pub pm1a: u16,
    /// PM1b control port, if there is one.
    pub pm1b: Option<u16>,
    /// SLP_TYP for PM1a and PM1b.
    pub sleep_type: (u8, u8),
}

/// A piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Address of its first byte.
    pub at: PhysAddr,
    /// Size in bytes.
    pub size: u64,
}
