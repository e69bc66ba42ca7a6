//! Forwards ports of the host to containers, and keeps containers to their own addresses: one nftables table of the driver, in which every
//! port and every address is an element of a map or a set, with its owner as comment. Tables of others are only read. Takes the program
//! `nft`.

mod nft;
mod rules;
#[cfg(test)]
mod table_tests;

use std::collections::BTreeSet;
use std::io;

use serde_json::Value;

use self::nft::Held;
use self::rules::Element;
use super::pool::InUse;
use super::{NetworkError, NetworkPlan, lock};
use crate::container::Cause;

pub use self::rules::TABLE;
use self::rules::tag;

/// How often a transaction is tried that others make fail. They make it fail only by changing the same table at that moment.
const ATTEMPTS: usize = 5;

/// Forwards the ports of a plan and permits its addresses: all or nothing. Makes the table if it is missing. Repeatable. An element that
/// another task, or an earlier start with another address, has is an error that may pass.
pub fn open(plan: &NetworkPlan) -> Result<(), NetworkError> {
    let wanted = rules::elements(plan);
    rules::check(plan, &wanted)?;
    let owner = tag(&plan.owner);
    let step = |error: &io::Error| NetworkError::new("its ports can't be forwarded", error);
    let _lock = lock::shared().map_err(|error| step(&error))?;
    let all: Vec<Element> = wanted.iter().map(|(element, _)| element.clone()).collect();
    // Usually the table exists, and then the elements alone take a third of the time.
    let mut statements = rules::create(&all, &owner);
    let mut attempt = 1;
    loop {
        let Err(error) = nft::load(&statements) else {
            return Ok(());
        };
        if error.kind() == io::ErrorKind::NotFound || attempt == ATTEMPTS {
            return Err(step(&error));
        }
        attempt += 1;
        // Why it failed is only in a text for people: that there is no table, or that there is such an element.
        let held = nft::elements().map_err(|error| step(&error))?;
        let missing = missing(&wanted, &held.unwrap_or_default(), &owner)?;
        if missing.is_empty() {
            return Ok(());
        }
        statements = rules::base() + &rules::create(&missing, &owner);
    }
}

/// Opens it again, if something of it is missing. Returns whether something was.
pub fn restore(plan: &NetworkPlan) -> Result<bool, NetworkError> {
    let held =
        nft::elements().map_err(|error| NetworkError::new("reading the firewall", &error))?;
    let wanted = rules::elements(plan);
    let is_complete = match held {
        Some(held) => missing(&wanted, &held, &tag(&plan.owner))?.is_empty(),
        None => false,
    };
    if is_complete {
        return Ok(false);
    }
    open(plan).map(|()| true)
}

/// The elements that are not there yet, unless one is another's.
fn missing(
    wanted: &[(Element, String)],
    held: &[Held],
    owner: &str,
) -> Result<Vec<Element>, NetworkError> {
    let mut missing = Vec::new();
    for (element, about) in wanted {
        match held.iter().find(|held| held.element.has_key_of(element)) {
            None => missing.push(element.clone()),
            Some(held) if held.owner == owner && held.element == *element => {}
            Some(held) => return Err(taken(about, held, owner)),
        }
    }
    Ok(missing)
}

fn taken(about: &str, held: &Held, owner: &str) -> NetworkError {
    let other = match held.owner.as_str() {
        "" => "something without a name".to_owned(),
        other if other == owner => "an earlier start of this task".to_owned(),
        other => format!("the task {other}"),
    };
    let to = held.element.value.as_ref();
    let to = to.map(|to| format!(", for {}", to.join(" port ")));
    NetworkError {
        cause: Cause::Busy,
        reason: format!("{about} is held by {other}{}", to.unwrap_or_default()),
    }
}

/// Removes the elements of a plan, as far as they are there with this owner and this value, and the table with the last of all elements.
/// Repeatable.
pub fn close(plan: &NetworkPlan) -> io::Result<()> {
    close_elements(plan)?;
    remove_if_empty()
}

/// Removes the table, if it has no elements. Nothing in a transaction can make that depend on them, hence the lock.
fn remove_if_empty() -> io::Result<()> {
    let _lock = lock::exclusive()?;
    match nft::has_elements()? {
        Some(false) => nft::load(&rules::delete()),
        Some(true) | None => Ok(()),
    }
}

