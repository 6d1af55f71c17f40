package server

import (
	"context"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/export"
)

// metrics are what /metrics shows.
type metrics struct {
	registry *prometheus.Registry
	grants   *prometheus.HistogramVec
	commits  prometheus.Histogram
	events   prometheus.Counter
	failures prometheus.Counter
	fetches  *prometheus.CounterVec
	reviews  *prometheus.CounterVec
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
		fetches: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tabard_key_fetches_total", Help: "Fetches of clusters' and issuers' keys by where from (server or issuer) and outcome (ok or failed).",
		}, []string{"source", "outcome"}),
		reviews: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tabard_token_reviews_total",
			Help: "Reviews of pods' tokens by outcome (allowed, denied, or broken: the API server could not be asked), and by whether the answer was remembered (yes) or the API server was asked (no).",
		}, []string{"outcome", "remembered"}),
	}
	count := func(name, help string, f func() int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return float64(f()) })
	}
	for _, outcome := range []string{attest.ReviewAllowed, attest.ReviewRefused, attest.ReviewBroken} {
		m.reviews.WithLabelValues(outcome, "no") // so that an alert has a zero to start from
	}
	for _, source := range []string{attest.FromServer, attest.FromIssuer} {
		m.fetches.WithLabelValues(source, "failed")
	}
	m.registry.MustRegister(m.grants, m.commits, m.events, m.failures, m.fetches, m.reviews,
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

func (m *metrics) keysFetched(source string, failed bool) {
	outcome := "ok"
	if failed {
		outcome = "failed"
	}
	m.fetches.WithLabelValues(source, outcome).Inc()
}

func (m *metrics) reviewed(outcome string, asked bool) {
	remembered := "yes"
	if asked {
		remembered = "no"
	}
	m.reviews.WithLabelValues(outcome, remembered).Inc()
}

// credentialWarning is how long before its end a credential is counted.
const credentialWarning = time.Hour

// watchCredentials shows how many clusters' credentials have ended or are about
// to, as far as the credentials say.
func (m *metrics) watchCredentials(d *directory.Directory, opener attest.Opener, now func() time.Time) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "tabard_cluster_credentials_ending", Help: "Clusters whose API server's credential has ended or ends within an hour.",
	}, func() float64 {
		n := 0
		for _, c := range d.Clusters.All() {
			if end, ok := attest.CredentialEnd(c, opener); ok && end.Sub(now()) < credentialWarning {
				n++
			}
		}
		return float64(n)
	}))
}

// watchRoutes shows how the routes of the activity log do.
func (m *metrics) watchRoutes(routes *export.Manager) {
	m.registry.MustRegister(routeCollector{routes})
}

// routeCollector asks the routes when the metrics are read.
type routeCollector struct{ routes *export.Manager }

var routeMetrics = struct{ delivered, failures, lost, behind, behindFor, up *prometheus.Desc }{
	delivered: routeMetric("delivered_total", "Events that the target of a route of the activity log has taken."),
	failures:  routeMetric("failures_total", "Attempts to deliver to the target of a route that failed."),
	lost:      routeMetric("lost_total", "Events that were removed from the activity log before a route came to them."),
	behind:    routeMetric("behind_events", "Events that a route has not come to yet."),
	behindFor: routeMetric("behind_seconds", "Age of the oldest event that a route has not come to yet."),
	up:        routeMetric("up", "Whether the last attempt to deliver to the target of a route did not fail."),
}

func routeMetric(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("tabard_export_"+name, help, []string{"route", "kind"}, nil)
}

// Describe implements [prometheus.Collector].
func (routeCollector) Describe(to chan<- *prometheus.Desc) {
	d := routeMetrics
	for _, one := range []*prometheus.Desc{d.delivered, d.failures, d.lost, d.behind, d.behindFor, d.up} {
		to <- one
	}
}

// Collect implements [prometheus.Collector].
func (c routeCollector) Collect(to chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), routeTimeout)
	defer cancel()
	all, err := c.routes.Status(ctx)
	for _, s := range all {
		show := func(d *prometheus.Desc, kind prometheus.ValueType, value float64) {
			to <- prometheus.MustNewConstMetric(d, kind, value, s.Name, s.Kind)
		}
		up := 1.0
		if s.State == export.Failing {
			up = 0
		}
		show(routeMetrics.delivered, prometheus.CounterValue, float64(s.Delivered))
		show(routeMetrics.failures, prometheus.CounterValue, float64(s.Failures))
		show(routeMetrics.lost, prometheus.CounterValue, float64(s.Lost))
		show(routeMetrics.up, prometheus.GaugeValue, up)
		if err == nil { // a log that cannot be read must not take the other metrics away
			show(routeMetrics.behind, prometheus.GaugeValue, float64(s.BehindEvents))
			show(routeMetrics.behindFor, prometheus.GaugeValue, s.BehindSeconds)
		}
	}
}

// routeTimeout bounds the question how the routes do.
const routeTimeout = 5 * time.Second

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}
