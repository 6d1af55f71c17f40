// Package metadata is the instance metadata and identity service that an
// instance reaches at 169.254.169.254
// (reference/instance-metadata-and-vpc.md sections 1 and 2). A handler is made
// for one instance and knows it from its maker: nothing that a request carries
// ever chooses an identity.
package metadata

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/vpc"
)

// IAM exchanges an identity token for an access token.
type IAM interface {
	Instance(ctx context.Context, o grant.Origin, r grant.InstanceRequest) (grant.Answer, error)
}

// Signer signs identity tokens with the host's key.
type Signer interface {
	Sign(claims any, typ string) (string, error)
}

// Recorder makes events durable.
type Recorder interface {
	Record(ctx context.Context, events ...*activity.Event) error
}

// Config are the service's collaborators.
type Config struct {
	Directory *directory.Directory
	IAM       IAM
	Tokens    *attest.Instances // checks identity tokens that come back
	Signer    Signer
	Journal   Recorder
	Names     crn.Names
	Region    string
	Now       func() time.Time
	Log       *slog.Logger
}

// Service makes the handlers of instances.
type Service struct{ cfg Config }

// New returns the service.
func New(cfg Config) *Service { return &Service{cfg} }

var errNoResource = fault.New(fault.NotFound, "not_found", "There is no such resource here.")

// maxBody bounds a request's body, in bytes.
const maxBody = 8 << 10

// Handler returns the handler of one instance.
func (s *Service) Handler(instanceID string) http.Handler {
	h := &handler{Service: s, id: instanceID}
	mux := http.NewServeMux()
	for _, gen := range []struct {
		prefix, iam string
		old         bool
	}{{"/instance_identity/v1", "/iam_token", true}, {"/identity/v1", "/iam_tokens", false}} {
		mux.HandleFunc("PUT "+gen.prefix+"/token", h.route(gen.old, h.identityToken))
		mux.HandleFunc("POST "+gen.prefix+gen.iam, h.route(gen.old, h.iamToken))
	}
	h.metadataRoutes(mux)
	mux.HandleFunc("/", h.route(false, func(*request) (any, error) {
		return nil, errNoResource
	}))
	return api.WithTransaction(guard(mux))
}

// hosts are the names under which the service is asked. A browser that was
// tricked into asking sends another.
var hosts = map[string]bool{"169.254.169.254": true, "api.metadata.cloud.ibm.com": true, "127.0.0.1": true, "localhost": true}

// forwarding are headers that a proxy adds. A request that came through one
// may be anybody's (reference section 6.2).
var forwarding = []string{"X-Forwarded-For", "X-Forwarded-Host", "Forwarded", "Via", "X-Real-Ip"}

// guard refuses requests that did not come straight from a program inside the
// instance.
func guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		var f *fault.Error
		switch {
		case !hosts[strings.ToLower(host)]:
			f = fault.New(fault.Denied, "unauthorized", "This service answers under its own address and name only.").OnHeader("Host")
		case r.URL.Host != "":
			f = fault.New(fault.Invalid, "invalid_request", "This service is not a proxy.")
		case path.Clean(r.URL.Path) != r.URL.Path:
			// The router would answer with a redirect; nothing here redirects.
			f = errNoResource
		}
		for _, name := range forwarding {
			if f == nil && r.Header.Values(name) != nil {
				f = fault.New(fault.Denied, "unauthorized", "This service does not answer forwarded requests.").OnHeader(name)
			}
		}
		if f != nil {
			writeFault(w, r, f)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		next.ServeHTTP(w, r)
	})
}

type handler struct {
	*Service
	id string
}

// request is one request under way.
type request struct {
	*http.Request
	instance *vpc.Instance
}

// route checks what all routes share: the version, and that the instance runs
// with its metadata service on.
func (h *handler) route(old bool, f func(*request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := h.serve(&request{Request: r}, old, f)
		if err != nil {
			f := fault.Of(err)
			if f.Kind == fault.Internal || f.Kind == fault.Unavailable {
				h.cfg.Log.Error("metadata request failed", "instance", h.id, "path", r.URL.Path,
					"transaction", api.TransactionID(r.Context()), "error", f)
			}
			writeFault(w, r, f)
			return
		}
		writeJSON(w, http.StatusOK, body)
	}
}

