package vm

import (
	"encoding/base64"
	"encoding/json"
	"fmt"

	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
)

// rawURL is the encoding of the parts of a token.
var rawURL = base64.RawURLEncoding

// nothing checks that an answer gives nothing out: no token, and no word about
// another instance.
func nothing(t *testing.T, what string, a answer, other *box) {
	t.Helper()
	if a.status >= 200 && a.status < 400 || strings.Contains(a.body, `"access_token"`) {
		t.Errorf("%s: %s", what, a)
	}
	if strings.Contains(a.body, other.ID) || strings.Contains(a.body, other.CRN) {
		t.Errorf("%s tells of the other instance: %s", what, a)
	}
}

// What an instance says, in a request or with a token, must get it nothing that
// is another's.
func TestNothingThatAnInstanceSaysGetsItAnothersIdentity(t *testing.T) {
	s := newSite(t, 2, "--driver", "netns")
	s.furnish()
	all := s.boxes("instance-a", "instance-b", "instance-c", "instance-d")
	// The hosts get as many each, so two are on one host with a.
	a := all[0]
	var near, far *box
	for _, b := range all[1:] {
		if b.host == a.host {
			near = b
		} else {
			far = b
		}
	}
	if near == nil || far == nil {
		t.Fatal("the instances are not on both hosts")
	}
	a.works(t)
	others := map[string]*box{"its host's other instance": near, "an instance elsewhere": far}
	short := map[string]string{"its own": a.identity(5), "a neighbour's": near.identity(5)}
	expire := time.Now().Add(6 * time.Second)

	for who, b := range others {
		for _, header := range []string{
			"X-Forwarded-For: " + b.address(), "x-forwarded-for: " + b.address(), "X-Forwarded-For: 127.0.0.1", "Forwarded: for=" + b.address(),
			"Via: 1.1 " + b.address(), "X-Real-IP: " + b.address(), "X-Client-IP: " + b.address(), "True-Client-IP: " + b.address(),
			"X-Forwarded-Host: " + b.address(), "X-Forwarded-Proto: http", "X-Original-URL: /", "Host: " + b.address(), "Host: " + b.Name, "Host: localhost", "Host: evil.example",
			"Host: 169.254.169.254.evil.example", "Host: " + b.ID,
		} {
			s.sub("as "+who+" by the header "+header[:strings.Index(header, ":")+2]+strings.ReplaceAll(header[strings.Index(header, ":")+2:], b.ID, "its id"), func(t *testing.T) {
				nothing(t, "a token", a.curl(wantToken(service, "-H", header)...), b)
				nothing(t, "metadata", a.curl(service+ownPath, "-H", header, "-H", "Authorization: Bearer "+a.identity(60)), b)
			})
		}
		// A header that nobody knows changes nothing.
		s.sub("as "+who+" by a header that nobody knows, it stays itself", func(t *testing.T) {
			for _, header := range []string{"X-Instance-ID: " + b.ID, "X-Tabard-Instance: " + b.ID, "Metadata-Instance: " + b.CRN, "Cookie: instance=" + b.ID} {
				got := a.curl(wantToken(service, "-H", header)...)
				if id := subject(stringField(got.body, "access_token")); id != a.ID {
					t.Errorf("with %s the token is about %q: %s", header, id, got)
				}
			}
		})
	}

	length := "Content-Length: 0\r\n"
	own := "169.254.169.254"
	for name, raw := range map[string]string{
		"an absolute target with the service's address":    "PUT http://" + own + tokenPath + " HTTP/1.1\r\nHost: " + own + "\r\n" + flavor + "\r\n" + length,
		"an absolute target with another's address":        "PUT http://" + near.address() + tokenPath + " HTTP/1.1\r\nHost: " + own + "\r\n" + flavor + "\r\n" + length,
		"an absolute target with another host in the Host": "PUT http://" + own + tokenPath + " HTTP/1.1\r\nHost: " + near.address() + "\r\n" + flavor + "\r\n" + length,
		"an absolute https target":                         "PUT https://" + own + tokenPath + " HTTP/1.1\r\nHost: " + own + "\r\n" + flavor + "\r\n" + length,
		"CONNECT to the service":                           "CONNECT " + own + ":80 HTTP/1.1\r\nHost: " + own + ":80\r\n",
		"CONNECT to another":                               "CONNECT " + near.address() + ":80 HTTP/1.1\r\nHost: " + own + "\r\n",
		"CONNECT to the IAM server":                        "CONNECT 10.99.0.1:8470 HTTP/1.1\r\nHost: " + own + "\r\n",
		"a target with two slashes":                        "PUT /" + tokenPath + " HTTP/1.1\r\nHost: " + own + "\r\n" + flavor + "\r\n" + length,
		"a target that climbs":                             "PUT /x/.." + tokenPath + " HTTP/1.1\r\nHost: " + own + "\r\n" + flavor + "\r\n" + length,
		"a target that climbs in disguise":                 "PUT /x/%2e%2e" + tokenPath + " HTTP/1.1\r\nHost: " + own + "\r\n" + flavor + "\r\n" + length,
		"a target with slashes in disguise":                "PUT /identity%2fv1%2ftoken?version=2025-08-26 HTTP/1.1\r\nHost: " + own + "\r\n" + flavor + "\r\n" + length,
		"a target of the IAM server":                       "GET /v1/instances?version=2022-03-31&generation=2 HTTP/1.1\r\nHost: " + own + "\r\n",
		"a target of the agent's":                          "GET /v1/agent/stream HTTP/1.1\r\nHost: " + own + "\r\n",
		"a star as the target":                             "OPTIONS * HTTP/1.1\r\nHost: " + own + "\r\n",
		"two Host headers":                                 "PUT " + tokenPath + " HTTP/1.1\r\nHost: " + own + "\r\nHost: " + near.address() + "\r\n" + flavor + "\r\n" + length,
		"no Host header":                                   "PUT " + tokenPath + " HTTP/1.0\r\n" + flavor + "\r\n" + length,
		"two lengths":                                      "PUT " + tokenPath + " HTTP/1.1\r\nHost: " + own + "\r\n" + flavor + "\r\nContent-Length: 2\r\nContent-Length: 60\r\n",
		"a header that a fold hides":                       "PUT " + tokenPath + " HTTP/1.1\r\nHost: " + own + "\r\n" + flavor + "\r\nX-A: b\r\n X-Forwarded-For: " + near.address() + "\r\nX-Forwarded-For : 1\r\n" + length,
		"a cross-site page":                                "PUT " + tokenPath + " HTTP/1.1\r\nHost: evil.example\r\nOrigin: http://evil.example\r\n" + flavor + "\r\n" + length,
		"a flavor of another cloud":                        "PUT " + tokenPath + " HTTP/1.1\r\nHost: " + own + "\r\nMetadata-Flavor: Google\r\n" + length,
		"no flavor":                                        "PUT " + tokenPath + " HTTP/1.1\r\nHost: " + own + "\r\n" + length,
		"GET in place of PUT":                              "GET " + tokenPath + " HTTP/1.1\r\nHost: " + own + "\r\n" + flavor + "\r\n",
		"a method that is to override another":             "POST " + tokenPath + " HTTP/1.1\r\nHost: " + own + "\r\nX-HTTP-Method-Override: PUT\r\n" + flavor + "\r\n" + length,
	} {
		s.sub("with "+name, func(t *testing.T) {
			got := a.say(t, raw+"Connection: close\r\n\r\n")
			if strings.Contains(got, "access_token") || regexp.MustCompile(`^HTTP/1\.. [23]`).MatchString(got) && name != "a star as the target" {
				t.Errorf("the answer is %s", got)
			}
			if strings.Contains(strings.ToLower(got), "access-control-allow") {
				t.Errorf("pages elsewhere may read the answer: %s", got)
			}
		})
	}
	s.sub("a request inside another one's body is nobody's", func(t *testing.T) {
		inner := "PUT " + tokenPath + " HTTP/1.1\r\nHost: " + own + "\r\n" + flavor + "\r\nX-Forwarded-For: " + near.address() + "\r\n" + length + "\r\n"
		got := a.say(t, "PUT "+tokenPath+" HTTP/1.1\r\nHost: "+own+"\r\n"+flavor+"\r\nTransfer-Encoding: chunked\r\nContent-Length: "+
			fmt.Sprint(5+len(inner))+"\r\nConnection: close\r\n\r\n0\r\n\r\n"+inner)
		if strings.Count(got, "HTTP/1.1 200") > 1 || strings.Contains(got, near.ID) {
			t.Errorf("the answers are %s", got)
		}
	})

	for who, b := range others {
		s.sub("a token of "+who, func(t *testing.T) {
			stolen := b.identity(600)
			nothing(t, "an access token", a.exchange(stolen), b)
			nothing(t, "metadata", a.read(stolen), b)
			nothing(t, "the initialization", a.curl(service+"/metadata/v1/instance/initialization?version=2025-08-26", "-H", "Authorization: Bearer "+stolen), b)
			nothing(t, "a certificate", a.curl("-X", "POST", service+"/identity/v1/certificates?version=2025-08-26", "-H", "Authorization: Bearer "+stolen, "-d", `{"csr":"x"}`), b)
			nothing(t, "an access token by two headers", a.curl("-X", "POST", service+iamPath, "-H", "Authorization: Bearer "+a.identity(60), "-H", "Authorization: Bearer "+stolen), b)
			b.works(t)
		})
	}
	for name, token := range forged(t, a.identity(600), near.identity(600), nil) {
		s.sub("a token with "+name, func(t *testing.T) {
			nothing(t, "an access token", a.exchange(token), near)
			nothing(t, "metadata", a.read(token), near)
		})
	}
	s.sub("an access token is no identity token, nor the other way round", func(t *testing.T) {
		identity := a.identity(600)
		access := stringField(a.exchange(identity).body, "access_token")
		nothing(t, "an access token", a.exchange(access), near)
		nothing(t, "metadata", a.read(access), near)
		nothing(t, "the regional API", a.curl("-k", serverURL+"/v1/instances?version=2022-03-31&generation=2", "-H", "Authorization: Bearer "+identity), near)
		for _, path := range []string{"/v1/agent/iam_tokens", "/v1/agent/reports", "/v1/agent/events"} {
			for _, bearer := range []string{identity, access} {
				nothing(t, path, a.curl("-k", serverURL+path, "-H", "Authorization: Bearer "+bearer, "-H", "Content-Type: application/json", "-d",
					fmt.Sprintf(`{"instance":%q,"token":%q,"address":%q}`, a.ID, identity, a.address())), near)
			}
		}
		nothing(t, "the token endpoint", a.curl("-k", serverURL+"/identity/token", "-d", "grant_type=urn:ibm:params:oauth:grant-type:cr-token&profile_name=my-trusted-profile&cr_token="+identity), near)
		nothing(t, "the token endpoint, as a host", a.curl("-k", serverURL+"/identity/token", "-d",
			"grant_type=client_credentials&client_assertion_type=urn:ietf:params:oauth:client-assertion-type:jwt-bearer&client_assertion="+identity), near)
	})
	s.sub("a token that has expired", func(t *testing.T) {
		if wait := time.Until(expire); wait > 0 {
			time.Sleep(wait)
		}
		for whose, token := range short {
			nothing(t, whose+" for an access token", a.exchange(token), near)
			nothing(t, whose+" for metadata", a.read(token), near)
		}
	})
	s.sub("a token of an instance that is stopped, or deleted", func(t *testing.T) {
		stopped, deleted := near.identity(600), far.identity(600)
		access := stringField(near.exchange(stopped).body, "access_token")
		if access == "" {
			t.Fatal("the token is good for nothing before, so this shows nothing")
		}
		s.cli("is", "instance-stop", near.Name, "-f")
		s.cli("is", "instance-delete", far.Name, "-f")
		s.become(near.Name, "stopped")
		s.await("the other is gone", func() bool { return !strings.Contains(s.cli("is", "instances", "--output", "json"), far.ID) })
		for _, b := range all {
			if b == near || b == far {
				continue
			}
			for _, token := range []string{stopped, deleted} {
				nothing(t, "an access token", b.exchange(token), near)
				nothing(t, "metadata", b.read(token), near)
			}
		}
		a.works(t)
		if spaces := s.spaces(near.space); len(spaces) != 0 {
			t.Errorf("the stopped instance still has %v", spaces)
		}
	})
	s.sub("after its host is revoked it gets no more access tokens", func(t *testing.T) {
		held := a.identity(600)
		if got := a.exchange(held); got.status != 200 {
			t.Fatalf("before, %s", got)
		}
		s.cli("host", "revoke", a.host.name, "-f")
		if got := a.exchange(held); got.status == 200 || strings.Contains(got.body, `"access_token"`) {
			t.Errorf("with the next call after the revocation it gets %s", got)
		}
		fresh := a.curl(quick(wantToken(service)...)...)
		if token := stringField(fresh.body, "access_token"); token != "" {
			nothing(t, "with a new identity token, an access token", a.exchange(token), near)
		}
		s.await("the instances of the host have failed", func() bool { return s.instance(a.Name).Status == "failed" })
		for _, b := range all {
			if b.host != a.host && b != far {
				b.works(t)
			}
		}
	})
	s.sub("the host joins again with a new key, which does not bring the old one back", func(t *testing.T) {
		h := a.host
		s.stop(h.name, h.agent)
		file := filepath.Join(s.dir, h.name+".token")
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		s.cli("host", "create-join-token", "--host", h.name, "--file", file)
		h.start()
		s.connected(h)
		s.cli("is", "instance-start", a.Name)
		s.become(a.Name, "running")
		a.works(t)
	})
}

