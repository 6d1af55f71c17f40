// Package iamtoken serves the token endpoint and what verifiers of tokens need:
// the key set, the discovery document and introspection
// (reference/iam-identity.md sections 1 and 2). Who gets a token is decided in
// package grant.
package iamtoken

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/token"
)

// Config are the endpoints' collaborators.
type Config struct {
	Grants *grant.Service
	Keys   *token.KeyRing
	Issuer string // the iss of tokens; the endpoints are below it
	Now    func() time.Time
	Log    *slog.Logger
}

// Bounds on the form.
const (
	maxForm   = 64 << 10 // bytes
	maxFields = 32
)

// clients that may authenticate with Basic. They are public: their secret is
// their name, and all it earns is a refresh token.
var clients = map[string]string{"bx": "bx"}

type handler struct{ cfg Config }

// Register adds the routes.
func Register(mux *http.ServeMux, cfg Config) {
	h := &handler{cfg}
	mux.HandleFunc("/identity/token", h.token)
	mux.HandleFunc("POST /identity/introspect", h.introspect)
	mux.HandleFunc("GET /identity/keys", h.keys)
	mux.HandleFunc("GET /identity/.well-known/openid-configuration", h.discovery)
}

// answer is a successful token response.
type answer struct {
	AccessToken  string `json:"access_token"`
	RefreshToken string `json:"refresh_token"`
	TokenType    string `json:"token_type"`
	ExpiresIn    int64  `json:"expires_in"`
	Expiration   int64  `json:"expiration"`
	Scope        string `json:"scope"`
	SessionID    string `json:"session_id,omitempty"`
}

func (h *handler) token(w http.ResponseWriter, r *http.Request) {
	started := h.cfg.Now()
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		h.fail(w, r, started, fault.New(fault.Invalid, "BXNIM0060E", "HTTP 405 Method Not Allowed"), http.StatusMethodNotAllowed)
		return
	}
	origin := originOf(r)
	form, err := h.form(w, r)
	if err != nil {
		h.refuse(w, r, started, h.cfg.Grants.RefuseForm(r.Context(), origin, fault.Of(err)))
		return
	}
	if origin.ClientID, err = client(r); err != nil {
		h.refuse(w, r, started, h.cfg.Grants.RefuseForm(r.Context(), origin, fault.Of(err)))
		return
	}
	a, err := h.dispatch(r, origin, form)
	if err != nil {
		h.refuse(w, r, started, err)
		return
	}
	refresh := a.RefreshToken
	if refresh == "" {
		refresh = "not_supported"
	}
	writeJSON(w, http.StatusOK, answer{
		AccessToken: a.AccessToken, RefreshToken: refresh, TokenType: "Bearer",
		ExpiresIn: a.Claims.Expires - a.Claims.IssuedAt, Expiration: a.Claims.Expires,
		Scope: a.Claims.Scope, SessionID: a.Claims.SessionID,
	})
}

func originOf(r *http.Request) grant.Origin {
	peer := api.PeerHost(r)
	return grant.Origin{
		TransactionID: api.TransactionID(r.Context()),
		Address:       peer.Address, Agent: peer.Agent, ClientID: grant.DefaultClient,
	}
}

func (h *handler) dispatch(r *http.Request, o grant.Origin, f fields) (grant.Answer, error) {
	profile := grant.Selector{ID: f["profile_id"], Name: f["profile_name"], CRN: f["profile_crn"]}
	ctx := r.Context()
	switch f["grant_type"] {
	case grant.TypeAPIKey:
		return h.cfg.Grants.APIKey(ctx, o, f["apikey"], f["scope"])
	case grant.TypeCRToken:
		// SDKs send the token file as it stands, with its final newline.
		return h.cfg.Grants.CRToken(ctx, o, grant.CRTokenRequest{
			Token: strings.TrimSpace(f["cr_token"]), Profile: profile, Scope: f["scope"],
		})
	case grant.TypeAssume:
		return h.cfg.Grants.Assume(ctx, o, grant.AssumeRequest{
			AccessToken: strings.TrimSpace(f["access_token"]), Profile: profile, Account: f["account"],
		})
	case grant.TypeJWTBearer:
		return h.cfg.Grants.Federated(ctx, o, grant.FederatedRequest{
			Assertion: strings.TrimSpace(f["assertion"]), Account: f["account"], Profile: profile, Scope: f["scope"],
		})
	case grant.TypeClientCredentials:
		return h.cfg.Grants.Host(ctx, o, grant.HostRequest{AssertionType: f["client_assertion_type"], Assertion: f["client_assertion"]})
	case grant.TypeRefresh:
		return h.cfg.Grants.Refresh(ctx, o, strings.TrimSpace(f["refresh_token"]))
	case "":
		return grant.Answer{}, h.cfg.Grants.RefuseForm(ctx, o, grant.MissingProperty("grant_type"))
	}
	return grant.Answer{}, h.cfg.Grants.RefuseForm(ctx, o, fault.New(fault.Invalid, grant.CodeMissing, "Property value not supported").
		WithDetail("The grant_type %.100q is not supported.", f["grant_type"]))
}

