//! Tier (b): a real Nomad agent runs real job files, one per guarantee.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};

use e2e::agent::{Agent, Allocation};
use e2e::debian::Booted;
use e2e::stage::{Namespace, within_network};
use e2e::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use support::secrecy::{self, Marker, Search, ancestry, environment};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("jobs")
        .join(format!("{name}.nomad.hcl"))
}

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../examples")
        .join(format!("{name}.nomad.hcl"))
}

/// A small tree for this caller only, because systemd-nspawn locks it.
fn image(agent: &Agent, name: &str) -> String {
    let tree = agent.join(name);
    fs::create_dir(&tree).unwrap();
    e2e::busybox_tree(&tree);
    tree.to_str().unwrap().to_owned()
}

fn run<'a>(agent: &'a Agent, job: &str) -> Allocation<'a> {
    agent.run(&file(job), &[("image", &image(agent, job))])
}

/// Checks that every line was printed once, in order, then the last one.
#[track_caller]
fn assert_no_gap(printed: &str) {
    let mut lines = printed.lines();
    assert_eq!(lines.next_back(), Some("last"));
    let mut count = 0;
    for (number, line) in (1..).zip(lines) {
        assert_eq!(line, format!("line-{number}-"));
        count = number;
    }
    assert!(count > 0, "nothing was written");
}

/// Waits for lines that are written from now on.
fn goes_on(writer: &Allocation<'_>) {
    let now = writer.output("stdout").lines().count();
    writer.printed(&format!("line-{}-", now + 20));
}

#[test]
fn the_example_says_hello() {
    let agent = Agent::new();
    let hello = agent.run(&example("hello"), &[]);
    assert_eq!(hello.dead(), [0]);
    let printed = hello.printed("greetings from a file");
    assert!(printed.starts_with("hello from "), "{printed}");
    assert_eq!(
        hello.output("stderr").lines().next(),
        Some("this line goes to stderr")
    );
    agent.leave();
}

/// The agent is in a network namespace of the test, because the driver makes a link and a firewall table.
#[test]
fn the_example_of_a_network_of_its_own_serves_its_page() {
    e2e::needs_root();
    let host = Namespace::new(&format!("t{}", e2e::unique()));
    // Masquerading needs an address of the host that is not a loopback one.
    host.ip(&["link", "add", "eth0", "type", "bridge"]);
    host.ip(&["address", "add", "192.0.2.1/24", "dev", "eth0"]);
    host.ip(&["link", "set", "eth0", "up"]);
    within_network(&host.path(), || {
        let agent = Agent::new();
        let web = agent.run(&example("web-own-network"), &[]);
        let address = address(&web);
        // The address is printed before the server listens.
        let page = until("the page", || {
            let said = get(&address).ok()?;
            said.starts_with("HTTP/1.").then_some(said)
        });
        assert!(page.contains("a page of allocation "), "{page}");
        web.stop();
        agent.leave();
    });
}

/// Nomad makes the network and forwards the port, in a network namespace of the test that stands for the host's. Another host asks.
#[test]
fn the_example_of_a_group_network_serves_its_page_and_leaves_nothing() {
    e2e::needs_root();
    let name = format!("t{}", e2e::unique());
    let (host, other) = (Namespace::new(&name), Namespace::new(&format!("{name}o")));
    host.ip(&[
        "link",
        "add",
        "eth0",
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        other.name(),
    ]);
    for (namespace, address) in [(&host, "192.0.2.1/24"), (&other, "192.0.2.2/24")] {
        namespace.ip(&["address", "add", address, "dev", "eth0"]);
        namespace.ip(&["link", "set", "eth0", "up"]);
    }
    // The chain of CNI's port map for one container. What nft shows of the rule in it depends on its version.
    const FORWARDS: &str = "cni-dn-";
    let rules = || {
        let rules = ["netns", "exec", host.name(), "nft", "list", "ruleset"];
        support::run("ip", &rules).to_lowercase()
    };
    within_network(&host.path(), || {
        let agent = Agent::with_bridges("eth0");
        let web = agent.run(&example("web-bridge"), &[]);
        let address = address(&web);
        assert!(address.starts_with("192.0.2.1:"), "{address}");
        let ask = || within_network(&other.path(), || get(&address));
        // The address is printed before the server listens.
        let page = until("the page", || {
            ask().ok().filter(|said| said.starts_with("HTTP/1."))
        });
        assert!(page.contains("a page of allocation "), "{page}");
        let directory = web.dir();
        let id = directory.parent().and_then(Path::file_name).unwrap();
        let network = Path::new("/run/netns").join(id);
        assert!(network.exists() && host.ip(&["-o", "link"]).contains("veth"));
        assert!(rules().contains(FORWARDS), "{}", rules());
        web.stop();
        assert!(ask().is_err());
        agent.leave();
        assert!(!network.exists(), "{}", network.display());
    });
    // What Nomad keeps for the next allocation is its empty bridge.
    let links = host.ip(&["-br", "link"]);
    let mut links: Vec<_> = links
        .lines()
        .filter_map(|line| line.split([' ', '@']).next())
        .collect();
    links.sort_unstable();
    assert_eq!(links, ["eth0", "lo", "nomad"]);
    let rules = rules();
    assert!(
        !rules.contains(FORWARDS) && !rules.contains("nomad_driver_nspawn"),
        "{rules}"
    );
}

