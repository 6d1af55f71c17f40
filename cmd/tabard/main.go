// Command tabard is Tabard in one binary: the server, the demo and the command
// line client.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"tabard.dev/tabard/internal/cli"
	"tabard.dev/tabard/internal/demo"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := cli.Execute(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr, services()...)
	stop()
	os.Exit(code)
}

// services are the commands that stay: everything but the client.
func services() []*cobra.Command {
	return []*cobra.Command{
		serverCommand(), agentCommand(), cli.In("ks", webhookCommand()), cli.In("ks", controllerCommand()), demo.Command(),
	}
}
