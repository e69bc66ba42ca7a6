# The smallest real container: the machine's own /usr, everything else new and empty.
#
#   nomad-driver-nspawn run examples/hello.nomad.hcl
#
# Under Nomad the same file works with `nomad job run`.
job "hello" {
  type = "batch"

  group "hello" {
    task "hello" {
      driver = "nspawn"

      config {
        # Nothing is downloaded: the root is the host's own. `volatile = "yes"` takes only /usr of it, read-only.
        image    = "/"
        volatile = "yes"
        boot     = false

        # systemd-nspawn does not map the users of the host's own root.
        user_namespacing = false

        command = ["/bin/sh", "-c", <<-EOF
          echo "hello from $(uname -n), a container of systemd-nspawn"
          echo "task $NOMAD_TASK_NAME of job $NOMAD_JOB_NAME, allocation $NOMAD_SHORT_ALLOC_ID"
          echo "it may use $NOMAD_MEMORY_LIMIT MiB and write to $NOMAD_TASK_DIR, $NOMAD_ALLOC_DIR and $NOMAD_SECRETS_DIR"
          echo "$GREETING" > "$NOMAD_TASK_DIR/greeting"
          cat "$NOMAD_TASK_DIR/greeting"
          echo "this line goes to stderr" >&2
        EOF
        ]
      }

      env {
        GREETING = "greetings from a file in the task's own directory"
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
