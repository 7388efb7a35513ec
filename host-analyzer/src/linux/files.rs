//! The files that a process has open.

use crate::kernel::Kernel;
use crate::{Error, ReadContext, ReadError, VirtAddr};

use super::path::PathLayout;

/// More files than a process may have open (the default of fs.nr_open).
const MAX_FILES: u32 = 1 << 20;

/// Where the members of the structures lie (include/linux/fs.h, fdtable.h and fs_struct.h, 6.1 and 6.12).
pub struct FilesLayout {
    files: u64,
    table: u64,
    table_size: u64,
    table_files: u64,
    dentry: u64,
    mount: u64,
    inode: u64,
    mode: u64,
    number: u64,
    place: u64,
    root: u64,
    current: u64,
    /// Of a struct path.
    path_dentry: u64,
    path_mount: u64,
    paths: PathLayout,
}

/// An open file. What could not be read is an error of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenFile {
    /// Its descriptor.
    pub descriptor: u32,
    /// Addresses of its struct file, struct dentry and struct inode.
    pub file: VirtAddr,
    /// See `file`.
    pub dentry: Result<VirtAddr, ReadError>,
    /// See `file`.
    pub inode: Result<VirtAddr, ReadError>,
    /// What it is: REG, DIR, CHR, BLK, FIFO, SOCK or LNK.
    pub kind: Result<&'static str, ReadError>,
    /// Its path, or what stands for one.
    pub path: Result<String, ReadError>,
}

/// What a process has open.
#[derive(Clone, Debug)]
pub struct OpenFiles {
    /// Its root and its current directory; none for a kernel thread that has given them up.
    pub root: Option<Result<String, ReadError>>,
    /// See `root`.
    pub current: Option<Result<String, ReadError>>,
    /// The files, in the order of their descriptors.
    pub files: Vec<OpenFile>,
}

impl FilesLayout {
    /// Looks the members up in the kernel's types.
    ///
    /// # Errors
    /// [`Error::NoMember`], [`Error::NoTypes`].
    pub fn new(kernel: &Kernel<'_>) -> Result<FilesLayout, Error> {
        Ok(FilesLayout {
            files: kernel.offset("task_struct", "files")?,
            table: kernel.offset("files_struct", "fdt")?,
            table_size: kernel.offset("fdtable", "max_fds")?,
            table_files: kernel.offset("fdtable", "fd")?,
            dentry: kernel.offset("file", "f_path.dentry")?,
            mount: kernel.offset("file", "f_path.mnt")?,
            inode: kernel.offset("file", "f_inode")?,
            mode: kernel.offset("inode", "i_mode")?,
            number: kernel.offset("inode", "i_ino")?,
            place: kernel.offset("task_struct", "fs")?,
            root: kernel.offset("fs_struct", "root")?,
            current: kernel.offset("fs_struct", "pwd")?,
            path_dentry: kernel.offset("path", "dentry")?,
            path_mount: kernel.offset("path", "mnt")?,
            paths: PathLayout::new(kernel)?,
        })
    }

    /// The open files of `task`, the address of a struct task_struct.
    ///
    /// # Errors
    /// [`Error::Read`] when the table of files cannot be read.
    pub fn read(&self, kernel: &Kernel<'_>, task: VirtAddr) -> Result<OpenFiles, Error> {
        let memory = kernel.memory();
        let place = memory.pointer(task.offset(self.place)).reading("a task's directories")?;
        let directory =
            |member: u64| (!place.is_null()).then(|| self.path_at(kernel, place.offset(member)));
        let files = memory.pointer(task.offset(self.files)).reading("a task's files")?;
        let mut open = OpenFiles {
            root: directory(self.root),
            current: directory(self.current),
            files: Vec::new(),
        };
        if files.is_null() {
            return Ok(open);
        }
        let table = memory.pointer(files.offset(self.table)).reading("the table of files")?;
        let size = memory.u32(table.offset(self.table_size)).reading("the table of files")?;
        let array = memory.pointer(table.offset(self.table_files)).reading("the table of files")?;
        let raw = memory.bytes(array, size.min(MAX_FILES) as usize * 8);
        let raw = raw.reading("the table of files")?;
        for (descriptor, word) in (0..).zip(raw.chunks_exact(8)) {
            let file = VirtAddr(crate::bytes::u64_at(word, 0).unwrap_or(0));
            if !file.is_null() {
                open.files.push(self.file(kernel, descriptor, file));
            }
        }
        Ok(open)
    }

    /// The path of the file whose struct file is at `file`.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn path_of(&self, kernel: &Kernel<'_>, file: VirtAddr) -> Result<String, ReadError> {
        self.file(kernel, 0, file).path
    }

    fn file(&self, kernel: &Kernel<'_>, descriptor: u32, file: VirtAddr) -> OpenFile {
        let memory = kernel.memory();
        let dentry = memory.pointer(file.offset(self.dentry));
        let inode = memory.pointer(file.offset(self.inode));
        let kind = inode.and_then(|inode| self.kind(kernel, inode));
        let path = || {
            let mount = memory.pointer(file.offset(self.mount))?;
            let path = self.paths.path(kernel, dentry?, mount)?;
            let number = memory.u64(inode?.offset(self.number))?;
            // What has no path is named as /proc/PID/fd names it (fs/pipe.c, net/socket.c and
            // fs/anon_inodes.c, 6.1).
            Ok(match kind? {
                "FIFO" if !path.starts_with("/") || path == "/" => format!("pipe:[{number}]"),
                "SOCK" if !path.starts_with("/") || path == "/" => format!("socket:[{number}]"),
                _ if path.starts_with('[') => format!("anon_inode:{path}"),
                _ => path,
            })
        };
        OpenFile { descriptor, file, dentry, inode, kind, path: path() }
    }

    fn kind(&self, kernel: &Kernel<'_>, inode: VirtAddr) -> Result<&'static str, ReadError> {
        let mode = kernel.memory().u32(inode.offset(self.mode))?;
        // S_IFMT (include/uapi/linux/stat.h); i_mode has 16 bits.
        Ok(match mode & 0xf000 {
            0xc000 => "SOCK",
            0xa000 => "LNK",
            0x8000 => "REG",
            0x6000 => "BLK",
            0x4000 => "DIR",
            0x2000 => "CHR",
            0x1000 => "FIFO",
            _ => "?",
        })
    }

    fn path_at(&self, kernel: &Kernel<'_>, at: VirtAddr) -> Result<String, ReadError> {
        let memory = kernel.memory();
        let dentry = memory.pointer(at.offset(self.path_dentry))?;
        let mount = memory.pointer(at.offset(self.path_mount))?;
        self.paths.path(kernel, dentry, mount)
    }
}
