// Package api is what all API families share: a route is registered together
// with the action it needs, and from there authentication, authorization, the
// transaction with its activity event, entity tags, paging, body limits and
// error shapes are written here once. A family decodes, says what is asked
// about, acts and encodes.
package api

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/object"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/usage"
)

// MaxBody bounds a request body, in bytes.
const MaxBody = 1 << 20

// Authenticator checks an access token.
type Authenticator interface {
	Caller(raw string) (*token.Claims, error)
}

// Recorder makes events durable.
type Recorder interface {
	Record(ctx context.Context, events ...*activity.Event) error
}

// Events is the activity log as it is read.
type Events interface {
	Events(ctx context.Context, q store.Query) ([]store.StoredEvent, error)
}

// Attempts makes failed requests visible to the account that they aimed at.
// Note must not wait: what is written for an id that exists and not for one that
// does not would tell the caller which of them it was.
type Attempts interface {
	Note(account string, e *activity.Event)

	// Admit reports whether the event of a request with a token that does not
	// count any more is recorded by itself.
	Admit(e *activity.Event) bool
}

// Kinds of route.
const (
	KindRead   = "read"
	KindList   = "list"
	KindChange = "change"
	KindAsk    = "ask"
	KindOpen   = "open"
)

// Route is one entry of the route table.
type Route struct {
	Pattern string // as the router takes it
	Kind    string
	Action  string // empty for KindOpen
	Event   string // the activity event of a change
	Reason  string // why a route of KindOpen needs no action
}

// Routes is the route table. It is filled while the families register, and
// only read afterwards.
type Routes struct{ All []Route }

// Config are what every family works with.
type Config struct {
	Directory *directory.Directory
	Auth      Authenticator
	Journal   Recorder
	Names     crn.Names
	URL       string // the server's own URL, for links in answers; never taken from a request
	Region    string
	Now       func() time.Time
	Log       *slog.Logger

	Events Events // the activity log, for the history of objects

	// Attempts are told of failed requests that aimed at another account than
	// the caller's; nil tells nobody.
	Attempts Attempts

	Usage *usage.Tracker // nil counts nothing

	// Routes, when not nil, is told of every route with the action it needs.
	Routes *Routes

	// OperatorAccount's log has the attempts of callers that are not known.
	OperatorAccount string
}

// Family is a group of routes with one error shape.
type Family struct {
	*Config
	Mux     *http.ServeMux
	Service string // in event messages, for example "IAM Identity Service"

	// Hosts says that the family is for host agents, and for nobody else: what
	// may use it may use no other family, so that a stolen host token reaches
	// nothing but what a host does.
	Hosts bool

	// Shape turns a fault into the family's status and body.
	Shape func(c *Call, f *fault.Error) (status int, body any)
}

// Call is one request under way.
type Call struct {
	*Family
	R      *http.Request
	Caller *token.Claims // nil on routes without authentication

	w       http.ResponseWriter
	trace   activity.Trace
	permits permits
	asked   bool          // whether the caller may do something
	about   Target        // see About
	decided decided       // see decisions.go
	refused *token.Claims // of a token that does not count any more
	body    []byte        // as it was sent, for whom a failed request aimed at
}

// About says what the request is about as far as that is known before its
// transaction, for the event of a failure until then.
func (c *Call) About(t Target) { c.about = t }

// Target is what a request is about: the attributes that access is decided on,
// and how the activity event names it.
type Target struct {
	Resource map[string]string
	CRN      string
	Name     string
	TypeURI  string

	// Owner is the IAM ID of an identity whose own affair this is: it needs no
	// action. "" is nobody.
	Owner string

	// Event, when not empty, is the name of the event of a change instead of
	// the route's, for routes whose events depend on what they are about.
	Event string
}

// Reply is an answer.
type Reply struct {
	Status int // 0 means 200
	Body   any // nil means no body
	ETag   string

	// Stream, when not nil, writes the whole answer instead: for what is long,
	// or goes on. The bounds on reading and writing are then its own to set.
	Stream func(w http.ResponseWriter, r *http.Request)

	// Abandoned, when not nil, is called in place of Stream when the answer
	// cannot be given after all.
	Abandoned func()

	// ResponseData goes into the activity event: ids and counts that the answer
	// has, never a secret. What changed, the event has from the transaction.
	ResponseData map[string]any

	// RequestBody goes into the event's request data, for events whose format
	// demands one.
	RequestBody map[string]any
}

