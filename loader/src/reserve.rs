//! `loader reserve`: writes the mark without which the payload writes nothing.
//!
//! Only the first 128 KiB and the last 4 KiB of a device are written, and some blocks of a file.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use format::BLOCK;
use format::area::{HEAD, Layout, MIN_AREA, State, Trailer};
use uuid::Uuid;

use crate::area::Mark;
use crate::device::{Access, Device, Kind, OpenError, ReadAt, kind_of};
use crate::file_area::{self, FileArea, FileError};
use crate::in_use::{System, Use};
use crate::signature;
use crate::text::{exact_size, size};

/// Why a device was not reserved. Nothing was written then.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Nobody can say whether it is in use.
    #[error("cannot find out whether {path} is in use: {source}; are /proc and /sys mounted?")]
    Unknown {
        /// The device.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is in use; no option changes that.
    #[error("{path} is in use, nothing was written:\n{uses}")]
    InUse {
        /// The device.
        path: PathBuf,
        /// Who uses it.
        uses: List<Use>,
    },
    /// It is too small.
    #[error("{path} has {}; an area needs at least {}", exact_size(*size), crate::text::size(MIN_AREA))]
    TooSmall {
        /// The device.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Its size is not a multiple of 4096.
    #[error(
        "{path} has {size} bytes, which is no multiple of 4096. The payload looks for the mark in \
         the last 4 KiB of a disk or partition, so the area must fill it exactly: make it {} bytes \
         smaller (a partition of a multiple of 8 sectors of 512 bytes; for a file `truncate -s {} \
         {path}`)", size % BLOCK, size - size % BLOCK
    )]
    Unaligned {
        /// The device.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// It cannot be a file that is an area.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is something on it that would be lost.
    #[error(
        "{path} is not empty, nothing was written:\n{losses}\nIf nobody needs that any more, say \
         `loader reserve --force {path}`: it will be overwritten at the next crash."
    )]
    NotEmpty {
        /// The device.
        path: PathBuf,
        /// What would be lost.
        losses: List<Loss>,
    },
    /// The medium failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// The device.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Reasons, printed one a line.
#[derive(Debug)]
pub struct List<Item>(pub Vec<Item>);

impl<Item: fmt::Display> fmt::Display for List<Item> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, item) in self.0.iter().enumerate() {
            let newline = if index == 0 { "" } else { "\n" };
            write!(f, "{newline}  - {item}")?;
        }
        Ok(())
    }
}

/// Something that a reservation would cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// What a magic number says, in words.
    Content(&'static str),
    /// A dump that was not saved.
    Dump {
        /// The area's state.
        state: State,
    },
    /// A mark that is not this area's, or not intact.
    Mark(Mark),
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Loss::Content(what) => write!(f, "it holds {what}"),
            Loss::Dump { state } => write!(
                f,
                "it is a dump area with a dump that was not saved (state {}; `loader save` saves it)",
                state.name()
            ),
            Loss::Mark(Mark::OtherSize(other)) => write!(
                f,
                "its last block is the mark of a dump area of {} (the last partition of this \
                 disk, or this device before it was resized)",
                exact_size(*other)
            ),
            Loss::Mark(Mark::Unusable(error)) => {
                write!(f, "its last block is the mark of a dump area, but {error}")
            }
            Loss::Mark(_) => write!(f, "it is a dump area"),
        }
    }
}

/// A reservation that was made.
#[derive(Debug)]
pub struct Reserved {
    /// What was reserved.
    pub path: PathBuf,
    /// Whether that is a file.
    pub kind: Kind,
    /// The mark that was written.
    pub trailer: Trailer,
    /// The area's layout.
    pub layout: Layout,
    /// The uuid is that of an earlier reservation.
    pub uuid_kept: bool,
    /// What `--force` gave up.
    pub losses: Vec<Loss>,
    /// Memory of this machine in bytes, if known.
    pub memory: Option<u64>,
}

/// Makes a file of `size` bytes in a file system, and reserves it.
///
/// # Errors
/// [`ReserveError`]; then there is no file.
pub fn reserve_new_file(path: &Path, size: u64, system: &System) -> Result<Reserved, ReserveError> {
    layout_for(path, size)?;
    file_area::make(path, size)?;
    let reserved = Device::open(path, Access::Exclusive).map_err(ReserveError::from);
    let reserved = reserved.and_then(|device| reserve_file(device, Mark::Absent, vec![], system));
    if reserved.is_err() {
        let _ = std::fs::remove_file(path);
    }
    reserved
}

/// Marks the file as an area, and makes it immutable.
fn reserve_file(
    mut device: Device,
    mark: Mark,
    losses: Vec<Loss>,
    system: &System,
) -> Result<Reserved, ReserveError> {
    let path = device.path().to_path_buf();
    let layout = layout_for(device.path(), device.size())?;
    let place = FileArea::of(&device, system)?;
    let trailer = Trailer { in_file: true, ..new_trailer(mark, layout.area_size) };
    device
        .write_durably(&trailer.to_block(), layout.trailer)
        .map_err(|source| ReserveError::Io { path: path.clone(), action: "write to", source })?;
    place.mark(&device, trailer.uuid)?;
    device.keep_immutable();
    Ok(Reserved {
        kind: device.kind(),
        path,
        trailer,
        layout,
        uuid_kept: matches!(mark, Mark::Valid(..)),
        losses,
        memory: system.memory(),
    })
}

