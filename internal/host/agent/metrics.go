package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are what an operator watches a host by. No name of an instance stands
// in them: there may be thousands, and who may read metrics may not know them.
type metrics struct {
	registry *prometheus.Registry
	requests *prometheus.HistogramVec
}

func (a *Agent) newMetrics() *metrics {
	m := &metrics{registry: prometheus.NewRegistry()}
	m.requests = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "tabard_agent_metadata_request_seconds", Help: "Requests to the metadata services of instances, by operation and outcome.",
		Buckets: []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10},
	}, []string{"operation", "outcome"})
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	m.registry.MustRegister(m.requests,
		gauge("tabard_agent_connected", "1 while the server sends placements.", func() float64 {
			if a.connected.Load() {
				return 1
			}
			return 0
		}),
		gauge("tabard_agent_instances", "Instances that are placed on this host.", func() float64 {
			placed, _ := a.world.Placements()
			return float64(len(placed))
		}),
		gauge("tabard_agent_outbox_events", "Events on this host's disk that the server does not have yet.", func() float64 {
			return float64(a.outbox.Waiting())
		}),
	)
	return m
}

// observe implements the metadata service's Observe.
func (m *metrics) observe(operation, outcome string, took time.Duration) {
	m.requests.WithLabelValues(operation, outcome).Observe(took.Seconds())
}

// serveMetrics answers /healthz, /readyz and /metrics on an address until the
// context ends.
func (a *Agent) serveMetrics(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, status int, text string) {
		w.WriteHeader(status)
		// The client may be gone; there is nobody left to tell.
		_, _ = io.WriteString(w, text)
	}
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, "alive\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if _, known := a.world.Placements(); !known {
			answer(w, http.StatusServiceUnavailable, "waiting for the server\n")
			return
		}
		answer(w, http.StatusOK, "serving\n")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.metrics.registry, promhttp.HandlerOpts{}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10}
	done := context.AfterFunc(ctx, func() { srv.Close() })
	defer done()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return nil
}
