//! The decoder of the serial stream on foreign bytes: what comes out of it is no more than what went in, and
//! a frame that it takes is encoded to one that it takes as the same.

#![no_main]

use format::frame::{Decoder, Event, MAX_WIRE, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut decoder = Box::new(Decoder::<MAX_WIRE>::new());
    let mut came = 0;
    for &byte in bytes {
        match decoder.push(byte) {
            None => {}
            Some(Event::Text(text)) => came += text.len(),
            Some(Event::Damaged(size)) => came += size,
            Some(Event::Frame(header, content)) => {
                came += content.len();
                let mut wire = vec![0; MAX_WIRE];
                let size =
                    encode(&header, content, &mut wire).expect("there is room for any frame");
                let mut again = Box::new(Decoder::<MAX_WIRE>::new());
                let (last, all_but_last) = wire[..size].split_last().expect("not empty");
                assert!(all_but_last.iter().all(|&byte| again.push(byte).is_none()));
                assert_eq!(again.push(*last), Some(Event::Frame(header, content)));
            }
        }
        assert!(came <= bytes.len());
    }
});
