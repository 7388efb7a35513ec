//! The guest: a distribution kernel with an initramfs of ours that loads the payload with stock
//! `kexec -p` and then crashes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use cpio::newc;

use crate::fixtures::{DebugInfo, Fixtures, Kernel, Unpacked};
use crate::qemu::{Blob, Disk, Machine, SecondLine, Vm};
use crate::target::{Syscall, Target, Variant};

/// How long a guest may take from power-on to the crash. Two to four seconds are usual, twenty with
/// UEFI.
const BOOT: Duration = Duration::from_secs(120);

/// Every line that the guest prints for us begins with this.
pub const MARK: &str = "guest:";

/// What brings the kernel down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trigger {
    /// `echo c > /proc/sysrq-trigger` on whichever CPU the shell runs.
    Sysrq,
    /// The same on the CPU with this number.
    SysrqOnCpu(u32),
    /// This shell command, run by the shell that is process 1.
    Shell(&'static str),
    /// Nothing in the guest: whoever runs it does something to the machine.
    FromOutside,
}

/// One way to boot, load and crash.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Scenario {
    /// The kernel that crashes: `6_1` of the fixture `[kernel.debian-6_1-amd64]`.
    pub kernel: String,
    /// The machine's name in the target's file.
    pub machine: String,
    /// How the payload is loaded.
    pub syscall: Syscall,
    /// Whether the kernel lies at a random address.
    pub kaslr: bool,
    /// The value of `crashkernel=`.
    pub crashkernel: String,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Number of CPUs.
    pub cpus: u32,
    /// Further options for the kernel.
    pub kernel_options: String,
    /// The payload's command line.
    pub append: String,
    /// What lies in the guest's memory before its kernel starts.
    pub blobs: Vec<Blob>,
    /// A line besides the console's; what comes over it gets into the file `second-line.log`.
    pub second_line: Option<SecondLine>,
    /// Kernel modules that the guest loads beside its disks' drivers.
    pub modules: Vec<PathBuf>,
    /// Files of the host's in the guest, by their paths there.
    pub files: BTreeMap<String, PathBuf>,
    /// Shell commands that the guest runs before the payload is loaded; `say` prints a line, `fail` one
    /// more and ends.
    pub prepare: String,
    /// What is loaded beside the payload: a path in the guest.
    pub initrd: Option<&'static str>,
    /// Shell commands that the guest runs when the payload is loaded; `say` prints a line.
    pub before: String,
    /// What brings the kernel down.
    pub trigger: Trigger,
}

impl Scenario {
    /// The usual guest of `target`: 512 MiB, two CPUs.
    #[must_use]
    pub fn usual(target: &Target) -> Scenario {
        Scenario {
            kernel: target.debian.kernel.clone(),
            machine: "usual".to_owned(),
            syscall: target.syscalls.first().copied().unwrap_or(Syscall::Load),
            kaslr: true,
            crashkernel: "2M".to_owned(),
            memory_mib: 512,
            cpus: 2,
            kernel_options: String::new(),
            append: format!("console={},115200n8", target.qemu.console),
            blobs: Vec::new(),
            second_line: None,
            modules: Vec::new(),
            files: BTreeMap::new(),
            prepare: String::new(),
            initrd: None,
            before: String::new(),
            trigger: Trigger::Sysrq,
        }
    }

    /// The same with one more option for the payload.
    #[must_use]
    pub fn appending(mut self, option: &str) -> Scenario {
        self.append = format!("{} {option}", self.append);
        self
    }
}

/// What guests are made of.
pub struct Guest<'a> {
    /// The architecture.
    pub target: &'a Target,
    /// Where kernels and firmware come from.
    pub fixtures: &'a Fixtures,
    /// busybox and kexec with its libraries.
    pub tools: &'a Unpacked,
    /// What `kexec -p` loads.
    pub payload: &'a Path,
}

/// The kernel that `scenario` names, fetched if need be.
///
/// # Errors
/// When it cannot be fetched.
pub fn kernel(
    fixtures: &Fixtures,
    target: &Target,
    scenario: &Scenario,
    debug_info: DebugInfo,
) -> Result<Kernel> {
    let name = format!("debian-{}-{}", scenario.kernel, target.debian.architecture);
    fixtures.kernel(&name, debug_info)
}

