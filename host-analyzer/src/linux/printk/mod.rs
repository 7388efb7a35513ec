//! The log: a ring of records. VMCOREINFO carries its layout, so that no types are needed.

mod buffer;
mod ring;

use crate::Error;
use crate::kernel::Kernel;
use crate::kernel::virt::VirtualMemory;
use crate::kernel::vmcoreinfo::Vmcoreinfo;

/// One record of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Its number since boot.
    pub sequence: u64,
    /// Nanoseconds since boot.
    pub time: u64,
    /// Its level: 0 emergency to 7 debug.
    pub level: u8,
    /// Its text; may have several lines.
    pub text: String,
    /// Who wrote it: a thread's number, or with [`Record::ON_CPU`] a CPU's, outside of threads. Not all
    /// kernels note it.
    pub caller: Option<u32>,
    /// The device that it is about: what says of which kind it is, and which. Kernels before 5.10 have other
    /// such pairs, too.
    pub about: Vec<(String, String)>,
}

impl Record {
    /// The bit that tells a CPU from a thread (printk_caller_id, kernel/printk/printk.c, 6.1).
    pub const ON_CPU: u32 = 1 << 31;
}

/// The log, and what could not be read of it.
#[derive(Debug, Default)]
pub struct Log {
    /// The records, oldest first.
    pub records: Vec<Record>,
    /// Records whose descriptor or text made no sense.
    pub damaged: usize,
    /// Records that are not in the dump, or only in part. Some of them may have been empty.
    pub missing: usize,
    /// Bytes of text that these are known to have had.
    pub missing_bytes: u64,
}

impl Log {
    /// Reads the log of a kernel.
    ///
    /// # Errors
    /// [`Error::VmcoreinfoKey`], [`Error::Read`].
    pub fn read(kernel: &Kernel<'_>) -> Result<Log, Error> {
        Log::from_memory(kernel.vmcoreinfo(), kernel.memory())
    }

    /// Reads the log that `info` describes out of `memory`.
    ///
    /// # Errors
    /// See [`Log::read`].
    pub fn from_memory(info: &Vmcoreinfo<'_>, memory: &VirtualMemory<'_>) -> Result<Log, Error> {
        // The one or the other is there.
        match info.symbol("prb") {
            None if info.symbol("log_first_idx").is_some() => buffer::read(info, memory),
            _ => ring::read(info, memory),
        }
    }

    /// Whether every record could be read.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.damaged == 0 && self.missing == 0
    }

    /// The line in which the kernel said why it died, if it did.
    #[must_use]
    pub fn panic_line(&self) -> Option<String> {
        const SIGNS: [&str; 6] = [
            "Kernel panic - not syncing",
            "BUG: unable to handle",
            "kernel BUG at",
            "general protection fault",
            "Oops: ",
            "Unable to handle kernel",
        ];
        SIGNS.iter().find_map(|sign| {
            let mut newest = self.records.iter().rev().flat_map(|record| record.text.lines());
            // The line that ends the report repeats the reason behind a mark of its own.
            let wanted = |line: &&str| line.contains(sign) && !line.starts_with("---[");
            newest.find(wanted).map(str::to_owned)
        })
    }

    /// The CPU that the newest report of a crash is about: `CPU: 1 PID: 42 Comm: insmod ...`
    /// (dump_stack_print_info, lib/dump_stack.c, 6.1).
    #[must_use]
    pub fn reporting_cpu(&self) -> Option<u32> {
        let mut newest = self.records.iter().rev().flat_map(|record| record.text.lines());
        newest.find_map(|line| {
            let (cpu, who) = line.strip_prefix("CPU: ")?.split_once(' ')?;
            let cpu = cpu.parse().ok()?;
            (who.trim_start().starts_with("PID: ") && who.contains(" Comm: ")).then_some(cpu)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_of_the_panic_is_found() {
        let record = |text: &str| Record { text: text.to_owned(), ..Record::default() };
        let oops = record("BUG: unable to handle page fault for address: 0");
        let panic = record("Kernel panic - not syncing: Fatal exception");
        let end = record("---[ end Kernel panic - not syncing: Fatal exception ]---");
        let log = Log { records: vec![oops.clone(), panic.clone(), end], ..Log::default() };
        assert_eq!(log.panic_line(), Some(panic.text));
        let log = Log { records: vec![record("hello"), oops.clone()], ..Log::default() };
        assert_eq!(log.panic_line(), Some(oops.text));
    }

    #[test]
    fn cpu_of_the_newest_report_is_found() {
        let record = |text: &str| Record { text: text.to_owned(), ..Record::default() };
        let older = record("CPU: 0 PID: 7 Comm: kworker Not tainted 6.1.0 #1");
        let newer = record("CPU: 1 PID: 1 Comm: init Kdump: loaded Tainted: G 6.1.0 #1");
        let other = record("CPU: x PID: 1 Comm: y");
        let records = vec![older, newer, other, record("CPU: 3")];
        let log = Log { records, ..Log::default() };
        assert_eq!(log.reporting_cpu(), Some(1));
        assert_eq!(Log::default().reporting_cpu(), None);
    }
}
