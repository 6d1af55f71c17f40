package server

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"tabard.dev/tabard/internal/directory"
)

// metrics are what /metrics shows.
type metrics struct {
	registry *prometheus.Registry
	grants   *prometheus.HistogramVec
	commits  prometheus.Histogram
	events   prometheus.Counter
	failures prometheus.Counter
}

func newMetrics(d *directory.Directory) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		grants: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "tabard_token_requests_seconds", Help: "Token requests by grant and outcome (ok or the error code), with their duration.",
			Buckets: []float64{.0005, .001, .002, .005, .01, .025, .05, .1, .25, 1, 5},
		}, []string{"grant", "outcome"}),
		commits: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "tabard_journal_commit_seconds", Help: "Duration of the activity log's commits.",
			Buckets: []float64{.0001, .0005, .001, .005, .01, .05, .1, .5, 1, 5},
		}),
		events:   prometheus.NewCounter(prometheus.CounterOpts{Name: "tabard_journal_events_total", Help: "Activity events made durable by the journal."}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{Name: "tabard_journal_failed_commits_total", Help: "Commits of the activity log that failed."}),
	}
	count := func(name, help string, f func() int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return float64(f()) })
	}
	m.registry.MustRegister(m.grants, m.commits, m.events, m.failures,
		count("tabard_profiles", "Trusted profiles.", d.Profiles.Len),
		count("tabard_links", "Links of trusted profiles.", d.Links.Len),
		count("tabard_policies", "Policies.", d.Policies.Len),
		count("tabard_clusters", "Registered clusters.", d.Clusters.Len),
		count("tabard_instances", "Instances.", d.Instances.Len),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// known are the grants that become label values; anything else that a caller
// writes must not make a new time series.
var known = map[string]string{
	"urn:ibm:params:oauth:grant-type:apikey":   "apikey",
	"urn:ibm:params:oauth:grant-type:cr-token": "cr-token",
	"urn:ibm:params:oauth:grant-type:assume":   "assume",
	"refresh_token":                            "refresh_token",
	"client_credentials":                       "client_credentials", // of host agents
}

func (m *metrics) granted(grant, outcome string, took time.Duration) {
	label, ok := known[grant]
	if !ok {
		label = "other"
	}
	m.grants.WithLabelValues(label, outcome).Observe(took.Seconds())
}

func (m *metrics) committed(events int, took time.Duration, err error) {
	m.commits.Observe(took.Seconds())
	if err != nil {
		m.failures.Inc()
		return
	}
	m.events.Add(float64(events))
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}
