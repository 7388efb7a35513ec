//! The few SCSI commands that a disk needs, whatever carries them to it.
//!
//! Sources: SCSI Architecture Model - 5 (SAM-5), SCSI Primary Commands - 4 (SPC-4) and SCSI Block
//! Commands - 3 (SBC-3); their sections bear the names of the commands. All numbers are big endian.

use core::fmt;

use crate::block::{BlockError, Lba};
use crate::clock::{Clock, Deadline};

/// A command descriptor block, filled up with zeros.
pub type Cdb = [u8; 16];

/// Operation codes (SPC-4 and SBC-3, each in the section of its command).
mod operation {
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SENSE_6: u8 = 0x1a;
    pub const SYNCHRONIZE_CACHE_10: u8 = 0x35;
    pub const READ_16: u8 = 0x88;
    pub const WRITE_16: u8 = 0x8a;
    pub const SERVICE_ACTION_IN_16: u8 = 0x9e;
    pub const REPORT_LUNS: u8 = 0xa0;
}

/// Status codes (SAM-5, "Status codes").
mod status {
    pub const GOOD: u8 = 0x00;
    pub const CHECK_CONDITION: u8 = 0x02;
    pub const BUSY: u8 = 0x08;
    pub const TASK_SET_FULL: u8 = 0x28;
    pub const TASK_ABORTED: u8 = 0x40;
}

/// Sense keys (SPC-4, "Sense key and additional sense code definitions").
mod key {
    pub const RECOVERED_ERROR: u8 = 0x1;
    pub const NOT_READY: u8 = 0x2;
    pub const ILLEGAL_REQUEST: u8 = 0x5;
    pub const UNIT_ATTENTION: u8 = 0x6;
    pub const ABORTED_COMMAND: u8 = 0xb;
}

/// Additional sense codes, with their qualifiers where these matter (same section).
mod additional {
    pub const BECOMING_READY: (u8, u8) = (0x04, 0x01);
    pub const MEDIUM_MAY_HAVE_CHANGED: u8 = 0x28;
}

/// Most bytes of an answer that [`identify`] and [`report_luns`] ask for.
pub const MAX_ANSWER: usize = LUNS_HEADER + 8 * MAX_LUNS;

/// Most logical units of a target that are looked at.
pub const MAX_LUNS: usize = 64;

/// The list of logical units begins behind this.
const LUNS_HEADER: usize = 8;

/// How often something may have happened to a unit since it was last asked: power on, a reset, and
/// changed parameters are each told once, and only to the next command.
const ATTENTIONS: u32 = 8;

/// Peripheral qualifier and device type where there can be no unit (SPC-4, "Standard INQUIRY
/// data").
const NO_UNIT: u8 = 0x7f;

/// Longest time that a unit may say that it is busy, or about to be ready. A disk that has to spin
/// up takes ten seconds.
const READY_US: u64 = 20_000_000;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Good,
    /// It was not done because something happened before it, such as a reset: it may be done now.
    Interrupted,
    /// It was not done: the medium may be another one now.
    MediumChanged,
    /// It was not done yet: the unit has too much to do, or is about to be ready.
    Busy,
    /// It was not done: the unit cannot do anything.
    NotReady,
    /// The unit does not know such a command.
    Illegal,
    /// There is no such unit.
    Absent,
    /// It was not done, or what an earlier one wrote was lost.
    Failed,
}

/// What `status` and the sense data that came with it mean (SPC-4, "Sense data").
#[must_use]
pub fn outcome(status: u8, sense: &[u8]) -> Outcome {
    match status {
        status::GOOD => Outcome::Good,
        status::BUSY | status::TASK_SET_FULL => Outcome::Busy,
        status::TASK_ABORTED => Outcome::Interrupted,
        status::CHECK_CONDITION => sensed(sense),
        _ => Outcome::Failed,
    }
}