// A host may do what it likes and is believed only about its own instances.
func TestAHostThatLiesGetsNothingForAnothersInstances(t *testing.T) {
	s := newSite(t, 1, "--driver", "netns")
	s.furnish()
	victim := s.box("victim")
	s.cli("is", "subnet-create", "their-subnet", "my-vpc", "--zone", "us-south-2", "--ipv4-address-count", "256")
	r := s.newRogue()
	defer func() { r.close() }()
	if res := r.join(s.joinToken("rogue", "--zone", "us-south-2")); res.status != http.StatusCreated {
		t.Fatalf("the rogue does not join: %s", res)
	}
	r.listen()
	for _, name := range []string{"own", "own-stopped", "own-deleted"} {
		s.cli("is", "instance-create", name, "my-vpc", "us-south-2", "bx2-2x8", "their-subnet", "--image", "tabard-local-1",
			"--metadata-service", "true", "--default-trusted-profile", "my-trusted-profile")
	}
	bearer := r.access()
	report := func(id, seen, status string) result {
		return r.post("/v1/agent/reports", bearer, map[string]any{"instance_id": id, "seen": seen, "status": status})
	}
	own := map[string]placed{}
	for _, name := range []string{"own", "own-stopped", "own-deleted"} {
		s.await(name+" is placed on the rogue", func() bool {
			p, ok := r.has(name)
			own[name] = p
			return ok
		})
		if res := report(own[name].ID, "pending", "running"); res.status >= 300 {
			t.Fatalf("the rogue cannot report that %s runs: %s", name, res)
		}
		s.become(name, "running")
	}
	mine := own["own"]
	theirs := placed{ID: victim.ID, CRN: victim.CRN, Name: victim.Name, AccountID: mine.AccountID, Interfaces: []struct{ Address string }{{victim.address()}}}
	const profile = "my-trusted-profile"
	good := func(p placed) string { return r.sign(r.claims(p, nil), r.joined.Kid, "") }

	s.sub("it gets an access token for its own", func(t *testing.T) {
		for name, p := range own {
			if res := r.exchange(bearer, p, good(p), profile); res.status != 200 {
				t.Errorf("%s: %s", name, res)
			}
		}
	})
	refused := func(t *testing.T, what string, res result) {
		t.Helper()
		if !res.refused() || strings.Contains(res.body, `"access_token"`) {
			t.Errorf("%s: %s", what, res)
		}
	}
	s.sub("a token that it signs for another host's instance", func(t *testing.T) {
		refused(t, "in the instance's name", r.exchange(bearer, theirs, good(theirs), profile))
		refused(t, "in its own instance's name", r.exchange(bearer, mine, good(theirs), profile))
		mixed := r.claims(mine, nil)
		mixed["iaas"] = map[string]any{"crn": theirs.CRN, "accountID": mine.AccountID, "instanceID": mine.ID}
		refused(t, "with the CRN of theirs and the id of its own", r.exchange(bearer, mine, r.sign(mixed, r.joined.Kid, ""), profile))
		mixed["iaas"] = map[string]any{"crn": mine.CRN, "accountID": mine.AccountID, "instanceID": theirs.ID}
		refused(t, "with the id of theirs and the CRN of its own", r.exchange(bearer, mine, r.sign(mixed, r.joined.Kid, ""), profile))
	})
	s.sub("a genuine token of another host's instance", func(t *testing.T) {
		stolen := victim.identity(600)
		refused(t, "in the instance's name", r.exchange(bearer, theirs, stolen, profile))
		refused(t, "in its own instance's name", r.exchange(bearer, mine, stolen, profile))
		for name, token := range forged(t, stolen, good(theirs), nil) {
			refused(t, name, r.exchange(bearer, mine, token, profile))
		}
		// The other's key id over the rogue's signature.
		kid := header(t, stolen, "kid")
		refused(t, "under the other's key id", r.exchange(bearer, mine, r.sign(r.claims(mine, nil), kid, ""), profile))
		victim.works(t)
	})
	s.sub("a token without a good signature", func(t *testing.T) {
		for name, token := range forged(t, good(mine), good(theirs), r.key.Public()) {
			refused(t, name, r.exchange(bearer, mine, token, profile))
		}
	})
	s.sub("a token outside its time or for somewhere else", func(t *testing.T) {
		now := time.Now().Unix()
		for name, more := range map[string]map[string]any{
			"expired":             {"exp": now - 1, "iat": now - 300},
			"from the future":     {"exp": now + 7200, "iat": now + 3600},
			"without an end":      {"exp": nil},
			"without a beginning": {"iat": nil},
			"for ever":            {"exp": now + 1<<32},
			"another region":      {"iss": "VSI-CR_eu-de", "aud": []string{"VSI-CR_eu-de"}},
			"another audience":    {"aud": []string{"somebody"}},
			"no audience":         {"aud": nil},
		} {
			refused(t, name, r.exchange(bearer, mine, r.sign(r.claims(mine, more), r.joined.Kid, ""), profile))
		}
		for _, typ := range []string{"host-join+jwt", "client-authentication+jwt", "at+jwt"} {
			refused(t, "of type "+typ, r.exchange(bearer, mine, r.sign(r.claims(mine, nil), r.joined.Kid, typ), profile))
		}
	})
	s.sub("an address that is another's", func(t *testing.T) {
		p := mine
		p.Interfaces = theirs.Interfaces
		refused(t, "of the victim", r.exchange(bearer, p, good(mine), profile))
	})
	s.sub("a token of its own instance that is stopped or deleted", func(t *testing.T) {
		stopped, deleted := own["own-stopped"], own["own-deleted"]
		before := good(stopped)
		s.cli("is", "instance-stop", stopped.Name, "-f", "--no-wait")
		refused(t, "stopping, signed before", r.exchange(bearer, stopped, before, profile))
		refused(t, "stopping, signed now", r.exchange(bearer, stopped, good(stopped), profile))
		if res := report(stopped.ID, "stopping", "stopped"); res.status >= 300 {
			t.Fatal(res)
		}
		refused(t, "stopped", r.exchange(bearer, stopped, good(stopped), profile))
		refused(t, "said to run again", report(stopped.ID, "stopped", "running"))
		refused(t, "stopped, and said to run", r.exchange(bearer, stopped, good(stopped), profile))
		s.cli("is", "instance-delete", deleted.Name, "-f")
		refused(t, "deleting", r.exchange(bearer, deleted, good(deleted), profile))
		if res := report(deleted.ID, "deleting", ""); res.status >= 300 {
			t.Fatal(res)
		}
		refused(t, "deleted", r.exchange(bearer, deleted, good(deleted), profile))
		refused(t, "deleted, in another's name", r.exchange(bearer, mine, good(deleted), profile))
	})
	s.sub("reports about another host's instance change nothing", func(t *testing.T) {
		for _, status := range []string{"stopped", "failed", "running", ""} {
			for _, seen := range []string{"running", "deleting", "stopping"} {
				if res := report(victim.ID, seen, status); res.status < 300 {
					t.Errorf("from %s to %q: %s", seen, status, res)
				}
			}
		}
		if got := s.instance(victim.Name).Status; got != "running" {
			t.Errorf("the victim is %s", got)
		}
		victim.works(t)
	})
	s.sub("events about another host's instance are not recorded as its", func(t *testing.T) {
		event := func(target, initiator string) map[string]any {
			return map[string]any{
				"id": uuid.NewString(), "eventTime": time.Now().UTC().Format("2006-01-02T15:04:05.00+0000"), "action": "is.metadata.instance.read",
				"outcome": "success", "message": "made up by the rogue", "severity": "normal", "correlationId": uuid.NewString(),
				"initiator": map[string]any{"id": initiator, "name": "x", "authnId": initiator, "credential": map[string]any{"type": "x"}, "host": map[string]any{"address": victim.address()}},
				"target":    map[string]any{"id": target, "name": "x", "typeURI": "x"}, "observer": map[string]any{"name": "x"},
				"reason": map[string]any{"reasonCode": 200, "reasonType": "OK"},
			}
		}
		res := r.post("/v1/agent/events", bearer, map[string]any{"outbox": uuid.NewString(), "first": 1, "events": []any{
			event(victim.CRN, "crn-"+victim.CRN), event(mine.CRN, "crn-"+victim.CRN), event(mine.CRN, "IBMid-owner"),
		}})
		if res.status != 200 {
			t.Fatalf("the events are answered with %s", res)
		}
		var events []struct {
			Action, Message string
			Initiator       struct {
				ID      string
				AuthnID string `json:"authnId"`
			}
			Target struct{ ID string }
		}
		s.json(&events, "activity", "events", "--limit", "1000")
		found := 0
		for _, e := range events {
			if e.Message != "made up by the rogue" {
				continue
			}
			found++
			if e.Target.ID != mine.CRN || e.Initiator.ID != "crn-"+mine.CRN || e.Initiator.AuthnID != "crn-"+mine.CRN {
				t.Errorf("the rogue's event is recorded as %+v", e)
			}
		}
		if found != 2 {
			t.Errorf("%d events of the rogue are recorded, want the 2 about its own instance", found)
		}
	})
	s.sub("images that none of its instances boots from, and files, are not handed out", func(t *testing.T) {
		for _, id := range []string{mine.ImageID, "r006-00000000-0000-0000-0000-000000000000", "..%2f..%2fowner.json", "%2e%2e/owner.json", ""} {
			refused(t, "image "+id, r.call(http.MethodGet, "/v1/agent/images/"+id, bearer, "", nil))
		}
	})
	s.sub("its stream tells of no other host's instance", func(t *testing.T) {
		r.mu.Lock()
		defer r.mu.Unlock()
		if heard := r.heard.String(); strings.Contains(heard, victim.ID) || strings.Contains(heard, victim.CRN) {
			t.Errorf("the stream tells of the victim: %s", heard)
		}
	})
	s.sub("its access token is good for nothing but agents' calls", func(t *testing.T) {
		for _, path := range []string{"/v1/instances?version=2022-03-31&generation=2", "/v1/vpcs?version=2022-03-31&generation=2", "/v1/hosts", "/v1/profiles", "/v1/events", "/v2/groups", "/v1/policies"} {
			refused(t, path, r.call(http.MethodGet, path, bearer, "", nil))
		}
		refused(t, "a join token", r.post("/v1/hosts/join_tokens", bearer, map[string]any{"name": "accomplice"}))
		refused(t, "adoption", r.post("/v1/hosts/"+r.joined.ID+"/machines", bearer, map[string]any{"name": "x", "device": "eth0", "mac": "02:00:00:00:00:01", "address": victim.address()}))
		refused(t, "revoking the other host", r.post("/v1/hosts/h1/revoke", bearer, map[string]any{}))
	})
	s.sub("assertions that are another's, old, used or of another kind", func(t *testing.T) {
		var hosts []struct {
			ID, Name string
			Keys     []string
		}
		s.json(&hosts, "host", "list")
		other := hosts[slices.IndexFunc(hosts, func(h struct {
			ID, Name string
			Keys     []string
		}) bool {
			return h.Name == "h1"
		})]
		const kind = "client-authentication+jwt"
		once := r.assertion()
		if res := r.login(once); res.status != 200 {
			t.Fatalf("a good assertion is refused: %s", res)
		}
		now := time.Now().Unix()
		for name, assertion := range map[string]string{
			"used before":              once,
			"in the other's name":      r.sign(proof(other.ID, nil), r.joined.Kid, kind),
			"under the other's key id": r.sign(proof(other.ID, nil), other.Keys[0], kind),
			"of both":                  r.sign(proof(r.joined.ID, map[string]any{"sub": other.ID}), r.joined.Kid, kind),
			"old":                      r.sign(proof(r.joined.ID, map[string]any{"iat": now - 100, "exp": now - 40}), r.joined.Kid, kind),
			"for an hour":              r.sign(proof(r.joined.ID, map[string]any{"exp": now + 3600}), r.joined.Kid, kind),
			"for another server":       r.sign(proof(r.joined.ID, map[string]any{"aud": "https://iam.example.com/identity/token"}), r.joined.Kid, kind),
			"for two servers":          r.sign(proof(r.joined.ID, map[string]any{"aud": []string{serverURL + "/identity/token", "https://iam.example.com"}}), r.joined.Kid, kind),
			"without an id":            r.sign(proof(r.joined.ID, map[string]any{"jti": ""}), r.joined.Kid, kind),
			"of the kind of joining":   r.sign(proof(r.joined.ID, nil), r.joined.Kid, "host-join+jwt"),
			"of no kind":               r.sign(proof(r.joined.ID, nil), r.joined.Kid, ""),
			"an identity token":        good(mine),
		} {
			refused(t, name, r.login(assertion))
		}
		for name, assertion := range forged(t, r.assertion(), once, r.key.Public()) {
			refused(t, name, r.login(assertion))
		}
	})
	s.sub("a name of the installation's own is not its to join under", func(t *testing.T) {
		again := s.newRogue()
		defer again.close()
		again.key = r.key // it has joined as another already
		refused(t, "with a key that is in use", again.join(s.joinToken("second")))
		if out, err := s.tryCLI("host", "create-join-token", "h1"); err == nil {
			t.Errorf("a second h1 may join: %s", out)
		}
	})
	s.sub("once it is revoked its next call fails", func(t *testing.T) {
		token := good(mine)
		if res := r.exchange(bearer, mine, token, profile); res.status != 200 {
			t.Fatalf("before, %s", res)
		}
		s.cli("host", "revoke", "rogue", "-f")
		refused(t, "an exchange", r.exchange(bearer, mine, token, profile))
		refused(t, "a report", report(mine.ID, "running", "stopped"))
		refused(t, "events", r.post("/v1/agent/events", bearer, map[string]any{"first": 4, "events": []any{}}))
		refused(t, "the stream", r.call(http.MethodGet, "/v1/agent/stream?capacity=%7B%22drivers%22%3A%5B%5D%7D", bearer, "", nil))
		refused(t, "an assertion", r.login(r.assertion()))
		s.await("its stream has ended", func() bool {
			select {
			case <-r.ended:
				return true
			default:
				return false
			}
		})
		victim.works(t)
	})
}

