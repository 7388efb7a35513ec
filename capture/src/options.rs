//! The payload's command line: `kexec -p --append=…`, Linux style.
//!
//! | option | meaning |
//! |---|---|
//! | `console=ttyS0,115200n8` | where to print: ttyS0 to ttyS3; the speed is kept when none is given. `ttyAMA0` stands for the port that firmware names |
//! | `console=PORT` | the same, for ports that are named by where their registers are |
//! | `capture.to=disk` | the first reserved area found (default) |
//! | `capture.to=disk:uuid=UUID` | the area with this uuid and no other |
//! | `capture.to=serial` | over the console's port |
//! | `capture.to=serial:PORT` | over another one |
//! | `capture.to=A,B,...` | the first of these that takes the whole dump |
//! | `capture.serial=kernel` | how much goes over a line: or `minimal`, `full` |
//! | `capture.timeout=SECONDS` | how long all of it may take; without it as long as it takes |
//! | `capture.holdoff=MINUTES` | for how long after its crash an unsaved dump is not overwritten; without it a complete one never is |
//! | `capture.after=reboot` | or `poweroff`, `halt` |
//! | `elfcorehdr=…` | appended by kexec; the last one wins |
//!
//! A PORT is named as Linux names consoles and early consoles (earlycon=, Documentation/admin-guide/
//! kernel-parameters.txt, 6.12): `ttyS1,921600n8`, `uart8250,io,0x3f8,115200n8`,
//! `uart8250,mmio,ADDRESS`, `uart8250,mmio32,ADDRESS`, `pl011,ADDRESS`, `sbsa,ADDRESS`; the speed may be left
//! out, and is then kept. A dump also goes over `hvc0`, the first virtio console that is found. Names
//! like `ttyAMA0` are not understood: which port that is depends on the order of Linux's drivers.

use format::frame::Extent;

use crate::OldPhys;

/// The longest command line that the payload reads, in bytes (the x86 boot protocol's
/// cmdline_size, which kexec checks against).
pub const MAX_COMMAND_LINE: usize = 2048;

/// Most targets that are tried.
pub const MAX_TARGETS: usize = 8;

/// Where to write the dump: each is tried until one takes it whole. None when what the command line
/// says was not understood: then nothing may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Targets([Option<To>; MAX_TARGETS]);

impl Targets {
    /// In their order.
    pub fn iter(&self) -> impl Iterator<Item = To> + '_ {
        self.0.iter().flatten().copied()
    }

    /// The targets of a list, and whether all of it was understood. What a port is made of has commas as
    /// well: a piece that no target begins with belongs to the port before.
    fn parse(list: &str) -> (Targets, bool) {
        let (mut targets, mut count, mut understood) = (Targets([None; MAX_TARGETS]), 0, true);
        let mut rest = list;
        while !rest.is_empty() {
            let is_port = rest.starts_with("serial:");
            let commas = rest.match_indices(',').map(|(at, _)| at);
            let ends = commas.chain([rest.len()]).find(|&at| {
                let next = rest.get(at + 1..).unwrap_or_default();
                !is_port || at == rest.len() || begins_target(next)
            });
            let (word, behind) = rest.split_at(ends.unwrap_or(rest.len()));
            match (parse_to(word), targets.0.get_mut(count)) {
                (Some(to), Some(slot)) => {
                    *slot = Some(to);
                    count += 1;
                }
                _ => understood = false,
            }
            rest = behind.strip_prefix(',').unwrap_or_default();
            understood &= behind.is_empty() || !rest.is_empty();
        }
        (targets, understood && count > 0)
    }
}

impl Default for Targets {
    fn default() -> Targets {
        let mut targets = [None; MAX_TARGETS];
        targets[0] = Some(To::AnyArea);
        Targets(targets)
    }
}

fn begins_target(text: &str) -> bool {
    let word = text.split([',', ':']).next();
    matches!(word, Some("disk" | "serial"))
}

/// Where to write the dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// The first reserved area found on any disk.
    AnyArea,
    /// The area with this uuid.
    Area([u8; 16]),
    /// A serial port: this one, or the console's.
    Serial(Option<Port>),
}

/// Where a serial port's registers are, and of what kind they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortPlace {
    /// One of the ports that every PC has at the same addresses: 0 for ttyS0.
    Pc(u8),
    /// A 16550 at I/O ports from this one on.
    Io(u16),
    /// A 16550 in memory: registers of one byte, or of four bytes each.
    Memory {
        /// Where they begin.
        at: u64,
        /// Four bytes each.
        wide: bool,
    },
    /// A PL011, or (`sbsa`) the part of it that SBSA demands.
    Pl011 {
        /// Where its registers begin.
        at: u64,
        /// Data and flags are all it has.
        sbsa: bool,
    },
    /// The first virtio console that is found.
    VirtioConsole,
}

