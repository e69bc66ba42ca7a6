//! Reads one file of systemd's journal while journald writes it, in the format of systemd's JOURNAL_FILE_FORMAT. The file belongs to a
//! container, which may write anything into it and may truncate it: it is read with positioned reads and never mapped, every offset is
//! checked, and no size that it states is allocated without a limit.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::compression::{self, Compression};
use super::entry::{Entry, Head};

const SIGNATURE: &[u8; 8] = b"LPKSHHRH";
/// The part of the header that every version writes.
const HEADER_BYTES: usize = 208;
/// Bits of the incompatible flags. Another bit means a format that is not known here.
const XZ: u32 = 1;
const LZ4: u32 = 2;
const KEYED_HASH: u32 = 4;
const ZSTD: u32 = 8;
const COMPACT: u32 = 16;
/// The state of a file that journald has finished.
const ARCHIVED: u8 = 2;

const OBJECT_BYTES: usize = 16;
const DATA: u8 = 1;
const ENTRY: u8 = 3;
const ENTRY_ARRAY: u8 = 6;

/// Where the items of an entry begin in its object.
const ENTRY_ITEMS: usize = 64;
/// Where the items of an array of entries begin in its object.
const ARRAY_ITEMS: usize = 24;
/// The most items of one entry that are read; journald accepts 1,024 fields from a client.
const MAX_ITEMS: u64 = 2048;
/// The most of one field that is read, after decompression.
pub(super) const MAX_FIELD_BYTES: usize = 1024 * 1024;
/// The most of all fields of one entry together that is read.
const MAX_ENTRY_BYTES: usize = 4 * 1024 * 1024;
/// The most arrays of entries in one file: each is at least as long as all before it together.
const MAX_ARRAYS: usize = 64;
/// The most entries of one boot that a file may have when it is found.
const MAX_SKIPPED: u64 = 1 << 20;
/// What a field counts for at least.
const MIN_FIELD_BYTES: usize = 512;
/// How much of a data object is read at first: most are shorter.
const FIRST_READ_BYTES: usize = 512;

/// A journal file, and how far it has been read.
#[derive(Debug)]
pub(super) struct JournalFile {
    file: File,
    id: [u8; 16],
    is_compact: bool,
    /// The arrays of entries found so far, in order.
    arrays: Vec<Array>,
    /// The index of the next entry.
    next: u64,
}

/// One array in the chain of entry arrays.
#[derive(Debug, Clone, Copy)]
struct Array {
    offset: u64,
    /// The index of its first entry.
    first: u64,
    capacity: u64,
    following: u64,
}

/// What changes in the header.
#[derive(Debug, Clone, Copy)]
struct Progress {
    entries: u64,
    first_array: u64,
    is_archived: bool,
}

