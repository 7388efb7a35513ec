//! How fast the payload of one guest writes a dump, and how fast the guest's own Linux writes as much of its
//! memory to the same virtual disk.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::dump::{DUMP, Workbench, area_size};
use crate::guest::Scenario;
use crate::qemu::{Disk, Line, sparse_image};

/// Guests. Each measures both, Linux first, so that a busy machine hurts both.
pub(super) const RUNS: usize = 3;

/// What the guest does before it crashes. /dev/mem is no way to RAM, because Debian's kernels have
/// CONFIG_STRICT_DEVMEM: a file in memory is. It is written behind the area's first MiB and far
/// before its last, which hold what the payload looks at.
const WRITE: &str = "\
mkdir /ram
mount -t tmpfs -o size=90% ram /ram
dd if=/dev/urandom of=/ram/file bs=1M count=SIZE 2> /dev/null || fail \"no file in memory\"
for tenth in $(seq 100); do [ -b DISK ] || sleep 0.1; done
say \"dd begins\"
for at in PLACES; do
    dd if=/ram/file of=DISK bs=1M seek=$at oflag=direct conv=fsync 2> /dev/null || fail \"dd\"
done
say \"dd ended\"";

/// TCG does string instructions byte by byte, unlike the processors that Linux takes it for: without
/// them it copies a file more than twice as fast.
const NO_BYTE_STRINGS: &str = "clearcpuid=erms,fsrm";

/// What the payload says before it writes.
const DUMP_BEGINS: &str = "tinykdump: writing ";

/// What Linux writes.
pub(super) struct LinuxWrites {
    /// The size of a file in memory, in MiB.
    pub file_mib: u32,
    /// How often that is written, each time behind the time before.
    pub times: u32,
    /// Where to.
    pub disk: &'static str,
}

impl LinuxWrites {
    fn mib(&self) -> u32 {
        self.file_mib * self.times
    }

    fn script(&self) -> String {
        let places = (0..self.times).map(|index| (1 + index * self.file_mib).to_string());
        WRITE
            .replace("SIZE", &self.file_mib.to_string())
            .replace("PLACES", &places.collect::<Vec<_>>().join(" "))
            .replace("DISK", self.disk)
    }
}

/// Megabytes (10^6 bytes) a second.
#[derive(Clone, Copy)]
pub(super) struct Rates {
    pub linux: f64,
    pub payload: f64,
}

/// Says what the rates are of.
pub(super) fn explain(linux_mib: u32, payload_mib: u32) {
    println!(
        "Linux: dd of {linux_mib} MiB from a tmpfs file to the raw disk, bs=1M oflag=direct conv=fsync \
         (it reads\n  the memory once, then the disk takes it by DMA; /dev/mem of RAM is refused by \
         STRICT_DEVMEM)"
    );
    println!(
        "payload: all {payload_mib} MiB, checksums included, to the same disk; QEMU's cache mode is \
         unsafe,\n  the image allocated beforehand: the host's disk takes no part"
    );
}

/// The rates of one guest.
///
/// # Errors
/// When it does not do what it should.
pub(super) fn measure(
    bench: &Workbench,
    scenario: &Scenario,
    linux: &LinuxWrites,
    directory: &Path,
) -> Result<Rates> {
    std::fs::create_dir_all(directory)?;
    let mut scenario = Scenario { before: linux.script(), ..scenario.clone() };
    if bench.target.arch == "x86_64" {
        scenario.kernel_options = NO_BYTE_STRINGS.to_owned();
    }
    let disk = allocated_disk(bench, &scenario, directory)?;
    let mut vm = bench.guest().boot(&scenario, vec![disk.clone()], directory)?;
    let end = vm.wait_for_end(DUMP)?;
    let console = vm.quit()?;
    std::fs::remove_file(&disk.image)?;
    ensure!(
        end == "guest-reset",
        "the machine did not reboot ({end}); see {}",
        directory.display()
    );
    let rate = |mib: u32, begins, ends| -> Result<f64> {
        let took: Duration = at(&console, ends)?.1 - at(&console, begins)?.1;
        Ok(f64::from(mib) * f64::from(1 << 20) / took.as_secs_f64() / 1e6)
    };
    // tinykdump: writing 1023 MiB in 4 ranges to area ...
    let (said, _) = at(&console, DUMP_BEGINS)?;
    let dump_mib = said.split(' ').next().unwrap_or_default().parse()?;
    Ok(Rates {
        linux: rate(linux.mib(), "guest: dd begins", "guest: dd ended")?,
        payload: rate(dump_mib, DUMP_BEGINS, " pages read, ")?,
    })
}

/// What follows `text` on the console, and when it came. By the host's clock: guests measure theirs while
/// the host is busy, and are wrong by as much as three times.
fn at<'a>(console: &'a [Line], text: &str) -> Result<(&'a str, Instant)> {
    let mut found =
        console.iter().filter_map(|line| Some((line.text.split_once(text)?.1, line.at)));
    found.next().with_context(|| format!("no {text:?} on the console"))
}

/// A reserved disk without holes, whose flushes do not wait for the host.
fn allocated_disk(bench: &Workbench, scenario: &Scenario, directory: &Path) -> Result<Disk> {
    let size = area_size(scenario);
    let disk = sparse_image(&directory.join("disk.img"), size)?;
    let mut image = File::options().write(true).open(&disk.image)?;
    for _ in 0..size >> 20 {
        image.write_all(&[0; 1 << 20])?;
    }
    bench.loader.reserve(&disk.image)?;
    Ok(Disk { options: "cache=unsafe", ..disk })
}
