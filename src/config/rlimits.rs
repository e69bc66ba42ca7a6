//! Validates resource limits of processes. What the host allows is compared last.

use std::collections::BTreeMap;

use rustix::process::{Resource, getrlimit};

use crate::container::Rlimit;
use crate::sys::kernel;

use super::ConfigError;
use super::decode::{entry, quoted};

const ULIMIT: &str = "config.ulimit";

/// One limit: its name in docker, in setrlimit(2) and in the kernel, and the highest number that systemd-nspawn and the kernel accept.
struct Row(&'static str, &'static str, Resource, u64);

/// systemd-nspawn calculates with microseconds.
const MOST_SECONDS: u64 = u64::MAX / 1_000_000 - 1;
/// The nice levels from 19 to -20, counted from 1.
const MOST_NICE: u64 = 40;
const ANY: u64 = i64::MAX.unsigned_abs();

const CPU: &str = "CPU";
const NICE: &str = "NICE";
const NOFILE: &str = "NOFILE";
const ROWS: &[Row] = &[
    Row("as", "AS", Resource::As, ANY),
    Row("core", "CORE", Resource::Core, ANY),
    Row("cpu", CPU, Resource::Cpu, MOST_SECONDS),
    Row("data", "DATA", Resource::Data, ANY),
    Row("fsize", "FSIZE", Resource::Fsize, ANY),
    Row("locks", "LOCKS", Resource::Locks, ANY),
    Row("memlock", "MEMLOCK", Resource::Memlock, ANY),
    Row("msgqueue", "MSGQUEUE", Resource::Msgqueue, ANY),
    Row("nice", NICE, Resource::Nice, MOST_NICE),
    Row("nofile", NOFILE, Resource::Nofile, ANY),
    Row("nproc", "NPROC", Resource::Nproc, ANY),
    Row("rss", "RSS", Resource::Rss, ANY),
    Row("rtprio", "RTPRIO", Resource::Rtprio, ANY),
    Row("rttime", "RTTIME", Resource::Rttime, ANY),
    Row("sigpending", "SIGPENDING", Resource::Sigpending, ANY),
    Row("stack", "STACK", Resource::Stack, ANY),
];
/// The lowest soft limits with which a container starts: systemd-nspawn and the container init need descriptors before the command runs,
/// and the kernel ends a process without processor time at once.
const LEAST: &[(&str, u64)] = &[(CPU, 1), (NOFILE, 16)];

/// The limits of the job, ordered by name.
pub(super) fn rlimits(
    given: Option<&BTreeMap<String, String>>,
) -> Result<Vec<Rlimit>, ConfigError> {
    given
        .into_iter()
        .flatten()
        .map(|(name, text)| rlimit(&entry(ULIMIT, name), name, text))
        .collect()
}

fn rlimit(option: &str, name: &str, text: &str) -> Result<Rlimit, ConfigError> {
    let refused = |reason: String| Err(ConfigError::new(option, reason));
    let Some(Row(_, name, _, most)) = ROWS.iter().find(|row| row.0 == name) else {
        let known: Vec<_> = ROWS.iter().map(|row| row.0).collect();
        return refused(format!("is not one of {}", known.join(", ")));
    };
    let (soft, hard) = text.split_once(':').unwrap_or((text, text));
    let (Some(soft), Some(hard)) = (number(name, soft), number(name, hard)) else {
        return refused(format!(
            "{} is not a limit: use SOFT:HARD or one value for both, each a whole number or unlimited",
            quoted(text)
        ));
    };
    if let Some(value) = [soft, hard]
        .into_iter()
        .flatten()
        .find(|value| value > most)
    {
        return refused(format!("{value} is above the highest value, {most}"));
    }
    if height(soft) > height(hard) {
        return refused(format!(
            "{}: the soft limit is above the hard limit",
            quoted(text)
        ));
    }
    let least = LEAST.iter().find(|(limit, _)| limit == name);
    if let Some((_, least)) = least
        && height(soft) < *least
    {
        return refused(format!(
            "{} is below {least}, the lowest value with which a container starts",
            height(soft)
        ));
    }
    Ok(Rlimit { name, soft, hard })
}

/// A limit; the inner `None` is unlimited.
fn number(name: &str, text: &str) -> Option<Option<u64>> {
    match text {
        // systemd-nspawn does not accept it, and it is the same.
        "unlimited" | "-1" if name == NICE => Some(Some(MOST_NICE)),
        "unlimited" | "-1" => Some(None),
        digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().ok().map(Some),
        _ => None,
    }
}

/// For comparisons: unlimited is above every number.
fn height(limit: Option<u64>) -> u64 {
    limit.unwrap_or(u64::MAX)
}

/// Fails for a limit that can't be set on this host, where systemd-nspawn would set a lower one and say nothing.
pub(super) fn check_on_host(rlimits: &[Rlimit]) -> Result<(), ConfigError> {
    for limit in rlimits {
        let Some(Row(name, _, resource, _)) = ROWS.iter().find(|row| row.1 == limit.name) else {
            continue;
        };
        let option = entry(ULIMIT, name);
        if limit.name == NOFILE {
            let most = kernel::max_open_files().map_err(|error| {
                let reason = format!("the host's fs.nr_open can't be read: {error}");
                ConfigError::on_host(&option, reason, &error)
            })?;
            check_at_most(&option, limit, most, "the host's fs.nr_open")?;
        }
        if let Some(most) = getrlimit(*resource).maximum
            && !kernel::may_raise_limits()
        {
            let what = "the hard limit of the driver, which lacks CAP_SYS_RESOURCE to raise it: raise the limit of the agent";
            check_at_most(&option, limit, most, what)?;
        }
    }
    Ok(())
}

