package metadata_test

import (
	"fmt"
	"net/http"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/vpc"
)

const put = http.MethodPut

func TestTheOldArticlesThreeCallsWorkVerbatim(t *testing.T) {
	s := startAs(t, jose.RS256)
	m := s.ask(ask{method: put, path: oldBase + "/token?version=2022-03-31", header: flavor, body: `{
        "expires_in": 600
      }`}).want(200)
	if m["expires_in"] != 600.0 {
		t.Errorf("expires_in %v, want 600", m["expires_in"])
	}
	a := s.ask(ask{method: http.MethodPost, path: oldBase + "/iam_token?version=2022-03-31", bearer: m["access_token"].(string)})
	if m = a.want(200); m["expires_in"] != 3600.0 {
		t.Errorf("expires_in %v, want 3600", m["expires_in"])
	}
	c, err := s.grants.Caller(m["access_token"].(string))
	if err != nil {
		t.Fatal(err)
	}
	if c.IAMID != "iam-"+s.profile.ID || c.Account.BSS != s.Owner.AccountID {
		t.Errorf("token of %s in account %s", c.IAMID, c.Account.BSS)
	}
}

func TestBothAnswersHaveTheFourFieldsThatClientsDereference(t *testing.T) {
	s := start(t)
	before := time.Now().Truncate(time.Second)
	for name, m := range map[string]map[string]any{
		"identity token": s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor}).want(200),
		"IAM token":      s.iam(s.identityToken(), "").want(200),
	} {
		want := map[string]float64{"identity token": 300, "IAM token": 3600}[name]
		created, err := time.Parse(time.RFC3339, m["created_at"].(string))
		if err != nil {
			t.Errorf("%s: created_at: %v", name, err)
		}
		expires, err := time.Parse(time.RFC3339, m["expires_at"].(string))
		if err != nil {
			t.Errorf("%s: expires_at: %v", name, err)
		}
		if m["expires_in"] != want || expires.Sub(created) != time.Duration(want)*time.Second || created.Before(before) || created.After(time.Now()) {
			t.Errorf("%s: created %v, expires %v, in %v s", name, created, expires, m["expires_in"])
		}
		if !strings.HasSuffix(m["expires_at"].(string), ".000Z") {
			t.Errorf("%s: expires_at %v is not in UTC with milliseconds", name, m["expires_at"])
		}
		c := claims(t, m["access_token"].(string))
		if c["exp"] != float64(expires.Unix()) || c["iat"] != float64(created.Unix()) {
			t.Errorf("%s: the token lives %v to %v, the answer says %v to %v", name, c["iat"], c["exp"], created, expires)
		}
		if len(m) != 4 {
			t.Errorf("%s: the answer has fields beyond the four: %v", name, m)
		}
	}
}

func TestPathsFollowTheirVersions(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	today := time.Now().UTC()
	day := func(n int) string { return today.AddDate(0, 0, n).Format(time.DateOnly) }
	for _, c := range []struct {
		version  string
		old, now int
	}{
		{"2021-09-10", 200, 200},
		{"2022-03-01", 200, 200},
		{"2022-03-31", 200, 200},
		{"2025-08-25", 200, 200},
		{"2025-08-26", 404, 200},
		{day(0), 404, 200},
		{day(1), 404, 200}, // a day of clock skew
		{day(2), 400, 400},
		{"2020-12-31", 400, 400},
		{"2022-3-31", 400, 400},
		{"2022-02-30", 400, 400},
		{"20220331", 400, 400},
		{"2022-03-31T00:00:00Z", 400, 400},
		{"latest", 400, 400},
		{"", 400, 400},
		{"'%20OR%201=1", 400, 400},
	} {
		for _, gen := range []struct {
			base, iam string
			want      int
		}{{oldBase, "/iam_token", c.old}, {newBase, "/iam_tokens", c.now}} {
			for _, a := range []*answer{
				s.ask(ask{method: put, path: gen.base + "/token?version=" + c.version, header: flavor}),
				s.ask(ask{method: http.MethodPost, path: gen.base + gen.iam + "?version=" + c.version, bearer: bearer}),
			} {
				switch {
				case a.status != gen.want:
					t.Errorf("%s, version %q: status %d, want %d", gen.base, c.version, a.status, gen.want)
				case gen.want == 404:
					a.wantError(404, "not_found", "")
				case c.version == "":
					a.wantError(400, "missing_value", "parameter version")
				case gen.want == 400:
					a.wantError(400, "invalid_value", "parameter version")
				}
			}
		}
	}
	s.ask(ask{method: put, path: newBase + "/token", header: flavor}).wantError(400, "missing_value", "parameter version")
	s.ask(ask{path: "/metadata/v1/instance", bearer: bearer}).wantError(400, "missing_value", "parameter version")
	s.ask(ask{method: put, path: newBase + "/token?version=2025-07-20&maturity=beta", header: flavor}).want(200)
}

