package binding

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"tabard.dev/tabard/internal/iamclient"
	"tabard.dev/tabard/internal/kube"
)

func TestANamespaceAllowsTheProfilesThatItNames(t *testing.T) {
	for _, c := range []struct {
		annotation, profile string
		want                bool
	}{
		{"", "web", false},
		{"", "", false},
		{",", "", false},
		{" , ", "web", false},
		{"web", "web", true},
		{"web", "Web", false},
		{"web", "web-2", false},
		{"a, web ,b", "web", true},
		{"web-*", "web-2", true},
		{"web-*", "web", false},
		{"*", "anything", true},
		{"*-web", "a-web", false}, // a * elsewhere is a letter
		{"w*b", "web", false},
		{"w*b", "w*b", true},
	} {
		if got := allows(c.annotation, c.profile); got != c.want {
			t.Errorf("%q allows %q: %v", c.annotation, c.profile, got)
		}
	}
}

func TestALinksNameLeadsBackToItsBindingAndToNoOther(t *testing.T) {
	b := binding{Metadata: metadata{Namespace: "shop", Name: "web.v2", UID: "0b1c-2"}}
	k, uid, ok := linkOwner(b.linkName())
	if !ok || k != (key{"shop", "web.v2"}) || uid != "0b1c-2" {
		t.Errorf("%q leads to %v %s %v", b.linkName(), k, uid, ok)
	}
	b.Metadata.Name, b.Metadata.Namespace = strings.Repeat("n", 253), strings.Repeat("s", 63)
	b.Metadata.UID = "c0ffee00-0000-4000-8000-000000000000"
	if n := len(b.linkName()); n > 250 {
		t.Errorf("the name of a link has %d characters, of which 250 can be had", n)
	}
	if k, uid, ok := linkOwner(b.linkName()); !ok || k.namespace != b.Metadata.Namespace || uid != b.Metadata.UID {
		t.Errorf("%q leads to %v %s %v", b.linkName(), k, uid, ok)
	}
}

// Links have the names that people give them, and what is read out of one
// becomes part of a path at the API server.
func FuzzANameOfALinkNeverLeadsOutOfTheCollection(f *testing.F) {
	for _, s := range []string{"tpb:shop/web:1", "tpb:../web:1", "tpb:shop/..:1", "tpb:shop/a/b:1", "tpb:shop/a?b:1", "tpb::", "tpb:/:", "web"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		k, uid, ok := linkOwner(name)
		if !ok {
			return
		}
		if strings.ContainsAny(k.namespace, "/.?#%") || strings.ContainsAny(k.name, "/?#%") || strings.HasPrefix(k.name, ".") || uid == "" {
			t.Errorf("%q leads to %q %q", name, k.path(), uid)
		}
	})
}

func TestABindingWithoutOneProfileIsInvalid(t *testing.T) {
	for _, s := range []spec{
		{},
		{ServiceAccount: "web"},
		{ServiceAccount: "web", ProfileName: "a", ProfileID: "Profile-1"},
		{ServiceAccount: "web", ProfileID: "../../v1/apikeys"},
		{ServiceAccount: "web", ProfileID: "Profile-1/links"},
		{ServiceAccount: "../other", ProfileName: "a"},
		{ProfileName: "a"},
	} {
		if s.check() == nil {
			t.Errorf("%+v is taken", s)
		}
	}
	for _, s := range []spec{{ServiceAccount: "web", ProfileName: "a"}, {ServiceAccount: "web", ProfileID: "iam-Profile-1"}} {
		if err := s.check(); err != nil {
			t.Errorf("%+v: %v", s, err)
		}
	}
}

func TestAKeyIsWithOneWorkerAtATimeAndComesBackWhenItWasAddedMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, k := newQueue(), key{"shop", "web"}
		defer q.Close()
		q.Add(k)
		q.Add(k)
		got, ok := q.Get(t.Context())
		if !ok || got != k {
			t.Fatal(got, ok)
		}
		q.Add(k)
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if got, ok := q.Get(short); ok {
			t.Fatalf("%v is with two workers", got)
		}
		q.Done(k, time.Minute)
		if _, ok := q.Get(t.Context()); !ok {
			t.Fatal("what was added meanwhile is lost")
		}
		q.Done(k, time.Minute)
		began := time.Now()
		if _, ok := q.Get(t.Context()); !ok {
			t.Fatal("there is no next turn")
		}
		if waited := time.Since(began); waited < 48*time.Second || waited > 72*time.Second {
			t.Errorf("the next turn is after %s", waited)
		}
		q.Forget(k)
	})
}

