package hosts_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/vpc"
)

func TestAJoinTokenWorksOnceAndBindsToTheKey(t *testing.T) {
	s := start(t)
	secret := s.joinToken(map[string]any{"name": "rack1", "zone": zone, "expires_in": 3600})
	key := newKey(t)
	first := s.tryJoin(secret, key).Want(http.StatusCreated)
	if first["name"] != "rack1" || first["zone"] != zone || first["region"] != "us-south" || !strings.HasPrefix(first["kid"].(string), "VSI-CR_us-south_") {
		t.Errorf("answer %v", first)
	}
	e := s.Events(1)[0]
	if e.Action != "host.host.join" || !strings.Contains(string(e.ResponseData), first["kid"].(string)) || strings.Contains(string(e.ResponseData), secret) {
		t.Errorf("event %+v", e)
	}
	if again := s.tryJoin(secret, key).Want(http.StatusCreated); again["id"] != first["id"] || again["kid"] != first["kid"] {
		t.Errorf("the answer that was lost is %v, the second one %v", first, again)
	}
	if n := len(s.d.Hosts.All()); n != 1 {
		t.Errorf("%d hosts", n)
	}
	r := s.tryJoin(secret, newKey(t))
	if r.Want(http.StatusUnauthorized); code(r) != "join_token_used" {
		t.Errorf("another key: %s", r.Raw)
	}
	if e := s.Events(1)[0]; e.Action != "host.host.join" || e.Outcome != "failure" || e.Target.Name != "rack1" {
		t.Errorf("event %+v", e)
	}
	// The token itself is kept nowhere.
	for _, j := range s.d.JoinTokens.All() {
		if b, _ := json.Marshal(j); bytes.Contains(b, []byte(secret)) || bytes.Contains(b, []byte(strings.TrimPrefix(secret, "tabard-join-"))) {
			t.Errorf("the directory holds the token: %s", b)
		}
	}
	h := &host{s: s, key: key, id: first["id"].(string), keyID: first["kid"].(string)}
	h.token = h.login()
	s.Do(apitest.Request{Method: "POST", Path: "/v1/hosts/rack1/revoke"}).Want(http.StatusOK)
	if r := s.tryJoin(secret, key); r.Status != http.StatusUnauthorized {
		t.Errorf("a revoked host joins with its old token: %d %s", r.Status, r.Raw)
	}
}

func TestAnAnswerIsNotRepeatedWhenTheTokenHasExpired(t *testing.T) {
	s := start(t)
	secret := s.joinToken(map[string]any{"name": "rack1"})
	key := newKey(t)
	s.tryJoin(secret, key).Want(http.StatusCreated)
	s.update(func(tx *directory.Tx) {
		j := *s.d.JoinTokens.All()[0]
		j.Expires = time.Now().Add(-time.Second)
		s.d.JoinTokens.Put(tx, &j)
	})
	if r := s.tryJoin(secret, key); r.Status != http.StatusUnauthorized {
		t.Errorf("%d %s", r.Status, r.Raw)
	}
}

