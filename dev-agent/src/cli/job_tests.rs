//! Job files in both notations: what is used, what is reported as ignored, and what is rejected, with its line.

use std::time::Duration;

use rstest::rstest;
use serde_json::json;

use super::*;

fn pick(source: &str) -> Result<Picked, JobError> {
    Job::read(source)?.pick(None, &BTreeMap::new())
}

/// A job whose task contains `body`, from line 4 on.
fn with_task(body: &str) -> String {
    format!(
        "job \"j\" {{\n  group \"g\" {{\n    task \"t\" {{\n{body}\n      driver = \"nspawn\"\n    }}\n  }}\n}}\n"
    )
}

fn config(body: &str) -> Result<Value, JobError> {
    pick(&with_task(&format!("config {{\n{body}\n}}"))).map(|picked| picked.spec.config)
}

#[test]
fn a_complete_job_is_accepted() {
    let source = r#"
variable "image" {
  type    = string
  default = "/srv/debian"
}
locals { port = 80 }
job "web" {
  datacenters = ["east"]
  type        = "batch"
  meta {
    a = "job"
    b = "job"
  }
  group "front" {
    meta { b = "group" }
    restart { attempts = 0 }
    task "nginx" {
      driver       = "nspawn"
      user         = "www-data"
      kill_timeout = "1m30s"
      kill_signal  = "SIGHUP"
      env {
        PORT = local.port
        DIR  = "${NOMAD_TASK_DIR}/x"
      }
      config {
        image   = var.image
        command = ["sh", "-c", <<-EOF
          echo "$HOME" ${NOMAD_JOB_NAME}
            exit 3
        EOF
        ]
        bind = { "/a" = "/b" }
        environment { X = "y" }
      }
      resources {
        cpu        = 250
        memory     = 64
        memory_max = 128
        numa { affinity = "none" }
      }
    }
  }
}
"#;
    let picked = Job::read(source)
        .and_then(|job| job.pick(None, &[("c".to_owned(), "given".to_owned())].into()))
        .unwrap();
    let spec = picked.spec;
    assert_eq!(
        (
            spec.job_id.as_str(),
            spec.group.as_str(),
            spec.task.as_str(),
            spec.datacenter.as_str()
        ),
        ("web", "front", "nginx", "east")
    );
    assert_eq!(
        (spec.user.as_str(), spec.kill_signal.as_str()),
        ("www-data", "SIGHUP")
    );
    assert_eq!(spec.kill_timeout, Duration::from_secs(90));
    assert_eq!(
        (spec.cpu_mhz, spec.memory_mb, spec.memory_max_mb),
        (250, 64, 128)
    );
    assert_eq!(spec.env["PORT"], "80");
    assert_eq!(spec.env["DIR"], "${NOMAD_TASK_DIR}/x");
    assert_eq!(spec.meta["a"], "job");
    assert_eq!(spec.meta["b"], "group");
    assert_eq!(spec.meta["c"], "given");
    assert_eq!(spec.node["meta.c"], "given");
    assert_eq!(
        spec.config,
        json!({
            "image": "/srv/debian",
            "command": ["sh", "-c", "echo \"$HOME\" ${NOMAD_JOB_NAME}\n  exit 3\n"],
            "bind": [{"/a": "/b"}],
            "environment": [{"X": "y"}],
        })
    );
    assert_eq!(
        picked.ignored,
        ["group.restart (line 16)", "resources.numa (line 40)"]
    );
}

#[rstest]
#[case("cores = 2", 2, 100)]
#[case("cores = 0\ncpu = 250", 0, 250)]
#[case("cores = 2\ncpu = 0", 2, 0)]
fn cores_are_reserved_instead_of_a_share(
    #[case] body: &str,
    #[case] cores: u32,
    #[case] cpu_mhz: i64,
) {
    let picked = pick(&with_task(&format!("resources {{\n{body}\n}}"))).unwrap();
    assert_eq!((picked.spec.cores, picked.spec.cpu_mhz), (cores, cpu_mhz));
}

