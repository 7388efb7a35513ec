//! Pure functions from a linked ELF file to the image that kexec loads, and back.

#![forbid(unsafe_code)]

pub mod arm64;
pub mod bzimage;
mod flat;

use serde::Deserialize;

/// The forms of kernel image that we make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// x86: the only form that kexec_load and kexec_file_load both take.
    BzImage,
    /// arm64: the only form that kexec takes.
    Arm64Image,
}

/// Why a linked file cannot become an image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The input is not an ELF64 file, or is cut short.
    #[error("not a linked ELF64 file: {0}")]
    Elf(&'static str),
    /// A segment lies below the image's base or overlaps another in the file.
    #[error("segment at {address:#x} does not fit the flat image: {why}")]
    Segment {
        /// The segment's address.
        address: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The entry point is not where the boot protocol wants it.
    #[error("the entry point lies at {found:#x}, the boot protocol wants {wanted:#x}")]
    Entry {
        /// Where it is.
        found: u64,
        /// Where it must be.
        wanted: u64,
    },
    /// A relocation that the payload does not apply to itself.
    #[error("relocation of type {0}, which the payload's entry code does not know")]
    Relocation(u32),
    /// An image that is read back is not one of ours.
    #[error("not an image of ours: {0}")]
    NotOurs(&'static str),
}

impl Format {
    /// Wraps the linked ELF file `elf` into an image of this form.
    ///
    /// # Errors
    /// [`Error`] says what about the file does not fit the form.
    pub fn wrap(self, elf: &[u8]) -> Result<Vec<u8>, Error> {
        match self {
            Format::BzImage => bzimage::wrap(elf),
            Format::Arm64Image => arm64::wrap(elf),
        }
    }
}