/// The tools of `target`'s guests, fetched if need be.
///
/// # Errors
/// When they cannot be fetched.
pub fn tools(fixtures: &Fixtures, target: &Target) -> Result<Unpacked> {
    fixtures.packages(&format!("guest-{}", target.debian.architecture))
}

impl Guest<'_> {
    /// Boots as `scenario` says, loads the payload and returns when the guest is about to crash.
    /// Logs and the initramfs are left in `directory`.
    ///
    /// # Errors
    /// When the machine does not start or the guest does not get that far.
    pub fn boot(&self, scenario: &Scenario, disks: Vec<Disk>, directory: &Path) -> Result<Vm> {
        let mut vm = self.start(scenario, disks, directory)?;
        self.wait_for_crash(&mut vm)?;
        Ok(vm)
    }

    /// Starts the machine and returns at once.
    ///
    /// # Errors
    /// When the machine does not start.
    pub fn start(&self, scenario: &Scenario, disks: Vec<Disk>, directory: &Path) -> Result<Vm> {
        self.with_machine(scenario, disks, directory, |machine| machine.start(directory))
    }

    /// Makes the machine and its initramfs, and starts it by `start`.
    ///
    /// # Errors
    /// When something is missing, and those of `start`.
    pub fn with_machine(
        &self,
        scenario: &Scenario,
        disks: Vec<Disk>,
        directory: &Path,
        start: impl FnOnce(&Machine<'_>) -> Result<Vm>,
    ) -> Result<Vm> {
        std::fs::create_dir_all(directory)?;
        let initrd = directory.join("initramfs.cpio");
        let kernel = kernel(self.fixtures, self.target, scenario, DebugInfo::No)?;
        let variant = self.target.machine(&scenario.machine)?;
        let mut modules = modules(&kernel, variant)?;
        modules.extend_from_slice(&scenario.modules);
        std::fs::write(&initrd, self.initramfs(scenario, &modules)?)?;
        let firmware = match &variant.firmware {
            Some(it) => Some(self.fixtures.packages(&it.packages)?.file(&it.file)?),
            None => None,
        };
        let machine = Machine {
            target: self.target,
            variant,
            firmware,
            memory_mib: scenario.memory_mib,
            cpus: scenario.cpus,
            kernel: kernel.vmlinuz,
            initrd,
            append: self.kernel_command_line(scenario),
            disks,
            blobs: scenario.blobs.clone(),
            second_line: scenario.second_line.map(|line| (line, directory.join("second-line.log"))),
            arguments: Vec::new(),
        };
        start(&machine)
    }

    /// Waits until the guest has loaded the payload and is about to crash.
    ///
    /// # Errors
    /// When the guest says that it failed, or the time is over.
    pub fn wait_for_crash(&self, vm: &mut Vm) -> Result<()> {
        let line = vm.expect(&["guest: crashing", "guest: failed", "Kernel panic"], BOOT)?;
        if !line.contains("guest: crashing") {
            return Err(vm.tell(&anyhow!("the guest did not get to its crash: {line}")));
        }
        Ok(())
    }

    fn kernel_command_line(&self, scenario: &Scenario) -> String {
        let mut line = format!(
            "console={},115200n8 printk.devkmsg=on loglevel=7 crashkernel={}",
            self.target.qemu.console, scenario.crashkernel
        );
        if !scenario.kaslr {
            line += " nokaslr";
        }
        if !scenario.kernel_options.is_empty() {
            line = format!("{line} {}", scenario.kernel_options);
        }
        line
    }

    fn initramfs(&self, scenario: &Scenario, modules: &[PathBuf]) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        for directory in
            ["bin", "sbin", "lib", "lib64", "modules", "dev", "proc", "sys", "tmp", "mnt", "host"]
        {
            archive.directory(directory)?;
        }
        archive.file("bin/busybox", &self.tools.file("bin/busybox")?)?;
        archive.file("sbin/kexec", &self.tools.file("sbin/kexec")?)?;
        let linked = self.tools.linked("sbin/kexec")?;
        let interpreter = linked.interpreter.as_deref().unwrap_or_default();
        for (name, library) in &linked.libraries {
            let path = match interpreter.strip_prefix('/') {
                Some(path) if path.ends_with(name.as_str()) => path.to_owned(),
                _ => format!("lib/{name}"),
            };
            archive.file(&path, library)?;
        }
        for module in modules {
            let name = module.file_name().context("a module without a name")?.to_string_lossy();
            archive.file(&format!("modules/{name}"), module)?;
        }
        for (to, from) in &scenario.files {
            archive.file(to, from)?;
        }
        archive.file("capture.bin", self.payload)?;
        archive.entry("init", 0o100_755, init_script(scenario, modules)?.as_bytes())?;
        archive.finish()
    }
}

