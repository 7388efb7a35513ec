//! Devices that nobody shut down: a network card into whose buffers frames come, and a disk with
//! requests under way.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::core_file::CoreFile;
use tests::crash::{Crashed, bench, directory};
use tests::frames::{Frames, numbers_in};
use tests::stories;
use xtask::dump::{DUMP, Workbench};
use xtask::fixtures::DebugInfo;
use xtask::guest::Scenario;
use xtask::qemu::{Disk, Machine, Vm, sparse_image};

stories! {
    x86_64:
        virtio_devices_on_pci_write_nothing_while_memory_is_dumped,
        card_of_a_pc_writes_nothing_while_memory_is_dumped;
    aarch64:
        virtio_devices_on_pci_write_nothing_while_memory_is_dumped,
        devices_behind_virtio_mmio_write_nothing_while_memory_is_dumped;
}

/// A network card, and its driver with what that needs besides virtio.
struct Card {
    device: &'static str,
    modules: &'static [&'static str],
}

const VIRTIO: &[&str] =
    &["net/core/failover", "drivers/net/net_failover", "drivers/net/virtio_net"];

fn virtio_devices_on_pci_write_nothing_while_memory_is_dumped(arch: &'static str) -> Result<()> {
    let card = Card { device: "virtio-net-pci", modules: VIRTIO };
    nothing_is_written(arch, "pci", &card, bench(arch)?.scenario())
}

fn card_of_a_pc_writes_nothing_while_memory_is_dumped(arch: &'static str) -> Result<()> {
    let modules = &["drivers/net/ethernet/intel/e1000e/e1000e"];
    let kernel = "6_1-plain".to_owned();
    let scenario = Scenario { kernel, ..bench(arch)?.scenario() };
    nothing_is_written(arch, "e1000e", &Card { device: "e1000e", modules }, scenario)
}

fn devices_behind_virtio_mmio_write_nothing_while_memory_is_dumped(
    arch: &'static str,
) -> Result<()> {
    let card = Card { device: "virtio-net-device", modules: VIRTIO };
    let machine = "max-el1-gic3-mmio2".to_owned();
    nothing_is_written(arch, "mmio", &card, Scenario { machine, ..bench(arch)?.scenario() })
}

/// Time from frame to frame. The card has some 256 buffers: enough for more than the dump takes.
const INTERVAL: Duration = Duration::from_millis(10);

/// Size of the disk that is at work, and how many requests it finishes per second: what the kernel
/// wants of it keeps it busy for many seconds.
const BUSY: u64 = 256 << 20;
const SLOWLY: &str = "cache=unsafe,throttling.iops-total=30";

/// Readers of that disk, each with requests straight into its own memory.
const READERS: u64 = 4;

/// Frames come and requests of the second disk are under way from before the crash until the machine is
/// given up. What there is of them in memory came before the payload looked for its disk, and the dump is
/// what QEMU reads.
fn nothing_is_written(
    arch: &'static str,
    name: &str,
    card: &Card,
    scenario: Scenario,
) -> Result<()> {
    let bench = bench(arch)?;
    let scenario = busy(bench, card, scenario)?;
    let directory = directory(&format!("traffic/{arch}-{name}"))?;
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let frames = Frames::every(INTERVAL)?;
    let disks = vec![disk.clone(), busy_disk(directory.join("busy.img"))?];
    let guest = bench.guest();
    let mut vm = guest.with_machine(&scenario, disks, &directory, |machine| {
        let arguments = frames.with_card(card.device);
        Machine { arguments, ..machine.clone() }.start(&directory)
    })?;
    guest.wait_for_crash(&mut vm)?;
    let finished_before = finished_requests(&mut vm)?;
    vm.expect(&["tinykdump: writing"], DUMP)?;
    let finished_when_writing = finished_requests(&mut vm)?;
    let end = vm.wait_for_end(DUMP)?;
    let ended = Instant::now();
    let finished = finished_requests(&mut vm)?;
    let differences = CoreFile::open(&disk.image)?.differences_to(&mut vm, &directory)?;
    let crashed = Crashed { console: vm.quit()?, end };
    crashed.expect_payload_line("complete after")?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);

    // The last frame came when the kernel was dead, and before the payload looked for a disk.
    let sent = |text: &str| {
        let line = crashed.console.iter().find(|line| line.text.contains(text));
        Ok::<_, anyhow::Error>(frames.next_at(line.with_context(|| format!("no {text:?}"))?.at))
    };
    let (dead, quiet) = (sent("Kernel panic")?, sent("tinykdump: disk ")?);
    let numbers = numbers_in(&disk.image)?;
    let last = *numbers.last().context("no frame in the dump")?;
    let all = frames.next_at(ended);
    ensure!(dead <= last, "no frame came after the panic: {last} is the last, {dead} came then");
    ensure!(last < quiet, "frames came till {last}, {quiet} should have been too late");
    ensure!(quiet + 10 < all, "no frames were sent while memory was dumped");
    ensure!(finished_before < finished_when_writing, "no requests of the disk were under way");
    ensure!(
        finished_when_writing == finished,
        "requests of the dead kernel were finished while memory was dumped"
    );
    ensure!(differences.is_empty(), "{differences:#?}");
    std::fs::remove_file(&disk.image)?;
    Ok(())
}

/// `scenario` with network and second disk in use when it crashes.
fn busy(bench: &Workbench, card: &Card, scenario: Scenario) -> Result<Scenario> {
    let kernel = bench.kernel(&scenario, DebugInfo::No)?;
    let module = |name| kernel.modules.join(format!("{name}.ko"));
    let modules = card.modules.iter().map(module).collect();
    // Which of the two disks is which depends on the machine: it is known by its size in sectors.
    let before = format!(
        "ip link set eth0 up || fail \"no network\"\n\
         disk=$(grep -lx {} /sys/block/vd?/size | cut -d / -f 4)\n\
         dd if=/dev/zero of=/dev/$disk bs=1M &\n\
         for reader in $(seq 0 {}); do\n\
         dd if=/dev/$disk of=/dev/null bs=1M skip=$((reader * {})) iflag=direct &\n\
         done\n\
         sleep 2",
        BUSY / 512,
        READERS - 1,
        (BUSY >> 20) / READERS
    );
    Ok(Scenario { modules, before, ..scenario })
}

/// No two of its sectors are the same.
fn busy_disk(image: PathBuf) -> Result<Disk> {
    let disk = sparse_image(&image, BUSY)?;
    let numbers: Vec<u8> = (0..BUSY / 8).flat_map(u64::to_le_bytes).collect();
    std::fs::write(&disk.image, numbers)?;
    Ok(Disk { options: SLOWLY, ..disk })
}

/// How many requests of the second disk were finished.
fn finished_requests(vm: &mut Vm) -> Result<u64> {
    // disk1: rd_bytes=45093376 wr_bytes=26189824 rd_operations=45 wr_operations=32 ...
    let statistics = vm.monitor("info blockstats")?;
    let line = statistics.lines().find_map(|line| line.strip_prefix("disk1: "));
    let words = line.context("QEMU does not know the disk")?.split_whitespace();
    let counts = words.filter_map(|word| word.split_once("_operations=")?.1.parse::<u64>().ok());
    Ok(counts.sum())
}
