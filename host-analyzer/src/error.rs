//! What can go wrong, in words that say what to do next.

use std::path::PathBuf;

use crate::address::{PhysAddr, VirtAddr};

/// A failed read of the dead kernel's memory. Small, because walks make many of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The dump has no such physical memory: unreadable, cut off, or there never was any.
    #[error("physical memory {:#x} is not in the dump", .0.0)]
    NotInDump(PhysAddr),
    /// The memory is of a kind that was left out when the dump was made.
    #[error("physical memory {:#x} was left out when the dump was filtered", .0.0)]
    LeftOut(PhysAddr),
    /// The bytes that the dump has of it cannot be unpacked.
    #[error("physical memory {:#x} is damaged in the dump", .0.0)]
    Damaged(PhysAddr),
    /// The page tables map nothing there.
    #[error("address {:#x} is not mapped", .0.0)]
    NotMapped(VirtAddr),
    /// A page table that leads there is not in the dump.
    #[error("the page table for {:#x} is not in the dump", .0.0)]
    NoPageTable(VirtAddr),
    /// More bytes were asked for than any real object has: a broken length.
    #[error("an object of {0} bytes is implausible")]
    TooLong(u64),
}

impl ReadError {
    /// Whether something is there that the dump lacks; else there is nothing, or it makes no sense.
    #[must_use]
    pub fn is_lost(self) -> bool {
        matches!(
            self,
            ReadError::NotInDump(_)
                | ReadError::LeftOut(_)
                | ReadError::Damaged(_)
                | ReadError::NoPageTable(_)
        )
    }
}

/// Why the analyzer could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened or mapped.
    #[error("cannot read {}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The file is no dump that is read.
    #[error(
        "{} is not a dump this program reads: {reason}. It reads ELF cores (dump.elf, /proc/vmcore), \
         kdump-compressed files (of makedumpfile, of QEMU's dump-guest-memory), both of them flattened \
         too, and reserved areas of tinykdump (a disk, a partition, or an image of one)",
        path.display()
    )]
    NotADump {
        /// The file.
        path: PathBuf,
        /// What it was found to be.
        reason: String,
    },
    /// The area carries a mark, and no dump.
    #[error(
        "{} is a reserved area that holds no dump (state: empty): nothing has crashed into it \
         since it was reserved or last saved", path.display()
    )]
    EmptyArea {
        /// The file.
        path: PathBuf,
    },
    /// Neither a note nor the memory holds VMCOREINFO.
    #[error(
        "the dump holds no VMCOREINFO, neither as a note nor in its memory, so the kernel cannot be \
         found in it. With QEMU's dump-guest-memory add `-device vmcoreinfo` and load qemu_fw_cfg \
         in the guest; a dump that was cut off early cannot be helped"
    )]
    NoVmcoreinfo,
    /// VMCOREINFO lacks a line.
    #[error("VMCOREINFO has no usable line {0}: {1}")]
    VmcoreinfoKey(String, &'static str),
    /// The dump is of a machine that is not supported.
    #[error("dumps of ELF machine {0} are not supported yet; x86_64 (62) and aarch64 (183) are")]
    Machine(u16),
    /// No symbol source.
    #[error("no kernel symbols: {0}. Give the kernel's vmlinux (with symbols) as second argument")]
    NoSymbols(String),
    /// A symbol that the command cannot do without.
    #[error("the kernel has no symbol {0}, so {1}")]
    NoSymbol(String, &'static str),
    /// A symbol that the command cannot do without, and that may exist.
    #[error("the symbol {0} cannot be found in what the dump has of the kernel, so {1}")]
    LostSymbol(String, &'static str),
    /// No types.
    #[error(
        "no type information: {0}. Give the kernel's vmlinux as second argument if it has BTF \
             (CONFIG_DEBUG_INFO_BTF)"
    )]
    NoTypes(String),
    /// A structure or member does not exist in this kernel.
    #[error(
        "this kernel's types have no {0}; its layout is newer or older than this program knows"
    )]
    NoMember(String),
    /// vmlinux cannot be used.
    #[error("{}: {reason}", path.display())]
    Vmlinux {
        /// The file.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// vmlinux belongs to another kernel.
    #[error(
        "{} is not the kernel that crashed:\n  build id of this vmlinux: {vmlinux}\n  build id of the \
         dumped kernel: {dump}\nThe dump is of release {release}: get its debug package (on Debian \
         linux-image-{release}-dbg of the same package version), or leave vmlinux away: bt, log and \
         sys work without it",
        path.display()
    )]
    BuildIdMismatch {
        /// The file.
        path: PathBuf,
        /// Its build id in hexadecimal.
        vmlinux: String,
        /// The dump's build id in hexadecimal.
        dump: String,
        /// OSRELEASE of the dump.
        release: String,
    },
    /// A word names no address.
    #[error(
        "{0} is neither an address in hexadecimal nor a symbol of the kernel or of its modules; \
         `sym -q TEXT` lists the symbols that have TEXT in their names"
    )]
    NoPlace(String),
    /// There is no such type.
    #[error("the kernel has no type called {0}{1}")]
    NoSuchType(String, String),
    /// A command's words make no sense.
    #[error("{0}")]
    Usage(String),
    /// There is no such task.
    #[error("no such task: {0}; `ps` lists them all")]
    NoTask(String),
    /// A task has no memory of its own.
    #[error("{0} is a kernel thread: it has no memory of its own")]
    NoMemory(String),
    /// There is no such task among those that could be found.
    #[error("no task {0} was found, and not all tasks could be read: {1}")]
    TaskNotFound(String, String),
    /// A command found nothing to show.
    #[error("nothing can be shown: {0}")]
    NothingToShow(String),
    /// No module could be read.
    #[error("no modules can be shown: {0}")]
    NoModules(String),
    /// A read that the command cannot do without failed.
    #[error("{what}: {error}")]
    Read {
        /// What was being read.
        what: &'static str,
        /// Why it failed.
        error: ReadError,
    },
    /// The output could not be written.
    #[error("cannot write the output")]
    Output(#[from] std::io::Error),
}

/// Says what was being read when a read failed.
pub trait ReadContext<T> {
    /// Turns a [`ReadError`] into an [`Error`] that names `what`.
    ///
    /// # Errors
    /// [`Error::Read`] when the read had failed.
    fn reading(self, what: &'static str) -> Result<T, Error>;
}

impl<T> ReadContext<T> for Result<T, ReadError> {
    fn reading(self, what: &'static str) -> Result<T, Error> {
        self.map_err(|error| Error::Read { what, error })
    }
}