func (h *handler) serve(r *request, old bool, f func(*request) (any, error)) (any, error) {
	if err := h.checkVersion(r, old); err != nil {
		return nil, err
	}
	inst, ok := h.cfg.Directory.Instances.Get(h.id)
	if !ok || !inst.Metadata.Enabled {
		return nil, fault.New(fault.Denied, "unauthorized", "The metadata service is not enabled on this instance.")
	}
	if inst.Status != vpc.Running {
		e := fault.New(fault.Unavailable, "service_error", "The instance is %s; try again when it is running.", inst.Status)
		e.RetryAfter = time.Second
		return nil, e
	}
	r.instance = inst
	return f(r)
}

const (
	oldPathsEnd   = "2025-08-26" // the first version at which the old paths are gone
	oldestVersion = "2021-01-01"
)

// checkVersion applies the rules of reference section 1.2: required, well
// formed, and not in the future beyond a day of clock skew.
func (h *handler) checkVersion(r *request, old bool) error {
	v := r.URL.Query().Get("version")
	if v == "" {
		return fault.New(fault.Invalid, "missing_value", "The query parameter version is required, as YYYY-MM-DD.").OnParameter("version", "")
	}
	day, err := time.Parse(time.DateOnly, v)
	if err != nil || v < oldestVersion || day.After(h.cfg.Now().UTC().Add(24*time.Hour)) {
		return fault.New(fault.Invalid, "invalid_value", "The query parameter version must be a date from %s to today, as YYYY-MM-DD.", oldestVersion).OnParameter("version", v)
	}
	if old && v >= oldPathsEnd {
		return fault.New(fault.NotFound, "not_found", "From version %s on, the path is /identity/v1/….", oldPathsEnd)
	}
	return nil
}

// tokenAnswer is the answer of both token calls; clients dereference all four
// fields.
type tokenAnswer struct {
	AccessToken string `json:"access_token"`
	CreatedAt   string `json:"created_at"`
	ExpiresAt   string `json:"expires_at"`
	ExpiresIn   int64  `json:"expires_in"`
	Nonce       string `json:"nonce,omitempty"`
}

// Bounds on an identity token (reference section 1.4).
const (
	minLife     = 5
	maxLife     = 3600
	defaultLife = 300
	maxNonce    = 512 // bytes; our choice
)

// identityToken answers PUT …/token.
func (h *handler) identityToken(r *request) (any, error) {
	e := h.event(r, "is.metadata.jwt-token.create", "create identity token for")
	answer, err := h.makeIdentityToken(r, e)
	if err != nil {
		return nil, h.recordFailure(r, e, err)
	}
	e.SetReason(http.StatusOK, "")
	if err := h.cfg.Journal.Record(r.Context(), e); err != nil {
		return nil, err
	}
	return answer, nil
}

