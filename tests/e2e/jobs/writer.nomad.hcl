# Writes numbered lines without an end. Whatever dies around it, no line is lost, and its exit code is its own.
variable "image" {}

job "writer" {
  type = "batch"

  group "writer" {
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }

    task "writer" {
      driver = "nspawn"

      config {
        image   = var.image
        boot    = false
        command = ["/bin/sh", "-c", <<-EOF
          i=0
          until test -e /local/end; do
            i=$((i + 1))
            echo "line-$i-"
            usleep 2000
          done
          echo last
          exit 42
        EOF
        ]
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
