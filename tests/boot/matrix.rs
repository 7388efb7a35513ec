//! Debian kernels, 512 MB, 2 CPUs. On x86_64 both system calls of kexec, four and five levels of page
//! tables, with and without KASLR. On aarch64 the machines of targets/aarch64.toml, which together
//! with the kernel meet in every pair. One boot each, and everything that must be true of its dump.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::core_file::CoreFile;
use tests::crash::{Dumped, analyzer, bench, once};
use tests::trace::{self, Frame, from_crash, listing as shown};
use tests::{listing, peers};
use xtask::guest::Scenario;
use xtask::target::Syscall::{FileLoad, Load};

macro_rules! matrix {
    ($($name:ident: $arch:ident { $($field:ident: $value:expr),* };)*) => {
        /// All of them.
        fn all_dumped() -> Result<Vec<&'static Dumped>> {
            [$($name::dumped),*].into_iter().map(|dumped| dumped()).collect()
        }

        $(mod $name {
            use super::*;

            pub fn dumped() -> Result<&'static Dumped> {
                static DUMPED: OnceLock<Result<Dumped, String>> = OnceLock::new();
                once(&DUMPED, || {
                    let bench = bench(stringify!($arch))?;
                    let scenario = Scenario { $($field: $value.into(),)* ..bench.scenario() };
                    Dumped::new(bench, concat!("matrix/", stringify!($name)), scenario)
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
            fn gdb_reads_it() -> Result<()> {
                let dumped = dumped()?;
                peers::gdb(&dumped.bench.fixtures, &dumped.dump)
            }

            #[test]
            fn stacks_of_all_sleeping_tasks_are_those_that_drgn_sees() -> Result<()> {
                super::stacks_of_all_sleeping_tasks_are_those_that_drgn_sees(dumped()?)
            }

            #[test]
            fn tasks_and_modules_are_those_that_drgn_sees() -> Result<()> {
                super::tasks_and_modules_are_those_that_drgn_sees(dumped()?)
            }
        })*
    };
}

matrix! {
    load_with_four_levels: x86_64 { syscall: Load, machine: "four-level" };
    load_with_four_levels_and_no_kaslr: x86_64 { syscall: Load, machine: "four-level", kaslr: false };
    load_with_five_levels: x86_64 { syscall: Load };
    load_with_five_levels_and_no_kaslr: x86_64 { syscall: Load, kaslr: false };
    file_load_with_four_levels: x86_64 { syscall: FileLoad, machine: "four-level" };
    file_load_with_four_levels_and_no_kaslr: x86_64 {
        syscall: FileLoad, machine: "four-level", kaslr: false
    };
    file_load_with_five_levels: x86_64 { syscall: FileLoad };
    file_load_with_five_levels_and_no_kaslr: x86_64 { syscall: FileLoad, kaslr: false };

    arm64_6_1_a72_el1_gic2_mmio1: aarch64 { kernel: "6_1", machine: "a72-el1-gic2-mmio1" };
    arm64_6_1_max_el1_gic3_mmio2: aarch64 { kernel: "6_1", machine: "max-el1-gic3-mmio2" };
    arm64_6_1_a72_el2_gic3_pci_uefi: aarch64 { kernel: "6_1", machine: "a72-el2-gic3-pci-uefi" };
    arm64_6_1_max_pac_el2_gic2_pci: aarch64 { kernel: "6_1", machine: "max-pac-el2-gic2-pci" };
    arm64_6_12_a72_el2_gic2_mmio2: aarch64 { kernel: "6_12", machine: "a72-el2-gic2-mmio2" };
    arm64_6_12_max_el2_gic3_mmio1: aarch64 { kernel: "6_12", machine: "max-el2-gic3-mmio1" };
    arm64_6_12_max_el1_gic2_pci_uefi: aarch64 { kernel: "6_12", machine: "max-el1-gic2-pci-uefi" };
    arm64_6_12_max_pac_el1_gic3_pci: aarch64 {
        kernel: "6_12", machine: "max-pac-el1-gic3-pci", kaslr: false
    };
}

/// Readers that know no architecture but the one that they were built for.
macro_rules! readers_of_their_own_architecture {
    ($($name:ident),* $(,)?) => {
        mod readers_of_their_own_architecture {
            $(mod $name {
                use super::super::*;

                #[test]
                fn makedumpfile_filters_and_compresses_it() -> Result<()> {
                    let dumped = $name::dumped()?;
                    peers::makedumpfile(&dumped.bench.fixtures, &dumped.dump)
                }

                #[test]
                fn crash_9_shows_the_backtrace_that_the_kernel_printed() -> Result<()> {
                    let dumped = $name::dumped()?;
                    super::super::crash_9_shows_the_backtrace_that_the_kernel_printed(dumped)
                }
            })*
        }
    };
}

readers_of_their_own_architecture! {
    load_with_four_levels,
    load_with_four_levels_and_no_kaslr,
    load_with_five_levels,
    load_with_five_levels_and_no_kaslr,
    file_load_with_four_levels,
    file_load_with_four_levels_and_no_kaslr,
    file_load_with_five_levels,
    file_load_with_five_levels_and_no_kaslr,
}

/// Conventional kdump fails on this kernel with these kexec-tools: without CONFIG_KALLSYMS_ALL they
/// do not find `_text`, and describe the kernel's image with a header whose end lies beyond the
/// address space.
#[test]
fn kexec_tools_of_debian_6_1_writes_a_garbage_kernel_text_header_and_our_dump_is_right()
-> Result<()> {
    let dumped = arm64_6_1_a72_el1_gic2_mmio1::dumped()?;
    let dropped = dumped.crashed.expect_payload_line("dropped (address 0xffffffffffffffff")?;
    ensure!(dropped.starts_with("program header "), "{dropped}");
    dumped.crashed.expect_payload_line("kernel image mapping taken from VMCOREINFO")?;
    dump_is_complete_and_the_machine_reboots_by_itself(dumped)?;
    every_byte_is_what_qemu_reads(dumped)?;
    // kexec-tools does not know the direct map either; this kernel has 48 bits of addresses.
    dumped.crashed.expect_payload_line("virtual addresses of memory corrected")?;
    let core = CoreFile::open(&dumped.dump)?;
    let offset = core.vmcoreinfo("NUMBER(PHYS_OFFSET)")?;
    let offset = u64::from_str_radix(offset.trim_start_matches("0x"), 16)?;
    let direct = |phys: u64| phys.wrapping_sub(offset) | 0xffff_0000_0000_0000;
    let (memory, image): (Vec<_>, Vec<_>) =
        core.loads().partition(|load| load.p_vaddr == direct(load.p_paddr));
    ensure!(!memory.is_empty() && image.len() == 1, "memory {memory:x?}, others {image:x?}");
    // The image's mapping is the right one: drgn reads the kernel's data through it.
    let log = peers::kernel_log(&dumped.bench.fixtures, &dumped.dump, dumped.vmlinux()?)?;
    ensure!(log.contains("Kernel panic - not syncing"), "no panic in the log:\n{log}");
    Ok(())
}

fn dump_is_complete_and_the_machine_reboots_by_itself(dumped: &Dumped) -> Result<()> {
    let crashed = &dumped.crashed;
    ensure!(crashed.end == "guest-reset", "no reboot but {}", crashed.end);
    let pages = crashed.expect_payload_line("pages read")?;
    // The one that kexec-tools makes of Debian 6.1 for arm64; see the test about it.
    let garbage = dumped.bench.target.arch == "aarch64" && dumped.scenario.kernel == "6_1";
    let headers = u32::from(garbage);
    ensure!(pages.contains(&format!(" 0 unreadable, {headers} headers dropped")), "{pages}");
    let figures = crashed.expect_payload_line("first block after")?;
    for figure in [" ms, complete after ", " MB/s, ", " KiB of memory used"] {
        ensure!(figures.contains(figure), "no {figure:?} in {figures:?}");
    }

    let core = CoreFile::open(&dumped.dump)?;
    core.check_layout()?;
    ensure!(core.count_notes("CORE") == 2, "{} CPUs have notes", core.count_notes("CORE"));
    ensure!(core.count_notes("VMCOREINFO") == 1, "no VMCOREINFO");
    ensure!(core.count_notes("TINYKDUMP") == 2, "no crash card or no vendor note");
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
    let ours = backtrace(dumped, false)?;
    let (ours, printed) = (from_crash(&ours)?, printed_by_kernel(dumped)?);
    let agree = trace::agree(ours, &printed, dumped.vmlinux()?)?;
    let (ours, printed) = (shown(ours), shown(&printed));
    ensure!(agree, "the backtrace is\n{ours:#?}\nthe kernel printed\n{printed:#?}");
    Ok(())
}

/// What the kernel said on its console, from the function that called `panic` on.
fn printed_by_kernel(dumped: &Dumped) -> Result<Vec<Frame>> {
    let log = peers::kernel_log(&dumped.bench.fixtures, &dumped.dump, dumped.vmlinux()?)?;
    Ok(from_crash(&trace::of_kernel(&log)?)?.to_vec())
}

fn backtrace_without_vmlinux_has_the_same_functions_and_offsets(dumped: &Dumped) -> Result<()> {
    let with = backtrace(dumped, true)?;
    let without = backtrace(dumped, false)?;
    ensure!(!without.iter().any(|frame| frame.inlined), "inlined frames without vmlinux");
    same(&shown(&without), &shown(&with), "with vmlinux it is")
}

fn backtrace_is_the_one_that_drgn_sees(dumped: &Dumped) -> Result<()> {
    let ours = backtrace(dumped, true)?;
    let theirs = peers::drgn(&dumped.bench.fixtures, &dumped.dump, dumped.vmlinux()?)?;
    let agree = ours.len() == theirs.len()
        && ours.iter().zip(&theirs).all(|(ours, theirs)| same_function(ours, theirs));
    ensure!(agree, "host-analyzer:\n{ours:#x?}\ndrgn:\n{theirs:#x?}");
    Ok(())
}

/// Function by function and address by address, and no vmlinux for ours.
fn stacks_of_all_sleeping_tasks_are_those_that_drgn_sees(dumped: &Dumped) -> Result<()> {
    let text = analyzer()?.run(&["bt", "--all-tasks"], &dumped.dump, None)?;
    let ours = trace::of_analyzer_by_task(&text)?;
    let theirs = peers::drgn_sleeping(&dumped.bench.fixtures, &dumped.dump, dumped.vmlinux()?)?;
    ensure!(theirs.len() > 20, "drgn sees only {} sleeping tasks", theirs.len());
    for (task, theirs) in theirs {
        let ours = ours.get(&task).with_context(|| format!("no task at {task:#x} in\n{text}"))?;
        let theirs: Vec<Frame> = theirs.into_iter().filter(|frame| !frame.inlined).collect();
        let agree = ours.len() == theirs.len()
            && ours.iter().zip(&theirs).all(|(ours, theirs)| same_function(ours, theirs));
        ensure!(agree, "task {task:#x}, host-analyzer:\n{ours:#x?}\ndrgn:\n{theirs:#x?}");
    }
    Ok(())
}

/// With and without vmlinux.
fn tasks_and_modules_are_those_that_drgn_sees(dumped: &Dumped) -> Result<()> {
    let (fixtures, dump, vmlinux) = (&dumped.bench.fixtures, &dumped.dump, dumped.vmlinux()?);
    let mut theirs = peers::drgn_tasks(fixtures, dump, vmlinux)?;
    theirs.sort();
    ensure!(theirs.len() > 20, "drgn sees only {} tasks", theirs.len());
    let modules = peers::drgn_modules(fixtures, dump, vmlinux)?;
    for vmlinux in [None, Some(vmlinux)] {
        let mut ours = listing::tasks(&analyzer()?.run(&["ps"], dump, vmlinux)?)?;
        ours.sort();
        ensure!(ours == theirs, "host-analyzer:\n{ours:#?}\ndrgn:\n{theirs:#?}");
        let ours = listing::modules(&analyzer()?.run(&["mod"], dump, vmlinux)?)?;
        ensure!(ours == modules, "host-analyzer:\n{ours:#x?}\ndrgn:\n{modules:#x?}");
    }
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
    let printed = printed_by_kernel(dumped)?;
    let printed: Vec<String> = printed.into_iter().map(|frame| frame.function).collect();
    let crash = peers::crash(&dumped.bench.fixtures, &dumped.dump, dumped.vmlinux()?)?;
    let from = crash.iter().position(|function| *function == printed[0]).unwrap_or(0);
    same(&crash[from..], &printed, "the kernel printed")
}

fn backtrace(dumped: &Dumped, with_vmlinux: bool) -> Result<Vec<Frame>> {
    let vmlinux = with_vmlinux.then(|| dumped.vmlinux()).transpose()?;
    trace::of_analyzer(&analyzer()?.run(&["bt"], &dumped.dump, vmlinux)?)
}

fn same(ours: &[String], theirs: &[String], who: &str) -> Result<()> {
    ensure!(ours == theirs, "the backtrace is\n{ours:#?}\n{who}\n{theirs:#?}");
    Ok(())
}
