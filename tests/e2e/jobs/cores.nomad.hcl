# A task on the cores that Nomad shares among tasks, or on reserved ones, until it is stopped.
variable "image" {}
variable "cores" {
  type    = number
  default = null
}

job "cores" {
  type = "service"

  group "cores" {
    task "cores" {
      driver       = "nspawn"
      kill_timeout = "1s"
      kill_signal  = "SIGTERM"

      config {
        image   = var.image
        boot    = false
        command = ["/bin/sh", "-c", "trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done"]
      }

      resources {
        cores  = var.cores
        memory = 32
      }
    }
  }
}
