package server

import (
	"bytes"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/store"
)

func TestEveryCallOfTheWalkSucceedsForTheOwner(t *testing.T) {
	r := start(t)
	v, token := r.asOwner()
	for _, s := range r.steps() {
		a := send(r.s, s.request(s.Route, v, token))
		if !s.succeeded(a) {
			t.Errorf("%s: %d %s", s, a.status, a.body)
		}
		if s.shows != "" && !bytes.Contains(a.body, []byte(expand(s.shows, v))) {
			t.Errorf("%s: does not show %s", s, s.shows)
		}
		if s.Kind == api.KindChange && a.ok() {
			r.reset()
		}
	}
	r.quiet()
}

// quiet fails the test when the server has logged an error.
func (r *running) quiet() {
	r.t.Helper()
	for _, line := range r.log.take() {
		r.t.Errorf("the server logs: %s", line)
	}
}

// mine returns what an account has, by the names of the walk, without what
// every user of the account may know of it.
func (v vars) mine() []string {
	var out []string
	for name, value := range v {
		if len(value) >= 10 && !slices.Contains([]string{"account", "owner", "owner_token", "group_default"}, name) {
			out = append(out, value)
		}
	}
	return out
}

func TestEveryAdministrativeCallIsRefusedWithoutItsAction(t *testing.T) {
	r := start(t)
	before := r.records()
	stranger := r.caller(nobody)
	v := r.home.with("caller", stranger.iamID)
	for _, s := range r.steps() {
		a := send(r.s, s.request(s.Route, v, stranger.token))
		events := r.events(store.Query{AccountID: v["account"], CorrelationID: a.header.Get(api.TransactionHeader)})
		switch {
		case s.Kind == api.KindOpen:
			if !s.succeeded(a) {
				t.Errorf("%s: %d %s", s, a.status, a.body)
			}
		case s.Kind == api.KindList && !s.single:
			if a.status != http.StatusOK && a.status != http.StatusForbidden {
				t.Errorf("%s: %d %s", s, a.status, a.body)
			}
		case a.status != http.StatusForbidden:
			t.Errorf("%s: %d %s", s, a.status, a.body)
		case s.single:
			// The route's table entry tells no event for a list.
		default:
			denied(t, s, events)
		}
		for _, id := range r.home.mine() {
			// What the call names, the refusal may repeat.
			if bytes.Contains(a.body, []byte(id)) && a.status == http.StatusOK && s.Kind != api.KindOpen {
				t.Errorf("%s: shows %s: %s", s, id, a.body)
			}
		}
		if diff := changed(before, r.records()); len(diff) > 0 {
			t.Errorf("%s: changed %q", s, diff)
			r.reset()
		}
	}
	r.quiet()
}

func TestEveryRouteWantsAToken(t *testing.T) {
	r := start(t)
	v, token := r.asOwner()
	signature := strings.LastIndexByte(token, '.')
	gone := r.caller("iam-groups/Viewer")
	if a := send(r.s, request{method: "DELETE", target: expandTarget("/v2/accounts/$account/users/", v) + gone.iamID, token: token}); !a.ok() {
		t.Fatalf("%d %s", a.status, a.body)
	}
	before := r.records()
	for _, s := range r.steps() {
		if s.Pattern == "/" {
			continue // there is nothing to protect
		}
		for how, token := range map[string]string{
			"no token": "", "garbage": "x", "three parts of garbage": "a.b.c", "a long one": strings.Repeat("a", 50_000),
			"an unsigned one": token[:signature+1], "a forged one": token[:signature+1] + strings.Repeat("A", len(token)-signature-1),
			"that of a removed user": gone.token, "an API key": v["key_value"],
		} {
			a := send(r.s, s.request(s.Route, v, token))
			if a.status != http.StatusUnauthorized {
				t.Errorf("%s with %s: %d %s", s, how, a.status, a.body)
			}
			if err := holdsUp(a); err != nil {
				t.Errorf("%s with %s: %v", s, how, err)
			}
		}
	}
	if diff := changed(before, r.records()); len(diff) > 0 {
		t.Errorf("changed %q", diff)
	}
	r.quiet()
}