/// A serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Where it is.
    pub place: PortPlace,
    /// Bits per second; `None` leaves the line as the dead kernel had it.
    pub baud: Option<u32>,
}

/// What to do when the dump is done, or cannot be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum After {
    /// Start the machine again.
    #[default]
    Reboot,
    /// Switch it off.
    PowerOff,
    /// Stop here.
    Halt,
}

/// The serial port to print on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Console {
    /// Where it is; `None` leaves that to the machine.
    pub place: Option<PortPlace>,
    /// Bits per second; `None` leaves the line as the dead kernel had it.
    pub baud: Option<u32>,
}

/// The payload's options. Unknown options are not the payload's and are ignored; a value that is
/// not understood is told in `refused`, and the default stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options<'a> {
    /// `console=`
    pub console: Console,
    /// `capture.to=`
    pub to: Targets,
    /// `capture.timeout=`, in seconds.
    pub timeout_s: Option<u64>,
    /// `capture.holdoff=`, in minutes.
    pub holdoff_min: Option<u64>,
    /// `capture.serial=`: how much goes over a line.
    pub extent: Extent,
    /// `capture.after=`
    pub after: After,
    /// `elfcorehdr=`: where the header lies.
    pub elfcorehdr: Option<OldPhys>,
    /// The last `capture.` or `elfcorehdr=` word that was not understood.
    pub refused: Option<&'a str>,
}

/// How else to name a port that has a name of Linux's.
const NAME_BY_REGISTERS: &str = "only Linux knows which port that is: use serial for the console's, or name another one by its \
     registers, as in serial:pl011,ADDRESS";

impl<'a> Options<'a> {
    /// What to write instead of the word that was refused, if that is known.
    #[must_use]
    pub fn advice(&self) -> Option<&'static str> {
        let (_, port) = self.refused?.strip_prefix("capture.to=")?.split_once("serial:")?;
        let is_linux_name = port.starts_with("tty") || port.starts_with("hvc");
        is_linux_name.then_some(NAME_BY_REGISTERS)
    }

    /// Reads the command line.
    #[must_use]
    pub fn parse(command_line: &'a str) -> Options<'a> {
        let mut options = Options::default();
        for word in command_line.split_ascii_whitespace() {
            let understood = match word.split_once('=').unwrap_or((word, "")) {
                ("console", value) => {
                    // Other consoles are the dead kernel's business: tty0, hvc0, ttyAMA0, netcon0.
                    options.console =
                        parse_console(value, options.console).unwrap_or(options.console);
                    true
                }
                ("capture.to", value) => {
                    let (targets, understood) = Targets::parse(value);
                    options.to = targets;
                    understood
                }
                ("capture.timeout", value) => {
                    options.timeout_s = value.parse().ok().filter(|&seconds| seconds > 0);
                    options.timeout_s.is_some()
                }
                ("capture.holdoff", value) => {
                    options.holdoff_min = value.parse().ok();
                    options.holdoff_min.is_some()
                }
                ("capture.serial", value) => {
                    let extent = parse_extent(value);
                    options.extent = extent.unwrap_or(options.extent);
                    extent.is_some()
                }
                ("capture.after", value) => {
                    let after = parse_after(value);
                    options.after = after.unwrap_or(options.after);
                    after.is_some()
                }
                ("elfcorehdr", value) => {
                    options.elfcorehdr = parse_elfcorehdr(value);
                    options.elfcorehdr.is_some()
                }
                (name, _) => !name.starts_with("capture."),
            };
            if !understood {
                options.refused = Some(word);
            }
        }
        options
    }
}

fn parse_console(value: &str, before: Console) -> Option<Console> {
    let (name, mode) = value.split_once(',').unwrap_or((value, ""));
    // What the dead kernel understood of it is good enough: 115200n8r, 9600e7.
    let digits = mode.find(|c: char| !c.is_ascii_digit()).unwrap_or(mode.len());
    let baud = mode[..digits].parse().ok().filter(|&baud| baud > 0);
    if name.starts_with("ttyAMA") {
        // Which port that is, firmware says, or an option before.
        return Some(Console { baud: baud.or(before.baud), ..before });
    }
    if let Some(number) = parse_pc_port(name) {
        return Some(Console { place: Some(PortPlace::Pc(number)), baud });
    }
    let port = parse_port(value).filter(|port| port.place != PortPlace::VirtioConsole)?;
    Some(Console { place: Some(port.place), baud: port.baud })
}

