// Package apitest lets the tests of an API family talk to it over HTTP, on a
// real SQLite file, as whoever they like.
package apitest

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/checkpoint"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/journal"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/sqlite"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/usage"
)

// Env is an installation with two accounts that know nothing of each other.
type Env struct {
	T      testing.TB
	Config *api.Config
	Mux    *http.ServeMux
	Store  store.Store
	Sealer *token.Sealer
	Usage  *usage.Tracker
	Signer *checkpoint.Signer // signs when it is told to

	Owner bootstrap.Owner // of the account that most tests act in
	Other bootstrap.Owner // of the other one
}

// New starts an installation.
func New(t testing.TB) *Env {
	t.Helper()
	ctx := context.Background()
	s, err := sqlite.Open(ctx, filepath.Join(t.TempDir(), "tabard.db"))
	must(t, err)
	catalog, err := access.ParseCatalog(access.Builtin())
	must(t, err)
	d, err := directory.Open(ctx, directory.Config{Store: s, Catalog: catalog, Now: time.Now})
	must(t, err)
	sealer, err := token.NewSealer(make([]byte, 32))
	must(t, err)
	j := journal.New(journal.Config{Store: s})
	t.Cleanup(func() {
		j.Close()
		must(t, s.Close())
	})
	e := &Env{T: t, Mux: http.NewServeMux(), Store: s, Sealer: sealer}
	e.Owner = bootstrap.NewOwner("Test", "http://tabard.test")
	e.Other = bootstrap.NewOwner("Other", "http://tabard.test")
	for _, o := range []bootstrap.Owner{e.Owner, e.Other} {
		must(t, d.Update(ctx, o.IAMID, func(tx *directory.Tx) error {
			bootstrap.Account(tx, d, crn.DefaultNames, o, sealer.Hash(o.APIKey))
			return nil
		}))
	}
	e.Usage, err = usage.Open(ctx, usage.Config{Directory: d, Log: slog.New(slog.DiscardHandler), Now: time.Now}, s)
	must(t, err)
	e.Signer, err = checkpoint.Open(ctx, checkpoint.Config{
		Store: s, Directory: d, Sealer: sealer, Issuer: "http://tabard.test/identity", Now: time.Now, Log: slog.New(slog.DiscardHandler),
	})
	must(t, err)
	e.Config = &api.Config{
		Directory: d, Auth: bearer{}, Journal: j, Names: crn.DefaultNames, URL: "http://tabard.test",
		Region: "us-south", Now: time.Now, OperatorAccount: e.Owner.AccountID,
		Events: s, Usage: e.Usage, Routes: &api.Routes{},
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	return e
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// bearer takes a token that is simply "ACCOUNT/IAMID".
type bearer struct{}

func (bearer) Caller(raw string) (*token.Claims, error) {
	account, id, ok := strings.Cut(raw, "/")
	if !ok {
		return nil, fault.New(fault.Unauthenticated, "token_invalid", "not a test token")
	}
	c := &token.Claims{IAMID: id, Account: token.Account{Valid: true, BSS: account}, Name: id}
	switch crn.KindOf(id) {
	case crn.KindProfile:
		c.SubType = token.SubProfile
	case crn.KindServiceID:
		c.SubType = token.SubServiceID
	}
	return c, nil
}

// Request is one call. Zero values mean: GET, as the owner, without a body.
type Request struct {
	Method, Path string
	Body         any // a string is sent as it stands, anything else as JSON
	As           string
	Account      string
	Anonymous    bool
	Header       map[string]string
}

// Response is its answer.
type Response struct {
	t      testing.TB
	Status int
	Header http.Header
	Raw    []byte
}

// Do makes a call.
func (e *Env) Do(r Request) *Response {
	e.T.Helper()
	if r.Method == "" {
		r.Method = http.MethodGet
	}
	if r.As == "" {
		r.As = e.Owner.IAMID
	}
	if r.Account == "" {
		r.Account = e.Owner.AccountID
		if r.As == e.Other.IAMID {
			r.Account = e.Other.AccountID
		}
	}
	var body io.Reader
	switch b := r.Body.(type) {
	case nil:
	case string:
		body = strings.NewReader(b)
	default:
		raw, err := json.Marshal(b)
		must(e.T, err)
		body = bytes.NewReader(raw)
	}
	req := httptest.NewRequest(r.Method, r.Path, body)
	if !r.Anonymous {
		req.Header.Set("Authorization", "Bearer "+r.Account+"/"+r.As)
	}
	for k, v := range r.Header {
		req.Header.Set(k, v)
	}
	rec := httptest.NewRecorder()
	api.WithTransaction(e.Mux).ServeHTTP(rec, req)
	return &Response{t: e.T, Status: rec.Code, Header: rec.Header(), Raw: rec.Body.Bytes()}
}

// Want fails the test unless the answer has the status, and returns the body
// as a JSON object.
func (r *Response) Want(status int) map[string]any {
	r.t.Helper()
	if r.Status != status {
		r.t.Fatalf("status %d, want %d; body: %s", r.Status, status, r.Raw)
	}
	var m map[string]any
	if len(bytes.TrimSpace(r.Raw)) > 0 {
		if err := json.Unmarshal(r.Raw, &m); err != nil {
			r.t.Fatalf("body is not a JSON object: %v: %s", err, r.Raw)
		}
	}
	return m
}

// Grant gives an identity roles on a service (platform or common service
// roles, by name), directly in the directory.
func (e *Env) Grant(iamID, service string, roles ...string) {
	e.T.Helper()
	p := &access.Policy{
		ID: uuid.NewString(), AccountID: e.Owner.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
		Subject: []access.Attribute{{Key: access.IAMID, Operator: access.StringEquals, Value: access.Text(iamID)}},
		Resource: []access.Attribute{
			{Key: access.ServiceName, Operator: access.StringEquals, Value: access.Text(service)},
			{Key: access.AccountID, Operator: access.StringEquals, Value: access.Text(e.Owner.AccountID)},
		},
	}
	for _, r := range roles {
		crn := access.PlatformRoleCRN(r)
		if _, ok := e.Config.Directory.Builtin().Role(crn); !ok {
			crn = access.ServiceRoleCRN(service, r)
		}
		p.Roles = append(p.Roles, crn)
	}
	d := e.Config.Directory
	must(e.T, d.Update(context.Background(), e.Owner.IAMID, func(tx *directory.Tx) error {
		d.Policies.Put(tx, p)
		return nil
	}))
}

// Events returns the newest events of the owner's account, newest first.
func (e *Env) Events(limit int) []activity.Event {
	e.T.Helper()
	stored, err := e.Store.Events(context.Background(), store.Query{AccountID: e.Owner.AccountID, Limit: limit})
	must(e.T, err)
	out := make([]activity.Event, len(stored))
	for i, s := range stored {
		must(e.T, json.Unmarshal(s.Doc, &out[i]))
	}
	return out
}
