//! Decompresses fields of journal files. The result is limited, because the container chooses what it is.

use std::io::{self, Read};

use ruzstd::decoding::StreamingDecoder;

use super::file::invalid;

/// systemd's own encoder uses at most as much; what needs more would be held in memory before it is limited.
const MAX_WINDOW_BYTES: u64 = 8 * 1024 * 1024;

/// How a field is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Xz,
    Lz4,
    Zstd,
}

impl Compression {
    /// From the flags of a data object.
    pub(super) fn of(flags: u8) -> Option<Self> {
        match flags & 7 {
            0 => None,
            1 => Some(Self::Xz),
            2 => Some(Self::Lz4),
            _ => Some(Self::Zstd),
        }
    }
}

/// At most `limit` bytes of the original. Only systemd built without LZ4 and Zstandard writes XZ, and no distribution builds it so:
/// such a field is damaged for this reader.
pub(super) fn decompress(
    compression: Compression,
    bytes: &[u8],
    limit: usize,
) -> io::Result<Vec<u8>> {
    match compression {
        Compression::Xz => Err(invalid("a field is compressed with XZ")),
        Compression::Lz4 => lz4(bytes, limit),
        Compression::Zstd => zstd(bytes, limit),
    }
}

/// systemd writes the original size in front of one LZ4 block.
fn lz4(bytes: &[u8], limit: usize) -> io::Result<Vec<u8>> {
    let damaged = || invalid("a field compressed with LZ4 is damaged");
    let (size, block) = bytes.split_first_chunk::<8>().ok_or_else(damaged)?;
    let size = usize::try_from(u64::from_le_bytes(*size)).map_err(|_| damaged())?;
    if size > limit {
        return Err(invalid("a field compressed with LZ4 is too long"));
    }
    lz4_flex::block::decompress(block, size).map_err(|_| damaged())
}

fn zstd(bytes: &[u8], limit: usize) -> io::Result<Vec<u8>> {
    let damaged = |_| invalid("a field compressed with Zstandard is damaged");
    let decoder =
        StreamingDecoder::new_with_max_window_size(bytes, MAX_WINDOW_BYTES).map_err(damaged)?;
    let mut original = Vec::new();
    let limit = u64::try_from(limit).unwrap_or(u64::MAX);
    decoder
        .take(limit)
        .read_to_end(&mut original)
        .map_err(|_| invalid("a field compressed with Zstandard is damaged"))?;
    Ok(original)
}
