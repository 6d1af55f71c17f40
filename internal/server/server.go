package server

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/sync/errgroup"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/vpcapi"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/checkpoint"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/export"
	"tabard.dev/tabard/internal/export/routes"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/authority"
	"tabard.dev/tabard/internal/journal"
	"tabard.dev/tabard/internal/metadata"
	"tabard.dev/tabard/internal/placement"
	"tabard.dev/tabard/internal/retention"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/blob"
	"tabard.dev/tabard/internal/store/datadir"
	"tabard.dev/tabard/internal/store/diskwatch"
	"tabard.dev/tabard/internal/store/sqlite"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/usage"
)

// Server is an installation that is open. Run serves it.
type Server struct {
	cfg        Config
	store      store.Store
	watch      *diskwatch.Watch // what store is
	operator   string           // the operator's account
	directory  *directory.Directory
	journal    *journal.Journal
	signer     *checkpoint.Signer
	keys       *token.KeyRing
	hostKeys   *token.KeyRing
	host       *host.Controller // nil without a driver
	metadata   *metadata.Service
	scheduler  *placement.Scheduler
	reviewer   *attest.Reviewer
	disks      *blob.Store
	images     *vpcapi.Images
	stopping   chan struct{} // closed when streams are to end
	opened     time.Time
	mux        *http.ServeMux
	listeners  []net.Listener
	gate       *gate
	http       *http.Server
	serving    *errgroup.Group // one for each listener; ended by http's end
	tls        *tls.Config     // nil for plain HTTP
	lock       *os.File
	draining   atomic.Bool
	usage      *usage.Tracker
	sweeper    *retention.Sweeper
	exports    *export.Manager
	exported   *routes.Keeper
	logKeeper  *retention.Log
	attempts   *journal.Attempts
	routeTable api.Routes
}