// OptionalBody marks body types that a request may leave out.
type OptionalBody interface{ OptionalBody() }

// None is the body type of requests that have none.
type None struct{}

// ctxKey keys values of this package in a context.
type ctxKey struct{}

// TransactionID returns the id under which a request is told to its caller
// and written to the activity log.
func TransactionID(ctx context.Context) string {
	id, _ := ctx.Value(ctxKey{}).(string)
	return id
}

// TransactionHeader carries the transaction id both ways.
const TransactionHeader = "Transaction-Id"

// requestHeader is a caller's own name for a request, which it gets back
// (OpenID AuthZEN Authorization API 1.0).
const requestHeader = "X-Request-ID"

// WithTransaction gives every request its transaction id: the caller's own
// when it is sane, else a new one. It must enclose all routes.
func WithTransaction(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := r.Header.Get(TransactionHeader)
		if !saneTransaction(id) {
			id = strings.ReplaceAll(uuid.NewString(), "-", "")
		}
		h := w.Header()
		h.Set(TransactionHeader, id)
		if asked := r.Header.Get(requestHeader); printable(asked) {
			h.Set(requestHeader, asked)
		}
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", "no-cache, no-store, must-revalidate")
		h.Set("Pragma", "no-cache")
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), ctxKey{}, id)))
	})
}

// printable reports whether a header's value may be sent back as it came.
func printable(s string) bool {
	return len(s) <= 256 && strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) < 0 && s != ""
}

func saneTransaction(id string) bool {
	if len(id) == 0 || len(id) > 128 {
		return false
	}
	return strings.IndexFunc(id, func(r rune) bool {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		return !letter && !strings.ContainsRune("-_.:", r)
	}) < 0
}

// Read registers a route that shows one thing: load finds it, the caller needs
// the action on it, show encodes it.
func Read[T any](f *Family, pattern, action string, load func(*Call) (T, Target, error), show func(*Call, T) (Reply, error)) {
	f.handle(Route{Pattern: pattern, Kind: KindRead, Action: action}, func(c *Call) (Reply, error) {
		if err := c.authenticate(activity.ReadEvent(action)); err != nil {
			return Reply{}, err
		}
		obj, target, err := load(c)
		if err != nil {
			return Reply{}, c.recordDenial(action, target, err)
		}
		if err := c.authorizeOn(target, action); err != nil {
			return Reply{}, c.recordDenial(action, target, err)
		}
		reply, err := show(c, obj)
		return reply, c.recordDenial(action, target, err)
	})
}

// List registers a route that shows many things. It refuses nobody with a
// valid token: list must ask c.May(action, …) about each thing, and a caller
// who may see none gets an empty list.
func List(f *Family, pattern, action string, list func(c *Call, may func(resource map[string]string) bool) (Reply, error)) {
	f.handle(Route{Pattern: pattern, Kind: KindList, Action: action}, func(c *Call) (Reply, error) {
		if err := c.authenticate(activity.ReadEvent(action)); err != nil {
			return Reply{}, err
		}
		c.decided.together = true
		reply, err := list(c, func(resource map[string]string) bool { return c.May(action, resource) })
		if err == nil && !c.asked {
			c.countEmpty(action)
		}
		return reply, c.recordDenial(action, Target{}, err)
	})
}

// Open registers a route that needs a valid token and no action; reason says
// why, for whoever reads the route table.
func Open(f *Family, pattern, reason string, h func(*Call) (Reply, error)) {
	if reason == "" {
		panic("route " + pattern + " needs no action and does not say why")
	}
	f.handle(Route{Pattern: pattern, Kind: KindOpen, Reason: reason}, func(c *Call) (Reply, error) {
		if err := c.authenticate(""); err != nil {
			return Reply{}, err
		}
		return h(c)
	})
}

// Change registers a route that changes something. It runs as one transaction:
// load finds what is to be changed, the caller needs the action on it, do
// stages the change and says what the event is about, and the event becomes
// durable with it. The body is read before the transaction begins.
func Change[B, T any](f *Family, pattern, action, event string,
	load func(*Call, *B) (T, Target, error), do func(*Call, *directory.Tx, *B, T) (Reply, Target, error),
) {
	ChangeAfter(f, pattern, action, event, nil, load, do)
}

