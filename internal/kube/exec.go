package kube

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/mattn/go-isatty"
)

// Bounds on credential plugins.
const (
	DefaultExecTimeout = 2 * time.Minute // people log in within it
	maxExecOutput      = 1 << 20         // bytes
	execGrace          = 2 * time.Second // for the output of a plugin that was ended
)

// execPlugin is how a kubeconfig names a program that gives out credentials:
// https://kubernetes.io/docs/reference/access-authn-authz/authentication/#client-go-credential-plugins
type execPlugin struct {
	APIVersion string   `json:"apiVersion"`
	Command    string   `json:"command"`
	Args       []string `json:"args"`
	Env        []struct {
		Name  string `json:"name"`
		Value string `json:"value"`
	} `json:"env"`
	InstallHint string `json:"installHint"`
	ClusterInfo bool   `json:"provideClusterInfo"`
	Interactive string `json:"interactiveMode"` // Never, IfAvailable or Always
}

// execVersions are the versions of the interface that are spoken.
var execVersions = []string{"client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1"}

// execExtension is the extension of a cluster that is handed to plugins.
const execExtension = "client.authentication.k8s.io/exec"

// execCredential is the ExecCredential that a plugin reads and answers with.
type execCredential struct {
	APIVersion string       `json:"apiVersion"`
	Kind       string       `json:"kind"`
	Spec       execSpec     `json:"spec"`
	Status     *execGranted `json:"status,omitempty"`
}

type execSpec struct {
	Cluster     *execCluster `json:"cluster,omitempty"`
	Interactive bool         `json:"interactive"`
}

type execCluster struct {
	Server     string `json:"server"`
	ServerName string `json:"tls-server-name,omitempty"`
	Insecure   bool   `json:"insecure-skip-tls-verify,omitempty"`
	CA         []byte `json:"certificate-authority-data,omitempty"`
	ProxyURL   string `json:"proxy-url,omitempty"`
	Config     any    `json:"config,omitempty"`
}

type execGranted struct {
	Expires     time.Time `json:"expirationTimestamp,omitzero"`
	Token       string    `json:"token,omitempty"`
	Certificate string    `json:"clientCertificateData,omitempty"` // PEM
	Key         string    `json:"clientKeyData,omitempty"`         // PEM
}

// PluginError says that a credential plugin gave out no credential.
type PluginError struct {
	Command string // with its arguments, as a person would run it
	Err     error
}

func (e *PluginError) Error() string {
	return fmt.Sprintf("get credentials from %q: %v", e.Command, e.Err)
}

func (e *PluginError) Unwrap() error { return e.Err }

// execSource runs a plugin and keeps what it granted until that ends.
type execSource struct {
	plugin      execPlugin
	dir         string
	env         []string // of the plugin, besides this process's
	interactive bool
	o           ExecOptions

	turn    chan struct{} // holds one entry while nobody uses what follows
	granted execGranted
	pair    *tls.Certificate
	have    bool
}

