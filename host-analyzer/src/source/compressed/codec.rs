//! How the bytes of a page are packed.

use std::iter;

use ruzstd::decoding::FrameDecoder;

use super::lzo;

/// A page's flags (makedumpfile 1.7.2, diskdump_mod.h: DUMP_DH_COMPRESSED_ZLIB and so on).
const ZLIB: u32 = 1;
const LZO: u32 = 2;
const SNAPPY: u32 = 4;
const ZSTD: u32 = 0x20;

/// How much a frame of zstd may ask to look back, in bytes. Pages need no more than their size.
const MAX_WINDOW: u64 = 1 << 20;

/// The `size` bytes of a page that is packed as its flags say; `None` when they are not that many or
/// cannot be unpacked.
pub(super) fn unpack(flags: u32, packed: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut page = vec![0; size];
    let found = match flags & (ZLIB | LZO | SNAPPY | ZSTD) {
        0 => {
            page = packed.to_vec();
            packed.len()
        }
        ZLIB => {
            let input = iter::once(packed);
            miniz_oxide::inflate::decompress_slice_iter_to_slice(&mut page, input, true, false)
                .ok()?
        }
        LZO => lzo::decompress(packed, &mut page)?,
        // Refuses what does not fit.
        SNAPPY => snap::raw::Decoder::new().decompress(packed, &mut page).ok()?,
        ZSTD => {
            let mut decoder = FrameDecoder::new();
            decoder.set_max_window_size(MAX_WINDOW);
            decoder.decode_all(packed, &mut page).ok()?
        }
        _ => return None,
    };
    (found == size).then_some(page)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    /// `page` packed as `flags` say. LZO: as literals.
    pub fn pack(flags: u32, page: &[u8]) -> Vec<u8> {
        match flags {
            ZLIB => miniz_oxide::deflate::compress_to_vec_zlib(page, 1),
            LZO => {
                let more = page.len() - 3 - 15 - 1;
                let mut packed = vec![0; 1 + more / 255];
                packed.push((more % 255 + 1) as u8);
                packed.extend_from_slice(page);
                packed.extend([0x11, 0, 0]);
                packed
            }
            SNAPPY => snap::raw::Encoder::new().compress_vec(page).unwrap(),
            ZSTD => compress_to_vec(page, CompressionLevel::Fastest),
            _ => page.to_vec(),
        }
    }

    pub const ALL: [u32; 5] = [0, ZLIB, LZO, SNAPPY, ZSTD];

    #[test]
    fn every_codec_gives_back_the_page() {
        let page: Vec<u8> = (0..4096u32).map(|it| ((it * it) >> 5) as u8).collect();
        for flags in ALL {
            let packed = pack(flags, &page);
            assert_eq!(unpack(flags, &packed, 4096).as_deref(), Some(&page[..]), "{flags}");
            assert_eq!(unpack(flags, &packed, 4095), None, "{flags}: too long");
            assert_eq!(unpack(flags, &packed, 8192), None, "{flags}: too short");
        }
        assert_eq!(unpack(ZLIB | LZO, &page, 4096), None, "two at once");
    }

    proptest! {
        #[test]
        fn damaged_pages_never_panic(at: usize, value: u8, cut in 0usize..200, seed: u32) {
            let page: Vec<u8> = (0..4096u32).map(|it| ((it * it) >> (seed % 9)) as u8).collect();
            for flags in ALL {
                let mut packed = pack(flags, &page);
                let at = at % packed.len();
                packed[at] = value;
                packed.truncate(packed.len().saturating_sub(cut));
                let _ = unpack(flags, &packed, 4096);
            }
        }
    }
}
