//! Guests that crash, and what they leave behind.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use xtask::dump::{DUMP, Workbench};
use xtask::fixtures::DebugInfo;
use xtask::guest::Scenario;
use xtask::programs::{Analyzer, Profile};
use xtask::qemu::{Disk, Line, Vm};
use xtask::workspace;

use crate::core_file::CoreFile;

/// Tools, payload and loader for the architecture `arch`, made by whichever test comes first.
///
/// # Errors
/// When something cannot be fetched or does not build: the same for every test that asks.
pub fn bench(arch: &'static str) -> Result<&'static Workbench> {
    type Benches = BTreeMap<&'static str, Result<&'static Workbench, String>>;
    static BENCHES: Mutex<Benches> = Mutex::new(BTreeMap::new());
    let mut benches = BENCHES.lock().unwrap_or_else(PoisonError::into_inner);
    let bench = benches.entry(arch).or_insert_with(|| match Workbench::new(arch) {
        Ok(bench) => Ok(Box::leak(Box::new(bench))),
        Err(error) => Err(format!("{error:?}")),
    });
    bench.clone().map_err(|error| anyhow!("{error}"))
}

/// Makes each story, a function that takes the architecture's name, a test on every architecture
/// that it is listed for.
#[macro_export]
macro_rules! stories {
    ($($arch:ident: $($story:ident),* $(,)?;)*) => {
        $(mod $arch {
            $(#[test]
            fn $story() -> anyhow::Result<()> {
                super::$story(stringify!($arch))
            })*
        })*
    };
}

/// The analyzer under test, built by whichever test comes first.
///
/// # Errors
/// When it does not build: the same for every test that asks.
pub fn analyzer() -> Result<&'static Analyzer> {
    static ANALYZER: OnceLock<Result<Analyzer, String>> = OnceLock::new();
    once(&ANALYZER, || Analyzer::build(Profile::Dev))
}

/// `host-analyzer receive LINE -o DUMP` of a line that was saved.
///
/// # Errors
/// When there is no whole dump in it; the message holds what it said.
pub fn receive_saved(line: &Path, dump: &Path) -> Result<()> {
    let output = analyzer()?.command(&["receive"], line, None).arg("-o").arg(dump).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The value in `cell`, made by the first who asks; a failure is everybody's.
///
/// # Errors
/// That of `make`.
pub fn once<T>(
    cell: &'static OnceLock<Result<T, String>>,
    make: impl FnOnce() -> Result<T>,
) -> Result<&'static T> {
    cell.get_or_init(|| make().map_err(|error| format!("{error:?}")))
        .as_ref()
        .map_err(|error| anyhow!("{error}"))
}

/// An empty directory for the test `name`, in which it leaves its logs.
///
/// # Errors
/// When it cannot be made.
pub fn directory(name: &str) -> Result<PathBuf> {
    let directory = workspace().join("target/boot-tests").join(name);
    if directory.exists() {
        std::fs::remove_dir_all(&directory)?;
    }
    std::fs::create_dir_all(&directory)?;
    Ok(directory)
}

/// A guest that crashed and gave the machine up.
pub struct Crashed {
    /// What the console showed, and when.
    pub console: Vec<Line>,
    /// QEMU's reason for the end: `guest-reset` or `guest-shutdown`.
    pub end: String,
}

impl Crashed {
    /// Boots, crashes and waits until the guest has given the machine up. `meanwhile` then sees the
    /// machine, its memory still as it was at that moment.
    ///
    /// # Errors
    /// When the guest does not get that far in time.
    pub fn new(
        bench: &Workbench,
        scenario: &Scenario,
        disks: Vec<Disk>,
        directory: &Path,
        meanwhile: impl FnOnce(&mut Vm) -> Result<()>,
    ) -> Result<Crashed> {
        let mut vm = bench.guest().boot(scenario, disks, directory)?;
        let end = vm.wait_for_end(DUMP)?;
        meanwhile(&mut vm)?;
        let console = vm.quit()?;
        Ok(Crashed { console, end })
    }

    /// The console as text.
    #[must_use]
    pub fn text(&self) -> String {
        self.console.iter().flat_map(|line| [&line.text, "\n"]).collect()
    }

    /// What the payload printed, its prefix cut off. The crash card's lines have none.
    #[must_use]
    pub fn payload_lines(&self) -> Vec<&str> {
        let mut in_card = false;
        let mut lines = Vec::new();
        for line in &self.console {
            let said = line.text.split_once("] tinykdump: ").map(|(_, said)| said);
            lines.extend(said.or(in_card.then_some(line.text.as_str())));
            in_card = said == Some("crash card:") || in_card && said.is_none();
        }
        lines
    }

