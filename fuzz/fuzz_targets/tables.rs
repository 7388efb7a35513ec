//! What firmware, partition tables and marks tell, on foreign bytes: the first byte says what the others are.
//! Checksums are made right, or nothing behind them would ever be looked at.

#![no_main]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use drivers::firmware::Window;
use drivers::firmware::fdt::DeviceTree;
use drivers::firmware::{Firmware, acpi};
use drivers::mmio::Mmio;
use drivers::pci::{self, ConfigSpace, Function};
use drivers::{PhysAddr, Physical};
use format::area::Trailer;
use format::crc32;
use format::handoff::{self, Handoff};
use format::{gpt, mbr};
use libfuzzer_sys::fuzz_target;

/// Where the memory that holds the tables begins.
const BASE: u64 = 0x1000;

struct Memory(Vec<u8>);

impl Physical for Memory {
    fn read(&self, at: PhysAddr, into: &mut [u8]) -> bool {
        let start = at.0.wrapping_sub(BASE) as usize;
        let bytes = start.checked_add(into.len()).and_then(|end| self.0.get(start..end));
        bytes.map(|bytes| into.copy_from_slice(bytes)).is_some()
    }

    fn map_device(&self, _: PhysAddr, _: u64) -> Option<Mmio> {
        None
    }
}

impl Memory {
    /// Adds a table with the right length and checksum, and returns where it is.
    fn add(&mut self, signature: &[u8; 4], body: &[u8]) -> u64 {
        let at = BASE + self.0.len() as u64;
        let mut table = signature.to_vec();
        table.extend_from_slice(&(36 + body.len() as u32).to_le_bytes());
        table.resize(36, 0);
        table.extend_from_slice(body);
        table[9] = table.iter().fold(0u8, |sum, &byte| sum.wrapping_sub(byte));
        self.0.extend(table);
        at
    }
}

const SIGNATURES: [&[u8; 4]; 8] =
    [b"FACP", b"MCFG", b"SPCR", b"GTDT", b"DMAR", b"IVRS", b"IORT", b"DSDT"];

/// The bytes as a list of tables: which one, its length, its body.
fn acpi_tables(mut bytes: &[u8]) {
    let mut memory = Memory(Vec::new());
    let mut tables = Vec::new();
    while let [which, low, high, rest @ ..] = bytes {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (body, next) = rest.split_at(length);
        let signature = SIGNATURES[usize::from(*which) % SIGNATURES.len()];
        tables.extend_from_slice(&(memory.add(signature, body) as u32).to_le_bytes());
        bytes = next;
    }
    let root = memory.add(b"RSDT", &tables) as u32;
    let at = BASE + memory.0.len() as u64;
    let mut pointer = b"RSD PTR ".to_vec();
    pointer.resize(16, 0);
    pointer.extend_from_slice(&root.to_le_bytes());
    pointer[8] = pointer.iter().fold(0u8, |sum, &byte| sum.wrapping_sub(byte));
    memory.0.extend(pointer);
    acpi::fill(&mut Firmware::default(), &memory, PhysAddr(at));
}

fn partition_table(bytes: &[u8]) {
    let mut sector = [0; 512];
    let size = bytes.len().min(512);
    sector[..size].copy_from_slice(&bytes[..size]);
    sector[..8].copy_from_slice(b"EFI PART");
    sector[16..20].fill(0);
    let length = u32::from_le_bytes([sector[12], sector[13], sector[14], sector[15]]) as usize;
    let crc = crc32(sector.get(..length).unwrap_or(&[]));
    sector[16..20].copy_from_slice(&crc.to_le_bytes());
    let sectors = 1 << 20;
    if let Ok(header) = gpt::Header::parse(&sector, 1, sectors) {
        assert!(header.entries_lba + header.table_sectors() <= sectors);
        for entry in header.entries(0, &bytes[size..]) {
            assert!(entry.first_lba <= entry.last_lba && entry.last_lba < sectors);
        }
    }
}

struct Sectors<'a>(&'a [u8]);

impl mbr::Visitor for Sectors<'_> {
    type Error = ();

    fn read(&mut self, lba: u64) -> Result<[u8; 512], ()> {
        assert!(lba < MBR_SECTORS);
        // Few bytes make a large disk: sectors repeat.
        let at = (lba as usize * 16) % self.0.len().max(1);
        let mut sector = [0; 512];
        let some = self.0.get(at..).unwrap_or(&[]);
        let size = some.len().min(64);
        sector[446..446 + size].copy_from_slice(&some[..size]);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        Ok(sector)
    }

    fn partition(&mut self, entry: mbr::Entry) {
        assert!(entry.first_lba > 0 && entry.first_lba + entry.sectors <= MBR_SECTORS);
    }
}

const MBR_SECTORS: u64 = 1 << 33;

