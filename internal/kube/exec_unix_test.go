//go:build unix

package kube

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestAnInterruptionIsNoFailureOfThePlugin(t *testing.T) {
	dir := t.TempDir()
	script := "#!/bin/sh\nsleep 600 &\nwait\n"
	if err := os.WriteFile(filepath.Join(dir, "get-token"), []byte(script), 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	s, err := newExecCredential(execPlugin{APIVersion: execVersions[0], Command: "./get-token", Interactive: "Never"}, dir, kubeCluster{}, nil,
		ExecOptions{Tell: func(string) { cancel() }})
	if err != nil {
		t.Fatal(err)
	}
	var failed *PluginError
	if _, err := s.token(ctx); !errors.Is(err, context.Canceled) || errors.As(err, &failed) {
		t.Errorf("error is %v, want that the caller gave up", err)
	}
}

func TestAPluginThatFailsIsNamedWithItsArguments(t *testing.T) {
	s, err := newExecCredential(execPlugin{APIVersion: execVersions[0], Command: "false", Args: []string{"--for", "me"}, Interactive: "Never"}, t.TempDir(), kubeCluster{}, nil,
		ExecOptions{Tell: func(string) {}})
	if err != nil {
		t.Fatal(err)
	}
	var failed *PluginError
	if _, err := s.token(t.Context()); !errors.As(err, &failed) || failed.Command != "false --for me" {
		t.Errorf("error is %v, want one that names the command", err)
	}
}
