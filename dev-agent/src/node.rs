//! The processors of this machine, as Nomad's client counts them. Unlike the client it does not distinguish kinds of cores and keeps none for
//! itself.

use std::fs;

use super::HostError;

/// What Nomad assumes of a processor whose speed is not known, in MHz.
const UNKNOWN_MHZ: i64 = 1000;

/// The processors that are online.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    processors: Vec<u32>,
    mhz: i64,
}

impl Node {
    /// This machine.
    pub(crate) fn read() -> Result<Self, HostError> {
        let path = "/sys/devices/system/cpu/online";
        let online = fs::read_to_string(path).map_err(HostError::io("read", path))?;
        // Not every architecture has a speed there.
        let table = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Ok(Self::parse(&online, &table))
    }

    fn parse(online: &str, table: &str) -> Self {
        let ranges = online.trim().split(',').filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.parse::<u32>().ok()?..=last.parse().ok()?)
        });
        let lines = table.lines().filter_map(|line| line.split_once(':'));
        let mhz = lines
            .filter(|(name, _)| name.trim() == "cpu MHz")
            .find_map(|(_, mhz)| mhz.trim().split('.').next()?.parse().ok());
        Self {
            processors: ranges.flatten().collect(),
            mhz: mhz.filter(|mhz| *mhz > 0).unwrap_or(UNKNOWN_MHZ),
        }
    }

    /// The first processors, as many as these, and their speed together in MHz.
    pub(crate) fn reserve(&self, cores: u32) -> Result<(Vec<u32>, i64), HostError> {
        let wanted = usize::try_from(cores).unwrap_or(usize::MAX);
        match self.processors.get(..wanted) {
            Some(reserved) => Ok((reserved.to_vec(), self.mhz * i64::from(cores))),
            None => Err(HostError::Cores {
                wanted: cores,
                has: self.processors.len(),
            }),
        }
    }

    /// This speed as a fraction of that of all processors.
    #[expect(
        clippy::cast_precision_loss,
        reason = "Nomad divides the same numbers as floats"
    )]
    pub(crate) fn fraction(&self, mhz: i64) -> f64 {
        mhz as f64 / (self.mhz as f64 * self.processors.len() as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const TABLE: &str =
        "processor\t: 0\ncpu MHz\t\t: 2596.138\n\nprocessor\t: 1\ncpu MHz\t\t: 800.0\n";

    #[rstest]
    #[case("0-1\n", TABLE, &[0, 1], 2596)]
    #[case("0-1,3\n", TABLE, &[0, 1, 3], 2596)]
    #[case("0\n", "", &[0], 1000)]
    #[case("0\n", "cpu MHz : 0.000\n", &[0], 1000)]
    fn processors_and_their_speed(
        #[case] online: &str,
        #[case] table: &str,
        #[case] processors: &[u32],
        #[case] mhz: i64,
    ) {
        let wanted = Node {
            processors: processors.to_vec(),
            mhz,
        };
        assert_eq!(Node::parse(online, table), wanted);
    }

    #[test]
    fn cores_are_reserved_from_the_first_on() {
        let node = Node::parse("0,2-3", TABLE);
        assert_eq!(node.reserve(2).unwrap(), (vec![0, 2], 5192));
        let error = node.reserve(4).unwrap_err().to_string();
        assert_eq!(
            error,
            "resources: 4 cores can't be reserved, because this machine has 3"
        );
        assert!((node.fraction(2596) - 1.0 / 3.0).abs() < 1e-9);
        assert!(Node::read().unwrap().reserve(1).is_ok());
    }
}
