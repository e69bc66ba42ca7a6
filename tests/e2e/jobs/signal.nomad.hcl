# `nomad alloc signal` reaches the command.
variable "image" {}

job "signal" {
  type = "service"

  group "signal" {
    task "signal" {
      driver = "nspawn"

      config {
        image   = var.image
        boot    = false
        command = ["/bin/sh", "-c", "trap 'echo heard' HUP; trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done"]
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