// fields are the form's, each given once.
type fields map[string]string

func (h *handler) form(w http.ResponseWriter, r *http.Request) (fields, error) {
	if ct := r.Header.Get("Content-Type"); ct != "" {
		if media, _, err := mime.ParseMediaType(ct); err != nil || media != "application/x-www-form-urlencoded" {
			return nil, fault.New(fault.Unsupported, "BXNIM0105E", "Content type not supported").
				WithDetail("Send the form as application/x-www-form-urlencoded.")
		}
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	if err := r.ParseForm(); err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			return nil, fault.New(fault.TooLarge, "BXNIM0106E", "Request too large").WithDetail("The form is larger than %d bytes.", maxForm)
		}
		return nil, fault.New(fault.Invalid, "BXNIM0107E", "Form not readable").WithDetail("The body is not a URL-encoded form.")
	}
	return parse(r.PostForm)
}

// parse refuses a field that stands twice: two readers of one request must not
// see two different profiles. Only the body counts; a secret in a URL would
// stand in every proxy's log.
func parse(form url.Values) (fields, error) {
	if len(form) > maxFields {
		return nil, fault.New(fault.Invalid, "BXNIM0107E", "Form not readable").WithDetail("The form has more than %d fields.", maxFields)
	}
	f := make(fields, len(form))
	for name, values := range form {
		if len(values) > 1 {
			return nil, fault.New(fault.Invalid, "BXNIM0107E", "Form not readable").WithDetail("The field %.100q stands more than once.", name)
		}
		f[name] = values[0]
	}
	return f, nil
}

func client(r *http.Request) (string, error) {
	if r.Header.Get("Authorization") == "" {
		return grant.DefaultClient, nil
	}
	id, secret, ok := r.BasicAuth()
	if !ok || clients[id] == "" || clients[id] != secret {
		return grant.DefaultClient, fault.New(fault.Unauthenticated, grant.CodeClient, "The provided client could not be found.")
	}
	return id, nil
}

// wireError is the token endpoint's error (reference section 1.5).
type wireError struct {
	Code    string      `json:"errorCode"`
	Message string      `json:"errorMessage"`
	Details string      `json:"errorDetails,omitempty"`
	Context wireContext `json:"context"`
}

type wireContext struct {
	RequestID   string `json:"requestId"`
	RequestType string `json:"requestType"`
	UserAgent   string `json:"userAgent"`
	URL         string `json:"url"`
	StartTime   string `json:"startTime"`
	EndTime     string `json:"endTime"`
	Elapsed     string `json:"elapsedTime"` // milliseconds
	Locale      string `json:"locale"`
}

// Refuse answers a request to the token endpoint that no route has seen, in the
// endpoint's shape. Of the configuration it needs Issuer, Now and Log.
func Refuse(w http.ResponseWriter, r *http.Request, cfg Config, f *fault.Error) {
	h := &handler{cfg: cfg}
	h.refuse(w, r, cfg.Now(), f)
}

func (h *handler) refuse(w http.ResponseWriter, r *http.Request, started time.Time, err error) {
	f := fault.Of(err)
	h.fail(w, r, started, f, grant.StatusOf(f.Kind))
}

