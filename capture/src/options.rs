//! The payload's command line: `kexec -p --append=…`, Linux style.
//!
//! | option | meaning |
//! |---|---|
//! | `console=ttyS0,115200n8` | where to print: ttyS0 to ttyS3; the speed is kept when none is given |
//! | `capture.to=disk` | the first reserved area found (default) |
//! | `capture.to=disk:uuid=UUID` | the area with this uuid and no other |
//! | `capture.after=reboot` | or `poweroff`, `halt` |
//! | `elfcorehdr=…` | appended by kexec; the last one wins |

use crate::OldPhys;

/// The longest command line that the payload reads, in bytes (the x86 boot protocol's
/// cmdline_size, which kexec checks against).
pub const MAX_COMMAND_LINE: usize = 2048;

/// Where to write the dump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum To {
    /// The first reserved area found on any disk.
    #[default]
    AnyArea,
    /// The area with this uuid.
    Area([u8; 16]),
    /// The option was not understood, so nothing may be written.
    Refused,
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
    /// Number of the port: 0 for ttyS0.
    pub port: u8,
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
    pub to: To,
    /// `capture.after=`
    pub after: After,
    /// `elfcorehdr=`: where the header lies.
    pub elfcorehdr: Option<OldPhys>,
    /// The last `capture.` or `elfcorehdr=` word that was not understood.
    pub refused: Option<&'a str>,
}

impl<'a> Options<'a> {
    /// Reads the command line.
    #[must_use]
    pub fn parse(command_line: &'a str) -> Options<'a> {
        let mut options = Options::default();
        for word in command_line.split_ascii_whitespace() {
            let understood = match word.split_once('=').unwrap_or((word, "")) {
                ("console", value) => {
                    // Other consoles are the dead kernel's business: tty0, hvc0, netcon0.
                    options.console = parse_console(value).unwrap_or(options.console);
                    true
                }
                ("capture.to", value) => {
                    let to = parse_to(value);
                    options.to = to.unwrap_or(To::Refused);
                    to.is_some()
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

fn parse_console(value: &str) -> Option<Console> {
    let (name, mode) = value.split_once(',').unwrap_or((value, ""));
    let port: u8 = name.strip_prefix("ttyS")?.parse().ok()?;
    let digits = mode.find(|c: char| !c.is_ascii_digit()).unwrap_or(mode.len());
    let baud = mode[..digits].parse().ok().filter(|&baud| baud > 0);
    (port < 4).then_some(Console { port, baud })
}

fn parse_to(value: &str) -> Option<To> {
    if value == "disk" {
        return Some(To::AnyArea);
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
        assert_eq!(console.console, Console { port: 3, baud: Some(115_200) });
        assert_eq!(Options::parse("console=ttyS2").console, Console { port: 2, baud: None });
        assert_eq!(Options::parse("console=ttyS9,115200").console, Console::default());
    }

    #[test]
    fn target_is_any_area_unless_a_uuid_names_one() {
        let uuid = *b"\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef";
        let text = "capture.to=disk:uuid=01234567-89ab-cdef-0123-456789ABCDEF capture.after=halt";
        let options = Options::parse(text);
        assert_eq!((options.to, options.after), (To::Area(uuid), After::Halt));
        assert_eq!(Options::parse("root=/dev/vda1").to, To::AnyArea);
        assert_eq!(Options::parse("capture.to=disk").to, To::AnyArea);
    }

    #[test]
    fn target_that_is_not_understood_forbids_writing() {
        for word in ["capture.to=disk:uuid=123", "capture.to=nfs:/srv", "capture.to"] {
            let options = Options::parse(word);
            assert_eq!((options.to, options.refused), (To::Refused, Some(word)));
        }
    }
}
