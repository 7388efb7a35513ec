//! What is attached to a virtio SCSI host made of memory.

use std::vec;
use std::vec::Vec;

use crate::virtio::fake::Temper;

/// The host: its configuration, as words, and its logical units.
pub struct Host {
    pub config: [u32; 9],
    /// Whether `sense_size` and `cdb_size` can be written.
    pub is_adjustable: bool,
    pub units: Vec<LogicalUnit>,
    pub knows_report_luns: bool,
    /// Operation codes of all commands.
    pub commands: Vec<u8>,
}

/// A disk, or what it is made to be.
#[derive(Clone)]
pub struct LogicalUnit {
    pub target: u8,
    pub lun: u16,
    /// Its peripheral device type.
    pub kind: u8,
    pub block_size: u32,
    pub disk: Vec<u8>,
    pub is_write_protected: bool,
    pub has_cache: bool,
    /// What it has to tell, each to the next command that can be told: status, sense key, additional
    /// sense code and its qualifier. All zeros: it is done, by its own word, and is not.
    pub conditions: Vec<[u8; 4]>,
    /// Its maximum transfer length in blocks.
    pub max_blocks: u32,
    /// Whether it tells what it is when it is asked for a page about itself.
    pub ignores_pages: bool,
    /// Most bytes that were transferred at once.
    pub most: usize,
    pub flushes: usize,
}

/// A command with its data, and where its response goes.
pub struct Command<'a> {
    pub header: &'a [u8],
    pub from: &'a [u8],
    pub into: &'a mut [u8],
    pub response: &'a mut [u8],
}

/// How a command ends: status, sense key, additional sense code and its qualifier.
type End = Result<usize, [u8; 4]>;

const ILLEGAL_OPERATION: [u8; 4] = [2, 5, 0x20, 0];
const ILLEGAL_FIELD: [u8; 4] = [2, 5, 0x24, 0];
const MEDIUM_ERROR: [u8; 4] = [2, 3, 0x0c, 0];

impl LogicalUnit {
    /// A disk of 4 MiB.
    pub fn new(target: u8, lun: u16) -> LogicalUnit {
        LogicalUnit {
            target,
            lun,
            kind: 0,
            block_size: 512,
            disk: vec![0; 4 << 20],
            is_write_protected: false,
            has_cache: true,
            conditions: Vec::new(),
            max_blocks: 0,
            ignores_pages: false,
            most: 0,
            flushes: 0,
        }
    }

    fn execute(&mut self, temper: Temper, cdb: &[u8], from: &[u8], into: &mut [u8]) -> End {
        let operation = cdb[0];
        let told = !matches!(operation, 0x12 | 0xa0) && !self.conditions.is_empty();
        if told {
            return Err(self.conditions.remove(0));
        }
        match operation {
            0x00 => Ok(0),
            // Where that page has its limit there is a vendor's strange name.
            0x12 if cdb[1] == 0 || self.ignores_pages => {
                Ok(answer(into, &[self.kind, 0, 6, 2, 31, 0, 0, 0, 0, 0, 0, 1]))
            }
            0x12 if cdb[2] == 0xb0 => {
                let mut page = [0; 64];
                page[..4].copy_from_slice(&[0, 0xb0, 0, 60]);
                page[8..12].copy_from_slice(&self.max_blocks.to_be_bytes());
                Ok(answer(into, &page))
            }
            0x1a => Ok(answer(into, &[3, 0, u8::from(self.is_write_protected) << 7, 0])),
            0x35 if self.has_cache => {
                self.flushes += 1;
                Ok(0)
            }
            0x9e if cdb[1] == 0x10 => {
                let blocks = (self.disk.len() / self.block_size as usize) as u64;
                let mut capacity = [0; 32];
                capacity[..8].copy_from_slice(&blocks.wrapping_sub(1).to_be_bytes());
                capacity[8..12].copy_from_slice(&self.block_size.to_be_bytes());
                Ok(answer(into, &capacity))
            }
            0x88 | 0x8a => {
                let number = |at: usize| u32::from_be_bytes(cdb[at..at + 4].try_into().unwrap());
                assert_eq!(number(2), 0);
                let at = number(6) as usize * self.block_size as usize;
                let size = number(10) as usize * self.block_size as usize;
                self.most = self.most.max(size);
                assert_eq!(from.len().max(into.len()), size);
                if operation == 0x88 {
                    into.copy_from_slice(&self.disk[at..at + size]);
                } else if temper == Temper::Failing {
                    return Err(MEDIUM_ERROR);
                } else {
                    self.disk[at..at + size].copy_from_slice(from);
                }
                Ok(size)
            }
            0x12 => Err(ILLEGAL_FIELD),
            _ => Err(ILLEGAL_OPERATION),
        }
    }
}