func TestAJoinThatIsNotProvedChangesNothing(t *testing.T) {
	s := start(t)
	other := s.host("other")
	secret, another := s.joinToken(map[string]any{"name": "rack1"}), s.joinToken(map[string]any{"name": "rack2"})
	key := newKey(t)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Skip(err) // a Go that makes none
	}
	large, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	must(t, err)
	private, err := jose.JSONWebKey{Key: key}.MarshalJSON()
	must(t, err)
	proof := func(change func(c *attest.HostProof)) string {
		c := s.proof(secret)
		change(&c)
		return sign(t, key, "", attest.TypeHostJoin, c)
	}
	public := jwk(t, key.Public())
	good := proof(func(*attest.HostProof) {})
	for name, r := range map[string]link.JoinRequest{
		"no token":                    {Key: public, Proof: good},
		"an unknown token":            {Token: "tabard-join-x", Key: public, Proof: good},
		"a token in capitals":         {Token: strings.ToUpper(secret), Key: public, Proof: good},
		"the token's fingerprint":     {Token: link.Fingerprint(secret), Key: public, Proof: good},
		"another host's token":        {Token: another, Key: public, Proof: good},
		"no proof":                    {Token: secret, Key: public},
		"garbage for a proof":         {Token: secret, Key: public, Proof: "a.b.c"},
		"no key":                      {Token: secret, Proof: good},
		"garbage for a key":           {Token: secret, Key: []byte(`{"kty":"EC"}`), Proof: good},
		"another key":                 {Token: secret, Key: jwk(t, newKey(t).Public()), Proof: good},
		"the private key":             {Token: secret, Key: private, Proof: good},
		"a shared secret":             {Token: secret, Key: []byte(`{"kty":"oct","k":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"}`), Proof: good},
		"a proof of another token":    {Token: secret, Key: public, Proof: proof(func(c *attest.HostProof) { c.Join = link.Fingerprint(another) })},
		"a proof of no token":         {Token: secret, Key: public, Proof: proof(func(c *attest.HostProof) { c.Join = "" })},
		"a proof for another server":  {Token: secret, Key: public, Proof: proof(func(c *attest.HostProof) { c.Audience = []string{"http://evil.test/identity/token"} })},
		"a proof for two servers":     {Token: secret, Key: public, Proof: proof(func(c *attest.HostProof) { c.Audience = append(c.Audience, "http://evil.test") })},
		"a proof for nobody":          {Token: secret, Key: public, Proof: proof(func(c *attest.HostProof) { c.Audience = nil })},
		"a proof that has expired":    {Token: secret, Key: public, Proof: proof(func(c *attest.HostProof) { c.IssuedAt -= 120; c.Expires -= 120 })},
		"a proof from the future":     {Token: secret, Key: public, Proof: proof(func(c *attest.HostProof) { c.IssuedAt += 120; c.Expires += 120 })},
		"a proof that lives too long": {Token: secret, Key: public, Proof: proof(func(c *attest.HostProof) { c.Expires += 3600 })},
		"a proof that never ends":     {Token: secret, Key: public, Proof: proof(func(c *attest.HostProof) { c.Expires += 18446744074 })},
		"a proof without a jti":       {Token: secret, Key: public, Proof: proof(func(c *attest.HostProof) { c.JTI = "" })},
		"an assertion":                {Token: secret, Key: public, Proof: sign(t, key, "", attest.TypeHostAssertion, s.proof(secret))},
		"an untyped proof":            {Token: secret, Key: public, Proof: sign(t, key, "", "JWT", s.proof(secret))},
		"a weak key":                  {Token: secret, Key: jwk(t, weak.Public()), Proof: signWeak(t, weak, s.proof(secret))},
		"a curve that is not wanted":  {Token: secret, Key: jwk(t, large.Public()), Proof: good},
		"the key of another host":     {Token: secret, Key: jwk(t, other.key.Public()), Proof: sign(t, other.key, other.keyID, attest.TypeHostJoin, s.proof(secret))},
	} {
		r := s.Do(apitest.Request{Method: "POST", Path: link.PathJoin, Anonymous: true, Body: map[string]any{"join_token": r.Token, "jwk": rawOr(r.Key), "proof": r.Proof}})
		if r.Status != http.StatusUnauthorized {
			t.Errorf("%s: %d %s", name, r.Status, r.Raw)
		}
		if strings.Contains(string(r.Raw), secret) {
			t.Errorf("%s: the answer repeats the token", name)
		}
		if len(s.d.Hosts.All()) != 1 {
			t.Fatalf("%s: made a host", name)
		}
	}
	for _, e := range s.Events(100) {
		b, _ := json.Marshal(e)
		if bytes.Contains(b, []byte(secret)) {
			t.Errorf("an event holds the join token: %s", b)
		}
	}
	// What a header says of the key's id counts for nothing.
	r := s.Do(apitest.Request{Method: "POST", Path: link.PathJoin, Anonymous: true, Body: link.JoinRequest{
		Token: secret, Key: public, Proof: sign(t, key, other.keyID, attest.TypeHostJoin, s.proof(secret)),
	}}).Want(http.StatusCreated)
	if r["kid"] == other.keyID {
		t.Error("a host has the key id of another")
	}
}

func rawOr(b []byte) any {
	if b == nil {
		return nil
	}
	return json.RawMessage(b)
}

// signWeak signs with a key that libraries refuse to sign with.
func signWeak(t *testing.T, key *rsa.PrivateKey, claims any) string {
	t.Helper()
	return sign(t, key, "", attest.TypeHostJoin, claims)
}

func TestATokenThatHasExpiredLetsNobodyIn(t *testing.T) {
	s := start(t)
	secret := s.joinToken(map[string]any{"name": "rack1", "expires_in": 60})
	s.update(func(tx *directory.Tx) {
		j := *s.d.JoinTokens.All()[0]
		j.Expires = time.Now().Add(-time.Second)
		s.d.JoinTokens.Put(tx, &j)
	})
	r := s.tryJoin(secret, newKey(t))
	if r.Want(http.StatusUnauthorized); code(r) != "join_token_expired" {
		t.Errorf("%s", r.Raw)
	}
	s.joinToken(map[string]any{"name": "rack2"})
	if n := len(s.d.JoinTokens.All()); n != 1 {
		t.Errorf("%d tokens are kept, one of them expired", n)
	}
}