/// A handoff with right checksums: whatever it says, extents lie on the disk.
fn handoff(bytes: &[u8]) {
    let Some((files, content)) = bytes.split_first() else { return };
    let blob = [&handoff::header((*files).into(), content)[..], content].concat();
    let read = |at: u64, into: &mut [u8]| {
        let from = blob.get(at as usize..).and_then(|bytes| bytes.get(..into.len()));
        from.map(|from| into.copy_from_slice(from)).is_some()
    };
    let Ok(handoff) = Handoff::open(blob.len() as u64, &read) else { return };
    for file in handoff.files() {
        let extents = (0..file.extents).map(|index| handoff.extent(&file, index).expect("checked"));
        let size: u64 = extents.map(|extent| extent.size).sum();
        assert_eq!(size, file.area_size);
    }
}

fn mark(bytes: &[u8]) {
    let mut block = [0; 4096];
    let size = bytes.len().min(508);
    block[..size].copy_from_slice(&bytes[..size]);
    block[..12].copy_from_slice(b"TKDTRAIL\x01\0\0\0");
    let crc = crc32(&block[..508]);
    block[508..512].copy_from_slice(&crc.to_le_bytes());
    if let Ok(trailer) = Trailer::parse(&block) {
        assert!(trailer.core_size <= trailer.area_size && trailer.written <= trailer.area_size);
        assert_eq!(Trailer::parse(&trailer.to_block()), Ok(trailer));
    }
}

/// Configuration space of two buses. What was not written reads as the bytes say, over and over.
struct Configuration<'a> {
    bytes: &'a [u8],
    written: RefCell<BTreeMap<(Function, u16), u32>>,
    windows: Vec<Window>,
    accesses: Cell<u32>,
}

impl Configuration<'_> {
    /// Bits of BARs that cannot be set, by the function and the BAR: of registers that take 16 bytes to
    /// 2 GiB, or all of them, and none.
    fn fixed(at: Function, offset: u16) -> u32 {
        let size = u32::from(at.device).wrapping_mul(7).wrapping_add(u32::from(offset)) % 33;
        if (0x10..0x28).contains(&offset) { (1u32 << size.clamp(4, 31)) - 1 } else { 0 }
    }
}

impl ConfigSpace for Configuration<'_> {
    fn read(&self, at: Function, offset: u16) -> u32 {
        assert!(offset % 4 == 0 && offset < 0x1000 && at.device < 32 && at.function < 8);
        self.accesses.set(self.accesses.get() + 1);
        // 2 buses of 256 functions; the longest lists have 480 entries, each read a few times.
        assert!(self.accesses.get() < 4_000_000, "it does not end");
        if let Some(&value) = self.written.borrow().get(&(at, offset)) {
            return value;
        }
        let number = usize::from(at.bus) << 8 | usize::from(at.device) << 3;
        let place = (number + usize::from(at.function)) * 64 + usize::from(offset);
        let byte = |index: usize| self.bytes.get((place + index) % self.bytes.len().max(1));
        u32::from_le_bytes([0, 1, 2, 3].map(|index| byte(index).copied().unwrap_or(0xff)))
    }

    fn write(&self, at: Function, offset: u16, value: u32) {
        assert!(offset % 4 == 0 && offset < 0x1000);
        let fixed = Configuration::fixed(at, offset);
        let before = self.read(at, offset);
        let value = value & !fixed | before & fixed & 0xf;
        self.written.borrow_mut().insert((at, offset), value);
    }

    fn buses(&self) -> (u16, u8, u8) {
        (0, 0, 1)
    }

    fn windows(&self) -> &[Window] {
        &self.windows
    }
}

/// What finds, sizes and stops PCI functions.
fn configuration(bytes: &[u8]) {
    let Some((choice, bytes)) = bytes.split_first() else { return };
    let window = |pci: u64, size: u64| Window {
        pci,
        cpu: PhysAddr(pci),
        size,
        prefetchable: choice & 2 != 0,
    };
    let windows = match choice & 1 {
        0 => Vec::new(),
        _ => vec![window(0xc000_0000, 0x1000_0000), window(0x40_0000_0000, 1 << 34)],
    };
    let (written, accesses) = (RefCell::default(), Cell::new(0));
    let config = Configuration { bytes, written, windows, accesses };
    let memory = Memory(Vec::new());
    let mut functions = Vec::new();
    pci::each_function(&config, &mut |at| functions.push(at));
    // All of them would take long, and be alike.
    for &at in functions.iter().take(8) {
        let _ = pci::identity(&config, at);
        pci::stop_messages(&config, at);
        pci::stop_bus_master(&config, at);
        pci::find_capability(&config, at, &mut |_, offset| {
            assert!((0x40..0x100).contains(&offset));
            None::<()>
        });
        for index in 0..7 {
            drop(pci::map_bar(&config, &memory, at, index, 0, 0x1000));
        }
        pci::enable(&config, at, true);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((what, bytes)) = bytes.split_first() else { return };
    match what % 7 {
        0 => acpi_tables(bytes),
        1 => drop(DeviceTree::read(bytes)),
        2 => partition_table(bytes),
        3 => drop(mbr::each_partition(MBR_SECTORS, &mut Sectors(bytes))),
        4 => handoff(bytes),
        5 => mark(bytes),
        _ => configuration(bytes),
    }
});
