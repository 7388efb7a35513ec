//! arm64 Image: the 64-byte header of the arm64 boot protocol over a flat payload.
//!
//! Source: Documentation/arm64/booting.rst, kernel 6.1; what kexec makes of each field was measured
//! with kexec-tools 2.0.25. The fields that kexec_file_load checks are set as it wants them
//! (arch/arm64/kernel/kexec_image.c, kernel 6.1); no kernel that offers it was at hand to try.

use goblin::elf::reloc::R_AARCH64_RELATIVE;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, LE, U32, U64};

use crate::{Error, flat::Flat};

/// The linked payload leaves this many bytes free for the header, and begins behind them.
pub const ENTRY: u64 = size_of::<Header>() as u64;

/// The header, which is the first instruction and what a boot loader wants to know.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    code: [U32<LE>; 2],
    text_offset: U64<LE>,
    image_size: U64<LE>,
    flags: U64<LE>,
    reserved: [U64<LE>; 3],
    magic: [u8; 4],
    pe_header: U32<LE>,
}

/// Little-endian, pages of 4 KiB, anywhere in memory. A kernel of any page size takes it: the page
/// size only has to be one that the processor has.
const FLAGS: u64 = 1 << 1 | 1 << 3;

const MAGIC: [u8; 4] = *b"ARM\x64";

/// `b . + ENTRY`: over the header (Arm Architecture Reference Manual, C6.2.26; in words).
const BRANCH_TO_ENTRY: u32 = 0x1400_0000 | (ENTRY as u32 / 4);

/// Wraps the linked payload `elf` into an Image.
///
/// # Errors
/// When the file is not a flat image that begins at [`ENTRY`], behind nothing but zeros.
pub fn wrap(elf: &[u8]) -> Result<Vec<u8>, Error> {
    let Flat { bytes: mut image, memory_size, entry, relocations } = Flat::from_elf(elf)?;
    if entry != ENTRY {
        return Err(Error::Entry { found: entry, wanted: ENTRY });
    }
    // The payload's first instructions apply relocations of this type and know no other.
    if let Some(&other) = relocations.iter().find(|&&kind| kind != R_AARCH64_RELATIVE) {
        return Err(Error::Relocation(other));
    }
    let header = Header {
        code: [BRANCH_TO_ENTRY.into(), 0.into()],
        text_offset: 0.into(),
        // 0 would mean a kernel from before 3.17, for which kexec-tools guesses an offset.
        image_size: memory_size.next_multiple_of(4096).into(),
        flags: FLAGS.into(),
        reserved: [0.into(); 3],
        magic: MAGIC,
        pe_header: 0.into(),
    };
    match image.get_mut(..ENTRY as usize) {
        Some(room) if room.iter().all(|&byte| byte == 0) => room.copy_from_slice(header.as_bytes()),
        _ => return Err(Error::Segment { address: 0, why: "no room for the header before it" }),
    }
    Ok(image)
}

/// Memory that an Image of ours needs, in bytes.
///
/// # Errors
/// [`Error::NotOurs`] says what is not as [`wrap`] makes it.
pub fn memory_size(image: &[u8]) -> Result<u64, Error> {
    let refuse = |why| Err(Error::NotOurs(why));
    let Ok((header, _)) = Header::ref_from_prefix(image) else {
        return refuse("shorter than its header");
    };
    if header.magic != MAGIC {
        return refuse("no arm64 Image magic");
    }
    if header.code[0] != BRANCH_TO_ENTRY || header.flags != FLAGS || header.text_offset != 0 {
        return refuse("fields that this project sets otherwise");
    }
    match header.image_size.get() {
        size if size < image.len() as u64 => refuse("longer than the memory that it asks for"),
        size => Ok(size),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flat::tests::elf;

    fn payload() -> Vec<u8> {
        let mut text = vec![0; ENTRY as usize];
        text.extend_from_slice(b"code");
        elf(ENTRY, &[(0, &text, text.len() as u64), (0x1000, b"data", 0x2100)])
    }

    #[test]
    fn header_says_what_booting_rst_wants_byte_for_byte() {
        let image = wrap(&payload()).unwrap();
        let mut header = vec![0x10, 0, 0, 0x14];
        header.resize(16, 0);
        header.extend_from_slice(&0x4000u64.to_le_bytes());
        header.extend_from_slice(&0xau64.to_le_bytes());
        header.resize(56, 0);
        header.extend_from_slice(b"ARMd\0\0\0\0");
        assert_eq!(image[..64], header);
        assert_eq!((&image[64..68], &image[0x1000..]), (&b"code"[..], &b"data"[..]));
        assert_eq!(memory_size(&image).unwrap(), 0x4000);
    }

    #[test]
    fn payload_with_another_entry_or_no_room_for_the_header_is_refused() {
        let early = elf(0, &[(0, b"text", 4)]);
        assert!(matches!(wrap(&early), Err(Error::Entry { found: 0, wanted: ENTRY })));
        let full = elf(ENTRY, &[(0, &[1; 80], 80)]);
        assert!(matches!(wrap(&full), Err(Error::Segment { address: 0, .. })));
        let short = elf(ENTRY, &[(0, &[0; 8], 8)]);
        assert!(matches!(wrap(&short), Err(Error::Segment { address: 0, .. })));
    }

    #[test]
    fn images_cut_at_any_byte_or_foreign_are_refused() {
        let image = wrap(&payload()).unwrap();
        for cut in 0..ENTRY as usize {
            assert!(memory_size(&image[..cut]).is_err(), "cut at {cut}");
        }
        for at in [0, 8, 24, 56] {
            let mut foreign = image.clone();
            foreign[at] ^= 1;
            assert!(memory_size(&foreign).is_err(), "byte {at} changed");
        }
    }
}
