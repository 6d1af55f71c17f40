// Package webhook is the admission webhook for Kubernetes: it gives a pod whose
// service account names a trusted profile the token and the variables that the
// published SDKs need to put that profile on, and changes nothing else of it. In
// namespaces that demand an identity it keeps out pods that would have none. It
// also keeps its own certificate.
//
// It decides nothing about access: what a pod may do, the server decides when the
// pod exchanges its token. It holds no secret but the key of its certificate.
package webhook

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"tabard.dev/tabard/internal/iamclient"
	"tabard.dev/tabard/internal/kube"
)

// Config is what a webhook is made of.
type Config struct {
	Kube *kube.Client

	IAMURL        string        // by which pods reach Tabard
	InsecureHTTP  bool          // let it be plain HTTP on another machine
	Audience      string        // of pods' tokens; default "iam"
	TokenLifetime time.Duration // of pods' tokens; default 1 h, at least 10 min
	Services      []string      // of SDKs; default [DefaultServices]
	ServiceURLs   bool          // also send the SDKs of those services to Tabard

	Listen  string // address that API servers call
	Metrics string // address of /metrics, /healthz and /readyz; "" serves none

	Namespace        string        // of the Secret
	Secret           string        // that holds the certificate; default "tabard-webhook-certificate"
	Configuration    string        // the MutatingWebhookConfiguration; default "tabard-webhook"
	CertificateNames []string      // DNS names and addresses; default: of the service tabard-webhook
	CertificateLife  time.Duration // default 90 days, at least [MinCertificateLife]

	// CheckProfiles has the webhook ask Tabard whether profiles exist, as the
	// profile Profile, which it puts on with the token in TokenFile.
	CheckProfiles bool
	Profile       string
	TokenFile     string
	CAFile        string // PEM of the authority of Tabard's certificate, besides the system's; "" is none

	// Drain is how long calls are still taken after the context has ended, so
	// that API servers learn first that this replica is leaving.
	Drain time.Duration

	Now func() time.Time
	Log *slog.Logger
}

// Complete fills in defaults and says what cannot be.
func (c *Config) Complete() error {
	or := func(value *string, fallback string) {
		if *value == "" {
			*value = fallback
		}
	}
	or(&c.Audience, "iam")
	or(&c.Secret, "tabard-webhook-certificate")
	or(&c.Configuration, "tabard-webhook")
	or(&c.TokenFile, mountPath+"/"+tokenName)
	or(&c.Listen, ":8443")
	if c.TokenLifetime == 0 {
		c.TokenLifetime = time.Hour
	}
	if c.CertificateLife == 0 {
		c.CertificateLife = 90 * 24 * time.Hour
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	var err error
	if c.IAMURL, err = iamclient.CheckURL(c.IAMURL, c.InsecureHTTP); err != nil {
		return fmt.Errorf("iam-url: %w", err)
	}
	if c.TokenLifetime < 10*time.Minute || c.TokenLifetime > 24*time.Hour {
		return errors.New("token-lifetime: it must be from 10m, the least that Kubernetes gives, to 24h")
	}
	if c.CertificateLife < MinCertificateLife {
		return fmt.Errorf("certificate-life: it must be at least %s", MinCertificateLife)
	}
	if c.Services == nil {
		c.Services = DefaultServices
	}
	if c.Services, err = ParseServices(strings.Join(c.Services, ",")); err != nil {
		return fmt.Errorf("services: %w", err)
	}
	if !nameForm.MatchString(c.Namespace) {
		return fmt.Errorf("namespace: %q is not the name of a namespace; give the one that the webhook is in", c.Namespace)
	}
	if len(c.CertificateNames) == 0 {
		c.CertificateNames = []string{"tabard-webhook." + c.Namespace + ".svc"}
	}
	if c.CheckProfiles && c.Profile == "" {
		return errors.New("profile: to check profiles the webhook needs one of its own")
	}
	return nil
}

// Webhook answers API servers.
type Webhook struct {
	cfg      Config
	injector injector
	profiles *profiles // nil when profiles are not checked
	keeper   *keeper
	metrics  *metrics
	reading  chan struct{} // has a place for each body that may be read
	held     atomic.Int64  // bytes of bodies
	running  chan struct{} // has a place for each admission that may run
	calls    net.Listener
	monitor  net.Listener // nil without metrics
}

// New listens, and returns a webhook that answers once Run is called. The
// configuration must be complete.
func New(ctx context.Context, cfg Config) (*Webhook, error) {
	w := &Webhook{
		cfg: cfg, metrics: newMetrics(), reading: make(chan struct{}, maxReading), running: make(chan struct{}, maxRunning),
		injector: injector{cfg.IAMURL, cfg.Audience, int64(cfg.TokenLifetime / time.Second), cfg.Services, cfg.ServiceURLs},
	}
	w.keeper = &keeper{
		kube: cfg.Kube, namespace: cfg.Namespace, secret: cfg.Secret, configuration: cfg.Configuration,
		names: cfg.CertificateNames, life: cfg.CertificateLife, now: cfg.Now, log: cfg.Log, metrics: w.metrics,
	}
	var err error
	if cfg.CheckProfiles {
		if w.profiles, err = newProfiles(&cfg); err != nil {
			return nil, err
		}
	}
	var lc net.ListenConfig
	if w.calls, err = lc.Listen(ctx, "tcp", cfg.Listen); err != nil {
		return nil, fmt.Errorf("listen for API servers: %w", err)
	}
	if cfg.Metrics != "" {
		if w.monitor, err = lc.Listen(ctx, "tcp", cfg.Metrics); err != nil {
			_ = w.calls.Close() // nobody has called yet
			return nil, fmt.Errorf("listen for metrics: %w", err)
		}
	}
	return w, nil
}

// Address is where API servers call.
func (w *Webhook) Address() net.Addr { return w.calls.Addr() }

// drainTimeout bounds the time for answers that are under way at the end.
const drainTimeout = 10 * time.Second

// Run answers until the context ends, and then until what has begun is done.
func (w *Webhook) Run(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+PathInject, w.handle(false))
	mux.HandleFunc("POST "+PathRequire, w.handle(true))
	calls := &http.Server{
		Handler: mux, TLSConfig: &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: w.keeper.certificate},
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 20 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(w.cfg.Log.Handler(), slog.LevelDebug),
	}
	// What ends last is ended by hand: calls are taken for a while after the
	// context, and the monitor says so.
	keeping, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	if w.profiles != nil {
		defer w.profiles.iam.Close()
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { w.keeper.run(keeping); return nil })
	group.Go(func() error {
		if err := calls.ServeTLS(w.calls, "", ""); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve API servers: %w", err)
		}
		return nil
	})
	monitor := w.monitorServer(ctx)
	if w.monitor != nil {
		group.Go(func() error {
			if err := monitor.Serve(w.monitor); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve metrics: %w", err)
			}
			return nil
		})
	}
	group.Go(func() error {
		<-ctx.Done()
		// A listener that broke takes no more calls; there is nothing to drain.
		if w.cfg.Drain > 0 && errors.Is(context.Cause(ctx), context.Canceled) {
			w.cfg.Log.Info("leaving", "drain", w.cfg.Drain)
			time.Sleep(w.cfg.Drain)
		}
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		err := calls.Shutdown(ending)
		stop()
		monitor.Close()
		if err != nil {
			return fmt.Errorf("wait for the last answers: %w", err)
		}
		return nil
	})
	return group.Wait()
}