// Open makes or opens the installation in the data directory and binds its
// addresses. The caller must call Run or Close.
func Open(ctx context.Context, cfg Config) (_ *Server, err error) {
	if err := cfg.Complete(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, stopping: make(chan struct{}), opened: time.Now()}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("make the data directory: %w", err)
	}
	// One that was there before may be open to others; nothing in it is theirs.
	if err := os.Chmod(cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("close the data directory to others: %w", err)
	}
	if s.lock, err = datadir.Lock(cfg.DataDir); err != nil {
		return nil, err
	}
	if err := s.bind(ctx); err != nil {
		return nil, err
	}
	s.serve(ctx)

	catalog, err := access.ParseCatalog(access.Builtin())
	if err != nil {
		return nil, err
	}
	openStore := sqlite.Open
	if cfg.Treeless {
		openStore = sqlite.OpenTreeless
	}
	if err := s.storeWasRemoved(); err != nil {
		return nil, err
	}
	opened, err := openStore(ctx, filepath.Join(cfg.DataDir, storeName))
	if freed, freeErr := diskwatch.FreeReserve(cfg.DataDir, err); freed > 0 {
		cfg.Log.Warn("the disk is full to the last byte; the reserve was freed to open the store", "bytes", freed)
		opened, err = openStore(ctx, filepath.Join(cfg.DataDir, storeName))
	} else if freeErr != nil {
		err = errors.Join(err, freeErr)
	}
	if err != nil {
		return nil, err
	}
	s.store = opened
	names := crn.Names{CName: s.cfg.CName, CType: s.cfg.CType}
	if err := s.watchStore(ctx, opened, names); err != nil {
		return nil, err
	}
	if s.directory, err = directory.Open(ctx, directory.Config{Store: s.store, Catalog: catalog, Now: cfg.Now}); err != nil {
		return nil, err
	}
	sealer, err := s.openSealer(ctx)
	if err != nil {
		return nil, err
	}
	driver, err := s.openDriver()
	if err != nil {
		return nil, err
	}
	metrics := newMetrics(s.directory)
	s.journal = journal.New(journal.Config{Store: s.store, Committed: metrics.committed})
	metrics.watchSpace(s.watch)

	s.signer, err = checkpoint.Open(ctx, checkpoint.Config{
		Store: s.store, Directory: s.directory, Sealer: sealer, Issuer: s.cfg.Issuer, Now: cfg.Now, Log: cfg.Log,
	})
	if err != nil {
		return nil, err
	}
	operator, err := s.firstAccount(ctx, names, sealer)
	if err != nil {
		return nil, err
	}
	s.exports = export.New(export.Config{
		Store: s.store, Directory: s.directory, Journal: s.journal, Names: names, Now: cfg.Now, Log: cfg.Log, OperatorAccount: operator,
	})
	s.exported = &routes.Keeper{
		File: cfg.ActivityRoutes, Manager: s.exports, Sender: routes.Sender{Issuer: s.cfg.Issuer, Version: cfg.Version},
	}
	if err := s.exported.Read(); err != nil {
		return nil, err
	}
	metrics.watchRoutes(s.exports)
	s.operator = operator
	s.keys, err = token.NewKeyRing(ctx, token.KeyRingConfig{
		Directory: s.directory, Sealer: sealer, Now: cfg.Now, Log: cfg.Log,
		Use: "access-token", Alg: cfg.Alg, Rotation: cfg.KeyRotation, Lead: keyLead, MaxLife: token.RefreshLife,
	})
	if err != nil {
		return nil, err
	}
	s.hostKeys, err = token.NewKeyRing(ctx, token.KeyRingConfig{
		Directory: s.directory, Sealer: sealer, Now: cfg.Now, Log: cfg.Log,
		Use: "host/" + cluster.LocalHost, Prefix: attest.IdentityIssuer(cfg.Region) + "_", Alg: string(jose.RS256),
		Rotation: cfg.KeyRotation, Lead: keyLead, MaxLife: attest.MaxLifetime,
		Changed: s.publishHost,
	})
	if err != nil {
		return nil, err
	}

	s.usage, err = usage.Open(ctx, usage.Config{Directory: s.directory, Log: cfg.Log, Now: cfg.Now}, s.store)
	if err != nil {
		return nil, err
	}
	s.attempts = journal.NewAttempts(journal.AttemptsConfig{Record: s.journal.Record, Now: cfg.Now, Log: cfg.Log})
	s.sweeper = &retention.Sweeper{Directory: s.directory, Names: names, Now: cfg.Now, Log: cfg.Log}
	if err := s.keepLog(names); err != nil {
		return nil, err
	}
	issuer := &token.Issuer{Keys: s.keys, URL: s.cfg.Issuer, Now: cfg.Now}
	clusterKeys := &attest.Keys{Now: cfg.Now, Opener: sealer, MaxAge: cfg.ClusterKeysMaxAge, Observe: metrics.keysFetched}
	s.reviewer = &attest.Reviewer{Opener: sealer, Now: cfg.Now, Log: cfg.Log, Observe: metrics.reviewed}
	workloads := &attest.Workloads{Clusters: s.directory, Issuers: s.directory, Keys: clusterKeys, Reviewer: s.reviewer, Now: cfg.Now}
	metrics.watchCredentials(s.directory, sealer, cfg.Now)
	instances := &attest.Instances{Hosts: s.directory, Region: cfg.Region, Now: cfg.Now}
	proofs := &attest.HostProofs{Hosts: s.directory, Audience: s.cfg.Issuer + "/token", Now: cfg.Now}
	grants := grant.New(grant.Config{
		Directory: s.directory,
		Workloads: workloads,
		Instances: instances,
		Hosts:     proofs,
		Users:     &attest.Users{Providers: s.directory, Keys: clusterKeys, Now: cfg.Now},
		Tokens:    issuer, Sealer: sealer, Journal: s.journal, Names: names, Now: cfg.Now,
		OperatorAccount: operator, Attempts: s.attempts, Usage: s.usage, Observe: metrics.granted,
	})
	if s.disks, err = blob.Open(filepath.Join(cfg.DataDir, "images")); err != nil {
		return nil, err
	}
	s.images = vpcapi.NewImages(vpcapi.ImagesConfig{Directory: s.directory, Blobs: s.disks, Log: cfg.Log, OperatorAccount: operator})
	s.scheduler = &placement.Scheduler{Directory: s.directory, Now: cfg.Now, Log: cfg.Log}
	if err := s.openHost(driver, hostServices{grants: grants, instances: instances, sealer: sealer, names: names, metrics: metrics}); err != nil {
		return nil, err
	}
	s.mux = s.routes(routesConfig{
		api: &api.Config{
			Directory: s.directory, Auth: grants, Journal: s.journal, Names: names, URL: s.cfg.URL,
			Region: cfg.Region, Now: cfg.Now, Log: cfg.Log, OperatorAccount: operator,
			Events: s.store, Attempts: s.attempts, Usage: s.usage, Routes: &s.routeTable,
		},
		grants: grants, proofs: proofs, sealer: sealer, clusterKeys: clusterKeys, workloads: workloads, metrics: metrics,
	})
	return s, nil
}