func TestPathsThatDoNotExistAre404InTheServicesShape(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	for _, c := range []struct{ method, path string }{
		{put, newBase + "/tokens"},
		{http.MethodPost, newBase + "/iam_token"},
		{http.MethodPost, oldBase + "/iam_tokens"},
		{http.MethodPost, newBase + "/token"},
		{http.MethodGet, newBase + "/token"},
		{http.MethodGet, newBase + "/iam_tokens"},
		{put, newBase + "/token/"},
		{http.MethodPost, "/metadata/v1/instance"},
		{http.MethodGet, "/metadata/v1/instance/../../../v1/instances"},
		{http.MethodGet, "/metadata/v1//instance"},
		{http.MethodGet, "/metadata/v1/./instance"},
		{http.MethodGet, "//169.254.169.254/metadata/v1/instance"},
		{http.MethodGet, "/metadata/v1/instances"},
		{http.MethodGet, "/v1/instances"},
		{http.MethodGet, "/identity/keys"},
		{http.MethodPost, "/identity/token"},
		{http.MethodGet, "/latest/meta-data/"},
		{http.MethodGet, "/"},
		{http.MethodOptions, newBase + "/token"},
		{http.MethodHead + "X", newBase + "/token"},
	} {
		a := s.ask(ask{method: c.method, path: c.path + "?" + version, bearer: bearer, header: flavor})
		if a.status != 404 {
			t.Errorf("%s %s: status %d, Location %q, want 404", c.method, c.path, a.status, a.header.Get("Location"))
			continue
		}
		a.wantError(404, "not_found", "")
	}
}

func TestAnswersCarryNoCORSHeaderAndAreNotKept(t *testing.T) {
	s := start(t)
	a := s.ask(ask{method: put, path: newBase + "/token?" + version, header: http.Header{
		"Metadata-Flavor": {"ibm"}, "Origin": {"http://evil.test"},
	}})
	a.want(200)
	for name := range a.header {
		if strings.HasPrefix(name, "Access-Control-") {
			t.Errorf("header %s is sent", name)
		}
	}
	if a.header.Get("Cache-Control") != "no-cache, no-store, must-revalidate" || a.header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("headers %v", a.header)
	}
}

func TestAnIdentityTokenNeedsTheFlavorHeader(t *testing.T) {
	s := start(t)
	for _, path := range []string{oldBase, newBase} {
		for _, c := range []struct {
			flavor []string
			code   string
		}{
			{nil, "missing_value"},
			{[]string{""}, "missing_value"},
			{[]string{"Google"}, "invalid_value"},
			{[]string{"IBM"}, "invalid_value"},
			{[]string{"ibm, Google"}, "invalid_value"},
			{[]string{"Google", "ibm"}, "invalid_value"},
		} {
			a := s.ask(ask{method: put, path: path + "/token?" + version, header: http.Header{"Metadata-Flavor": c.flavor}})
			item := a.wantError(400, c.code, "header Metadata-Flavor")
			if !strings.Contains(item["message"].(string), "Metadata-Flavor") {
				t.Errorf("the message does not name the header: %v", item["message"])
			}
			check(t, s.event("is.metadata.jwt-token.create"), "metadata-flavor")
		}
	}
}

