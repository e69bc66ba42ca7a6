# Ends of every kind: by a code, by a signal, before the command ran.
variable "image" {}
variable "two" {}
variable "program" {}
variable "script" {}

job "ends" {
  type = "batch"

  group "ends" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "ends" {
      driver = "nspawn"

      config {
        image       = var.image
        boot        = false
        process_two = var.two
        command     = [var.program, "-c", var.script]
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
