//! LZO1X, decompression only: what makedumpfile and QEMU write with `-l`.
//!
//! Every read and every copy is checked against the ends of both buffers, so foreign bytes can give wrong
//! bytes and nothing worse. The encoding is that of Documentation/staging/lzo.rst (Linux 6.1), without its
//! extension for runs of zeros (lzo-rle), which no dump has.

/// Decompresses `input` into `output`, and says how many bytes it became; `None` when it is no LZO1X or
/// does not fit.
pub(super) fn decompress(input: &[u8], output: &mut [u8]) -> Option<usize> {
    let mut stream = Stream { input, output, at: 0 };
    // How many literals the last instruction copied, 4 for more than 3: the smallest instructions
    // mean something else after each.
    let mut copied = stream.first_literals()?;
    loop {
        let instruction = stream.byte()?;
        let Some(found) = stream.decode(instruction, copied)? else { return Some(stream.at) };
        copied = match found {
            Instruction::Literals(count) => {
                stream.literals(count)?;
                4
            }
            Instruction::Match { length, distance, literals } => {
                stream.repeat(distance, length)?;
                stream.literals(literals)?;
                literals
            }
        };
    }
}

enum Instruction {
    Literals(usize),
    Match { length: usize, distance: usize, literals: usize },
}

struct Stream<'a, 'b> {
    input: &'a [u8],
    output: &'b mut [u8],
    /// How much of the output is there.
    at: usize,
}

impl Stream<'_, '_> {
    fn byte(&mut self) -> Option<usize> {
        let (&first, rest) = self.input.split_first()?;
        self.input = rest;
        Some(usize::from(first))
    }

    /// A first byte above 17 is a count of literals.
    fn first_literals(&mut self) -> Option<usize> {
        match self.input.first().map(|&first| usize::from(first)) {
            Some(first @ 18..) => {
                self.byte();
                self.literals(first - 17)?;
                Some((first - 17).min(4))
            }
            _ => Some(0),
        }
    }

    /// The instruction that begins with `first`; `Some(None)` at the end of the stream.
    fn decode(&mut self, first: usize, copied: usize) -> Option<Option<Instruction>> {
        let found = match first {
            0..16 if copied == 0 => Instruction::Literals(3 + self.length(first & 15, 15)?),
            0..16 => {
                let (length, base) = if copied == 4 { (3, 2049) } else { (2, 1) };
                let distance = (self.byte()? << 2) + (first >> 2) + base;
                Instruction::Match { length, distance, literals: first & 3 }
            }
            16..32 => {
                let length = 2 + self.length(first & 7, 7)?;
                let (distance, literals) = self.far()?;
                let distance = distance + ((first & 8) << 11);
                if distance == 0 {
                    return Some(None);
                }
                Instruction::Match { length, distance: distance + 16384, literals }
            }
            32..64 => {
                let length = 2 + self.length(first & 31, 31)?;
                let (distance, literals) = self.far()?;
                Instruction::Match { length, distance: distance + 1, literals }
            }
            _ => {
                let length = if first < 128 { 3 + (first >> 5 & 1) } else { 5 + (first >> 5 & 3) };
                let distance = (self.byte()? << 3) + (first >> 2 & 7) + 1;
                Instruction::Match { length, distance, literals: first & 3 }
            }
        };
        Some(Some(found))
    }

    /// A length that did not fit into the instruction, when `bits` is 0: every zero byte that follows
    /// stands for 255, the first other one for itself, and `base` comes on top.
    fn length(&mut self, bits: usize, base: usize) -> Option<usize> {
        if bits != 0 {
            return Some(bits);
        }
        let zeros = self.input.iter().take_while(|&&byte| byte == 0).count();
        self.input = &self.input[zeros..];
        Some(base + zeros * 255 + self.byte()?)
    }

    /// A distance of 14 bits, and how many literals follow.
    fn far(&mut self) -> Option<(usize, usize)> {
        let word = self.byte()? | self.byte()? << 8;
        Some((word >> 2, word & 3))
    }