func (h *handler) makeIdentityToken(r *request, e *activity.Event) (*tokenAnswer, error) {
	switch flavor := r.Header.Get("Metadata-Flavor"); flavor {
	case "ibm":
		e.Trace.Pass("metadata-flavor", "ibm", flavor)
	case "":
		e.Trace.Fail("metadata-flavor", "ibm", "(absent)", "send the header Metadata-Flavor: ibm")
		return nil, fault.New(fault.Invalid, "missing_value", "The header Metadata-Flavor: ibm is required.").OnHeader("Metadata-Flavor")
	default:
		e.Trace.Fail("metadata-flavor", "ibm", flavor, "send the header Metadata-Flavor: ibm")
		return nil, fault.New(fault.Invalid, "invalid_value", "The header Metadata-Flavor must be ibm.").OnHeader("Metadata-Flavor")
	}
	var body struct {
		ExpiresIn *int64 `json:"expires_in"`
		Nonce     string `json:"nonce"`
	}
	if err := decode(r.Body, &body); err != nil {
		e.Trace.Fail("request-body", "a JSON object with expires_in and nonce", err.Error(), "")
		return nil, err
	}
	life := int64(defaultLife)
	if body.ExpiresIn != nil {
		life = *body.ExpiresIn
	}
	if life < minLife || life > maxLife {
		e.Trace.Fail("request-body", "expires_in from 5 to 3600", strconv.FormatInt(life, 10), "")
		return nil, fault.New(fault.Invalid, "invalid_value", "The property expires_in must be between %d and %d.", minLife, maxLife).
			At("field", "expires_in", strconv.FormatInt(life, 10))
	}
	if len(body.Nonce) > maxNonce {
		e.Trace.Fail("request-body", fmt.Sprintf("nonce of at most %d bytes", maxNonce), fmt.Sprintf("%d bytes", len(body.Nonce)), "")
		return nil, fault.New(fault.Invalid, "invalid_value", "The property nonce must have at most %d bytes.", maxNonce).On("nonce")
	}
	e.Trace.Pass("request-body", "expires_in from 5 to 3600", strconv.FormatInt(life, 10))

	now := h.cfg.Now().UTC().Truncate(time.Second)
	claims := h.claims(r.instance, now, life)
	claims.Nonce = body.Nonce
	raw, err := h.cfg.Signer.Sign(wireClaims{claims, claims.Audience}, "")
	if err != nil {
		return nil, fmt.Errorf("sign the identity token: %w", err)
	}
	e.ResponseData = json.RawMessage(fmt.Sprintf(`{"jti":%q,"expires_in":%d}`, claims.JTI, life))
	return &tokenAnswer{
		AccessToken: raw, CreatedAt: stamp(now), ExpiresAt: stamp(now.Add(time.Duration(life) * time.Second)),
		ExpiresIn: life, Nonce: body.Nonce,
	}, nil
}

// wireClaims writes aud as an array even when it has one element, as section
// 1.5 shows it.
type wireClaims struct {
	attest.IdentityClaims
	Audience []string `json:"aud"`
}

// claims describes the instance as it is now; only the signature makes them
// evidence.
func (h *handler) claims(i *vpc.Instance, now time.Time, life int64) attest.IdentityClaims {
	issuer := attest.IdentityIssuer(h.cfg.Region)
	c := attest.IdentityClaims{
		Issuer: issuer, Audience: []string{issuer},
		IssuedAt: now.Unix(), Expires: now.Unix() + life, JTI: uuid.NewString(),
		IaaS: attest.IaaS{
			CRN: i.CRN, AccountID: i.AccountID, InstanceID: i.ID, Zone: i.Zone, Region: h.cfg.Region,
			Profile: i.Profile, ResourceGroup: i.ResourceGroupID,
		},
		Addresses: []attest.Address{}, Subnets: []attest.Named{}, VPC: h.vpcRef(i),
	}
	for _, f := range h.cfg.Directory.FloatingIPsByInstance.Get(i.ID) {
		c.Addresses = append(c.Addresses, attest.Address{Address: f.Address.String()})
	}
	for _, nic := range i.Interfaces {
		c.Addresses = append(c.Addresses, attest.Address{Address: nic.Address.String()})
		c.Subnets = append(c.Subnets, h.subnetRef(i, nic.SubnetID))
	}
	return c
}

// iamToken answers POST …/iam_token(s).
func (h *handler) iamToken(r *request) (any, error) {
	e := h.event(r, "is.metadata.computeresource-token.request", "request IAM token for")
	raw, err := bearer(r.Request)
	if err != nil {
		e.Trace.Fail("bearer", "Authorization: Bearer TOKEN", "(absent)", "send the identity token")
		return nil, h.recordFailure(r, e, err)
	}
	profile, err := h.selector(r)
	if err != nil {
		e.Trace.Fail("trusted-profile", "one profile, or a default one", "(none)", err.Error())
		return nil, h.recordFailure(r, e, err)
	}
	answer, err := h.cfg.IAM.Instance(r.Context(), h.origin(r), grant.InstanceRequest{
		Token: raw, Instance: h.id, Profile: profile, With: e,
	})
	if err != nil {
		return nil, translate(fault.Of(err), profile)
	}
	created := time.Unix(answer.Claims.IssuedAt, 0).UTC()
	expires := time.Unix(answer.Claims.Expires, 0).UTC()
	return &tokenAnswer{
		AccessToken: answer.AccessToken, CreatedAt: stamp(created), ExpiresAt: stamp(expires),
		ExpiresIn: answer.Claims.Expires - answer.Claims.IssuedAt,
	}, nil
}

