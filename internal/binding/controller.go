package binding

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"tabard.dev/tabard/internal/iamclient"
	"tabard.dev/tabard/internal/kube"
)

const workers = 4

// Defaults of a [Config].
const (
	DefaultResync  = time.Minute
	DefaultSweep   = 10 * time.Minute
	DefaultLease   = 15 * time.Second
	DefaultProfile = "tabard-controller"
)

// Config is what a controller works with.
type Config struct {
	Kube *kube.Client // of the cluster

	IAM       string // URL of the IAM server
	Insecure  bool   // reach it by plain HTTP beyond loopback
	CAFile    string // PEM, of the authority of its certificate besides the system's; "" is none
	Profile   string // name or id of the controller's own; default [DefaultProfile]
	TokenFile string // with the pod's token for the IAM server, read anew for each exchange
	Cluster   string // name or id that the cluster is registered by

	Namespace string        // of the lease
	Holder    string        // this replica, in the lease and in events
	Lease     time.Duration // that a replica leads without renewing; 3 s at least, default [DefaultLease]
	Resync    time.Duration // between two looks at a binding that nobody touched; default [DefaultResync]
	Sweep     time.Duration // between two searches for orphaned links; default [DefaultSweep]

	Metrics string // address of /metrics, /healthz and /readyz; "" serves none
	Now     func() time.Time
	Log     *slog.Logger
}

// Controller reconciles the bindings of one cluster.
type Controller struct {
	cfg  Config
	kube *kube.Client
	iam  iam

	election *election
	metrics  *metrics
	monitor  net.Listener // nil without metrics
	ready    atomic.Bool  // it follows the cluster, or waits for its turn to lead

	mu        sync.Mutex
	cluster   registeredCluster
	clusterAt time.Time // when it was looked up
	foreign   error     // why it is not the one that the controller works in

	// Of the time as the leader.
	queue      *queue
	bindings   *mirror[boundAs]
	accounts   *mirror[string] // UIDs of service accounts
	namespaces *mirror[string] // their annotation
	lost       chan lost
}

// boundAs is what the controller must know of a binding without asking: whether
// it has something to do, and where its link is.
type boundAs struct {
	uid        string
	generation int64
	deleted    bool
	finalizer  bool
	profileID  string
}

// New returns a controller. It makes no request. The error says what is wrong
// with the configuration, or with the token file.
func New(cfg Config) (*Controller, error) {
	if cfg.Profile == "" {
		cfg.Profile = DefaultProfile
	}
	for _, d := range []struct {
		value    *time.Duration
		standard time.Duration
	}{{&cfg.Lease, DefaultLease}, {&cfg.Resync, DefaultResync}, {&cfg.Sweep, DefaultSweep}} {
		if *d.value == 0 {
			*d.value = d.standard
		}
	}
	switch {
	case cfg.Cluster == "":
		return nil, errors.New("say by which name the cluster is registered at the IAM server: --cluster NAME; 'tabard ks cluster-register NAME' registers it")
	case cfg.TokenFile == "":
		return nil, errors.New("say where the controller's own token is: --token-file FILE")
	case cfg.Namespace == "" || cfg.Holder == "":
		return nil, errors.New("the lease needs a namespace and a holder")
	case cfg.Lease < 3*time.Second:
		return nil, errors.New("a lease must last for 3 seconds at least")
	case cfg.Resync < time.Second || cfg.Sweep < time.Second:
		return nil, errors.New("looks at bindings and searches for orphaned links must be a second apart at least")
	}
	client, err := iamclient.New(iamclient.Config{
		URL: cfg.IAM, Insecure: cfg.Insecure, CAFile: cfg.CAFile, Profile: cfg.Profile, TokenFile: cfg.TokenFile, Now: cfg.Now,
	})
	if err != nil {
		return nil, fmt.Errorf("the IAM server: %w", err)
	}
	if err := client.CheckToken(); err != nil {
		return nil, fmt.Errorf("%w; say with --token-file FILE where the controller's own service-account token is, for the audience iam", err)
	}
	c := &Controller{cfg: cfg, kube: cfg.Kube, metrics: newMetrics()}
	c.election = &election{
		kube: c.kube, namespace: cfg.Namespace, name: "tabard-controller", holder: cfg.Holder,
		life: cfg.Lease, now: cfg.Now, log: cfg.Log,
		waiting: func() { c.ready.Store(true) },
	}
	c.iam = iam{client, c.election.holds}
	if cfg.Metrics != "" {
		var lc net.ListenConfig
		if c.monitor, err = lc.Listen(context.Background(), "tcp", cfg.Metrics); err != nil {
			return nil, fmt.Errorf("listen for metrics: %w", err)
		}
	}
	return c, nil
}

// Run works until the context ends. It returns an error only for what cannot
// get better.
func (c *Controller) Run(ctx context.Context) error {
	defer c.iam.Close()
	defer c.kube.Close()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	var failed error
	if c.monitor != nil {
		wg.Go(func() {
			if failed = c.serveMetrics(ctx, c.monitor); failed != nil {
				stop()
			}
		})
	}
	c.election.Run(ctx, c.lead)
	stop()
	wg.Wait()
	return failed
}

