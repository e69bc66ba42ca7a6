//! Lines of the console of a booted container: without what only a terminal understands, and sorted into what the journal repeats and what
//! only the console has. The bytes are the container's own.

use std::collections::VecDeque;

/// A longer line is cut into lines of this length.
const MAX_LINE_BYTES: usize = 8 * 1024;
/// How many lines are kept in case that the journal ends before them.
const MAX_KEPT: usize = 64;

/// The console of one container.
#[derive(Debug, Default)]
pub(super) struct ConsoleLines {
    unfinished: Vec<u8>,
    /// What the journal repeats if it is written for long enough, and when it was read, in microseconds.
    kept: VecDeque<(u64, Vec<u8>)>,
}

impl ConsoleLines {
    /// The lines that these bytes complete, each with its end.
    pub(super) fn lines_of(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut lines = Vec::new();
        for byte in bytes {
            if *byte != b'\n' {
                self.unfinished.push(*byte);
            }
            if *byte == b'\n' || self.unfinished.len() >= MAX_LINE_BYTES {
                lines.extend(self.take_line());
            }
        }
        lines
    }

    /// What is left without the end of a line.
    pub(super) fn take_line(&mut self) -> Option<Vec<u8>> {
        let line = std::mem::take(&mut self.unfinished);
        let mut line = plain(&line);
        line.push(b'\n');
        (line.len() > 1).then_some(line)
    }

    /// Keeps a line that the journal repeats, read at this time.
    pub(super) fn keep(&mut self, line: Vec<u8>, now: u64) {
        if self.kept.len() == MAX_KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back((now, line));
    }

    /// The kept lines that were read after the last entry of the journal: it does not repeat them.
    pub(super) fn take_kept_after(&mut self, last: u64) -> Vec<Vec<u8>> {
        let kept = std::mem::take(&mut self.kept);
        let late = kept.into_iter().filter(|(time, _)| *time > last);
        late.map(|(_, line)| line).collect()
    }
}

/// Whether it is a line of systemd about the state of a unit, which it writes to the journal too.
pub(super) fn is_unit_status(line: &[u8]) -> bool {
    const RESULTS: [&[u8]; 6] = [
        b"  OK  ", b"FAILED", b"DEPEND", b" INFO ", b" TIME ", b" SKIP ",
    ];
    const BEGUN: &[u8] = b"         ";
    match line {
        [b'[', result @ .., b'\n'] => {
            let Some((result, rest)) = result.split_at_checked(6) else {
                return false;
            };
            let is_progress =
                result.contains(&b'*') && result.iter().all(|byte| b" *".contains(byte));
            rest.starts_with(b"] ") && (is_progress || RESULTS.contains(&result))
        }
        line => line
            .strip_prefix(BEGUN)
            .is_some_and(|rest| rest.first().is_some_and(u8::is_ascii_uppercase)),
    }
}

/// The text that a terminal would show: without escape sequences and other control characters, and only what follows the last carriage return
/// before the end.
fn plain(line: &[u8]) -> Vec<u8> {
    let mut shown: Vec<u8> = Vec::new();
    let mut returned = false;
    let mut bytes = line.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\r' => returned = true,
            0x1b => skip_escape(&mut bytes),
            b'\t' | b' '.. if byte != 0x7f => {
                if std::mem::take(&mut returned) {
                    shown.clear();
                }
                shown.push(byte);
            }
            _ => {}
        }
    }
    shown.truncate(shown.trim_ascii_end().len());
    shown
}

/// Skips the rest of an escape sequence of ECMA-48.
fn skip_escape(bytes: &mut std::iter::Peekable<impl Iterator<Item = u8>>) {
    match bytes.next() {
        // Control sequence: ends with a byte from @ to ~.
        Some(b'[') => {
            for byte in bytes.by_ref() {
                if (b'@'..=b'~').contains(&byte) {
                    break;
                }
            }
        }
        // Strings, such as the title of the window: end with BEL or ESC \.
        Some(b']' | b'P' | b'X' | b'^' | b'_') => {
            while let Some(byte) = bytes.next() {
                if byte == 0x07 {
                    break;
                }
                if byte == 0x1b {
                    bytes.next_if_eq(&b'\\');
                    break;
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(b"\x1b[0;1;31m!!!!!!\x1b[0m] Failed\r\r", "!!!!!!] Failed")]
    #[case(b"\x1b]0;title\x07text", "text")]
    #[case(b"\x1b]3008;start=1\x1b\\text\x1b[K", "text")]
    #[case(b"[ *** ] job (1s)\r[  OK  ] done\r", "[  OK  ] done")]
    #[case(b"a\tb\x01\x7f  ", "a\tb")]
    #[case(b"\x1b", "")]
    #[case("f\u{fc}r\u{2026}".as_bytes(), "f\u{fc}r\u{2026}")]
    fn only_text_is_left(#[case] line: &[u8], #[case] expected: &str) {
        assert_eq!(String::from_utf8(plain(line)).unwrap(), expected);
    }

    #[rstest]
    #[case("[  OK  ] Started foo.service.", true)]
    #[case("[FAILED] Failed to start foo.service.", true)]
    #[case("[DEPEND] Dependency failed for foo.", true)]
    #[case("[ ***  ] Job foo/start running (3s / no limit)", true)]
    #[case("         Starting foo.service...", true)]
    #[case("[!!!!!!] Failed to allocate manager object.", false)]
    #[case("Powering off.", false)]
    #[case("[      ] x", false)]
    #[case("[foo] bar", false)]
    #[case("    four", false)]
    fn lines_about_units_are_known(#[case] line: &str, #[case] expected: bool) {
        assert_eq!(is_unit_status(format!("{line}\n").as_bytes()), expected);
    }

    #[test]
    fn lines_come_in_pieces() {
        let mut console = ConsoleLines::default();
        assert_eq!(console.lines_of(b"a"), Vec::<Vec<u8>>::new());
        assert_eq!(console.lines_of(b"b\r\n\r\n\nc"), [b"ab\n"]);
        assert_eq!(console.take_line(), Some(b"c\n".to_vec()));
        assert_eq!(console.take_line(), None);
        let long = vec![b'x'; MAX_LINE_BYTES + 1];
        assert_eq!(console.lines_of(&long)[0].len(), MAX_LINE_BYTES + 1);
    }

    #[test]
    fn only_lines_after_the_last_entry_are_missing_in_the_journal() {
        let mut console = ConsoleLines::default();
        for time in 0..100 {
            console.keep(format!("{time}\n").into_bytes(), time);
        }
        assert_eq!(console.take_kept_after(97), [b"98\n", b"99\n"]);
        assert_eq!(console.take_kept_after(0), Vec::<Vec<u8>>::new());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for line in ConsoleLines::default().lines_of(&bytes) {
                is_unit_status(&line);
                prop_assert!(!line.contains(&0x1b));
            }
        }
    }
}
