use std::path::Path;

use proptest::prelude::*;
use rstest::rstest;

use super::super::testing::{BOOT, JournalWriter, OTHER_BOOT};
use super::*;

fn open(path: &Path) -> JournalFile {
    JournalFile::open(File::open(path).unwrap()).unwrap()
}

/// The messages that have not been read.
fn messages(file: &mut JournalFile) -> Vec<String> {
    std::iter::from_fn(|| {
        let head = file.peek().unwrap()?;
        file.advance();
        let entry = file.read(&head).unwrap();
        Some(entry.text("MESSAGE").unwrap_or("none").to_owned())
    })
    .collect()
}

#[rstest]
fn entries_are_read_as_they_are_written(#[values(false, true)] is_compact: bool) {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("system.journal");
    let mut writer = JournalWriter::create(&path, 1, is_compact);
    let mut file = open(&path);
    assert_eq!(messages(&mut file), Vec::<String>::new());
    let mut expected = Vec::new();
    for number in 0..40 {
        let message = format!("{number} {}", "x".repeat(number * 50));
        writer.entry(BOOT, 1, &[format!("MESSAGE={message}").as_bytes(), b"A=1"]);
        expected.push(message);
        if number % 3 == 0 {
            assert_eq!(messages(&mut file), std::mem::take(&mut expected));
        }
    }
    assert_eq!(messages(&mut file), expected);
    assert!(!file.is_done().unwrap());
    writer.archive("system@1.journal");
    assert!(file.is_done().unwrap());
}

#[rstest]
fn entries_of_earlier_boots_are_skipped(#[values(false, true)] is_compact: bool) {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("system.journal");
    let mut writer = JournalWriter::create(&path, 1, is_compact);
    for number in 0..9 {
        writer.entry(OTHER_BOOT, number, &[b"MESSAGE=old"]);
    }
    let mut file = open(&path);
    file.skip_to_boot(BOOT).unwrap();
    assert_eq!(messages(&mut file), Vec::<String>::new());
    writer.entry(BOOT, 9, &[b"MESSAGE=new"]);
    writer.entry(BOOT, 10, &[b"MESSAGE=newer"]);
    assert_eq!(messages(&mut file), ["new", "newer"]);
    let mut again = open(&path);
    again.skip_to_boot(BOOT).unwrap();
    assert_eq!(messages(&mut again), ["new", "newer"]);
}

#[test]
fn compressed_fields_are_read() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("system.journal");
    let mut writer = JournalWriter::create(&path, 1, true);
    let text = format!("MESSAGE={}", "abc".repeat(1000));
    let block = lz4_flex::block::compress(text.as_bytes());
    let lz4 = [(text.len() as u64).to_le_bytes().to_vec(), block].concat();
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let zstd = ruzstd::encoding::compress_to_vec(text.as_bytes(), level);
    writer.entry_of(BOOT, 1, &[(2, lz4)]);
    writer.entry_of(BOOT, 2, &[(4, zstd)]);
    writer.entry_of(
        BOOT,
        3,
        &[(1, b"xz".to_vec()), (0, b"MESSAGE=plain".to_vec())],
    );
    writer.entry_of(BOOT, 4, &[(4, b"damaged".to_vec())]);
    let expected = "abc".repeat(1000);
    assert_eq!(
        messages(&mut open(&path)),
        [expected.as_str(), &expected, "plain", "none"]
    );
}

#[test]
fn what_decompresses_to_too_much_is_cut_off_or_left_out() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("system.journal");
    let mut writer = JournalWriter::create(&path, 1, true);
    let text = [b"MESSAGE=".to_vec(), vec![b'x'; 3 * MAX_FIELD_BYTES]].concat();
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let zstd = ruzstd::encoding::compress_to_vec(&text[..], level);
    let block = lz4_flex::block::compress(&text);
    let lz4 = [(text.len() as u64).to_le_bytes().to_vec(), block].concat();
    writer.entry_of(BOOT, 1, &[(4, zstd), (2, lz4)]);
    let mut file = open(&path);
    let head = file.peek().unwrap().unwrap();
    let entry = file.read(&head).unwrap();
    let lengths: Vec<usize> = entry
        .fields()
        .iter()
        .map(|(_, value)| value.len())
        .collect();
    assert_eq!(lengths, [MAX_FIELD_BYTES - "MESSAGE=".len()]);
}

#[test]
fn a_damaged_entry_is_skipped() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("system.journal");
    let mut writer = JournalWriter::create(&path, 1, false);
    writer.entry(BOOT, 1, &[b"MESSAGE=a"]);
    let damaged = writer.entry(BOOT, 2, &[b"MESSAGE=b"]);
    writer.entry(BOOT, 3, &[b"MESSAGE=c"]);
    writer.put(damaged, &[9]);
    assert_eq!(messages(&mut open(&path)), ["a", "c"]);
}

#[test]
fn arrays_that_lead_back_are_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("system.journal");
    let mut writer = JournalWriter::create(&path, 1, false);
    for number in 0..2 {
        writer.entry(BOOT, number, &[b"MESSAGE=a"]);
    }
    let mut header = [0; 8];
    File::open(&path)
        .unwrap()
        .read_exact_at(&mut header, 176)
        .unwrap();
    let first = u64::from_le_bytes(header);
    writer.put(first + 16, &first.to_le_bytes());
    writer.put(152, &u64::MAX.to_le_bytes());
    let mut file = open(&path);
    for _ in 0..2 {
        file.peek().unwrap().unwrap();
        file.advance();
    }
    let error = file.peek().unwrap_err().to_string();
    assert_eq!(error, "its arrays of entries are not in order");
}

#[rstest]
#[case(b"", io::ErrorKind::UnexpectedEof)]
#[case(&[0; 300], io::ErrorKind::InvalidData)]
fn another_file_is_no_journal(#[case] content: &[u8], #[case] expected: io::ErrorKind) {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("system.journal");
    std::fs::write(&path, content).unwrap();
    let error = JournalFile::open(File::open(&path).unwrap()).unwrap_err();
    assert_eq!(error.kind(), expected);
}

#[test]
fn a_later_format_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("system.journal");
    JournalWriter::create(&path, 1, true).put(12, &[64]);
    let error = JournalFile::open(File::open(&path).unwrap()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "its format is later than that of systemd 262"
    );
}

proptest! {
    /// Reading ends, without a panic, whatever the container writes over its files.
    #[test]
    fn no_content_panics(
        is_compact: bool,
        changes in proptest::collection::vec((0..2000u64, any::<[u8; 8]>()), 1..20),
        end in proptest::option::of(0..2000u64),
    ) {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("system.journal");
        let mut writer = JournalWriter::create(&path, 1, is_compact);
        for number in 0..7 {
            writer.entry(BOOT, number, &[b"MESSAGE=a", b"B=2"]);
        }
        for (at, bytes) in changes {
            writer.put(at, &bytes);
        }
        if let Some(end) = end {
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.set_len(end).unwrap();
        }
        if let Ok(mut file) = JournalFile::open(File::open(&path).unwrap()) {
            let _ = file.skip_to_boot(BOOT);
            for _ in 0..100 {
                let Ok(Some(head)) = file.peek() else { break };
                let _ = file.read(&head);
                file.advance();
            }
        }
    }
}
