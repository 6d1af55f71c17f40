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
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/diskwatch"
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

// watchSpace shows what the store's watch knows, and how far back the log goes.
func (m *metrics) watchSpace(w *diskwatch.Watch) {
	for _, g := range []struct {
		name, help string
		of         func(diskwatch.Status) int64
	}{
		{"tabard_store_free_bytes", "Free space on the disk of the store.", func(s diskwatch.Status) int64 { return s.Free }},
		{"tabard_store_alarm_bytes", "Free space below which there is an alarm.", func(s diskwatch.Status) int64 { return s.Alarm }},
		{"tabard_store_stop_bytes", "Free space below which nothing is written.", func(s diskwatch.Status) int64 { return s.Stop }},
		{"tabard_store_reserve_bytes", "Space that is held back on the disk of the store.", func(s diskwatch.Status) int64 { return s.Reserve }},
	} {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: g.name, Help: g.help}, func() float64 { return float64(g.of(w.Status())) }))
	}
	m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "tabard_store_refused_total", Help: "Events that were not recorded, and their requests refused, because the store took no writes.",
	}, func() float64 { return float64(w.Status().Refused) }), spaceCollector{w})
}

// spaceCollector shows what has to be read from the store, once for a scrape.
type spaceCollector struct{ watch *diskwatch.Watch }

var (
	descBytes  = prometheus.NewDesc("tabard_store_bytes", "Size of the store, and of it what is used.", []string{"part"}, nil)
	descState  = prometheus.NewDesc("tabard_store_state", "1 for the state that the store is in.", []string{"state"}, nil)
	descDays   = prometheus.NewDesc("tabard_activity_days", "Days that the activity log has events of.", nil, nil)
	descOldest = prometheus.NewDesc("tabard_activity_oldest_day_seconds", "The oldest day of the activity log, as the time of its beginning.", nil, nil)
)

// scrapeTimeout bounds what a scrape reads from the store.
const scrapeTimeout = 5 * time.Second

// Describe implements [prometheus.Collector].
func (spaceCollector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descBytes, descState, descDays, descOldest} {
		out <- d
	}
}

// Collect implements [prometheus.Collector]. What cannot be read is left out.
func (c spaceCollector) Collect(out chan<- prometheus.Metric) {
	is := c.watch.Status().State
	for _, s := range store.States() {
		value := 0.0
		if s == is {
			value = 1
		}
		out <- prometheus.MustNewConstMetric(descState, prometheus.GaugeValue, value, string(s))
	}
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	if e, err := c.watch.Extent(ctx); err == nil {
		out <- prometheus.MustNewConstMetric(descBytes, prometheus.GaugeValue, float64(e.Bytes), "file")
		out <- prometheus.MustNewConstMetric(descBytes, prometheus.GaugeValue, float64(e.Bytes-e.Free), "used")
	}
	if days, err := c.watch.Days(ctx); err == nil {
		out <- prometheus.MustNewConstMetric(descDays, prometheus.GaugeValue, float64(len(days)))
		if len(days) > 0 {
			oldest := time.Date(days[0].Day/10000, time.Month(days[0].Day/100%100), days[0].Day%100, 0, 0, 0, 0, time.UTC)
			out <- prometheus.MustNewConstMetric(descOldest, prometheus.GaugeValue, float64(oldest.Unix()))
		}
	}
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}
