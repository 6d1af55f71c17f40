package test

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tabard.dev/tabard/test/harness"
)

// smallDisk mounts a file system that is soon full.
func smallDisk(t *testing.T, megabytes int) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting a file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dm", megabytes)); err != nil {
		t.Skipf("a tmpfs cannot be mounted here: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// load exchanges tokens until it is told to stop, and keeps what clients hold.
type load struct {
	b       *sceneB
	form    string
	stop    chan struct{}
	rests   atomic.Bool
	workers sync.WaitGroup

	mu      sync.Mutex
	held    map[string]bool
	refused map[string]int // answers of status 503
	odd     map[string]bool
}

func (b *sceneB) load(t *testing.T) *load {
	t.Helper()
	l := &load{b: b, stop: make(chan struct{}), held: map[string]bool{}, refused: map[string]int{}, odd: map[string]bool{}}
	l.form = url.Values{"grant_type": {grantCRToken}, "cr_token": {b.issuer.Token("shop", "web")}, "profile_name": {"pod"}}.Encode()
	for range 4 {
		l.workers.Go(func() {
			for {
				select {
				case <-l.stop:
					return
				default:
				}
				if l.rests.Load() {
					time.Sleep(5 * time.Millisecond)
					continue
				}
				l.exchange(t)
			}
		})
	}
	return l
}

func (l *load) exchange(t *testing.T) {
	resp, err := http.Post(l.b.URL+"/identity/token", "application/x-www-form-urlencoded", strings.NewReader(l.form))
	if err != nil {
		return // the server was killed
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err != nil:
	case resp.StatusCode == http.StatusOK:
		jti, _ := claimsOf(t, field(t, string(body), "access_token"))["jti"].(string)
		l.held[jti] = true
	case resp.StatusCode == http.StatusServiceUnavailable && resp.Header.Get("Retry-After") != "":
		l.refused[field(t, string(body), "errorMessage")]++
	default:
		l.odd[fmt.Sprintf("%d %.300s", resp.StatusCode, body)] = true
	}
}

func (l *load) tokens() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.held)
}

// more waits until tokens are issued again.
func (l *load) more(t *testing.T) {
	t.Helper()
	before := l.tokens()
	untilTrue(t, "tokens are issued", func() bool { return l.tokens() > before+5 })
}

// end stops the load, and wants every token's event to be there, and refusals of
// one kind among those that there were.
func (l *load) end(t *testing.T, refusals ...string) {
	t.Helper()
	close(l.stop)
	l.workers.Wait()
	if len(l.odd) > 0 {
		t.Errorf("other answers: %v", l.odd)
	}
	for _, want := range refusals {
		found := false
		for message := range l.refused {
			found = found || strings.Contains(message, want)
		}
		if !found {
			t.Errorf("nobody was refused because %q: %v", want, l.refused)
		}
	}
	recorded := map[string]bool{}
	for _, e := range l.b.allEvents("iam-identity.computeresource-token.login") {
		jti, _ := e.ResponseData["jti"].(string)
		recorded[jti] = true
	}
	missing := 0
	for jti := range l.held {
		if !recorded[jti] {
			missing++
		}
	}
	t.Logf("%d tokens held, %d events, refusals %v", len(l.held), len(recorded), l.refused)
	if missing > 0 || len(l.held) == 0 {
		t.Errorf("%d of %d tokens have no event", missing, len(l.held))
	}
	l.b.CLI("activity", "verify")
}

// fillUp writes to a file until its disk has only so many bytes.
func fillUp(t *testing.T, name string, leave int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for {
		var s unix.Statfs_t
		if err := unix.Statfs(name, &s); err != nil {
			t.Fatal(err)
		}
		over := int64(s.Bavail)*s.Bsize - leave
		if over <= 0 {
			return
		}
		if _, err := f.Write(make([]byte, min(1<<20, over))); err != nil {
			return
		}
	}
}

func untilTrue(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("it does not come to it that %s", what)
}

func (b *sceneB) storeState(token string) string {
	b.T.Helper()
	return b.Do("GET", "/v1/events/space", token, nil).Field("state")
}

// readsGoOn wants everything that needs no event to work.
func (b *sceneB) readsGoOn(t *testing.T, token, state string) {
	t.Helper()
	for _, path := range []string{
		"/readyz", "/identity/keys", "/v1/profiles?account_id=" + b.Owner.AccountID, "/v2/resource_instances", "/v1/events?limit=5",
		"/v1/events/checkpoint", "/v1/events/space",
	} {
		if a := b.Do("GET", path, token, nil); a.Status != http.StatusOK {
			t.Errorf("%s: GET %s: %d %s", state, path, a.Status, a.Body)
		}
	}
	if a := b.Do("POST", "/identity/introspect", "", url.Values{"token": {token}}); a.Status != http.StatusOK || !strings.Contains(string(a.Body), `"active":true`) {
		t.Errorf("%s: introspection: %d %s", state, a.Status, a.Body)
	}
	if a := b.Do("GET", "/readyz", "", nil); !strings.Contains(string(a.Body), state) {
		t.Errorf("/readyz says %s", a.Body)
	}
	if a := b.Do("GET", "/metrics", "", nil); !strings.Contains(string(a.Body), `tabard_store_state{state="`+state+`"} 1`) {
		t.Errorf("the metrics do not have the state %s", state)
	}
	b.CLI("activity", "verify")
}

