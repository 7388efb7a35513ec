//! Whether the running system uses a device: mounted, swap, or held by LVM, device mapper or RAID.
//!
//! The kernel's word is final (O_EXCL in [`crate::device`]); this module exists to say *who* uses
//! it, and to look at the partitions of a disk too.
//!
//! Sources: proc_pid_mountinfo(5), proc_swaps(5), Documentation/ABI/stable/sysfs-block.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::device::{DeviceNumber, Kind};

/// Where the running system shows itself; tests have their own.
#[derive(Clone, Debug)]
pub struct System {
    /// procfs, usually `/proc`.
    pub proc: PathBuf,
    /// sysfs, usually `/sys`.
    pub sys: PathBuf,
}

impl Default for System {
    fn default() -> System {
        System { proc: "/proc".into(), sys: "/sys".into() }
    }
}

/// One use of a device. `device` is its name in the kernel, such as `vdb1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Use {
    /// A file system on it is mounted.
    Mounted {
        /// The device, or the partition of it.
        device: String,
        /// Where.
        at: String,
    },
    /// It is an active swap area.
    Swap {
        /// The device, the partition of it, or the file.
        device: String,
    },
    /// Another block device is made of it.
    Held {
        /// The device, or the partition of it.
        device: String,
        /// The other one.
        by: String,
    },
    /// A loop device makes the file available as a block device.
    Loop {
        /// The loop device.
        device: String,
    },
}

impl std::fmt::Display for Use {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Use::Mounted { device, at } => {
                write!(f, "{device} is mounted on {at} (`umount {at}` first)")
            }
            Use::Swap { device } => write!(f, "{device} is active swap (`swapoff` it first)"),
            Use::Held { device, by } => {
                write!(f, "{device} is part of {by} (LVM, device mapper or RAID; stop that first)")
            }
            Use::Loop { device } => {
                write!(f, "it is attached to {device} (`losetup -d /dev/{device}` first)")
            }
        }
    }
}

/// Where a block device is on its disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Whereabouts {
    /// Its first byte on the whole disk.
    pub start: u64,
    /// Size of the whole disk in bytes.
    pub disk_size: u64,
    /// The whole disk's device node.
    pub node: PathBuf,
    /// Its name, when the disk is made of other devices or files.
    pub made_of_others: Option<String>,
}

/// A block device and its name.
struct Named {
    number: DeviceNumber,
    name: String,
    directory: PathBuf,
}

impl System {
    /// Every use of the device or file at `path`, which is of kind `kind`, or of a partition of it.
    ///
    /// # Errors
    /// The system cannot be asked: then nobody can say that the device is free.
    pub fn uses(&self, path: &Path, kind: Kind) -> io::Result<Vec<Use>> {
        match kind {
            Kind::Block(number) => self.device_uses(number),
            Kind::File => self.file_uses(path),
        }
    }

