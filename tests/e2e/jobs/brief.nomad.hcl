# Prints its last line as soon as something is written to a pipe.
variable "image" {}

job "brief" {
  type = "batch"

  group "brief" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "brief" {
      driver = "nspawn"

      config {
        image   = var.image
        boot    = false
        command = ["/bin/sh", "-c", "mkfifo /alloc/go; echo up; read word < /alloc/go; echo last; exit 3"]
      }

      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
