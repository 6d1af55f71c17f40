//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"tabard.dev/tabard/internal/host/namespace"
)

// serviceAddress is where programs find the metadata service.
const serviceAddress = "169.254.169.254"

// program asks the metadata service of one instance and keeps its connection.
type program struct {
	machine
	client *http.Client
	token  string // an identity token of the instance
}

// newProgram returns the program; its transport holds one connection at a time.
func newProgram(m machine) *program {
	dialer := net.Dialer{Timeout: 10 * time.Second}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		if m.Namespace == "" {
			return dialer.DialContext(ctx, "tcp4", m.Address)
		}
		ns, err := namespace.Open(m.Namespace)
		if err != nil {
			return nil, err
		}
		defer ns.Close()
		var c net.Conn
		err = namespace.Within(ns, func() (err error) {
			c, err = dialer.DialContext(ctx, "tcp4", serviceAddress+":80")
			return err
		})
		return c, err
	}
	return &program{machine: m, client: &http.Client{
		Timeout: 30 * time.Second,
		// Shorter than the service's own bound, so that it closes none under a request.
		Transport: &http.Transport{DialContext: dial, MaxIdleConnsPerHost: 1, IdleConnTimeout: 45 * time.Second},
	}}
}

// errLimited is the answer 429.
var errLimited = errors.New("the instance asks too often")

// ask sends a request to the service, at url when it is another's.
func (p *program) ask(ctx context.Context, url, method, path, bearer, body string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, method, url+path+"?version=2025-08-26", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	req.Host = serviceAddress
	req.Header.Set("Metadata-Flavor", "ibm")
	req.Header.Set("Content-Type", "application/json")
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return "", err
	}
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusTooManyRequests:
		return "", errLimited
	default:
		return "", fmt.Errorf("instance %s: status %d: %s", p.ID, resp.StatusCode, b)
	}
	var t struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.NewDecoder(bytes.NewReader(b)).Decode(&t); err != nil || t.AccessToken == "" {
		return "", fmt.Errorf("instance %s answered with no token: %w", p.ID, err)
	}
	return t.AccessToken, nil
}

const service = "http://" + serviceAddress

// identity gets an identity token.
func (p *program) identity(ctx context.Context, seconds int) (string, error) {
	return p.ask(ctx, service, http.MethodPut, "/identity/v1/token", "", fmt.Sprintf(`{"expires_in":%d}`, seconds))
}

// access exchanges the identity token for an access token of a profile.
func (p *program) access(ctx context.Context, profile string) error {
	_, err := p.ask(ctx, service, http.MethodPost, "/identity/v1/iam_tokens", p.token, fmt.Sprintf(`{"trusted_profile":{"id":%q}}`, profile))
	return err
}

// side is one of the things that are compared.
type side struct {
	name    string
	process *process // that answers; nil is this one
	op      func(ctx context.Context, worker, n int) error
	before  func() error // when not nil, before and after each round
	after   func() error

	rates     []float64 // answers a second, one a round
	latencies []time.Duration
	spent     []time.Duration // processor time for one answer, one a round
	server    []time.Duration // of the server's, beside it
	limited   int
}

// round keeps all workers busy for a time and notes what came of it.
func (s *side) round(ctx context.Context, server *process, o options, keep bool) error {
	if s.before != nil {
		if err := s.before(); err != nil {
			return err
		}
	}
	used := func() (of, beside time.Duration, err error) {
		if s.process == nil {
			of, err = own()
		} else {
			of, err = s.process.processor()
		}
		beside, err2 := server.processor()
		return of, beside, errors.Join(err, err2)
	}
	of, beside, err := used()
	if err != nil {
		return err
	}
	r := drive(ctx, o.clients, o.length, s.op)
	of2, beside2, err := used()
	if s.after != nil {
		err = errors.Join(err, s.after())
	}
	if err := errors.Join(r.err, err); err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	if !keep {
		return nil
	}
	s.limited += r.limited
	n := len(r.latencies)
	if n == 0 {
		return fmt.Errorf("%s: nothing was answered in %s (%d answers were limits)", s.name, o.length, r.limited)
	}
	s.rates = append(s.rates, float64(n)/r.took.Seconds())
	s.latencies = append(s.latencies, r.latencies...)
	s.spent = append(s.spent, (of2-of)/time.Duration(n))
	s.server = append(s.server, (beside2-beside)/time.Duration(n))
	return nil
}

type result struct {
	latencies []time.Duration // of what was answered
	limited   int
	took      time.Duration
	err       error
}

// drive has workers repeat an operation until the time is over or one of them
// fails.
func drive(ctx context.Context, workers int, length time.Duration, op func(ctx context.Context, worker, n int) error) result {
	var mu sync.Mutex
	var r result
	begin := time.Now()
	end := begin.Add(length)
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			var latencies []time.Duration
			var limited int
			var err error
			for n := 0; err == nil && time.Now().Before(end) && ctx.Err() == nil; n++ {
				at := time.Now()
				err = op(ctx, w, n)
				if errors.Is(err, errLimited) {
					limited, err = limited+1, nil
					continue
				}
				latencies = append(latencies, time.Since(at))
			}
			mu.Lock()
			defer mu.Unlock()
			r.latencies = append(r.latencies, latencies...)
			r.limited += limited
			r.err = errors.Join(r.err, err)
		})
	}
	all.Wait()
	r.took = time.Since(begin)
	r.err = errors.Join(r.err, ctx.Err())
	return r
}

func sorted[T ~float64 | ~int64](v []T) []T { return slices.Sorted(slices.Values(v)) }

func median[T ~float64 | ~int64](v []T) T { return sorted(v)[len(v)/2] }

func quantile(v []time.Duration, q float64) time.Duration {
	if len(v) == 0 {
		return 0
	}
	return sorted(v)[int(q*float64(len(v)-1))].Round(10 * time.Microsecond)
}

// ratio returns the median of a/b and its range, round by round.
func ratio[T ~float64 | ~int64](a, b []T) string {
	v := make([]float64, len(a))
	for i := range v {
		v[i] = float64(a[i]) / float64(b[i])
	}
	return fmt.Sprintf("%.2f, from %.2f to %.2f", median(v), slices.Min(v), slices.Max(v))
}
