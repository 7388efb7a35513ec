//! Bounds-checked little-endian reads from foreign bytes.

/// Size of a word of the machine, in bytes.
pub const WORD: usize = 8;

/// The `N` bytes at `offset`, or `None` when they do not all exist.
#[must_use]
pub fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

/// The 16-bit word at `offset`.
#[must_use]
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    array(bytes, offset).map(u16::from_le_bytes)
}

/// The 32-bit word at `offset`.
#[must_use]
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    array(bytes, offset).map(u32::from_le_bytes)
}

/// The signed 32-bit word at `offset`.
#[must_use]
pub fn i32_at(bytes: &[u8], offset: usize) -> Option<i32> {
    array(bytes, offset).map(i32::from_le_bytes)
}

/// The 64-bit word at `offset`.
#[must_use]
pub fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    array(bytes, offset).map(u64::from_le_bytes)
}

/// The bytes up to the first zero (all of them when there is none), as text. Bytes that are not
/// UTF-8 become replacement characters.
#[must_use]
pub fn c_string(bytes: &[u8]) -> String {
    let end = memchr::memchr(0, bytes).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
