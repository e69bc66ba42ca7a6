# A stop is a signal to the command, and force when the kill timeout is over.
variable "image" {}
variable "handler" {}

job "stop" {
  type = "service"

  group "stop" {
    task "stop" {
      driver       = "nspawn"
      kill_timeout = "3s"
      kill_signal  = "SIGTERM"

      config {
        image   = var.image
        boot    = false
        command = ["/bin/sh", "-c", "trap '${var.handler}' TERM; echo up; while :; do sleep 0.05; done"]
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