impl JournalFile {
    /// Fails with [`io::ErrorKind::InvalidData`] if it is not a journal file, or has a format that is not known here, and with
    /// [`io::ErrorKind::UnexpectedEof`] if its header is not complete.
    pub(super) fn open(file: File) -> io::Result<Self> {
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0)?;
        let incompatible = u32_at(&header, 12);
        if &header[..8] != SIGNATURE {
            return Err(invalid("it is not a journal file"));
        }
        if incompatible & !(XZ | LZ4 | KEYED_HASH | ZSTD | COMPACT) != 0 {
            return Err(invalid("its format is later than that of systemd 262"));
        }
        Ok(Self {
            file,
            id: id_at(&header, 24),
            is_compact: incompatible & COMPACT != 0,
            arrays: Vec::new(),
            next: 0,
        })
    }

    /// The id of the file, which stays the same when journald renames it.
    pub(super) fn id(&self) -> [u8; 16] {
        self.id
    }

    /// Skips the entries before those that this boot has written last.
    pub(super) fn skip_to_boot(&mut self, boot: [u8; 16]) -> io::Result<()> {
        let entries = self.progress()?.entries;
        let mut index = entries;
        while index > 0 {
            if entries - index > MAX_SKIPPED {
                return Err(invalid("it has too many entries of this boot"));
            }
            match self.offset(index - 1)?.map(|offset| self.head_at(offset)) {
                Some(Ok(head)) if head.boot == boot => index -= 1,
                _ => break,
            }
        }
        self.next = index;
        Ok(())
    }

    /// The next entry that journald has written completely; `None` if there is none yet. A damaged one is skipped.
    pub(super) fn peek(&mut self) -> io::Result<Option<Head>> {
        let entries = self.progress()?.entries;
        let end = entries.min(self.next.saturating_add(MAX_ITEMS));
        while self.next < end {
            let Some(offset) = self.offset(self.next)? else {
                return Ok(None);
            };
            match self.head_at(offset) {
                Ok(head) => return Ok(Some(head)),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => self.next += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Moves on to the entry after the one that [`Self::peek`] has returned.
    pub(super) fn advance(&mut self) {
        self.next += 1;
    }

    /// The fields of an entry. Those that are damaged are missing.
    pub(super) fn read(&self, head: &Head) -> io::Result<Entry> {
        let width = if self.is_compact { 4 } else { 16 };
        let items = (head.size.saturating_sub(ENTRY_ITEMS as u64) / width).min(MAX_ITEMS);
        let length = usize::try_from(items * width).map_err(io::Error::other)?;
        let mut table = vec![0; length];
        self.file
            .read_exact_at(&mut table, head.offset + ENTRY_ITEMS as u64)?;
        let mut entry = Entry::of(head);
        let mut left = MAX_ENTRY_BYTES;
        for item in table.chunks_exact(if self.is_compact { 4 } else { 16 }) {
            if left == 0 {
                break;
            }
            let offset = self.item(item);
            match self.data(offset, left.min(MAX_FIELD_BYTES)) {
                Ok(field) => {
                    left = left.saturating_sub(field.len().max(MIN_FIELD_BYTES));
                    entry.add(&field);
                }
                // It has cost as much as a long one.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    left = left.saturating_sub(MAX_FIELD_BYTES);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(entry)
    }

    /// Whether nothing can follow: journald has finished the file, or it has been deleted, and all entries have been read.
    pub(super) fn is_done(&mut self) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let progress = self.progress()?;
        let is_final = progress.is_archived || self.file.metadata()?.nlink() == 0;
        Ok(is_final && self.next >= progress.entries)
    }

    fn progress(&self) -> io::Result<Progress> {
        let mut header = [0; HEADER_BYTES];
        self.file
            .read_exact_at(&mut header, 0)
            .map_err(|_| invalid("it has been truncated"))?;
        Ok(Progress {
            entries: u64_at(&header, 152),
            first_array: u64_at(&header, 176),
            is_archived: header[16] == ARCHIVED,
        })
    }

    /// The offset of the entry with this index; `None` if it is not in the arrays yet.
    fn offset(&mut self, index: u64) -> io::Result<Option<u64>> {
        let Some(array) = self.array_of(index)? else {
            return Ok(None);
        };
        let width: usize = if self.is_compact { 4 } else { 8 };
        let mut item = [0; 8];
        let at = array.offset + ARRAY_ITEMS as u64 + (index - array.first) * width as u64;
        self.file.read_exact_at(&mut item[..width], at)?;
        let offset = self.item(&item[..width]);
        Ok((offset != 0).then_some(offset))
    }

    /// The array that holds the entry with this index. The offsets of a chain increase, so no chain is endless.
    fn array_of(&mut self, index: u64) -> io::Result<Option<Array>> {
        loop {
            let last = self.arrays.last().copied();
            if let Some(last) = last
                && index < last.first + last.capacity
            {
                let at = self.arrays.partition_point(|array| array.first <= index);
                return Ok(at.checked_sub(1).map(|at| self.arrays[at]));
            }
            let (first, offset, before) = match last {
                None => (0, self.progress()?.first_array, 0),
                Some(last) => (last.first + last.capacity, self.link(&last)?, last.offset),
            };
            if offset == 0 {
                return Ok(None);
            }
            if self.arrays.len() >= MAX_ARRAYS {
                return Err(invalid("it has too many arrays of entries"));
            }
            if offset <= before {
                return Err(invalid("its arrays of entries are not in order"));
            }
            let array = self.array_at(offset, first)?;
            self.arrays.push(array);
        }
    }

    /// The array after this one, which may have been added since it was read.
    fn link(&self, array: &Array) -> io::Result<u64> {
        match array.following {
            0 => Ok(self.array_at(array.offset, array.first)?.following),
            following => Ok(following),
        }
    }

    fn array_at(&self, offset: u64, first: u64) -> io::Result<Array> {
        let mut object = [0; ARRAY_ITEMS];
        let size = self.object(offset, ENTRY_ARRAY, &mut object)?.size;
        let width = if self.is_compact { 4 } else { 8 };
        let capacity = size.saturating_sub(ARRAY_ITEMS as u64) / width;
        if capacity == 0 || first.checked_add(capacity).is_none() {
            return Err(invalid("an array of entries has no valid size"));
        }
        Ok(Array {
            offset,
            first,
            capacity,
            following: u64_at(&object, 16),
        })
    }

    fn head_at(&self, offset: u64) -> io::Result<Head> {
        let mut object = [0; ENTRY_ITEMS];
        let size = self.object(offset, ENTRY, &mut object)?.size;
        Ok(Head {
            offset,
            size,
            seqnum: u64_at(&object, 16),
            realtime: u64_at(&object, 24),
            monotonic: u64_at(&object, 32),
            boot: id_at(&object, 40),
        })
    }

    /// A field, `NAME=value`, of at most `limit` bytes.
    fn data(&self, offset: u64, limit: usize) -> io::Result<Vec<u8>> {
        let start = if self.is_compact { 72 } else { 64 };
        let mut first = [0; FIRST_READ_BYTES];
        let read = self.read_up_to(&mut first, offset)?;
        let object = Object::of(&first[..read], offset, DATA)?;
        let length = object
            .size
            .checked_sub(start)
            .ok_or_else(|| invalid("a field is too short"))?;
        // What is compressed is not longer than what it stands for.
        let length = usize::try_from(length).map_or(limit, |length| length.min(limit));
        let start = usize::try_from(start).map_err(io::Error::other)?;
        let end = start + length;
        let payload = match first[..read].get(start..end) {
            Some(payload) => payload.to_vec(),
            None => {
                let mut payload = vec![0; length];
                self.file
                    .read_exact_at(&mut payload, offset + start as u64)
                    .map_err(|_| invalid("a field is longer than the file"))?;
                payload
            }
        };
        match Compression::of(object.flags) {
            None => Ok(payload),
            Some(compression) => compression::decompress(compression, &payload, limit),
        }
    }

    /// Reads the beginning of an object of this type.
    fn object(&self, offset: u64, kind: u8, into: &mut [u8]) -> io::Result<Object> {
        let read = self.read_up_to(into, offset)?;
        if read < into.len() {
            return Err(invalid("an object is longer than the file"));
        }
        Object::of(into, offset, kind)
    }

    fn read_up_to(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        if i64::try_from(offset).map_or(true, |offset| offset > i64::MAX / 2) {
            return Err(invalid("an object is outside of the file"));
        }
        let mut read = 0;
        while read < into.len() {
            match self.file.read_at(&mut into[read..], offset + read as u64) {
                Ok(0) => break,
                Ok(more) => read += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(read)
    }

    /// The offset in an item of an entry or of an array.
    fn item(&self, item: &[u8]) -> u64 {
        match self.is_compact {
            true => u64::from(u32_at(item, 0)),
            false => u64_at(item, 0),
        }
    }
}

/// The header of an object.
#[derive(Debug, Clone, Copy)]
struct Object {
    flags: u8,
    size: u64,
}

impl Object {
    fn of(bytes: &[u8], offset: u64, kind: u8) -> io::Result<Self> {
        let header = bytes
            .get(..OBJECT_BYTES)
            .ok_or_else(|| invalid("an object is outside of the file"))?;
        let size = u64_at(header, 8);
        if header[0] != kind || !offset.is_multiple_of(8) || offset < HEADER_BYTES as u64 {
            return Err(invalid("an object is not of the type that leads to it"));
        }
        if size < OBJECT_BYTES as u64 || offset.checked_add(size).is_none() {
            return Err(invalid("an object has no valid size"));
        }
        Ok(Self {
            flags: header[1],
            size,
        })
    }
}

pub(super) fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

fn id_at(bytes: &[u8], at: usize) -> [u8; 16] {
    let mut id = [0; 16];
    id.copy_from_slice(&bytes[at..at + 16]);
    id
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