fn close_elements(plan: &NetworkPlan) -> io::Result<()> {
    let owner = tag(&plan.owner);
    let own: Vec<Element> = rules::elements(plan)
        .into_iter()
        .map(|(element, _)| element)
        .collect();
    // A link is of one start only, and so is an address behind it: as long as its element is there, the others are this plan's too, or
    // nobody's. So the table need not be read to see whose they are, which takes longer the more elements it has.
    let is_link = plan.arrives_on().is_some_and(|link| rules::is_link(&link));
    if is_link && nft::load(&rules::remove_all(&own, &owner)).is_ok() {
        return Ok(());
    }
    remove(|held| held.owner == owner && own.contains(&held.element))
}

/// Removes the elements of owners that have no address in use, and brings the rules of a table that exists up to this driver's. Returns the
/// comments of what was removed. A host without `nft` has no such table.
///
/// `in_use` is called when the elements have been read, and its result lives until they are removed: an address is reserved before it has
/// elements, so none of a start that begins meanwhile is removed. An element without a comment is not one that the driver has made.
pub fn retain(in_use: impl FnOnce() -> io::Result<InUse>) -> io::Result<BTreeSet<String>> {
    match table_exists() {
        Ok(true) => nft::load(&rules::base())?,
        Ok(false) => return Ok(BTreeSet::new()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(error),
    }
    let held = nft::elements()?.unwrap_or_default();
    let in_use = in_use()?;
    let is_used = |held: &&Held| {
        let address = held.element.container().and_then(|text| text.parse().ok());
        address.is_some_and(|address| in_use.addresses.contains(&address))
    };
    let owner = |held: &Held| held.owner.clone();
    let known: BTreeSet<String> = held.iter().filter(is_used).map(owner).collect();
    let mut gone: BTreeSet<String> = held.iter().map(owner).collect();
    gone.retain(|owner| !owner.is_empty() && !known.contains(owner));
    remove(|now| gone.contains(&now.owner) && held.contains(now))?;
    remove_if_empty()?;
    Ok(gone)
}

/// Removes elements. One that goes meanwhile is success; one that another takes meanwhile stays.
fn remove(is_meant: impl Fn(&Held) -> bool) -> io::Result<()> {
    let mut attempt = 1;
    loop {
        let held = nft::elements()?.unwrap_or_default();
        let meant = held.iter().filter(|held| is_meant(held));
        let statements: String = meant
            .map(|held| rules::remove(&held.element, &tag(&held.owner)))
            .collect();
        if statements.is_empty() {
            return Ok(());
        }
        match nft::load(&statements) {
            Err(_) if attempt < ATTEMPTS => attempt += 1,
            removed => return removed,
        }
    }
}

/// Whether the driver's table exists, with or without elements. An error of kind `NotFound` says that `nft` is not installed.
pub fn table_exists() -> io::Result<bool> {
    nft::table_exists()
}

/// The chains of others that drop forwarded packets unless one of their rules accepts them, such as "the chain FORWARD of the table ip
/// filter", which is iptables'. Nothing in the driver's table can overrule them. Not recognized: chains that accept by policy and drop
/// with their last rule, and those of the older iptables (legacy). Empty if the chains can't be read.
pub fn dropped_by() -> Vec<String> {
    nft::chains().map_or_else(|_| Vec::new(), |chains| dropping(&chains))
}

fn dropping(chains: &[Value]) -> Vec<String> {
    let drops = |chain: &&Value| {
        let family = chain["family"].as_str().unwrap_or_default();
        let routes = ["ip", "ip6", "inet"].contains(&family);
        routes && chain["hook"] == "forward" && chain["policy"] == "drop" && chain["table"] != TABLE
    };
    let name = |chain: &Value| {
        let text = |key: &str| chain[key].as_str().unwrap_or_default().to_owned();
        let (chain, family, table) = (text("name"), text("family"), text("table"));
        format!("the chain {chain} of the table {family} {table}")
    };
    chains.iter().filter(drops).map(name).collect()
}

#[cfg(test)]
#[path = "firewall_tests.rs"]
mod tests;