func TestFailuresWaitLongerEachTimeAndNeverForGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, k := newQueue(), key{"shop", "web"}
		defer q.Close()
		q.Add(k)
		var waits []time.Duration
		last := time.Now()
		for range 14 {
			if _, ok := q.Get(t.Context()); !ok {
				t.Fatal("lost")
			}
			waits = append(waits, time.Since(last))
			last = time.Now()
			q.Retry(k, 0)
		}
		if waits[1] > time.Second || slices.Max(waits) > longRetry*6/5 || waits[13] < longRetry*4/5 {
			t.Errorf("the waits are %v", waits)
		}
		if q.Failures(k) == 0 {
			t.Error("failures are not counted")
		}
		// A server that asks for patience gets it, but not for days.
		if _, ok := q.Get(t.Context()); !ok {
			t.Fatal("lost")
		}
		q.Done(k, time.Second)
		_, _ = q.Get(t.Context())
		last = time.Now()
		q.Retry(k, 72*time.Hour)
		_, _ = q.Get(t.Context())
		if waited := time.Since(last); waited < longRetry*4/5 || waited > longRetry*6/5 {
			t.Errorf("waited %s", waited)
		}
		q.Forget(k)
	})
}

func TestWhyTheServerWasNotReachedReadsTheSameEachTime(t *testing.T) {
	dial := func(port int) error {
		return fmt.Errorf("GET /v1/profiles: %w", &net.OpError{Op: "dial", Net: "tcp", Addr: &net.TCPAddr{Port: port}, Err: syscall.ECONNREFUSED})
	}
	if a, b := cause(dial(1)), cause(dial(2)); a != b || a != "connection refused" {
		t.Errorf("%q and %q", a, b)
	}
	if got := cause(fmt.Errorf("x: %w", context.DeadlineExceeded)); got != "no answer in time" {
		t.Error(got)
	}
	if got := cause(fmt.Errorf("x: %w", &iamclient.Error{Status: 503, Message: "transaction 17"})); got != "status 503" {
		t.Error(got)
	}
	if got := cause(fmt.Errorf("x: %w", errors.New("no such host"))); got != "no such host" {
		t.Error(got)
	}
}

// iamAt returns a client of a server that misbehaves in some way; what a real
// one does is played in the end-to-end tests.
func iamAt(t *testing.T, h http.HandlerFunc) iam {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	file := filepath.Join(t.TempDir(), "sa-token")
	if err := os.WriteFile(file, []byte("proof\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := iamclient.New(iamclient.Config{URL: s.URL, Profile: "tabard-controller", TokenFile: file, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return iam{c, func() bool { return true }}
}

func answerToken(w http.ResponseWriter) {
	claims, _ := json.Marshal(map[string]any{"iam_id": "iam-Profile-1", "account": map[string]string{"bss": "a"}})
	fmt.Fprintf(w, `{"access_token": "h.%s.s", "expires_in": 3600}`, base64.RawURLEncoding.EncodeToString(claims))
}

func TestTheNextPageIsAskedOfTheServerThatGaveTheFirst(t *testing.T) {
	var elsewhere atomic.Int64
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	defer other.Close()
	c := iamAt(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/identity/token":
			answerToken(w)
		case r.URL.Query().Get("pagetoken") == "2":
			fmt.Fprint(w, `{"profiles": [{"id": "Profile-2", "name": "two"}]}`)
		default:
			fmt.Fprintf(w, `{"next": "%s/v1/profiles?pagetoken=2", "profiles": [{"id": "Profile-1", "name": "one"}]}`, other.URL)
		}
	})
	var names []string
	for p, err := range c.profiles(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, p.Name)
	}
	if !slices.Equal(names, []string{"one", "two"}) {
		t.Errorf("the profiles are %v", names)
	}
	if elsewhere.Load() != 0 {
		t.Error("a request with the token went to another server")
	}
}

