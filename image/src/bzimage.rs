//! bzImage: the setup header of the x86 boot protocol around a flat 64-bit payload.
//!
//! Source: Documentation/arch/x86/boot.rst, kernel 6.1; what kexec makes of each field was
//! measured with kexec-tools 2.0.25 and `kexec_file_load` of kernel 6.1.

use goblin::elf::reloc::R_X86_64_RELATIVE;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, LE, U16, U32, U64, Unalign};

use crate::{Error, flat::Flat};

/// Distance of the 64-bit entry point from the start of the loaded payload.
pub const ENTRY_64: u64 = 0x200;

const SECTOR: usize = 512;
/// The boot sector and one setup sector; the payload follows.
const SETUP_BYTES: usize = 2 * SECTOR;
const HEADER_AT: usize = 0x1f1;

/// The setup header from offset 0x1f1 on.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SetupHeader {
    setup_sects: u8,
    root_flags: U16<LE>,
    syssize: U32<LE>,
    ram_size: U16<LE>,
    vid_mode: U16<LE>,
    root_dev: U16<LE>,
    boot_flag: U16<LE>,
    jump: [u8; 2],
    magic: [u8; 4],
    version: U16<LE>,
    realmode_swtch: U32<LE>,
    start_sys_seg: U16<LE>,
    kernel_version: U16<LE>,
    type_of_loader: u8,
    loadflags: u8,
    setup_move_size: U16<LE>,
    code32_start: U32<LE>,
    ramdisk_image: U32<LE>,
    ramdisk_size: U32<LE>,
    bootsect_kludge: U32<LE>,
    heap_end_ptr: U16<LE>,
    ext_loader_ver: u8,
    ext_loader_type: u8,
    cmd_line_ptr: U32<LE>,
    initrd_addr_max: U32<LE>,
    kernel_alignment: U32<LE>,
    relocatable_kernel: u8,
    min_alignment: u8,
    xloadflags: U16<LE>,
    cmdline_size: U32<LE>,
    hardware_subarch: U32<LE>,
    hardware_subarch_data: Unalign<U64<LE>>,
    payload_offset: U32<LE>,
    payload_length: U32<LE>,
    setup_data: Unalign<U64<LE>>,
    pref_address: Unalign<U64<LE>>,
    init_size: U32<LE>,
    handover_offset: U32<LE>,
    kernel_info_offset: U32<LE>,
}

/// Version of the boot protocol. Below 2.12 kexec-tools takes its 32-bit path.
const PROTOCOL: u16 = 0x20f;
/// LOADED_HIGH: the payload is loaded above 1 MiB.
const LOADED_HIGH: u8 = 1;
/// 64-bit entry at 0x200; loadable above 4 GiB; entered with 4- and with 5-level page tables.
/// Without the last, kexec_file_load on a machine with LA57 fails.
const XLOADFLAGS: u16 = 0x63;

/// Wraps the linked payload `elf` into a bzImage.
///
/// # Errors
/// When the file is not a flat image with its entry at [`ENTRY_64`].
pub fn wrap(elf: &[u8]) -> Result<Vec<u8>, Error> {
    let flat = Flat::from_elf(elf)?;
    if flat.entry != ENTRY_64 {
        return Err(Error::Entry { found: flat.entry, wanted: ENTRY_64 });
    }
    // The payload's first instructions apply relocations of this type and know no other.
    if let Some(&other) = flat.relocations.iter().find(|&&kind| kind != R_X86_64_RELATIVE) {
        return Err(Error::Relocation(other));
    }
    let payload_bytes = flat.bytes.len().next_multiple_of(16);
    let header = SetupHeader {
        setup_sects: 1,
        syssize: (payload_bytes as u32 / 16).into(),
        boot_flag: 0xaa55.into(),
        // Jumps over the header, as a boot loader in real mode would; nobody does.
        jump: [0xeb, (HEADER_AT + size_of::<SetupHeader>() - 0x202) as u8],
        magic: *b"HdrS",
        version: PROTOCOL.into(),
        loadflags: LOADED_HIGH,
        code32_start: 0x10_0000.into(),
        initrd_addr_max: 0x7fff_ffff.into(),
        kernel_alignment: 0x1000.into(),
        relocatable_kernel: 1,
        min_alignment: 12,
        xloadflags: XLOADFLAGS.into(),
        // The longest command line; kexec refuses to append one when this is 0.
        cmdline_size: 2047.into(),
        init_size: (flat.memory_size.next_multiple_of(0x1000) as u32).into(),
        ..SetupHeader::new_zeroed_header()
    };
    let mut image = vec![0; SETUP_BYTES];
    image[HEADER_AT..HEADER_AT + size_of::<SetupHeader>()].copy_from_slice(header.as_bytes());
    image.extend_from_slice(&flat.bytes);
    image.resize(SETUP_BYTES + payload_bytes, 0);
    Ok(image)
}