/// `ttyS0` to `ttyS3`.
fn parse_pc_port(name: &str) -> Option<u8> {
    name.strip_prefix("ttyS")?.parse().ok().filter(|&port| port < 4)
}

/// A serial port, as the module's documentation says.
fn parse_port(value: &str) -> Option<Port> {
    if value == "hvc0" {
        return Some(Port { place: PortPlace::VirtioConsole, baud: None });
    }
    let (name, rest) = value.split_once(',').unwrap_or((value, ""));
    if name.starts_with("ttyS") {
        let baud = if rest.is_empty() { None } else { Some(parse_mode(rest)?) };
        return Some(Port { place: PortPlace::Pc(parse_pc_port(name)?), baud });
    }
    let (first, rest) = rest.split_once(',').unwrap_or((rest, ""));
    let is_kind = matches!(first, "io" | "mmio" | "mmio32");
    let (kind, address, mode) = if is_kind {
        let (address, mode) = rest.split_once(',').unwrap_or((rest, ""));
        (first, address, mode)
    } else {
        ("", first, rest)
    };
    let at = parse_size(address)?;
    let place = match (name, kind) {
        ("uart8250", "io") => PortPlace::Io(u16::try_from(at).ok().filter(|&at| at < 0xfff8)?),
        ("uart8250", "mmio" | "mmio32") => PortPlace::Memory { at, wide: kind == "mmio32" },
        ("pl011", "" | "mmio32") => PortPlace::Pl011 { at, sbsa: false },
        ("sbsa", "") => PortPlace::Pl011 { at, sbsa: true },
        _ => return None,
    };
    let baud = if mode.is_empty() { None } else { Some(parse_mode(mode)?) };
    Some(Port { place, baud })
}

/// A speed and what eight bits without parity are written as: `115200n8`.
fn parse_mode(mode: &str) -> Option<u32> {
    let speed = mode.strip_suffix("n8").or(mode.strip_suffix('n')).unwrap_or(mode);
    speed.parse().ok().filter(|&baud| baud > 0)
}

fn parse_extent(value: &str) -> Option<Extent> {
    Some(match value {
        "minimal" => Extent::Minimal,
        "kernel" => Extent::Kernel,
        "full" => Extent::Full,
        _ => return None,
    })
}

fn parse_to(value: &str) -> Option<To> {
    match value {
        "disk" => return Some(To::AnyArea),
        "serial" => return Some(To::Serial(None)),
        _ => {}
    }
    if let Some(port) = value.strip_prefix("serial:") {
        return parse_port(port).map(|port| To::Serial(Some(port)));
    }
    parse_uuid(value.strip_prefix("disk:uuid=")?).map(To::Area)
}

fn parse_after(value: &str) -> Option<After> {
    Some(match value {
        "reboot" => After::Reboot,
        "poweroff" => After::PowerOff,
        "halt" => After::Halt,
        _ => return None,
    })
}

/// A uuid in its text form, hyphens optional.
fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let mut uuid = [0; 16];
    let mut digits = text.bytes().filter(|&byte| byte != b'-');
    for byte in &mut uuid {
        let high = (digits.next()? as char).to_digit(16)?;
        let low = (digits.next()? as char).to_digit(16)?;
        *byte = (high << 4 | low) as u8;
    }
    digits.next().is_none().then_some(uuid)
}

/// `ADDR` or `SIZE@ADDR`, each a number with an optional suffix (setup_elfcorehdr in
/// kernel/crash_dump.c, kernel 6.1).
fn parse_elfcorehdr(value: &str) -> Option<OldPhys> {
    let address = match value.split_once('@') {
        Some((size, address)) => {
            parse_size(size)?;
            address
        }
        None => value,
    };
    parse_size(address).map(OldPhys)
}

