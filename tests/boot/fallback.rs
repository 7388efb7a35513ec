//! When a target fails, the next one gets the dump; and what there is of it on the first one can be used.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use format::BLOCK;
use format::area::{Reason, State, Trailer};
use tests::core_file::CoreFile;
use tests::crash::{Crashed, analyzer, bench, directory, receive_saved};
use tests::nbd;
use tests::stories;
use tests::trace::{from_crash, of_analyzer};
use xtask::dump::{DUMP, Workbench};
use xtask::guest::Scenario;
use xtask::qemu::Disk;

stories! {
    x86_64:
        disk_that_stops_answering_is_left_for_the_next_one,
        disk_that_refuses_a_write_is_left_for_the_next_one,
        disk_that_falls_silent_at_the_last_block_is_left_for_the_next_one,
        dump_goes_over_the_line_where_there_is_no_disk,
        dump_that_runs_out_of_time_is_there_as_far_as_it_came;
    aarch64:
        disk_that_stops_answering_is_left_for_the_next_one,
        disk_that_falls_silent_at_the_last_block_is_left_for_the_next_one,
        dump_goes_over_the_line_where_there_is_no_disk,
        dump_that_runs_out_of_time_is_there_as_far_as_it_came;
}

/// Two disks with an area each, of which the first is asked for first.
fn two_disks(bench: &Workbench, directory: &Path) -> Result<(Scenario, [Disk; 2])> {
    let scenario = bench.scenario();
    let first = bench.reserved_disk(&scenario, directory, "first.img")?;
    let second = bench.reserved_disk(&scenario, directory, "second.img")?;
    let uuid: String = trailer(&first)?.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    let scenario = scenario.appending(&format!("capture.to=disk:uuid={uuid},disk"));
    Ok((scenario, [first, second]))
}

fn trailer(disk: &Disk) -> Result<Trailer> {
    let bytes = std::fs::read(&disk.image)?;
    let block = bytes.len().checked_sub(BLOCK as usize).context("no disk")?;
    Trailer::parse(&bytes[block..]).map_err(|error| anyhow::anyhow!("{error}"))
}

/// Boots, and slows the first disk down to `rate` bytes per second as soon as the dump begins.
fn with_slow_disk(
    bench: &Workbench,
    scenario: &Scenario,
    disks: &[Disk],
    directory: &Path,
    rate: u64,
) -> Result<Crashed> {
    let mut vm = bench.guest().boot(scenario, disks.to_vec(), directory)?;
    vm.expect(&["tinykdump: writing"], DUMP)?;
    vm.throttle("disk0", rate)?;
    let end = vm.wait_for_end(DUMP)?;
    Ok(Crashed { console: vm.quit()?, end })
}

/// The second disk has all of it, and the first one's area says why it has not.
fn second_has_the_dump(
    bench: &Workbench,
    crashed: &Crashed,
    [first, second]: &[Disk; 2],
    directory: &Path,
    reason: Reason,
) -> Result<()> {
    crashed.expect_payload_line("this target has no dump")?;
    crashed.expect_payload_line("complete after")?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    crashed.expect_payload_line(reason.text())?;
    let dump = bench.loader.save(&second.image, directory)?;
    let ours = of_analyzer(&analyzer()?.run(&["bt"], &dump, None)?)?;
    ensure!(!from_crash(&ours)?.is_empty(), "{ours:#x?}");
    let state = trailer(first)?;
    ensure!(matches!(state.state, State::Writing | State::Incomplete), "{state:?}");
    let card = analyzer()?.run(&["card"], &first.image, None)?;
    ensure!(card.contains("sysrq triggered crash"), "{card}");
    Ok(())
}

fn disk_that_stops_answering_is_left_for_the_next_one(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("fallback/{arch}-silent"))?;
    let (scenario, disks) = two_disks(bench, &directory)?;
    // A request of a MiB takes twelve days.
    let crashed = with_slow_disk(bench, &scenario, &disks, &directory, 1)?;
    second_has_the_dump(bench, &crashed, &disks, &directory, Reason::DiskTimeout)
}