    fn literals(&mut self, count: usize) -> Option<()> {
        let (literals, rest) = self.input.split_at_checked(count)?;
        self.output.get_mut(self.at..)?.get_mut(..count)?.copy_from_slice(literals);
        self.input = rest;
        self.at += count;
        Some(())
    }

    /// Copies what was there `distance` bytes ago, which may reach into what it makes.
    fn repeat(&mut self, distance: usize, length: usize) -> Option<()> {
        let from = self.at.checked_sub(distance)?;
        let end = self.at.checked_add(length).filter(|&end| end <= self.output.len())?;
        if distance >= length {
            self.output.copy_within(from..from + length, self.at);
        } else {
            for at in self.at..end {
                self.output[at] = self.output[at - distance];
            }
        }
        self.at = end;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The end of every stream.
    const END: [u8; 3] = [0x11, 0, 0];

    fn unpacked(parts: &[&[u8]], room: usize) -> Option<Vec<u8>> {
        let mut output = vec![0; room];
        let size = decompress(&parts.concat(), &mut output)?;
        output.truncate(size);
        Some(output)
    }

    #[test]
    fn literals_come_out_as_they_are() {
        assert_eq!(unpacked(&[&[17 + 5], b"hello", &END], 5).unwrap(), b"hello");
        assert_eq!(unpacked(&[&END], 5).unwrap(), b"");
        let long = [7; 3 + 15 + 255 + 2];
        assert_eq!(unpacked(&[&[0, 0, 2], &long, &END], 999).unwrap(), long);
    }

    #[test]
    fn every_kind_of_match_repeats_what_was_there() {
        // 3 bytes from 4 back (short), 6 from 7 back, then 2 literals.
        let text = unpacked(&[&[17 + 4], b"abcd", &[0x4c, 0], &[0b1011_1010, 0], b"xy", &END], 99);
        assert_eq!(text.unwrap(), b"abcdabcabcdabxy");
        // A byte 33 times by a long match.
        let run = unpacked(&[&[17 + 4], b"abcd", &[0x20, 0, 0, 0], &END], 999);
        assert_eq!(run, None, "a length without its last byte");
        let run = unpacked(&[&[17 + 4], b"abcd", &[0x20, 2, 0, 0], &END], 999);
        assert_eq!(run.unwrap(), [&b"abc"[..], &[b'd'; 36]].concat());
        // 2 bytes from 3 back after one literal, and 3 from 2049 back after a run of them.
        let near = unpacked(&[&[17 + 4], b"abcd", &[0x4d, 0], b"e", &[8, 0], &END], 99);
        assert_eq!(near.unwrap(), b"abcdabcebc");
        let zeros: Vec<u8> = (0..2100u32).map(|it| it as u8).collect();
        let count = [&[0; 9][..], &[(2100 - 3 - 15 - 8 * 255) as u8]].concat();
        let far = unpacked(&[&count, &zeros, &[0, 0], &END], 3000).unwrap();
        assert_eq!(far[2100..], [51, 52, 53]);
    }

    #[test]
    fn what_reaches_beyond_either_end_is_refused() {
        assert_eq!(unpacked(&[&[17 + 4], b"abcd", &[0x50, 0], &END], 99), None, "before the start");
        assert_eq!(unpacked(&[&[17 + 4], b"abcd", &END], 3), None, "no room");
        assert_eq!(unpacked(&[&[17 + 4], b"ab"], 99), None, "literals cut off");
        assert_eq!(unpacked(&[&[17 + 4], b"abcd"], 99), None, "no end");
        assert_eq!(unpacked(&[&[]], 99), None);
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(input in prop::collection::vec(any::<u8>(), 0..300), room in 0usize..300) {
            if let Some(bytes) = unpacked(&[&input], room) {
                prop_assert!(bytes.len() <= room);
            }
        }
    }
}
