package vm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// box is an instance that is a namespace: what runs in it has no kernel of its
// own, but the same wire as a virtual machine.
type box struct {
	instance
	site  *site
	space string // namespace
	host  *node
}

// silence is how long nothing may come back until it counts as no answer.
const silence = 2 * time.Second

// furnish makes a network and a profile for boxes.
func (s *site) furnish() {
	s.t.Helper()
	s.cli("iam", "trusted-profile-create", "my-trusted-profile")
	s.cli("iam", "trusted-profile-policy-create", "my-trusted-profile", "--roles", "Operator", "--service-name", "is")
	s.cli("is", "vpc-create", "my-vpc")
	s.cli("is", "subnet-create", "my-subnet", "my-vpc", "--zone", "us-south-3", "--ipv4-address-count", "256")
}

// ask has an instance made that is a namespace, and does not wait for it.
func (s *site) ask(name string, args ...string) {
	s.t.Helper()
	s.cli(append([]string{"is", "instance-create", name, "my-vpc", "us-south-3", "bx2-2x8", "my-subnet", "--image", "tabard-local-1",
		"--metadata-service", "true", "--default-trusted-profile", "my-trusted-profile"}, args...)...)
}

// boxes makes instances that are namespaces.
func (s *site) boxes(names ...string) []*box {
	s.t.Helper()
	for _, name := range names {
		s.ask(name)
	}
	var out []*box
	for _, name := range names {
		out = append(out, s.boxNamed(name))
	}
	return out
}

// box makes one, with further arguments.
func (s *site) box(name string, args ...string) *box {
	s.t.Helper()
	s.ask(name, args...)
	return s.boxNamed(name)
}

// boxNamed waits until an instance runs, and finds its namespace.
func (s *site) boxNamed(name string) *box {
	s.t.Helper()
	b := &box{instance: s.become(name, "running"), site: s}
	for _, h := range s.hosts {
		space := h.mark() + "-i-" + digest(b.ID)
		if _, err := os.Stat("/run/netns/" + space); err == nil {
			b.space, b.host = space, h
			return b
		}
	}
	s.t.Fatalf("no host has the namespace of %s", name)
	return nil
}

// mark begins the names of all namespaces that a host's agent makes.
func (h *node) mark() string { return "tabard-" + digest(h.dir) }

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:4])
}

func (b *box) address() string { return b.PrimaryInterface.PrimaryIP.Address }

// sh runs a line of the shell inside.
func (b *box) sh(line string) (string, error) { return b.site.try(b.space, "sh", "-c", line) }

func (b *box) mustSh(line string) string {
	b.site.t.Helper()
	out, err := b.sh(line)
	if err != nil {
		b.site.t.Fatalf("in %s: %v", b.Name, err)
	}
	return strings.TrimSpace(out)
}

// answer is what curl got.
type answer struct {
	status int // 0: none
	body   string
	err    error
}

func (a answer) String() string { return fmt.Sprintf("status %d, %v: %s", a.status, a.err, a.body) }

// timedOut tells that nothing came back at all.
func (a answer) timedOut() bool { return exitCode(a.err) == 28 }

// curl asks with the real one.
func (b *box) curl(args ...string) answer { return b.site.curl(b.space, args...) }