/// Where the server of an example is reached, which it has printed.
fn address(web: &Allocation<'_>) -> String {
    let printed = web.printed("/\n");
    let mut lines = printed.lines();
    let found = lines.find_map(|line| line.strip_prefix("http://")?.strip_suffix('/'));
    found.unwrap_or_else(|| panic!("{printed}")).to_owned()
}

/// What a web server says.
fn get(address: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(e2e::DEADLINE))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

#[test]
fn a_batch_task_has_the_exit_code_of_its_command() {
    let agent = Agent::new();
    let codes = [0, 1, 42];
    let started = codes.map(|code| {
        let image = image(&agent, &format!("tree{code}"));
        agent.run(
            &file("batch"),
            &[("image", &image), ("code", &code.to_string())],
        )
    });
    for (code, task) in codes.into_iter().zip(started) {
        assert_eq!(task.dead(), [code]);
        assert_eq!(task.output("stdout"), "said\n");
        assert!(task.output("stderr").starts_with("complained\n"));
        assert_eq!(task.task()["Failed"], code != 0);
    }
    agent.leave();
}

#[test]
fn the_dns_block_of_a_network_is_applied() {
    let agent = Agent::new();
    let dns = run(&agent, "dns");
    assert_eq!(dns.dead(), [0]);
    assert_eq!(
        dns.output("stdout"),
        "nameserver 192.0.2.53\nsearch trial.example\noptions ndots:3\n"
    );
    agent.leave();
}

/// What a Nomad user sees of an exit: `Exit Code`, `Signal`, and a message if there is more to report.
#[test]
fn nomad_shows_the_exit_of_a_task() {
    let agent = Agent::new();
    let shell = "/bin/sh";
    let rows = [
        ("false", shell, "exit 255", "Exit Code: 255"),
        ("true", shell, "exit 133", "Exit Code: 133"),
        (
            "false",
            shell,
            "echo up; reboot -f",
            "Exit Code: 133, Exit Message: \"the container has asked for a restart\"",
        ),
        ("true", shell, "kill -TERM $$", "Exit Code: 143, Signal: 15"),
        ("true", shell, "kill -40 $$", "Exit Code: 168, Signal: 40"),
        (
            "true",
            shell,
            "ulimit -S -c 0; kill -SEGV $$",
            "Exit Code: 139, Signal: 11",
        ),
        ("false", "/none/such", "", "Exit Code: 127, Exit Message: "),
        ("true", "/etc/passwd", "", "Exit Code: 126, Exit Message: "),
    ];
    let started: Vec<_> = rows
        .iter()
        .enumerate()
        .map(|(number, (two, program, script, _))| {
            let image = image(&agent, &format!("tree{number}"));
            let variables = [
                ("image", &*image),
                ("two", two),
                ("program", program),
                ("script", script),
            ];
            agent.run(&file("ends"), &variables)
        })
        .collect();
    for ((two, program, script, shown), task) in rows.iter().zip(started) {
        task.dead();
        let event = task.event("Terminated").unwrap();
        let said = event["DisplayMessage"].as_str().unwrap();
        let row = format!("process_two = {two}: {program} {script}");
        assert!(said.starts_with(shown), "{row}: {said}");
        let more = &said[shown.len()..];
        // The message names the file; a shell's exit has no message.
        assert!(
            if *program == shell {
                more.is_empty()
            } else {
                more.contains(program)
            },
            "{row}: {said}"
        );
    }
    agent.leave();
}