// newExecCredential checks what a kubeconfig says about a plugin. It runs nothing.
func newExecCredential(p execPlugin, dir string, c kubeCluster, ca []byte, o ExecOptions) (*execSource, error) {
	if o.Tell == nil {
		return nil, fmt.Errorf("it gets its credentials from the program %q, which is not run here: use a kubeconfig with a token or a certificate", p.Command)
	}
	if p.Command == "" {
		return nil, errors.New("its exec names no command")
	}
	if !slices.Contains(execVersions, p.APIVersion) {
		return nil, fmt.Errorf("its exec speaks %q; only %s are spoken here", p.APIVersion, strings.Join(execVersions, " and "))
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Timeout <= 0 {
		o.Timeout = DefaultExecTimeout
	}
	s := &execSource{plugin: p, dir: dir, o: o, turn: make(chan struct{}, 1)}
	s.turn <- struct{}{}
	terminal := o.Stdin != nil && isatty.IsTerminal(o.Stdin.Fd())
	switch p.Interactive {
	case "Always":
		if !terminal {
			return nil, fmt.Errorf("its program %q must ask a person, and there is no terminal", p.Command)
		}
		s.interactive = true
	case "IfAvailable":
		s.interactive = terminal
	case "Never":
	case "":
		if p.APIVersion != execVersions[1] {
			return nil, fmt.Errorf("its exec has no interactiveMode, which %s requires", p.APIVersion)
		}
		s.interactive = terminal
	default:
		return nil, fmt.Errorf("its exec has the interactiveMode %q, not Never, IfAvailable or Always", p.Interactive)
	}
	info := execCredential{APIVersion: p.APIVersion, Kind: "ExecCredential", Spec: execSpec{Interactive: s.interactive}}
	if p.ClusterInfo {
		info.Spec.Cluster = &execCluster{Server: c.Server, ServerName: c.ServerName, Insecure: c.Insecure, CA: ca, ProxyURL: c.ProxyURL}
		for _, e := range c.Extensions {
			if e.Name == execExtension {
				info.Spec.Cluster.Config = e.Extension
			}
		}
	}
	b, err := json.Marshal(info)
	if err != nil {
		return nil, fmt.Errorf("encode what its program is told: %w", err)
	}
	for _, e := range p.Env {
		s.env = append(s.env, e.Name+"="+e.Value)
	}
	s.env = append(s.env, "KUBERNETES_EXEC_INFO="+string(b))
	return s, nil
}

// token is a Config.Token. It is empty where the plugin grants a certificate.
func (s *execSource) token(ctx context.Context) (string, error) {
	g, _, err := s.get(ctx)
	return g.Token, err
}

// certificate is a Config.ClientCertificate. It is nil where the plugin grants a
// token.
func (s *execSource) certificate(ctx context.Context) (*tls.Certificate, error) {
	_, pair, err := s.get(ctx)
	return pair, err
}

func (s *execSource) get(ctx context.Context) (execGranted, *tls.Certificate, error) {
	select {
	case <-s.turn:
		defer func() { s.turn <- struct{}{} }()
	case <-ctx.Done():
		return execGranted{}, nil, ctx.Err()
	}
	if s.have && (s.granted.Expires.IsZero() || s.o.Now().Before(s.granted.Expires)) {
		return s.granted, s.pair, nil
	}
	g, pair, err := s.run(ctx)
	if err != nil {
		if errors.Is(err, context.Canceled) {
			return execGranted{}, nil, err
		}
		if s.plugin.InstallHint != "" && errors.Is(err, exec.ErrNotFound) {
			err = fmt.Errorf("%w. The kubeconfig says: %s", err, s.plugin.InstallHint)
		}
		return execGranted{}, nil, &PluginError{Command: s.line(), Err: err}
	}
	s.granted, s.pair, s.have = g, pair, true
	return g, pair, nil
}

// program is the plugin's program, relative to the kubeconfig when it is a path, and
// looked for as ever when it is a name.
func (s *execSource) program() string {
	if strings.ContainsRune(s.plugin.Command, filepath.Separator) {
		return resolve(s.dir, s.plugin.Command)
	}
	return s.plugin.Command
}

// line is the plugin's command line.
func (s *execSource) line() string {
	return strings.Join(append([]string{s.program()}, s.plugin.Args...), " ")
}

func (s *execSource) run(caller context.Context) (g execGranted, pair *tls.Certificate, err error) {
	ctx, cancel := context.WithTimeout(caller, s.o.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.program(), s.plugin.Args...)
	cmd.Env = append(os.Environ(), s.env...)
	cmd.WaitDelay = execGrace
	out := &bounded{left: maxExecOutput, over: cancel}
	said := &bounded{left: 8 << 10}
	cmd.Stdout, cmd.Stderr = out, said
	if s.o.Stderr != nil {
		cmd.Stderr = s.o.Stderr
	}
	if s.interactive {
		cmd.Stdin = s.o.Stdin
	} else {
		ownGroup(cmd)
	}
	s.o.Tell(s.line())
	err = cmd.Run()
	switch {
	case errors.Is(caller.Err(), context.Canceled):
		return g, nil, caller.Err()
	case out.cut:
		return g, nil, fmt.Errorf("it printed more than %d bytes", maxExecOutput)
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return g, nil, fmt.Errorf("it was not done within %s", s.o.Timeout)
	case err != nil:
		if text := strings.TrimSpace(said.buf.String()); text != "" {
			return g, nil, fmt.Errorf("%w: %s", err, text)
		}
		return g, nil, err
	}
	var answer execCredential
	if err := json.Unmarshal(out.buf.Bytes(), &answer); err != nil {
		return g, nil, errors.New("it did not print an ExecCredential in JSON") // the text may hold a secret
	}
	if answer.Kind != "ExecCredential" || answer.APIVersion != s.plugin.APIVersion {
		return g, nil, fmt.Errorf("it printed %s of %s, not ExecCredential of %s", cmp.Or(answer.Kind, "something"), cmp.Or(answer.APIVersion, "no version"), s.plugin.APIVersion)
	}
	if answer.Status == nil || answer.Status.Token == "" && answer.Status.Certificate == "" {
		return g, nil, errors.New("its ExecCredential has neither a token nor a client certificate")
	}
	g = *answer.Status
	if g.Certificate != "" || g.Key != "" {
		p, err := tls.X509KeyPair([]byte(g.Certificate), []byte(g.Key))
		if err != nil {
			return g, nil, fmt.Errorf("its client certificate and key: %w", err)
		}
		pair = &p
	}
	return g, pair, nil
}

// bounded keeps the beginning of what is written to it.
type bounded struct {
	buf  bytes.Buffer // not embedded: its ReadFrom knows no bound
	left int
	cut  bool
	over func() // called when there is more; may be nil
}

func (b *bounded) Write(p []byte) (int, error) {
	n := min(len(p), b.left)
	b.buf.Write(p[:n])
	b.left -= n
	if n < len(p) && !b.cut {
		b.cut = true
		if b.over != nil {
			b.over()
		}
	}
	return len(p), nil
}
