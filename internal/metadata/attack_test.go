package metadata_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/host/authority"
	"tabard.dev/tabard/internal/host/serve"
	"tabard.dev/tabard/internal/jwt/jwttest"
	"tabard.dev/tabard/internal/vpc"
)

// listen serves an instance as a host does, and returns the address.
func (s *stack) listen(instance string, tlsConfig *tls.Config) string {
	s.T.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		s.T.Fatal(err)
	}
	g := &serve.Group{Log: slog.New(slog.DiscardHandler)}
	bounds := serve.Metadata()
	bounds.TLS = tlsConfig
	g.Serve(l.(*net.TCPListener), netip.Addr{}, s.service.Handler(instance), bounds)
	s.T.Cleanup(func() { g.Stop(s.T.Context()) })
	return l.Addr().String()
}

// raw sends bytes and returns the statuses and bodies of what comes back.
func raw(t *testing.T, addr, text string) (statuses []int, bodies string) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	// The server may close before all is written.
	_, _ = io.WriteString(conn, text)
	_ = conn.(*net.TCPConn).CloseWrite()
	r := bufio.NewReader(conn)
	for {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return statuses, bodies
		}
		b, _ := io.ReadAll(resp.Body)
		statuses, bodies = append(statuses, resp.StatusCode), bodies+string(b)
	}
}

