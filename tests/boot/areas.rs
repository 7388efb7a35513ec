//! Where the payload writes, and above all where it does not.

use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use format::area::Layout;
use tests::core_file::CoreFile;
use tests::crash::{Crashed, analyzer, bench, directory, refused};
use tests::trace::of_analyzer;
use xtask::dump::area_size;
use xtask::guest::Scenario;
use xtask::qemu::{Disk, sparse_image};

/// A uuid that `loader reserve`, which makes random ones, never chose.
const FOREIGN: &str = "00000000-0000-0000-0000-0000000000ff";

/// A disk large enough for a dump, with something on it that somebody may want to keep.
fn disk_with_data(directory: &Path, name: &str) -> Result<Disk> {
    let disk = sparse_image(&directory.join(name), area_size(&Scenario::default()))?;
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

#[test]
fn disk_without_a_mark_is_left_alone() -> Result<()> {
    let directory = directory("areas/no-mark")?;
    let disk = disk_with_data(&directory, "disk.img")?;
    scribble(&disk.image, area_size(&Scenario::default()) - (1 << 20))?;
    let crashed = refused("areas/no-mark", &Scenario::default(), vec![disk])?;
    crashed.expect_payload_line("no reservation mark")?;
    Ok(())
}

#[test]
fn area_with_another_uuid_than_the_one_asked_for_is_left_alone() -> Result<()> {
    let directory = directory("areas/foreign-mark")?;
    let scenario = Scenario {
        append: format!("console=ttyS0,115200n8 capture.to=disk:uuid={FOREIGN}"),
        ..Scenario::default()
    };
    let disk = bench()?.reserved_disk(&scenario, &directory, "disk.img")?;
    scribble(&disk.image, 0)?;
    let crashed = refused("areas/foreign-mark", &scenario, vec![disk])?;
    crashed.expect_payload_line("another area than capture.to asks for")?;
    Ok(())
}

#[test]
fn area_that_is_too_small_is_left_alone() -> Result<()> {
    let directory = directory("areas/too-small")?;
    let disk = sparse_image(&directory.join("disk.img"), 64 << 20)?;
    bench()?.loader.reserve(&disk.image)?;
    scribble(&disk.image, 1 << 20)?;
    let crashed = refused("areas/too-small", &Scenario::default(), vec![disk])?;
    crashed.expect_payload_line("too small")?;
    Ok(())
}

#[test]
fn area_that_somebody_has_used_for_something_else_is_left_alone() -> Result<()> {
    let directory = directory("areas/reused")?;
    let scenario = Scenario::default();
    let disk = bench()?.reserved_disk(&scenario, &directory, "disk.img")?;
    scribble(&disk.image, 0)?;
    let crashed = refused("areas/reused", &scenario, vec![disk])?;
    crashed.expect_payload_line("used for something else since it was reserved")?;
    Ok(())
}

#[test]
fn area_whose_trailer_has_a_flipped_bit_is_left_alone() -> Result<()> {
    let directory = directory("areas/flipped-bit")?;
    let scenario = Scenario::default();
    let disk = bench()?.reserved_disk(&scenario, &directory, "disk.img")?;
    let layout = Layout::new(area_size(&scenario)).context("not a size for an area")?;
    let file = std::fs::File::options().read(true).write(true).open(&disk.image)?;
    let mut byte = [0];
    // In the uuid: a field whose every value is possible, so only the checksum can tell.
    file.read_exact_at(&mut byte, layout.trailer + 30)?;
    file.write_all_at(&[byte[0] ^ 0x10], layout.trailer + 30)?;
    scribble(&disk.image, 0)?;
    let crashed = refused("areas/flipped-bit", &scenario, vec![disk])?;
    crashed.expect_payload_line("checksum")?;
    Ok(())
}

#[test]
fn dump_that_nobody_has_saved_yet_is_not_overwritten() -> Result<()> {
    let directory = directory("areas/unsaved")?;
    let scenario = Scenario::default();
    let disk = bench()?.reserved_disk(&scenario, &directory, "disk.img")?;
    dumps_completely(&scenario, vec![disk.clone()], &directory)?;
    let crashed = refused("areas/unsaved", &scenario, vec![disk])?;
    crashed.expect_payload_line("unsaved dump")?;
    Ok(())
}

#[test]
fn option_that_is_not_understood_means_that_nothing_is_written() -> Result<()> {
    let directory = directory("areas/option")?;
    let scenario = Scenario {
        append: "console=ttyS0,115200n8 capture.to=disk:uuid=nonsense".to_owned(),
        ..Scenario::default()
    };
    let disk = bench()?.reserved_disk(&scenario, &directory, "disk.img")?;
    let crashed = refused("areas/option", &scenario, vec![disk])?;
    crashed.expect_payload_line("capture.to=disk:uuid=nonsense")?;
    Ok(())
}

#[test]
fn machine_without_a_disk_reboots_with_a_message() -> Result<()> {
    let crashed = refused("areas/no-disk", &Scenario::default(), Vec::new())?;
    crashed.expect_payload_line("no disk that this payload can drive")?;
    Ok(())
}

#[test]
fn second_disk_is_taken_when_only_it_has_a_mark() -> Result<()> {
    let directory = directory("areas/second-disk")?;
    let scenario = Scenario::default();
    let first = disk_with_data(&directory, "first.img")?;
    let second = bench()?.reserved_disk(&scenario, &directory, "second.img")?;
    let before = std::fs::read(&first.image)?;
    let disks = vec![first.clone(), second.clone()];
    dumps_completely(&scenario, disks, &directory)?;
    ensure!(before == std::fs::read(&first.image)?, "the first disk was written to");
    bench()?.loader.save(&second.image, &directory)?;
    Ok(())
}

#[test]
fn backtrace_comes_straight_from_the_area_too() -> Result<()> {
    let directory = directory("areas/direct")?;
    let scenario = Scenario::default();
    let disk = bench()?.reserved_disk(&scenario, &directory, "disk.img")?;
    dumps_completely(&scenario, vec![disk.clone()], &directory)?;
    let from_area = of_analyzer(&analyzer()?.run("bt", &disk.image, None)?)?;
    let dump = bench()?.loader.save(&disk.image, &directory)?;
    let from_dump = of_analyzer(&analyzer()?.run("bt", &dump, None)?)?;
    ensure!(from_area == from_dump, "{from_area:#x?}\n{from_dump:#x?}");
    Ok(())
}

#[test]
fn area_in_a_gpt_partition_is_found_and_its_neighbour_left_alone() -> Result<()> {
    let directory = directory("areas/gpt")?;
    let scenario = Scenario::default();
    let size = area_size(&scenario);
    let disk = sparse_image(&directory.join("disk.img"), size + (64 << 20))?;
    let [neighbour, partition] = partition(&disk.image, [32 << 20, size])?;

    // `loader reserve` takes a partition's device; here it is a file that is copied into its place.
    let image = std::fs::File::options().read(true).write(true).open(&disk.image)?;
    let area = bench()?.reserved_disk(&scenario, &directory, "area.img")?;
    let layout = Layout::new(size).context("not a size for an area")?;
    let mut trailer = vec![0; format::BLOCK as usize];
    std::fs::File::open(&area.image)?.read_exact_at(&mut trailer, layout.trailer)?;
    image.write_all_at(&trailer, partition + layout.trailer)?;

    scribble(&disk.image, neighbour)?;
    let mut before = vec![0; usize::try_from(partition)?];
    image.read_exact_at(&mut before, 0)?;
    let crashed = dumps_completely(&scenario, vec![disk.clone()], &directory)?;
    crashed.expect_payload_line("partition 1: no reservation mark")?;
    let mut after = vec![0; usize::try_from(partition)?];
    image.read_exact_at(&mut after, 0)?;
    ensure!(before == after, "the table or the other partition was written to");

    let dump = bench()?.loader.save(&disk.image, &directory)?;
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

fn dumps_completely(scenario: &Scenario, disks: Vec<Disk>, directory: &Path) -> Result<Crashed> {
    let crashed = Crashed::new(bench()?, scenario, disks, directory, |_| Ok(()))?;
    crashed.expect_payload_line("complete after")?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    Ok(crashed)
}
