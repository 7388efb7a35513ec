//! Device registers in memory.

#![allow(unsafe_code)]

use core::ptr::NonNull;

/// Registers of a device, or of its fake in a test. Offsets are in bytes; reads outside of the
/// registers give all ones, as from a device that is gone, and writes there do nothing.
pub trait Registers {
    /// Reads one byte.
    fn read8(&self, offset: u64) -> u8;
    /// Reads two bytes; `offset` must be aligned to 2.
    fn read16(&self, offset: u64) -> u16;
    /// Reads four bytes; `offset` must be aligned to 4.
    fn read32(&self, offset: u64) -> u32;
    /// Writes one byte.
    fn write8(&self, offset: u64, value: u8);
    /// Writes two bytes; `offset` must be aligned to 2.
    fn write16(&self, offset: u64, value: u16);
    /// Writes four bytes; `offset` must be aligned to 4.
    fn write32(&self, offset: u64, value: u32);

    /// Writes eight bytes as two halves, the lower first.
    fn write64_halves(&self, offset: u64, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }
}

/// Width of an access in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// One byte.
    Byte = 1,
    /// Two bytes.
    Half = 2,
    /// Four bytes.
    Word = 4,
}

/// How the processor reaches device registers.
pub struct Access {
    /// Reads a register, aligned to its width and mapped as device memory. All ones where the bus
    /// refuses.
    pub load: unsafe fn(at: *const u8, width: Width) -> u32,
    /// Writes a register, likewise.
    pub store: unsafe fn(at: *mut u8, width: Width, value: u32),
}

/// Access by the compiler's own loads and stores, on processors where the bus refuses nothing.
pub static PLAIN: Access = Access { load: plain_load, store: plain_store };

unsafe fn plain_load(at: *const u8, width: Width) -> u32 {
    // SAFETY: the caller's promise; all bits are valid for an integer.
    unsafe {
        match width {
            Width::Byte => at.read_volatile().into(),
            Width::Half => at.cast::<u16>().read_volatile().into(),
            Width::Word => at.cast::<u32>().read_volatile(),
        }
    }
}

unsafe fn plain_store(at: *mut u8, width: Width, value: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        match width {
            Width::Byte => at.write_volatile(value as u8),
            Width::Half => at.cast::<u16>().write_volatile(value as u16),
            Width::Word => at.cast::<u32>().write_volatile(value),
        }
    }
}

/// Mapped device registers.
pub struct Mmio {
    base: NonNull<u8>,
    size: u64,
    access: &'static Access,
}

// SAFETY: device memory is mapped for every processor alike, and one value owns its registers.
unsafe impl Send for Mmio {}

impl Mmio {
    /// Registers at `base`.
    ///
    /// # Safety
    /// `base` must be aligned to 4 bytes and mapped for `size` bytes as device memory for as long as
    /// the payload runs, and hold nothing that the compiler knows of. `access` must be fit for such
    /// memory.
    #[must_use]
    pub const unsafe fn new(base: NonNull<u8>, size: u64, access: &'static Access) -> Mmio {
        Mmio { base, size, access }
    }

    /// A part of these registers; `None` when it does not lie within.
    #[must_use]
    pub fn part(&self, offset: u64, size: u64) -> Option<Mmio> {
        let end = offset.checked_add(size)?;
        if end > self.size || !offset.is_multiple_of(4) {
            return None;
        }
        // SAFETY: offset lies within the mapping.
        let base = unsafe { self.base.add(offset as usize) };
        Some(Mmio { base, size, access: self.access })
    }

    fn pointer(&self, offset: u64, width: Width) -> Option<*mut u8> {
        let size = width as u64;
        let fits = offset.checked_add(size).is_some_and(|end| end <= self.size);
        // SAFETY: the offset lies within the mapping.
        (fits && offset.is_multiple_of(size))
            .then(|| unsafe { self.base.add(offset as usize) }.as_ptr())
    }

    fn read(&self, offset: u64, width: Width) -> u32 {
        match self.pointer(offset, width) {
            // SAFETY: `pointer` gives an aligned pointer into the mapping, which `new`'s caller
            // promised to be device memory.
            Some(pointer) => unsafe { (self.access.load)(pointer, width) },
            None => u32::MAX,
        }
    }

    fn write(&self, offset: u64, width: Width, value: u32) {
        if let Some(pointer) = self.pointer(offset, width) {
            // SAFETY: as in `read`; nothing but the device is behind the pointer.
            unsafe { (self.access.store)(pointer, width, value) }
        }
    }
}

impl Registers for Mmio {
    fn read8(&self, offset: u64) -> u8 {
        self.read(offset, Width::Byte) as u8
    }
    fn read16(&self, offset: u64) -> u16 {
        self.read(offset, Width::Half) as u16
    }
    fn read32(&self, offset: u64) -> u32 {
        self.read(offset, Width::Word)
    }
    fn write8(&self, offset: u64, value: u8) {
        self.write(offset, Width::Byte, value.into());
    }
    fn write16(&self, offset: u64, value: u16) {
        self.write(offset, Width::Half, value.into());
    }
    fn write32(&self, offset: u64, value: u32) {
        self.write(offset, Width::Word, value);
    }
}