// ChangeAfter is Change with a step before the transaction, for work that must
// not hold up other writers, such as a fetch over the network. prepare has to
// authorize the caller itself before it does anything on his behalf, and to say
// with [Call.About] what the request is about, for the event of its failure.
func ChangeAfter[B, T any](f *Family, pattern, action, event string, prepare func(*Call, *B) error,
	load func(*Call, *B) (T, Target, error), do func(*Call, *directory.Tx, *B, T) (Reply, Target, error),
) {
	f.handle(Route{Pattern: pattern, Kind: KindChange, Action: action, Event: event}, func(c *Call) (Reply, error) {
		if err := c.authenticate(event); err != nil {
			return Reply{}, err
		}
		body := new(B)
		if _, none := any(body).(*None); !none {
			err := c.decode(body)
			if _, optional := any(body).(OptionalBody); err != nil && (!optional || !errors.Is(err, io.EOF)) {
				return Reply{}, err
			}
		}
		if prepare != nil {
			if err := prepare(c, body); err != nil {
				return Reply{}, c.recordFailure(event, c.about, err)
			}
		}
		var reply Reply
		var target Target
		err := c.Directory.Update(c.R.Context(), c.Caller.IAMID, func(tx *directory.Tx) error {
			obj, t, err := load(c, body)
			target = t
			if err != nil {
				return err
			}
			if err := c.authorizeOn(t, action); err != nil {
				return err
			}
			r, t, err := do(c, tx, body, obj)
			if err != nil {
				return err
			}
			reply, target = r, t
			return c.recordChange(tx, event, reply, target)
		})
		if err != nil {
			return Reply{}, c.recordFailure(event, target, err)
		}
		c.decided.written()
		return reply, nil
	})
}

// Anonymous registers a route that changes something for a caller without an
// access token: what it shows in its body is its credential, and do judges it,
// in the transaction. reason says what that is, for whoever reads the route
// table.
func Anonymous[B any](f *Family, pattern, event, reason string, do func(*Call, *directory.Tx, *B) (Reply, Target, error)) {
	f.handle(Route{Pattern: pattern, Kind: KindOpen, Event: event, Reason: reason}, func(c *Call) (Reply, error) {
		body := new(B)
		if err := c.decode(body); err != nil {
			return Reply{}, err
		}
		var reply Reply
		var target Target
		err := c.Directory.Update(c.R.Context(), "", func(tx *directory.Tx) error {
			r, t, err := do(c, tx, body)
			target = t
			if err != nil {
				return err
			}
			reply = r
			return c.recordChange(tx, event, reply, target)
		})
		if err != nil {
			return Reply{}, c.recordFailure(event, target, err)
		}
		return reply, nil
	})
}

// Ask registers a route that answers a question in its body and changes
// nothing. answer has to authorize the caller for the action itself, on what
// the question is about.
func Ask[B any](f *Family, pattern, action string, answer func(*Call, *B) (Reply, error)) {
	f.handle(Route{Pattern: pattern, Kind: KindAsk, Action: action}, func(c *Call) (Reply, error) {
		if err := c.authenticate(action); err != nil {
			return Reply{}, err
		}
		body := new(B)
		if err := c.decode(body); err != nil {
			return Reply{}, err
		}
		reply, err := answer(c, body)
		return reply, c.recordDenial(action, Target{}, err)
	})
}

// RecordDisclosure writes the events of an answer that gives out the secrets of
// some objects. They must be durable before the answer leaves.
func (c *Call) RecordDisclosure(action string, of ...Target) error {
	if len(of) == 0 {
		return nil
	}
	events := make([]*activity.Event, len(of))
	for i, t := range of {
		events[i] = c.event(action, t)
		events[i].Severity = activity.Critical // whatever shows a secret
		events[i].SetReason(http.StatusOK, "")
	}
	return c.Journal.Record(c.R.Context(), events...)
}

