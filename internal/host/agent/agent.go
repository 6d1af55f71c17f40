// Package agent is the service that runs on each hypervisor host. It joins the
// host to an installation, keeps a stream of what is placed on it, has the
// drivers run that, and serves each instance its metadata and identity service,
// signed with the host's own key.
//
// The server is asked for nothing that the host can answer itself. While it is
// away, metadata and identity tokens are served on, with their events kept on
// the host's disk until the server takes them; access tokens, which only the
// server can give, are refused with 503.
package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/sync/errgroup"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/authority"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/journal"
	"tabard.dev/tabard/internal/metadata"
	"tabard.dev/tabard/internal/store/datadir"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/vpc"
)

// Config is everything that an agent can set.
type Config struct {
	Server    string // URL of the IAM server; only needed to join
	Dir       string // of the host's state, machines and images
	JoinToken string // file with the join token; only needed to join
	CAFile    string // authority of the server's certificate, besides the system's
	Insecure  bool   // plain HTTP to a server on another machine
	Master    token.MasterKey
	Version   string
	Metrics   string // address of /metrics, /healthz and /readyz; "" serves none

	// Drivers makes what runs machines, when it is known who the host is.
	Drivers func(ctx context.Context, e Environment) (host.Driver, link.Capacity, error)

	// Found, when not nil, looks for machines that something else runs until
	// the context ends, and tells all of them whenever they have changed.
	Found func(ctx context.Context, log *slog.Logger, tell func(context.Context, []link.Machine) error)

	Now func() time.Time
	Log *slog.Logger
}

// Environment is what drivers are made with.
type Environment struct {
	Dir    string
	Images *client
	CA     string // PEM, for the guests of machines whose metadata service speaks https
	Log    *slog.Logger

	// Address is the one by which this host reaches the server; invalid when it
	// has none of IPv4.
	Address netip.Addr
}

// Agent is a host at work.
type Agent struct {
	cfg        Config
	state      *state
	id         identity
	client     *client
	world      *world
	outbox     *Outbox
	journal    *journal.Journal
	driver     host.Driver
	capacity   link.Capacity
	service    *metadata.Service
	controller *host.Controller
	metrics    *metrics
	monitor    net.Listener // nil without metrics
	lock       *os.File
	connected  atomic.Bool

	found  atomic.Pointer[[]link.Machine] // what something else runs here, as it was found last
	untold chan struct{}                  // signalled when the server may not know it
}

// Open prepares the host: it joins with the token, unless it has joined before,
// and opens what it keeps on disk. The caller must call Run.
func Open(ctx context.Context, cfg Config) (_ *Agent, err error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	a := &Agent{cfg: cfg, untold: make(chan struct{}, 1)}
	defer func() {
		if err != nil {
			a.close()
		}
	}()
	joinToken, err := readToken(cfg.JoinToken)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the agent's directory: %w", err)
	}
	if a.lock, err = datadir.Lock(cfg.Dir); err != nil {
		return nil, err
	}
	if a.state, err = openState(ctx, cfg.Dir, cfg.Master, joinToken); err != nil {
		return nil, err
	}
	if err := a.join(ctx, joinToken); err != nil {
		return nil, err
	}
	if a.outbox, err = OpenOutbox(cfg.Dir, cfg.Log); err != nil {
		return nil, err
	}
	a.journal = journal.New(journal.Config{Store: a.outbox})
	a.world = newWorld(a.id.ID, cfg.Log)
	a.world.send = a.report
	if err := a.world.load(a.state); err != nil && !errors.Is(err, os.ErrNotExist) {
		cfg.Log.Warn("what was placed on this host before cannot be read; it comes again from the server", "error", err)
	}
	ca, err := authority.New(authority.Config{
		Host: a.id.Name, Sealer: a.state.sealer, Store: authority.File(filepath.Join(cfg.Dir, authorityFile)), Now: cfg.Now,
	})
	if err != nil {
		return nil, err
	}
	address, err := a.ownAddress(ctx)
	if err != nil {
		return nil, err
	}
	if a.driver, a.capacity, err = cfg.Drivers(ctx, Environment{
		Dir: cfg.Dir, Images: a.client, CA: ca.RootPEM(), Log: cfg.Log, Address: address,
	}); err != nil {
		return nil, err
	}
	a.capacity.Version, a.capacity.IdentityCA = cfg.Version, ca.IdentityRootPEM()
	a.metrics = a.newMetrics()
	if cfg.Metrics != "" {
		var lc net.ListenConfig
		if a.monitor, err = lc.Listen(ctx, "tcp", cfg.Metrics); err != nil {
			return nil, fmt.Errorf("listen for metrics: %w", err)
		}
	}
	a.service = metadata.New(metadata.Config{
		Instances: a.world, IAM: a.client, Signer: a.client.signer, Certificates: ca, Journal: a.journal,
		Tokens: &attest.OwnInstances{HostID: a.id.ID, Keys: a.client.signer, Placements: a.world, Region: a.id.Region, Now: cfg.Now},
		Names:  crn.Names{CName: a.id.CName, CType: a.id.CType}, Region: a.id.Region, Now: cfg.Now, Log: cfg.Log,
		Observe: a.metrics.observe,
	})
	a.controller = host.NewController(host.ControllerConfig{
		World: a.world, Driver: a.driver, Log: cfg.Log,
		Handlers: func(id string) host.Handlers {
			return host.Handlers{Metadata: a.service.Handler(id), MetadataTLS: ca.TLSConfig()}
		},
	})
	return a, nil
}