func TestAnIdentityTokenLivesFrom5SecondsTo1Hour(t *testing.T) {
	s := start(t)
	for life, ok := range map[string]bool{
		"4": false, "5": true, "300": true, "3600": true, "3601": false, "0": false, "-1": false,
		"99999999999999999999": false, "600.5": false, `"600"`: false, "1e3": false, "true": false, "[600]": false,
	} {
		a := s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor, body: `{"expires_in":` + life + `}`})
		if !ok {
			item := a.wantError(400, "invalid_value", "field expires_in")
			if v, present := item["target"].(map[string]any)["value"]; present && v != life {
				t.Errorf("expires_in %s: target says %v", life, v)
			}
			check(t, s.event("is.metadata.jwt-token.create"), "request-body")
			continue
		}
		m := a.want(200)
		c := claims(t, m["access_token"].(string))
		if got := c["exp"].(float64) - c["iat"].(float64); fmt.Sprint(got) != life || fmt.Sprint(m["expires_in"]) != life {
			t.Errorf("expires_in %s: answer says %v, token lives %v", life, m["expires_in"], got)
		}
	}
}

func TestTheBodyOfATokenRequestIsOptionalJSONOfAnyContentType(t *testing.T) {
	s := start(t)
	for _, body := range []string{"", "{}", " \n{ } \n", "null"} {
		m := s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor, body: body}).want(200)
		if m["expires_in"] != 300.0 {
			t.Errorf("body %q: expires_in %v, want the default 300", body, m["expires_in"])
		}
	}
	for _, ct := range []string{"application/json", "text/plain", "", "application/x-www-form-urlencoded", "garbage;;"} {
		s.ask(ask{method: put, path: newBase + "/token?" + version, body: `{"expires_in":7}`, header: http.Header{
			"Metadata-Flavor": {"ibm"}, "Content-Type": {ct},
		}}).want(200)
	}
}

func TestBadBodiesAreRefusedWithTheFieldAtFault(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	big := `{"nonce":"` + strings.Repeat("x", 8<<10) + `"}`
	for _, c := range []struct{ body, code, target string }{
		{"not json", "invalid_request", ""},
		{"{", "invalid_request", ""},
		{"expires_in=600", "invalid_request", ""},
		{"[]", "invalid_request", ""},
		{`"text"`, "invalid_request", ""},
		{"7", "invalid_request", ""},
		{"{}{}", "invalid_request", ""},
		{"{} x", "invalid_request", ""},
		{big, "invalid_request", ""},
		{strings.Repeat(" ", 9<<10), "invalid_request", ""},
		{`{"extra":1}`, "unknown_field", "field extra"},
		{`{"role":"admin","expires_in":600}`, "unknown_field", "field role"},
	} {
		name := c.body[:min(len(c.body), 20)]
		t.Run("PUT "+name, func(t *testing.T) {
			a := s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor, body: c.body})
			a.t = t
			a.wantError(400, c.code, c.target)
			check(t, s.event("is.metadata.jwt-token.create"), "request-body")
		})
		t.Run("POST "+name, func(t *testing.T) {
			a := s.iam(bearer, c.body)
			a.t = t
			if c.code == "unknown_field" || c.body == big {
				a.want(400)
				return
			}
			a.wantError(400, c.code, c.target)
		})
	}
	s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor, body: `{"nonce":7}`}).wantError(400, "invalid_value", "field nonce")
	s.iam(bearer, `{"trusted_profile":"Profile-1"}`).wantError(400, "invalid_value", "field trusted_profile")
	s.iam(bearer, `{"trusted_profile":{"id":7}}`).wantError(400, "invalid_value", "field trusted_profile.id")
	s.iam(bearer, `{"trusted_profile":{"iam_id":"x"}}`).wantError(400, "unknown_field", "field trusted_profile.iam_id")
	s.iam(bearer, `{"expires_in":600}`).wantError(400, "unknown_field", "field expires_in")
}