/// The same for ends that are caused from outside.
#[test]
fn nomad_shows_exits_caused_from_outside() {
    let agent = Agent::new();
    let run = |name: &str, script: &str| {
        let image = image(&agent, name);
        let variables = [
            ("image", &*image),
            ("two", "true"),
            ("program", "/bin/sh"),
            ("script", script),
        ];
        agent.run(&file("ends"), &variables)
    };
    let strike = |task: &Allocation, place: &str| {
        let pid = i32::try_from(task.process(place)).unwrap();
        let pid = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    };
    let said = |task: &Allocation, kind: &str| {
        task.dead();
        let event = task.event(kind).expect(kind);
        event["DisplayMessage"].as_str().unwrap().to_owned()
    };
    let deaf = "trap '' TERM INT; echo up; while :; do sleep 0.05; done";
    let stopped = run("stopped", deaf);
    let nspawn = run("nspawn", deaf);
    let supervisor = run("supervisor", deaf);
    for task in [&stopped, &nspawn, &supervisor] {
        task.printed("up");
    }
    strike(&nspawn, "/nspawn/pid");
    strike(&supervisor, "/started/supervisor/pid");
    stopped.stop();
    assert_eq!(said(&stopped, "Terminated"), "Exit Code: 137, Signal: 9");
    for (task, words) in [
        (&nspawn, "systemd-nspawn was ended by SIGKILL"),
        (&supervisor, "supervisor was killed"),
    ] {
        let said = said(task, "Terminated");
        assert!(
            said.starts_with("Exit Code: 137, Signal: 9, Exit Message: "),
            "{said}"
        );
        assert!(said.contains(words), "{said}");
    }

    let dumps = "ulimit -S -c $(ulimit -H -c); kill -SEGV $$";
    let here = std::process::Command::new("/bin/sh")
        .args(["-c", dumps])
        .current_dir(agent.join(""))
        .status()
        .unwrap();
    let dumped = if std::os::unix::process::ExitStatusExt::core_dumped(&here) {
        ", Exit Message: \"the command dumped core\""
    } else {
        ""
    };
    let reported = said(&run("dumps", dumps), "Terminated");
    assert_eq!(reported, format!("Exit Code: 139, Signal: 11{dumped}"));

    let broken = agent.join("broken.raw");
    fs::write(&broken, "no image").unwrap();
    let variables = [
        ("image", broken.to_str().unwrap()),
        ("two", "true"),
        ("program", "/bin/sh"),
        ("script", deaf),
    ];
    let refused = agent.run(&file("ends"), &variables);
    let reported = said(&refused, "Driver Failure");
    // The text depends on the host.
    let words =
        reported.split_once("systemd-nspawn exited with status 1 before the container was up: ");
    assert!(
        words.is_some_and(|(_, words)| !words.is_empty()),
        "{reported}"
    );
    agent.leave();
}

#[test]
fn a_failed_service_is_restarted_by_its_policy() {
    let agent = Agent::new();
    let task = run(&agent, "restart");
    assert_eq!(task.dead(), [11, 12, 13]);
    assert_eq!(task.starts(), 3);
    agent.leave();
}

#[test]
fn a_stop_is_graceful_and_kills_at_the_timeout() {
    let agent = Agent::new();
    let stop = |name: &str, handler: &str| {
        let image = image(&agent, name);
        let task = agent.run(&file("stop"), &[("image", &image), ("handler", handler)]);
        task.printed("up");
        let exits = task.stop();
        (exits, task.output("stdout"))
    };
    assert_eq!(
        stop("polite", "echo bye; exit 7"),
        (vec![7], "up\nbye\n".to_owned())
    );
    assert_eq!(stop("deaf", "echo no").0, [137]);
    agent.leave();
}

#[test]
fn a_signal_reaches_the_command() {
    let agent = Agent::new();
    let task = run(&agent, "signal");
    task.printed("up");
    task.signal("SIGHUP");
    task.printed("heard");
    assert_eq!(task.task()["State"], "running");
    assert_eq!(task.stop(), [0]);
    agent.leave();
}

#[test]
fn a_changed_template_signals_the_command() {
    let agent = Agent::new();
    set_word(&agent, "first");
    let task = run(&agent, "reload");
    task.printed("up");
    set_word(&agent, "second");
    assert_eq!(task.printed("second"), "up\nsecond\n");
    assert_eq!(task.starts(), 1);
    assert_eq!(task.stop(), [0]);
    agent.leave();
}

/// Sets the variable of Nomad that the templates of the jobs show.
fn set_word(agent: &Agent, word: &str) {
    let items = json!({ "Path": "nomad/jobs", "Items": { "word": word } });
    // The agent's keys may be ready a moment after its node.
    until("the variable", || {
        agent.call("PUT", "/v1/var/nomad/jobs", Some(&items)).ok()
    });
}

#[test]
fn a_changed_template_is_the_credential_of_the_restarted_task() {
    let agent = Agent::new();
    set_word(&agent, "first");
    let task = run(&agent, "credentials");
    task.printed("bob\nfirst\n");
    set_word(&agent, "second");
    assert_eq!(task.printed("second\n"), "bob\nfirst\nbob\nsecond\n");
    task.stop();
    agent.leave();
}