    /// Memory of this machine in bytes (MemTotal), if the system says.
    #[must_use]
    pub fn memory(&self) -> Option<u64> {
        let text = fs::read_to_string(self.proc.join("meminfo")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    }

    /// Where the block device with that number is.
    ///
    /// # Errors
    /// sysfs does not say, as of file systems that are on no one block device.
    pub fn whereabouts(&self, number: DeviceNumber) -> io::Result<Whereabouts> {
        /// Unit of `start` and `size`, whatever the disk's sectors.
        const SECTOR: u64 = 512;
        let sectors = |path: &Path| {
            let text = fs::read_to_string(path)?;
            let value = text.trim().parse::<u64>().ok().and_then(|it| it.checked_mul(SECTOR));
            value.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        };
        let device = self.sys.join("dev/block").join(number.to_string()).canonicalize()?;
        let (start, disk) = match device.parent() {
            Some(disk) if device.join("partition").exists() => {
                (sectors(&device.join("start"))?, disk)
            }
            _ => (0, device.as_path()),
        };
        let name = file_name(disk);
        let is_made = ["dm", "md", "loop"].iter().any(|kind| disk.join(kind).exists())
            || !names_in(&disk.join("slaves"))?.is_empty();
        Ok(Whereabouts {
            start,
            disk_size: sectors(&disk.join("size"))?,
            // sysfs writes ! for / in names.
            node: Path::new("/dev").join(name.replace('!', "/")),
            made_of_others: is_made.then_some(name),
        })
    }

    /// Whether the file system on that device is mounted with its data in the journal.
    ///
    /// # Errors
    /// The system cannot be asked.
    pub fn journals_data(&self, number: DeviceNumber) -> io::Result<bool> {
        let mut mounts = self.mounts()?.into_iter();
        Ok(mounts.any(|mount| mount.number == Some(number) && mount.journals_data))
    }

    fn device_uses(&self, number: DeviceNumber) -> io::Result<Vec<Use>> {
        let devices = self.with_partitions(number)?;
        let find = |number| devices.iter().find(|device| device.number == number);
        let mut uses = Vec::new();
        for mount in self.mounts()? {
            let numbers = [mount.number, self.number_of(Path::new(&mount.source))];
            if let Some(device) = numbers.into_iter().flatten().find_map(find) {
                uses.push(Use::Mounted { device: device.name.clone(), at: mount.at });
            }
        }
        for swap in self.swaps()? {
            if let Some(device) = self.number_of(&swap).and_then(find) {
                uses.push(Use::Swap { device: device.name.clone() });
            }
        }
        for device in &devices {
            for holder in names_in(&device.directory.join("holders"))? {
                let by = holder.to_string_lossy().into_owned();
                uses.push(Use::Held { device: device.name.clone(), by });
            }
        }
        Ok(uses)
    }

    fn file_uses(&self, path: &Path) -> io::Result<Vec<Use>> {
        let path = path.canonicalize()?;
        let mut uses = Vec::new();
        if self.swaps()?.contains(&path) {
            uses.push(Use::Swap { device: path.display().to_string() });
        }
        for name in names_in(&self.sys.join("block"))? {
            let backing = self.sys.join("block").join(&name).join("loop/backing_file");
            let Ok(backing) = fs::read_to_string(backing) else { continue };
            if Path::new(backing.trim_end_matches('\n')) == path {
                uses.push(Use::Loop { device: name.to_string_lossy().into_owned() });
            }
        }
        Ok(uses)
    }

    /// The device with that number and, when it is a disk, its partitions.
    fn with_partitions(&self, number: DeviceNumber) -> io::Result<Vec<Named>> {
        let link = self.sys.join("dev/block").join(number.to_string());
        let directory = link.canonicalize()?;
        let name = file_name(&directory);
        let mut devices = vec![Named { number, name, directory: directory.clone() }];
        for entry in names_in(&directory)? {
            let directory = directory.join(entry);
            if !directory.join("partition").exists() {
                continue;
            }
            let text = fs::read_to_string(directory.join("dev"))?;
            if let Some(number) = DeviceNumber::parse(&text) {
                devices.push(Named { number, name: file_name(&directory), directory });
            }
        }
        Ok(devices)
    }

    /// The number of the block device that a path in `/dev` names, from sysfs.
    fn number_of(&self, path: &Path) -> Option<DeviceNumber> {
        let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        let name = path.file_name()?;
        let text = fs::read_to_string(self.sys.join("class/block").join(name).join("dev")).ok()?;
        DeviceNumber::parse(&text)
    }

    fn mounts(&self) -> io::Result<Vec<Mount>> {
        let text = fs::read_to_string(self.proc.join("self/mountinfo"))?;
        Ok(text.lines().filter_map(Mount::parse).collect())
    }

    fn swaps(&self) -> io::Result<Vec<PathBuf>> {
        let text = match fs::read_to_string(self.proc.join("swaps")) {
            Ok(text) => text,
            // A kernel without swap has no such file.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let paths = text.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        Ok(paths.map(|path| unescape(path).into()).collect())
    }
}

/// One line of mountinfo.
struct Mount {
    /// Device of the file system; btrfs and others have one of their own here.
    number: Option<DeviceNumber>,
    at: String,
    source: String,
    journals_data: bool,
}

impl Mount {
    fn parse(line: &str) -> Option<Mount> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ');
        let number = DeviceNumber::parse(left.nth(2)?);
        let at = unescape(left.nth(1)?);
        let mut right = right.split(' ');
        let source = unescape(right.nth(1)?);
        let mut options = right.next().unwrap_or_default().split(',');
        let journals_data = options.any(|option| option == "data=journal");
        Some(Mount { number, at, source, journals_data })
    }
}

/// Undoes the octal escapes (`\040` for a space) of mountinfo and swaps.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Names in a directory, sorted; none when it does not exist.
fn names_in(directory: &Path) -> io::Result<Vec<OsString>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = entries
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A machine with the disk `tkd` (240:0) and its partitions `tkd1` (240:1) and `tkd2` (240:2).
    fn machine(mountinfo: &str, swaps: &str) -> (tempfile::TempDir, System) {
        let root = tempfile::tempdir().unwrap();
        let system = System { proc: root.path().join("proc"), sys: root.path().join("sys") };
        let disk = system.sys.join("devices/pci/block/tkd");
        let class = system.sys.join("class/block");
        let numbers = system.sys.join("dev/block");
        for directory in [&disk, &class, &numbers, &system.proc.join("self")] {
            fs::create_dir_all(directory).unwrap();
        }
        for (minor, path) in [(0, disk.clone()), (1, disk.join("tkd1")), (2, disk.join("tkd2"))] {
            fs::create_dir_all(path.join("holders")).unwrap();
            fs::write(path.join("dev"), format!("240:{minor}\n")).unwrap();
            symlink(&path, class.join(path.file_name().unwrap())).unwrap();
            symlink(&path, numbers.join(format!("240:{minor}"))).unwrap();
            if minor > 0 {
                fs::write(path.join("partition"), format!("{minor}\n")).unwrap();
            }
        }
        fs::write(system.proc.join("self/mountinfo"), mountinfo).unwrap();
        fs::write(system.proc.join("swaps"), format!("Filename Type Size Used Priority\n{swaps}"))
            .unwrap();
        (root, system)
    }