// selector reads which profile is wanted: the one in the body, else the
// instance's default one (reference section 1.6).
func (h *handler) selector(r *request) (grant.Selector, error) {
	var body struct {
		Profile *struct {
			ID   string `json:"id"`
			CRN  string `json:"crn"`
			Name string `json:"name"`
		} `json:"trusted_profile"`
	}
	if err := decode(r.Body, &body); err != nil {
		return grant.Selector{}, err
	}
	if p := body.Profile; p != nil {
		s := grant.Selector{ID: p.ID, CRN: p.CRN, Name: p.Name}
		given := 0
		for _, v := range []string{p.ID, p.CRN, p.Name} {
			if v != "" {
				given++
			}
		}
		switch given {
		case 1:
			return s, nil
		case 0:
			return s, fault.New(fault.Invalid, "missing_field", "The property trusted_profile needs one of id, crn and name.").On("trusted_profile.id")
		}
		return s, fault.New(fault.Invalid, "invalid_value", "Give only one of the profile's id, crn and name.").On("trusted_profile")
	}
	if d := r.instance.DefaultProfile; d != nil {
		return grant.Selector{ID: d.ID}, nil
	}
	return grant.Selector{}, fault.New(fault.Invalid, "missing_field",
		"The body names no trusted profile and the instance has no default one.").On("trusted_profile.id")
}

// translate turns IAM's refusal into this service's error.
func translate(f *fault.Error, wanted grant.Selector) *fault.Error {
	field := "trusted_profile.id"
	if wanted.Name != "" {
		field = "trusted_profile.name"
	} else if wanted.CRN != "" {
		field = "trusted_profile.crn"
	}
	switch {
	case f.Code == grant.CodeNotEligible:
		return fault.New(fault.Invalid, "profile_not_linked", "No link or rule of the trusted profile covers this instance.").
			On(field).Because(f)
	case f.Code == grant.CodeNotFound:
		return fault.New(fault.Invalid, "not_found", "The trusted profile with %s was not found.", wanted).On(field).Because(f)
	case f.Kind == fault.Unauthenticated:
		return fault.New(fault.Unauthenticated, "unauthenticated", "The identity token is expired, malformed or not valid for this instance.").Because(f)
	}
	return f
}

// bearer returns the identity token of a request.
func bearer(r *http.Request) (string, error) {
	scheme, raw, ok := strings.Cut(strings.TrimSpace(r.Header.Get("Authorization")), " ")
	if raw = strings.TrimSpace(raw); !ok || !strings.EqualFold(scheme, "Bearer") || raw == "" {
		return "", fault.New(fault.Unauthenticated, "unauthenticated", "Send the identity token as Authorization: Bearer TOKEN.").OnHeader("Authorization")
	}
	return raw, nil
}

// authenticated lets a metadata route run only for this instance's own
// identity token.
func (h *handler) authenticated(f func(*request) (any, error)) func(*request) (any, error) {
	return func(r *request) (any, error) {
		raw, err := bearer(r.Request)
		if err != nil {
			return nil, err
		}
		_, claims, err := h.cfg.Tokens.Verify(raw)
		if err != nil || claims.IaaS.InstanceID != h.id {
			return nil, fault.New(fault.Unauthenticated, "unauthenticated", "The identity token is expired, malformed or not valid for this instance.").Because(err)
		}
		return f(r)
	}
}

