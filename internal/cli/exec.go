package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

const (
	// runningFor bounds the wait for an instance to be running.
	runningFor = 60 * time.Second
	pollEvery  = 500 * time.Millisecond
)

// localAccess says how this machine gets into an instance that runs on it.
type localAccess struct {
	Driver      string            `json:"driver"`    // netns or local
	Namespace   string            `json:"namespace"` // name of the network namespace, of driver netns
	Environment map[string]string `json:"environment"`
}

func instanceExecCommand() *cobra.Command {
	c := spec{
		use: "instance-exec INSTANCE -- COMMAND [ARGUMENT...]", short: "Run a command inside an instance of this machine",
		more: "For instances that the local drivers run: the command gets the instance's network, and with it its metadata\n" +
			"service. It waits up to a minute for the instance to be running, and ends with the command's exit code.\n" +
			"Entering an instance's network needs root.",
		example: "tabard is instance-exec my-instance -- sh",
		args:    cobra.MinimumNArgs(1),
		run: func(s *session, args []string) error {
			command := args[1:]
			if len(command) > 0 && command[0] == "--" {
				command = command[1:]
			}
			if len(command) == 0 {
				return Usage("name the command to run, after --")
			}
			o, err := s.running(args[0])
			if err != nil {
				return err
			}
			id := o.text("id")
			var access localAccess
			if _, err := s.client.do(s.ctx(), request{method: http.MethodGet, path: instances.at(id, "local_access"), query: instances.one()}, &access); err != nil {
				return during(err, "ask how to enter instance "+args[0])
			}
			return s.enter(id, access, command)
		},
	}.command()
	// Flags after the instance's name are the command's own.
	c.Flags().SetInterspersed(false)
	return c
}

// running waits until an instance is running.
func (s *session) running(ref string) (object, error) {
	id, err := instances.find(s, ref)
	if err != nil {
		return object{}, err
	}
	ctx, cancel := context.WithTimeout(s.ctx(), runningFor)
	defer cancel()
	for {
		var o object
		_, err := s.client.do(ctx, request{method: http.MethodGet, path: instances.at(id), query: instances.one()}, &o)
		status := o.text("status")
		switch {
		case ctx.Err() != nil && s.ctx().Err() == nil:
			return o, fmt.Errorf("instance %s is not running after %s", ref, runningFor)
		case err != nil:
			return o, err
		case status == "running":
			return o, nil
		case slices.Contains([]string{"stopped", "stopping"}, status):
			return o, fmt.Errorf("instance %s is %s: start it with tabard is instance-start %s", ref, status, ref)
		case slices.Contains([]string{"failed", "deleting"}, status):
			return o, fmt.Errorf("instance %s is %s %s", ref, status, o.text("status_reasons.message"))
		}
		select {
		case <-ctx.Done():
		case <-time.After(pollEvery):
		}
	}
}

// enter runs a command inside an instance.
func (s *session) enter(id string, access localAccess, command []string) error {
	c := exec.Command(command[0], command[1:]...) //nolint:noctx // the command ends when the user ends it, not when a timeout does
	c.Stdin, c.Stdout, c.Stderr = s.cmd.InOrStdin(), s.cmd.OutOrStdout(), s.cmd.ErrOrStderr()
	// An input that is not a file must not hold up the end.
	c.WaitDelay = time.Second
	c.Env = append(os.Environ(), "TABARD_INSTANCE_ID="+id, "TABARD_SERVER="+s.URL)
	for k, v := range access.Environment {
		c.Env = append(c.Env, k+"="+v)
	}
	var err error
	switch access.Driver {
	case "local":
		err = c.Start()
	case "netns":
		if name := access.Namespace; name == "" || name == "." || name == ".." || name != filepath.Base(name) {
			return fmt.Errorf("the server named a network namespace %q, which cannot be one", name)
		}
		err = startInNamespace(filepath.Join("/run/netns", access.Namespace), c)
	default:
		return fmt.Errorf("instances of driver %q cannot be entered from here", access.Driver)
	}
	if err != nil {
		return fmt.Errorf("run %s: %w", command[0], err)
	}
	return wait(c)
}

// wait waits for a command and returns its exit code, as the shell would write
// it. What the terminal sends, the command gets by itself; an end that was asked
// of this program alone is passed on.
func wait(c *exec.Cmd) error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for sig := range signals {
			if sig != os.Interrupt {
				_ = c.Process.Signal(sig) // it may have ended meanwhile
			}
		}
	}()
	err := c.Wait()
	signal.Stop(signals)
	close(signals)
	<-done
	var ended *exec.ExitError
	switch {
	case errors.As(err, &ended):
		if code := ended.ExitCode(); code >= 0 {
			return childExit(code)
		}
		if status, ok := ended.Sys().(syscall.WaitStatus); ok {
			return childExit(128 + int(status.Signal()))
		}
		return childExit(exitFailed)
	case err != nil && !errors.Is(err, exec.ErrWaitDelay):
		return fmt.Errorf("wait for the command: %w", err)
	}
	return nil
}

// UnmarshalJSON refuses an answer without a driver, which is not one.
func (a *localAccess) UnmarshalJSON(b []byte) error {
	type bare localAccess
	if err := json.Unmarshal(b, (*bare)(a)); err != nil {
		return err
	}
	if a.Driver == "" {
		return errors.New("no driver is named")
	}
	return nil
}
