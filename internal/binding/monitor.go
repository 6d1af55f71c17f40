package binding

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are what an operator watches the controller by. No name of a binding
// stands in them: who may read metrics may not know those.
type metrics struct {
	registry   *prometheus.Registry
	reconciles *prometheus.CounterVec
	bindings   *prometheus.GaugeVec
	orphans    prometheus.Counter
	leader     prometheus.Gauge

	mu      sync.Mutex
	reasons map[key]string
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(), reasons: map[key]string{},
		reconciles: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tabard_controller_reconciles_total", Help: "Looks at bindings, by the reason that the binding's condition then had, or Deleted, conflict or error.",
		}, []string{"outcome"}),
		bindings: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "tabard_controller_bindings", Help: "Bindings by the reason of their condition Ready; those with reason Linked have a link of the controller's.",
		}, []string{"reason"}),
		orphans: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tabard_controller_orphaned_links_removed_total", Help: "Links removed because their binding was gone.",
		}),
		leader: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tabard_controller_leader", Help: "1 while this replica is the one that works.",
		}),
	}
	m.registry.MustRegister(m.reconciles, m.bindings, m.orphans, m.leader)
	return m
}

// set reports whether the reason is another than before.
func (m *metrics) set(k key, reason string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	old, ok := m.reasons[k]
	if ok {
		m.bindings.WithLabelValues(old).Dec()
	}
	m.reasons[k] = reason
	m.bindings.WithLabelValues(reason).Inc()
	return old != reason
}

func (m *metrics) forget(k key) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if old, ok := m.reasons[k]; ok {
		m.bindings.WithLabelValues(old).Dec()
		delete(m.reasons, k)
	}
}

// clear is for the time in which another replica works.
func (m *metrics) clear() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.bindings.Reset()
	clear(m.reasons)
}

// serveMetrics answers /healthz, /readyz and /metrics until the context ends.
func (c *Controller) serveMetrics(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, status int, text string) {
		w.WriteHeader(status)
		// The client may be gone; there is nobody left to tell.
		_, _ = io.WriteString(w, text)
	}
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, "alive\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !c.ready.Load() {
			answer(w, http.StatusServiceUnavailable, "waiting for the cluster\n")
			return
		}
		answer(w, http.StatusOK, "ready\n")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(c.metrics.registry, promhttp.HandlerOpts{}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10}
	done := context.AfterFunc(ctx, func() { srv.Close() })
	defer done()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return nil
}