// denied checks the event of a refusal: it names the action and says by its
// trace why.
func denied(t *testing.T, s step, events []activity.Event) {
	t.Helper()
	if len(events) != 1 {
		t.Errorf("%s: the refusal has %d events", s, len(events))
		return
	}
	e := events[0]
	want := s.Action
	if s.refused != "" {
		want = s.refused
	}
	if e.Outcome != activity.Failure || e.Reason.Code != http.StatusForbidden || !strings.Contains(e.Reason.ForFailure, " "+want+" ") {
		t.Errorf("%s: event %s %d %q does not tell that %s is missing", s, e.Outcome, e.Reason.Code, e.Reason.ForFailure, want)
	}
	if failed, ok := e.Trace.Failed(); !ok || failed.Name != "policy-subject" {
		t.Errorf("%s: trace %+v", s, e.Trace)
	}
}

func TestEveryRouteHonoursEveryRole(t *testing.T) {
	parted(t, share, func(_ *testing.T, r *running, s step) {
		if s.Kind == api.KindOpen || s.empty || again(s) {
			return
		}
		catalog := r.s.directory.Catalog(r.home["account"])
		service := s.service(s.Action)
		for _, c := range r.callers {
			if !slices.ContainsFunc(c.roles, func(g grantedRole) bool { return g.service == service || g.kind != "" }) {
				continue
			}
			v := r.home.with("caller", c.iamID)
			a := send(r.s, s.request(s.Route, v, c.token))
			r.judge(catalog, s, c, v, a)
			if s.Kind == api.KindChange && a.ok() {
				r.reset()
			}
		}
	})
}

func TestNoChangeIsAMatterOfReading(t *testing.T) {
	r := start(t)
	catalog := r.s.directory.Catalog(r.home["account"])
	viewer := access.PlatformRoleCRN("Viewer")
	for _, s := range r.steps() {
		service := s.service(s.Action)
		if reads := catalog.Grants(viewer, service, s.Action); s.Kind == api.KindChange && reads {
			t.Errorf("%s changes something, and its action %s is one of Viewer on %s", s, s.Action, service)
		}
		if s.Kind != api.KindOpen && !hasAction(catalog, service, s.Action) {
			t.Errorf("%s: no role of %s has the action %s", s, service, s.Action)
		}
	}
}

// judge holds an answer against what the catalog says of the caller's roles.
func (r *running) judge(catalog *access.Catalog, s step, c caller, v vars, a answerOf) {
	r.t.Helper()
	may := c.holds(catalog, s.service(s.Action), s.Action)
	if s.shows != "" {
		if shown := bytes.Contains(a.body, []byte(expand(s.shows, v))); a.status != http.StatusOK || shown != may {
			r.t.Errorf("%s as %s: %d, shows %s: %v, the role has the action: %v", s, c.name, a.status, s.shows, shown, may)
		}
		return
	}
	switch {
	case a.status == http.StatusForbidden && may:
		service, action, ok := r.missing(v["account"], a)
		if !ok || c.holds(catalog, service, action) {
			r.t.Errorf("%s as %s: the role has the action and is refused (for lack of %s on %s): %s", s, c.name, action, service, a.body)
		}
	case a.status == http.StatusForbidden:
	case !may:
		r.t.Errorf("%s as %s: the role lacks the action, and the answer is %d %s", s, c.name, a.status, a.body)
	case !s.succeeded(a):
		r.t.Errorf("%s as %s: %d %s", s, c.name, a.status, a.body)
	}
}

var (
	lackOf  = regexp.MustCompile(`is not authorized to (\S+) on `)
	onWhich = regexp.MustCompile(`serviceName=(\S+)`)
)

// missing returns the action that a call was refused for, and the service on
// which it was asked, from the event of the refusal.
func (r *running) missing(account string, a answerOf) (service, action string, ok bool) {
	r.t.Helper()
	for _, e := range r.events(store.Query{AccountID: account, CorrelationID: a.header.Get(api.TransactionHeader), Outcome: activity.Failure}) {
		lack := lackOf.FindStringSubmatch(e.Reason.ForFailure)
		for _, check := range slices.Backward(e.Trace) {
			on := onWhich.FindStringSubmatch(check.Wanted)
			if check.Name == "policy-subject" && len(on) == 2 && len(lack) == 2 {
				return on[1], lack[1], true
			}
		}
	}
	return "", "", false
}