func (h *handler) origin(r *request) grant.Origin {
	p := api.PeerHost(r.Request)
	return grant.Origin{
		TransactionID: api.TransactionID(r.Context()), Address: p.Address, Agent: p.Agent,
		ClientID: grant.DefaultClient,
	}
}

// event begins an event whose initiator and target are the instance.
func (h *handler) event(r *request, action, what string) *activity.Event {
	i := r.instance
	return &activity.Event{
		ID: uuid.NewString(), Time: activity.Time{Time: h.cfg.Now()}, Action: action, Severity: activity.Normal,
		Message:       "Virtual Server for VPC: " + what + " " + i.Name,
		CorrelationID: api.TransactionID(r.Context()), AccountID: i.AccountID, LogSourceCRN: i.CRN,
		Initiator: activity.Initiator{
			ID: crn.IAMIDOfCRN(i.CRN), Name: i.Name, TypeURI: activity.ComputeType,
			AuthnID: crn.IAMIDOfCRN(i.CRN), AuthnName: i.Name,
			Credential: activity.Credential{Type: "compute-resource"}, Host: api.PeerHost(r.Request),
		},
		Target:   activity.Target{ID: i.CRN, Name: i.Name, TypeURI: "is.instance/instance"},
		Observer: activity.Observer{Name: "ActivityTracker"},
	}
}

func (h *handler) recordFailure(r *request, e *activity.Event, err error) error {
	f := fault.Of(err)
	e.SetReason(grant.StatusOf(f.Kind), f.Message)
	e.Message += " -failure"
	if err := h.cfg.Journal.Record(r.Context(), e); err != nil {
		return err
	}
	return f
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

// decode reads an optional JSON object, whatever its content type: curl labels
// JSON as a form.
func decode(body io.Reader, into any) error {
	b, err := io.ReadAll(body)
	if err != nil {
		return fault.New(fault.Invalid, "invalid_request", "The body is larger than %d bytes or could not be read.", maxBody)
	}
	if len(bytes.TrimSpace(b)) == 0 {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	err = dec.Decode(into)
	if err == nil {
		if _, err := dec.Token(); !errors.Is(err, io.EOF) {
			return fault.New(fault.Invalid, "invalid_request", "The body must be one JSON object.")
		}
		return nil
	}
	var wrongType *json.UnmarshalTypeError
	if errors.As(err, &wrongType) && wrongType.Field != "" {
		return fault.New(fault.Invalid, "invalid_value", "The property %s has the wrong type.", wrongType.Field).On(wrongType.Field)
	}
	if name, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
		name = strings.Trim(name, `"`)
		return fault.New(fault.Invalid, "unknown_field", "The property %s is not known.", name).On(name)
	}
	return fault.New(fault.Invalid, "invalid_request", "The body is not a JSON object.")
}

// wireError is the service's error body (reference section 1.10).
type wireError struct {
	Errors     []wireErrorItem `json:"errors"`
	StatusCode int             `json:"status_code"`
	Trace      string          `json:"trace"`
}

type wireErrorItem struct {
	Code    string      `json:"code"`
	Message string      `json:"message"`
	Target  *wireTarget `json:"target,omitempty"`
}

type wireTarget struct {
	Name  string `json:"name"`
	Type  string `json:"type"`
	Value string `json:"value,omitempty"`
}

func writeFault(w http.ResponseWriter, r *http.Request, f *fault.Error) {
	if f.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(f.RetryAfter/time.Second)))
	}
	status := grant.StatusOf(f.Kind)
	item := wireErrorItem{Code: f.Code, Message: f.Message}
	if f.Kind == fault.Internal {
		item.Code = "service_error"
	}
	if f.Target.Name != "" {
		item.Target = &wireTarget{Name: f.Target.Name, Type: f.Target.Type, Value: f.Target.Value}
	}
	writeJSON(w, status, wireError{Errors: []wireErrorItem{item}, StatusCode: status, Trace: api.TransactionID(r.Context())})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	// The client may be gone; there is nobody left to tell.
	_, _ = w.Write(append(b, '\n'))
}
