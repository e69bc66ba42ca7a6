//! The resource limits of a process, `/proc/<pid>/limits`.

/// One resource limit: its number (`RLIMIT_…`), the soft and the hard value. `None` is unlimited.
pub type Limit = (u32, Option<u64>, Option<u64>);

/// The width of the column with the names, which contain blanks.
const NAMES: usize = 25;

/// Parses the text of a `/proc/<pid>/limits` file. The kernel writes one line for each number, from 0 on, below a line of titles. `None` if
/// it is no such text.
pub fn parse_limits(limits: &str) -> Option<Vec<Limit>> {
    let (titles, lines) = limits.split_once('\n')?;
    if !titles.starts_with("Limit ") {
        return None;
    }
    let numbered = lines.lines().zip(0..);
    let limits: Option<Vec<Limit>> = numbered
        .map(|(line, number)| {
            let mut values = line.get(NAMES..)?.split_ascii_whitespace();
            Some((number, value(values.next()?)?, value(values.next()?)?))
        })
        .collect();
    limits.filter(|limits| !limits.is_empty())
}

fn value(word: &str) -> Option<Option<u64>> {
    match word {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TITLES: &str =
        "Limit                     Soft Limit           Hard Limit           Units     \n";

    #[test]
    fn the_place_of_a_line_is_its_number() {
        let text = format!(
            "{TITLES}Max cpu time              unlimited            unlimited            seconds   \n\
             Max file size             10                   18446744073709551614 bytes     \n\
             Max nice priority         0                    7                    \n"
        );
        let wanted = vec![
            (0, None, None),
            (1, Some(10), Some(18_446_744_073_709_551_614)),
            (2, Some(0), Some(7)),
        ];
        assert_eq!(parse_limits(&text), Some(wanted));
    }

    /// The names of the lines, in the order of the numbers of x86 and ARM.
    #[test]
    fn the_kernel_writes_the_limits_by_number() {
        let text = std::fs::read_to_string("/proc/self/limits").unwrap();
        let limits = parse_limits(&text).unwrap();
        assert_eq!(limits.len(), 16);
        for (number, name) in [
            (0, "cpu time"),
            (7, "open files"),
            (8, "locked memory"),
            (15, "realtime timeout"),
        ] {
            let line = text.lines().nth(number + 1).unwrap();
            assert!(line.starts_with(&format!("Max {name} ")), "{line}");
        }
    }

    #[test]
    fn other_text_has_no_limits() {
        let cut = format!("{TITLES}Max cpu time              unlimited\n");
        let word = format!("{TITLES}Max cpu time              many                 1\n");
        for text in ["", "x", TITLES, "a\nb\n", &cut, &word] {
            assert_eq!(parse_limits(text), None, "{text}");
        }
    }
}
