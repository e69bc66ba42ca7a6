//! What came out, for people.

use std::fmt::Write as _;

use super::{Again, Cell, Step, Victim};

/// Steps down, processes across; then why some cells can't be, and the sum.
pub(crate) fn table(played: &[(Cell, Result<String, String>)]) -> String {
    let mut text = format!("\nthe fault matrix: what came of SIGKILL\n{:28}", "");
    for victim in Victim::ALL {
        let _ = write!(text, "{:12}", victim.name());
    }
    let mut absent = 0;
    let mut reasons: Vec<(&str, Vec<String>)> = Vec::new();
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
                    let name = format!("{} at {:?}", victim.name(), step.name());
                    match reasons.iter_mut().find(|(known, _)| *known == reason) {
                        Some((_, names)) => names.push(name),
                        None => reasons.push((reason, vec![name])),
                    }
                    "-".to_owned()
                }
                Ok(_) => word(played, cell),
            };
            let _ = write!(text, "{word:12}");
        }
    }
    text.push('\n');
    for (reason, names) in reasons {
        let _ = writeln!(text, "- {reason}: {}", names.join(", "));
    }
    let passed = played.iter().filter(|(_, result)| result.is_ok()).count();
    let again = played
        .iter()
        .filter(|(cell, _)| cell.again == Again::SameId);
    let _ = writeln!(
        text,
        "{} played ({} of them twice, for a new id and for the same id), {passed} passed, {} failed; {absent} can't be",
        played.len(),
        again.count(),
        played.len() - passed,
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
        None => "not played".to_owned(),
        Some(Ok(word)) if results.iter().all(|result| result.is_ok()) => word.clone(),
        Some(_) => "FAILED".to_owned(),
    }
}