fn check_at_most(option: &str, limit: &Rlimit, most: u64, what: &str) -> Result<(), ConfigError> {
    if height(limit.hard) <= most {
        return Ok(());
    }
    let shown = limit
        .hard
        .map_or_else(|| "unlimited".to_owned(), |hard| hard.to_string());
    let reason = format!("{shown} is above {most}, {what}");
    Err(ConfigError::new(option, reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn read(name: &str, text: &str) -> Result<Rlimit, String> {
        let given = BTreeMap::from([(name.to_owned(), text.to_owned())]);
        let read = rlimits(Some(&given)).map_err(|error| error.to_string())?;
        Ok(read.into_iter().next().unwrap())
    }

    #[rstest]
    #[case("nofile", "2048:4096", "NOFILE", Some(2048), Some(4096))]
    #[case("nproc", "4242", "NPROC", Some(4242), Some(4242))]
    #[case("core", "0", "CORE", Some(0), Some(0))]
    #[case("memlock", "unlimited", "MEMLOCK", None, None)]
    #[case("memlock", "-1:-1", "MEMLOCK", None, None)]
    #[case("as", "1024:unlimited", "AS", Some(1024), None)]
    #[case("nofile", "16", "NOFILE", Some(16), Some(16))]
    #[case("nice", "0:40", "NICE", Some(0), Some(40))]
    #[case("nice", "unlimited", "NICE", Some(40), Some(40))]
    #[case(
        "cpu",
        "18446744073708",
        "CPU",
        Some(18_446_744_073_708),
        Some(18_446_744_073_708)
    )]
    fn limits(
        #[case] name: &str,
        #[case] text: &str,
        #[case] kernels: &'static str,
        #[case] soft: Option<u64>,
        #[case] hard: Option<u64>,
    ) {
        let name_of = kernels;
        let wanted = Rlimit {
            name: name_of,
            soft,
            hard,
        };
        assert_eq!(read(name, text), Ok(wanted));
    }

    #[rstest]
    #[case("NOFILE", "1")]
    #[case("files", "1")]
    #[case("", "1")]
    fn unknown_names_are_refused_with_the_list(#[case] name: &str, #[case] text: &str) {
        let wanted = format!(
            "config.ulimit[{name:?}]: is not one of as, core, cpu, data, fsize, locks, memlock, msgqueue, nice, nofile, nproc, rss, rtprio, rttime, sigpending, stack"
        );
        assert_eq!(read(name, text), Err(wanted));
    }

    #[rstest]
    #[case("")]
    #[case(":")]
    #[case("1:")]
    #[case("1:2:3")]
    #[case("-2")]
    #[case("+1")]
    #[case("1.5")]
    #[case("1k")]
    #[case(" 1")]
    #[case("infinity")]
    #[case("18446744073709551616")]
    fn malformed_limits_are_refused(#[case] text: &str) {
        let wanted = format!(
            "config.ulimit[\"nproc\"]: {text:?} is not a limit: use SOFT:HARD or one value for both, each a whole number or unlimited"
        );
        assert_eq!(read("nproc", text), Err(wanted));
    }

    #[rstest]
    #[case("nproc", "5:4", "\"5:4\": the soft limit is above the hard limit")]
    #[case(
        "nproc",
        "unlimited:4",
        "\"unlimited:4\": the soft limit is above the hard limit"
    )]
    #[case("nice", "41", "41 is above the highest value, 40")]
    #[case(
        "cpu",
        "1:18446744073709",
        "18446744073709 is above the highest value, 18446744073708"
    )]
    #[case(
        "data",
        "9223372036854775808",
        "9223372036854775808 is above the highest value, 9223372036854775807"
    )]
    #[case(
        "nofile",
        "15:100",
        "15 is below 16, the lowest value with which a container starts"
    )]
    #[case(
        "cpu",
        "0:9",
        "0 is below 1, the lowest value with which a container starts"
    )]
    fn limits_out_of_range_are_refused(
        #[case] name: &str,
        #[case] text: &str,
        #[case] reason: &str,
    ) {
        let wanted = format!("config.ulimit[{name:?}]: {reason}");
        assert_eq!(read(name, text), Err(wanted));
    }

    #[test]
    fn a_limit_above_that_of_the_host_is_refused() {
        let limit = read("nofile", "16:unlimited").unwrap();
        let message = check_on_host(&[limit]).unwrap_err().to_string();
        let most = kernel::max_open_files().unwrap();
        let wanted =
            format!("config.ulimit[\"nofile\"]: unlimited is above {most}, the host's fs.nr_open");
        assert_eq!(message, wanted);
        let own = getrlimit(Resource::Nofile).maximum.unwrap();
        let limit = read("nofile", &own.to_string()).unwrap();
        assert_eq!(check_on_host(&[limit]), Ok(()));
    }
}