func TestOfManyHostsWithOneTokenOneJoins(t *testing.T) {
	s := start(t)
	secret := s.joinToken(map[string]any{"name": "rack1"})
	var wg sync.WaitGroup
	status := make([]int, 16)
	for n := range status {
		wg.Go(func() { status[n] = s.tryJoin(secret, newKey(t)).Status })
	}
	wg.Wait()
	won := 0
	for _, st := range status {
		switch st {
		case http.StatusCreated:
			won++
		case http.StatusUnauthorized:
		default:
			t.Errorf("status %d", st)
		}
	}
	if won != 1 || len(s.d.Hosts.All()) != 1 {
		t.Errorf("%d have joined, there are %d hosts", won, len(s.d.Hosts.All()))
	}
}

func TestTwoHostsDoNotShareAName(t *testing.T) {
	s := start(t)
	one, two := s.joinToken(map[string]any{"name": "rack1"}), s.joinToken(map[string]any{"name": "rack1"})
	s.join(one, newKey(t))
	r := s.tryJoin(two, newKey(t))
	if r.Want(http.StatusConflict); code(r) != "name_not_unique" {
		t.Errorf("%s", r.Raw)
	}
}

func TestWhatAJoinTokenMayBeFor(t *testing.T) {
	s := start(t)
	s.host("taken")
	for name, tt := range map[string]struct {
		body   any
		status int
	}{
		"more than an hour":           {map[string]any{"name": "a", "expires_in": 3601}, 400},
		"less than nothing":           {map[string]any{"name": "a", "expires_in": -1}, 400},
		"more than a duration holds":  {map[string]any{"name": "a", "expires_in": 18446744074}, 400},
		"more than a number holds":    {`{"name":"a","expires_in":99999999999999999999}`, 400},
		"no name":                     {map[string]any{}, 400},
		"a name with capitals":        {map[string]any{"name": "A"}, 400},
		"a long name":                 {map[string]any{"name": strings.Repeat("a", 64)}, 400},
		"a name of two lines":         {map[string]any{"name": "a\nb"}, 400},
		"a name that is taken":        {map[string]any{"name": "taken"}, 409},
		"an unknown zone":             {map[string]any{"name": "a", "zone": "eu-de-1"}, 400},
		"an unknown host":             {map[string]any{"host": "nothing"}, 404},
		"a known host with a name":    {map[string]any{"host": "taken", "name": "b"}, 400},
		"a known host in a new zone":  {map[string]any{"host": "taken", "zone": "us-south-2"}, 400},
		"no object":                   {`[]`, 400},
		"as long as may be":           {map[string]any{"name": "b", "expires_in": 3600}, 201},
		"a known host, to join again": {map[string]any{"host": "taken"}, 201},
	} {
		if r := s.Do(apitest.Request{Method: "POST", Path: "/v1/hosts/join_tokens", Body: tt.body}); r.Status != tt.status {
			t.Errorf("%s: %d %s", name, r.Status, r.Raw)
		}
	}
	if r := s.Do(apitest.Request{Method: "POST", Path: "/v1/hosts/join_tokens", Body: map[string]any{"name": "c"}, As: s.Other.IAMID}); r.Status != http.StatusForbidden {
		t.Errorf("another account: %d %s", r.Status, r.Raw)
	}
}

func TestOnlyTheOperatorsAccountHasHosts(t *testing.T) {
	s := start(t)
	h := s.host("rack1")
	for _, q := range []apitest.Request{
		{Path: "/v1/hosts/rack1"}, {Path: "/v1/hosts/" + h.id}, {Path: "/v1/hosts/rack1/machines"},
		{Method: "POST", Path: "/v1/hosts/rack1/revoke"}, {Method: "DELETE", Path: "/v1/hosts/rack1"},
		{Method: "POST", Path: "/v1/hosts/rack1/machines", Body: map[string]any{"machine": "x"}},
	} {
		q.As = s.Other.IAMID
		if r := s.Do(q); r.Status != http.StatusNotFound {
			t.Errorf("%s %s: %d %s", q.Method, q.Path, r.Status, r.Raw)
		}
	}
	if rows := s.Do(apitest.Request{Path: "/v1/hosts", As: s.Other.IAMID}).Want(200)["hosts"].([]any); len(rows) != 0 {
		t.Errorf("another account sees %v", rows)
	}
	if rows := s.Do(apitest.Request{Path: "/v1/hosts"}).Want(200)["hosts"].([]any); len(rows) != 1 {
		t.Errorf("the operator sees %v", rows)
	}
}

