//! Headers as kexec writes them, and as it should not.

use std::string::ToString;
use std::vec;
use std::vec::Vec;

use super::*;
use crate::fake::{Claim, FakeMachine, LIMIT, elfcorehdr64, note};

const AT: u64 = 0x3b00_0000;
const NOTE: u32 = 4;
const LOAD: u32 = 1;
const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;

/// What kexec -c makes of a machine with 512 MB: two CPUs of which one saved its registers, the
/// kernel image, low memory moved to a backup, and the rest.
fn usual() -> Vec<Claim> {
    vec![
        (NOTE, 0x100_0000, 0, 0x100_0000, 0x200),
        (NOTE, 0x100_1000, 0, 0x100_1000, 0x200),
        (NOTE, 0x100_2000, 0, 0x100_2000, 0x1000),
        (LOAD, 0x200_0000, 0xffff_ffff_8200_0000, 0x200_0000, 0x40_0000),
        (LOAD, 0x3a00_0000, DIRECT_MAP, 0, 0x9_fc00),
        (LOAD, 0x10_0000, DIRECT_MAP + 0x10_0000, 0x10_0000, 0x1ff0_0000),
    ]
}

fn machine(claims: &[Claim]) -> FakeMachine {
    let mut machine = FakeMachine::default();
    let mut registers = note(b"CORE", 1, &[7; 336]);
    registers.resize(0x200, 0);
    machine.put(0x100_0000, registers);
    machine.put(0x100_1000, vec![0; 0x200]);
    let mut vmcoreinfo = note(b"VMCOREINFO", 0, b"OSRELEASE=6.1.0\nNUMBER(phys_base)=0\n");
    vmcoreinfo.resize(0x1000, 0);
    machine.put(0x100_2000, vmcoreinfo);
    machine.put(AT, elfcorehdr64(claims));
    machine
}

fn collect(machine: &mut FakeMachine) -> Result<OldMemory, Error> {
    let mut old = OldMemory::new();
    let headers = Elfcorehdr::open(machine, Architecture::X86_64, OldPhys(AT), LIMIT)?;
    headers.collect(machine, &mut [0; MAX_NOTE_BYTES], &mut old)?;
    Ok(old)
}

#[test]
fn headers_of_a_usual_machine_are_believed() {
    let mut machine = machine(&usual());
    let old = collect(&mut machine).unwrap();
    assert_eq!(old.ranges().len(), 2);
    assert_eq!(old.ranges()[0].source, OldPhys(0x3a00_0000));
    assert_eq!((old.ranges()[0].phys, old.ranges()[0].size), (0, 0x9_fc00));
    assert_eq!(old.image()[0].phys, 0x200_0000);
    assert_eq!(old.vmcoreinfo.get("OSRELEASE"), Some("6.1.0"));
    assert_eq!((old.dropped, machine.said.len()), (0, 0));
}

#[test]
fn addresses_that_kexec_tools_did_not_know_come_from_vmcoreinfo() {
    let mut machine = machine(&[
        (NOTE, 0x100_2000, 0, 0x100_2000, 0x1000),
        // As kexec-tools 2.0.25 writes them on arm64 where /proc/kallsyms lacks _text.
        (LOAD, 0x57c9_94e0_0000, u64::MAX, 0x57c9_94e0_0000, 0xffff_a836_aceb_0000),
        (LOAD, 0x4000_0000, 0, 0x4000_0000, 0x1b40_0000),
    ]);
    let mut vmcoreinfo = note(
        b"VMCOREINFO",
        0,
        b"SYMBOL(_stext)=ffffbc6991e10000\nNUMBER(VA_BITS)=48\nSYMBOL(prb)=ffffbc6993004000\n\
          NUMBER(kimage_voffset)=0xffffbc6951c00000\nNUMBER(PHYS_OFFSET)=0x40000000\n",
    );
    vmcoreinfo.resize(0x1000, 0);
    machine.put(0x100_2000, vmcoreinfo);
    let headers =
        Elfcorehdr::open(&mut machine, Architecture::Aarch64, OldPhys(AT), LIMIT).unwrap();
    let mut old = OldMemory::new();
    headers.collect(&mut machine, &mut [0; MAX_NOTE_BYTES], &mut old).unwrap();
    assert_eq!(old.ranges()[0].virt, 0xffff_0000_0000_0000);
    let image = ImageMapping { virt: 0xffff_bc69_91e1_0000, phys: 0x4021_0000, size: 0x120_0000 };
    assert_eq!((old.image(), old.dropped), (&[image][..], 1));
    assert!(machine.said[0].contains("corrected by VMCOREINFO"), "{:?}", machine.said);
}