    /// Fails unless the payload printed a line with `text`.
    ///
    /// # Errors
    /// With everything that it did print.
    pub fn expect_payload_line(&self, text: &str) -> Result<&str> {
        let lines = self.payload_lines();
        let found = lines.iter().find(|line| line.contains(text));
        found
            .copied()
            .with_context(|| format!("no line with {text:?} from the payload:\n{lines:#?}"))
    }

    /// Time from the kernel's panic message to the first line with `text` after it, as the host saw
    /// them.
    #[must_use]
    pub fn since_panic(&self, text: &str) -> Option<Duration> {
        let when = |text: &str, after: Option<Instant>| {
            let later = |line: &&Line| after.is_none_or(|after| line.at >= after);
            let line = self.console.iter().filter(later).find(|line| line.text.contains(text))?;
            Some(line.at)
        };
        let panic = when("Kernel panic", None)?;
        Some(when(text, Some(panic))?.duration_since(panic))
    }
}

/// A guest that crashed and left a complete dump.
pub struct Dumped {
    /// What made it.
    pub bench: &'static Workbench,
    /// How.
    pub scenario: Scenario,
    vmlinux: Option<PathBuf>,
    /// The guest's last words and end.
    pub crashed: Crashed,
    /// What differs between the dump and the memory that QEMU read; empty when nothing does.
    pub differences: Vec<String>,
    /// The dump, saved.
    pub dump: PathBuf,
}

impl Dumped {
    /// Boots `scenario` with one reserved disk, crashes, compares and saves. The memory is compared
    /// at the moment of the reset, before which nothing may have touched it.
    ///
    /// # Errors
    /// When there is no complete dump.
    pub fn new(bench: &'static Workbench, name: &str, scenario: Scenario) -> Result<Dumped> {
        // Before the boot: fetching it may bring a newer kernel too.
        let vmlinux = bench.kernel(&scenario, DebugInfo::Yes)?.vmlinux;
        let directory = directory(name)?;
        let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
        let mut differences = Vec::new();
        let crashed = Crashed::new(bench, &scenario, vec![disk.clone()], &directory, |vm| {
            // The core lies at the start of the area.
            let core = CoreFile::open(&disk.image)?;
            differences = core.differences_to(vm, &directory)?;
            Ok(())
        })?;
        if let Err(error) = crashed.expect_payload_line("complete after") {
            bail!("{error:#}\nsee {}", directory.display());
        }
        let dump = bench.loader.save(&disk.image, &directory)?;
        std::fs::remove_file(&disk.image)?;
        Ok(Dumped { bench, scenario, vmlinux, crashed, differences, dump })
    }

    /// The vmlinux of the kernel that crashed.
    ///
    /// # Errors
    /// When the fixtures name none for this kernel.
    pub fn vmlinux(&self) -> Result<&Path> {
        self.vmlinux.as_deref().context("the fixtures have no vmlinux of this kernel")
    }
}

/// Boots `scenario` with `disks` where nothing may be dumped, and checks what is the same for all
/// such cases: not a byte of the disks changes, the payload says that there is no dump, and the
/// machine reboots. Returns the console for the reason.
///
/// # Errors
/// When one of these is not so.
pub fn refused(
    bench: &Workbench,
    name: &str,
    scenario: &Scenario,
    disks: Vec<Disk>,
) -> Result<Crashed> {
    let directory = directory(&format!("{name}/run"))?;
    let before = disks.iter().map(|disk| std::fs::read(&disk.image)).collect::<Result<Vec<_>, _>>();
    let before = before.context("cannot read a disk image")?;
    let crashed = Crashed::new(bench, scenario, disks.clone(), &directory, |_| Ok(()))?;
    for (disk, before) in disks.iter().zip(before) {
        let after = std::fs::read(&disk.image)?;
        let changed = before.iter().zip(&after).position(|(before, after)| before != after);
        let text = crashed.text();
        ensure!(before.len() == after.len(), "{} has changed its size", disk.image.display());
        if let Some(at) = changed {
            bail!("{} was written to at {at:#x}:\n{text}", disk.image.display());
        }
    }
    crashed.expect_payload_line("NO COMPLETE DUMP")?;
    ensure!(crashed.end == "guest-reset", "no reboot but {}:\n{}", crashed.end, crashed.text());
    Ok(crashed)
}