// worthless checks that a host's key and access token are good for nothing.
func worthless(t *testing.T, h *host, i *vpc.Instance, profile string) {
	t.Helper()
	if _, err := h.tryLogin(h.assertion()); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("its assertion: %v", err)
	}
	for _, path := range []string{link.PathReports, link.PathEvents, link.PathExchange, link.PathFound} {
		if r := h.do("POST", path, map[string]any{}); r.Status != http.StatusUnauthorized {
			t.Errorf("its access token on %s: %d %s", path, r.Status, r.Raw)
		}
	}
	for _, path := range []string{link.PathStream + "?capacity={}", link.PathImages + "x"} {
		if r := h.do("GET", path, nil); r.Status != http.StatusUnauthorized {
			t.Errorf("its access token on %s: %d %s", path, r.Status, r.Raw)
		}
	}
	if _, err := instanceLogin(h.s, i, h.identityToken(i), profile); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("its identity token: %v", err)
	}
}

func TestAHostThatJoinsAgainLeavesItsOldKeyBehind(t *testing.T) {
	s := start(t)
	srv := s.serve()
	old := s.host("rack1")
	i := s.instance(old.id, vpc.Running)
	profile := s.profile(i)
	stream := old.open(srv)
	stream.synced()
	old.events("box", 1, event(s, i)).Want(200)

	again := s.joinToken(map[string]any{"host": "rack1"})
	r := s.tryJoin(again, old.key)
	if r.Want(http.StatusUnauthorized); code(r) != "key_in_use" {
		t.Errorf("the old key joins again: %s", r.Raw)
	}
	fresh := s.join(again, newKey(t))
	if fresh.id != old.id || fresh.keyID == old.keyID {
		t.Errorf("host %s with key %s, before %s with %s", fresh.id, fresh.keyID, old.id, old.keyID)
	}
	if took := stream.ends(); took > 5*time.Second {
		t.Errorf("its stream goes on for %s", took)
	}
	worthless(t, old, i, profile)
	fresh.exchange(i, fresh.identityToken(i), profile).Want(200)
	got := fresh.open(srv)
	var hello *link.Hello
	got.until(func(m link.Message) bool { hello = m.Hello; return m.Hello != nil })
	if hello.Outbox != "box" || hello.Recorded.Recorded != 1 {
		t.Errorf("hello %+v", hello)
	}
	got.synced()
	if got.holds[i.ID] == nil {
		t.Error("its instance is not its any more")
	}
}

func TestARevokedHostIsGoodForNothingUntilItJoinsAgain(t *testing.T) {
	s := start(t)
	srv := s.serve()
	s.runScheduler()
	h, bystander := s.host("rack1"), s.host("rack2")
	i, j := s.instance(h.id, vpc.Running), s.instance(bystander.id, vpc.Running)
	profile, profile2 := s.profile(i), s.profile(j)
	h.exchange(i, h.identityToken(i), profile).Want(200)
	stream := h.open(srv)
	stream.synced()
	pending := s.joinToken(map[string]any{"host": "rack1"})

	s.Do(apitest.Request{Method: "POST", Path: "/v1/hosts/rack1/revoke"}).Want(200)
	worthless(t, h, i, profile)
	if took := stream.ends(); took > 5*time.Second {
		t.Errorf("its stream goes on for %s", took)
	}
	if r := s.tryJoin(pending, newKey(t)); r.Status != http.StatusUnauthorized {
		t.Errorf("a token that was made before lets it in: %d", r.Status)
	}
	s.status(i.ID, vpc.Failed)
	s.status(j.ID, vpc.Running)
	bystander.exchange(j, bystander.identityToken(j), profile2).Want(200)
	if r := s.Do(apitest.Request{Method: "DELETE", Path: "/v1/hosts/rack1"}); r.Status != http.StatusConflict {
		t.Errorf("a host with instances is deleted: %d", r.Status)
	}

	fresh := s.join(s.joinToken(map[string]any{"host": "rack1"}), newKey(t))
	worthless(t, h, i, profile)
	s.change(i.ID, func(i *vpc.Instance) { i.Status = vpc.Starting })
	fresh.do("POST", link.PathReports, vpc.Report{InstanceID: i.ID, Seen: vpc.Starting, Status: vpc.Running}).Want(204)
	fresh.exchange(i, fresh.identityToken(i), profile).Want(200)
}