func TestAControllerLeavesTheLinksOfAnotherClusterAlone(t *testing.T) {
	const own, other = "crn:v1:tabard:public:containers-kubernetes:local:a/a:own::", "crn:v1:tabard:public:containers-kubernetes:local:a/a:other::"
	var changes, logins atomic.Int64
	registered := other
	client := iamAt(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/identity/token":
			logins.Add(1)
			claims, _ := json.Marshal(map[string]any{"iam_id": "iam-Profile-1", "account": map[string]string{"bss": "a"}, "authn": map[string]string{"sub": own}})
			fmt.Fprintf(w, `{"access_token": "h.%s.s", "expires_in": 3600}`, base64.RawURLEncoding.EncodeToString(claims))
		case r.Method != http.MethodGet:
			changes.Add(1)
		case strings.HasPrefix(r.URL.Path, "/v1/clusters/"):
			fmt.Fprintf(w, `{"crn": %q, "type": "IKS_SA"}`, registered)
		case strings.HasSuffix(r.URL.Path, "/links"):
			fmt.Fprintf(w, `{"links": [{"id": "link-1", "name": "tpb:shop/web:1", "link": {"crn": %q, "namespace": "shop", "name": "web"}}]}`, other)
		default:
			fmt.Fprint(w, `{"profiles": [{"id": "Profile-1", "name": "one"}]}`)
		}
	})
	now := time.Unix(1_800_000_000, 0)
	c := &Controller{iam: client, cfg: Config{Cluster: "wrong", Resync: time.Minute, Now: func() time.Time { return now }, Log: slog.New(slog.DiscardHandler)}}
	for range 3 {
		err := c.sweep(t.Context())
		if foreign := new(foreignCluster); !errors.As(err, &foreign) || !strings.Contains(err.Error(), "--cluster") {
			t.Errorf("error %v", err)
		}
		v, err := c.carryOut(t.Context(), &binding{Status: status{LinkID: "link-1", ProfileID: "Profile-1"}})
		if err != nil || v.reason != ReasonForeignCluster || v.linkID != "link-1" || !strings.Contains(v.message, own) {
			t.Errorf("%+v, %v", v, err)
		}
	}
	if changes.Load() != 0 {
		t.Error("a link of another cluster was changed")
	}
	if logins.Load() != 2 {
		t.Errorf("%d exchanges: once it is sure it waits", logins.Load())
	}
	registered, now = own, now.Add(time.Minute)
	if k, err := c.registered(t.Context()); err != nil || k.CRN != own {
		t.Errorf("put right, it is %v, %v", k, err)
	}
}

func TestOddAnswersAreNoAnswers(t *testing.T) {
	for name, answer := range map[string]http.HandlerFunc{
		"a redirect":   func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) },
		"another page": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
		"too busy":     func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTooManyRequests) },
		"broken":       func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) },
	} {
		c := iamAt(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/identity/token" {
				answerToken(w)
				return
			}
			answer(w, r)
		})
		if _, err := c.links(t.Context(), "Profile-1"); err == nil || !unavailable(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNothingIsChangedAfterTheLeaseHasEnded(t *testing.T) {
	var asked atomic.Int64
	c := iamAt(t, func(http.ResponseWriter, *http.Request) { asked.Add(1) })
	now := time.Unix(1_800_000_000, 0)
	e := &election{life: 15 * time.Second, now: func() time.Time { return now }}
	c.holds = e.holds
	change := func() error {
		_, err := c.createLink(t.Context(), "Profile-1", link{})
		return errors.Join(err, c.deleteLink(t.Context(), "Profile-1", "link-1"))
	}
	if err := change(); !errors.Is(err, errNotLeading) {
		t.Errorf("before there is a lease: %v", err)
	}
	if left := e.hold(now.Add(-time.Second)); left != 9*time.Second {
		t.Errorf("it may lead for %s", left)
	}
	if now = now.Add(9 * time.Second); e.holds() {
		t.Error("it leads for longer")
	}
	if err := change(); !errors.Is(err, errNotLeading) || !unavailable(err) || asked.Load() != 0 {
		t.Errorf("afterwards: %v, after %d requests", err, asked.Load())
	}
	e.hold(now)
	if !e.holds() {
		t.Error("a renewed lease does not count")
	}
}

func TestAControllerWithoutItsTokenDoesNotStart(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{empty, empty + "-not", t.TempDir()} {
		_, err := New(Config{
			IAM: "https://iam.example.com", Cluster: "my-cluster", Namespace: "tabard-system", Holder: "me", TokenFile: file,
			Now: time.Now, Log: slog.New(slog.DiscardHandler),
		})
		if err == nil || !strings.Contains(err.Error(), "--token-file") {
			t.Errorf("%s: %v", file, err)
		}
	}
}

func TestAMissingResourceIsToldOnceAMinute(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	asked := 0
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		w.WriteHeader(http.StatusNotFound)
	}))
	defer s.Close()
	k, err := kube.New(kube.Config{URL: s.URL, CA: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	now := time.Now()
	clock := func() time.Time { // of the mirror, which looks once for each answer
		if asked == 5 {
			cancel()
		}
		now = now.Add(25 * time.Second)
		return now
	}
	var log strings.Builder
	newMirror(k, clock, slog.New(slog.NewTextHandler(&log, nil)), collection, readBinding, func(key, *boundAs, *boundAs) {}).Run(ctx)
	if n := strings.Count(log.String(), "custom resource definition"); n != 2 || asked != 5 {
		t.Errorf("%d answers in 100 s are told %d times:\n%s", asked, n, &log)
	}
}
