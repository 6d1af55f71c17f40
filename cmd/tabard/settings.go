package main

import (
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"tabard.dev/tabard/internal/cli"
)

// settings are those that every program has that runs for long.
type settings struct {
	file     string
	logLevel string
}

// flags adds the flags of the settings to a command.
func (s *settings) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.file, "config", "", "configuration `FILE` in YAML")
	cmd.Flags().StringVar(&s.logLevel, "log-level", "info", "debug, info, warn or error")
}

// settle sets the command's flags from all sources and returns the program's
// log. The name is the command's, as people type it.
func (s *settings) settle(cmd *cobra.Command, name string) (*slog.Logger, error) {
	if err := settle(name, cmd.Flags(), s.file, os.LookupEnv); err != nil {
		return nil, cli.Usage("%v", err)
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(s.logLevel)); err != nil {
		return nil, cli.Usage("log-level: %v", err)
	}
	return slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level})), nil
}
