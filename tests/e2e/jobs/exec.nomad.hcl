# Runs on, so that commands can be run in it.
variable "image" {}

variable "process_two" {
  default = "false"
}

job "exec" {
  type = "service"

  group "exec" {
    task "exec" {
      driver = "nspawn"

      config {
        image       = var.image
        boot        = false
        process_two = var.process_two
        command     = ["/bin/sh", "-c", "trap 'exit 0' TERM; echo up; while :; do sleep 0.1; done"]
      }

      env {
        TASK_WORD = "of the task"
      }

      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
