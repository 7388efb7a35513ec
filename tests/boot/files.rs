//! Dumps into files of mounted file systems: what a crashed machine has where nobody left a partition free.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use format::area::Trailer;
use format::handoff::{self, Extent, ExtentMark, Handoff};
use tests::core_file::CoreFile;
use tests::crash::{Crashed, analyzer, bench, directory};
use tests::trace::{from_crash, of_analyzer};
use xtask::dump::{DUMP, Workbench};
use xtask::fixtures::DebugInfo;
use xtask::guest::{Scenario, Trigger};
use xtask::process::{self, Program};
use xtask::programs::with_libraries;
use xtask::qemu::{Disk, sparse_image};

const MIB: u64 = 1 << 20;

/// Size of the file, which holds all of the guest's memory.
const AREA: u64 = 300 * MIB;

/// Where the disk's only partition begins.
const PARTITION: u64 = MIB;

/// Runs the host's programs with its libraries.
const PREPARE: &str = "\
    loader() { /host/ld-* --library-path /host /host/loader \"$@\"; }\n\
    chattr() { /host/ld-* --library-path /host /host/chattr \"$@\"; }\n\
    try() { \"$@\" > /tmp/said 2>&1; code=$?\n\
    while read -r line; do say \"$1: $line\"; done < /tmp/said\n\
    [ $code = 0 ] || fail \"$*\"; }\n";

/// A file system on a disk, and a second disk over which the guest tells of it.
struct Stage {
    bench: &'static Workbench,
    directory: PathBuf,
    disk: Disk,
    told: Disk,
    scenario: Scenario,
    mount: &'static str,
}

impl Stage {
    fn new(
        name: &str,
        disk: impl FnOnce(&Path) -> Result<Disk>,
        mount: &'static str,
    ) -> Result<Stage> {
        let bench = bench("x86_64")?;
        process::install(&[
            Program { name: "chattr", package: "e2fsprogs" },
            Program { name: "mkfs.ext4", package: "e2fsprogs" },
            Program { name: "mkfs.xfs", package: "xfsprogs" },
        ])?;
        let directory = directory(&format!("files/{name}"))?;
        let disk = disk(&directory)?;
        let told = sparse_image(&directory.join("told.img"), AREA)?;
        let mut files = BTreeMap::new();
        for program in [bench.loader.path(), Path::new("/usr/bin/chattr")] {
            for path in with_libraries(program)? {
                let name = path.file_name().context("a library without a name")?;
                files.insert(format!("host/{}", name.to_string_lossy()), path);
            }
        }
        let scenario =
            Scenario { memory_mib: 256, files, trigger: Trigger::FromOutside, ..bench.scenario() };
        Ok(Stage { bench, directory, disk, told, scenario, mount })
    }

    /// Runs the guest with the file system mounted: `prepare` before the payload is loaded with the handoff
    /// that it left in /handoff, `before` after that. Then everything stops, `at_crash` sees the disk as it
    /// is, the kernel crashes, and `at_end` sees the machine.
    fn crash(
        &self,
        prepare: &str,
        before: &str,
        disks: &[&Disk],
        at_end: impl FnOnce(&mut xtask::qemu::Vm) -> Result<()>,
    ) -> Result<(Crashed, PathBuf)> {
        let mount = self.mount;
        let scenario = Scenario {
            prepare: format!("{PREPARE}try {mount}\n{prepare}\n"),
            initrd: Some("/handoff"),
            before: format!(
                "try dd if=/handoff of=/dev/vdb conv=fsync\n{before}\n\
                 sync\necho 1 > /proc/sys/kernel/sysrq\n"
            ),
            ..self.scenario.clone()
        };
        let disks = [&self.disk, &self.told].into_iter().chain(disks.iter().copied());
        let disks = disks.cloned().collect();
        let mut vm = self.bench.guest().boot(&scenario, disks, &self.directory)?;
        vm.pause()?;
        let image = self.directory.join("at-crash.img");
        process::output(
            Command::new("cp").arg("--sparse=always").arg(&self.disk.image).arg(&image),
        )?;
        vm.resume()?;
        vm.monitor("chardev-send-break serial0")?;
        vm.type_in(b"c")?;
        let end = vm.wait_for_end(DUMP)?;
        at_end(&mut vm)?;
        let console = vm.quit()?;
        Ok((Crashed { console, end }, image))
    }