// What a program in the instance can write to the socket, good or bad.
func TestOnlyPlainRequestsGetAToken(t *testing.T) {
	s := start(t)
	addr := s.listen(s.instance.ID, nil)
	const target = "/identity/v1/token?version=2022-03-31"
	const head = "Host: 169.254.169.254\r\nMetadata-Flavor: ibm\r\n"
	big := strings.Repeat("x", 9<<10)
	for _, c := range []struct {
		name, text string
		want       string // statuses
	}{
		{"plain", "PUT " + target + " HTTP/1.1\r\n" + head + "Connection: close\r\n\r\n", "[200]"},
		{"HTTP/1.0 with a host", "PUT " + target + " HTTP/1.0\r\n" + head + "\r\n", "[200]"},
		{"chunked", "PUT " + target + " HTTP/1.1\r\n" + head + "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", "[200]"},

		{"HTTP/1.0 without a host", "PUT " + target + " HTTP/1.0\r\nMetadata-Flavor: ibm\r\n\r\n", "[403]"},
		{"HTTP/1.1 without a host", "PUT " + target + " HTTP/1.1\r\nMetadata-Flavor: ibm\r\n\r\n", "[400]"},
		{"two hosts", "PUT " + target + " HTTP/1.1\r\nHost: 169.254.169.254\r\n" + head + "\r\n", "[400]"},
		{"HTTP/0.9", "PUT " + target + "\r\n", "[400]"},
		{"the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "[400]"},
		{"another's name", "PUT " + target + " HTTP/1.1\r\nHost: evil.test\r\nMetadata-Flavor: ibm\r\nConnection: close\r\n\r\n", "[403]"},
		{"its own address with a port of another", "PUT " + target + " HTTP/1.1\r\nHost: 10.240.128.4:80\r\nMetadata-Flavor: ibm\r\nConnection: close\r\n\r\n", "[403]"},
		{"an absolute target", "PUT http://169.254.169.254" + target + " HTTP/1.1\r\n" + head + "Connection: close\r\n\r\n", "[400]"},
		{"an absolute target elsewhere", "PUT http://evil.test" + target + " HTTP/1.1\r\n" + head + "Connection: close\r\n\r\n", "[403]"},
		{"a user in the target", "PUT http://169.254.169.254@evil.test" + target + " HTTP/1.1\r\n" + head + "Connection: close\r\n\r\n", "[403]"},
		{"a scheme-relative target", "PUT //169.254.169.254" + target + " HTTP/1.1\r\n" + head + "Connection: close\r\n\r\n", "[404]"},
		{"a tunnel", "CONNECT 169.254.169.254:80 HTTP/1.1\r\n" + head + "Connection: close\r\n\r\n", "[400]"},
		{"a tunnel elsewhere", "CONNECT iam.cloud.ibm.com:443 HTTP/1.1\r\nHost: iam.cloud.ibm.com:443\r\nConnection: close\r\n\r\n", "[403]"},
		{"TRACE", "TRACE " + target + " HTTP/1.1\r\n" + head + "Connection: close\r\n\r\n", "[404]"},
		{"OPTIONS as a browser asks", "OPTIONS " + target + " HTTP/1.1\r\n" + head + "Origin: http://evil.test\r\nAccess-Control-Request-Method: PUT\r\nConnection: close\r\n\r\n", "[404]"},
		{"a method of its own", "put " + target + " HTTP/1.1\r\n" + head + "Connection: close\r\n\r\n", "[404]"},
		{"POST with an override", "POST " + target + " HTTP/1.1\r\n" + head + "X-HTTP-Method-Override: PUT\r\nConnection: close\r\n\r\n", "[404]"},

		{"an upgrade to HTTP/2", "PUT " + target + " HTTP/1.1\r\n" + head + "Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", "[200]"},
		{"a folded header", "PUT " + target + " HTTP/1.1\r\n" + head + "X-A: b\r\n X-Forwarded-For: 10.0.0.1\r\nConnection: close\r\n\r\n", "[200]"}, // it is the value of X-A (RFC 9112 section 5.2)
		{"a space before the colon", "PUT " + target + " HTTP/1.1\r\n" + head + "X-Forwarded-For : 10.0.0.1\r\nConnection: close\r\n\r\n", "[400]"},
		{"forwarding in lower case", "PUT " + target + " HTTP/1.1\r\n" + head + "x-forwarded-for: 10.0.0.1\r\nConnection: close\r\n\r\n", "[403]"},
		{"forwarding without a value", "PUT " + target + " HTTP/1.1\r\n" + head + "via:\r\nConnection: close\r\n\r\n", "[403]"},
		{"forwarding in a trailer", "PUT " + target + " HTTP/1.1\r\n" + head + "Connection: close\r\nTrailer: X-Forwarded-For\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Forwarded-For: 10.0.0.1\r\n\r\n", "[200]"},

		{"a large body", fmt.Sprintf("PUT %s HTTP/1.1\r\n%sContent-Length: %d\r\nConnection: close\r\n\r\n{%s}", target, head, len(big)+2, big), "[400]"},
		{"a large chunked body", fmt.Sprintf("PUT %s HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", target, head, len(big), big), "[400]"},
		{"a large header", "PUT " + target + " HTTP/1.1\r\n" + head + "X-A: " + strings.Repeat("x", 40<<10) + "\r\nConnection: close\r\n\r\n", "[431]"},
		{"a body that ends early", "PUT " + target + " HTTP/1.1\r\n" + head + "Content-Length: 100\r\nConnection: close\r\n\r\n{}", "[400]"},
	} {
		statuses, bodies := raw(t, addr, c.text)
		if fmt.Sprint(statuses) != c.want {
			t.Errorf("%s: statuses %v, want %s: %s", c.name, statuses, c.want, bodies)
		}
		if strings.Contains(bodies, "access_token") != (c.want == "[200]") {
			t.Errorf("%s: %s", c.name, bodies)
		}
	}
}

// Two readers that disagree on where a request ends are how one request hides in
// another. Here the ambiguous ones are refused and the connection ends.
func TestAmbiguousLengthsAreRefused(t *testing.T) {
	s := start(t)
	addr := s.listen(s.instance.ID, nil)
	const hidden = "PUT /identity/v1/token?version=2022-03-31 HTTP/1.1\r\nHost: 169.254.169.254\r\nMetadata-Flavor: ibm\r\n\r\n"
	for name, headers := range map[string]string{
		"two lengths":                      "Content-Length: 0\r\nContent-Length: 5\r\n",
		"a length list":                    "Content-Length: 0, 5\r\n",
		"a signed length":                  "Content-Length: +0\r\n",
		"a hexadecimal length":             "Content-Length: 0x0\r\n",
		"two codings":                      "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
		"an unknown coding":                "Transfer-Encoding: xchunked\r\n",
		"a coding with a vertical tab":     "Transfer-Encoding: \x0bchunked\r\n",
		"a bare carriage return in a name": "Transfer-Encoding\r: chunked\r\n",
	} {
		statuses, bodies := raw(t, addr, "GET /metadata/v1/instance?version=2022-03-31 HTTP/1.1\r\nHost: 169.254.169.254\r\n"+headers+"\r\n"+hidden)
		if len(statuses) != 1 || statuses[0] < 400 || strings.Contains(bodies, "access_token") {
			t.Errorf("%s: statuses %v: %s", name, statuses, bodies)
		}
	}
	// Chunked beats a length (RFC 9112 section 6.3), and the connection ends.
	statuses, bodies := raw(t, addr, "GET /metadata/v1/instance?version=2022-03-31 HTTP/1.1\r\nHost: 169.254.169.254\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"+hidden)
	if len(statuses) > 2 || statuses[0] != 401 && statuses[0] != 400 {
		t.Errorf("a length beside chunks: statuses %v: %s", statuses, bodies)
	}
}

func TestPathsCannotBeDisguised(t *testing.T) {
	s := start(t)
	addr := s.listen(s.instance.ID, nil)
	bearer := s.identityToken()
	for _, path := range []string{
		"/metadata/v1//instance", "//metadata/v1/instance", "/metadata/v1/./instance", "/metadata/v1/x/../instance", "/./metadata/v1/instance",
		"/metadata/v1/%2e/instance", "/metadata/v1/x/%2e%2e/instance", "/metadata/v1%2finstance", "/metadata%2Fv1/instance",
		"/metadata/v1/instance/", "/metadata/v1/instance;x=1", "/metadata/v1/instance%00", "/metadata/v1/instance%20", "/metadata/v1/INSTANCE",
		`/metadata\v1\instance`, "/metadata/v1/instance/..%2f..%2fkeys", "/metadata/v1/keys/%2e%2e", "/metadata/v1/keys/..;/instance",
		"/v1/../metadata/v1/instance",
	} {
		statuses, bodies := raw(t, addr, "GET "+path+"?version=2022-03-31 HTTP/1.1\r\nHost: 169.254.169.254\r\nAuthorization: Bearer "+bearer+"\r\nConnection: close\r\n\r\n")
		if fmt.Sprint(statuses) != "[404]" && fmt.Sprint(statuses) != "[400]" {
			t.Errorf("%s: statuses %v: %s", path, statuses, bodies)
		}
		if strings.Contains(bodies, s.instance.CRN) {
			t.Errorf("%s shows the instance", path)
		}
	}
}

// mint signs claims as the host would, spoilt by whoever attacks.
func (s *stack) mint(spoil func(*attest.IdentityClaims)) string {
	s.T.Helper()
	c := s.identityClaims()
	spoil(&c)
	raw, err := s.host.Sign(c, "")
	if err != nil {
		s.T.Fatal(err)
	}
	return raw
}

func TestForgedIdentityTokensAreWorthNothing(t *testing.T) {
	s := start(t)
	good := s.identityToken()
	parts := strings.Split(good, ".")
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	kid := header(t, good)["kid"].(string)
	public, ok := s.host.Public(kid)
	if !ok {
		t.Fatal("the host does not know its key")
	}
	attacker := jwttest.Key(t, public.(*ecdsa.PublicKey).Curve)
	forged := map[string]string{
		"alg none":                  jwttest.Sign(t, `{"alg":"none","kid":`+jwttest.Quote(kid)+`}`, string(payload), nil, 256),
		"alg None":                  jwttest.Sign(t, `{"alg":"None","kid":`+jwttest.Quote(kid)+`}`, string(payload), nil, 256),
		"no signature":              parts[0] + "." + parts[1] + ".",
		"an attacker's signature":   jwttest.ES256(t, attacker, kid, string(payload), ""),
		"another's claims":          parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(string(payload), s.instance.ID, "0737_other", 2))) + "." + parts[2],
		"two tokens":                good + "." + good,
		"JSON serialization":        `{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`,
		"claims that stand twice":   s.twice(payload),
		"expired":                   s.mint(func(c *attest.IdentityClaims) { c.IssuedAt -= 301; c.Expires = c.IssuedAt + 300 }),
		"from before the beginning": s.mint(func(c *attest.IdentityClaims) { c.IssuedAt = -1 << 62 }),
	}
	for name, more := range jwttest.Headers(t, attacker, kid) {
		forged["header "+name] = jwttest.ES256(t, attacker, kid, string(payload), more)
	}
	for name, secret := range jwttest.SecretsOf(t, public, kid) {
		forged["HMAC with the public key as "+name] = jwttest.Sign(t, `{"alg":"HS256","kid":`+jwttest.Quote(kid)+`}`, string(payload), secret, 256)
	}
	for name, raw := range forged {
		t.Run(name, func(t *testing.T) {
			for _, a := range []*answer{
				s.iam(raw, ""), s.ask(ask{path: "/metadata/v1/instance?" + version, bearer: raw}), s.certificate(raw, `{"csr":"x"}`),
			} {
				a.t = t
				a.wantError(401, "unauthenticated", "")
			}
		})
	}
	s.ask(ask{path: "/metadata/v1/instance?" + version, bearer: good}).want(200)
}