#[test]
fn cpu_that_never_saved_its_registers_has_no_note() {
    let mut machine = machine(&usual());
    let headers = Elfcorehdr::open(&mut machine, Architecture::X86_64, OldPhys(AT), LIMIT).unwrap();
    let mut names = Vec::new();
    headers.each_note(&mut machine, &mut [0; 4096], &mut |note| names.push(note.name.to_vec()));
    assert_eq!(names, [&b"CORE"[..], b"VMCOREINFO"]);
}

#[test]
fn each_impossible_header_is_dropped_with_a_message_and_the_rest_is_dumped() {
    let impossible: [Claim; 6] = [
        (LOAD, LIMIT, DIRECT_MAP, LIMIT, 0x1000),
        (LOAD, u64::MAX - 0xfff, DIRECT_MAP, 0, 0x2000),
        (LOAD, 0x10_1000, DIRECT_MAP + 0x10_1000, 0x10_1000, 0x1000),
        (LOAD, 0, DIRECT_MAP, 0x5000_0000, 1 << 40),
        // What kexec-tools 2.0.25 writes where /proc/kallsyms has no _text.
        (LOAD, 0, u64::MAX, 0, u64::MAX),
        (LOAD, 0x300_0000, 0xffff_ffff_8200_0000, 0x300_0000, 0x1000),
    ];
    for claim in impossible {
        let mut claims = usual();
        claims.push(claim);
        let mut machine = machine(&claims);
        let old = collect(&mut machine).unwrap();
        assert_eq!((old.dropped, old.ranges().len(), old.image().len()), (1, 2, 1), "{claim:x?}");
        assert!(machine.has_said("program header 6 dropped"), "{:?}", machine.said);
    }
}

#[test]
fn missing_or_wrong_image_header_is_derived_from_vmcoreinfo() {
    for wrong in [None, Some((LOAD, 0, u64::MAX - 0xff, 0, u64::MAX))] {
        let mut claims = usual();
        claims.remove(3);
        claims.extend(wrong);
        let mut machine = machine(&claims);
        let info = b"NUMBER(phys_base)=0\nSYMBOL(_stext)=ffffffff82000000\n";
        machine.put(0x100_2000, note(b"VMCOREINFO", 0, info));
        machine.put(AT, {
            claims[2].4 = note(b"VMCOREINFO", 0, info).len() as u64;
            elfcorehdr64(&claims)
        });
        let old = collect(&mut machine).unwrap();
        assert_eq!((old.image()[0].virt, old.image()[0].phys), (0xffff_ffff_8200_0000, 0x200_0000));
        assert!(machine.has_said("taken from VMCOREINFO"), "{:?}", machine.said);
    }
}

#[test]
fn garbage_in_place_of_the_headers_is_named() {
    let spoil = |at: usize, bytes: &[u8]| {
        let mut machine = machine(&usual());
        let mut header = elfcorehdr64(&usual());
        header[at..at + bytes.len()].copy_from_slice(bytes);
        machine.put(AT, header);
        collect(&mut machine).err()
    };
    assert_eq!(spoil(0, b"\x7fELG"), Some(Error::NotElf));
    assert_eq!(spoil(4, &[3]), Some(Error::Foreign), "class");
    assert_eq!(spoil(5, &[2]), Some(Error::Foreign), "big-endian");
    assert_eq!(spoil(16, &[2]), Some(Error::Foreign), "executable");
    assert_eq!(spoil(54, &[57]), Some(Error::HeaderSize(57)));
    assert_eq!(spoil(32, &u64::MAX.to_le_bytes()), Some(Error::OutsideAddressSpace));
    assert_eq!(spoil(32, &(LIMIT - AT - 8).to_le_bytes()), Some(Error::OutsideAddressSpace));
    assert_eq!(spoil(56, &[0, 0]), Some(Error::NoMemory), "no headers");
}