    fn uses(system: &System, minor: u32) -> Vec<Use> {
        let kind = Kind::Block(DeviceNumber { major: 240, minor });
        system.uses(Path::new("/dev/tkd"), kind).unwrap()
    }

    #[test]
    fn free_disk_is_free() {
        let (_root, system) = machine("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n", "");
        assert_eq!(uses(&system, 0), []);
    }

    #[test]
    fn disk_is_in_use_when_a_partition_of_it_is_mounted() {
        let (_root, system) = machine("22 1 240:2 / /mnt/a\\040b rw - ext4 /dev/tkd2 rw\n", "");
        let mounted = Use::Mounted { device: "tkd2".into(), at: "/mnt/a b".into() };
        assert_eq!(uses(&system, 0), std::slice::from_ref(&mounted));
        assert_eq!(uses(&system, 2), [mounted]);
        assert_eq!(uses(&system, 1), []);
    }

    #[test]
    fn btrfs_with_a_device_number_of_its_own_is_known_by_its_source() {
        let (_root, system) = machine("22 1 0:33 / /data rw shared:1 - btrfs /dev/tkd1 rw\n", "");
        assert_eq!(uses(&system, 1), [Use::Mounted { device: "tkd1".into(), at: "/data".into() }]);
    }

    #[test]
    fn partition_is_found_on_its_disk() {
        let mounted = "22 1 240:2 / /mnt rw - ext4 /dev/tkd2 rw,data=journal\n";
        let (_root, system) = machine(mounted, "");
        let disk = system.sys.join("class/block/tkd");
        fs::write(disk.join("size"), "409600\n").unwrap();
        fs::write(disk.join("tkd2/start"), "2048\n").unwrap();
        let of = |minor| system.whereabouts(DeviceNumber { major: 240, minor });
        let whole = Whereabouts {
            start: 0,
            disk_size: 200 << 20,
            node: "/dev/tkd".into(),
            made_of_others: None,
        };
        assert_eq!(of(0).unwrap(), whole);
        assert_eq!(of(2).unwrap(), Whereabouts { start: 1 << 20, ..whole });
        let journals = |minor| system.journals_data(DeviceNumber { major: 240, minor }).unwrap();
        assert_eq!((journals(1), journals(2)), (false, true));
        fs::create_dir(disk.join("md")).unwrap();
        assert_eq!(of(2).unwrap().made_of_others.as_deref(), Some("tkd"));
        assert!(of(3).is_err());
    }

    #[test]
    fn active_swap_and_holders_are_uses() {
        let (_root, system) = machine("", "/dev/tkd1 partition 1 0 -2\n");
        fs::create_dir(system.sys.join("class/block/tkd2/holders/dm-0")).unwrap();
        assert_eq!(
            uses(&system, 0),
            [
                Use::Swap { device: "tkd1".into() },
                Use::Held { device: "tkd2".into(), by: "dm-0".into() }
            ]
        );
    }

    #[test]
    fn image_behind_a_loop_device_is_in_use() {
        let (root, system) = machine("", "");
        let image = root.path().join("image");
        fs::write(&image, "").unwrap();
        assert_eq!(system.uses(&image, Kind::File).unwrap(), []);
        let directory = system.sys.join("block/loop7/loop");
        fs::create_dir_all(&directory).unwrap();
        let backing = image.canonicalize().unwrap();
        fs::write(directory.join("backing_file"), format!("{}\n", backing.display())).unwrap();
        assert_eq!(
            system.uses(&image, Kind::File).unwrap(),
            [Use::Loop { device: "loop7".into() }]
        );
    }

    #[test]
    fn system_that_cannot_be_asked_is_an_error_not_a_yes() {
        let (_root, system) = machine("", "");
        fs::remove_file(system.proc.join("self/mountinfo")).unwrap();
        let kind = Kind::Block(DeviceNumber { major: 240, minor: 0 });
        assert!(system.uses(Path::new("/dev/tkd"), kind).is_err());
    }
}
