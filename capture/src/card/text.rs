//! What old memory says, made fit to print.

use core::fmt::{self, Write};

/// Text of old memory: what is no character becomes a question mark, and nothing controls the
/// terminal that shows it.
pub struct Clean<'a>(pub &'a [u8]);

impl fmt::Display for Clean<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for character in chunk.valid().chars() {
                f.write_char(match character {
                    '\t' => ' ',
                    character if is_unprintable(character) => '?',
                    character => character,
                })?;
            }
            if !chunk.invalid().is_empty() {
                f.write_char('?')?;
            }
        }
        Ok(())
    }
}

/// Control characters, and those that change the order in which others are shown.
fn is_unprintable(character: char) -> bool {
    let reorders = matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    character.is_control() || reorders || matches!(character, '\u{2028}' | '\u{2029}')
}

/// Nanoseconds since boot, as printk shows them.
pub struct Time(pub u64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:5}.{:06}", self.0 / 1_000_000_000, self.0 / 1000 % 1_000_000)
    }
}

impl Time {
    /// Without the blanks that align it, and to the millisecond.
    pub fn trimmed(self) -> impl fmt::Display {
        struct Trimmed(u64);
        impl fmt::Display for Trimmed {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}.{:03}", self.0 / 1_000_000_000, self.0 / 1_000_000 % 1000)
            }
        }
        Trimmed(self.0)
    }
}

/// Seconds since 1970 as a date, UTC.
pub struct Date(pub u64);

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DAY: u64 = 86_400;
        /// Days of 400 years, after which the calendar repeats; and from a 1st of March of such a
        /// year, the year 0, to 1970.
        const ERA: u64 = 146_097;
        const TO_1970: u64 = 719_468;
        let (days, seconds) = (self.0 / DAY + TO_1970, self.0 % DAY);
        let (era, day) = (days / ERA, days % ERA);
        // The year begins in March: its odd day then is the last one.
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        let year = era * 400 + year + next;
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        write!(f, "{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
    }
}

/// The taint in the kernel's letters and as a number (kernel/panic.c, taint_flags, 6.15).
pub struct Taint(pub u64);

impl fmt::Display for Taint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LETTERS: &str = "PFSRMBUDAWCIOELKXTNJ";
        if self.0 == 0 {
            return f.write_str("none");
        }
        if self.0 & 1 == 0 {
            f.write_char('G')?;
        }
        let is_set = |(bit, _): &(u32, char)| self.0 >> bit & 1 == 1;
        for (_, letter) in (0..).zip(LETTERS.chars()).filter(is_set) {
            f.write_char(letter)?;
        }
        write!(f, " ({:#x})", self.0)
    }
}

/// What lies between `before` and the next `after` in a text; to its end when there is no `after`.
pub fn between<'a>(text: &'a [u8], before: &str, after: &[&str]) -> Option<&'a [u8]> {
    let rest = text.get(find(text, before)? + before.len()..)?;
    let end = after.iter().filter_map(|part| find(rest, part)).min().unwrap_or(rest.len());
    rest.get(..end)
}

/// Whether `text` has `part` in it.
pub fn contains(text: &[u8], part: &str) -> bool {
    find(text, part).is_some()
}

fn find(text: &[u8], part: &str) -> Option<usize> {
    text.windows(part.len().max(1)).position(|window| window == part.as_bytes())
}

/// A decimal number at the start of a text.
pub fn number(text: &[u8]) -> Option<u64> {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    core::str::from_utf8(text.get(..digits)?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::format;

    use super::*;

    #[test]
    fn nothing_in_old_memory_reaches_the_terminal_as_a_command() {
        let shown = format!("{}", Clean(b"ok\x1b[2J\tna\xc3\xafve \xff\xfe\0 \xe2\x80\xae"));
        assert_eq!(shown, "ok?[2J na\u{ef}ve ??? ?");
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, date) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_795_409_705, "2026-11-23 04:55:05 UTC"),
            (4_107_542_399, "2100-02-28 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(format!("{}", Date(seconds)), date);
        }
        assert!(!format!("{}", Date(u64::MAX)).is_empty());
    }

    #[test]
    fn taint_is_shown_in_the_kernels_letters() {
        assert_eq!(format!("{}", Taint(0)), "none");
        assert_eq!(format!("{}", Taint(0x201)), "PW (0x201)");
        assert_eq!(format!("{}", Taint(0x3000)), "GOE (0x3000)");
        assert_eq!(format!("{}", Taint(1 << 63)), "G (0x8000000000000000)");
    }

    #[test]
    fn parts_of_the_kernels_own_line_are_found() {
        let line = b"CPU: 1 PID: 170 Comm: my dd Kdump: loaded Not tainted 6.1.0";
        let comm = between(line, " Comm: ", &[" Kdump: ", " Not tainted"]);
        assert_eq!(comm, Some(&b"my dd"[..]));
        assert_eq!(between(line, "CPU: ", &[]).and_then(number), Some(1));
        assert_eq!(between(line, "PPID: ", &[]), None);
        assert_eq!(number(b"x"), None);
        assert_eq!(number(b"99999999999999999999999"), None);
    }
}
