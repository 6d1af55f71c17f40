package test

import (
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// kills is how often the server is killed: KILLS, or a few.
func kills(t *testing.T) int {
	t.Helper()
	n, err := strconv.Atoi(os.Getenv("KILLS"))
	if err != nil || n < 1 {
		return 5
	}
	return n
}

// Promise 2: the event of a token is on stable storage before the token leaves.
// The server is killed under load, and every token that a client holds must
// have its event afterwards.
func TestEveryTokenHasItsEventAfterAKill(t *testing.T) {
	b := newSceneB(t)
	form := url.Values{
		"grant_type": {grantCRToken}, "cr_token": {b.issuer.Token("shop", "web")}, "profile_name": {"pod"},
	}.Encode()
	var mu sync.Mutex
	held := map[string]bool{}
	for range kills(t) {
		stop := make(chan struct{})
		var workers sync.WaitGroup
		for range 8 {
			workers.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					resp, err := http.Post(b.URL+"/identity/token", "application/x-www-form-urlencoded", strings.NewReader(form))
					if err != nil {
						time.Sleep(time.Millisecond)
						continue
					}
					body, err := io.ReadAll(resp.Body)
					resp.Body.Close()
					if err != nil || resp.StatusCode != http.StatusOK {
						continue
					}
					jti, _ := claimsOf(t, field(t, string(body), "access_token"))["jti"].(string)
					mu.Lock()
					held[jti] = true
					mu.Unlock()
				}
			})
		}
		time.Sleep(300 * time.Millisecond)
		b.Kill()
		close(stop)
		workers.Wait()
		// The events and the tree over them were cut off at the same place.
		b.CLI("activity", "verify", "--data-dir", b.Dir)
		b.Launch()
	}
	b.Login()
	recorded := map[string]bool{}
	for _, e := range b.allEvents("iam-identity.computeresource-token.login") {
		jti, _ := e.ResponseData["jti"].(string)
		recorded[jti] = true
	}
	missing := 0
	for jti := range held {
		if !recorded[jti] {
			missing++
		}
	}
	t.Logf("%d tokens held by clients, %d events", len(held), len(recorded))
	if missing > 0 || len(held) == 0 {
		t.Fatalf("%d of %d tokens have no event", missing, len(held))
	}
}
