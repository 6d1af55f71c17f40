// Command tabard is Tabard in one binary: the server, the demo and the command
// line client.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"tabard.dev/tabard/internal/cli"
	"tabard.dev/tabard/internal/demo"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := cli.Execute(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr, serverCommand(), agentCommand(),
		cli.In("ks", webhookCommand()), cli.In("ks", controllerCommand()), demo.Command())
	stop()
	os.Exit(code)
}