/// Does something to the agent while a task writes, and checks that the task survives it.
fn survives(what: impl FnOnce(&mut Agent)) {
    let mut agent = Agent::new();
    let (writer, leader) = {
        let writer = run(&agent, "writer");
        writer.printed("line-20-");
        (writer.name(), writer.leader())
    };
    what(&mut agent);
    let writer = writer.on(&agent);
    goes_on(&writer);
    assert_eq!(writer.leader(), leader, "another container");
    fs::write(writer.dir().join("local/end"), "").unwrap();
    assert_eq!(writer.dead(), [42]);
    assert_eq!(writer.starts(), 1);
    assert_no_gap(&writer.printed("last\n"));
    agent.leave();
}

#[test]
fn a_task_survives_a_killed_agent() {
    survives(|agent| {
        agent.kill();
        agent.start();
    });
}

#[test]
fn a_task_survives_a_restart_of_the_agent() {
    survives(|agent| {
        agent.stop();
        agent.start();
    });
}

#[test]
fn a_task_survives_a_killed_plugin() {
    survives(|agent| {
        let plugin = agent.plugin();
        let pid = nix::unistd::Pid::from_raw(plugin);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        until("another plugin", || {
            (agent.plugin() != plugin).then_some(())
        });
        // A killed plugin can't remove its own socket.
        until("the dead plugin's socket is removed", || {
            (agent.sockets().len() == 1).then_some(())
        });
    });
}

#[test]
fn a_task_that_ended_while_the_agent_was_down_has_its_true_exit_code() {
    let mut agent = Agent::new();
    let writer = {
        let writer = run(&agent, "writer");
        writer.printed("line-20-");
        writer.name()
    };
    agent.kill();
    let local = writer.on(&agent).dir().join("local");
    fs::write(local.join("end"), "").unwrap();
    // The log collector keeps running without the agent.
    writer.on(&agent).printed("last\n");
    agent.start();
    let writer = writer.on(&agent);
    assert_eq!(writer.dead(), [42]);
    assert_eq!(writer.starts(), 1);
    assert_no_gap(&writer.output("stdout"));
    agent.leave();
}

#[test]
fn a_debian_system_boots_and_shuts_down_cleanly() {
    let agent = Agent::new();
    let debian = Booted::start(&agent);
    assert_eq!(debian.task.stop(), [0]);
    assert_eq!(debian.said(), "started\nstopped\n");
    agent.leave();
}

/// At log level `info`: at `debug` the agent's own log contains the text of templates, which no driver can prevent.
#[test]
fn a_real_agent_shows_no_secret() {
    let agent = Agent::logging("INFO");
    let marker = Marker::new();
    let since = secrecy::now();
    let variables = [
        ("image", &*image(&agent, "tree")),
        ("secret", &*marker.secret("x")),
    ];
    let task = agent.run(&file("secrets"), &variables);
    task.printed("up");
    let token = fs::read_to_string(task.dir().join("secrets/nomad_token")).unwrap();
    let token = Marker::from(token.trim().to_owned());
    let leader = i32::try_from(task.leader()).unwrap();
    let inside = environment(leader).unwrap();
    assert!(marker.is_in(inside["DB_PASSWORD"].as_bytes()));
    assert!(marker.is_in(inside["FROM_TEMPLATE"].as_bytes()));
    assert!(token.is_in(inside["NOMAD_TOKEN"].as_bytes()));
    // The leader is systemd-nspawn's child.
    let nspawn = ancestry(leader)[1];
    // Nomad's own data, which contains the job.
    let spared = ["server", "data", "plugins"].map(|name| agent.join(name));
    let look = |when: &str, nspawn: Option<i32>| {
        for marker in [&marker, &token] {
            let search = Search {
                marker,
                in_arguments: false,
                own: &agent.join(""),
                state: agent.state_dir(),
                spared: &spared,
                since,
            };
            search.run(when, nspawn, &[]);
        }
    };
    look("while it runs", Some(nspawn));
    let plugin = agent.plugin();
    kill(Pid::from_raw(plugin), Signal::SIGKILL).unwrap();
    until("another plugin", || {
        (agent.plugin() != plugin).then_some(())
    });
    look("recovered", Some(nspawn));
    assert_eq!(task.stop(), [0]);
    look("after the end", None);
    let reported = task.task().to_string();
    marker.not_in("what Nomad tells of the task", &reported);
    token.not_in("what Nomad tells of the task", &reported);
    agent.leave();
}