// ownAddress returns the address by which the host reaches the server, or did.
func (a *Agent) ownAddress(ctx context.Context) (netip.Addr, error) {
	now := a.client.ownAddress(ctx)
	if !now.IsValid() || now == a.id.Address {
		return a.id.Address, nil
	}
	a.id.Address = now
	if err := a.state.become(a.id); err != nil {
		return netip.Addr{}, fmt.Errorf("keep by which address this host reaches the server: %w", err)
	}
	return now, nil
}

// readToken reads a join token's file. One that is gone, or was emptied after
// the host has joined, is not an error by itself.
func readToken(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read the join token: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// join makes sure that the host knows who it is.
func (a *Agent) join(ctx context.Context, joinToken string) error {
	tr, err := transport(a.cfg.CAFile)
	if err != nil {
		return err
	}
	// Nothing that the server answers sends the host, with its token, elsewhere.
	hc := &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	server := cmp.Or(a.cfg.Server, a.state.who.Server)
	if server == "" {
		return errors.New("this host has not joined any server: give --server URL and --join-token-file FILE; 'tabard host create-join-token NAME' makes the token")
	}
	if server, err = checkURL(server, a.cfg.Insecure); err != nil {
		return err
	}
	if a.state.token != "" {
		if err := a.joinNow(ctx, hc, server, joinToken); err != nil && !a.state.joined {
			return err
		} else if err != nil {
			a.cfg.Log.Warn("the join token is not taken; going on as the host that this is already", "error", err)
		}
	}
	if !a.state.joined && a.cfg.JoinToken != "" {
		return fmt.Errorf("this host has not joined, and there is no join token in %s; 'tabard host create-join-token NAME --file FILE' makes one", a.cfg.JoinToken)
	}
	if !a.state.joined {
		return errors.New("this host has not joined: give --join-token-file FILE; 'tabard host create-join-token NAME' makes the token")
	}
	key, err := a.state.key()
	if err != nil {
		return err
	}
	who := a.state.who
	if server != who.Server {
		// It has moved. What is signed for it must name its new endpoint.
		who.Server = server
		if who.TokenEndpoint, err = discover(ctx, hc, server); err != nil {
			return err
		}
		if err := a.state.become(who); err != nil {
			return err
		}
	}
	a.id = who
	a.client = newClient(server, who.TokenEndpoint, who.ID, &Signer{Key: key, KeyID: who.KeyID}, a.cfg.Now, hc)
	return nil
}

func (a *Agent) joinNow(ctx context.Context, hc *http.Client, server, joinToken string) error {
	endpoint, err := discover(ctx, hc, server)
	if err != nil {
		return err
	}
	key, err := a.state.joiningKey()
	if err != nil {
		return err
	}
	jwk, err := jose.JSONWebKey{Key: key.Public(), Algorithm: string(jose.RS256), Use: "sig"}.MarshalJSON()
	if err != nil {
		return fmt.Errorf("encode the host's public key: %w", err)
	}
	answer, err := join(ctx, hc, server, endpoint, joinToken, &Signer{Key: key}, jwk, a.cfg.Now())
	if err != nil {
		return fmt.Errorf("join %s: %w", server, err)
	}
	id := identity{Server: server, TokenEndpoint: endpoint, JoinedWith: link.Fingerprint(joinToken), JoinAnswer: answer}
	if err := a.state.become(id); err != nil {
		return err
	}
	a.cfg.Log.Info("joined", "server", server, "host", id.Name, "id", id.ID)
	return nil
}

// Connected reports whether the server is there.
func (a *Agent) Connected() bool { return a.connected.Load() }

// Run works until the context ends. Machines go on running after it when their
// driver was made to keep them.
func (a *Agent) Run(ctx context.Context) error {
	a.cfg.Log.Info("serving instances", "host", a.id.Name, "driver", a.driver.Name(), "server", a.client.server)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return a.controller.Run(ctx) })
	group.Go(func() error { a.listen(ctx); return nil })
	group.Go(func() error { a.drain(ctx); return nil })
	group.Go(func() error { a.world.keep(ctx, a.state); return nil })
	group.Go(func() error { a.service.Run(ctx); return nil })
	if a.monitor != nil {
		group.Go(func() error { return a.serveMetrics(ctx, a.monitor) })
	}
	if a.cfg.Found != nil {
		group.Go(func() error {
			a.cfg.Found(ctx, a.cfg.Log, func(_ context.Context, m []link.Machine) error {
				a.found.Store(&m)
				a.tellFound()
				return nil
			})
			return nil
		})
		group.Go(func() error { a.sendFound(ctx); return nil })
	}
	err := group.Wait()
	a.close()
	return err
}