// recordChange adds the event of a change to its transaction, and those of the
// decisions that it took.
func (c *Call) recordChange(tx *directory.Tx, event string, reply Reply, target Target) error {
	e := c.event(event, target)
	e.SetReason(replyStatus(reply), "")
	own, foreign := c.partition(tx.Changes(), e)
	var err error
	if e.RequestData, err = activity.ChangeData(c.R.Method, c.R.URL.Path, reply.RequestBody, own); err != nil {
		return err
	}
	if len(reply.ResponseData) > 0 {
		data, err := json.Marshal(reply.ResponseData)
		if err != nil {
			return fmt.Errorf("encode the event's response data: %w", err)
		}
		e.ResponseData = data
	}
	tx.Record(e)
	if err := c.recordUnlinked(tx, foreign); err != nil {
		return err
	}
	for _, d := range c.decided.pending() {
		tx.Record(d)
	}
	return nil
}

func replyStatus(r Reply) int {
	if r.Status == 0 {
		return http.StatusOK
	}
	return r.Status
}

// handle is the outermost layer of every route with an ordinary body.
func (f *Family) handle(route Route, h func(*Call) (Reply, error)) {
	f.serve(route, MaxBody, h)
}

// serve is the outermost layer of every route. A limit of 0 leaves it to the
// route to bound the body.
func (f *Family) serve(route Route, limit int64, h func(*Call) (Reply, error)) {
	if f.Routes != nil {
		f.Routes.All = append(f.Routes.All, route)
	}
	f.Mux.HandleFunc(route.Pattern, func(w http.ResponseWriter, r *http.Request) {
		c := &Call{Family: f, R: r, w: w}
		if limit > 0 {
			r.Body = http.MaxBytesReader(w, r.Body, limit)
		}
		defer func() {
			if p := recover(); p != nil {
				f.Log.Error("panic in a handler", "pattern", route.Pattern, "transaction", TransactionID(r.Context()),
					"panic", p, "stack", string(debug.Stack()))
				c.writeFault(w, fault.Of(fmt.Errorf("panic: %v", p)))
			}
		}()
		reply, err := h(c)
		if unwritten := c.decided.close(); len(unwritten) > 0 {
			if failed := c.Journal.Record(r.Context(), unwritten...); failed != nil {
				if reply.Abandoned != nil {
					reply.Abandoned()
				}
				reply, err = Reply{}, failed
			}
		}
		if err != nil {
			c.writeFault(w, fault.Of(err))
			return
		}
		if reply.ETag != "" {
			w.Header().Set("ETag", reply.ETag)
		}
		if reply.Stream != nil {
			reply.Stream(w, r)
			return
		}
		c.write(w, replyStatus(reply), reply.Body)
	})
}

func (c *Call) write(w http.ResponseWriter, status int, body any) {
	if body == nil {
		w.WriteHeader(status)
		return
	}
	// Documents in the answer come out byte for byte as they are kept.
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(body); err != nil {
		c.Log.Error("encode an answer", "transaction", TransactionID(c.R.Context()), "error", err)
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	// The client may be gone; there is nobody left to tell.
	_, _ = w.Write(b.Bytes())
}

func (c *Call) writeFault(w http.ResponseWriter, f *fault.Error) {
	if f.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(f.RetryAfter/time.Second)))
	}
	// What a caller wrote comes back in messages; not more of it than helps.
	clipped := *f
	clipped.Message, clipped.Detail = clip(f.Message), clip(f.Detail)
	status, body := c.Shape(c, &clipped)
	if f.Kind == fault.Internal || f.Kind == fault.Unavailable {
		c.Log.Error("request failed", "method", c.R.Method, "path", c.R.URL.Path, "status", status,
			"transaction", TransactionID(c.R.Context()), "error", f)
	}
	c.write(w, status, body)
}

// maxMessage bounds the texts of an error answer, in bytes.
const maxMessage = 4 << 10

func clip(s string) string {
	if len(s) <= maxMessage {
		return s
	}
	return strings.ToValidUTF8(s[:maxMessage], "") + "…"
}

// bearer returns the access token, or "". The scheme may be missing, because a
// published sample sends the bare token
// (reference/instance-metadata-and-vpc.md section 3.1).
func (c *Call) bearer() string {
	header := strings.TrimSpace(c.R.Header.Get("Authorization"))
	scheme, rest, ok := strings.Cut(header, " ")
	switch {
	case !ok:
		return header
	case !strings.EqualFold(scheme, "Bearer"):
		return ""
	}
	return strings.TrimSpace(rest)
}

