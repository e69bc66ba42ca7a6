# The same as brief, with Nomad's own driver, to compare with.
job "raw-brief" {
  type = "batch"

  group "raw-brief" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "raw-brief" {
      driver = "raw_exec"

      config {
        command = "/bin/sh"
        args    = ["-c", "mkfifo $NOMAD_ALLOC_DIR/go; echo up; read word < $NOMAD_ALLOC_DIR/go; echo last; exit 3"]
      }

      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