// twice is a token of the host, which would never make it, that names two
// instances.
func (s *stack) twice(payload []byte) string {
	s.T.Helper()
	doubled := strings.TrimSuffix(string(payload), "}") + `,"iaas":{"instanceID":"0737_other"}}`
	raw, err := s.host.Sign(json.RawMessage(doubled), "")
	if err != nil {
		s.T.Fatal(err)
	}
	return raw
}

func TestATokenOfOneInstanceIsNothingToAnother(t *testing.T) {
	s := start(t)
	neighbour := s.newInstance("neighbour", "local", 5)
	elsewhere := s.newInstance("elsewhere", "stranger", 6)
	stranger := s.newHost("stranger", jose.ES256, "VSI-CR_us-south_stranger_")
	s.update(func(tx *directory.Tx) {
		s.d.Instances.Put(tx, neighbour)
		s.d.Instances.Put(tx, elsewhere)
		s.d.Links.Put(tx, s.newLink(s.profile, neighbour.CRN, false))
	})
	about := func(i *vpc.Instance) func(c *attest.IdentityClaims) {
		return func(c *attest.IdentityClaims) { c.IaaS.InstanceID, c.IaaS.CRN = i.ID, i.CRN }
	}
	foreign := s.identityClaims()
	byStranger, err := stranger.Sign(foreign, "")
	if err != nil {
		t.Fatal(err)
	}
	about(elsewhere)(&foreign)
	ofStranger, err := stranger.Sign(foreign, "")
	if err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string]string{
		"of a neighbour":               s.mint(about(neighbour)),
		"of another host's instance":   s.mint(about(elsewhere)),
		"by another host":              byStranger,
		"by and of another host":       ofStranger,
		"with a neighbour's CRN":       s.mint(func(c *attest.IdentityClaims) { c.IaaS.CRN = neighbour.CRN }),
		"with a neighbour's id":        s.mint(func(c *attest.IdentityClaims) { c.IaaS.InstanceID = neighbour.ID }),
		"of an instance nobody has":    s.mint(func(c *attest.IdentityClaims) { c.IaaS.InstanceID = "0737_none" }),
		"of an instance without an id": s.mint(func(c *attest.IdentityClaims) { c.IaaS.InstanceID = "" }),
	} {
		t.Run(name, func(t *testing.T) {
			s.wire(s.Config.Journal) // which has counted no refusals yet
			for action, a := range map[string]*answer{
				"is.metadata.computeresource-token.request": s.iam(raw, ""),
				"is.metadata.instance.read":                 s.ask(ask{path: "/metadata/v1/instance?" + version, bearer: raw}),
				"is.metadata.instance.initialization":       s.ask(ask{path: "/metadata/v1/instance/initialization?" + version, bearer: raw}),
				"is.metadata.certificate.create":            s.certificate(raw, s.csr()),
			} {
				a.t = t
				a.wantError(401, "unauthenticated", "")
				e := s.event(action)
				if _, ok := e.Trace.Failed(); !ok || e.Reason.Code != 401 || e.CorrelationID != a.header.Get("Transaction-Id") {
					t.Errorf("%s: the refusal is not explained: %+v", action, e)
				}
			}
		})
	}
}

