package cli

import (
	"strings"
	"testing"
)

func TestEventsAreFilteredAndLimited(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/events", with(list("events",
		item("eventTime", "2026-07-01T09:00:00.12+0000", "action", "iam-identity.computeresource-token.login", "outcome", "failure",
			"reason", item("reasonCode", 400), "initiator", item("id", "", "name", "", "authnName", "c:default:app:pod"), "target", item("name", "my-trusted-profile"), "correlationId", "tx-1"),
		item("eventTime", "2026-07-01T08:00:00.12+0000", "action", "second"), item("action", "third"),
	), "next", item("start", "more")))
	out := run(t, "activity", "events", "--action", "a", "--outcome", "Failure", "--since", "1h", "--limit", "2").want(0, "c:default:app:pod", "tx-1", "400", "second")
	if strings.Contains(out.stdout, "third") {
		t.Errorf("more than the limit is shown: %s", out.stdout)
	}
	q := s.sent("GET /v1/events").Query
	for k, want := range map[string]string{"action": "a", "outcome": "failure", "since": "1h", "limit": "2"} {
		if q.Get(k) != want {
			t.Errorf("%s is %q, want %q", k, q.Get(k), want)
		}
	}
	run(t, "activity", "events", "--outcome", "maybe").want(2, "success, failure")
}

func TestAnExplanationShowsWhatWasWantedAndFound(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/events/tx-1/explanation", item("transaction_id", "tx-1", "events", []any{item(
		"action", "iam-identity.computeresource-token.login", "outcome", "failure", "time", "2026-07-01T09:00:00.12+0000",
		"initiator", item("id", "iam-"+profileID, "name", "my-trusted-profile", "authnId", "crn-crn:v1:c", "authnName", "c:default:app:pod"),
		"target", item("id", "crn:p", "name", "my-trusted-profile"),
		"reason", item("reasonCode", 400, "reasonType", "Bad Request", "reasonForFailure", "Selected trusted profile not eligible"),
		"trace", []any{
			item("check", "signature", "outcome", "pass", "wanted", "a signature by key k1", "found", "valid"),
			item("check", "profile-link", "outcome", "fail", "wanted", "namespace prod", "found", "namespace default\x1b[2J", "hint", "create a link for namespace default"),
			item("check", "token", "outcome", "skip"),
		},
	)}))
	out := run(t, "activity", "explain", "tx-1").want(0)
	want := `
iam-identity.computeresource-token.login: failure (400 Bad Request)
  when     2026-07-01 09:00:00 UTC
  who      my-trusted-profile (iam-` + profileID + `)
  through  c:default:app:pod (crn-crn:v1:c)
  what     my-trusted-profile (crn:p)
  because  Selected trusted profile not eligible
  checks:
  ok   signature
           wanted  a signature by key k1
           found   valid
  FAIL profile-link
           wanted  namespace prod
           found   namespace default` + "\uFFFD" + `[2J
           hint    create a link for namespace default
  --   token (not reached)
`
	if _, got, _ := strings.Cut(out.stdout, "OK\n"); got != want {
		t.Errorf("the explanation is\n%s\nwant\n%s", got, want)
	}
	run(t, "activity", "explain", "tx-1", "-o", "json").want(0, `"check": "profile-link"`)
	run(t, "activity", "explain", "absent").want(1, "404")
}

func TestAnExplanationShowsTheCommandThatWouldHaveSufficed(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/events/tx-1/explanation", item("transaction_id", "tx-1", "events", []any{item("action", "a", "outcome", "failure",
		"trace", []any{item("check", "profile-link", "outcome", "fail", "wanted", "w", "found", "f", "hint", "h",
			"nearest", item("kind", "link", "id", "Link-1", "of", 2, "differs", []any{
				item("attribute", "link.namespace", "wanted", "prod", "found", "default"), item("attribute", "link.name", "wanted", "a"),
			}),
			"change", item("do", "add", "kind", "link", "edits", []any{item("attribute", "link.name", "to", "b")}, "command", "tabard iam do 'it\x1b[2J'"),
		)})}))
	run(t, "activity", "explain", "tx-1").want(0, "hint    h\n", "differs link.namespace: prod, not default\n", "differs link.name: a, not (nothing)\n",
		"command tabard iam do 'it\uFFFD[2J'\n")
	run(t, "activity", "explain", "tx-1", "-o", "json").want(0, `"command": "tabard iam do`)
}