// monitorServer serves what operators and kubelets look at.
func (w *Webhook) monitorServer(ctx context.Context) *http.Server {
	mux := http.NewServeMux()
	answer := func(rw http.ResponseWriter, status int, text string) {
		rw.WriteHeader(status)
		// The client may be gone; there is nobody left to tell.
		_, _ = io.WriteString(rw, text)
	}
	mux.HandleFunc("GET /healthz", func(rw http.ResponseWriter, _ *http.Request) { answer(rw, http.StatusOK, "alive\n") })
	mux.HandleFunc("GET /readyz", func(rw http.ResponseWriter, _ *http.Request) {
		switch {
		case ctx.Err() != nil:
			answer(rw, http.StatusServiceUnavailable, "leaving\n")
		case !w.keeper.ready.Load():
			answer(rw, http.StatusServiceUnavailable, "waiting for the certificate; the log says for what\n")
		default:
			answer(rw, http.StatusOK, "serving\n")
		}
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(w.metrics.registry, promhttp.HandlerOpts{}))
	return &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10}
}

// Outcomes of admissions.
const (
	outcomeInjected  = "injected"
	outcomeUnchanged = "unchanged"
	outcomeDenied    = "denied"
	outcomeFailed    = "failed" // no verdict: the failure policy decided
)

// metrics are what an operator watches a webhook by.
type metrics struct {
	registry     *prometheus.Registry
	admissions   *prometheus.CounterVec
	expires      prometheus.Gauge
	bundles      prometheus.Counter
	upkeepErrors prometheus.Counter
	drift        *prometheus.GaugeVec
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		admissions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tabard_webhook_admissions_total", Help: "Pods that were looked at, by what became of them.",
		}, []string{"outcome"}),
		expires: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tabard_webhook_certificate_expiry_timestamp_seconds", Help: "When the certificate that is served ends.",
		}),
		bundles: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tabard_webhook_bundle_updates_total", Help: "Times that the authorities in the MutatingWebhookConfiguration were set or repaired.",
		}),
		upkeepErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tabard_webhook_upkeep_errors_total", Help: "Failures to keep the certificate or the MutatingWebhookConfiguration.",
		}),
	}
	m.drift = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "tabard_webhook_configuration_drift",
		Help: "1 when a webhook of the MutatingWebhookConfiguration stands otherwise than the manifests have it, so that pods may get past it; the log says how.",
	}, []string{"webhook"})
	for _, outcome := range []string{outcomeInjected, outcomeUnchanged, outcomeDenied, outcomeFailed} {
		m.admissions.WithLabelValues(outcome)
	}
	m.registry.MustRegister(m.admissions, m.expires, m.bundles, m.upkeepErrors, m.drift)
	return m
}
