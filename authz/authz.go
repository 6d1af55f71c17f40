// Package authz protects an HTTP service with Tabard: it checks the access
// token of every request against the server's published keys, asks the server
// whether the caller may do what the route stands for, and hands the caller to
// the handler.
//
//	guard, err := authz.New(authz.Config{
//		URL: "https://iam.example.com", Service: "documents",
//		Token: authz.APIKey(os.Getenv("DOCUMENTS_APIKEY")),
//	})
//	...
//	read := guard.Require("documents.document.read", func(r *http.Request) authz.Resource {
//		return authz.Resource{Type: "document", ID: r.PathValue("id")}
//	})
//	mux.Handle("GET /documents/{id}", read(handler))
//
// A decision is kept for at most a second, so that a revocation counts within
// that time. When the server cannot be asked the answer is 503, never a pass.
package authz

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/sync/singleflight"
)

// Config says whom to ask and as whom.
type Config struct {
	// URL is the Tabard server's.
	URL string
	// Issuer is the iss of its access tokens; "" means URL + "/identity".
	Issuer string
	// Service is the name under which this service is registered. Questions
	// are about its resources.
	Service string
	// Token gives the service's own access token. Its identity needs the role
	// Decision Point on Service.
	Token TokenSource
	// Client makes the calls, for example with the CA of a private server; nil
	// means http.DefaultClient's transport. Redirects are not followed, whatever
	// it says: a token or key must not go where a redirect points.
	Client *http.Client
	// Log is told why the server could not be asked; nil means slog.Default().
	Log *slog.Logger
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// callTimeout bounds what one question waits for, calls for keys and for the
// service's own token included.
const callTimeout = 5 * time.Second

// Resource is what a request is about. Empty fields are left out; the account
// is the service's own. Attributes are further ones that policies can name.
type Resource struct {
	Instance   string // serviceInstance
	Type       string // resourceType
	ID         string // resource
	Group      string // resourceGroupId
	Region     string
	Attributes map[string]string
}

// Caller is who sent a request, proved by the signature on the access token.
type Caller struct {
	IAMID     string // the identity that policies name
	AccountID string
	Name      string
	AuthnID   string // who put the profile on; equal to IAMID without a profile
	TokenID   string // jti
	Expires   time.Time
}

// Guard protects handlers. Its methods may be called from any goroutine.
type Guard struct {
	cfg       Config
	keys      *keys
	decisions *cache
	flight    singleflight.Group
}

// New returns a guard. It makes no call yet.
func New(cfg Config) (*Guard, error) {
	u, err := url.Parse(cfg.URL)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return nil, fmt.Errorf("authz: URL %q is not the http or https URL of a server", cfg.URL)
	}
	if cfg.Service == "" || cfg.Token == nil {
		return nil, errors.New("authz: Service and Token are required")
	}
	cfg.URL = strings.TrimSuffix(cfg.URL, "/")
	if cfg.Issuer == "" {
		cfg.Issuer = cfg.URL + "/identity"
	}
	client := http.Client{}
	if cfg.Client != nil {
		client = *cfg.Client
	}
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	cfg.Client = &client
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Guard{cfg: cfg, keys: &keys{cfg: cfg}, decisions: newCache()}, nil
}

// Require returns middleware that lets a request pass when its caller may do
// the action on the resource that the request names. Others get 401 without a
// valid token, 403 without the right, and 503 when the server cannot be asked,
// each with a JSON body in the server's own shape.
func (g *Guard) Require(action string, resource func(*http.Request) Resource) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			caller, err := g.allow(r.Context(), bearer(r), action, func() Resource { return resource(r) })
			if err != nil {
				g.refuse(w, err)
				return
			}
			next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, caller)))
		})
	}
}

// Errors of [Guard.Allow], to be told apart with errors.Is.
var (
	ErrUnauthenticated = errors.New("the request has no valid access token")
	ErrDenied          = errors.New("the caller is not allowed to do this")
	ErrUnavailable     = errors.New("the authorization server cannot be asked now")
)

// errNoToken is the ErrUnauthenticated of a request without a token.
var errNoToken = fmt.Errorf("%w: send one as Authorization: Bearer TOKEN", ErrUnauthenticated)

// Allow checks an access token and asks whether its holder may do the action
// on the resource. Services that do not speak HTTP use it without [Require].
func (g *Guard) Allow(ctx context.Context, token, action string, resource Resource) (Caller, error) {
	return g.allow(ctx, token, action, func() Resource { return resource })
}

// allow looks at the resource only for callers who are known.
func (g *Guard) allow(ctx context.Context, token, action string, resource func() Resource) (Caller, error) {
	caller, err := g.verify(ctx, token)
	if err != nil {
		return Caller{}, err
	}
	question, err := g.question(caller, token, action, resource())
	if err != nil {
		return Caller{}, fmt.Errorf("encode the question: %w", err)
	}
	d, err := g.decide(ctx, question)
	if err != nil {
		return Caller{}, err
	}
	if !d.allowed {
		return Caller{}, fmt.Errorf("%w: %s (transaction %s)", ErrDenied, d.reason, d.transaction)
	}
	return caller, nil
}

type callerKey struct{}

// CallerOf returns the caller of a request that [Guard.Require] let pass.
func CallerOf(ctx context.Context) (Caller, bool) {
	c, ok := ctx.Value(callerKey{}).(Caller)
	return c, ok
}

func bearer(r *http.Request) string {
	scheme, token, ok := strings.Cut(strings.TrimSpace(r.Header.Get("Authorization")), " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimSpace(token)
}

// refuse answers in the shape that the server itself uses, with the challenge of
// RFC 6750 section 3. The caller learns the kind of refusal and the transaction
// under which an administrator finds the rest.
func (g *Guard) refuse(w http.ResponseWriter, err error) {
	status, code, challenge := http.StatusServiceUnavailable, "service_unavailable", ""
	switch {
	case errors.Is(err, errNoToken):
		status, code, challenge = http.StatusUnauthorized, "token_missing", `Bearer realm="`+g.realm()+`"`
	case errors.Is(err, ErrUnauthenticated):
		status, code, challenge = http.StatusUnauthorized, "token_invalid", `Bearer realm="`+g.realm()+`", error="invalid_token"`
	case errors.Is(err, ErrDenied):
		status, code, challenge = http.StatusForbidden, "not_authorized", `Bearer realm="`+g.realm()+`", error="insufficient_scope"`
	default:
		g.cfg.Log.Error("a request was refused because its caller's rights are not known", "service", g.cfg.Service, "error", err)
		err = ErrUnavailable
		w.Header().Set("Retry-After", "1")
	}
	body, encodeErr := json.Marshal(map[string]any{
		"errors": []map[string]string{{"code": code, "message": err.Error()}}, "status_code": status,
	})
	if encodeErr != nil {
		body = []byte("{}")
	}
	if challenge != "" {
		w.Header().Set("WWW-Authenticate", challenge)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	// The client may be gone; there is nobody left to tell.
	_, _ = w.Write(body)
}

// realm is the service's name, as far as it fits into quotes.
func (g *Guard) realm() string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' || r == '"' || r == '\\' {
			return -1
		}
		return r
	}, g.cfg.Service)
}
