//! Where the payload writes, and above all where it does not.

use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use format::area::Layout;
use tests::core_file::CoreFile;
use tests::crash::{Crashed, analyzer, bench, directory, refused};
use tests::stories;
use tests::trace::of_analyzer;
use xtask::dump::{Workbench, area_size};
use xtask::guest::Scenario;
use xtask::qemu::{Disk, sparse_image};

stories! {
    x86_64:
        disk_without_a_mark_is_left_alone,
        area_with_another_uuid_than_the_one_asked_for_is_left_alone,
        area_that_is_too_small_gets_the_crash_card_alone,
        area_that_somebody_has_used_for_something_else_is_left_alone,
        area_whose_trailer_has_a_flipped_bit_is_left_alone,
        dump_that_nobody_has_saved_yet_is_not_overwritten,
        option_that_is_not_understood_means_that_nothing_is_written,
        machine_without_a_disk_reboots_with_a_message,
        second_disk_is_taken_when_only_it_has_a_mark,
        backtrace_comes_straight_from_the_area_too,
        area_in_a_gpt_partition_is_found_and_its_neighbour_left_alone,
        area_in_a_logical_mbr_partition_is_found_and_its_neighbour_left_alone;
    aarch64:
        machine_without_a_disk_reboots_with_a_message,
        dump_that_nobody_has_saved_yet_is_not_overwritten;
}

/// A uuid that `loader reserve`, which makes random ones, never chose.
const FOREIGN: &str = "00000000-0000-0000-0000-0000000000ff";

/// A disk large enough for a dump, with something on it that somebody may want to keep.
fn disk_with_data(bench: &Workbench, directory: &Path, name: &str) -> Result<Disk> {
    let disk = sparse_image(&directory.join(name), area_size(&bench.scenario()))?;
    scribble(&disk.image, 0)?;
    Ok(disk)
}

/// Writes a MiB that is no file system, no partition table and no mark at `offset`.
fn scribble(image: &Path, offset: u64) -> Result<()> {
    let text: Vec<u8> = b"somebody's data ".iter().copied().cycle().take(1 << 20).collect();
    let file = std::fs::File::options().write(true).open(image)?;
    file.write_all_at(&text, offset)?;
    Ok(())
}

fn disk_without_a_mark_is_left_alone(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("areas/{arch}-no-mark"))?;
    let disk = disk_with_data(bench, &directory, "disk.img")?;
    scribble(&disk.image, area_size(&bench.scenario()) - (1 << 20))?;
    let crashed = refused(bench, &format!("areas/{arch}-no-mark"), &bench.scenario(), vec![disk])?;
    crashed.expect_payload_line("no reservation mark")?;
    Ok(())
}

fn area_with_another_uuid_than_the_one_asked_for_is_left_alone(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("areas/{arch}-foreign-mark"))?;
    let scenario = bench.scenario().appending(&format!("capture.to=disk:uuid={FOREIGN}"));
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    scribble(&disk.image, 0)?;
    let crashed = refused(bench, &format!("areas/{arch}-foreign-mark"), &scenario, vec![disk])?;
    crashed.expect_payload_line("another area than capture.to asks for")?;
    Ok(())
}

fn area_that_is_too_small_gets_the_crash_card_alone(arch: &'static str) -> Result<()> {
    /// What an area has for card and trailer.
    const TAIL: usize = 64 << 10;
    let bench = bench(arch)?;
    let directory = directory(&format!("areas/{arch}-too-small"))?;
    let disk = sparse_image(&directory.join("disk.img"), 64 << 20)?;
    bench.loader.reserve(&disk.image)?;
    scribble(&disk.image, 1 << 20)?;
    let before = std::fs::read(&disk.image)?;
    let disks = vec![disk.clone()];
    let crashed = Crashed::new(bench, &bench.scenario(), disks, &directory, |_| Ok(()))?;
    crashed.expect_payload_line("too small")?;
    crashed.expect_payload_line("NO COMPLETE DUMP")?;
    let after = std::fs::read(&disk.image)?;
    let core = ..before.len() - TAIL;
    ensure!(before[core] == after[core], "more than the card was written");
    let card = analyzer()?.run(&["card"], &disk.image, None)?;
    ensure!(card.contains("Kernel panic - not syncing: sysrq triggered crash"), "{card}");
    let shown = bench.loader.show(&disk.image)?;
    ensure!(shown.contains("the dump does not fit into the area"), "{shown}");
    ensure!(shown.contains("the area must be larger"), "{shown}");
    Ok(())
}