// ReadRoutes reads the file of the activity log's routes again. With a file that
// cannot be used the routes stay as they are.
func (s *Server) ReadRoutes() error { return s.exported.Read() }

// bind opens the listeners, so that the server's URL is known when the rest is
// put together.
func (s *Server) bind(ctx context.Context) error {
	if s.cfg.TLSCert != "" {
		cert, err := tls.LoadX509KeyPair(s.cfg.TLSCert, s.cfg.TLSKey)
		if err != nil {
			return fmt.Errorf("load the TLS certificate: %w", err)
		}
		s.tls = &tls.Config{
			Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"},
		}
	}
	var lc net.ListenConfig
	for _, addr := range s.cfg.Listen {
		l, err := lc.Listen(ctx, "tcp", addr)
		if err != nil {
			return fmt.Errorf("listen on %s: %w", addr, err)
		}
		if s.tls != nil {
			l = tls.NewListener(l, s.tls)
		}
		s.listeners = append(s.listeners, l)
	}
	if s.cfg.URL == "" {
		scheme := "http"
		if s.cfg.TLSCert != "" {
			scheme = "https"
		}
		s.cfg.URL = scheme + "://" + reachable(s.listeners[0].Addr())
	}
	s.cfg.URL = strings.TrimSuffix(s.cfg.URL, "/")
	if s.cfg.Issuer == "" {
		s.cfg.Issuer = s.cfg.URL + "/identity"
	}
	return nil
}

// reachable turns a wildcard address into one that a client on this machine
// can use.
func reachable(a net.Addr) string {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil || !ap.Addr().IsUnspecified() {
		return a.String()
	}
	return fmt.Sprintf("127.0.0.1:%d", ap.Port())
}

// URL is where clients on this machine reach the server.
func (s *Server) URL() string { return s.cfg.URL }

// firstAccount makes the first account if there is none, and returns the
// operator's account: the oldest one.
func (s *Server) firstAccount(ctx context.Context, names crn.Names, sealer *token.Sealer) (string, error) {
	file := filepath.Join(s.cfg.DataDir, "owner.json")
	draft := file + ".new"
	accounts := s.directory.Accounts.All()
	if len(accounts) == 0 {
		owner := bootstrap.NewOwner(s.cfg.Account, s.cfg.URL)
		// The file is written before the account exists and gets its name
		// after: killed in between, the next start finds either no account
		// or the draft with its key.
		if err := writePrivate(draft, owner); err != nil {
			return "", err
		}
		err := s.directory.Update(ctx, owner.IAMID, func(tx *directory.Tx) error {
			bootstrap.Account(tx, s.directory, names, owner, sealer.Hash(owner.APIKey))
			return nil
		})
		if err != nil {
			return "", fmt.Errorf("make the first account: %w", err)
		}
		accounts = s.directory.Accounts.All()
		s.cfg.Log.Info("made the first account; its owner's API key is in the file", "account", owner.AccountID, "file", file)
	}
	if whole(draft) {
		if err := os.Rename(draft, file); err != nil {
			return "", fmt.Errorf("name the owner's file: %w", err)
		}
	}
	if err := refreshURL(file, s.cfg.URL); err != nil {
		return "", err
	}
	oldest := accounts[0]
	for _, a := range accounts {
		if a.CreatedAt.Before(oldest.CreatedAt) {
			oldest = a
		}
	}
	return oldest.ID, nil
}

// whole reports whether the file holds an owner. One that a crash cut short
// must not take the place of the file that it was to replace.
func whole(file string) bool {
	b, err := os.ReadFile(file)
	var o bootstrap.Owner
	return err == nil && json.Unmarshal(b, &o) == nil && o.APIKey != ""
}