func (h *handler) fail(w http.ResponseWriter, r *http.Request, started time.Time, f *fault.Error, status int) {
	if status >= http.StatusInternalServerError {
		h.cfg.Log.Error("token request failed", "transaction", api.TransactionID(r.Context()), "status", status, "error", f)
	}
	if f.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(f.RetryAfter/time.Second)))
	}
	code := f.Code
	if !strings.HasPrefix(code, "BXNIM") {
		code = "BXNIM0500E"
		if f.Kind == fault.Unavailable {
			code = grant.CodeUnavailable
		}
	}
	end := h.cfg.Now()
	writeJSON(w, status, wireError{
		Code: code, Message: f.Message, Details: f.Detail,
		Context: wireContext{
			RequestID: api.TransactionID(r.Context()), RequestType: "incoming.Identity_Token",
			UserAgent: api.PeerHost(r).Agent, URL: h.cfg.Issuer + "/token",
			StartTime: wireTime(started), EndTime: wireTime(end),
			Elapsed: strconv.FormatInt(end.Sub(started).Milliseconds(), 10), Locale: "en_US",
		},
	})
}

// wireTime formats with a colon before the milliseconds, which Go's layouts do
// not know.
func wireTime(t time.Time) string {
	t = t.UTC()
	return fmt.Sprintf("%s:%03d UTC", t.Format("02.01.2006 15:04:05"), t.Nanosecond()/int(time.Millisecond))
}

func (h *handler) keys(w http.ResponseWriter, _ *http.Request) {
	set := h.cfg.Keys.JWKS()
	w.Header().Set("Cache-Control", "public, max-age=300")
	w.Header().Del("Pragma")
	writeJSON(w, http.StatusOK, set)
}

func (h *handler) discovery(w http.ResponseWriter, _ *http.Request) {
	base := h.cfg.Issuer
	writeJSON(w, http.StatusOK, map[string]any{
		"issuer":                                base,
		"token_endpoint":                        base + "/token",
		"introspection_endpoint":                base + "/introspect",
		"jwks_uri":                              base + "/keys",
		"response_types_supported":              []string{"token"},
		"grant_types_supported":                 []string{grant.TypeAPIKey, grant.TypeCRToken, grant.TypeAssume, grant.TypeJWTBearer, grant.TypeClientCredentials, grant.TypeRefresh},
		"subject_types_supported":               []string{"public"},
		"token_endpoint_auth_methods_supported": []string{"client_secret_basic", "private_key_jwt", "none"},
		"id_token_signing_alg_values_supported": []jose.SignatureAlgorithm{jose.ES256, jose.RS256},
		"scopes_supported":                      []string{"ibm", "openid"},
		"claims_supported": []string{
			"iss", "exp", "iat", "sub", "jti", "iam_id", "id", "realmid", "identifier", "sub_type",
			"name", "given_name", "family_name", "email", "authn", "account", "grant_type", "scope", "client_id", "acr", "amr",
		},
	})
}

// introspect tells the holder of a token or API key what it is good for. Who
// holds it could use it, so the answer needs no other authentication; of
// anything else it says only that it is not active.
func (h *handler) introspect(w http.ResponseWriter, r *http.Request) {
	started := h.cfg.Now()
	f, err := h.form(w, r)
	if err == nil {
		_, err = client(r)
	}
	if err == nil && f["token"] == "" && f["apikey"] == "" {
		err = grant.MissingProperty("token")
	}
	if err != nil {
		h.refuse(w, r, started, err)
		return
	}
	var claims any
	active := false
	if f["token"] != "" {
		if c, err := h.cfg.Grants.Caller(strings.TrimSpace(f["token"])); err == nil {
			active, claims = true, c
		}
	} else {
		c, err := h.cfg.Grants.Holder(r.Context(), originOf(r), f["apikey"])
		if fault.Is(err, fault.Unavailable) {
			h.refuse(w, r, started, err)
			return
		}
		if err == nil {
			active, claims = true, c
		}
	}
	out := map[string]any{}
	if active {
		b, err := json.Marshal(claims)
		if err == nil {
			err = json.Unmarshal(b, &out)
		}
		if err != nil {
			h.refuse(w, r, started, fault.Of(err))
			return
		}
	}
	out["active"] = active
	writeJSON(w, http.StatusOK, out)
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// The client may be gone; there is nobody left to tell.
	_, _ = w.Write(append(b, '\n'))
}
