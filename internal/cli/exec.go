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
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

const (
	// statusFor bounds the wait for an instance to be running or stopped.
	statusFor = 60 * time.Second
	pollEvery = 500 * time.Millisecond
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
			"service. It waits up to a minute for an instance that is on its way to run, and ends with the command's exit code.\n" +
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
			id, err := instances.find(s, args[0])
			if err != nil {
				return err
			}
			if err := s.await(id, args[0], "running"); err != nil {
				return err
			}
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

// await waits until an instance has a status, running or stopped, and tells once
// what for. One that is stopped will not run by itself.
func (s *session) await(id, ref, want string) error {
	ctx, cancel := context.WithTimeout(s.ctx(), statusFor)
	defer cancel()
	for told := s.quiet; ; told = true {
		var o object
		_, err := s.client.do(ctx, request{method: http.MethodGet, path: instances.at(id), query: instances.one()}, &o)
		status := o.text("status")
		switch {
		case errors.Is(ctx.Err(), context.DeadlineExceeded):
			return fmt.Errorf("instance %s is not %s after %s; tabard is instance %s shows how far it is", ref, want, statusFor, ref)
		case err != nil:
			return err
		case status == want:
			return nil
		case status == "stopped":
			return fmt.Errorf("instance %s is stopped: start it with tabard is instance-start %s", ref, ref)
		case status == "failed" || status == "deleting":
			return errors.New(strings.TrimSpace(fmt.Sprintf("instance %s is %s %s", ref, status, o.text("status_reasons.message"))))
		}
		if !told {
			fmt.Fprintf(s.cmd.ErrOrStderr(), "Instance %s is %s; waiting up to %s for it to be %s.\n", plain(ref), plain(status), statusFor, want)
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
	// The rest of an environment could make the command run other code; the
	// server has no say in that.
	for _, k := range []string{"http_proxy", "no_proxy", "TABARD_METADATA_URL"} {
		if v, ok := access.Environment[k]; ok {
			c.Env = append(c.Env, k+"="+v)
		}
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