fn sensed(sense: &[u8]) -> Outcome {
    let byte = |at: usize| sense.get(at).copied().unwrap_or(0);
    let (key, code) = match byte(0) & 0x7f {
        0x70 => (byte(2) & 0xf, (byte(12), byte(13))),
        0x72 => (byte(1) & 0xf, (byte(2), byte(3))),
        // 0x71 and 0x73 are errors of earlier commands, which had been reported as done.
        _ => return Outcome::Failed,
    };
    match key {
        key::RECOVERED_ERROR => Outcome::Good,
        key::NOT_READY if code == additional::BECOMING_READY => Outcome::Busy,
        key::NOT_READY => Outcome::NotReady,
        key::ILLEGAL_REQUEST => Outcome::Illegal,
        key::UNIT_ATTENTION if code.0 == additional::MEDIUM_MAY_HAVE_CHANGED => {
            Outcome::MediumChanged
        }
        key::UNIT_ATTENTION | key::ABORTED_COMMAND => Outcome::Interrupted,
        _ => Outcome::Failed,
    }
}

/// Reads `blocks` blocks from `at` on.
#[must_use]
pub fn read(at: Lba, blocks: u32) -> Cdb {
    transfer(operation::READ_16, at, blocks)
}

/// Writes `blocks` blocks from `at` on.
#[must_use]
pub fn write(at: Lba, blocks: u32) -> Cdb {
    transfer(operation::WRITE_16, at, blocks)
}

fn transfer(operation: u8, Lba(at): Lba, blocks: u32) -> Cdb {
    let mut cdb = begin(operation);
    cdb[2..10].copy_from_slice(&at.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

/// Brings all that was written to the medium: zero blocks are all there are. The command of ten
/// bytes, because disks that lack it have nothing to flush, while many lack that of sixteen.
#[must_use]
pub fn synchronize_cache() -> Cdb {
    begin(operation::SYNCHRONIZE_CACHE_10)
}

fn begin(operation: u8) -> Cdb {
    let mut cdb = [0; 16];
    cdb[0] = operation;
    cdb
}

/// Carries commands to a unit while it is looked at, one at a time.
pub trait Carrier {
    /// Has `cdb` carried out. What it answers comes into `into`, at most [`MAX_ANSWER`] bytes; what
    /// the device left untouched reads as ones, which no answer here means.
    ///
    /// # Errors
    /// [`BlockError::Timeout`] or [`BlockError::Protocol`]: nothing more is to be had.
    fn execute(&mut self, cdb: &Cdb, into: &mut [u8]) -> Result<Outcome, BlockError>;
}

/// What a disk is, by its own word, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Size of a block in bytes: a power of two from 512 to 4096.
    pub block_size: u32,
    /// Number of blocks; in bytes they do not pass 2^64.
    pub blocks: u64,
    /// Most bytes in one command, as far as the unit says.
    pub max_transfer: u64,
}

/// Why a logical unit cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// It is something else, or nothing; by its peripheral qualifier and device type.
    NotADisk(u8),
    /// It has no medium, or is not ready in time.
    NotReady,
    /// It cannot be written.
    ReadOnly,
    /// It does not tell its size, or an impossible one.
    Capacity,
    /// It is gone, or broke down while it was looked at.
    Broken(BlockError),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unusable::NotADisk(kind) => write!(f, "is not a disk (SCSI device type {kind:#x})"),
            Unusable::NotReady => f.write_str("is not ready"),
            Unusable::ReadOnly => f.write_str("is read-only"),
            Unusable::Capacity => f.write_str("has no usable size"),
            Unusable::Broken(error) => error.fmt(f),
        }
    }
}

impl From<BlockError> for Unusable {
    fn from(error: BlockError) -> Unusable {
        Unusable::Broken(error)
    }
}

/// Repeats a command while the unit has other things to tell, or to do.
fn patiently(
    unit: &mut impl Carrier,
    clock: &dyn Clock,
    cdb: &Cdb,
    into: &mut [u8],
) -> Result<Outcome, BlockError> {
    let deadline = Deadline::after_us(clock, READY_US);
    let mut attentions = 0;
    loop {
        let outcome = unit.execute(cdb, into)?;
        match outcome {
            Outcome::Interrupted | Outcome::MediumChanged if attentions < ATTENTIONS => {
                attentions += 1;
            }
            Outcome::Busy if !deadline.passed(clock) => core::hint::spin_loop(),
            _ => return Ok(outcome),
        }
    }
}

