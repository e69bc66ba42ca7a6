# A batch task's exit code is the one that its command gave.
variable "image" {}
variable "code" {}

job "batch" {
  type = "batch"

  group "batch" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "batch" {
      driver = "nspawn"

      config {
        image   = var.image
        boot    = false
        command = ["/bin/sh", "-c", "echo said; echo complained >&2; exit ${var.code}"]
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