func TestTheSecondOfTwoValuesIsNeverTheOneThatCounts(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	token := newBase + "/token?" + version
	for _, body := range []string{
		`{"expires_in":5,"expires_in":3600}`, `{"nonce":"a","nonce":"a"}`, `{"nonce":"a","n\u006fnce":"b"}`,
	} {
		s.ask(ask{method: put, path: token, header: flavor, body: body}).want(400)
	}
	s.ask(ask{method: put, path: token, header: flavor, body: `{"EXPIRES_IN":5}`}).wantError(400, "unknown_field", "field EXPIRES_IN")
	s.iam(bearer, `{"trusted_profile":{"id":"Profile-x"},"trusted_profile":{"id":"Profile-y"}}`).wantError(400, "invalid_value", "field trusted_profile")
	s.iam(bearer, `{"trusted_profile":{"id":"Profile-x","id":"Profile-y"}}`).wantError(400, "invalid_value", "field trusted_profile.id")
	s.iam(bearer, `{"Trusted_Profile":{"id":"Profile-x"}}`).wantError(400, "unknown_field", "field Trusted_Profile")
	s.ask(ask{method: put, path: token + "&version=2021-01-01", header: flavor}).wantError(400, "invalid_value", "parameter version")
	s.ask(ask{method: put, path: token, header: http.Header{"Metadata-Flavor": {"ibm", "ibm"}}}).wantError(400, "invalid_value", "header Metadata-Flavor")
	s.ask(ask{path: "/metadata/v1/instance?" + version, header: http.Header{"Authorization": {"Bearer " + bearer, "Bearer " + bearer}}}).
		wantError(401, "unauthenticated", "header Authorization")
}