#[rstest]
#[case("a = 1", json!({"a": 1}))]
#[case("a = -1.5", json!({"a": -1.5}))]
#[case("a = true", json!({"a": true}))]
#[case("a = null", json!({"a": null}))]
#[case("a = \"x\\ty\"", json!({"a": "x\ty"}))]
#[case("a = [1, \"b\", [true]]", json!({"a": [1, "b", [true]]}))]
#[case("a = { b = 1, \"c-d\" = 2 }", json!({"a": [{"b": 1, "c-d": 2}]}))]
#[case("a = [{ b = 1 }]", json!({"a": [{"b": 1}]}))]
#[case("a { b = 1 }", json!({"a": [{"b": 1}]}))]
#[case("a { b = 1 }\na { b = 2 }", json!({"a": [{"b": 1}, {"b": 2}]}))]
#[case("a \"x\" { b = 1 }", json!({"a": [{"x": [{"b": 1}]}]}))]
#[case("a = <<EOF\nx ${NOMAD_ALLOC_ID}\nEOF", json!({"a": "x ${NOMAD_ALLOC_ID}\n"}))]
#[case("a = \"${NOMAD_TASK_DIR}/x\"", json!({"a": "${NOMAD_TASK_DIR}/x"}))]
#[case("a = \"${env[\"X\"]} ${meta.y}\"", json!({"a": "${env[\"X\"]} ${meta.y}"}))]
#[case("a = NOMAD_TASK_NAME", json!({"a": "${NOMAD_TASK_NAME}"}))]
#[case("a = node.datacenter", json!({"a": "${node.datacenter}"}))]
#[case("a = (1)", json!({"a": 1}))]
#[case("a = !false", json!({"a": true}))]
fn literals_become_the_tree_that_nomad_stores(#[case] body: &str, #[case] tree: Value) {
    assert_eq!(config(body), Ok(tree));
}

#[rstest]
#[case("a = upper(\"x\")", 5, "the function upper")]
#[case("\na = \"x-${lower(\"X\")}\"", 6, "the function lower")]
#[case("a = 1 + 1", 5, "the operator")]
#[case("a = true ? 1 : 2", 5, "the conditional")]
#[case("a = [for x in [1] : x]", 5, "the for expression")]
#[case("a = yes", 5, "the bare word yes")]
#[case("a = var.nope", 5, "no variable block \"nope\"")]
#[case("a = local.nope", 5, "local.nope")]
#[case("a = \"%{ if true }x%{ endif }\"", 5, "the template directive")]
#[case("b {\n  a = foo.bar\n}", 6, "foo.bar")]
#[case("dynamic \"x\" {}", 5, "dynamic blocks")]
#[case("a = [\n1,\n", 8, "not HCL")]
fn an_unsupported_expression_is_named_with_its_line(
    #[case] body: &str,
    #[case] line: usize,
    #[case] part: &str,
) {
    let error = config(body).unwrap_err();
    assert!(error.reason.contains(part), "{error}");
    assert_eq!(error.line, Some(line), "{error}");
}

#[rstest]
#[case("template { data = \"x\" }", "`run` does not support task.template")]
#[case("artifact { source = \"x\" }", "task.artifact")]
#[case("volume_mount { volume = \"x\" }", "task.volume_mount")]
#[case("vault {}", "Vault is not available")]
#[case("resources {\ndevice \"gpu\" {}\n}", "resources.device")]
#[case("kill_timeout = \"soon\"", "kill_timeout: \"soon\" is not a duration")]
#[case(
    "kill_signal = \"SIGNOPE\"",
    "kill_signal: \"SIGNOPE\" is not a signal"
)]
#[case("env { A = [1] }", "env.A is not a string")]
#[case("resources { memory = \"lots\" }", "memory is not a whole number")]
#[case("resources { cores = -1 }", "cores is not a number of processors")]
#[case(
    "resources {\ncores = 1\ncpu = 100\n}",
    "either cpu or cores, not both"
)]
#[case("comand = 1", "\"comand\" is not known in a task")]
#[case("config {}\nconfig {}", "config is set twice")]
fn blocks_that_run_cannot_provide_are_refused(#[case] body: &str, #[case] part: &str) {
    let error = pick(&with_task(body)).unwrap_err();
    assert!(error.reason.contains(part), "{error}");
    assert!(matches!(error.line, Some(4 | 5)), "{error}");
}

#[rstest]
#[case("network {}", None)]
#[case("network { mode = \"host\" }", None)]
#[case(
    "network { mode = \"bridge\" }",
    Some("network namespaces are not created")
)]
#[case("network {\n port \"http\" {}\n }", Some("no ports"))]
#[case("volume \"v\" {}", Some("volumes are not supported"))]
fn a_group_network_is_the_host_network(#[case] body: &str, #[case] part: Option<&str>) {
    let source = format!(
        "job \"j\" {{\ngroup \"g\" {{\n{body}\ntask \"t\" {{\ndriver = \"nspawn\"\n}}\n}}\n}}\n"
    );
    match (pick(&source), part) {
        (Ok(picked), None) => assert_eq!(picked.ignored, [""; 0]),
        (Err(error), Some(part)) => assert!(
            error.reason.contains(part) && error.line == Some(3),
            "{error}"
        ),
        (other, _) => panic!("{other:?}"),
    }
}

