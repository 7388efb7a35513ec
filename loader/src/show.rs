//! `loader show`: what is in an area.

use std::fmt;
use std::path::Path;

use format::area::{Reason, State, Trailer};
use serde::Serialize;
use uuid::Uuid;

use crate::area::{Area, FindError};
use crate::core_file::{CoreError, Headers, Notable};
use crate::device::{Access, Device, OpenError};
use crate::text::{duration, exact_size, printable, utc};

/// Why an area cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// There is no area.
    #[error(transparent)]
    Find(#[from] FindError),
}

/// What is in an area. Sizes are in bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The device as the user named it.
    pub path: String,
    /// The partition of it that is the area; null when the whole device is.
    pub partition: Option<PartitionReport>,
    /// Name of the area's state.
    pub state: &'static str,
    /// Why the dump ended early; null unless it did.
    pub reason: Option<&'static str>,
    /// Identity of the reservation.
    pub uuid: Uuid,
    /// Size of the area.
    pub size: u64,
    /// Size of the largest core that fits.
    pub largest_core: u64,
    /// Number of captures begun into this area.
    pub sequence: u64,
    /// Size of the core; null when there is none or its end is not known.
    pub core_size: Option<u64>,
    /// Bytes of crash card; 0 when there is none.
    pub card_size: u32,
    /// Crashes since that of the dump which left nothing but their card; the card is the last one's.
    pub later_cards: u32,
    /// Bytes of an unfinished core that are there for certain; null when that is not known.
    pub written: Option<u64>,
    /// The crash card; null when there is none, or when it cannot be shown.
    pub card: Option<String>,
    /// Why it cannot be shown.
    pub card_error: Option<String>,
    /// What the core says; null in an empty area and when the core cannot be read.
    pub dump: Option<DumpReport>,
    /// Why the core cannot be read; null when it can, or there is none.
    pub dump_error: Option<String>,
}

/// The partition that is an area.
#[derive(Clone, Debug, Serialize)]
pub struct PartitionReport {
    /// Its number: the 1 of `vda1`.
    pub number: u32,
    /// Its PARTUUID; null on a disk with an MBR.
    pub uuid: Option<Uuid>,
    /// Its first byte on the disk.
    pub start: u64,
}

/// What the notes of a core say.
#[derive(Clone, Debug, Serialize)]
pub struct DumpReport {
    /// Release of the crashed kernel.
    pub kernel_release: Option<String>,
    /// Time of the crash, in seconds since 1970.
    pub crash_time: Option<u64>,
    /// What the payload says about its work.
    pub record: Option<RecordReport>,
}

/// The payload's record. Times count from the payload's first instruction.
#[derive(Clone, Debug, Serialize)]
pub struct RecordReport {
    /// Name, version and git revision of the payload.
    pub payload: String,
    /// Whether the payload saw the dump complete.
    pub complete: bool,
    /// Microseconds to the first block.
    pub first_block_us: u64,
    /// Microseconds until the last block was on the disk.
    pub last_block_us: u64,
    /// Pages in the core.
    pub pages_read: u64,
    /// Pages that could not be read.
    pub pages_unreadable: u64,
    /// Impossible headers of elfcorehdr that were left out.
    pub headers_dropped: u64,
    /// Bytes of memory that the payload used.
    pub memory_used: u64,
}

/// Looks at the area at `path`, which is an area, or a disk with partitions and one area on it.
///
/// # Errors
/// It cannot be opened, or there is no area.
pub fn show(path: &Path) -> Result<Report, ShowError> {
    let device = Device::open(path, Access::Read)?;
    let area = Area::find(&device)?;
    let (dump, dump_error) = match (area.trailer.state, area.trailer.reason) {
        // Without room nothing of a core was written: what is there is of an earlier crash.
        (State::Empty, _) | (State::Incomplete, Reason::NoRoom) => (None, None),
        _ => match notable(&area) {
            Ok(notable) => (Some(notable.into()), None),
            Err(error) => (None, Some(error.to_string())),
        },
    };
    let (card, card_error) = match card(&area) {
        Ok(card) => (card, None),
        Err(why) => (None, Some(why)),
    };
    let Trailer { state, reason, uuid, sequence, core_size, card_size, .. } = area.trailer;
    let is_unfinished = matches!(state, State::Writing | State::Incomplete);
    let written = Some(area.trailer.written).filter(|&size| is_unfinished && size > 0);
    Ok(Report {
        path: path.display().to_string(),
        partition: area.partition.map(|partition| PartitionReport {
            number: partition.number,
            uuid: partition.uuid,
            start: partition.start,
        }),
        state: state.name(),
        reason: (state == State::Incomplete).then_some(reason.text()),
        uuid: Uuid::from_bytes(uuid),
        size: area.layout.area_size,
        largest_core: area.layout.crc_table,
        sequence,
        core_size: (core_size > 0).then_some(core_size),
        card_size,
        later_cards: area.trailer.later_cards,
        written,
        card,
        card_error,
        dump,
        dump_error,
    })
}

