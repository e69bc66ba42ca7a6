# A service of one program: a web server that needs no image of its own, because it takes the machine's /usr. Needs Python on
# the host.
#
#   nomad job run examples/service.nomad.hcl
job "service" {
  group "web" {
    network {
      # The container is in the host's network, so the program itself listens on the port that Nomad has chosen.
      port "http" {}
    }

    restart {
      attempts = 3
      delay    = "5s"
    }

    task "web" {
      driver = "nspawn"

      # A command that is process 1 gets only signals that it has a handler for. Python has one for SIGINT.
      kill_signal  = "SIGINT"
      kill_timeout = "10s"

      config {
        image            = "/"
        volatile         = "yes"
        boot             = false
        user_namespacing = false

        # No shell reads these words, so the shell is asked for: it knows the variable, and becomes the server.
        command = ["/bin/sh", "-c", "exec python3 -m http.server --directory /local \"$NOMAD_PORT_http\""]
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
