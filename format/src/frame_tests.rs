use super::*;
use std::vec;
use std::vec::Vec;

const HEADER: Header = Header {
    kind: Kind::Want,
    encoding: Encoding::Plain,
    stream: 0x0403_0201,
    sequence: 5,
    count: 8,
    offset: 0,
};

fn wire(header: &Header, content: &[u8]) -> Vec<u8> {
    let mut wire = vec![0xee; MAX_WIRE];
    let size = encode(header, content, &mut wire).unwrap();
    wire.truncate(size);
    wire
}

type Frames = Vec<(Header, Vec<u8>)>;

/// What the decoder makes of `bytes`: frames, damage, and the text in one piece.
fn decode(bytes: &[u8]) -> (Frames, Vec<usize>, Vec<u8>) {
    let mut decoder = Decoder::<{ MAX_WIRE }>::new();
    let (mut frames, mut damaged, mut text) = (vec![], vec![], vec![]);
    for &byte in bytes {
        match decoder.push(byte) {
            Some(Event::Frame(header, content)) => frames.push((header, content.to_vec())),
            Some(Event::Damaged(size)) => damaged.push(size),
            Some(Event::Text(bytes)) => text.extend_from_slice(bytes),
            None => {}
        }
    }
    (frames, damaged, text)
}

#[test]
fn frame_lies_as_docs_format_md_says() {
    let run = Run::new(0x0002, 0x0103);
    assert_eq!(run.as_bytes(), [3, 1, 2, 0, 0, 0, 0, 0]);
    assert_eq!(wire(&HEADER, run.as_bytes()), GOLDEN);
}

/// The frame of docs/format.md's example, made by hand from the rules there.
#[rustfmt::skip]
const GOLDEN: [u8; 39] = [
    0x00, 0x04, 0xf5, 0xf8, 0x11, 0x06, 0x01, 0x02, 0x03, 0x04, 0x05, 0x01,
    0x01, 0x02, 0x08, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01,
    0x01, 0x04, 0x03, 0x01, 0x02, 0x01, 0x01, 0x01, 0x01, 0x05, 0x45, 0x98,
    0xf9, 0x27, 0x00,
];

#[test]
fn contents_lie_as_docs_format_md_says() {
    let begin = Begin {
        version: 1.into(),
        machine: 62.into(),
        extent: Extent::Full as u8,
        reserved: [0; 3],
        head_size: 3.into(),
        core_size: 4.into(),
        expected_blocks: 5.into(),
        payload: [b'p'; 64],
    };
    let bytes = begin.as_bytes();
    assert_eq!(bytes.len(), 96);
    assert_eq!(bytes[..8], [1, 0, 62, 0, 2, 0, 0, 0]);
    assert_eq!((bytes[8], bytes[16], bytes[24], bytes[32]), (3, 4, 5, b'p'));

    let plan = Plan { stage: Stage::Text as u8, is_last_of_stage: 1, reserved: [0; 6] };
    assert_eq!(plan.as_bytes(), [7, 1, 0, 0, 0, 0, 0, 0]);

    let end = End {
        complete: 1.into(),
        plans: 2.into(),
        head_crc: 3.into(),
        reserved: 0.into(),
        pages_read: 4.into(),
        pages_unreadable: 5.into(),
    };
    let bytes = end.as_bytes();
    assert_eq!(bytes.len(), 32);
    assert_eq!([0, 4, 8, 12, 16, 24].map(|at| bytes[at]), [1, 2, 3, 0, 4, 5]);
}

#[test]
fn frames_and_text_share_a_line() {
    let frame = wire(&HEADER, Run::new(7, 1).as_bytes());
    let mut line = b"[  1.2] panic\r\n".to_vec();
    line.extend(&frame);
    line.extend(&frame);
    line.extend(b"x\0yz\0more text\r\n");
    line.extend(&frame);
    let (frames, damaged, text) = decode(&line);
    assert_eq!((frames.len(), damaged.len()), (3, 0));
    assert_eq!(frames[0], (HEADER, Run::new(7, 1).as_bytes().to_vec()));
    assert_eq!(text, b"[  1.2] panic\r\nxyzmore text\r\n");
}

#[test]
fn any_bit_that_flips_costs_one_frame_and_no_other() {
    let frame = wire(&HEADER, Run::new(7, 1).as_bytes());
    for bit in 0..frame.len() * 8 {
        let mut damaged = frame.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let mut line = frame.clone();
        line.extend(&damaged);
        line.extend(&frame);
        let (frames, ..) = decode(&line);
        assert!(frames.iter().all(|(header, content)| {
            (header, content.as_slice()) == (&HEADER, Run::new(7, 1).as_bytes())
        }));
        assert_eq!(frames.len(), 2, "bit {bit}");
    }
}

#[test]
fn frame_that_is_cut_off_costs_only_itself() {
    let frame = wire(&HEADER, Run::new(7, 1).as_bytes());
    for end in 1..frame.len() - 1 {
        let mut line = frame[..end].to_vec();
        line.extend(&frame);
        assert_eq!(decode(&line).0.len(), 1, "cut at {end}");
    }
}

#[test]
fn longest_frame_fits_and_a_longer_one_is_damaged() {
    let content: Vec<u8> = (0..MAX_CONTENT).map(|index| (index * 7 % 255) as u8 + 1).collect();
    let header = Header { kind: Kind::Blocks, count: MAX_BLOCKS as u32, ..HEADER };
    let frame = wire(&header, &content);
    assert_eq!(decode(&frame).0, [(header, content)]);

    let mut long = frame.clone();
    long.splice(100..100, vec![1; 200]);
    long.extend(&frame);
    let (frames, damaged, _) = decode(&long);
    assert_eq!((frames.len(), damaged.len()), (1, 1));
}

#[test]
fn header_that_contradicts_its_content_is_no_frame() {
    let blocks = Header { kind: Kind::Blocks, encoding: Encoding::Zeros, count: 9, ..HEADER };
    assert_eq!(decode(&wire(&blocks, b"")).0.len(), 1);
    for (wrong, content) in [
        (blocks, &b"x"[..]),
        (Header { count: 0, ..blocks }, b""),
        (Header { offset: 1, ..blocks }, b""),
        (Header { offset: u64::MAX - 4095, count: 2, ..blocks }, b""),
        (Header { encoding: Encoding::Plain, count: 1, ..blocks }, b"too short"),
        (Header { encoding: Encoding::Deflate, count: 5, ..blocks }, b""),
        (Header { encoding: Encoding::Zeros, ..HEADER }, b""),
        (Header { count: 9, ..HEADER }, b"12345678"),
    ] {
        let (frames, damaged, _) = decode(&wire(&wrong, content));
        assert_eq!((frames.len(), damaged.len()), (0, 1), "{wrong:?}");
    }
}