/// The driver modules that `kernel` needs for the disks of `variant` and has not built in, in the
/// order in which they must be loaded.
fn modules(kernel: &Kernel, variant: &Variant) -> Result<Vec<PathBuf>> {
    let is_scsi = variant.disk.starts_with("scsi-");
    let host = variant.devices.iter().find(|device| is_scsi && device.starts_with("virtio-scsi-"));
    let device = host.unwrap_or(&variant.disk);
    // `virtio-scsi-device,id=scsi`: QEMU's names of what is behind virtio-mmio end like this.
    let behind_mmio = device.split(',').next().is_some_and(|name| name.ends_with("-device"));
    let transport: &[&str] = if behind_mmio {
        &["drivers/virtio/virtio_mmio"]
    } else {
        &[
            "drivers/virtio/virtio_pci_modern_dev",
            "drivers/virtio/virtio_pci_legacy_dev",
            "drivers/virtio/virtio_pci",
        ]
    };
    let disk: &[&str] = if is_scsi {
        &[
            "drivers/scsi/scsi_common",
            "drivers/scsi/scsi_mod",
            "drivers/scsi/virtio_scsi",
            "drivers/scsi/sd_mod",
        ]
    } else if variant.disk.starts_with("nvme") {
        &[
            "crypto/crct10dif_common",
            "lib/crc-t10dif",
            "lib/crc64",
            "lib/crc64-rocksoft",
            "block/t10-pi",
            "drivers/nvme/host/nvme-core",
            "drivers/nvme/host/nvme",
        ]
    } else {
        &["drivers/block/virtio_blk"]
    };
    let core = ["drivers/virtio/virtio_ring", "drivers/virtio/virtio"];
    let builtin = std::fs::read_to_string(&kernel.builtin)
        .with_context(|| format!("cannot read {}", kernel.builtin.display()))?;
    // Parts of virtio_pci before 5.12 and 5.17.
    let later = ["drivers/virtio/virtio_pci_modern_dev", "drivers/virtio/virtio_pci_legacy_dev"];
    let needed = core.iter().chain(transport).chain(disk);
    let loadable =
        needed.filter(|module| !builtin.lines().any(|line| line == format!("kernel/{module}.ko")));
    loadable
        .filter_map(|module| {
            // Later kernels' modules are compressed; busybox unpacks what it loads.
            let names = [".ko", ".ko.xz"].map(|end| format!("{module}{end}"));
            let mut paths = names.iter().map(|name| kernel.modules.join(name));
            let found = paths.find(|path| path.is_file());
            if found.is_none() && later.contains(module) {
                return None;
            }
            Some(found.with_context(|| format!("the kernel {} has no {module}", kernel.release)))
        })
        .collect()
}

