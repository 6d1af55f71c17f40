package server

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tabard.dev/tabard/internal/export"
)

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