/// Calls `each` with the numbers of the logical units of a target, which is asked through its unit
/// 0. A target that does not know the command (REPORT LUNS) has this one unit. Returns whether there
/// are more than [`MAX_LUNS`].
///
/// # Errors
/// [`BlockError`] of `unit`.
pub fn report_luns(
    unit: &mut impl Carrier,
    clock: &dyn Clock,
    each: &mut dyn FnMut(u16),
) -> Result<bool, BlockError> {
    let mut list = [0; MAX_ANSWER];
    let mut cdb = begin(operation::REPORT_LUNS);
    cdb[6..10].copy_from_slice(&(MAX_ANSWER as u32).to_be_bytes());
    match patiently(unit, clock, &cdb, &mut list)? {
        Outcome::Good => {}
        Outcome::Illegal => {
            each(0);
            return Ok(false);
        }
        _ => return Ok(false),
    }
    let (header, list) = list.split_at(LUNS_HEADER);
    let count = be32(header, 0) as usize / 8;
    list.chunks_exact(8).take(count).filter_map(lun).for_each(each);
    Ok(count > MAX_LUNS)
}

/// The number in an entry of the list, when it has a single level (SAM-5, "Logical unit number
/// (LUN)"): peripheral device addressing on bus 0, or flat space addressing.
fn lun(entry: &[u8]) -> Option<u16> {
    let number = u16::from(entry[0]) << 8 | u16::from(entry[1]);
    let single = entry[2..].iter().all(|&byte| byte == 0);
    match number >> 14 {
        0 if single && number < 256 => Some(number),
        1 if single => Some(number & 0x3fff),
        _ => None,
    }
}

/// Asks a unit what it is, waits until it is ready, and checks that it is a disk that can be written.
///
/// # Errors
/// [`Unusable`].
pub fn identify(unit: &mut impl Carrier, clock: &dyn Clock) -> Result<Identity, Unusable> {
    let mut standard = [0; 36];
    let answer = ask(unit, clock, inquiry(None, 36), &mut standard)?;
    let kind = answer.map_or(NO_UNIT, |answer| answer[0]);
    if kind != 0 {
        return Err(Unusable::NotADisk(kind));
    }
    match patiently(unit, clock, &begin(operation::TEST_UNIT_READY), &mut [])? {
        Outcome::Good => {}
        _ => return Err(Unusable::NotReady),
    }
    if is_write_protected(unit, clock)? {
        return Err(Unusable::ReadOnly);
    }
    let (block_size, blocks) = capacity(unit, clock)?;
    let max_transfer = max_transfer(unit, clock, block_size)?;
    Ok(Identity { block_size, blocks, max_transfer })
}

/// The answer to a question, or nothing when the unit does not answer it.
fn ask<'b, const SIZE: usize>(
    unit: &mut impl Carrier,
    clock: &dyn Clock,
    cdb: Cdb,
    answer: &'b mut [u8; SIZE],
) -> Result<Option<&'b [u8; SIZE]>, BlockError> {
    let outcome = patiently(unit, clock, &cdb, answer)?;
    Ok((outcome == Outcome::Good).then_some(answer))
}

/// SPC-4, INQUIRY: of the unit itself, or a page of its vital product data.
fn inquiry(page: Option<u8>, size: u16) -> Cdb {
    let mut cdb = begin(operation::INQUIRY);
    cdb[1] = u8::from(page.is_some());
    cdb[2] = page.unwrap_or(0);
    cdb[3..5].copy_from_slice(&size.to_be_bytes());
    cdb
}

/// SPC-4, MODE SENSE (6) with all pages and no block descriptors: of the answer only the device's
/// own parameter matters, in which SBC-3 ("Mode parameters overview") has bit 7 as WP. A disk
/// that does not tell fails when it is written to.
fn is_write_protected(unit: &mut impl Carrier, clock: &dyn Clock) -> Result<bool, BlockError> {
    const ANSWER: u8 = 192;
    let mut cdb = begin(operation::MODE_SENSE_6);
    cdb[1] = 1 << 3;
    cdb[2] = 0x3f;
    cdb[4] = ANSWER;
    let mut parameters = [0; ANSWER as usize];
    let parameters = ask(unit, clock, cdb, &mut parameters)?;
    Ok(parameters.is_some_and(|parameters| parameters[2] & 1 << 7 != 0))
}

