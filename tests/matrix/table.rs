//! Formats the results as a table.

use std::fmt::Write as _;
use std::time::Duration;

use super::{Again, Cell, Step, Victim};

/// Rows are steps, columns are processes (`.` was not selected); then the reasons for impossible cells, and the totals.
pub(super) fn table(played: &[(Cell, Result<String, String>)], time: Duration) -> String {
    let mut text = format!("\nthe fault matrix: the results of SIGKILL\n{:28}", "");
    for victim in Victim::ALL {
        let _ = write!(text, "{:12}", victim.name());
    }
    let mut absent = 0;
    let mut reasons: Vec<&str> = Vec::new();
    for step in Step::ALL {
        let _ = write!(text, "\n{:28}", step.name());
        for victim in Victim::ALL {
            let cell = Cell {
                step,
                victim,
                again: Again::NewId,
            };
            let word = match cell.plan() {
                Err(reason) => {
                    absent += 1;
                    let known = reasons.iter().position(|known| *known == reason);
                    let number = known.unwrap_or_else(|| {
                        reasons.push(reason);
                        reasons.len() - 1
                    });
                    format!("- ({})", number + 1)
                }
                Ok(_) if cell.is_for_real() => word(played, cell) + "*",
                Ok(_) => word(played, cell),
            };
            let _ = write!(text, "{word:12}");
        }
    }
    text.push_str("\n*   is played on the real systemd-nspawn too, see tests/e2e\n");
    for (number, reason) in reasons.iter().enumerate() {
        let _ = writeln!(text, "({}) can't be: the process {reason}", number + 1);
    }
    let passed = played.iter().filter(|(_, result)| result.is_ok()).count();
    let again = played
        .iter()
        .filter(|(cell, _)| cell.again == Again::SameId)
        .count();
    let _ = writeln!(
        text,
        "the fault matrix: {} cells run, {passed} passed, {} failed, in {:.1} s; {again} of them are played for a second time, with the same id \
         again; {absent} can't be",
        played.len(),
        played.len() - passed,
        time.as_secs_f64(),
    );
    text
}

fn word(played: &[(Cell, Result<String, String>)], cell: Cell) -> String {
    let results: Vec<_> = played
        .iter()
        .filter(|(other, _)| (other.step, other.victim) == (cell.step, cell.victim))
        .map(|(_, result)| result)
        .collect();
    match results.first() {
        None => ".".to_owned(),
        Some(Ok(word)) if results.iter().all(|result| result.is_ok()) => word.clone(),
        Some(_) => "FAILED".to_owned(),
    }
}