#[test]
fn headers_outside_of_memory_are_refused() {
    let mut machine = FakeMachine::default();
    let mut open =
        |at| Elfcorehdr::open(&mut machine, Architecture::X86_64, OldPhys(at), LIMIT).err();
    assert_eq!(open(LIMIT), Some(Error::OutsideAddressSpace));
    assert_eq!(open(u64::MAX), Some(Error::OutsideAddressSpace));
    assert_eq!(open(0x1000), Some(Error::Unreadable));
}

#[test]
fn extended_number_of_headers_is_read_and_bounded() {
    let mut header = elfcorehdr64(&usual());
    let section_at = header.len() as u64;
    header[40..48].copy_from_slice(&section_at.to_le_bytes());
    header[56..58].copy_from_slice(&[0xff, 0xff]);
    header.resize(header.len() + 64, 0);
    for (count, expected) in
        [(6u32, None), (u32::MAX, Some(Error::TooManyHeaders(u32::MAX.into())))]
    {
        let at = section_at as usize + 44;
        header[at..at + 4].copy_from_slice(&count.to_le_bytes());
        let mut machine = machine(&usual());
        machine.put(AT, header.clone());
        assert_eq!(collect(&mut machine).err(), expected);
    }
}

#[test]
fn flood_of_impossible_headers_does_not_flood_the_console() {
    let mut claims = usual();
    claims.extend([(LOAD, LIMIT, DIRECT_MAP, LIMIT, 0x1000); 3000]);
    let mut machine = machine(&claims);
    let old = collect(&mut machine).unwrap();
    assert_eq!((old.dropped, old.ranges().len(), machine.said.len()), (3000, 2, 9));
}

#[test]
fn encrypted_memory_is_refused() {
    let mut machine = machine(&usual());
    let mut info = note(b"VMCOREINFO", 0, b"NUMBER(sme_mask)=140737488355328\n");
    info.resize(0x1000, 0);
    machine.put(0x100_2000, info);
    assert_eq!(collect(&mut machine).err(), Some(Error::Encrypted));
}

/// ELF32 headers with one program header for VMCOREINFO, one for the image and one for memory whose
/// direct-map address has the lower half `memory_virt`.
fn narrow(memory_virt: u32) -> FakeMachine {
    let mut bytes = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend_from_slice(&[4, 0, 3, 0, 1, 0, 0, 0]);
    for field in [0u32, 52, 0, 0] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    for field in [52u16, 32, 3, 0, 0, 0] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    let info = [NOTE, 0x100_2000, 0, 0x100_2000, 0x1000, 0x1000, 0, 0];
    let image = [LOAD, 0x300_0000, 0x8200_0000, 0x300_0000, 0x1000, 0x1000, 7, 0];
    let memory = [LOAD, 0x10_0000, memory_virt, 0x10_0000, 0x1ff0_0000, 0x1ff0_0000, 7, 0];
    for field in info.iter().chain(&image).chain(&memory) {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    bytes.resize(256, 0);
    let mut machine = machine(&usual());
    let mut info = note(b"VMCOREINFO", 0, b"NUMBER(phys_base)=16777216\n");
    info.resize(0x1000, 0);
    machine.put(0x100_2000, info);
    machine.put(AT, bytes);
    machine
}

#[test]
fn headers_of_32_bits_are_read_as_well() {
    // The second is what KASLR can make of the direct map's lower half.
    for memory_virt in [0x10_0000, 0x8010_0000] {
        let old = collect(&mut narrow(memory_virt)).unwrap();
        assert_eq!((old.ranges()[0].phys, old.ranges()[0].size), (0x10_0000, 0x1ff0_0000));
        assert_eq!((old.image()[0].virt, old.image()[0].size), (0xffff_ffff_8200_0000, 0x1000));
    }
}

#[test]
fn headers_with_any_byte_changed_do_no_harm() {
    let good = elfcorehdr64(&usual());
    for at in 0..good.len() {
        for value in [0, 0x7f, 0xff] {
            let mut header = good.clone();
            header[at] = value;
            let mut machine = machine(&usual());
            machine.put(AT, header);
            if let Err(error) = collect(&mut machine) {
                assert!(!error.to_string().is_empty());
            }
        }
    }
}