func TestANonceComesBackInTheAnswerAndInTheToken(t *testing.T) {
	s := start(t)
	with := func(nonce string) *answer {
		return s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor, body: fmt.Sprintf(`{"nonce":%q}`, nonce)})
	}
	m := with("n-0S6_WzA2Mj").want(200)
	c := claims(t, m["access_token"].(string))
	if m["nonce"] != "n-0S6_WzA2Mj" || c["nonce"] != "n-0S6_WzA2Mj" {
		t.Errorf("answer %v, token %v", m["nonce"], c["nonce"])
	}
	if _, ok := claims(t, s.identityToken())["nonce"]; ok {
		t.Error("a token without a nonce asked for has one")
	}
	with(strings.Repeat("x", 512)).want(200)
	with(strings.Repeat("x", 513)).wantError(400, "invalid_value", "field nonce")
	check(t, s.event("is.metadata.jwt-token.create"), "request-body")
}

func TestAnIdentityTokenDescribesTheInstance(t *testing.T) {
	s := startAs(t, jose.RS256)
	fip := &vpc.FloatingIP{
		ID: "r006-" + uuid.NewString(), AccountID: s.Owner.AccountID, Name: "my-fip", Zone: "us-south-3",
		Address: netip.MustParseAddr("198.51.100.9"), InstanceID: s.instance.ID, InterfaceID: s.instance.Interfaces[0].ID,
	}
	s.update(func(tx *directory.Tx) { s.d.FloatingIPs.Put(tx, fip) })
	raw := s.identityToken()
	h := header(t, raw)
	if h["alg"] != "RS256" || !strings.HasPrefix(h["kid"].(string), "VSI-CR_us-south_") || len(h) != 2 {
		t.Errorf("header %v", h)
	}
	c := claims(t, raw)
	if c["jti"] == "" {
		t.Error("no jti")
	}
	for _, name := range []string{"jti", "iat", "exp"} {
		if _, ok := c[name]; !ok {
			t.Errorf("claim %s is missing", name)
		}
		delete(c, name)
	}
	aud, _ := c["aud"].([]any)
	delete(c, "aud")
	opaque := regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}_[0-9]+$`)
	if len(aud) != 2 || aud[0] != "VSI-CR_us-south" || !opaque.MatchString(aud[1].(string)) {
		t.Errorf("aud %v", aud)
	}
	i := s.instance
	want := map[string]any{
		"iss": "VSI-CR_us-south",
		"iaas": map[string]any{
			"crn": i.CRN, "accountID": i.AccountID, "instanceID": i.ID, "zone": "us-south-3", "region": "us-south",
			"profile_name": "bx2-2x8", "resource_group_id": i.ResourceGroupID,
		},
		"ip_addresses": []any{map[string]any{"address": "198.51.100.9"}, map[string]any{"address": "10.240.128.4"}},
		"subnets":      []any{map[string]any{"crn": s.crn("is", "us-south-3", "subnet", s.subnet.ID), "id": s.subnet.ID, "name": "my-subnet"}},
		"vpc":          map[string]any{"crn": s.crn("is", "us-south", "vpc", s.vpc.ID), "id": s.vpc.ID, "name": "my-vpc"},
	}
	if diff := cmp.Diff(want, c); diff != "" {
		t.Errorf("claims differ from what is wanted (-) :\n%s", diff)
	}
}

func TestAnIdentityTokenCanBeUsedAgainUntilItExpires(t *testing.T) {
	s := start(t)
	m := s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor, body: `{"expires_in":60}`}).want(200)
	bearer := m["access_token"].(string)
	for range 3 {
		s.iam(bearer, "").want(200)
		s.ask(ask{path: "/metadata/v1/instance?" + version, bearer: bearer}).want(200)
	}
	s.clock.advance(time.Minute)
	s.iam(bearer, "").wantError(401, "unauthenticated", "")
	s.ask(ask{path: "/metadata/v1/instance?" + version, bearer: bearer}).wantError(401, "unauthenticated", "")
	check(t, s.event("is.metadata.computeresource-token.request"), attest.CheckTime)
}

func TestAnIAMTokenNeedsABearer(t *testing.T) {
	s := start(t)
	good := s.identityToken()
	for _, c := range []struct {
		authorization, target string
	}{
		{"", "header Authorization"},
		{"Bearer", "header Authorization"},
		{"Bearer ", "header Authorization"},
		{"Basic " + good, "header Authorization"},
		{good, "header Authorization"},
		{"Bearer x", ""},
		{"Bearer " + good + "x", ""},
		{"Bearer " + good[:len(good)-6], ""},
		{"Bearer a.b.c", ""},
		{"Bearer " + strings.Repeat("x", 20<<10), ""},
	} {
		h := http.Header{"Authorization": {c.authorization}}
		s.ask(ask{method: http.MethodPost, path: newBase + "/iam_tokens?" + version, header: h}).wantError(401, "unauthenticated", c.target)
		e := s.event("is.metadata.computeresource-token.request")
		if failed, ok := e.Trace.Failed(); !ok {
			t.Errorf("Authorization %.20q: the refusal is not explained: %+v", c.authorization, failed)
		}
		s.ask(ask{path: "/metadata/v1/instance?" + version, header: h}).wantError(401, "unauthenticated", c.target)
	}
	for _, scheme := range []string{"bearer", "BEARER", " Bearer "} {
		h := http.Header{"Authorization": {scheme + " " + good}}
		s.ask(ask{method: http.MethodPost, path: newBase + "/iam_tokens?" + version, header: h}).want(200)
	}
}

func TestAnAccessTokenIsNoIdentityTokenAndTheOtherWayRound(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	access := s.iam(bearer, "").want(200)["access_token"].(string)
	s.iam(access, "").wantError(401, "unauthenticated", "")
	s.ask(ask{path: "/metadata/v1/instance?" + version, bearer: access}).wantError(401, "unauthenticated", "")
	if _, err := s.grants.Caller(bearer); err == nil {
		t.Error("an identity token is accepted where an access token belongs")
	}
}

func TestAnIdentityTokenWorksOnlyOnItsOwnInstancesListener(t *testing.T) {
	s := start(t)
	neighbour := s.newInstance("neighbour", "local", 5)
	neighbour.DefaultProfile = s.instance.DefaultProfile
	s.update(func(tx *directory.Tx) {
		s.d.Instances.Put(tx, neighbour)
		s.d.Links.Put(tx, s.newLink(s.profile, neighbour.CRN, false))
	})
	bearer := s.identityToken()
	s.ask(ask{method: http.MethodPost, path: newBase + "/iam_tokens?" + version, bearer: bearer, of: neighbour.ID}).
		wantError(401, "unauthenticated", "")
	check(t, s.event("is.metadata.computeresource-token.request"), "caller")
	s.ask(ask{path: "/metadata/v1/instance?" + version, bearer: bearer, of: neighbour.ID}).wantError(401, "unauthenticated", "")

	// What names an instance in the request does not matter: the listener does.
	a := s.ask(ask{method: put, path: newBase + "/token?" + version + "&instance=" + neighbour.ID, header: http.Header{
		"Metadata-Flavor": {"ibm"}, "X-Instance-Id": {neighbour.ID}, "X-Tenant-Id": {neighbour.AccountID},
	}})
	if c := claims(t, a.want(200)["access_token"].(string)); c["iaas"].(map[string]any)["instanceID"] != s.instance.ID {
		t.Errorf("token about %v", c["iaas"])
	}
}

// identityClaims are those of a good token, to be spoilt.
func (s *stack) identityClaims() attest.IdentityClaims {
	now := s.clock.now().Unix()
	i := s.instance
	return attest.IdentityClaims{
		Issuer: "VSI-CR_us-south", Audience: []string{"VSI-CR_us-south"}, IssuedAt: now, Expires: now + 300, JTI: uuid.NewString(),
		IaaS: attest.IaaS{CRN: i.CRN, AccountID: i.AccountID, InstanceID: i.ID, Zone: i.Zone, Region: region, Profile: i.Profile, ResourceGroup: i.ResourceGroupID},
	}
}

func TestTokensThatTheHostDidNotMakeForThisInstanceAreRefused(t *testing.T) {
	s := start(t)
	stranger := s.newHost("stranger", jose.ES256, "VSI-CR_us-south_stranger_")
	other := s.newInstance("other", "stranger", 6)
	s.update(func(tx *directory.Tx) {
		s.d.Instances.Put(tx, other)
		s.d.Links.Put(tx, s.newLink(s.profile, other.CRN, false))
	})
	sign := func(ring interface {
		Sign(any, string) (string, error)
	}, typ string, spoil func(c *attest.IdentityClaims)) string {
		c := s.identityClaims()
		spoil(&c)
		raw, err := ring.Sign(c, typ)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	good := func(*attest.IdentityClaims) {}
	s.iam(sign(s.host, "", good), "").want(200)
	for name, raw := range map[string]string{
		"signed by another host": sign(stranger, "", good),
		"of another host's own instance": sign(stranger, "", func(c *attest.IdentityClaims) {
			c.IaaS.InstanceID, c.IaaS.CRN = other.ID, other.CRN
		}),
		"about an instance on another host": sign(s.host, "", func(c *attest.IdentityClaims) {
			c.IaaS.InstanceID, c.IaaS.CRN = other.ID, other.CRN
		}),
		"signed by the access token key": sign(s.issuer.Keys, "", good),
		"for another region": sign(s.host, "", func(c *attest.IdentityClaims) {
			c.Issuer, c.Audience = "VSI-CR_eu-de", []string{"VSI-CR_eu-de"}
		}),
		"for another audience": sign(s.host, "", func(c *attest.IdentityClaims) { c.Audience = []string{"iam"} }),
		"with another CRN":     sign(s.host, "", func(c *attest.IdentityClaims) { c.IaaS.CRN = other.CRN }),
		"with another account": sign(s.host, "", func(c *attest.IdentityClaims) { c.IaaS.AccountID = s.Other.AccountID }),
		"living too long":      sign(s.host, "", func(c *attest.IdentityClaims) { c.Expires = c.IssuedAt + 3601 }),
		"from the future":      sign(s.host, "", func(c *attest.IdentityClaims) { c.IssuedAt += 60; c.Expires += 60 }),
		"without an end":       sign(s.host, "", func(c *attest.IdentityClaims) { c.Expires = 0 }),
		"of another type":      sign(s.host, "rt+jwt", good),
	} {
		t.Run(name, func(t *testing.T) {
			for _, a := range []*answer{s.iam(raw, ""), s.ask(ask{path: "/metadata/v1/instance?" + version, bearer: raw})} {
				a.t = t
				a.wantError(401, "unauthenticated", "")
			}
			if _, ok := s.event("is.metadata.computeresource-token.request").Trace.Failed(); !ok {
				t.Error("the refusal is not explained")
			}
		})
	}
}

func TestARevokedHostsInstancesGetNoIAMToken(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	s.iam(bearer, "").want(200)
	host, ok := s.d.Hosts.Get("local")
	if !ok {
		t.Fatal("no host")
	}
	revoked := *host
	revoked.Revoked = true
	s.update(func(tx *directory.Tx) { s.d.Hosts.Put(tx, &revoked) })
	s.iam(bearer, "").wantError(401, "unauthenticated", "")
	for _, action := range []string{"is.metadata.computeresource-token.request", "iam-identity.computeresource-token.login"} {
		check(t, s.event(action), attest.CheckHost)
	}
	s.iam(s.identityToken(), "").wantError(401, "unauthenticated", "")
}

func TestAKeyIDThatTwoHostsClaimIsNobodys(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	host, ok := s.d.Hosts.Get("local")
	if !ok {
		t.Fatal("no host")
	}
	s.update(func(tx *directory.Tx) {
		s.d.Hosts.Put(tx, &cluster.Host{ID: "thief", Name: "thief", JWKS: host.JWKS})
	})
	s.iam(bearer, "").wantError(401, "unauthenticated", "")
	check(t, s.event("iam-identity.computeresource-token.login"), attest.CheckIssuer)
}

func TestADisabledServiceSaysSo(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	s.change(func(i *vpc.Instance) { i.Metadata.Enabled = false })
	for _, a := range []ask{
		{method: put, path: newBase + "/token?" + version, header: flavor},
		{method: http.MethodPost, path: newBase + "/iam_tokens?" + version, bearer: bearer},
		{path: "/metadata/v1/instance?" + version, bearer: bearer},
	} {
		s.ask(a).wantError(403, "unauthorized", "")
	}
	s.change(func(i *vpc.Instance) { i.Metadata.Enabled = true })
	s.iam(bearer, "").want(200)
	s.update(func(tx *directory.Tx) { s.d.Instances.Delete(tx, s.instance) })
	s.iam(bearer, "").wantError(403, "unauthorized", "")
}

func TestAnInstanceThatDoesNotRunIsToldToComeAgain(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	for _, status := range []string{vpc.Pending, vpc.Starting, vpc.Stopping, vpc.Stopped, vpc.Restarting, vpc.Deleting, vpc.Failed} {
		s.change(func(i *vpc.Instance) { i.Status = status })
		for _, a := range []*answer{s.iam(bearer, ""), s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor})} {
			a.wantError(503, "service_error", "")
			if a.header.Get("Retry-After") != "1" {
				t.Errorf("%s: Retry-After %q", status, a.header.Get("Retry-After"))
			}
		}
	}
}

func TestRequestsThatCameThroughSomebodyElseAreRefused(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	for _, name := range []string{"X-Forwarded-For", "X-Forwarded-Host", "Forwarded", "Via", "X-Real-IP"} {
		for _, value := range []string{"10.0.0.1", "169.254.169.254", ""} {
			for _, a := range []ask{
				{method: put, path: newBase + "/token?" + version, header: http.Header{"Metadata-Flavor": {"ibm"}, name: {value}}},
				{method: http.MethodPost, path: newBase + "/iam_tokens?" + version, bearer: bearer, header: http.Header{name: {value}}},
				{path: "/metadata/v1/instance?" + version, bearer: bearer, header: http.Header{name: {value}}},
			} {
				s.ask(a).wantError(403, "unauthorized", "header "+http.CanonicalHeaderKey(name))
			}
		}
	}
}

func TestTheServiceAnswersUnderItsOwnNamesOnly(t *testing.T) {
	s := start(t)
	for host, ok := range map[string]bool{
		"169.254.169.254": true, "169.254.169.254:80": true, "api.metadata.cloud.ibm.com": true, "API.Metadata.Cloud.IBM.com": true,
		"127.0.0.1:41000": false, "localhost:41000": false,
		"evil.test": false, "evil.test:80": false, "169.254.169.254.evil.test": false, "api.metadata.cloud.ibm.com.evil.test": false,
		"10.240.128.4": false, "[::ffff:169.254.169.254]": false, "169.254.169.254:80:80": false, "user@169.254.169.254": false,
	} {
		a := s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor, host: host})
		if ok {
			a.want(200)
		} else {
			a.wantError(403, "unauthorized", "header Host")
		}
	}
}

func TestTheServiceIsNoProxy(t *testing.T) {
	s := start(t)
	for _, target := range []string{"http://169.254.169.254", "http://api.metadata.cloud.ibm.com:80", "https://127.0.0.1"} {
		s.ask(ask{method: put, path: target + newBase + "/token?" + version, header: flavor}).wantError(400, "invalid_request", "")
	}
	s.ask(ask{method: put, path: "http://evil.test" + newBase + "/token?" + version, header: flavor, host: "evil.test"}).
		wantError(403, "unauthorized", "header Host")
}
