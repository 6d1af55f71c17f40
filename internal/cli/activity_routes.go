package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tabard.dev/tabard/internal/export"
	"tabard.dev/tabard/internal/export/routes"
)

var routeColumns = append(
	columns("Name", "name", "Kind", "kind", "Target", "target", "State", "state", "Delivered", "delivered", "Behind", "behind_events"),
	column{title: "Behind by", of: func(o object) string {
		seconds, err := strconv.ParseFloat(o.text("behind_seconds"), 64)
		if err != nil || seconds == 0 {
			return ""
		}
		return time.Duration(seconds * float64(time.Second)).Round(time.Second).String()
	}},
	column{title: "Lost", of: func(o object) string {
		if n := o.text("lost"); n != "0" {
			return n
		}
		return ""
	}},
	column{title: "Failing since", path: "failing_since", of: func(o object) string { return clock(o.text("failing_since")) }},
	column{title: "Last error", path: "last_error"},
)

func routesCommand() *cobra.Command {
	return spec{
		use: "routes", short: "Show where events are sent, and whether they arrive",
		more: "Each route of the server's file of routes (tabard server --activity-routes FILE) has a line: ok, behind (it delivers,\n" +
			"and is more than half a minute behind), or failing (the last attempt failed; it is tried again until it succeeds).\n" +
			"Behind counts the events that the route has not come to yet. Lost counts those that were removed from the log to\n" +
			"save space before it came to them.\n\n" +
			"The routes are for the administrator of the operator's account.",
		example: "tabard activity routes\n" +
			"tabard activity routes --output json",
	}.listing("routes", "name", routeColumns, func(s *session, _ []string) ([]object, error) {
		return s.client.list(s.ctx(), "/v1/events/routes", nil, "routes", 0)
	})
}

func routesCheckCommand() *cobra.Command {
	return spec{
		use: "routes-check FILE", short: "Check a file of routes before a server reads it", args: cobra.ExactArgs(1),
		more: "Reads the file as tabard server --activity-routes does, with the secrets and certificates that it names, and calls\n" +
			"nobody. Ends with code 1 when the server would refuse it. A server that runs reads its file again on SIGHUP.",
		example: "tabard activity routes-check /etc/tabard/routes.yaml",
	}.bare(func(c *cobra.Command, args []string) error {
		s, err := offline(c)
		if err != nil && !errors.Is(err, errDamaged) {
			return err
		}
		found, err := routes.Load(args[0])
		if err != nil {
			return err
		}
		var items []object
		for _, r := range found {
			if err := try(r); err != nil {
				return fmt.Errorf("%s: route %q: %s: %w", args[0], r.Name, r.Kind, err)
			}
			raw, err := json.Marshal(map[string]any{"name": r.Name, "kind": r.Kind, "target": r.Target, "match": matching(&r.Match)})
			if err != nil {
				return err
			}
			var o object
			if err := json.Unmarshal(raw, &o); err != nil {
				return err
			}
			items = append(items, o)
		}
		return s.showAll(items, "routes", "name", columns("Name", "name", "Kind", "kind", "Target", "target", "Events", "match"))
	})
}

// try makes what a route delivers with, as the server does, and delivers
// nothing.
func try(r export.Route) error {
	sink, err := r.Open()
	if err != nil {
		return err
	}
	return sink.Close()
}

// matching says in words what a route is for.
func matching(m *export.Match) string {
	var out []string
	for _, part := range []struct {
		name   string
		values []string
	}{{"", m.Actions}, {"not ", m.ExceptActions}, {"severity ", m.Severities}, {"outcome ", m.Outcomes}, {"account ", m.Accounts}} {
		if len(part.values) > 0 {
			out = append(out, part.name+strings.Join(part.values, " or "))
		}
	}
	if len(out) == 0 {
		return "all"
	}
	return strings.Join(out, ", ")
}