func TestTheRefusalOfARevokedHostsIdentityTokenSaysWhy(t *testing.T) {
	s := start(t)
	h := s.host("rack1")
	i := s.instance(h.id, vpc.Running)
	s.Do(apitest.Request{Method: "POST", Path: "/v1/hosts/rack1/revoke"}).Want(200)
	if _, err := instanceLogin(s, i, h.identityToken(i), s.profile(i)); err == nil {
		t.Fatal("it is accepted")
	}
	if failed, ok := s.Events(1)[0].Trace.Failed(); !ok || failed.Name != attest.CheckHost {
		t.Errorf("trace %+v", s.Events(1)[0].Trace)
	}
}

func TestAHostIsDeletedOnceItIsRevokedAndEmpty(t *testing.T) {
	s := start(t)
	h := s.host("rack1")
	if r := s.Do(apitest.Request{Method: "DELETE", Path: "/v1/hosts/rack1"}); r.Status != http.StatusConflict {
		t.Errorf("one that is not revoked: %d", r.Status)
	}
	i := s.instance(h.id, vpc.Running)
	h.events("box", 1, event(s, i)).Want(200)
	s.update(func(tx *directory.Tx) { s.d.Instances.Delete(tx, i) })
	s.Do(apitest.Request{Method: "POST", Path: "/v1/hosts/rack1/revoke"}).Want(200)
	s.Do(apitest.Request{Method: "DELETE", Path: "/v1/hosts/rack1"}).Want(204)
	if len(s.d.Hosts.All()) != 0 || len(s.d.HostCursors.All()) != 0 {
		t.Error("something of it is left")
	}
	if r := h.do("POST", link.PathFound, link.Found{}); r.Status != http.StatusUnauthorized {
		t.Errorf("%d", r.Status)
	}
}

func TestAnAssertionIsTakenOnceAndFromItsHostOnly(t *testing.T) {
	s := start(t)
	h, other := s.host("rack1"), s.host("rack2")
	claims := h.assertion()
	if _, err := h.tryLogin(claims); err != nil {
		t.Fatal(err)
	}
	if _, err := h.tryLogin(claims); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("a second time: %v", err)
	}
	s.advance(59 * time.Second)
	if _, err := h.tryLogin(claims); err == nil {
		t.Error("a second time, late, it is taken")
	}
	for name, change := range map[string]func(c *attest.HostProof){
		"of another host":         func(c *attest.HostProof) { c.Issuer, c.Subject = other.id, other.id },
		"about another host":      func(c *attest.HostProof) { c.Subject = other.id },
		"for another server":      func(c *attest.HostProof) { c.Audience = []string{"http://evil.test/identity/token"} },
		"that lives too long":     func(c *attest.HostProof) { c.Expires += 1 },
		"that lives for ever":     func(c *attest.HostProof) { c.Expires += 18446744074 },
		"that has ended":          func(c *attest.HostProof) { c.IssuedAt, c.Expires = c.IssuedAt-61, c.Expires-61 },
		"from the future":         func(c *attest.HostProof) { c.IssuedAt, c.Expires = c.IssuedAt+31, c.Expires+31 },
		"without a jti":           func(c *attest.HostProof) { c.JTI = "" },
		"with a jti without ends": func(c *attest.HostProof) { c.JTI = strings.Repeat("x", 129) },
	} {
		c := h.assertion()
		change(&c)
		if _, err := h.tryLogin(c); !fault.Is(err, fault.Unauthenticated) {
			t.Errorf("an assertion %s: %v", name, err)
		}
	}
	thief := &host{s: s, key: newKey(t), id: h.id, keyID: h.keyID}
	if _, err := thief.tryLogin(thief.assertion()); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("signed with another key: %v", err)
	}
}

func TestTheServersOwnMachineIsNoHostThatJoins(t *testing.T) {
	s := start(t)
	s.update(func(tx *directory.Tx) {
		s.d.Hosts.Put(tx, &cluster.Host{ID: cluster.LocalHost, Name: cluster.LocalHost, JWKS: []byte(`{"keys":[]}`)})
	})
	if r := s.Do(apitest.Request{Method: "POST", Path: "/v1/hosts/join_tokens", Body: map[string]any{"host": "local"}}); r.Status != http.StatusBadRequest {
		t.Errorf("a token for it: %d %s", r.Status, r.Raw)
	}
	if r := s.Do(apitest.Request{Method: "POST", Path: "/v1/hosts/local/revoke"}); r.Status != http.StatusConflict {
		t.Errorf("it is revoked: %d %s", r.Status, r.Raw)
	}
}