func (a *Agent) close() {
	if a.journal != nil {
		a.journal.Close()
	}
	if a.outbox != nil {
		if err := a.outbox.Close(); err != nil {
			a.cfg.Log.Error("close the outbox", "error", err)
		}
	}
	if a.client != nil {
		a.client.http.CloseIdleConnections()
	}
	if a.monitor != nil {
		_ = a.monitor.Close() // Run may have closed it
	}
	if a.lock != nil {
		a.lock.Close()
	}
}

// Bounds on the waits between attempts to reach the server.
const (
	firstWait = 200 * time.Millisecond
	longWait  = 5 * time.Second
)

// listen keeps the stream of placements open.
func (a *Agent) listen(ctx context.Context) {
	wait, said := firstWait, ""
	for ctx.Err() == nil {
		a.world.begin()
		err := a.client.stream(ctx, a.capacity, func(m link.Message) error {
			if m.Hello != nil {
				a.connected.Store(true)
				wait, said = firstWait, ""
				a.cfg.Log.Info("the server is there", "server", a.client.server)
				a.tellFound()
				return a.outbox.Recorded(m.Hello.Recorded)
			}
			a.world.hear(m)
			return nil
		})
		if ctx.Err() != nil {
			return
		}
		// Said once for each cause, and not at every attempt.
		a.connected.Store(false)
		switch cause := err.Error(); {
		case cause == said:
		case errors.Is(err, errRefused):
			a.cfg.Log.Error("the server does not admit this host; revoked hosts join again with a new join token", "error", err)
		default:
			a.cfg.Log.Warn("the server is away; metadata and identity tokens are served on", "error", err)
		}
		said = err.Error()
		if errors.Is(err, errRefused) {
			wait = longWait
		}
		pause(ctx, wait)
		wait = min(2*wait, longWait)
	}
}

// drain sends the events of the outbox to the server.
func (a *Agent) drain(ctx context.Context) {
	wait, most := firstWait, link.MaxEvents
	for ctx.Err() == nil {
		batch, err := a.outbox.Next(most, link.MaxBatchBytes)
		if err == nil && len(batch.Events) == 0 {
			select {
			case <-ctx.Done():
			case <-a.outbox.More():
			}
			continue
		}
		if err == nil {
			err = a.deliver(ctx, batch)
		}
		if err == nil {
			wait, most = firstWait, link.MaxEvents
			continue
		}
		if fault.Is(err, fault.TooLarge) && most > 1 {
			most = max(1, len(batch.Events)/2)
			continue
		}
		if ctx.Err() == nil && !fault.Is(err, fault.Unavailable) {
			a.cfg.Log.Error("events are not delivered; they are kept and sent again", "waiting", a.outbox.Waiting(), "error", err)
		}
		pause(ctx, wait)
		wait = min(2*wait, longWait)
	}
}

func (a *Agent) deliver(ctx context.Context, batch link.Events) error {
	var answer link.Recorded
	if err := a.client.call(ctx, link.PathEvents, "", batch, &answer); err != nil {
		return err
	}
	return a.outbox.Recorded(answer)
}

func (a *Agent) tellFound() {
	select {
	case a.untold <- struct{}{}:
	default:
	}
}

// sendFound tells the server what was found on this host, whenever that has
// changed and each time that the server is there again: it does not keep it.
func (a *Agent) sendFound(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.untold:
		}
		m := a.found.Load()
		if m == nil {
			continue
		}
		if err := a.client.call(ctx, link.PathFound, "", link.Found{Machines: *m}, nil); err != nil && ctx.Err() == nil {
			a.cfg.Log.Warn("what was found on this host is told when the server is there again", "error", err)
		}
	}
}

// report tells the server what was done with an instance. That one is gone is
// told last: the server takes no events about an instance that it has forgotten.
func (a *Agent) report(ctx context.Context, r vpc.Report) error {
	if r.Status == "" {
		wait, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		if err := a.outbox.Delivered(wait); err != nil {
			return fmt.Errorf("wait until the server has the events of instance %s: %w", r.InstanceID, err)
		}
	}
	return a.client.call(ctx, link.PathReports, "", r, nil)
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