// refreshURL keeps the URL in the owner's file true when the server moved. The
// owner may have put the file away.
func refreshURL(file, url string) error {
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the owner's file: %w", err)
	}
	var o bootstrap.Owner
	if err := json.Unmarshal(b, &o); err != nil {
		return fmt.Errorf("the owner's file %s is not what was written: %w", file, err)
	}
	if o.URL == url {
		return nil
	}
	o.URL = url
	if err := writePrivate(file+".new", o); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

func writePrivate(file string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	// A file that lies there already may be somebody else's, or open to others.
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("write the owner's file: %w", err)
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("write the owner's file: %w", err)
	}
	_, err = f.Write(append(b, '\n'))
	// The account that the key in it opens must not be there without it.
	if err := errors.Join(err, f.Sync(), f.Close(), datadir.Sync(filepath.Dir(file))); err != nil {
		return fmt.Errorf("write the owner's file: %w", err)
	}
	return nil
}

// publishHost keeps the local host's record in step with its keys.
func (s *Server) publishHost(tx *directory.Tx, published jose.JSONWebKeySet) {
	set, err := json.Marshal(published)
	if err != nil {
		// A key set of our own always encodes; without the record no identity
		// token is accepted, which is the safe side.
		s.cfg.Log.Error("encode the host's keys", "error", err)
		return
	}
	h := cluster.Host{ID: cluster.LocalHost, Name: cluster.LocalHost}
	if old, ok := s.directory.Hosts.Get(cluster.LocalHost); ok {
		h = *old
	}
	h.JWKS = set
	s.directory.Hosts.Put(tx, &h)
}

// openSealer loads the master key. A new one is made only where nothing is
// sealed yet: beside data that was sealed under another key, a new key would
// hide the loss of the old one.
func (s *Server) openSealer(ctx context.Context) (*token.Sealer, error) {
	master := s.cfg.Master
	if master.File == "" {
		master.File = filepath.Join(s.cfg.DataDir, "master.key")
	}
	key, err := master.Load(ctx, s.directory.Accounts.Len() == 0)
	if err != nil {
		return nil, err
	}
	return token.NewSealer(key)
}

// openDriver makes what runs instances on this machine, or nil.
func (s *Server) openDriver() (host.Driver, error) {
	sum := sha256.Sum256([]byte(absolute(s.cfg.DataDir)))
	return newDriver(s.cfg.Driver, hex.EncodeToString(sum[:4]), s.cfg.Log)
}

// hostServices are what the server's own host works with.
type hostServices struct {
	grants    *grant.Service
	instances *attest.Instances
	sealer    *token.Sealer
	names     crn.Names
	metrics   *metrics
}

// openHost prepares the server's own machine to run instances.
func (s *Server) openHost(driver host.Driver, with hostServices) error {
	if driver == nil {
		return nil
	}
	ca, err := authority.New(authority.Config{
		Host: cluster.LocalHost, Sealer: with.sealer, Store: authority.File(filepath.Join(s.cfg.DataDir, "authority.json")), Now: s.cfg.Now,
	})
	if err != nil {
		return err
	}
	world := &host.Own{Directory: s.directory, HostID: cluster.LocalHost}
	s.metadata = metadata.New(metadata.Config{
		Instances: world, IAM: with.grants, Tokens: with.instances, Signer: s.hostKeys, Certificates: ca, Journal: s.journal,
		Names: with.names, Region: s.cfg.Region, Now: s.cfg.Now, Log: s.cfg.Log,
	})
	var addrs []netip.AddrPort
	for _, l := range s.listeners {
		if ap, err := netip.ParseAddrPort(l.Addr().String()); err == nil {
			addrs = append(addrs, ap)
		}
	}
	s.scheduler.Arrive(cluster.LocalHost, placement.Capacity{Drivers: []string{driver.Name()}})
	s.host = host.NewController(host.ControllerConfig{
		World: world, Driver: driver, Log: s.cfg.Log,
		Handlers: func(id string) host.Handlers {
			return host.Handlers{
				Metadata: s.metadata.Handler(id), MetadataTLS: ca.TLSConfig(), Server: s.handler(), ServerAddrs: addrs, ServerTLS: s.tls,
			}
		},
	})
	s.cfg.Log.Info("instances run on this machine", "driver", driver.Name())
	return nil
}