// authenticate finds the caller.
func (c *Call) authenticate(action string) error {
	raw := c.bearer()
	if raw == "" {
		return fault.New(fault.Unauthenticated, "token_missing", "The request has no access token; send it as Authorization: Bearer TOKEN.")
	}
	claims, err := c.Auth.Caller(raw)
	if err != nil {
		c.trace.Fail("access-token", "a valid access token", err.Error(), "get a new access token")
		if rejected := (*grant.RejectedError)(nil); errors.As(err, &rejected) {
			c.refused = rejected.Claims
		}
		f := fault.New(fault.Unauthenticated, "token_invalid", "The access token is expired or not valid; get a new one.").Because(err)
		return c.recordFailure(action, Target{}, f)
	}
	if (claims.SubType == token.SubHost) != c.Hosts {
		c.trace.Fail("access-token", "an access token of the kind that this API is for", "one of "+claims.IAMID, "")
		return c.recordFailure(action, Target{}, fault.New(fault.Unauthenticated, "token_invalid", "The access token is not for this API."))
	}
	c.Caller = claims
	if peer := PeerHost(c.R).Address; !c.Directory.SettingsOf(c.Account()).Admits(peer) {
		c.trace.Fail("address", "an address that the account's settings allow", peer, "call from an allowed address, or have an administrator add this one to allowed_ip_addresses")
		return c.recordFailure(action, Target{}, fault.New(fault.Denied, "not_authorized",
			"Account %s does not allow access from the address %s.", c.Account(), peer))
	}
	return nil
}

// Account is the account that the caller acts in: the only one whose objects
// he can see (promise 5).
func (c *Call) Account() string { return c.Caller.Account.BSS }

// May reports whether the caller may do an action on a resource.
func (c *Call) May(action string, resource map[string]string) bool {
	return c.decide(action, resource).Allowed
}

// MayThrough is May with some of the caller's policies left out: for what he
// must hold more firmly than for his own use, because he passes it on.
func (c *Call) MayThrough(v access.View, action string, resource map[string]string) bool {
	return c.decideThrough(v, action, resource).Allowed
}

func (c *Call) decide(action string, resource map[string]string) access.Decision {
	return c.decideThrough(c.Directory, action, resource)
}

func (c *Call) decideThrough(v access.View, action string, resource map[string]string) access.Decision {
	q := access.Request{Subject: c.Caller.IAMID, AccountID: c.Account(), Action: action, Resource: resource, Time: c.Now()}
	d := access.Decide(v, q)
	c.asked = true
	c.noteOwn(q, d)
	if d.Allowed {
		c.permits.count(c.Usage, q, d.Policy)
	}
	return d
}

// authorizeOn authorizes the caller to do a route's action on its target.
func (c *Call) authorizeOn(t Target, action string) error {
	if t.Owner != "" && t.Owner == c.Caller.IAMID {
		c.trace.Pass("owner", "the identity that this is about", t.Owner)
		return nil
	}
	return c.Authorize(action, t.Resource)
}

// Authorize returns a fault of kind Denied unless the caller may do the action
// on the resource. The trace goes to the activity event.
func (c *Call) Authorize(action string, resource map[string]string) error {
	d := c.decide(action, resource)
	c.trace = append(c.trace, d.Explain()...) // a request may need several actions
	if d.Allowed {
		return nil
	}
	return fault.New(fault.Denied, "not_authorized",
		"%s is not authorized to %s on %s of account %s: no policy of the account allows it.",
		c.Caller.IAMID, action, describe(resource), c.Account())
}

func describe(resource map[string]string) string {
	if id := resource[access.Resource]; id != "" {
		return resource[access.ResourceType] + " " + id
	}
	if s := resource[access.ServiceName]; s != "" {
		return "service " + s
	}
	return "all services"
}

// InAccount returns resource attributes in the caller's account: the service
// and pairs of further names and values. Empty values are left out.
func (c *Call) InAccount(service string, pairs ...string) map[string]string {
	m := map[string]string{access.AccountID: c.Account(), access.ServiceName: service}
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			m[pairs[i]] = pairs[i+1]
		}
	}
	return m
}

// With returns a copy of resource attributes with more of them.
func With(resource map[string]string, pairs ...string) map[string]string {
	m := maps.Clone(resource)
	for i := 0; i+1 < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	return m
}

