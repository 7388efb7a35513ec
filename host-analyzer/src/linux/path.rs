//! Paths of files: from a dentry upwards, across mounts.

use crate::kernel::Kernel;
use crate::{Error, ReadError, VirtAddr, bytes};

/// Bounds: the longest name (NAME_MAX), and more names than any path has (PATH_MAX bytes).
const MAX_NAME: u32 = 255;
const MAX_NAMES: usize = 4096;

/// Where the members of the structures lie (include/linux/dcache.h, mount.h and fs/mount.h, 6.1 and 6.12).
pub struct PathLayout {
    name: u64,
    length: u64,
    parent: u64,
    root: u64,
    /// In struct mount.
    mount: u64,
    mount_parent: u64,
    mount_point: u64,
}

impl PathLayout {
    /// Looks the members up in the kernel's types.
    ///
    /// # Errors
    /// [`Error::NoMember`], [`Error::NoTypes`].
    pub fn new(kernel: &Kernel<'_>) -> Result<PathLayout, Error> {
        Ok(PathLayout {
            name: kernel.offset("dentry", "d_name.name")?,
            length: kernel.offset("dentry", "d_name.len")?,
            parent: kernel.offset("dentry", "d_parent")?,
            root: kernel.offset("vfsmount", "mnt_root")?,
            mount: kernel.offset("mount", "mnt")?,
            mount_parent: kernel.offset("mount", "mnt_parent")?,
            mount_point: kernel.offset("mount", "mnt_mountpoint")?,
        })
    }

    /// The name of one dentry.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn name(&self, kernel: &Kernel<'_>, dentry: VirtAddr) -> Result<String, ReadError> {
        let memory = kernel.memory();
        let length = memory.u32(dentry.offset(self.length))?.min(MAX_NAME) as usize;
        let at = memory.pointer(dentry.offset(self.name))?;
        memory.bytes(at, length).map(|raw| bytes::c_string(&raw))
    }

    /// The path of `dentry` in the mount `mount` (a struct vfsmount), up to the root of all mounts. What
    /// is in no mount (a pipe) is a name without a slash.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn path(
        &self,
        kernel: &Kernel<'_>,
        mut dentry: VirtAddr,
        mount: VirtAddr,
    ) -> Result<String, ReadError> {
        let memory = kernel.memory();
        let mut mount = mount.back(self.mount);
        let mut names = Vec::new();
        for _ in 0..MAX_NAMES {
            let root = memory.pointer(mount.offset(self.mount + self.root))?;
            let parent = memory.pointer(dentry.offset(self.parent))?;
            if dentry != root && parent != dentry {
                names.push(self.name(kernel, dentry)?);
                dentry = parent;
                continue;
            }
            let above = memory.pointer(mount.offset(self.mount_parent))?;
            if above == mount || dentry != root {
                break;
            }
            dentry = memory.pointer(mount.offset(self.mount_point))?;
            mount = above;
        }
        if names.is_empty() {
            let own = self.name(kernel, dentry)?;
            return Ok(if own.is_empty() { "/".to_owned() } else { own });
        }
        names.reverse();
        Ok(format!("/{}", names.join("/")))
    }
}