    /// Runs the guest with the file system mounted; it does `what` and goes.
    fn run(&self, what: &str) -> Result<()> {
        let mount = self.mount;
        let scenario = Scenario {
            prepare: format!(
                "{PREPARE}try {mount}\n{what}\numount /mnt || fail umount\nsync\n\
                 say \"crashing\"\npoweroff -f\n"
            ),
            ..self.scenario.clone()
        };
        let disks = vec![self.disk.clone(), self.told.clone()];
        let mut vm = self.bench.guest().boot(&scenario, disks, &self.directory)?;
        vm.wait_for_end(DUMP)?;
        vm.quit().map(drop)
    }

    /// Where the area is on the disk, by the handoff that the guest told.
    fn extents(&self) -> Result<Vec<Extent>> {
        let told = File::open(&self.told.image)?;
        let read = |at, into: &mut [u8]| told.read_exact_at(into, at).is_ok();
        let handoff = Handoff::open(AREA, &read)?;
        let file = handoff.files().next().context("a handoff without a file")?;
        ensure!(file.area_size == AREA, "{file:?}");
        Ok((0..file.extents).filter_map(|index| handoff.extent(&file, index)).collect())
    }

    /// The area by itself, as one file.
    fn area(&self) -> Result<PathBuf> {
        let (disk, path) = (File::open(&self.disk.image)?, self.directory.join("area.img"));
        copy_extents(&disk, &self.extents()?, &path)?;
        Ok(path)
    }

