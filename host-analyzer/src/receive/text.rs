//! Console text for a terminal: nothing in it drives the terminal, and what is no text does not flood it.

/// Stands for bytes that are no text.
pub const MARK: char = '\u{fffd}';

/// A line that is longer than this is shown in pieces.
const MAX_LINE: usize = 4096;

/// Collects bytes of the console and gives text.
///
/// It works line by line: remains of a frame whose delimiter was lost cannot be told from text by a single
/// byte, and by a whole line they can.
#[derive(Default)]
pub struct ConsoleText {
    line: Vec<u8>,
    /// The last thing shown was a mark: the next one adds nothing.
    is_marked: bool,
}

impl ConsoleText {
    /// Takes bytes. Returns what can be shown.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        let mut shown = String::new();
        for &byte in bytes {
            self.line.push(byte);
            if byte == b'\n' || self.line.len() >= MAX_LINE {
                shown += &self.flush();
            }
        }
        shown
    }

    /// Something damaged came. Returns what can be shown.
    pub fn damaged(&mut self) -> String {
        self.flush() + &self.mark()
    }

    /// Returns what has come of a line that is not finished: a prompt.
    pub fn flush(&mut self) -> String {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            String::new()
        } else if is_garbage(&line) {
            self.mark()
        } else {
            let clean = clean(&line);
            if self.is_marked && clean.trim().is_empty() {
                // A newline among garbage, by chance.
                return String::new();
            }
            self.is_marked = false;
            clean
        }
    }

    fn mark(&mut self) -> String {
        if std::mem::replace(&mut self.is_marked, true) {
            String::new()
        } else {
            format!("{MARK}\n")
        }
    }
}

/// Whether more than one in eight characters of a line is none.
fn is_garbage(line: &[u8]) -> bool {
    let mut strange = 0;
    for chunk in line.utf8_chunks() {
        let controls = chunk.valid().chars().filter(|&it| is_harmful(it) && it != '\x1b').count();
        strange += controls + chunk.invalid().len();
    }
    strange * 8 > line.len()
}

fn is_harmful(character: char) -> bool {
    character.is_control() && !matches!(character, '\n' | '\t' | '\r')
}

/// The text of a line: a run of what is none as one mark.
fn clean(line: &[u8]) -> String {
    let mut text = String::new();
    for chunk in line.utf8_chunks() {
        for character in chunk.valid().chars().filter(|&it| it != '\r') {
            push(&mut text, if is_harmful(character) { MARK } else { character });
        }
        if !chunk.invalid().is_empty() {
            push(&mut text, MARK);
        }
    }
    text
}

fn push(text: &mut String, character: char) {
    if character != MARK || !text.ends_with(MARK) {
        text.push(character);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_comes_through_and_cannot_drive_the_terminal() {
        let mut text = ConsoleText::default();
        let shown = text.push("\x1b[32mOK\x1b[0m Started größer\tit\r\nlog".as_bytes());
        assert_eq!(shown, "\u{fffd}[32mOK\u{fffd}[0m Started größer\tit\n");
        assert_eq!(text.flush(), "log");
    }

    #[test]
    fn character_that_comes_in_two_pieces_is_whole() {
        let mut text = ConsoleText::default();
        assert_eq!(text.push(b"gr\xc3"), "");
        assert_eq!(text.push(b"\xbc\xc3\x9fe\n"), "grüße\n");
    }

    #[test]
    fn frame_that_lost_its_delimiter_is_one_mark() {
        let mut text = ConsoleText::default();
        let mut state = 1u32;
        let garbage: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .take(16_384)
        .collect();
        let shown = text.push(&garbage) + &text.damaged() + &text.push(b"after it\n");
        assert_eq!(shown, "\u{fffd}\nafter it\n");
    }
}
