//! Dumps in every form on foreign bytes: the first byte says what the others are, and whether the whole
//! is flattened. Signatures, and in the more deeply structured kinds all that leads to a page, are made right.

#![no_main]

use host_analyzer::kernel::Kernel;
use host_analyzer::source::{Dump, Memory};
use host_analyzer::{PhysAddr, VirtAddr};
use libfuzzer_sys::fuzz_target;

const PAGE: usize = 4096;

fn put(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    file.resize(file.len().max(at + bytes.len()), 0);
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// An ELF core whose program headers and what they lead to are `bytes`.
fn elf(bytes: &[u8]) -> Vec<u8> {
    let count = bytes.first().copied().unwrap_or_default();
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    for (at, value) in
        [(16, 4), (18, 62), (20, 1), (32, 64), (52, 64), (54, 56), (56, count), (58, 64)]
    {
        put(&mut file, at, &[value, 0]);
    }
    put(&mut file, 64, bytes);
    file
}

/// The two headers of a kdump-compressed file whose bitmaps lie in its third page and whose
/// descriptors in its fourth.
fn headers() -> Vec<u8> {
    let mut file = b"KDUMP   ".to_vec();
    for (at, word) in [(8, 6u32), (428, PAGE as u32), (432, 1), (436, 1), (440, 64)] {
        put(&mut file, at, &word.to_le_bytes());
    }
    put(&mut file, 12 + 4 * 65, b"x86_64");
    put(&mut file, PAGE + 96, &64u64.to_le_bytes());
    put(&mut file, 2 * PAGE, &[0; PAGE]);
    file
}

/// Such a file whose fields, bitmap, descriptors and pages are `bytes`.
fn compressed(mut bytes: &[u8]) -> Vec<u8> {
    let mut file = headers();
    put(&mut file, 2 * PAGE + PAGE / 2, &[0x0f, 0, 0xf0]);
    // Where, how much, what.
    while let [at, size, rest @ ..] = bytes
        && let Some((field, rest)) = rest.split_at_checked(usize::from(size & 15))
    {
        let at = usize::from(*at);
        let place = match size >> 6 {
            0 => 408 + at % 56,
            1 => PAGE + at % 104,
            2 => 2 * PAGE + PAGE / 2 * (at % 2) + at / 2 % 16,
            _ => 3 * PAGE + at,
        };
        put(&mut file, place, field);
        bytes = rest;
    }
    file.resize(file.len().max(4 * PAGE), 0);
    file.extend_from_slice(bytes);
    file
}

/// Such a file with one page, of which `bytes` are the flags and what they unpack.
fn packed(bytes: &[u8]) -> Vec<u8> {
    let Some((flags, bytes)) = bytes.split_first() else { return Vec::new() };
    let mut file = headers();
    put(&mut file, 2 * PAGE + PAGE / 2, &[1]);
    put(&mut file, 3 * PAGE, &(4 * PAGE as u64).to_le_bytes());
    put(&mut file, 3 * PAGE + 8, &(bytes.len() as u32).to_le_bytes());
    put(&mut file, 3 * PAGE + 12, &[*flags]);
    put(&mut file, 4 * PAGE, bytes);
    file
}

/// A flattened file whose records, offset and size in two bytes each, are `bytes`.
fn records(mut bytes: &[u8]) -> Vec<u8> {
    let mut file = flat_header();
    while let [a, b, c, d, rest @ ..] = bytes {
        let [offset, size] = [[*a, *b], [*c, *d]].map(u16::from_be_bytes);
        let there = rest.len().min(size.into());
        put_record(&mut file, u64::from(offset), u64::from(size), &rest[..there]);
        bytes = &rest[there..];
    }
    file
}

fn flat_header() -> Vec<u8> {
    let mut file = b"makedumpfile".to_vec();
    put(&mut file, 23, &[1, 0, 0, 0, 0, 0, 0, 0, 1]);
    file.resize(PAGE, 0);
    file
}

fn put_record(file: &mut Vec<u8>, offset: u64, size: u64, bytes: &[u8]) {
    file.extend_from_slice(&offset.to_be_bytes());
    file.extend_from_slice(&size.to_be_bytes());
    file.extend_from_slice(bytes);
}

/// `file`, flattened in pieces.
fn flattened(file: &[u8], piece: usize) -> Vec<u8> {
    let mut flat = flat_header();
    for (index, bytes) in file.chunks(piece).enumerate() {
        put_record(&mut flat, (index * piece) as u64, bytes.len() as u64, bytes);
    }
    put_record(&mut flat, u64::MAX, u64::MAX, &[]);
    flat
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&kind, bytes)) = bytes.split_first() else { return };
    let file = match kind % 5 {
        0 => bytes.to_vec(),
        1 => elf(bytes),
        2 => compressed(bytes),
        3 => packed(bytes),
        _ => records(bytes),
    };
    let file = match kind / 5 {
        0..40 => file,
        piece => flattened(&file, usize::from(piece) * 37),
    };
    let Ok(dump) = Dump::from_bytes(file) else { return };
    let _ = (dump.completeness(), dump.notes().prstatus.len(), dump.machine());
    let starts: Vec<u64> = dump.ranges().iter().map(|range| range.start).take(64).collect();
    for at in
        starts.into_iter().flat_map(|at| [at, at.wrapping_add(4095)]).chain([0, 5000, 1 << 63])
    {
        if let Ok(run) = dump.run(PhysAddr(at), 5000) {
            assert!(!run.is_empty() && run.len() <= 5000);
        }
        let _ = dump.linear(VirtAddr(at));
    }
    let _ = Kernel::open(&dump, None);
});