/// `/init`. It prints through /dev/kmsg, because what user space writes to the console just before
/// a crash is lost.
fn init_script(scenario: &Scenario, modules: &[PathBuf]) -> Result<String> {
    if scenario.append.contains('\'') {
        bail!("a quote in the payload's command line: {}", scenario.append);
    }
    let syscall = match scenario.syscall {
        Syscall::Load => "-c",
        Syscall::FileLoad => "-s",
    };
    let crash = match scenario.trigger {
        Trigger::Sysrq => "echo c > /proc/sysrq-trigger".to_owned(),
        Trigger::SysrqOnCpu(cpu) => {
            format!("taskset -c {cpu} sh -c 'echo c > /proc/sysrq-trigger'")
        }
        Trigger::Shell(command) => command.to_owned(),
        Trigger::FromOutside => "while :; do sleep 1; done".to_owned(),
    };
    let mut script = String::from(
        "#!/bin/busybox sh\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/bin:/sbin LD_LIBRARY_PATH=/lib\n\
         mount -t devtmpfs dev /dev\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sys /sys\n\
         say() { echo \"guest: $*\" > /dev/kmsg; }\n\
         fail() { say \"failed: $*\"; poweroff -f; }\n",
    );
    for module in modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        writeln!(script, "insmod /modules/{name} || fail \"insmod {name}\"")?;
    }
    let initrd = scenario.initrd.map(|path| format!(" --initrd={path}")).unwrap_or_default();
    write!(
        script,
        "{prepare}\n\
         [ ! -b /dev/vda ] || dd if=/dev/vda of=/dev/null bs=4096 count=16 2> /dev/null\n\
         say \"$ kexec {syscall} -p capture.bin{initrd} --append='{append}'\"\n\
         kexec {syscall} -p /capture.bin{initrd} --append='{append}' > /tmp/kexec 2>&1\n\
         code=$?\n\
         while read -r line; do say \"kexec: $line\"; done < /tmp/kexec\n\
         loaded=$(cat /sys/kernel/kexec_crash_loaded)\n\
         say \"kexec {syscall} -p: exit code $code, crash_loaded $loaded,\" \\\n\
         \x20   \"crash_size $(cat /sys/kernel/kexec_crash_size)\"\n\
         [ \"$code\" = 0 ] && [ \"$loaded\" = 1 ] || fail \"nothing is loaded\"\n\
         echo 1 > /proc/sys/kernel/sysrq\n\
         {before}\n\
         say \"crashing\"\n\
         {crash}\n",
        append = scenario.append,
        prepare = scenario.prepare,
        before = scenario.before,
    )?;
    Ok(script)
}

/// A cpio archive in the "newc" form that the kernel unpacks.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn directory(&mut self, name: &str) -> Result<()> {
        self.entry(name, 0o040_755, &[])
    }

    fn file(&mut self, name: &str, from: &Path) -> Result<()> {
        let bytes =
            std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.entry(name, 0o100_755, &bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.inode += 1;
        let size = u32::try_from(bytes.len()).context("too large for an initramfs")?;
        let builder = newc::Builder::new(name).mode(mode).ino(self.inode).nlink(1);
        let mut writer = builder.write(&mut self.bytes, size);
        writer.write_all(bytes)?;
        writer.finish()?;
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        newc::trailer(&mut self.bytes)?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usual() -> Scenario {
        Scenario::usual(&Target::load("x86_64").unwrap())
    }

    #[test]
    fn init_loads_with_the_system_call_and_the_options_asked_for() {
        let scenario = Scenario {
            syscall: Syscall::Load,
            append: "capture.after=halt".to_owned(),
            trigger: Trigger::SysrqOnCpu(1),
            ..usual()
        };
        let script = init_script(&scenario, &[PathBuf::from("/x/virtio.ko")]).unwrap();
        assert!(script.contains("\nkexec -c -p /capture.bin --append='capture.after=halt' "));
        assert!(script.contains("\ninsmod /modules/virtio.ko || fail "));
        assert!(script.ends_with("\ntaskset -c 1 sh -c 'echo c > /proc/sysrq-trigger'\n"));
    }

    #[test]
    fn quote_in_the_options_is_refused() {
        let scenario = Scenario { append: "a='b".to_owned(), ..usual() };
        assert!(init_script(&scenario, &[]).is_err());
    }

    #[test]
    fn archive_holds_names_modes_and_contents() {
        let mut archive = Archive::default();
        archive.directory("bin").unwrap();
        archive.entry("init", 0o100_755, b"#!/bin/sh\n").unwrap();
        let bytes = archive.finish().unwrap();
        let first = newc::Reader::new(bytes.as_slice()).unwrap();
        assert_eq!((first.entry().name(), first.entry().mode()), ("bin", 0o040_755));
        let second = newc::Reader::new(first.finish().unwrap()).unwrap();
        assert_eq!((second.entry().name(), second.entry().file_size()), ("init", 10));
        let last = newc::Reader::new(second.finish().unwrap()).unwrap();
        assert!(last.entry().is_trailer());
    }
}