/// Reserves the device or file at `path`. `force` gives up what is on it; nothing makes a device that
/// is in use acceptable.
///
/// # Errors
/// [`ReserveError`]; nothing was written unless it is [`ReserveError::Io`] with a failed write.
pub fn reserve(path: &Path, force: bool, system: &System) -> Result<Reserved, ReserveError> {
    let kind = kind_of(path)?;
    let uses = system
        .uses(path, kind)
        .map_err(|source| ReserveError::Unknown { path: path.to_path_buf(), source })?;
    if !uses.is_empty() {
        return Err(ReserveError::InUse { path: path.to_path_buf(), uses: List(uses) });
    }
    let device = Device::open(path, Access::Exclusive)?;
    let layout = layout_for(device.path(), device.size())?;
    let io_error =
        |action| move |source| ReserveError::Io { path: path.to_path_buf(), action, source };
    let mark = Mark::read(&device, 0, device.size()).map_err(io_error("read"))?;
    let losses = losses(&device, mark).map_err(io_error("read"))?;
    if !losses.is_empty() && !force {
        return Err(ReserveError::NotEmpty { path: path.to_path_buf(), losses: List(losses) });
    }
    if matches!(mark, Mark::Valid(trailer, _) if trailer.in_file) {
        return reserve_file(device, mark, losses, system);
    }
    // The payload takes an area that begins with anything but zeros or a core for one that was put
    // to another use since: a mark alone says nothing about what happened after it was made.
    device.write_durably(&[0; HEAD as usize], 0).map_err(io_error("write to"))?;
    let trailer = new_trailer(mark, layout.area_size);
    device.write_durably(&trailer.to_block(), layout.trailer).map_err(io_error("write to"))?;
    Ok(Reserved {
        path: path.to_path_buf(),
        kind,
        trailer,
        layout,
        uuid_kept: matches!(mark, Mark::Valid(..)),
        losses,
        memory: system.memory(),
    })
}

fn layout_for(path: &Path, size: u64) -> Result<Layout, ReserveError> {
    let path = path.to_path_buf();
    if size < MIN_AREA {
        return Err(ReserveError::TooSmall { path, size });
    }
    Layout::new(size).ok_or(ReserveError::Unaligned { path, size })
}

/// The empty trailer. An area that is reserved again keeps its uuid, which a command line may
/// already name, and its count of captures.
fn new_trailer(mark: Mark, area_size: u64) -> Trailer {
    match mark {
        Mark::Valid(old, _) => old.emptied(),
        _ => Trailer::empty(Uuid::new_v4().into_bytes(), area_size),
    }
}

fn losses(device: &Device, mark: Mark) -> io::Result<Vec<Loss>> {
    let mut losses = match mark {
        Mark::Absent => vec![],
        Mark::Valid(trailer, _) if trailer.state == State::Empty => vec![],
        Mark::Valid(trailer, _) => vec![Loss::Dump { state: trailer.state }],
        other => vec![Loss::Mark(other)],
    };
    // Memory of a crashed machine is full of its file systems' superblocks: in an area that still
    // begins as one, magic numbers behind its beginning say nothing about the disk.
    let in_file = matches!(mark, Mark::Valid(trailer, _) if trailer.in_file);
    if !(in_file || matches!(mark, Mark::Valid(..)) && begins_as_area(device)?) {
        losses.extend(signature::found_on(device).into_iter().map(Loss::Content));
    }
    Ok(losses)
}

/// Whether the device begins with a core, or cleared as areas are.
fn begins_as_area(device: &Device) -> io::Result<bool> {
    let mut head = [0; HEAD as usize];
    device.read_at(&mut head, 0)?;
    Ok(head.starts_with(b"\x7fELF") || head.iter().all(|&byte| byte == 0))
}

impl fmt::Display for Reserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        let uuid = Uuid::from_bytes(self.trailer.uuid);
        let kept = if self.uuid_kept { "  (kept from the earlier reservation)" } else { "" };
        writeln!(f, "Reserved {path} for crash dumps.")?;
        writeln!(f, "  uuid          {uuid}{kept}")?;
        writeln!(f, "  size          {}", exact_size(self.layout.area_size))?;
        writeln!(f, "  largest core  {}", exact_size(self.layout.crc_table))?;
        for loss in &self.losses {
            writeln!(f, "Given up: {loss}.")?;
        }
        if self.losses.iter().any(|loss| matches!(loss, Loss::Content(_))) {
            writeln!(
                f,
                "Its first 128 KiB are gone, and everything else on {path} will be overwritten at the \
                 next crash. Do not use it any more."
            )?;
        }
        self.write_size_hint(f)?;
        if self.trailer.in_file {
            writeln!(f, "Each time before the payload is loaded, tell it where the file is:")?;
            writeln!(f, "  loader handoff {path} --output HANDOFF")?;
            writeln!(f, "  kexec -p ... --initrd=HANDOFF")?;
            writeln!(f, "The file is immutable now; `chattr -i {path}` before you remove it.")?;
        } else if self.kind == Kind::File {
            writeln!(
                f,
                "{path} is a file: it serves as the disk or partition of a virtual machine. For a \
                 file in a file system that the payload is to find, use --size."
            )?;
        }
        writeln!(f, "To make the payload use this area and no other, load it with")?;
        writeln!(f, "  capture.to=disk:uuid={uuid}")?;
        writeln!(f, "on its command line (kexec -p ... --append=\"...\").")
    }
}

impl Reserved {
    /// Whether it is this machine's dump that goes there.
    fn is_this_machines(&self) -> bool {
        self.kind != Kind::File || self.trailer.in_file
    }

    fn write_size_hint(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.memory {
            Some(memory) if self.is_this_machines() && memory > self.layout.crc_table => writeln!(
                f,
                "Note: this machine has {} of memory, a full dump of it does not fit here.",
                size(memory)
            ),
            _ => Ok(()),
        }
    }
}
