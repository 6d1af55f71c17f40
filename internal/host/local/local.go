// Package local runs machines without any privilege and on any system: a
// machine is one loopback listener for its metadata service, and the
// environment that makes programs find it. It is for a laptop and for CI.
//
// A program with that environment reaches http://169.254.169.254 and
// http://api.metadata.cloud.ibm.com verbatim, because it takes the listener for
// its HTTP proxy; the listener knows these two hosts and refuses to be a proxy
// for any other. TABARD_METADATA_URL is for programs that ignore http_proxy.
//
// The listener is the machine: whoever can open a connection to its port is in
// it. Every process of this computer can, so the identities of local machines
// are worth what the computer's own users are worth. Where that is not enough,
// use the netns driver.
package local

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/serve"
)

// The two hosts that the metadata service answers for
// (reference/instance-metadata-and-vpc.md section 1.1).
const (
	metadataAddress = "169.254.169.254"
	metadataName    = "api.metadata.cloud.ibm.com"
)

// Config are the driver's collaborators.
type Config struct {
	Log *slog.Logger // nil discards
}

// New returns the driver.
func New(cfg Config) host.Driver {
	return &driver{log: cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)), machines: map[string]*machine{}}
}

type driver struct {
	log *slog.Logger

	mu       sync.Mutex
	closed   bool
	machines map[string]*machine
}

type machine struct {
	handlers    host.Handlers
	serving     bool
	servers     *serve.Group
	environment map[string]string
}

func (d *driver) Name() string { return "local" }

// Found implements [host.Driver]: listeners end with their process.
func (d *driver) Found(context.Context) ([]string, error) { return nil, nil }

func (d *driver) Start(ctx context.Context, m host.Machine, h host.Handlers) error {
	if m.ID == "" {
		return errors.New("starting a machine without an id")
	}
	if m.External != nil {
		return &host.Refusal{Reason: "The local driver cannot serve a machine that something else runs."}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return fmt.Errorf("starting machine %s: the driver is closed", m.ID)
	}
	if d.machines[m.ID] != nil {
		return fmt.Errorf("machine %s runs already", m.ID)
	}
	x := &machine{handlers: h, servers: &serve.Group{Log: d.log.With("machine", m.ID)}}
	if err := x.follow(ctx, m); err != nil {
		return fmt.Errorf("starting machine %s: %w", m.ID, err)
	}
	d.machines[m.ID] = x
	return nil
}

// Update implements [host.Driver].
func (d *driver) Update(ctx context.Context, m host.Machine) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	x := d.machines[m.ID]
	if x == nil {
		return fmt.Errorf("machine %s does not run", m.ID)
	}
	return x.follow(ctx, m)
}

// follow opens or closes the metadata listener. Programs find it as their HTTP
// proxy, and there is none for https here: then nothing answers.
func (x *machine) follow(ctx context.Context, m host.Machine) error {
	on := m.Metadata.Enabled && m.Metadata.Protocol != "https"
	switch {
	case on && x.handlers.Metadata == nil:
		return errors.New("the metadata service is on but has no handler")
	case on && x.serving:
		return nil
	case on:
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp4", "127.0.0.1:0")
		if err != nil {
			return fmt.Errorf("opening the metadata listener: %w", err)
		}
		own := l.Addr().(*net.TCPAddr).AddrPort()
		x.servers.Serve(l.(*net.TCPListener), netip.Addr{}, door(own, x.handlers.Metadata), serve.Metadata())
		x.environment = map[string]string{
			"http_proxy":          "http://" + own.String(),
			"no_proxy":            direct(x.handlers.ServerAddrs),
			"TABARD_METADATA_URL": "http://" + own.String(),
		}
	default:
		x.servers.Stop(ctx)
		// Without a proxy the request would leave for the real link-local
		// address, which may be that of the cloud this machine runs in.
		x.environment = map[string]string{"http_proxy": nowhere, "no_proxy": direct(x.handlers.ServerAddrs)}
	}
	x.serving = on
	return nil
}

// nowhere is a proxy that nobody serves: port 1 of loopback.
const nowhere = "http://127.0.0.1:1"

// direct is the value of no_proxy: the hosts that are not the metadata
// service's.
func direct(servers []netip.AddrPort) string {
	var hosts []string
	for _, s := range servers {
		if a := s.Addr().Unmap(); a.IsValid() && !a.IsUnspecified() {
			hosts = append(hosts, a.WithZone("").String())
		}
	}
	slices.Sort(hosts)
	hosts = slices.Compact(hosts)
	for _, h := range []string{"127.0.0.1", "localhost"} {
		if !slices.Contains(hosts, h) {
			hosts = append(hosts, h)
		}
	}
	return strings.Join(hosts, ",")
}

// door admits requests for the metadata service, however they were addressed,
// and hands them on as if they had come straight to 169.254.169.254.
func door(own netip.AddrPort, next http.Handler) http.Handler {
	// A page in a browser can be made to resolve its own name to 127.0.0.1; its
	// requests then still carry that name.
	loopback := []string{own.String(), fmt.Sprintf("localhost:%d", own.Port())}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodConnect {
			http.Error(w, "This is the metadata service of one instance. It makes no tunnels.", http.StatusMethodNotAllowed)
			return
		}
		name := strings.ToLower(strings.TrimSuffix(r.Host, ":80"))
		switch {
		case name == metadataAddress, name == metadataName:
		case r.URL.Host == "" && slices.Contains(loopback, name):
			name = metadataAddress
		default:
			http.Error(w, "This is the metadata service of one instance. It is no proxy for other hosts.", http.StatusForbidden)
			return
		}
		if r.URL.Host != "" && r.URL.Scheme != "http" {
			http.Error(w, "The metadata service speaks http only.", http.StatusForbidden)
			return
		}
		in := r.WithContext(r.Context())
		in.URL = &url.URL{Path: cmp.Or(r.URL.Path, "/"), RawPath: r.URL.RawPath, RawQuery: r.URL.RawQuery, ForceQuery: r.URL.ForceQuery}
		in.RequestURI = in.URL.RequestURI()
		in.Host = name
		in.Header = r.Header.Clone()
		in.Header.Del("Proxy-Connection")
		in.Header.Del("Proxy-Authorization")
		next.ServeHTTP(w, in)
	})
}

// Ended implements [host.Driver]: a listener does not end by itself.
func (d *driver) Ended() <-chan string { return nil }

// Delete implements [host.Driver].
func (d *driver) Delete(ctx context.Context, id string) error { return d.Stop(ctx, id, true) }

func (d *driver) Stop(ctx context.Context, id string, _ bool) error {
	d.mu.Lock()
	x := d.machines[id]
	delete(d.machines, id)
	d.mu.Unlock()
	if x != nil {
		x.servers.Stop(ctx)
	}
	return nil
}

func (d *driver) Access(id string) (host.Access, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x := d.machines[id]
	if x == nil {
		return host.Access{}, false
	}
	environment := make(map[string]string, len(x.environment))
	for k, v := range x.environment {
		environment[k] = v
	}
	return host.Access{Driver: d.Name(), Environment: environment}, true
}

func (d *driver) Close() error {
	d.mu.Lock()
	d.closed = true
	machines := d.machines
	d.machines = nil
	d.mu.Unlock()
	var each sync.WaitGroup
	for _, x := range machines {
		each.Go(func() { x.servers.Stop(context.Background()) })
	}
	each.Wait()
	return nil
}