func TestDeepAndOddJSONIsRefused(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	deep := strings.Repeat("[", 4000) + strings.Repeat("]", 4000)
	objects := strings.Repeat(`{"a":`, 1000) + "1" + strings.Repeat("}", 1000)
	for _, body := range []string{
		deep, objects, `{"nonce":` + deep + `}`, `{"trusted_profile":` + objects + `}`, strings.Repeat("{", 8000), `{"nonce":1e999999999}`,
		"\xff\xfe{}", "\ufeff{}", `{"expires_in":600.5}`, `{"expires_in":"600"}`, `{"expires_in":18446744073709551617}`, `{"expires_in":-5}`,
	} {
		for _, a := range []*answer{
			s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor, body: body}), s.iam(bearer, body), s.certificate(bearer, body),
		} {
			if a.status != 400 || len(a.raw) > 4<<10 {
				t.Errorf("%.40q: status %d, %d bytes: %.200s", body, a.status, len(a.raw), a.raw)
			}
		}
	}
}

func TestAnHTTPSInstanceIsServedUnderItsNameWithTheHostsCertificate(t *testing.T) {
	s := start(t)
	s.change(func(i *vpc.Instance) { i.Metadata.Protocol = "https" })
	plain := s.listen(s.instance.ID, nil)
	secure := s.listen(s.instance.ID, s.hostCA.TLSConfig())
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(s.hostCA.RootPEM()))
	client := func(addr string) *http.Client {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
		tr.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, addr)
		}
		t.Cleanup(tr.CloseIdleConnections)
		return &http.Client{Transport: tr}
	}
	ask := func(addr, base string) (int, error) {
		r, err := http.NewRequestWithContext(t.Context(), put, base+newBase+"/token?"+version, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header = flavor.Clone()
		resp, err := client(addr).Do(r)
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		if resp.ProtoMajor != 1 {
			t.Errorf("%s: over %s", base, resp.Proto)
		}
		return resp.StatusCode, nil
	}
	if status, err := ask(secure, "https://"+authority.ServerName); err != nil || status != 200 {
		t.Errorf("https: status %d, %v", status, err)
	}
	if status, err := ask(secure, "https://169.254.169.254"); err == nil {
		t.Errorf("the certificate counts for the address: status %d", status)
	}
	if status, err := ask(plain, "http://169.254.169.254"); err != nil || status != 403 {
		t.Errorf("http: status %d, %v", status, err)
	}
	check(t, s.event("is.metadata.jwt-token.create"), "metadata-service")
	s.change(func(i *vpc.Instance) { i.Metadata.Protocol = "http" })
	if status, err := ask(secure, "https://"+authority.ServerName); err != nil || status != 403 {
		t.Errorf("https after the change to http: status %d, %v", status, err)
	}
	if status, err := ask(plain, "http://169.254.169.254"); err != nil || status != 200 {
		t.Errorf("http after the change to http: status %d, %v", status, err)
	}
}