func (b *sceneB) wantRefused(t *testing.T, token, code string) {
	t.Helper()
	a := b.Do("POST", "/v1/profiles", token, map[string]any{"name": "refused", "account_id": b.Owner.AccountID})
	if a.Status != http.StatusServiceUnavailable || a.Header.Get("Retry-After") == "" || !strings.Contains(string(a.Body), code) {
		t.Errorf("a change: %d %s", a.Status, a.Body)
	}
}

// The declared policy (docs/activity.md): a full or read-only disk refuses tokens and changes, and
// nothing else, and lets them in again without a restart.
func TestADiskThatIsFullOrReadOnlyRefusesTokensAndKeepsReads(t *testing.T) {
	b := newSceneBIn(t, smallDisk(t, 128))
	token := b.OwnerToken()
	untilTrue(t, "the reserve is there", func() bool {
		info, err := os.Stat(filepath.Join(b.Dir, "reserve"))
		return err == nil && info.Size() == 16<<20
	})
	l := b.load(t)
	l.more(t)

	other := filepath.Join(b.Dir, "somebody-elses")
	l.rests.Store(true) // so that it does not take the last bit itself
	fillUp(t, other, 6<<20)
	untilTrue(t, "the disk is full", func() bool { return b.storeState(token) == "full" })
	l.rests.Store(false)
	b.readsGoOn(t, token, "full")
	b.wantRefused(t, token, "activity_log_full")
	if out := b.CLI("activity", "space"); !strings.Contains(out, "full, since") || !strings.Contains(out, "16.0 MiB of 16.0 MiB") {
		t.Errorf("said %s", out)
	}
	// It may end and start in this state.
	b.Kill()
	b.Launch()
	untilTrue(t, "the disk is full", func() bool { return b.storeState(token) == "full" })
	b.readsGoOn(t, token, "full")
	out := b.CLI("activity", "release-reserve")
	if !strings.Contains(out, "16.0 MiB were freed") {
		t.Errorf("said %s", out)
	}
	l.more(t)
	makeRoom := func() {
		t.Helper()
		if err := os.Remove(other); err != nil {
			t.Fatal(err)
		}
		untilTrue(t, "all is well again, with a reserve", func() bool {
			info, err := os.Stat(filepath.Join(b.Dir, "reserve"))
			return b.storeState(token) == "ok" && err == nil && info.Size() == 16<<20
		})
		l.more(t)
	}
	makeRoom()

	// It starts on a disk that is full to the last byte, too. Whether it needs the
	// reserve for that depends on what the kill has freed.
	fillUp(t, other, 0)
	b.Kill()
	b.Launch()
	if !strings.Contains(b.Log(), "the reserve was freed to open the store") {
		b.CLI("activity", "release-reserve")
	}
	l.more(t)
	makeRoom()

	if err := unix.Mount(b.Dir, b.Dir, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", b.Dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	untilTrue(t, "the disk is read-only", func() bool { return b.storeState(token) == "read_only" })
	b.readsGoOn(t, token, "read_only")
	b.wantRefused(t, token, "activity_log_read_only")
	if err := unix.Unmount(b.Dir, 0); err != nil {
		t.Fatal(err)
	}
	l.more(t)
	l.end(t, "is full", "is read-only")
	for action, want := range map[string]int{"activity.reserve.release": 1, "activity.store.update": 4} {
		if n := len(b.allEvents(action)); n < want {
			t.Errorf("%d events of %s, want %d", n, action, want)
		}
	}
}

// A file that is removed under the load is put back, and no token leaves whose
// event was in it and nowhere else: also not when the server is killed next.
func TestARemovedStoreIsPutBackUnderLoad(t *testing.T) {
	b := newSceneB(t)
	token := b.OwnerToken()
	l := b.load(t)
	for n, name := range []string{"tabard.db", "tabard.db-wal", "tabard.db"} {
		l.more(t)
		if err := os.Remove(filepath.Join(b.Dir, name)); err != nil {
			t.Fatal(err)
		}
		untilTrue(t, "the file is put back", func() bool {
			_, err := os.Stat(filepath.Join(b.Dir, name))
			return err == nil && strings.Count(b.Log(), "has been put back") == n+1
		})
		l.more(t)
	}
	if err := os.WriteFile(filepath.Join(b.Dir, "older"), []byte("something else"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(b.Dir, "older"), filepath.Join(b.Dir, "tabard.db")); err != nil {
		t.Fatal(err)
	}
	untilTrue(t, "the file is put back", func() bool { return strings.Count(b.Log(), "has been put back") == 4 })
	l.more(t)
	if found, _ := filepath.Glob(filepath.Join(b.Dir, "tabard.db.found-*")); len(found) != 1 {
		t.Errorf("set aside %q", found)
	}
	if state := b.storeState(token); state != "ok" {
		t.Errorf("the state is %s", state)
	}
	b.Kill()
	b.CLI("activity", "verify", "--data-dir", b.Dir)
	b.Launch()
	l.more(t)
	b.Login()
	l.end(t)
	if n := len(b.allEvents("activity.store.restore")); n != 4 {
		t.Errorf("%d events of files that were put back", n)
	}
}

// An empty store in the place of one that was removed would hide the loss.
func TestAServerWhoseStoreIsGoneDoesNotBeginAnew(t *testing.T) {
	s := harness.Start(t, "--driver", "none")
	s.Login()
	s.Kill()
	if err := os.Remove(filepath.Join(s.Dir, "tabard.db")); err != nil {
		t.Fatal(err)
	}
	if r := s.Run("server", "--data-dir", s.Dir, "--listen", "127.0.0.1:0", "--driver", "none"); r.Code == 0 || !strings.Contains(r.Err, "Put a backup back") {
		t.Errorf("%d %s", r.Code, r.Err)
	}
}