fn answer(into: &mut [u8], bytes: &[u8]) -> usize {
    let size = into.len().min(bytes.len());
    into[..size].copy_from_slice(&bytes[..size]);
    size
}

impl Host {
    /// A host with `units` and room for more.
    pub fn new(units: Vec<LogicalUnit>) -> Host {
        let config = [1, 126, 0, 128, 16, 96, 32, 255 << 16, 16383];
        Host { config, is_adjustable: true, units, knows_report_luns: true, commands: Vec::new() }
    }

    pub fn config32(&self, offset: u64) -> u32 {
        assert!(offset.is_multiple_of(4));
        self.config[offset as usize / 4]
    }

    pub fn set_config32(&mut self, offset: u64, value: u32) {
        assert!(matches!(offset, 20 | 24));
        if self.is_adjustable {
            self.config[offset as usize / 4] = value;
        }
    }

    pub fn carry_out(&mut self, temper: Temper, command: Command<'_>) {
        let Command { header, from, into, response } = command;
        assert_eq!((header.len(), response.len()), (51, 108));
        assert_eq!((header[0], header[2] & 0xc0, &header[4..8]), (1, 0x40, &[0; 4][..]));
        let target = header[1];
        let lun = u16::from(header[2] & 0x3f) << 8 | u16::from(header[3]);
        let cdb = &header[19..35];
        self.commands.push(cdb[0]);
        if temper == Temper::Mute {
            return;
        }
        if !self.units.iter().any(|unit| unit.target == target) {
            response[11] = 3;
            return;
        }
        let size = from.len().max(into.len());
        let end = match self.units.iter_mut().find(|it| (it.target, it.lun) == (target, lun)) {
            _ if cdb[0] == 0xa0 && !self.knows_report_luns => Err(ILLEGAL_OPERATION),
            _ if cdb[0] == 0xa0 => Ok(answer(into, &self.luns_of(target))),
            Some(unit) => unit.execute(temper, cdb, from, into),
            None if cdb[0] == 0x12 => Ok(answer(into, &[0x7f; 36])),
            None => Err([2, 5, 0x25, 0]),
        };
        let mut residual = 0;
        match end {
            // As a host says that a reset came in between.
            Err([0xff, response_code, ..]) => return response[11] = response_code,
            Err([0, ..]) => residual = size as u32,
            Err([status, key, code, qualifier]) => {
                response[10] = status;
                response[..4].copy_from_slice(&18u32.to_le_bytes());
                response[12..30].fill(0);
                (response[12], response[14]) = (0x70, key);
                (response[24], response[25]) = (code, qualifier);
            }
            Ok(done) => residual = (size - done) as u32,
        }
        response[4..8].copy_from_slice(&residual.to_le_bytes());
        response[11] = 0;
    }

    fn luns_of(&self, target: u8) -> Vec<u8> {
        let mut list = vec![0; 8];
        for unit in self.units.iter().filter(|unit| unit.target == target) {
            let [high, low] = unit.lun.to_be_bytes();
            let method = if unit.lun < 256 { 0 } else { 0x40 };
            list.extend([method | high, low, 0, 0, 0, 0, 0, 0]);
        }
        let size = list.len() as u32 - 8;
        list[..4].copy_from_slice(&size.to_be_bytes());
        list
    }
}