// header is a member of a token's header.
func header(t *testing.T, token, name string) string {
	t.Helper()
	head, _, _ := strings.Cut(token, ".")
	b, err := rawURL.DecodeString(head)
	if err != nil {
		t.Fatal(err)
	}
	return stringField(string(b), name)
}

// A join token lets one host in, once; and what lies on a host's disk lets
// nobody in.
func TestWhatAHostJoinsWithIsOfNoUseToAnybodyElse(t *testing.T) {
	s := newSite(t, 1, "--driver", "netns")
	s.furnish()
	s.sub("a join token that was used", func(t *testing.T) {
		b, err := os.ReadFile(filepath.Join(s.dir, "h1.token"))
		if err != nil {
			t.Fatal(err)
		}
		thief := s.newRogue()
		defer thief.close()
		if res := thief.join(strings.TrimSpace(string(b))); !res.refused() {
			t.Errorf("the thief joins: %s", res)
		}
		if out, err := s.agent(s.hosts[0], filepath.Join(s.dir, "second"), filepath.Join(s.dir, "second.master"), "--join-token-file", filepath.Join(s.dir, "h1.token")); err == nil {
			t.Errorf("a second agent joins: %s", out)
		}
	})
	s.sub("a join token that many show at once lets one in", func(t *testing.T) {
		token := s.joinToken("popular")
		const many = 8
		results := make([]result, many)
		var wg sync.WaitGroup
		for n := range many {
			thief := s.newRogue()
			defer thief.close()
			wg.Go(func() { results[n] = thief.join(token) })
		}
		wg.Wait()
		in := 0
		for _, res := range results {
			switch {
			case res.status == http.StatusCreated:
				in++
			case !res.refused():
				t.Errorf("one is answered %s", res)
			}
		}
		if in != 1 {
			t.Errorf("%d hosts have joined with one token", in)
		}
	})
	s.sub("a join token that nobody made, or with another's proof", func(t *testing.T) {
		thief := s.newRogue()
		defer thief.close()
		if res := thief.join("tabard-join-" + strings.Repeat("A", 43)); !res.refused() {
			t.Errorf("the thief joins: %s", res)
		}
		if res := thief.join(""); !res.refused() {
			t.Errorf("the thief joins without a token: %s", res)
		}
		token := s.joinToken("careful")
		honest := s.newRogue()
		defer honest.close()
		jwk := json.RawMessage(fmt.Sprintf(`{"kty":"RSA","n":%q,"e":"AQAB"}`, rawURL.EncodeToString(honest.key.N.Bytes())))
		for name, proof := range map[string]string{
			"none":               "",
			"for another token":  honest.sign(proof("", map[string]any{"join": "x"}), "", "host-join+jwt"),
			"by another key":     thief.sign(proof("", map[string]any{"join": "x"}), "", "host-join+jwt"),
			"of another kind":    honest.sign(proof("", nil), "", ""),
			"for another server": honest.sign(proof("", map[string]any{"aud": "https://iam.example.com/identity/token"}), "", "host-join+jwt"),
		} {
			if res := honest.post("/v1/agent/join", "", map[string]any{"join_token": token, "jwk": jwk, "proof": proof}); !res.refused() {
				t.Errorf("with a proof %s: %s", name, res)
			}
		}
		// None of these has used it up.
		if res := honest.join(token); res.status != http.StatusCreated {
			t.Errorf("the honest host does not join any more: %s", res)
		}
	})
	s.sub("what is on the disk holds no secret in clear", func(t *testing.T) {
		h := s.hosts[0]
		b, err := os.ReadFile(filepath.Join(s.dir, "h1.token"))
		if err != nil {
			t.Fatal(err)
		}
		s.box("instance-a").works(t)
		err = filepath.WalkDir(h.dir, func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for what, sign := range map[string]string{"a key": "PRIVATE KEY", "the join token": strings.TrimSpace(string(b)), "a token": "eyJhbGciOi"} {
				if strings.Contains(string(content), sign) {
					t.Errorf("%s holds %s", path, what)
				}
			}
			// PKCS #8 and #1 in DER begin so.
			if regexp.MustCompile(`(?s)\x30\x82..\x02\x01\x00\x30\x0d\x06\x09\x2a\x86\x48|\x30\x82..\x02\x01\x00\x02\x82`).Match(content) {
				t.Errorf("%s holds a key", path)
			}
			info, err := d.Info()
			if err == nil && info.Mode().Perm()&0o077 != 0 && !strings.Contains(path, "machines") {
				t.Errorf("%s can be read by others: %s", path, info.Mode())
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	})
	s.sub("a stolen directory is of no use without the master key", func(t *testing.T) {
		stolen := filepath.Join(s.dir, "stolen")
		s.must("cp", "-a", s.hosts[0].dir, stolen)
		for name, master := range map[string]string{"none": filepath.Join(s.dir, "nowhere.master"), "another": s.write("other.master", fmt.Appendf(nil, "%s\n", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="))} {
			out, err := s.agent(s.hosts[0], stolen, master)
			if err == nil || exitCode(err) != 1 {
				t.Errorf("with %s the agent starts: %v\n%s", name, err, out)
			}
			if !strings.Contains(fmt.Sprint(err), "master key") {
				t.Errorf("with %s the agent does not say what is missing: %v", name, err)
			}
			// Nor with the join token that was used.
			out, err = s.agent(s.hosts[0], stolen, master, "--join-token-file", filepath.Join(s.dir, "h1.token"))
			if err == nil || exitCode(err) != 1 {
				t.Errorf("with %s and a used join token the agent starts: %v\n%s", name, err, out)
			}
		}
		s.boxNamed("instance-a").works(t)
	})
}

// agent starts an agent that is not to get far, and returns what it says.
func (s *site) agent(h *node, dir, master string, args ...string) (string, error) {
	return s.try(h.space, append([]string{
		"timeout", "20", s.bin, "agent", "--server", serverURL, "--ca-file", filepath.Join(s.dir, "ca.pem"), "--driver", "netns",
		"--data-dir", dir, "--master-key-file", master,
	}, args...)...)
}
