//! Debian 6.1, 512 MB, 2 CPUs: both system calls of kexec, four and five levels of page tables,
//! with and without KASLR. One boot each, and everything that must be true of its dump.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::core_file::CoreFile;
use tests::crash::{Dumped, analyzer, bench, once, vmlinux};
use tests::peers;
use tests::trace::{self, Frame, from_crash, listing};
use xtask::guest::{PageTables, Scenario, Syscall};

macro_rules! matrix {
    ($($name:ident: $syscall:ident, $page_tables:ident, kaslr $kaslr:literal;)*) => {
        /// All of them.
        fn all_dumped() -> Result<Vec<&'static Dumped>> {
            [$($name::dumped),*].into_iter().map(|dumped| dumped()).collect()
        }

        $(mod $name {
            use super::*;

            pub fn dumped() -> Result<&'static Dumped> {
                static DUMPED: OnceLock<Result<Dumped, String>> = OnceLock::new();
                once(&DUMPED, || {
                    let scenario = Scenario {
                        syscall: Syscall::$syscall,
                        page_tables: PageTables::$page_tables,
                        kaslr: $kaslr,
                        ..Scenario::default()
                    };
                    Dumped::new(concat!("matrix/", stringify!($name)), &scenario)
                })
            }

            #[test]
            fn dump_is_complete_and_the_machine_reboots_by_itself() -> Result<()> {
                super::dump_is_complete_and_the_machine_reboots_by_itself(dumped()?)
            }

            #[test]
            fn every_byte_is_what_qemu_reads() -> Result<()> {
                super::every_byte_is_what_qemu_reads(dumped()?)
            }

            #[test]
            fn backtrace_is_the_one_that_the_kernel_printed() -> Result<()> {
                super::backtrace_is_the_one_that_the_kernel_printed(dumped()?)
            }

            #[test]
            fn backtrace_is_the_one_that_drgn_sees() -> Result<()> {
                super::backtrace_is_the_one_that_drgn_sees(dumped()?)
            }

            #[test]
            fn backtrace_without_vmlinux_has_the_same_functions_and_offsets() -> Result<()> {
                super::backtrace_without_vmlinux_has_the_same_functions_and_offsets(dumped()?)
            }

            #[test]
            fn makedumpfile_filters_and_compresses_it() -> Result<()> {
                peers::makedumpfile(&bench()?.fixtures, &dumped()?.dump)
            }

            #[test]
            fn gdb_reads_it() -> Result<()> {
                peers::gdb(&bench()?.fixtures, &dumped()?.dump)
            }

            #[test]
            fn crash_9_shows_the_backtrace_that_the_kernel_printed() -> Result<()> {
                super::crash_9_shows_the_backtrace_that_the_kernel_printed(dumped()?)
            }
        })*
    };
}

matrix! {
    load_with_four_levels: Load, FourLevel, kaslr true;
    load_with_four_levels_and_no_kaslr: Load, FourLevel, kaslr false;
    load_with_five_levels: Load, FiveLevel, kaslr true;
    load_with_five_levels_and_no_kaslr: Load, FiveLevel, kaslr false;
    file_load_with_four_levels: FileLoad, FourLevel, kaslr true;
    file_load_with_four_levels_and_no_kaslr: FileLoad, FourLevel, kaslr false;
    file_load_with_five_levels: FileLoad, FiveLevel, kaslr true;
    file_load_with_five_levels_and_no_kaslr: FileLoad, FiveLevel, kaslr false;
}

fn dump_is_complete_and_the_machine_reboots_by_itself(dumped: &Dumped) -> Result<()> {
    let crashed = &dumped.crashed;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    let pages = crashed.expect_payload_line("pages read")?;
    ensure!(pages.contains(" 0 unreadable, 0 headers dropped"), "{pages}");
    let figures = crashed.expect_payload_line("first block after")?;
    for figure in [" ms, complete after ", " MB/s, ", " KiB of memory used"] {
        ensure!(figures.contains(figure), "no {figure:?} in {figures:?}");
    }

    let core = CoreFile::open(&dumped.dump)?;
    core.check_layout()?;
    ensure!(core.count_notes("CORE") == 2, "{} CPUs have notes", core.count_notes("CORE"));
    ensure!(core.count_notes("VMCOREINFO") == 1, "no VMCOREINFO");
    ensure!(core.count_notes("TINYKDUMP") == 1, "no vendor note");
    Ok(())
}