// recordDenial records a read that was refused for lack of access; a read that
// found nothing or was asked for badly leaves no event.
func (c *Call) recordDenial(action string, target Target, err error) error {
	action = activity.ReadEvent(action)
	if err == nil {
		return nil
	}
	if !fault.Is(err, fault.Denied) {
		c.noteAttempt(action, target, fault.Of(err))
		return err
	}
	return c.recordFailure(action, target, err)
}

// recordFailure writes the event of a failed attempt and returns the fault
// that the caller gets.
func (c *Call) recordFailure(action string, target Target, err error) error {
	f := fault.Of(err)
	if action == "" {
		action = "iam-identity.token.verify"
	}
	e := c.event(action, target)
	e.SetReason(grant.StatusOf(f.Kind), f.Message)
	e.Message += " -failure"
	if c.refused != nil && c.Attempts != nil && !c.Attempts.Admit(e) {
		c.noteAttempt(action, target, f)
		return f
	}
	if err := c.Journal.Record(c.R.Context(), append(c.decided.pending(), e)...); err != nil {
		return err
	}
	c.decided.written()
	c.noteAttempt(action, target, f)
	return f
}

// event begins the activity event of this call.
func (c *Call) event(action string, t Target) *activity.Event {
	action = cmp.Or(t.Event, action)
	e := &activity.Event{
		ID: uuid.NewString(), Time: activity.Time{Time: c.Now()}, Action: action,
		CorrelationID: TransactionID(c.R.Context()), AccountID: c.OperatorAccount,
		Target:    activity.Target{ID: t.CRN, Name: t.Name, TypeURI: t.TypeURI},
		Observer:  activity.Observer{Name: "ActivityTracker"},
		Initiator: activity.Initiator{TypeURI: activity.UnknownType},
		Trace:     c.trace,
	}
	verb := action[strings.LastIndexByte(action, '.')+1:]
	noun := t.TypeURI[strings.LastIndexByte(t.TypeURI, '/')+1:]
	e.Message = strings.TrimSpace(fmt.Sprintf("%s: %s %s %s", c.Service, verb, noun, t.Name))
	if who := cmp.Or(c.Caller, c.refused); who != nil {
		e.AccountID = who.Account.BSS
		e.Initiator = initiator(who)
	}
	e.Initiator.Host = PeerHost(c.R)
	if group := t.Resource[access.ResourceGroupID]; group != "" {
		e.Target.ResourceGroupID = c.Names.Of("resource-controller", "", e.AccountID, "", "resource-group", group).String()
	}
	e.LogSourceCRN = c.Names.Of(strings.SplitN(action, ".", 2)[0], c.Region, e.AccountID, "", "", "").String()
	if data, err := json.Marshal(map[string]string{"method": c.R.Method, "path": activity.Clip(c.R.URL.Path)}); err == nil {
		e.RequestData = data
	}
	return e
}

func initiator(c *token.Claims) activity.Initiator {
	i := activity.Initiator{
		ID: c.IAMID, Name: c.Name, TypeURI: activity.UserType, AuthnID: c.IAMID, AuthnName: c.Name,
		Credential: activity.Credential{Type: "token"},
	}
	switch c.SubType {
	case token.SubServiceID:
		i.TypeURI = activity.ServiceIDType
	case token.SubProfile:
		i.TypeURI = activity.ProfileType
	case token.SubHost:
		i.TypeURI = activity.HostType
	}
	if c.Authn != nil {
		i.AuthnID, i.AuthnName = c.Authn.IAMID, c.Authn.Name
	}
	return i
}

// PeerHost describes the network peer of a request. Headers that name another
// one are not believed.
func PeerHost(r *http.Request) activity.Host {
	h := activity.Host{Address: r.RemoteAddr, Agent: r.UserAgent()}
	if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		h.Address = host
	}
	h.AddressType = activity.AddressType(h.Address)
	if len(h.Agent) > 256 {
		h.Agent = h.Agent[:256]
	}
	return h
}