const TWO: &str = "job \"j\" {\n group \"g\" {\n task \"a\" {\n driver = \"nspawn\"\n }\n task \"b\" {\n driver = \"nspawn\"\n }\n \
                   task \"c\" {\n driver = \"exec\"\n }\n }\n}\n";

#[rstest]
#[case(None, "use --task with one of g/a, g/b")]
#[case(Some("x"), "there is no task \"x\"; the job has g/a, g/b, g/c")]
#[case(Some("c"), "the driver \"exec\" is not nspawn")]
fn the_task_to_run_must_be_unambiguous(#[case] wanted: Option<&str>, #[case] part: &str) {
    let error = Job::read(TWO)
        .unwrap()
        .pick(wanted, &BTreeMap::new())
        .unwrap_err();
    assert!(error.reason.contains(part), "{error}");
}

#[rstest]
#[case("b")]
#[case("g/b")]
fn a_task_is_picked_by_name_and_the_others_are_reported(#[case] wanted: &str) {
    let picked = Job::read(TWO)
        .unwrap()
        .pick(Some(wanted), &BTreeMap::new())
        .unwrap();
    assert_eq!(picked.spec.task, "b");
    assert_eq!(picked.ignored, ["task g/a", "task g/c"]);
}

#[rstest]
#[case("", "there is no job block")]
#[case("job \"a\" {}\njob \"b\" {}", "exactly one job")]
#[case("jobs \"a\" {}", "\"jobs\" is not known outside")]
#[case("job {}", "job has one label")]
#[case("job \"j\" {\n task \"a/b\" {}\n}", "\"a/b\" is not a valid task name")]
#[case("{", "not JSON")]
#[case("{\"x\": 1}", "there are no TaskGroups")]
fn a_file_without_a_job_is_refused_with_a_reason(#[case] source: &str, #[case] part: &str) {
    let error = pick(source).unwrap_err();
    assert!(error.to_string().contains(part), "{error}");
}

#[rstest]
#[case(true)]
#[case(false)]
fn the_json_of_a_job_equals_its_hcl(#[case] wrapped: bool) {
    let job = json!({
        "ID": "web", "Name": "web", "Region": null, "Type": "batch", "Stop": false, "ModifyIndex": 12,
        "Datacenters": ["*"], "Constraints": null, "Meta": {"a": "1"},
        "TaskGroups": [{
            "Name": "g", "Count": 1, "Networks": null, "RestartPolicy": {"Attempts": 0},
            "Tasks": [{
                "Name": "t", "Driver": "nspawn", "User": "", "KillTimeout": 5_000_000_000_u64, "KillSignal": "",
                "Config": {"image": "/srv/debian", "bind": [{"/a": "/b"}]},
                "Env": {"A": "b"}, "Templates": null, "Artifacts": [],
                "Resources": {"CPU": 200, "MemoryMB": 50, "MemoryMaxMB": null, "Devices": null},
            }],
        }],
    });
    let source = if wrapped {
        json!({"Job": job}).to_string()
    } else {
        job.to_string()
    };
    let picked = pick(&source).unwrap();
    assert_eq!(picked.ignored, ["group.restart"]);
    let spec = picked.spec;
    assert_eq!(
        spec.config,
        json!({"image": "/srv/debian", "bind": [{"/a": "/b"}]})
    );
    assert_eq!(
        (spec.cpu_mhz, spec.memory_mb, spec.kill_timeout),
        (200, 50, Duration::from_secs(5))
    );
    assert_eq!(
        (
            spec.env["A"].as_str(),
            spec.meta["a"].as_str(),
            spec.datacenter.as_str()
        ),
        ("b", "1", "dc1")
    );
}

#[test]
fn the_json_of_a_job_is_refused_like_its_hcl() {
    let source = json!({"TaskGroups": [{"Name": "g", "Tasks": [
        {"Name": "t", "Driver": "nspawn", "Templates": [{"EmbeddedTmpl": "x"}]},
    ]}], "ID": "j"});
    let error = pick(&source.to_string()).unwrap_err();
    assert!(error.reason.contains("task.template"), "{error}");
}