fn area_that_somebody_has_used_for_something_else_is_left_alone(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("areas/{arch}-reused"))?;
    let scenario = bench.scenario();
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    scribble(&disk.image, 0)?;
    let crashed = refused(bench, &format!("areas/{arch}-reused"), &scenario, vec![disk])?;
    crashed.expect_payload_line("used for something else since it was reserved")?;
    Ok(())
}

fn area_whose_trailer_has_a_flipped_bit_is_left_alone(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("areas/{arch}-flipped-bit"))?;
    let scenario = bench.scenario();
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let layout = Layout::new(area_size(&scenario)).context("not a size for an area")?;
    let file = std::fs::File::options().read(true).write(true).open(&disk.image)?;
    let mut byte = [0];
    // In the uuid: a field whose every value is possible, so only the checksum can tell.
    file.read_exact_at(&mut byte, layout.trailer + 30)?;
    file.write_all_at(&[byte[0] ^ 0x10], layout.trailer + 30)?;
    scribble(&disk.image, 0)?;
    let crashed = refused(bench, &format!("areas/{arch}-flipped-bit"), &scenario, vec![disk])?;
    crashed.expect_payload_line("checksum")?;
    Ok(())
}

fn dump_that_nobody_has_saved_yet_is_not_overwritten(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("areas/{arch}-unsaved"))?;
    let scenario = bench.scenario();
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    dumps_completely(bench, &scenario, vec![disk.clone()], &directory)?;
    let layout = Layout::new(area_size(&scenario)).context("not a size for an area")?;
    let core = || -> Result<Vec<u8>> {
        let mut bytes = std::fs::read(&disk.image)?;
        bytes.truncate(usize::try_from(layout.card)?);
        Ok(bytes)
    };
    let before = core()?;
    let card = || analyzer()?.run(&["card"], &disk.image, None);
    let first = card()?;

    // Of the second crash there is the card; of the dump nothing changes.
    let second = directory.join("second");
    let crashed = Crashed::new(bench, &scenario, vec![disk.clone()], &second, |_| Ok(()))?;
    crashed.expect_payload_line("unsaved dump")?;
    crashed.expect_payload_line("after reason 20: ")?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    ensure!(before == core()?, "the dump was written to");
    let second = card()?;
    ensure!(first != second && second.contains("sysrq triggered crash"), "{second}");
    let shown = bench.loader.show(&disk.image)?;
    ensure!(shown.contains("since then    1 crash,"), "{shown}");

    // The third one may overwrite both.
    let later = scenario.appending("capture.holdoff=0");
    dumps_completely(bench, &later, vec![disk.clone()], &directory)?;
    ensure!(before != core()?, "nothing was written");
    bench.loader.save(&disk.image, &directory)?;
    Ok(())
}

fn option_that_is_not_understood_means_that_nothing_is_written(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("areas/{arch}-option"))?;
    let scenario = bench.scenario().appending("capture.to=disk:uuid=nonsense");
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let crashed = refused(bench, &format!("areas/{arch}-option"), &scenario, vec![disk])?;
    crashed.expect_payload_line("capture.to=disk:uuid=nonsense")?;
    Ok(())
}

fn machine_without_a_disk_reboots_with_a_message(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let crashed = refused(bench, &format!("areas/{arch}-no-disk"), &bench.scenario(), Vec::new())?;
    crashed.expect_payload_line("no disk that this payload can drive")?;
    Ok(())
}

fn second_disk_is_taken_when_only_it_has_a_mark(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("areas/{arch}-second-disk"))?;
    let scenario = bench.scenario();
    let first = disk_with_data(bench, &directory, "first.img")?;
    let second = bench.reserved_disk(&scenario, &directory, "second.img")?;
    let before = std::fs::read(&first.image)?;
    let disks = vec![first.clone(), second.clone()];
    dumps_completely(bench, &scenario, disks, &directory)?;
    ensure!(before == std::fs::read(&first.image)?, "the first disk was written to");
    bench.loader.save(&second.image, &directory)?;
    Ok(())
}

fn backtrace_comes_straight_from_the_area_too(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("areas/{arch}-direct"))?;
    let scenario = bench.scenario();
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    dumps_completely(bench, &scenario, vec![disk.clone()], &directory)?;
    let from_area = of_analyzer(&analyzer()?.run(&["bt"], &disk.image, None)?)?;
    let dump = bench.loader.save(&disk.image, &directory)?;
    let from_dump = of_analyzer(&analyzer()?.run(&["bt"], &dump, None)?)?;
    ensure!(from_area == from_dump, "{from_area:#x?}\n{from_dump:#x?}");
    Ok(())
}