// decode reads one JSON object. Any content type is taken: curl labels JSON as
// a form.
func (c *Call) decode(into any) error {
	body, err := io.ReadAll(c.R.Body)
	if err != nil {
		return bodyFault(err)
	}
	c.body = body
	dec := json.NewDecoder(bytes.NewReader(body))
	if err := dec.Decode(into); err != nil {
		return bodyFault(err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return fault.New(fault.Invalid, "invalid_body", "The body must be one JSON object and nothing after it.")
	}
	if key, doubled := doubledKey(json.NewDecoder(bytes.NewReader(body))); doubled {
		return fault.New(fault.Invalid, "invalid_body", "The body has the field %q more than once.", key).On(key)
	}
	return nil
}

// doubledKey finds a key that stands twice in one object, in whatever case: the
// decoder would take the last one, and somebody else who reads the body
// perhaps the first. The body is known to be valid JSON.
func doubledKey(dec *json.Decoder) (string, bool) {
	t, err := dec.Token()
	delim, composite := t.(json.Delim)
	if err != nil || !composite {
		return "", false
	}
	seen := map[string]bool{}
	for dec.More() {
		if delim == '{' {
			t, err := dec.Token()
			key, ok := t.(string)
			if err != nil || !ok {
				return "", false
			}
			folded := strings.ToLower(key)
			if seen[folded] {
				return key, true
			}
			seen[folded] = true
		}
		if key, doubled := doubledKey(dec); doubled {
			return key, true
		}
	}
	_, err = dec.Token() // the closing delimiter
	return "", err != nil
}

func bodyFault(err error) error {
	var tooLarge *http.MaxBytesError
	var wrongType *json.UnmarshalTypeError
	switch {
	case errors.As(err, &tooLarge):
		return fault.New(fault.TooLarge, "request_too_large", "The body is larger than %d bytes.", tooLarge.Limit)
	case errors.As(err, &wrongType) && wrongType.Field == "":
		return fault.New(fault.Invalid, "invalid_body", "The body must be a JSON %s.", jsonKind(wrongType.Type.Kind().String()))
	case errors.As(err, &wrongType):
		return fault.New(fault.Invalid, "invalid_body", "The body's field %q must be a JSON %s.", wrongType.Field, jsonKind(wrongType.Type.Kind().String())).On(wrongType.Field)
	case errors.Is(err, io.EOF):
		return fault.New(fault.Invalid, "invalid_body", "The request has no body; send a JSON object.").Because(err)
	}
	return fault.New(fault.Invalid, "invalid_body", "The body is not valid JSON: %v.", err)
}

func jsonKind(k string) string {
	switch k {
	case "struct", "map", "ptr":
		return "object"
	case "slice", "array":
		return "array"
	case "bool":
		return "boolean"
	case "string":
		return "string"
	}
	return "number"
}

// IfMatch checks the request's If-Match header against an object. Families
// whose clients always send it demand it.
func (c *Call) IfMatch(m *object.Meta, id string, required bool) error {
	header := c.R.Header.Get("If-Match")
	if header == "" {
		if required {
			return fault.New(fault.Invalid, "invalid_body", "The request needs an If-Match header with the object's entity tag, or *.").OnHeader("If-Match")
		}
		return nil
	}
	if !object.MatchTag(header, m.Tag(id)) {
		return fault.New(fault.Stale, "conflict", "The object was changed in the meantime; its entity tag is now %s.", m.Tag(id)).OnHeader("If-Match")
	}
	return nil
}

// KeysUnusable is the fault of an issuer whose keys cannot be had. Only the
// caller can put it right, so he is told why; but what the network around the
// server answers is for the operator's account alone.
func (c *Call) KeysUnusable(issuer string, cause error) error {
	why := clip(cause.Error())
	if c.Account() != c.OperatorAccount && strings.HasPrefix(why, "fetch ") {
		why = "they cannot be fetched"
	}
	return fault.New(fault.Invalid, "keys_unusable", "The keys of issuer %q cannot be used: %s.", issuer, why).Because(cause)
}

// NotFound is the fault for something absent, or in another account.
func NotFound(noun, id string) *fault.Error {
	return fault.New(fault.NotFound, "not_found", "The %s %q was not found.", noun, id)
}

// Invalid is the fault for a body or parameter that breaks a rule.
func Invalid(format string, args ...any) *fault.Error {
	return fault.New(fault.Invalid, "invalid_body", format, args...)
}

// Printable reports whether text fit to be a name or description: at most max
// characters, none of them a control character.
func Printable(s string, maxRunes int) bool {
	n := 0
	for _, r := range s {
		if n++; n > maxRunes || r < ' ' || r == 0x7f || r == '\uFFFD' {
			return false
		}
	}
	return true
}
