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

/// Mapped device registers.
#[derive(Debug)]
pub struct Mmio {
    base: NonNull<u8>,
    size: u64,
}

// SAFETY: device memory is mapped for every processor alike, and one value owns its registers.
unsafe impl Send for Mmio {}

impl Mmio {
    /// Registers at `base`.
    ///
    /// # Safety
    /// `base` must be aligned to 4 bytes and mapped for `size` bytes as device memory for as long as
    /// the payload runs, and hold nothing that the compiler knows of.
    #[must_use]
    pub const unsafe fn new(base: NonNull<u8>, size: u64) -> Mmio {
        Mmio { base, size }
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
        Some(Mmio { base, size })
    }

    fn pointer<T>(&self, offset: u64) -> Option<*mut T> {
        let size = size_of::<T>() as u64;
        let fits = offset.checked_add(size).is_some_and(|end| end <= self.size);
        // SAFETY: the offset lies within the mapping.
        (fits && offset.is_multiple_of(size))
            .then(|| unsafe { self.base.add(offset as usize) }.cast().as_ptr())
    }

    fn read<T: Copy>(&self, offset: u64, absent: T) -> T {
        match self.pointer::<T>(offset) {
            // SAFETY: `pointer` gives an aligned pointer into the mapping, which `new`'s caller
            // promised to be device memory; T is an integer, for which all bits are valid.
            Some(pointer) => unsafe { pointer.read_volatile() },
            None => absent,
        }
    }

    fn write<T: Copy>(&self, offset: u64, value: T) {
        if let Some(pointer) = self.pointer::<T>(offset) {
            // SAFETY: as in `read`; nothing but the device is behind the pointer.
            unsafe { pointer.write_volatile(value) }
        }
    }
}

impl Registers for Mmio {
    fn read8(&self, offset: u64) -> u8 {
        self.read(offset, u8::MAX)
    }
    fn read16(&self, offset: u64) -> u16 {
        self.read(offset, u16::MAX)
    }
    fn read32(&self, offset: u64) -> u32 {
        self.read(offset, u32::MAX)
    }
    fn write8(&self, offset: u64, value: u8) {
        self.write(offset, value);
    }
    fn write16(&self, offset: u64, value: u16) {
        self.write(offset, value);
    }
    fn write32(&self, offset: u64, value: u32) {
        self.write(offset, value);
    }
}
