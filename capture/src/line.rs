//! A serial line, as the sender of the dump sees it.

/// A line that takes bytes in order, and may bring some.
pub trait Line {
    /// Sends all of `bytes`, and takes in what arrives meanwhile. Returns false when the line does not
    /// take them: it is broken for good then.
    fn send(&mut self, bytes: &[u8]) -> bool;

    /// The next byte that arrived, without waiting for one.
    fn receive(&mut self) -> Option<u8>;
}
