//! Disk images for the tests, made without the loader's own code.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use format::area::{Layout, Reason, State, Trailer};
use format::note::Header;
use format::record::{self, LISTED, Range, Record};
use format::{BLOCK, CRC_CHUNK, crc32};
use tempfile::TempDir;
use zerocopy::IntoBytes;

/// The uuid of every reservation made here, and how it is printed.
pub const UUID: [u8; 16] = *b"\xc0\xff\xee\0\0\0\x40\0\x80\0\0\0\0\0\0\x01";
pub const UUID_TEXT: &str = "c0ffee00-0000-4000-8000-000000000001";

/// Size of the areas made here: small, and larger than the core.
pub const AREA: u64 = 8 << 20;

/// What a run of the loader left.
pub struct Outcome {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

/// Runs the loader in `directory`, so that its messages hold no path of this machine.
pub fn loader(directory: &TempDir, arguments: &[&str]) -> Outcome {
    outcome(Command::new(env!("CARGO_BIN_EXE_loader")).args(arguments).current_dir(directory))
}

/// Runs the loader in a shell that first does `preparation`.
pub fn loader_after(directory: &TempDir, preparation: &str, arguments: &[&str]) -> Outcome {
    let script = format!("{preparation}; exec \"$0\" \"$@\"");
    outcome(
        Command::new("sh")
            .args(["-c", &script, env!("CARGO_BIN_EXE_loader")])
            .args(arguments)
            .current_dir(directory),
    )
}

fn outcome(command: &mut Command) -> Outcome {
    let output = command.output().unwrap();
    Outcome {
        success: output.status.success(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A directory with the file `name` of `size` zeros in it.
pub fn image(name: &str, size: u64) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    File::create(&path).unwrap().set_len(size).unwrap();
    (directory, path)
}

/// Writes `bytes` into the file at `path`.
pub fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

/// The trailer at the end of the file at `path`.
pub fn trailer(path: &Path) -> Trailer {
    let bytes = fs::read(path).unwrap();
    Trailer::parse(&bytes[bytes.len() - BLOCK as usize..]).unwrap()
}

fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let header = Header {
        name_size: (name.len() as u32).into(),
        desc_size: (desc.len() as u32).into(),
        kind: kind.into(),
    };
    let mut bytes = header.as_bytes().to_vec();
    for part in [name, desc] {
        bytes.extend_from_slice(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// One page that could not be read.
fn unreadable() -> [Range; LISTED] {
    let mut ranges = [Range::default(); LISTED];
    ranges[0] = Range { start: 0x7000.into(), size: 4096.into() };
    ranges
}

fn record() -> Record {
    let mut payload = [0; 64];
    payload[..15].copy_from_slice(b"tinykdump 0.1.0");
    Record {
        version: record::VERSION.into(),
        complete: 1.into(),
        payload,
        first_block_us: 12_345.into(),
        last_block_us: 1_840_000.into(),
        pages_read: 767.into(),
        pages_unreadable: 1.into(),
        headers_dropped: 2.into(),
        memory_used: 589_824.into(),
        unreadable: unreadable(),
    }
}

fn program_header(kind: u32, offset: u64, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; 56];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&offset.to_le_bytes());
    bytes[32..40].copy_from_slice(&size.to_le_bytes());
    bytes[40..48].copy_from_slice(&size.to_le_bytes());
    bytes
}

/// An ELF core of 3 MiB and a page. Its second MiB is zeros.
pub fn core() -> Vec<u8> {
    let size = (3 << 20) + 4096;
    let mut notes = note(b"CORE\0", 1, &[7; 336]);
    notes.extend(note(
        b"VMCOREINFO\0",
        0,
        b"OSRELEASE=6.1.0-42-amd64\nPAGESIZE=4096\nCRASHTIME=1767225599\n",
    ));
    notes.extend(note(
        b"TINYKDUMP\0",
        format::record::KIND,
        &[&[0; 40][..], record().as_bytes()].concat(),
    ));

    let mut bytes = vec![0; 64];
    bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    bytes[16..20].copy_from_slice(&[4, 0, 62, 0]);
    bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
    bytes[52..58].copy_from_slice(&[64, 0, 56, 0, 2, 0]);
    bytes.extend(program_header(4, 4096, notes.len() as u64));
    bytes.extend(program_header(1, 8192, size as u64 - 8192));
    bytes.resize(4096, 0);
    bytes.extend(notes);
    bytes.resize(8192, 0);
    while bytes.len() < size {
        let page = bytes.len() / 4096;
        let zero = (256..512).contains(&page);
        bytes.extend([if zero { 0 } else { page as u8 | 1 }; 4096]);
    }
    bytes
}

/// The bytes of an area that holds [`core`] and says `state`. Its area was captured into 3 times.
pub fn area(state: State, reason: Reason) -> Vec<u8> {
    let layout = Layout::new(AREA).unwrap();
    let core = core();
    let words = core.chunks(CRC_CHUNK as usize).flat_map(|chunk| crc32(chunk).to_le_bytes());
    let words: Vec<u8> = words.collect();
    let mut trailer = Trailer { state, reason, sequence: 3, ..Trailer::empty(UUID, AREA) };
    let mut bytes = vec![0; AREA as usize];
    bytes[..core.len()].copy_from_slice(&core);
    if matches!(state, State::Complete | State::Incomplete) {
        trailer.core_size = core.len() as u64;
        trailer.crc_count = words.len() as u64 / 4;
        trailer.crc_table_crc = crc32(&words);
        bytes[layout.crc_table as usize..][..words.len()].copy_from_slice(&words);
    }
    bytes[layout.trailer as usize..].copy_from_slice(&trailer.to_block());
    bytes
}

/// A directory with the file `area` in it, an area with a dump that says `state`.
pub fn area_image(state: State, reason: Reason) -> (TempDir, PathBuf) {
    let (directory, path) = image("area", AREA);
    patch(&path, 0, &area(state, reason));
    (directory, path)
}

/// A directory with the file `disk` in it: a GPT of two partitions of the size of an area, at
/// 1 MiB and at 16 MiB.
pub fn gpt_image() -> (TempDir, PathBuf) {
    const SECTORS: u64 = (32 << 20) / 512;
    let (directory, path) = image("disk", SECTORS * 512);
    let mut table = vec![0; 128 * 128];
    for (index, start) in [1u64 << 20, 16 << 20].into_iter().enumerate() {
        let entry = &mut table[index * 128..][..128];
        entry[..16].fill(0xaa);
        entry[16..32].fill(index as u8 + 0x11);
        entry[32..40].copy_from_slice(&(start / 512).to_le_bytes());
        entry[40..48].copy_from_slice(&((start + AREA) / 512 - 1).to_le_bytes());
    }
    for (lba, table_lba) in [(1, 2), (SECTORS - 1, SECTORS - 33)] {
        let mut header = vec![0; 92];
        header[..16].copy_from_slice(b"EFI PART\0\0\x01\0\x5c\0\0\0");
        for (offset, value) in [(24, lba), (40, 34), (48, SECTORS - 34), (72, table_lba)] {
            header[offset..offset + 8].copy_from_slice(&u64::to_le_bytes(value));
        }
        header[80..84].copy_from_slice(&128u32.to_le_bytes());
        header[84..88].copy_from_slice(&128u32.to_le_bytes());
        header[88..92].copy_from_slice(&crc32(&table).to_le_bytes());
        let crc = crc32(&header);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        patch(&path, lba * 512, &header);
        patch(&path, table_lba * 512, &table);
    }
    (directory, path)
}