func absolute(dir string) string {
	if abs, err := filepath.Abs(dir); err == nil {
		return abs
	}
	return dir
}

// handler is the server's routes with what encloses all of them.
func (s *Server) handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		api.WithTransaction(s.mux).ServeHTTP(w, r)
	})
}

// Bounds on connections.
const (
	headerTimeout = 10 * time.Second
	readTimeout   = 30 * time.Second
	writeTimeout  = 60 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 64 << 10 // bytes; an access token stands in one
	drainTimeout  = 20 * time.Second
	refuseTimeout = 2 * time.Second // for those who waited for a server that does not start
)

// serve begins to take connections, before there is anything to serve: requests
// wait at the gate until Run opens it.
func (s *Server) serve(ctx context.Context) {
	s.gate = newGate(s.refuseEarly)
	s.http = &http.Server{
		Handler:           api.WithTransaction(s.gate),
		ReadHeaderTimeout: headerTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout,
		IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
	}
	s.serving = &errgroup.Group{}
	for _, l := range s.listeners {
		s.serving.Go(func() error {
			if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve %s: %w", l.Addr(), err)
			}
			return nil
		})
	}
}

// Run serves until the context ends, then finishes the requests under way,
// stops the machines and closes the store.
func (s *Server) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(s.serving.Wait)
	s.gate.open(s.mux)
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	workers, background := errgroup.WithContext(background)
	for _, run := range []func(context.Context){s.keys.Run, s.hostKeys.Run, s.usage.Run, s.sweeper.Run, s.scheduler.Run, s.images.Run, s.attempts.Run, s.exports.Run, s.watch.Run, s.logKeeper.Run} {
		workers.Go(func() error { run(background); return nil })
	}
	if s.host != nil {
		workers.Go(func() error { return s.host.Run(background) })
		workers.Go(func() error { s.metadata.Run(background); return nil })
	}
	if !s.cfg.Treeless {
		workers.Go(func() error { s.signer.Run(background); return nil })
	}
	group.Go(func() error {
		<-ctx.Done()
		s.draining.Store(true)
		close(s.stopping)
		s.cfg.Log.Info("stopping: finishing the requests under way")
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		if err := s.http.Shutdown(drain); err != nil {
			return fmt.Errorf("drain: %w", err)
		}
		return nil
	})
	err := group.Wait()
	stop()
	err = errors.Join(err, workers.Wait(), s.Close())
	if err == nil {
		s.cfg.Log.Info("stopped")
	}
	return err
}

// Close releases what Open took. After Run there is nothing left to do.
func (s *Server) Close() error {
	var errs []error
	if s.http != nil {
		// After Run this finds nothing; a server that never ran refuses whom it
		// let wait.
		s.gate.open(nil)
		refusing, cancel := context.WithTimeout(context.Background(), refuseTimeout)
		if err := s.http.Shutdown(refusing); err != nil {
			errs = append(errs, s.http.Close())
		}
		cancel()
		errs = append(errs, s.serving.Wait())
		s.http = nil
	}
	for _, l := range s.listeners {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	s.listeners = nil
	if s.usage != nil && s.store != nil {
		// Not within the time of any request: this is the last write.
		err := s.usage.Flush(context.Background())
		var refused *store.RefusedError
		if errors.As(err, &refused) {
			s.cfg.Log.Warn("the last counts of use are lost", "error", err) // for which a server on a full disk need not fail
			err = nil
		}
		errs = append(errs, err)
	}
	if s.reviewer != nil {
		s.reviewer.Close()
	}
	if s.journal != nil {
		s.journal.Close()
	}
	if s.signer != nil && s.store != nil && !s.cfg.Treeless {
		// Nothing comes after it. Without it the events since the last one are
		// in no checkpoint until the next start.
		if err := s.signer.Sign(context.Background()); err != nil {
			s.cfg.Log.Error("no last checkpoint of the activity log was signed; see: tabard activity verify", "error", err)
		}
	}
	if s.store != nil {
		errs = append(errs, s.store.Close())
		s.store = nil
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
		s.lock = nil
	}
	return errors.Join(slices.DeleteFunc(errs, func(err error) bool { return err == nil })...)
}
