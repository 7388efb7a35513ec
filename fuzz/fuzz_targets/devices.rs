//! Drivers with a device that says and writes whatever it likes: every wait ends, and nothing is done but to
//! tell an error or to go on. The first byte says which driver, the others are what registers read as, and what
//! the device writes into its memory meanwhile.

#![no_main]

use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};

use drivers::PhysAddr;
use drivers::ahci::{AhciDisk, Controller};
use drivers::block::{BlockDevice, Lba};
use drivers::clock::Clock;
use drivers::dma::DmaPool;
use drivers::firmware::IommuKind;
use drivers::iommu;
use drivers::mmio::Registers;
use drivers::nvme::{self, Nvme};
use drivers::virtio::blk::VirtioBlk;
use drivers::virtio::mmio::MmioTransport;
use drivers::virtio::scsi::{self, VirtioScsi};
use libfuzzer_sys::fuzz_target;

/// Size of the pool, which begins at this physical address.
const POOL: usize = 64 << 10;
const BASE: u64 = 1 << 20;

struct Device<'b> {
    bytes: RefCell<std::slice::Iter<'b, u8>>,
    memory: *mut u8,
    pool: &'b DmaPool,
    now: Cell<u64>,
    /// What registers are left at when there are no more bytes.
    last: Cell<u32>,
}

impl Device<'_> {
    fn word(&self) -> u32 {
        let mut bytes = self.bytes.borrow_mut();
        let mut next = || bytes.next().copied();
        match next() {
            None => self.last.get(),
            // The device writes to the memory that it was lent: how much, where, what.
            Some(write) if write & 0x80 != 0 => {
                let at = usize::from(next().unwrap_or(0)) << 8 | usize::from(next().unwrap_or(0));
                for index in 0..usize::from(write & 0x3f) {
                    let at = (at + index) % POOL;
                    if self.pool.is_in_use(at) {
                        // SAFETY: within a buffer, into which no reference points.
                        unsafe { self.memory.add(at).write_volatile(next().unwrap_or(0)) };
                    }
                }
                self.last.get()
            }
            Some(value) => {
                let mut word = || next().unwrap_or(0);
                let word = u32::from_le_bytes([value, word(), word(), word()]);
                self.last.set(word);
                word
            }
        }
    }
}

impl Clock for Device<'_> {
    fn now_us(&self) -> u64 {
        self.now.set(self.now.get() + 250_000);
        self.now.get()
    }
}

impl Registers for &Device<'_> {
    fn read8(&self, _: u64) -> u8 {
        self.word() as u8
    }
    fn read16(&self, _: u64) -> u16 {
        self.word() as u16
    }
    fn read32(&self, _: u64) -> u32 {
        self.word()
    }
    fn write8(&self, _: u64, _: u8) {}
    fn write16(&self, _: u64, _: u16) {}
    fn write32(&self, _: u64, _: u32) {}
}

fn use_disk(disk: &mut dyn BlockDevice) {
    let size = disk.block_size();
    assert!(size.is_power_of_two() && (512..=4096).contains(&size));
    let mut block = vec![0; 4096];
    let _ = disk.read(Lba(0), &mut block);
    let _ = disk.write(Lba(disk.blocks().saturating_sub(1)), &block[..size as usize]);
    let _ = disk.write_physical(Lba(0), PhysAddr(0x1234_5000), 3 << 20);
    let _ = disk.flush();
}

fuzz_target!(|bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else { return };
    let layout = std::alloc::Layout::from_size_align(POOL, 4096).expect("a layout");
    // SAFETY: of a size that is not zero; freed below.
    let memory = unsafe { std::alloc::alloc_zeroed(layout) };
    let base = NonNull::new(memory).expect("memory");
    let offset = BASE.wrapping_sub(memory as u64);
    {
        // SAFETY: the memory is the pool's as long as it lives.
        let pool = unsafe { DmaPool::new(base, POOL, offset, || fence(Ordering::SeqCst)) };
        let bytes = RefCell::new(bytes.iter());
        let device = Device { bytes, memory, pool: &pool, now: Cell::new(0), last: Cell::new(0) };
        let device = &device;
        match which % 6 {
            0 => {
                for id in nvme::scan(&device, &pool, device, &|| {}).unwrap_or_default() {
                    if let Ok(mut disk) = Nvme::open(&device, &pool, device, &|| {}, id) {
                        use_disk(&mut disk);
                    }
                }
            }
            1 => {
                if let Ok(mut disk) = Nvme::open(&device, &pool, device, &|| {}, 1) {
                    use_disk(&mut disk);
                }
            }
            2 => {
                if let Ok(controller) = Controller::new(device, device) {
                    for port in controller.ports().take(2) {
                        if let Ok(mut disk) = AhciDisk::open(&controller, port, &pool, device) {
                            use_disk(&mut disk);
                        }
                    }
                }
            }
            3 => {
                let transport = MmioTransport::open(device);
                if let Some(Ok(mut disk)) = transport.map(|it| VirtioBlk::open(it, &pool, device)) {
                    use_disk(&mut disk);
                }
            }
            4 => {
                let transport = MmioTransport::open(device);
                let units = transport.as_ref().map(|it| (it, scsi::scan(it, &pool, device)));
                if let Some((transport, Ok(units))) = units {
                    for unit in units.found.iter().take(2) {
                        if let Ok(mut disk) = VirtioScsi::open(transport, &pool, device, *unit) {
                            use_disk(&mut disk);
                        }
                    }
                }
            }
            _ => {
                for kind in [IommuKind::VtD, IommuKind::AmdVi, IommuKind::SmmuV3] {
                    let _ = iommu::switch_off(kind, &device, device);
                }
            }
        }
    }
    // SAFETY: allocated with this layout; the pool and all that came of it are gone.
    unsafe { std::alloc::dealloc(memory, layout) };
});