    /// Fails when a byte of the disk outside of `extents` is not as in `before`.
    fn expect_untouched_but(&self, extents: &[Extent], before: &Path) -> Result<()> {
        let (before, after) = (File::open(before)?, File::open(&self.disk.image)?);
        let mut inside: Vec<_> = extents.iter().map(|it| it.start..it.start + it.size).collect();
        inside.sort_by_key(|range| range.start);
        let end = after.metadata()?.len();
        let starts = [0].into_iter().chain(inside.iter().map(|range| range.end));
        let ends = inside.iter().map(|range| range.start).chain([end]);
        for (start, end) in starts.zip(ends) {
            let mut old = vec![0; MIB as usize];
            each_mib(start..end, |at, new| {
                let old = &mut old[..new.len()];
                before.read_exact_at(old, at)?;
                after.read_exact_at(new, at)?;
                ensure!(old == new, "written to outside of the file, behind {at:#x}");
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Removes all but the logs.
fn clear(directory: &Path) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_file() && path.extension().is_none_or(|extension| extension != "log") {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Makes one file of what is in the extents.
fn copy_extents(disk: &File, extents: &[Extent], path: &Path) -> Result<()> {
    let area = File::create(path)?;
    let mut at = 0;
    for extent in extents {
        each_mib(extent.start..extent.start + extent.size, |place, buffer| {
            disk.read_exact_at(buffer, place)?;
            Ok(area.write_all_at(buffer, at + place - extent.start)?)
        })?;
        at += extent.size;
    }
    Ok(())
}

fn each_mib(range: Range<u64>, mut each: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<()> {
    let mut buffer = vec![0; MIB as usize];
    for at in range.clone().step_by(MIB as usize) {
        let some = (range.end - at).min(MIB) as usize;
        each(at, &mut buffer[..some])?;
    }
    Ok(())
}

/// A disk with one partition, and an ext4 file system in it.
fn ext4(directory: &Path) -> Result<Disk> {
    let disk = sparse_image(&directory.join("disk.img"), 768 * MIB)?;
    let size = 760 * MIB;
    let sector = gpt::disk::LogicalBlockSize::Lb512;
    // Linux looks for a GPT only behind a protective MBR.
    let sectors = u32::try_from(768 * MIB / 512)?;
    gpt::mbr::ProtectiveMBR::with_lb_size(sectors - 1)
        .overwrite_lba0(&mut File::options().write(true).open(&disk.image)?)?;
    let config = gpt::GptConfig::new().writable(true).logical_block_size(sector);
    let mut table = config.create(&disk.image)?;
    table.add_partition("data", size, gpt::partition_types::LINUX_FS, 0, Some(2048))?;
    table.write()?;
    let mut mkfs = Command::new("/sbin/mkfs.ext4");
    mkfs.args(["-q", "-F", "-E", &format!("offset={PARTITION}")]).arg(&disk.image);
    process::output(mkfs.arg(format!("{}k", size >> 10)))?;
    Ok(disk)
}

const MOUNT_EXT4: &str = "mount -t ext4 /dev/vda1 /mnt";

const RESERVE: &str = "try loader reserve /mnt/crash.area --size 300M\n\
                       try loader handoff /mnt/crash.area --output /handoff\n";

fn dump_goes_into(stage: &Stage) -> Result<()> {
    let mut differences = Vec::new();
    // Other files lie around it, and are written until the end.
    let prepare = format!(
        "dd if=/dev/urandom of=/mnt/before bs=1M count=40 2> /dev/null\n{RESERVE}\
         dd if=/dev/urandom of=/mnt/after bs=1M count=40 2> /dev/null\n"
    );
    let (crashed, at_crash) = stage.crash(&prepare, "", &[], |vm| {
        differences = CoreFile::open(&stage.area()?)?.differences_to(vm, &stage.directory)?;
        Ok(())
    })?;
    crashed.expect_payload_line("complete after")?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    ensure!(differences.is_empty(), "{differences:#?}");
    stage.expect_untouched_but(&stage.extents()?, &at_crash)?;
    let frames =
        of_analyzer(&analyzer()?.run(&["bt"], &stage.directory.join("area.img"), None)?)?;
    ensure!(!from_crash(&frames)?.is_empty(), "{frames:#?}");
    Ok(())
}

#[test]
fn file_on_ext4_takes_the_dump_and_gives_it_back() -> Result<()> {
    let stage = Stage::new("ext4", ext4, MOUNT_EXT4)?;
    dump_goes_into(&stage)?;
    let dump = File::open(stage.directory.join("area.img"))?;

    // The next crash before anybody saved it leaves its card there, and no more.
    let again = "try loader handoff /mnt/crash.area --output /handoff\n";
    let (crashed, at_crash) = stage.crash(again, "", &[], |_| Ok(()))?;
    crashed.expect_payload_line("the crash card is beside the unsaved dump")?;
    crashed.expect_payload_line("rebooting after reason 20: ")?;
    stage.expect_untouched_but(&stage.extents()?, &at_crash)?;

    // Saved where it is mounted; then the file is ready for the next crash.
    stage.run(
        "try loader save /mnt/crash.area /mnt/saved\n\
         try loader handoff /mnt/crash.area --output /handoff\n\
         ! rm -f /mnt/crash.area 2> /dev/null || fail \"the file is not immutable\"\n\
         [ -s /mnt/saved/later-card.txt ] || fail \"the later card is not there\"\n\
         try dd if=/mnt/saved/dump.elf of=/dev/vdb bs=1M conv=fsync\n",
    )?;
    let saved = File::open(&stage.told.image)?;
    let mut other = vec![0; MIB as usize];
    // All but the end, where the saved file is shorter than the area.
    each_mib(0..250 * MIB, |at, buffer| {
        dump.read_exact_at(buffer, at)?;
        saved.read_exact_at(&mut other[..buffer.len()], at)?;
        ensure!(other[..buffer.len()] == *buffer, "the saved dump differs behind {at:#x}");
        Ok(())
    })?;
    clear(&stage.directory)
}

#[test]
fn file_on_xfs_takes_the_dump() -> Result<()> {
    let xfs = |directory: &Path| {
        let disk = sparse_image(&directory.join("disk.img"), 768 * MIB)?;
        process::output(Command::new("/sbin/mkfs.xfs").args(["-q", "-f"]).arg(&disk.image))?;
        Ok(disk)
    };
    let mut stage = Stage::new("xfs", xfs, "mount -t xfs /dev/vda /mnt")?;
    let kernel = stage.bench.kernel(&stage.scenario, DebugInfo::No)?;
    let modules = ["lib/libcrc32c.ko", "fs/xfs/xfs.ko"];
    stage.scenario.modules = modules.iter().map(|module| kernel.modules.join(module)).collect();
    dump_goes_into(&stage)?;
    clear(&stage.directory)
}

/// What the handoff says is old: the file is gone, and others have its blocks. Nothing is written there, and
/// the next area gets the dump.
#[test]
fn file_whose_blocks_others_have_by_now_is_left_alone() -> Result<()> {
    let stage = Stage::new("moved", ext4, MOUNT_EXT4)?;
    let second = stage.bench.reserved_disk(&stage.scenario, &stage.directory, "second.img")?;
    let moves = "try chattr -i /mnt/crash.area\ntry rm -f /mnt/crash.area\nsync\n\
                 dd if=/dev/urandom of=/mnt/other bs=1M 2> /dev/null\n";
    let (crashed, at_crash) = stage.crash(RESERVE, moves, &[&second], |_| Ok(()))?;
    let lines = crashed.payload_lines();
    let refused = lines.iter().any(|line| {
        line.contains(", file ")
            && (line.contains("no reservation mark") || line.contains("is not where it was"))
    });
    ensure!(refused, "{lines:#?}");
    stage.expect_untouched_but(&[], &at_crash)?;
    crashed.expect_payload_line("complete after")?;
    let dump = stage.bench.loader.save(&second.image, &stage.directory)?;
    CoreFile::open(&dump)?.check_layout()?;
    clear(&stage.directory)
}

/// On aarch64 the handoff comes by the device tree. No file system: two extents, in the wrong order.
#[test]
fn handoff_is_found_on_aarch64_too() -> Result<()> {
    let bench = bench("aarch64")?;
    let directory = directory("files/aarch64")?;
    let disk = sparse_image(&directory.join("disk.img"), 768 * MIB)?;
    let uuid = *b"0123456789abcdef";
    let extents = [
        Extent { start: 400 * MIB, size: 100 * MIB },
        Extent { start: 100 * MIB + 512, size: AREA - 100 * MIB },
    ];
    let image = File::options().write(true).open(&disk.image)?;
    let mut begin = 0;
    for extent in extents {
        for offset in extent.marks() {
            let (position, at) = (begin + offset, extent.start + offset);
            image.write_all_at(&ExtentMark { uuid, position, at }.to_block(), at)?;
        }
        begin += extent.size;
    }
    let trailer = Trailer { in_file: true, ..Trailer::empty(uuid, AREA) };
    let end = extents[1].start + extents[1].size;
    image.write_all_at(&trailer.to_block(), end - format::BLOCK)?;
    let mut content = handoff::File::new(uuid, 768 * MIB, AREA, 2).to_bytes().to_vec();
    extents.iter().for_each(|extent| content.extend(extent.to_bytes()));
    let blob = directory.join("handoff");
    std::fs::write(&blob, [&handoff::header(1, &content)[..], &content].concat())?;

    let scenario = Scenario {
        memory_mib: 256,
        files: BTreeMap::from([("handoff".to_owned(), blob)]),
        initrd: Some("/handoff"),
        ..bench.scenario()
    };
    let crashed = Crashed::new(bench, &scenario, vec![disk.clone()], &directory, |_| Ok(()))?;
    crashed.expect_payload_line("complete after")?;
    let (disk, area) = (File::open(&disk.image)?, directory.join("area.img"));
    copy_extents(&disk, &extents, &area)?;
    let dump = bench.loader.save(&area, &directory);
    // Every checksum is right; but a copy of the area cannot be made ready for the next crash.
    ensure!(dump.is_err_and(|error| format!("{error:#}").contains("the dump is safe in")));
    let dump = CoreFile::open(&directory.join("dump.elf"))?;
    dump.check_layout()?;
    clear(&directory)
}
