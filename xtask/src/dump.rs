//! From a scenario to a dump on the host: what demo, benches and tests have in common.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::fixtures::{DebugInfo, Fixtures, Kernel, Unpacked};
use crate::guest::{self, Guest, Scenario};
use crate::programs::Loader;
use crate::qemu::{Disk, sparse_image};
use crate::target::Target;

/// How long the payload may take from the crash until it has given the machine up. Its own
/// deadlines are shorter, so what is waited for here is its own report of what went wrong.
pub const DUMP: Duration = Duration::from_secs(300);

/// Everything that does not change from guest to guest.
pub struct Workbench {
    /// The architecture.
    pub target: Target,
    /// Where kernel, tools and readers come from.
    pub fixtures: Fixtures,
    /// What is in the guest beside it.
    pub tools: Unpacked,
    /// `capture.bin`.
    pub payload: PathBuf,
    /// Reserves areas and saves dumps.
    pub loader: Loader,
}

impl Workbench {
    /// Fetches and builds all of it for the architecture `arch`.
    ///
    /// # Errors
    /// When something cannot be fetched or does not build.
    pub fn new(arch: &str) -> Result<Workbench> {
        let target = Target::load(arch)?;
        let fixtures = Fixtures::open()?;
        let tools = guest::tools(&fixtures, &target)?;
        let payload = crate::image::build(&target)?;
        let loader = Loader::build()?;
        Ok(Workbench { target, fixtures, tools, payload, loader })
    }

    /// The architecture's usual scenario.
    #[must_use]
    pub fn scenario(&self) -> Scenario {
        Scenario::usual(&self.target)
    }

    /// The kernel that `scenario` crashes.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn kernel(&self, scenario: &Scenario, debug_info: DebugInfo) -> Result<Kernel> {
        guest::kernel(&self.fixtures, &self.target, scenario, debug_info)
    }

    /// The vmlinux of the kernel that `scenario` crashes.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn vmlinux(&self, scenario: &Scenario) -> Result<PathBuf> {
        self.kernel(scenario, DebugInfo::Yes)?.vmlinux.context("no vmlinux was fetched")
    }

    /// What guests are made of.
    #[must_use]
    pub fn guest(&self) -> Guest<'_> {
        Guest {
            target: &self.target,
            fixtures: &self.fixtures,
            tools: &self.tools,
            payload: &self.payload,
        }
    }

    /// A disk `name` in `directory` that holds one reserved area, large enough for a dump of
    /// `scenario`'s memory.
    ///
    /// # Errors
    /// When it cannot be made or `loader reserve` refuses it.
    pub fn reserved_disk(&self, scenario: &Scenario, directory: &Path, name: &str) -> Result<Disk> {
        std::fs::create_dir_all(directory)?;
        let disk = sparse_image(&directory.join(name), area_size(scenario))?;
        self.loader.reserve(&disk.image).context("cannot reserve the area")?;
        Ok(disk)
    }

    /// Boots, crashes and saves in one go; logs and `dump.elf` are left in `directory`, whatever was
    /// there before is removed.
    ///
    /// # Errors
    /// When the guest does not crash, does not reboot by itself, or leaves no dump.
    pub fn dump(&self, scenario: &Scenario, directory: &Path) -> Result<PathBuf> {
        if directory.exists() {
            std::fs::remove_dir_all(directory)?;
        }
        let disk = self.reserved_disk(scenario, directory, "disk.img")?;
        let mut vm = self.guest().boot(scenario, vec![disk.clone()], directory)?;
        let reason = vm.wait_for_end(DUMP)?;
        vm.quit()?;
        if reason != "guest-reset" {
            bail!("the machine did not reboot ({reason}); see {}", directory.display());
        }
        let dump = self.loader.save(&disk.image, directory)?;
        std::fs::remove_file(&disk.image)?;
        Ok(dump)
    }
}

/// An area that holds all of the memory, the kernel image a second time, and what lies around it.
#[must_use]
pub fn area_size(scenario: &Scenario) -> u64 {
    (u64::from(scenario.memory_mib) + 128) << 20
}