/// The crash card, or why it cannot be shown.
fn card(area: &Area<'_>) -> Result<Option<String>, String> {
    if area.trailer.card_size == 0 {
        return Ok(None);
    }
    match area.card() {
        Ok(Some(card)) => Ok(Some(card)),
        Ok(None) => Err("it is damaged (checksum)".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn notable(area: &Area<'_>) -> Result<Notable, CoreError> {
    Headers::read(area, area.layout.crc_table)?.notable(area)
}

impl From<Notable> for DumpReport {
    fn from(notable: Notable) -> DumpReport {
        DumpReport {
            kernel_release: notable.release,
            crash_time: notable.crash_time,
            record: notable.record.map(|record| RecordReport {
                payload: record.payload().to_string(),
                complete: record.complete.get() == 1,
                first_block_us: record.first_block_us.get(),
                last_block_us: record.last_block_us.get(),
                pages_read: record.pages_read.get(),
                pages_unreadable: record.pages_unreadable.get(),
                headers_dropped: record.headers_dropped.get(),
                memory_used: record.memory_used.get(),
            }),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.path)?;
        if let Some(partition) = &self.partition {
            let PartitionReport { number, uuid, start } = partition;
            let uuid = uuid.map(|uuid| format!(" PARTUUID {uuid},")).unwrap_or_default();
            writeln!(f, "  partition     {number},{uuid} at byte {start}")?;
        }
        writeln!(f, "  state         {}", self.state)?;
        if let Some(reason) = self.reason {
            writeln!(f, "  ended early   {reason}")?;
        }
        writeln!(f, "  uuid          {}", self.uuid)?;
        writeln!(f, "  size          {}", exact_size(self.size))?;
        writeln!(f, "  largest core  {}", exact_size(self.largest_core))?;
        writeln!(f, "  captures      {}", self.sequence)?;
        if let Some(core_size) = self.core_size {
            writeln!(f, "  core          {}", exact_size(core_size))?;
        }
        if let Some(written) = self.written {
            writeln!(f, "  written       {}", exact_size(written))?;
        }
        if self.card_size > 0 {
            writeln!(f, "  crash card    {} bytes", self.card_size)?;
        }
        if self.later_cards > 0 {
            let crashes = if self.later_cards == 1 { "crash" } else { "crashes" };
            writeln!(
                f,
                "  since then    {} {crashes}, the card is the last one's",
                self.later_cards
            )?;
        }
        if let Some(dump) = &self.dump {
            writeln!(f, "dump")?;
            dump.fmt(f)?;
        }
        if let Some(error) = &self.dump_error {
            writeln!(f, "dump")?;
            writeln!(f, "  not readable  {error}")?;
        }
        self.fmt_card(f)?;
        writeln!(f, "{}", self.next_step())
    }
}

impl Report {
    fn fmt_card(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.card.is_some() || self.card_error.is_some() {
            writeln!(f, "crash card")?;
        }
        if let Some(why) = &self.card_error {
            writeln!(f, "  not readable  {why}")?;
        }
        let lines = self.card.iter().flat_map(|card| card.lines());
        lines.map(printable).try_for_each(|line| writeln!(f, "  {line}"))
    }

    /// What the user can do now.
    fn next_step(&self) -> String {
        match self.state {
            "empty" => format!("Ready for a crash (capture.to=disk:uuid={}).", self.uuid),
            "complete" => format!("Save the dump with `loader save {} DIR`.", self.path),
            _ if self.reason == Some(Reason::NoRoom.text()) => format!(
                "There is no dump: the area must be larger. Reserve another one, or make room and \
                 `loader reserve {}` again.",
                self.path
            ),
            _ => format!(
                "The dump is not complete; save what there is with `loader save --incomplete {} \
                 DIR`.",
                self.path
            ),
        }
    }
}

impl fmt::Display for DumpReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let release = self.kernel_release.as_deref().map_or("unknown".into(), printable);
        writeln!(f, "  kernel        {release}")?;
        let time = self.crash_time.map_or("unknown".into(), utc);
        writeln!(f, "  crash time    {time}")?;
        match &self.record {
            Some(record) => record.fmt(f),
            None => writeln!(f, "  payload       left no record of a version known here"),
        }
    }
}

impl fmt::Display for RecordReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  payload       {}", printable(&self.payload))?;
        writeln!(f, "  first block   after {}", duration(self.first_block_us))?;
        if self.complete {
            writeln!(f, "  last block    after {}", duration(self.last_block_us))?;
            writeln!(
                f,
                "  pages         {} read, {} unreadable",
                self.pages_read, self.pages_unreadable
            )?;
            writeln!(f, "  left out      {}", left_out(self.headers_dropped))?;
            writeln!(f, "  memory used   {}", exact_size(self.memory_used))
        } else {
            writeln!(f, "  last block    never: the payload did not come to the end")
        }
    }
}

/// kexec-tools write one wrong header for arm64 kernels without CONFIG_KALLSYMS_ALL, and no memory is
/// lost by it; `host-analyzer sys` can tell whether it was that one.
fn left_out(headers: u64) -> String {
    match headers {
        1 => "1 impossible memory range (kexec-tools write one for some arm64 kernels: then nothing is \
              missing, and `host-analyzer sys` says so)"
            .to_owned(),
        count => format!("{count} impossible memory ranges"),
    }
}