/// A number in C notation with an optional suffix K to E (memparse in lib/cmdline.c, kernel 6.1).
fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        b'T' | b't' => (&text[..text.len() - 1], 40),
        b'P' | b'p' => (&text[..text.len() - 1], 50),
        // `E` is a hex digit as well; the kernel reads it as one there.
        b'E' | b'e' if !text.starts_with("0x") => (&text[..text.len() - 1], 60),
        _ => (text, 0),
    };
    let number = if let Some(hex) = digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        u64::from_str_radix(hex, 16)
    } else if digits.len() > 1 && digits.starts_with('0') {
        u64::from_str_radix(&digits[1..], 8)
    } else {
        digits.parse()
    };
    let number = number.ok()?;
    (number <= u64::MAX >> shift).then_some(number << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elfcorehdr(text: &str) -> Option<u64> {
        Options::parse(text).elfcorehdr.map(|at| at.0)
    }

    #[test]
    fn elfcorehdr_in_every_form_that_kexec_writes() {
        assert_eq!(elfcorehdr("elfcorehdr=0x3b000000 "), Some(0x3b00_0000));
        assert_eq!(elfcorehdr("quiet acpi_rsdp=0xf59e0 elfcorehdr=949620K"), Some(949_620 << 10));
        assert_eq!(elfcorehdr("elfcorehdr=927M"), Some(927 << 20));
        assert_eq!(elfcorehdr("elfcorehdr=3G"), Some(3 << 30));
        assert_eq!(elfcorehdr("elfcorehdr=4K@0x3b000000"), Some(0x3b00_0000));
        assert_eq!(elfcorehdr("elfcorehdr=0x1000 x=1 elfcorehdr=2M"), Some(2 << 20));
    }

    #[test]
    fn garbage_elfcorehdr_is_told_and_not_guessed() {
        for word in ["elfcorehdr=", "elfcorehdr=x", "elfcorehdr=@1", "elfcorehdr=99999999999E"] {
            let options = Options::parse(word);
            assert_eq!((options.elfcorehdr, options.refused), (None, Some(word)));
        }
    }

    #[test]
    fn console_is_the_last_serial_one() {
        let console = Options::parse("console=ttyS1,9600n8 console=ttyS3,115200n8 console=tty0");
        let pc = |number, baud| Console { place: Some(PortPlace::Pc(number)), baud };
        assert_eq!(console.console, pc(3, Some(115_200)));
        assert_eq!(Options::parse("console=ttyS2").console, pc(2, None));
        assert_eq!(Options::parse("console=ttyS1,9600e7r").console, pc(1, Some(9600)));
        assert_eq!(Options::parse("console=ttyS9,115200").console, Console::default());
        let arm = Options::parse("console=ttyAMA0,57600n8 console=tty0").console;
        assert_eq!(arm, Console { place: None, baud: Some(57_600) });
    }

    #[test]
    fn console_may_be_named_by_its_registers() {
        let console = |text: &str| Options::parse(text).console;
        let pl011 = PortPlace::Pl011 { at: 0x900_0000, sbsa: false };
        let expected = Console { place: Some(pl011), baud: Some(115_200) };
        assert_eq!(console("console=pl011,0x9000000,115200n8 console=ttyAMA0"), expected);
        let expected = Console { place: Some(PortPlace::Io(0x2f8)), baud: None };
        assert_eq!(console("console=ttyS0,9600 console=uart8250,io,0x2f8"), expected);
        for other in ["hvc0", "uart8250,0x2f8", "pl011,there", "ttyAMA0"] {
            let text = std::format!("console={other}");
            assert_eq!(console(&text), Console::default(), "{other}");
        }
    }

    /// The target, when there is one.
    fn only(options: Options<'_>) -> Option<To> {
        let mut targets = options.to.iter();
        targets.next().filter(|_| targets.next().is_none())
    }

    fn all(list: &str) -> (std::vec::Vec<To>, bool) {
        let word = std::format!("capture.to={list}");
        let options = Options::parse(&word);
        (options.to.iter().collect(), options.refused.is_none())
    }

    #[test]
    fn targets_are_tried_in_the_order_of_the_list() {
        let port = |place, baud| To::Serial(Some(Port { place, baud }));
        let pc = port(PortPlace::Pc(1), Some(921_600));
        let io = port(PortPlace::Io(0x3f8), Some(115_200));
        let uuid = "disk:uuid=01234567-89ab-cdef-0123-456789abcdef";
        let area = parse_to(uuid).unwrap();
        let list = std::format!("{uuid},disk,serial:ttyS1,921600n8,serial");
        assert_eq!(all(&list), (std::vec![area, To::AnyArea, pc, To::Serial(None)], true));
        let list = "serial:uart8250,io,0x3f8,115200n8,disk,serial:hvc0";
        let hvc = port(PortPlace::VirtioConsole, None);
        assert_eq!(all(list), (std::vec![io, To::AnyArea, hvc], true));
    }

    #[test]
    fn what_is_understood_of_a_list_stands_and_the_rest_is_told() {
        for (list, count) in [
            ("nfs:/srv,disk", 1),
            ("disk,nfs,serial", 2),
            ("disk,", 1),
            (",disk", 1),
            ("disk:uuid=12,serial", 1),
            ("serial:ttyS9,115200,disk", 1),
            ("disk,disk,disk,disk,disk,disk,disk,disk,disk", MAX_TARGETS),
        ] {
            let (targets, understood) = all(list);
            assert_eq!((targets.len(), understood), (count, false), "{list}");
        }
    }

    #[test]
    fn times_are_numbers() {
        let options = Options::parse("capture.timeout=90 capture.holdoff=0");
        assert_eq!((options.timeout_s, options.holdoff_min), (Some(90), Some(0)));
        for word in ["capture.timeout=0", "capture.timeout=1m", "capture.holdoff=-1"] {
            let options = Options::parse(word);
            assert_eq!(options.refused, Some(word));
            assert_eq!((options.timeout_s, options.holdoff_min), (None, None));
        }
    }

    #[test]
    fn target_is_any_area_unless_a_uuid_names_one() {
        let uuid = *b"\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef";
        let text = "capture.to=disk:uuid=01234567-89ab-cdef-0123-456789ABCDEF capture.after=halt";
        let options = Options::parse(text);
        assert_eq!((only(options), options.after), (Some(To::Area(uuid)), After::Halt));
        assert_eq!(only(Options::parse("root=/dev/vda1")), Some(To::AnyArea));
        assert_eq!(only(Options::parse("capture.to=disk")), Some(To::AnyArea));
    }

    #[test]
    fn serial_ports_are_named_as_linux_names_them() {
        let to = |port: &str| only(Options::parse(&std::format!("capture.to=serial:{port}")));
        let is = |place, baud| Some(To::Serial(Some(Port { place, baud })));
        assert_eq!(only(Options::parse("capture.to=serial")), Some(To::Serial(None)));
        assert_eq!(to("ttyS1,921600n8"), is(PortPlace::Pc(1), Some(921_600)));
        assert_eq!(to("ttyS3"), is(PortPlace::Pc(3), None));
        assert_eq!(to("uart8250,io,0x3f8,115200n8"), is(PortPlace::Io(0x3f8), Some(115_200)));
        let wide = PortPlace::Memory { at: 0xfe21_5040, wide: true };
        assert_eq!(to("uart8250,mmio32,0xfe215040"), is(wide, None));
        let narrow = PortPlace::Memory { at: 0x1000, wide: false };
        assert_eq!(to("uart8250,mmio,4K,9600"), is(narrow, Some(9600)));
        let pl011 = PortPlace::Pl011 { at: 0x900_0000, sbsa: false };
        assert_eq!(to("pl011,0x9000000"), is(pl011, None));
        assert_eq!(to("pl011,mmio32,0x9000000,115200"), is(pl011, Some(115_200)));
        assert_eq!(to("sbsa,0x9000000"), is(PortPlace::Pl011 { at: 0x900_0000, sbsa: true }, None));
        assert_eq!(to("hvc0"), is(PortPlace::VirtioConsole, None));
        for wrong in [
            "",
            "hvc1",
            "hvc0,115200",
            "ttyS4",
            "ttyAMA0",
            "ttyS1,fast",
            "uart8250,0x3f8",
            "uart8250,io,0x10000",
            "pl011",
            "pl011,0x9000000,0",
        ] {
            assert_eq!(to(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn port_that_only_linux_knows_is_refused_with_advice() {
        for (word, has_advice) in [
            ("capture.to=serial:ttyAMA0,115200", true),
            ("capture.to=serial:hvc3", true),
            ("capture.to=serial:pl011", false),
            ("capture.to=nfs:tty", false),
        ] {
            let options = Options::parse(word);
            assert_eq!(options.refused, Some(word));
            assert_eq!(options.advice().is_some(), has_advice, "{word}");
        }
        assert_eq!(Options::parse("capture.to=serial").advice(), None);
    }

    #[test]
    fn extent_is_the_kernel_unless_told_otherwise() {
        assert_eq!(Options::parse("").extent, Extent::Kernel);
        assert_eq!(Options::parse("capture.serial=full").extent, Extent::Full);
        assert_eq!(Options::parse("capture.serial=minimal").extent, Extent::Minimal);
        assert_eq!(Options::parse("capture.serial=all").refused, Some("capture.serial=all"));
    }

    #[test]
    fn target_that_is_not_understood_forbids_writing() {
        for word in ["capture.to=disk:uuid=123", "capture.to=nfs:/srv", "capture.to"] {
            let options = Options::parse(word);
            assert_eq!((options.to.iter().count(), options.refused), (0, Some(word)));
        }
    }
}