/// SBC-3, READ CAPACITY (16): size and number of the blocks.
fn capacity(unit: &mut impl Carrier, clock: &dyn Clock) -> Result<(u32, u64), Unusable> {
    const READ_CAPACITY_16: u8 = 0x10;
    let mut cdb = begin(operation::SERVICE_ACTION_IN_16);
    cdb[1] = READ_CAPACITY_16;
    cdb[13] = 32;
    let mut answer = [0; 32];
    let answer = ask(unit, clock, cdb, &mut answer)?.ok_or(Unusable::Capacity)?;
    let last = u64::from(be32(answer, 0)) << 32 | u64::from(be32(answer, 4));
    let block_size = be32(answer, 8);
    let sane =
        matches!(block_size, 512 | 1024 | 2048 | 4096) && last < u64::MAX / u64::from(block_size);
    if sane { Ok((block_size, last + 1)) } else { Err(Unusable::Capacity) }
}

/// SBC-3, "Block Limits VPD page": the maximum transfer length, which is in blocks, 0 when there is
/// none. It counts where a hypervisor hands commands on to a real disk.
fn max_transfer(
    unit: &mut impl Carrier,
    clock: &dyn Clock,
    block_size: u32,
) -> Result<u64, BlockError> {
    const BLOCK_LIMITS: u8 = 0xb0;
    let mut page = [0; 64];
    let page = ask(unit, clock, inquiry(Some(BLOCK_LIMITS), 64), &mut page)?;
    let blocks = page.filter(|page| page[1] == BLOCK_LIMITS).map_or(0, |page| be32(page, 8));
    Ok(if blocks == 0 { u64::MAX } else { u64::from(blocks) * u64::from(block_size) })
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |four| four.iter().fold(0, |sum, &it| sum << 8 | u32::from(it)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sense_data_of_both_formats_mean_the_same() {
        for (key, code, expected) in [
            (0x1, (0x17, 0), Outcome::Good),
            (0x2, (0x04, 0x01), Outcome::Busy),
            (0x2, (0x3a, 0), Outcome::NotReady),
            (0x3, (0x0c, 0), Outcome::Failed),
            (0x5, (0x20, 0), Outcome::Illegal),
            (0x6, (0x29, 0), Outcome::Interrupted),
            (0x6, (0x28, 0), Outcome::MediumChanged),
            (0x7, (0x27, 0), Outcome::Failed),
            (0xb, (0, 0), Outcome::Interrupted),
        ] {
            let mut fixed = [0; 18];
            (fixed[0], fixed[2], fixed[12], fixed[13]) = (0xf0, key, code.0, code.1);
            assert_eq!(outcome(2, &fixed), expected);
            assert_eq!(outcome(2, &[0x72, key, code.0, code.1]), expected);
            // Of an earlier command: whatever it is, something was lost.
            fixed[0] = 0x71;
            assert_eq!(outcome(2, &fixed), Outcome::Failed);
        }
    }

    #[test]
    fn status_without_sense_data_is_no_success() {
        assert_eq!(outcome(0, &[]), Outcome::Good);
        assert_eq!(outcome(2, &[]), Outcome::Failed);
        assert_eq!(outcome(2, &[0x70]), Outcome::Failed);
        assert_eq!(outcome(0x18, &[]), Outcome::Failed);
        assert_eq!(outcome(0x28, &[]), Outcome::Busy);
    }

    #[test]
    fn unit_numbers_of_one_level_are_understood_and_others_passed_over() {
        assert_eq!(lun(&[0, 7, 0, 0, 0, 0, 0, 0]), Some(7));
        assert_eq!(lun(&[0x41, 2, 0, 0, 0, 0, 0, 0]), Some(0x102));
        assert_eq!(lun(&[1, 7, 0, 0, 0, 0, 0, 0]), None, "on bus 1");
        assert_eq!(lun(&[0, 7, 0, 1, 0, 0, 0, 0]), None, "a second level");
        assert_eq!(lun(&[0xc1, 1, 0, 0, 0, 0, 0, 0]), None, "a well-known unit");
    }

    #[test]
    fn block_numbers_beyond_32_bits_go_into_the_command() {
        let cdb = write(Lba(0x0102_0304_0506_0708), 0x1122_3344);
        let bytes = [0x8a, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0x11, 0x22, 0x33, 0x44, 0, 0];
        assert_eq!(cdb, bytes);
        assert_eq!(read(Lba(1), 1)[0], 0x88);
    }
}
