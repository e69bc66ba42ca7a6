# When the template changes, a script runs in the container.
variable "image" {}

job "change-script" {
  type = "service"

  group "change-script" {
    task "change-script" {
      driver = "nspawn"

      config {
        image   = var.image
        boot    = false
        command = ["/bin/sh", "-c", "trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done"]
      }

      env {
        TASK_WORD = "of the task"
      }

      template {
        data        = "{{ with nomadVar \"nomad/jobs\" }}{{ .word }}{{ end }}\n"
        destination = "local/word"
        change_mode = "script"
        splay       = "0s"

        change_script {
          command       = "/bin/sh"
          args          = ["-c", "echo $(cat /local/word) $TASK_WORD > /alloc/data/new && mv /alloc/data/new /alloc/data/said"]
          timeout       = "20s"
          fail_on_error = true
        }
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