fn disk_that_refuses_a_write_is_left_for_the_next_one(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("fallback/{arch}-refuses"))?;
    let (scenario, mut disks) = two_disks(bench, &directory)?;
    let faults = directory.join("faults");
    std::fs::write(
        &faults,
        "[inject-error]\nevent = \"none\"\nerrno = \"5\"\nsector = \"204800\"\n",
    )?;
    disks[0].faults = Some(faults);
    let crashed = Crashed::new(bench, &scenario, disks.to_vec(), &directory, |_| Ok(()))?;
    second_has_the_dump(bench, &crashed, &disks, &directory, Reason::DiskError)?;
    let state = trailer(&disks[0])?;
    ensure!((state.state, state.reason) == (State::Incomplete, Reason::DiskError), "{state:?}");
    Ok(())
}

/// All of the dump is there, and what would say so is never written: the trailer's `complete`.
fn disk_that_falls_silent_at_the_last_block_is_left_for_the_next_one(
    arch: &'static str,
) -> Result<()> {
    /// Longer than the payload waits. A device that QEMU resets must first be rid of its requests.
    const PATIENCE: Duration = Duration::from_secs(40);
    let bench = bench(arch)?;
    let directory = directory(&format!("fallback/{arch}-last-block"))?;
    let (scenario, mut disks) = two_disks(bench, &directory)?;
    let last = std::fs::metadata(&disks[0].image)?.len() - BLOCK;
    let answers = move |offset: u64, bytes: &[u8]| {
        let written = last.checked_sub(offset).and_then(|skip| bytes.get(skip as usize..));
        let block = written.and_then(|bytes| bytes.get(..BLOCK as usize));
        let trailer = block.and_then(|block| Trailer::parse(block).ok());
        trailer.is_none_or(|trailer| trailer.state != State::Complete)
    };
    disks[0].server = Some(nbd::serve(&disks[0].image, Box::new(answers), PATIENCE)?);
    let crashed = Crashed::new(bench, &scenario, disks.to_vec(), &directory, |_| Ok(()))?;
    second_has_the_dump(bench, &crashed, &disks, &directory, Reason::DiskTimeout)?;
    ensure!(trailer(&disks[0])?.state == State::Writing, "{:?}", trailer(&disks[0])?);
    // Marked as not finished, and readable to the end.
    let text = analyzer()?.run(&["bt"], &disks[0].image, None)?;
    ensure!(text.starts_with("INCOMPLETE DUMP"), "{text}");
    ensure!(!from_crash(&of_analyzer(&text)?)?.is_empty(), "{text}");
    Ok(())
}

fn dump_goes_over_the_line_where_there_is_no_disk(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("fallback/{arch}-line"))?;
    let scenario = bench.scenario().appending("capture.to=disk,serial capture.serial=minimal");
    let crashed = Crashed::new(bench, &scenario, Vec::new(), &directory, |_| Ok(()))?;
    crashed.expect_payload_line("this target has no dump: no disk")?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    let dump = directory.join("dump.elf");
    receive_saved(&directory.join("serial.log"), &dump)?;
    let log = analyzer()?.run(&["log"], &dump, None)?;
    ensure!(log.contains("sysrq triggered crash"), "{log}");
    Ok(())
}

fn dump_that_runs_out_of_time_is_there_as_far_as_it_came(arch: &'static str) -> Result<()> {
    let bench = bench(arch)?;
    let directory = directory(&format!("fallback/{arch}-time"))?;
    let scenario = bench.scenario().appending("capture.timeout=4");
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let disks = [disk.clone()];
    let crashed = with_slow_disk(bench, &scenario, &disks, &directory, 32 << 20)?;
    crashed.expect_payload_line("NO COMPLETE DUMP: the time that capture.timeout= gives")?;
    crashed.expect_payload_line("rebooting after reason 5: ")?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    let state = trailer(&disk)?;
    ensure!((state.state, state.reason) == (State::Incomplete, Reason::OutOfTime), "{state:?}");
    ensure!(state.written > 16 << 20, "{state:?}");

    let dump = bench.loader.save_incomplete(&disk.image, &directory)?;
    ensure!(std::fs::metadata(&dump)?.len() == state.written, "not what is there");
    // Whether the stacks are in that part is chance: where there are none, it says so.
    let said = analyzer()?.run(&["sys"], &dump, Some(&bench.vmlinux(&scenario)?))?;
    ensure!(said.contains("INCOMPLETE DUMP") && said.contains("are cut off"), "{said}");
    let core = CoreFile::open(&dump)?;
    ensure!(core.loads().map(|load| load.p_filesz).sum::<u64>() > state.written, "all of it?");
    Ok(())
}