func (s *site) curl(space string, args ...string) answer {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	args = append([]string{"--net=/run/netns/" + space, "curl", "-sS", "--noproxy", "*", "--max-time", "20", "-w", "\n%{http_code}"}, args...)
	cmd := exec.CommandContext(ctx, "nsenter", args...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	text, code := string(out), ""
	if n := strings.LastIndexByte(text, '\n'); n >= 0 {
		text, code = text[:n], text[n+1:]
	}
	a := answer{body: text}
	fmt.Sscan(code, &a.status)
	if err != nil {
		a.err = fmt.Errorf("%w: %s", err, strings.TrimSpace(errs.String()))
	}
	return a
}

// quick makes curl give up on somebody who is silent.
func quick(args ...string) []string {
	return append([]string{"--connect-timeout", fmt.Sprint(silence.Seconds()), "--max-time", fmt.Sprint(2 * silence.Seconds())}, args...)
}

// What an instance asks its own service for.
const (
	service   = "http://169.254.169.254"
	tokenPath = "/identity/v1/token?version=2025-08-26"
	iamPath   = "/identity/v1/iam_tokens?version=2025-08-26"
	ownPath   = "/metadata/v1/instance?version=2025-08-26"
	flavor    = "Metadata-Flavor: ibm"
)

// wantToken asks for an identity token.
func wantToken(base string, args ...string) []string {
	return append([]string{"-X", "PUT", base + tokenPath, "-H", flavor, "-d", "{}"}, args...)
}

// identity gets an identity token, seconds long.
func (b *box) identity(seconds int) string {
	b.site.t.Helper()
	a := b.curl("-X", "PUT", service+tokenPath, "-H", flavor, "-d", fmt.Sprintf(`{"expires_in":%d}`, seconds))
	token := stringField(a.body, "access_token")
	if a.status != 200 || token == "" {
		b.site.t.Fatalf("%s gets no identity token: %s", b.Name, a)
	}
	return token
}

// exchange asks for an access token for an identity token.
func (b *box) exchange(token string) answer {
	return b.curl("-X", "POST", service+iamPath, "-H", "Authorization: Bearer "+token)
}

// read reads the instance's own metadata with an identity token.
func (b *box) read(token string) answer {
	return b.curl(service+ownPath, "-H", "Authorization: Bearer "+token)
}

// works checks that an instance gets all that is its own: an attack that failed
// because nothing works would prove nothing.
func (b *box) works(t *testing.T) {
	t.Helper()
	token := b.identity(600)
	if got := subject(token); got != b.ID {
		t.Errorf("%s gets the identity of %s", b.Name, got)
	}
	if a := b.read(token); a.status != 200 || stringField(a.body, "id") != b.ID {
		t.Errorf("%s reads of itself: %s", b.Name, a)
	}
	if a := b.exchange(token); a.status != 200 || stringField(a.body, "access_token") == "" {
		t.Errorf("%s gets no access token: %s", b.Name, a)
	}
}

// stringField returns a member of a JSON object, or "".
func stringField(body, name string) string {
	var v map[string]any
	if json.Unmarshal([]byte(body), &v) != nil {
		return ""
	}
	s, _ := v[name].(string)
	return s
}

// subject is the instance that an identity token is about, unchecked.
func subject(token string) string {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return ""
	}
	var claims struct {
		IaaS struct {
			ID string `json:"instanceID"`
		} `json:"iaas"`
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(b, &claims) != nil {
		return ""
	}
	return claims.IaaS.ID
}

// within runs f on a thread that is in a namespace.
func within(space string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and the thread ends with the goroutine
		fd, err := unix.Open("/run/netns/"+space, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// dialFrom connects from inside a namespace.
func dialFrom(space, to string, d net.Dialer) (c net.Conn, err error) {
	d.Timeout = silence
	err = within(space, func() (err error) {
		c, err = d.Dial("tcp4", to)
		return err
	})
	return c, err
}

// say sends bytes as they are to the metadata service, and returns all that
// comes back until it closes or is silent.
func (b *box) say(t *testing.T, raw string) string {
	t.Helper()
	c, err := dialFrom(b.space, "169.254.169.254:80", net.Dialer{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, raw); err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(io.LimitReader(bufio.NewReader(c), 1<<20))
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatal(err)
	}
	return string(out)
}

// card is the network card of an instance.
func (b *box) card(t *testing.T) (mac net.HardwareAddr, index int) {
	t.Helper()
	err := within(b.space, func() error {
		i, err := net.InterfaceByName("eth0")
		if err == nil {
			mac, index = i.HardwareAddr, i.Index
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return mac, index
}

// packets is a socket that sends and sees whole frames of an instance's card.
func (b *box) packets(t *testing.T) *packets {
	t.Helper()
	p := &packets{t: t}
	p.mac, p.index = b.card(t)
	err := within(b.space, func() (err error) {
		p.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, htons(unix.ETH_P_ALL))
		if err == nil {
			err = unix.Bind(p.fd, &unix.SockaddrLinklayer{Protocol: uint16(htons(unix.ETH_P_ALL)), Ifindex: p.index})
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(p.fd) })
	return p
}

type packets struct {
	t     *testing.T
	fd    int
	mac   net.HardwareAddr // of the card
	index int
}

func htons(v uint16) int { return int(v>>8 | v<<8) }

func (p *packets) send(frame []byte) {
	p.t.Helper()
	if err := unix.Sendto(p.fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: p.index}); err != nil {
		p.t.Fatal(err)
	}
}

// gather returns the frames that came in and fit, until the time of silence is
// over.
func (p *packets) gather(fits func([]byte) bool) [][]byte {
	var out [][]byte
	buf := make([]byte, 4096)
	for end := time.Now().Add(silence); ; {
		left := time.Until(end)
		if left <= 0 {
			return out
		}
		tv := unix.NsecToTimeval(int64(left))
		if err := unix.SetsockoptTimeval(p.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			p.t.Error(err)
			return out
		}
		n, from, err := unix.Recvfrom(p.fd, buf, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return out
		case err != nil:
			p.t.Error(err)
			return out
		}
		if l, ok := from.(*unix.SockaddrLinklayer); ok && l.Pkttype != unix.PACKET_OUTGOING && fits(buf[:n]) {
			out = append(out, bytes.Clone(buf[:n]))
		}
	}
}

// sub runs a part of a test with the site's failures being its own.
func (s *site) sub(name string, f func(t *testing.T)) {
	whole := s.t
	defer func() { s.t = whole }()
	whole.Run(name, func(t *testing.T) {
		s.t = t
		f(t)
	})
}

// connected waits until the server has a host's stream.
func (s *site) connected(hosts ...*node) {
	s.t.Helper()
	for _, h := range hosts {
		s.await(h.name+" is connected", func() bool {
			var list []struct{ Name, Status string }
			s.json(&list, "host", "list")
			return slices.ContainsFunc(list, func(x struct{ Name, Status string }) bool { return x.Name == h.name && x.Status == "connected" })
		})
	}
}
