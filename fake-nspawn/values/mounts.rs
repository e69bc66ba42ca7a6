//! Mounts: `--bind`, `--tmpfs`, `--overlay`, `--inaccessible`.

use crate::options::{Mount, Refusal};

/// Splits at colons; a backslash escapes the next character.
fn words(text: &str, most: usize) -> Vec<String> {
    let mut found = vec![String::new()];
    let mut characters = text.chars();
    while let Some(next) = characters.next() {
        let count = found.len();
        let Some(last) = found.last_mut() else { break };
        match next {
            '\\' => last.extend(characters.next()),
            ':' if count < most => found.push(String::new()),
            other => last.push(other),
        }
    }
    found
}

/// A mount of any of the five kinds.
pub(crate) fn mount(version: u32, option: &str, text: &str) -> Result<Mount, Refusal> {
    let shown = match option {
        "bind" | "bind-ro" => "bind(-ro)",
        "overlay" | "overlay-ro" => "overlay(-ro)",
        other => other,
    };
    let bad = || {
        Refusal::invalid(format!(
            "Failed to parse --{shown}= argument {text}: Invalid argument"
        ))
    };
    match option {
        "bind" | "bind-ro" => bind(version, text, bad),
        "tmpfs" => {
            let destination = words(text, 2).swap_remove(0);
            if destination.starts_with('/') {
                Ok(Mount::Tmpfs { destination })
            } else {
                Err(bad())
            }
        }
        "inaccessible" if text.starts_with('/') => Ok(Mount::Inaccessible {
            destination: text.to_owned(),
        }),
        "inaccessible" => Err(bad()),
        _ => {
            let parts = words(text, usize::MAX);
            if parts.len() < 2 {
                let message =
                    "--overlay(-ro)= needs at least two colon-separated directories specified.";
                return Err(Refusal {
                    message: message.to_owned(),
                    errno: 99,
                });
            }
            let destination = parts.last().cloned().unwrap_or_default();
            if destination.starts_with('/') {
                Ok(Mount::Overlay { destination })
            } else {
                Err(bad())
            }
        }
    }
}

fn bind(version: u32, text: &str, bad: impl Fn() -> Refusal) -> Result<Mount, Refusal> {
    let mut parts = words(text, 3).into_iter();
    let source = parts.next().unwrap_or_default();
    let destination = parts
        .next()
        .unwrap_or_else(|| source.trim_start_matches('+').to_owned());
    if !destination.starts_with('/') {
        return Err(bad());
    }
    let mut mapped = false;
    for word in parts
        .next()
        .iter()
        .flat_map(|list| list.split(','))
        .filter(|word| !word.is_empty())
    {
        match (word, version) {
            ("rbind" | "norbind", _) => {}
            ("noidmap", 250..) => mapped = false,
            ("idmap", 250..) | ("rootidmap", 252..) | ("owneridmap", 256..) => mapped = true,
            _ => {
                return Err(Refusal::invalid(format!(
                    "Invalid bind mount option: {}",
                    word_list(text)
                )));
            }
        }
    }
    Ok(Mount::Bind {
        source,
        destination,
        mapped,
    })
}

fn word_list(text: &str) -> String {
    let options = words(text, 3).pop().unwrap_or_default();
    // In the real tool too the message ends at the first unknown option.
    options
        .split(',')
        .find(|word| !["rbind", "norbind", "noidmap", "idmap", "rootidmap"].contains(word))
        .map_or_else(|| options.clone(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bound(text: &str) -> Result<Mount, String> {
        mount(252, "bind", text).map_err(|refusal| refusal.message)
    }

    #[test]
    fn a_bind_mount_is_source_destination_and_options() {
        let mount = |source: &str, destination: &str, mapped| {
            Ok(Mount::Bind {
                source: source.into(),
                destination: destination.into(),
                mapped,
            })
        };
        assert_eq!(bound("/a"), mount("/a", "/a", false));
        assert_eq!(bound(r"/a\:b:/c"), mount("/a:b", "/c", false));
        assert_eq!(bound("/a:/b:rbind,idmap"), mount("/a", "/b", true));
        assert_eq!(bound("+/a:/b"), mount("+/a", "/b", false));
        assert_eq!(bound(":/b"), mount("", "/b", false));
        assert_eq!(
            bound("/a:/b:ro"),
            Err("Invalid bind mount option: ro".into())
        );
        assert_eq!(
            bound("/a:b"),
            Err("Failed to parse --bind(-ro)= argument /a:b: Invalid argument".into())
        );
    }

    #[test]
    fn bind_mapping_options_depend_on_the_version() {
        assert!(mount(249, "bind", "/a:/b:idmap").is_err());
        assert!(mount(255, "bind", "/a:/b:owneridmap").is_err());
        assert!(mount(256, "bind", "/a:/b:owneridmap").is_ok());
    }
}