// lead does the work while this replica is the one that does it.
func (c *Controller) lead(ctx context.Context) {
	c.metrics.leader.Set(1)
	defer c.metrics.leader.Set(0)
	defer c.metrics.clear()
	c.ready.Store(false)
	c.queue = newQueue()
	defer c.queue.Close()
	c.bindings = newMirror(c.kube, c.cfg.Now, c.cfg.Log, collection, readBinding, c.bindingChanged)
	touch := func(k key, _, _ *string) { c.touch(k.namespace) }
	c.accounts = newMirror(c.kube, c.cfg.Now, c.cfg.Log, "/api/v1/serviceaccounts", readAccount, touch)
	c.namespaces = newMirror(c.kube, c.cfg.Now, c.cfg.Log, "/api/v1/namespaces", readNamespace, touch)
	c.lost = make(chan lost, maxLost)

	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { c.bindings.Run(ctx) })
	wg.Go(func() { c.accounts.Run(ctx) })
	wg.Go(func() { c.namespaces.Run(ctx) })
	for _, synced := range []chan struct{}{c.bindings.synced, c.accounts.synced, c.namespaces.synced} {
		select {
		case <-synced:
		case <-ctx.Done():
			return
		}
	}
	c.ready.Store(true)
	for range workers {
		wg.Go(func() {
			for {
				k, ok := c.queue.Get(ctx)
				if !ok {
					return
				}
				c.turn(ctx, k)
			}
		})
	}
	wg.Go(func() { c.sweepEvery(ctx) })
}

// bindingChanged is told of each change of what is known about a binding.
func (c *Controller) bindingChanged(k key, old, now *boundAs) {
	if old != nil && old.profileID != "" && (now == nil || now.uid != old.uid) {
		select {
		case c.lost <- lost{k, old.uid, old.profileID}:
		default: // the next search finds it
		}
	}
	c.queue.Add(k)
}

// touch has the bindings of a namespace looked at.
func (c *Controller) touch(namespace string) {
	for _, k := range c.bindings.In(namespace) {
		c.queue.Add(k)
	}
}

func readBinding(raw json.RawMessage) (key, boundAs, error) {
	var b binding
	if err := json.Unmarshal(raw, &b); err != nil {
		return key{}, boundAs{}, fmt.Errorf("read a binding: %w", err)
	}
	m := b.Metadata
	return b.key(), boundAs{m.UID, m.Generation, m.Deleted != nil, slices.Contains(m.Finalizers, Finalizer), b.Status.ProfileID}, nil
}

func readAccount(raw json.RawMessage) (key, string, error) {
	var o struct {
		Metadata metadata `json:"metadata"`
	}
	if err := json.Unmarshal(raw, &o); err != nil {
		return key{}, "", fmt.Errorf("read a service account: %w", err)
	}
	return key{o.Metadata.Namespace, o.Metadata.Name}, o.Metadata.UID, nil
}

// readNamespace keys namespaces by their name alone.
func readNamespace(raw json.RawMessage) (key, string, error) {
	var o struct {
		Metadata metadata `json:"metadata"`
	}
	if err := json.Unmarshal(raw, &o); err != nil {
		return key{}, "", fmt.Errorf("read a namespace: %w", err)
	}
	return key{namespace: o.Metadata.Name}, o.Metadata.Annotations[AllowedProfiles], nil
}

// foreignCluster means that the controller was given the name of another cluster
// than it works in: links there are not its own to make or remove.
type foreignCluster struct {
	name, crn string // as configured
	proved    string // that the controller's own token is of
}

func (e *foreignCluster) Error() string {
	return fmt.Sprintf("the cluster %q is registered as %s, but the controller's own token is of %s: correct --cluster (controller.cluster in the chart); nothing is linked or removed until then",
		e.name, e.crn, e.proved)
}

// registered returns the cluster as it is registered at the IAM server. It is
// the one that the controller's own token is of, or else the error is a
// [foreignCluster].
func (c *Controller) registered(ctx context.Context) (registeredCluster, error) {
	c.mu.Lock()
	known, foreign, at := c.cluster, c.foreign, c.clusterAt
	c.mu.Unlock()
	if (known.CRN != "" || foreign != nil) && c.cfg.Now().Sub(at) < c.cfg.Resync {
		return known, foreign
	}
	k, err := c.iam.cluster(ctx, c.cfg.Cluster)
	if err != nil {
		return registeredCluster{}, err
	}
	if k.CRN == "" || k.Type == "" {
		return registeredCluster{}, errors.New("the IAM server shows the cluster without a CRN")
	}
	who, err := c.iam.Session(ctx)
	if err == nil && who.Proved != k.CRN {
		// It may have been registered anew since the token was made.
		who, err = c.iam.Renew(ctx, who)
	}
	if err != nil {
		return registeredCluster{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clusterAt = c.cfg.Now()
	if who.Proved != k.CRN {
		c.cluster, c.foreign = registeredCluster{}, &foreignCluster{c.cfg.Cluster, k.CRN, who.Proved}
		c.cfg.Log.Error("the controller works in another cluster than it was given", "error", c.foreign)
		return registeredCluster{}, c.foreign
	}
	if k.CRN != c.cluster.CRN {
		c.cfg.Log.Info("the cluster is registered", "cluster", c.cfg.Cluster, "crn", k.CRN, "type", k.Type)
	}
	c.cluster, c.foreign = k, nil
	return k, nil
}
