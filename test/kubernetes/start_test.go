package kubernetes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tabard.dev/tabard/test/kubetest"
)

// A pod's first seconds may be the server's too: whoever has got a connection
// is served when the data is open, and is not turned away before.
func TestExchangesThatArriveWhileTheServerStartsWaitAndSucceed(t *testing.T) {
	k := kubetest.Start(t, kubetest.Options{})
	k.Namespace("shop", nil, nil)
	k.ServiceAccount("shop", "web", nil)
	token := k.Token("shop", "web", "iam", 3600, nil)
	s := newSite(t)
	s.resources("pod")
	s.link("pod", s.register("my-cluster", uploaded(k)), "shop", "web")
	profiles := 0
	more := func() { // so that opening takes a while
		manyProfiles(t, s, profiles, profiles+3000)
		profiles += 3000
	}
	more()

	for _, end := range []struct {
		name string
		stop func()
	}{{"an orderly stop", s.Stop}, {"a crash", s.Kill}} {
		t.Run("after "+end.name, func(t *testing.T) {
			early := exchangesAtStart(t, s, token, end.stop)
			for range 2 {
				if early > 0 || t.Failed() {
					break
				}
				more()
				early = exchangesAtStart(t, s, token, end.stop)
			}
			if early == 0 {
				t.Errorf("with %d profiles the server is ready before anybody has a connection: nothing was tested", profiles)
			}
		})
	}
}

// exchangesAtStart starts a server again while pods wait for it, and returns how
// many of them had sent their exchange before it was ready. All must succeed.
func exchangesAtStart(t *testing.T, s *site, token string, stop func()) int {
	t.Helper()
	stop()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var callers sync.WaitGroup
	var early atomic.Int32
	var ready atomic.Bool
	const pods = 64
	for range pods {
		callers.Go(func() {
			conn, err := connect(ctx, strings.TrimPrefix(s.URL, "http://"))
			if err != nil {
				t.Error(err)
				return
			}
			if !ready.Load() {
				early.Add(1)
			}
			if err := exchangeOver(ctx, conn, s.URL, token); err != nil {
				t.Error(err)
			}
		})
	}
	// Once the server listens, a caller that does not try again is served, too.
	callers.Go(func() {
		first, err := connect(ctx, strings.TrimPrefix(s.URL, "http://"))
		if err != nil {
			t.Error(err)
			return
		}
		defer first.Close()
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", strings.TrimPrefix(s.URL, "http://"))
		if err != nil {
			t.Errorf("the server listened, and then did not: %v", err)
			return
		}
		if err := exchangeOver(ctx, conn, s.URL, token); err != nil {
			t.Error(err)
		}
	})
	s.Launch()
	ready.Store(true)
	callers.Wait()
	return int(early.Load())
}

// connect dials until somebody listens.
func connect(ctx context.Context, address string) (net.Conn, error) {
	var d net.Dialer
	for {
		conn, err := d.DialContext(ctx, "tcp", address)
		if err == nil || !errors.Is(err, syscall.ECONNREFUSED) {
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

// exchangeOver makes one exchange over a connection, and none over another.
func exchangeOver(ctx context.Context, conn net.Conn, server, token string) error {
	used := false
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		if used {
			return nil, errors.New("the connection was given up")
		}
		used = true
		return conn, nil
	}}
	defer transport.CloseIdleConnections()
	form := url.Values{"grant_type": {grantCRToken}, "cr_token": {token}, "profile_name": {"pod"}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, server+"/identity/token", strings.NewReader(form.Encode()))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("an exchange that had a connection: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("an exchange that had a connection: %d %s %w", resp.StatusCode, body, err)
	}
	return nil
}

// manyProfiles creates the profiles of these numbers by several writers at once.
func manyProfiles(t *testing.T, s *site, from, to int) {
	t.Helper()
	owner := s.OwnerToken()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}, Timeout: patience}
	defer client.CloseIdleConnections()
	var next atomic.Int32
	next.Store(int32(from))
	var writers sync.WaitGroup
	for range 16 {
		writers.Go(func() {
			for i := next.Add(1); int(i) <= to; i = next.Add(1) {
				body := fmt.Sprintf(`{"name":"profile-%d","account_id":%q}`, i, s.Owner.AccountID)
				req, err := http.NewRequest(http.MethodPost, s.URL+"/v1/profiles", bytes.NewReader([]byte(body)))
				if err != nil {
					t.Error(err)
					return
				}
				req.Header.Set("Authorization", "Bearer "+owner)
				req.Header.Set("Content-Type", "application/json")
				resp, err := client.Do(req)
				if err != nil {
					t.Error(err)
					return
				}
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if resp.StatusCode != http.StatusCreated {
					t.Errorf("create profile %d: %d", i, resp.StatusCode)
					return
				}
			}
		})
	}
	writers.Wait()
	if t.Failed() {
		t.FailNow()
	}
}
