package guest

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// Key is a pair of SSH keys.
type Key struct {
	Private string // file
	Public  string // line of authorized_keys, without its end
}

// NewKey makes a pair of SSH keys for a test.
func NewKey(t testing.TB) Key {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	line, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "id_ed25519")
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	return Key{Private: path, Public: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(line)))}
}

// Client logs in to a guest with Debian's ssh.
type Client struct {
	Address   string
	Key       Key
	User      string // root when empty
	Namespace string // name of the network namespace to call from; the test's own when empty
}

// Run runs a line for the guest's shell and returns what it writes to its
// standard output. A command that fails there makes an error with what it wrote
// to its standard error; *exec.ExitError inside it has its status, or 255 when
// there was no login.
func (c Client) Run(ctx context.Context, line string) (string, error) {
	user := c.User
	if user == "" {
		user = "root"
	}
	args := []string{
		"ssh", "-F", "/dev/null", "-i", c.Key.Private, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5",
		"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", user + "@" + c.Address, line,
	}
	if c.Namespace != "" {
		args = append([]string{"ip", "netns", "exec", c.Namespace}, args...)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s on %s: %w\n%s", line, c.Address, err, &stderr)
	}
	return stdout.String(), nil
}

// Wait returns once a login works. A guest needs some ten seconds to start
// under emulation, and more on a busy machine.
func (c Client) Wait(ctx context.Context) error {
	for {
		_, err := c.Run(ctx, "true")
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for a login: %w; the last try: %w", ctx.Err(), err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
