//! Makes journal files as journald does, for tests.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub(super) const BOOT: [u8; 16] = [0xb0; 16];
pub(super) const OTHER_BOOT: [u8; 16] = [0x0b; 16];
const HEADER_BYTES: usize = 272;
/// How many entries the first array holds; each further one holds twice as many.
const FIRST_CAPACITY: u64 = 2;

/// A journal file that entries are appended to.
pub(super) struct JournalWriter {
    path: PathBuf,
    is_compact: bool,
    end: u64,
    entries: u64,
    arrays: Vec<(u64, u64)>,
}

impl JournalWriter {
    pub(super) fn create(path: &Path, id: u8, is_compact: bool) -> Self {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, [0; HEADER_BYTES]).unwrap();
        let writer = Self {
            path: path.to_owned(),
            is_compact,
            end: HEADER_BYTES as u64,
            entries: 0,
            arrays: Vec::new(),
        };
        let flags: u32 = 4 | 8 | if is_compact { 16 } else { 0 };
        writer.put(24, &[id; 16]);
        writer.put(88, &(HEADER_BYTES as u64).to_le_bytes());
        writer.put(12, &flags.to_le_bytes());
        writer.put(0, b"LPKSHHRH");
        writer
    }

    /// Writes over a part of the file.
    pub(super) fn put(&self, at: u64, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).open(&self.path).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }

    /// Marks the file as finished and renames it.
    pub(super) fn archive(self, name: &str) {
        self.put(16, &[2]);
        fs::rename(&self.path, self.path.with_file_name(name)).unwrap();
    }

    /// Appends an entry. Returns its offset.
    pub(super) fn entry(&mut self, boot: [u8; 16], monotonic: u64, fields: &[&[u8]]) -> u64 {
        let fields: Vec<(u8, Vec<u8>)> = fields.iter().map(|field| (0, field.to_vec())).collect();
        self.entry_of(boot, monotonic, &fields)
    }

    /// The same with fields that have the flags of a compression.
    pub(super) fn entry_of(
        &mut self,
        boot: [u8; 16],
        monotonic: u64,
        fields: &[(u8, Vec<u8>)],
    ) -> u64 {
        let mut items = Vec::new();
        for (flags, field) in fields {
            let mut body = vec![0; if self.is_compact { 56 } else { 48 }];
            body.extend_from_slice(field);
            let offset = self.object(1, *flags, &body);
            match self.is_compact {
                true => items.extend(u32::try_from(offset).unwrap().to_le_bytes()),
                false => items.extend([offset.to_le_bytes(), [0; 8]].concat()),
            }
        }
        let mut body = Vec::new();
        for number in [
            self.entries + 1,
            1_700_000_000_000_000 + monotonic,
            monotonic,
        ] {
            body.extend(number.to_le_bytes());
        }
        body.extend(boot);
        body.extend([0; 8]);
        body.extend(items);
        let offset = self.object(3, 0, &body);
        self.link(offset);
        offset
    }

    fn link(&mut self, entry: u64) {
        let width = if self.is_compact { 4 } else { 8 };
        let capacity: u64 = self.arrays.iter().map(|(_, capacity)| capacity).sum();
        if self.entries == capacity {
            let capacity = self
                .arrays
                .last()
                .map_or(FIRST_CAPACITY, |(_, last)| last * 2);
            let body = vec![0; usize::try_from(8 + capacity * width).unwrap()];
            let offset = self.object(6, 0, &body);
            let link = self.arrays.last().map_or(176, |(last, _)| last + 16);
            self.put(link, &offset.to_le_bytes());
            self.arrays.push((offset, capacity));
        }
        let (offset, capacity) = *self.arrays.last().unwrap();
        let before: u64 = self
            .arrays
            .iter()
            .map(|(_, capacity)| capacity)
            .sum::<u64>()
            - capacity;
        let at = offset + 24 + (self.entries - before) * width;
        self.put(at, &entry.to_le_bytes()[..usize::try_from(width).unwrap()]);
        self.entries += 1;
        self.put(152, &self.entries.to_le_bytes());
    }

    fn object(&mut self, kind: u8, flags: u8, body: &[u8]) -> u64 {
        let offset = self.end;
        let size = 16 + body.len() as u64;
        let mut object = vec![kind, flags, 0, 0, 0, 0, 0, 0];
        object.extend(size.to_le_bytes());
        object.extend(body);
        self.put(offset, &object);
        self.end = (offset + size).next_multiple_of(8);
        offset
    }
}