impl SetupHeader {
    fn new_zeroed_header() -> SetupHeader {
        zerocopy::FromZeros::new_zeroed()
    }
}

/// What a bzImage of ours says of itself.
#[derive(Debug, PartialEq, Eq)]
pub struct Facts<'a> {
    /// The payload, as it is loaded.
    pub payload: &'a [u8],
    /// Memory it needs, in bytes.
    pub memory_size: u64,
}

/// Reads an image back.
///
/// # Errors
/// [`Error::NotOurs`] when a field is not what [`wrap`] writes.
pub fn read(image: &[u8]) -> Result<Facts<'_>, Error> {
    let setup = image.get(HEADER_AT..).ok_or(Error::NotOurs("shorter than its setup header"))?;
    let (header, _) = SetupHeader::ref_from_prefix(setup)
        .map_err(|_| Error::NotOurs("shorter than its setup header"))?;
    if header.magic != *b"HdrS" || header.boot_flag.get() != 0xaa55 {
        return Err(Error::NotOurs("no setup header"));
    }
    if header.setup_sects != 1 || header.xloadflags.get() != XLOADFLAGS {
        return Err(Error::NotOurs("the setup header is another program's"));
    }
    let payload = image.get(SETUP_BYTES..).ok_or(Error::NotOurs("no payload"))?;
    Ok(Facts { payload, memory_size: u64::from(header.init_size.get()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flat::tests::elf;

    #[test]
    fn header_fields_lie_where_the_boot_protocol_says() {
        let image = wrap(&elf(0x200, &[(0, &[0x90; 0x300], 0x5000)])).unwrap();
        assert_eq!(image[0x1f1], 1, "setup_sects");
        assert_eq!(&image[0x1fe..0x200], [0x55, 0xaa], "boot_flag");
        assert_eq!(&image[0x200..0x202], [0xeb, 0x6a], "jump");
        assert_eq!(&image[0x202..0x206], b"HdrS");
        assert_eq!(&image[0x206..0x208], [0x0f, 0x02], "version");
        assert_eq!(image[0x211], 1, "loadflags");
        assert_eq!(image[0x234], 1, "relocatable_kernel");
        assert_eq!(&image[0x230..0x234], 0x1000u32.to_le_bytes(), "kernel_alignment");
        assert_eq!(&image[0x236..0x238], [0x63, 0], "xloadflags");
        assert_eq!(&image[0x238..0x23c], 2047u32.to_le_bytes(), "cmdline_size");
        assert_eq!(&image[0x260..0x264], 0x5000u32.to_le_bytes(), "init_size");
        assert_eq!(image.len(), 1024 + 0x300);
    }

    #[test]
    fn image_reads_back_and_a_foreign_one_is_refused() {
        let image = wrap(&elf(0x200, &[(0, &[0x90; 0x300], 0x5000)])).unwrap();
        let facts = read(&image).unwrap();
        assert_eq!((facts.payload.len(), facts.memory_size), (0x300, 0x5000));
        assert!(read(&image[..0x230]).is_err());
        let mut foreign = image;
        foreign[0x1f1] = 27;
        assert!(matches!(read(&foreign), Err(Error::NotOurs(_))));
    }

    #[test]
    fn entry_elsewhere_is_refused() {
        let file = elf(0x100, &[(0, &[0x90; 0x300], 0x300)]);
        assert!(matches!(wrap(&file), Err(Error::Entry { found: 0x100, wanted: 0x200 })));
    }

    /// A linked file with one relocation of type `kind`, named by a dynamic section.
    fn elf_with_relocation(kind: u8) -> Vec<u8> {
        const DYNAMIC: u8 = 2;
        let mut text = [0x90; 0x300];
        text[0x280..0x298].fill(0);
        text[0x288] = kind;
        let table: Vec<u8> = [7u64, 0x280, 8, 24].iter().flat_map(|n| n.to_le_bytes()).collect();
        let mut file = elf(0x200, &[(0, &text, 0x300), (0x1000, &table, 32)]);
        let second_header = 64 + 56;
        file[second_header] = DYNAMIC;
        file
    }

    #[test]
    fn relocation_that_the_payload_cannot_apply_is_refused() {
        const GLOB_DAT: u8 = 6;
        assert!(wrap(&elf_with_relocation(R_X86_64_RELATIVE as u8)).is_ok());
        let refused = wrap(&elf_with_relocation(GLOB_DAT));
        assert!(matches!(refused, Err(Error::Relocation(6))), "{refused:?}");
    }
}