fn area_in_a_gpt_partition_is_found_and_its_neighbour_left_alone(arch: &'static str) -> Result<()> {
    area_in_a_partition_is_found(arch, "gpt", partition)
}

fn area_in_a_logical_mbr_partition_is_found_and_its_neighbour_left_alone(
    arch: &'static str,
) -> Result<()> {
    area_in_a_partition_is_found(arch, "mbr", partition_by_mbr)
}

/// Where two partitions of these sizes begin, once the image has them.
type Partition = fn(&Path, [u64; 2]) -> Result<[u64; 2]>;

fn area_in_a_partition_is_found(
    arch: &'static str,
    kind: &str,
    partition: Partition,
) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("areas/{arch}-{kind}"))?;
    let scenario = bench.scenario();
    let size = area_size(&scenario);
    let disk = sparse_image(&directory.join("disk.img"), size + (64 << 20))?;
    let [neighbour, partition] = partition(&disk.image, [32 << 20, size])?;

    // `loader reserve` takes a partition's device; here it is a file that is copied into its place.
    let image = std::fs::File::options().read(true).write(true).open(&disk.image)?;
    let area = bench.reserved_disk(&scenario, &directory, "area.img")?;
    let layout = Layout::new(size).context("not a size for an area")?;
    let mut trailer = vec![0; format::BLOCK as usize];
    std::fs::File::open(&area.image)?.read_exact_at(&mut trailer, layout.trailer)?;
    image.write_all_at(&trailer, partition + layout.trailer)?;

    scribble(&disk.image, neighbour)?;
    let mut before = vec![0; usize::try_from(partition)?];
    image.read_exact_at(&mut before, 0)?;
    let crashed = dumps_completely(bench, &scenario, vec![disk.clone()], &directory)?;
    crashed.expect_payload_line("partition 1: no reservation mark")?;
    let mut after = vec![0; usize::try_from(partition)?];
    image.read_exact_at(&mut after, 0)?;
    ensure!(before == after, "the table or the other partition was written to");

    let dump = bench.loader.save(&disk.image, &directory)?;
    CoreFile::open(&dump)?.check_layout()
}

/// Writes a GPT with two partitions of `sizes` bytes into `image` and returns where they begin.
fn partition(image: &Path, sizes: [u64; 2]) -> Result<[u64; 2]> {
    let sector = gpt::disk::LogicalBlockSize::Lb512;
    let mut disk = gpt::GptConfig::new().writable(true).logical_block_size(sector).create(image)?;
    for (name, size) in ["neighbour", "capture"].into_iter().zip(sizes) {
        disk.add_partition(name, size, gpt::partition_types::LINUX_FS, 0, Some(2048))?;
    }
    let starts: Vec<u64> = disk.partitions().values().map(|it| it.first_lba * 512).collect();
    disk.write()?;
    starts.try_into().ok().context("not two partitions")
}

/// The same with an MBR: a primary partition, and a logical one behind it.
fn partition_by_mbr(image: &Path, sizes: [u64; 2]) -> Result<[u64; 2]> {
    const ALIGNMENT: u64 = 1 << 20;
    let sectors = |bytes: u64| u32::try_from(bytes / 512);
    let entry = |kind: u32, first: u64, size: u64| {
        // What CHS addresses say is of no matter.
        Ok::<_, std::num::TryFromIntError>(
            [0, kind, sectors(first)?, sectors(size)?].map(u32::to_le_bytes).concat(),
        )
    };
    let extended = ALIGNMENT + sizes[0];
    let primary =
        [entry(0x83, ALIGNMENT, sizes[0])?, entry(0x0f, extended, ALIGNMENT + sizes[1])?].concat();
    let logical = entry(0x83, ALIGNMENT, sizes[1])?;
    let image = std::fs::File::options().write(true).open(image)?;
    for (table, entries) in [(0, primary), (extended, logical)] {
        image.write_all_at(&entries, table + 446)?;
        image.write_all_at(&[0x55, 0xaa], table + 510)?;
    }
    Ok([ALIGNMENT, extended + ALIGNMENT])
}

fn dumps_completely(
    bench: &Workbench,
    scenario: &Scenario,
    disks: Vec<Disk>,
    directory: &Path,
) -> Result<Crashed> {
    let crashed = Crashed::new(bench, scenario, disks, directory, |_| Ok(()))?;
    crashed.expect_payload_line("complete after")?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    Ok(crashed)
}
