package metadata_test

import (
	"context"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/jwt/jwttest"
)

// csr is a good certificate request, as the body of a call.
func (s *stack) csr() string { return s.csrWith(&x509.CertificateRequest{}, "") }

// csrWith is the body of a call with what more there is to it: JSON members that
// begin with a comma.
func (s *stack) csrWith(r *x509.CertificateRequest, more string) string {
	s.T.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, r, jwttest.Key(s.T, elliptic.P256()))
	if err != nil {
		s.T.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	return `{"csr":` + jwttest.Quote(string(text)) + more + `}`
}

func (s *stack) certificate(bearer, body string) *answer {
	s.T.Helper()
	return s.ask(ask{method: http.MethodPost, path: newBase + "/certificates?" + version, bearer: bearer, body: body})
}

func TestAnIdentityCertificateIsMadeOfARequest(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	for _, c := range []struct {
		path, more string
		life       float64
	}{
		{newBase + "/certificates?version=2026-01-01", "", 3600},
		{newBase + "/certificates?" + version, `,"expires_in":300`, 300},
		{oldBase + "/certificates?" + version, `,"expires_in":3600`, 3600},
	} {
		body := s.csrWith(&x509.CertificateRequest{Subject: pkix.Name{Organization: []string{"Example"}}}, c.more)
		a := s.ask(ask{method: http.MethodPost, path: c.path, bearer: bearer, body: body})
		m := a.want(200)
		created, err := time.Parse(time.RFC3339, m["created_at"].(string))
		if err != nil {
			t.Fatal(err)
		}
		expires, err := time.Parse(time.RFC3339, m["expires_at"].(string))
		if err != nil {
			t.Fatal(err)
		}
		if m["expires_in"] != c.life || expires.Sub(created).Seconds() != c.life || len(m) != 5 {
			t.Errorf("%s: %v", c.path, m)
		}
		chain := m["certificates"].([]any)
		if len(chain) != 2 {
			t.Fatalf("%d certificates", len(chain))
		}
		block, _ := pem.Decode([]byte(chain[0].(string)))
		leaf, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		if leaf.Subject.CommonName != s.instance.ID || leaf.URIs[0].String() != s.instance.CRN || !leaf.NotAfter.Equal(expires) {
			t.Errorf("certificate of %s, %v", leaf.Subject, leaf.URIs)
		}
		roots, between := x509.NewCertPool(), x509.NewCertPool()
		roots.AppendCertsFromPEM([]byte(s.hostCA.IdentityRootPEM()))
		between.AppendCertsFromPEM([]byte(chain[1].(string)))
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
			t.Error(err)
		}
		e := s.event("is.metadata.certificate.create")
		var data struct{ ID string }
		if err := json.Unmarshal(e.ResponseData, &data); err != nil {
			t.Fatal(err)
		}
		if e.Outcome != activity.Success || data.ID != m["id"] || e.CorrelationID != a.header.Get("Transaction-Id") ||
			e.Initiator.Credential.Type != "instance-identity-token" || e.Target.ID != s.instance.CRN {
			t.Errorf("event %+v", e)
		}
	}
}

func TestACertificateNeedsTheTokenAndAGoodRequest(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	named := s.csrWith(&x509.CertificateRequest{Subject: pkix.Name{CommonName: "0737_other"}}, "")
	for _, c := range []struct{ body, code, target, check string }{
		{"", "missing_field", "field csr", "request-body"},
		{"{}", "missing_field", "field csr", "request-body"},
		{`{"csr":""}`, "missing_field", "field csr", "request-body"},
		{`{"csr":7}`, "invalid_value", "field csr", "request-body"},
		{s.csrWith(&x509.CertificateRequest{}, `,"expires_in":299`), "invalid_value", "field expires_in", "request-body"},
		{s.csrWith(&x509.CertificateRequest{}, `,"expires_in":3601`), "invalid_value", "field expires_in", "request-body"},
		{s.csrWith(&x509.CertificateRequest{}, `,"ca":true`), "unknown_field", "field ca", "request-body"},
		{`{"csr":"` + strings.Repeat("x", 64<<10) + `"}`, "invalid_request", "", "request-body"},
		{`{"csr":"not PEM"}`, "invalid_value", "field csr", "certificate-request"},
		{`{"csr":"` + strings.Repeat("x", 20<<10) + `"}`, "invalid_value", "field csr", "certificate-request"},
		{named, "invalid_value", "field csr", "certificate-request"},
		{s.csrWith(&x509.CertificateRequest{DNSNames: []string{"api.metadata.cloud.ibm.com"}}, ""), "invalid_value", "field csr", "certificate-request"},
	} {
		s.certificate(bearer, c.body).wantError(400, c.code, c.target)
		check(t, s.event("is.metadata.certificate.create"), c.check)
	}
	s.ask(ask{method: http.MethodPost, path: newBase + "/certificates?" + version, body: s.csr()}).wantError(401, "unauthenticated", "header Authorization")
	check(t, s.event("is.metadata.certificate.create"), "bearer")
	s.ask(ask{method: http.MethodPost, path: oldBase + "/certificates?version=2025-08-26", bearer: bearer, body: s.csr()}).wantError(404, "not_found", "")
	s.certificate(bearer, s.csr()).want(200)
}

func TestWithoutADurableRecordNoCertificateLeaves(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	for name, j := range map[string]recorder{"full": full{}, "broken": broken{}} {
		s.wire(j)
		for _, a := range []*answer{
			s.certificate(bearer, s.csr()), s.certificate(bearer, ""), s.certificate("x", s.csr()),
			s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor}),
		} {
			a.wantError(503, "service_unavailable", "")
			if a.header.Get("Retry-After") != "1" || strings.Contains(a.raw, "CERTIFICATE") || strings.Contains(a.raw, "eyJ") || strings.Contains(a.raw, "sda1") {
				t.Errorf("%s: Retry-After %q: %s", name, a.header.Get("Retry-After"), a.raw)
			}
		}
	}
}

// broken is a journal whose error is none of ours.
type broken struct{}

func (broken) Record(context.Context, ...*activity.Event) error {
	return fmt.Errorf("write /dev/sda1: input/output error")
}