fn every_byte_is_what_qemu_reads(dumped: &Dumped) -> Result<()> {
    ensure!(dumped.differences.is_empty(), "{:#?}", dumped.differences);
    let bytes: u64 = CoreFile::open(&dumped.dump)?.loads().map(|load| load.p_filesz).sum();
    ensure!(bytes > 480 << 20, "only {bytes} of 512 MiB are in the dump");
    Ok(())
}

/// The payload says how long it took and what it used. How fast that is, is not for a test to say:
/// the figures are printed, to be read with `cargo test -- --nocapture`.
#[test]
fn payload_says_how_long_it_took_and_how_much_memory_it_used() -> Result<()> {
    for dumped in all_dumped()? {
        let line = dumped.crashed.expect_payload_line("first block after")?;
        println!("{line}; {:?} from the panic to the first block", first_block(dumped)?);
        for unit in [" ms, complete after ", " MB/s, ", " KiB of memory used"] {
            ensure!(line.contains(unit), "no {unit:?} in {line:?}");
        }
    }
    Ok(())
}

/// Time from the panic to the first block of the dump.
fn first_block(dumped: &Dumped) -> Result<Duration> {
    let line = dumped.crashed.expect_payload_line("first block after")?;
    let milliseconds = line.split_whitespace().nth(3).context("no time")?.parse()?;
    let to_payload = dumped.crashed.since_panic("the kernel has died").context("no panic")?;
    Ok(to_payload + Duration::from_millis(milliseconds))
}

fn backtrace_is_the_one_that_the_kernel_printed(dumped: &Dumped) -> Result<()> {
    let printed = trace::of_kernel(&peers::kernel_log(&bench()?.fixtures, &dumped.dump)?)?;
    let ours = backtrace(dumped, true)?;
    same(&listing(from_crash(&ours)?), &listing(from_crash(&printed)?), "the kernel printed")
}

fn backtrace_without_vmlinux_has_the_same_functions_and_offsets(dumped: &Dumped) -> Result<()> {
    let with = backtrace(dumped, true)?;
    let without = backtrace(dumped, false)?;
    ensure!(!without.iter().any(|frame| frame.inlined), "inlined frames without vmlinux");
    same(&listing(&without), &listing(&with), "with vmlinux it is")
}

fn backtrace_is_the_one_that_drgn_sees(dumped: &Dumped) -> Result<()> {
    let ours = backtrace(dumped, true)?;
    let theirs = peers::drgn(&bench()?.fixtures, &dumped.dump, vmlinux()?)?;
    let agree = ours.len() == theirs.len()
        && ours.iter().zip(&theirs).all(|(ours, theirs)| same_function(ours, theirs));
    ensure!(agree, "host-analyzer:\n{ours:#x?}\ndrgn:\n{theirs:#x?}");
    Ok(())
}

/// Whether a frame of ours and one of drgn's are the same function. drgn names a compiler's split
/// part (`__handle_sysrq.cold`) after its source, and assembly after the enclosing symbol
/// (`entry_SYSCALL_64` for `entry_SYSCALL_64_after_hwframe`).
fn same_function(ours: &Frame, theirs: &Frame) -> bool {
    let tail = ours.function.strip_prefix(&theirs.function);
    ours.inlined == theirs.inlined
        && tail.is_some_and(|tail| tail.is_empty() || tail.starts_with(['.', '_']))
        && ours.address == theirs.address
}

fn crash_9_shows_the_backtrace_that_the_kernel_printed(dumped: &Dumped) -> Result<()> {
    let printed = trace::of_kernel(&peers::kernel_log(&bench()?.fixtures, &dumped.dump)?)?;
    let printed: Vec<String> =
        from_crash(&printed)?.iter().map(|frame| frame.function.clone()).collect();
    let crash = peers::crash(&bench()?.fixtures, &dumped.dump, vmlinux()?)?;
    let from = crash.iter().position(|function| *function == printed[0]).unwrap_or(0);
    same(&crash[from..], &printed, "the kernel printed")
}

fn backtrace(dumped: &Dumped, with_vmlinux: bool) -> Result<Vec<Frame>> {
    let vmlinux = if with_vmlinux { Some(vmlinux()?) } else { None };
    trace::of_analyzer(&analyzer()?.run("bt", &dumped.dump, vmlinux)?)
}

fn same(ours: &[String], theirs: &[String], who: &str) -> Result<()> {
    ensure!(ours == theirs, "the backtrace is\n{ours:#?}\n{who}\n{theirs:#?}");
    Ok(())
}
