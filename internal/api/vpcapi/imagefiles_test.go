package vpcapi_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/vpcapi"
)

// poured is the answer to pour.
type poured struct {
	t      *testing.T
	status int
	raw    []byte
}

// pour uploads a file whose length nobody says beforehand.
func (l *library) pour(id string, body io.Reader) poured {
	l.t.Helper()
	req := httptest.NewRequest(http.MethodPut, path("/images/"+id+"/file"), io.NopCloser(body))
	req.ContentLength = -1
	req.Header.Set("Authorization", "Bearer "+l.Owner.AccountID+"/"+l.Owner.IAMID)
	rec := httptest.NewRecorder()
	api.WithTransaction(l.Mux).ServeHTTP(rec, req)
	return poured{l.t, rec.Code, rec.Body.Bytes()}
}

// want checks the status and the code of an error, and returns its message.
func (p poured) want(status int, code string) string {
	p.t.Helper()
	var body object
	if err := json.Unmarshal(p.raw, &body); err != nil {
		p.t.Fatalf("%v: %s", err, p.raw)
	}
	if p.status != status || text(body, "errors", 0, "code") != code {
		p.t.Fatalf("status %d, want %d with %s: %s", p.status, status, code, p.raw)
	}
	return text(body, "errors", 0, "message")
}

func (l *library) image() string {
	l.t.Helper()
	return text(l.post("/images", object{}), "id")
}

func TestTheFilesOfAnAccountsImagesHaveAQuotaTogether(t *testing.T) {
	file := disk()
	l := newLibraryIn(t, filepath.Join(t.TempDir(), "images"), vpcapi.ImagesConfig{
		MaxBytes: maxImage, Reserve: 1, AccountBytes: int64(3*len(file) + 100),
	})
	first, second, third, fourth := l.image(), l.image(), l.image(), l.image()
	l.upload("", first, bytes.NewReader(file), nil).Want(200)

	// What has come of a file counts before it is whole.
	body, feed := io.Pipe()
	done := make(chan poured)
	go func() { done <- l.pour(second, body) }()
	for range 2 {
		if _, err := feed.Write(file); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := feed.Write(file[:1]); err != nil { // so the rest has been taken
		t.Fatal(err)
	}
	wantError(t, l.upload("", third, bytes.NewReader(file), nil), 400, "over_quota")
	l.pour(third, bytes.NewReader(file)).want(400, "over_quota")
	other := l.Do(apitest.Request{Method: "POST", Path: path("/images"), Body: object{}, As: l.Other.IAMID}).Want(201)
	l.Do(apitest.Request{Method: "PUT", Path: path("/images/" + text(other, "id") + "/file"), Body: string(file), As: l.Other.IAMID}).Want(200)

	// Each image has one upload at a time.
	wantError(t, l.upload("", second, bytes.NewReader(file), nil), 409, "invalid_state")
	if _, err := feed.Write(make([]byte, 511)); err != nil {
		t.Fatal(err)
	}
	(<-done).want(400, "over_quota")

	// What has not become an image counts no more.
	l.upload("", second, bytes.NewReader(file), nil).Want(200)
	l.upload("", third, bytes.NewReader(file), nil).Want(200)
	wantError(t, l.upload("", fourth, bytes.NewReader(file), nil), 400, "over_quota")
	if n := len(strings.Fields(l.files())); n != 4 {
		t.Errorf("%d files: %s", n, l.files())
	}
	l.call("", "DELETE", "/images/"+first, nil).Want(202)
	l.upload("", fourth, bytes.NewReader(file), nil).Want(200)
}

func TestAnImageTakesNoRoomFromTheRestOfItsServer(t *testing.T) {
	l := newLibraryIn(t, filepath.Join(t.TempDir(), "images"), vpcapi.ImagesConfig{Reserve: 1 << 60})
	id := l.image()
	wantError(t, l.upload("", id, bytes.NewReader(disk()), nil), 507, "insufficient_storage")
	l.pour(id, bytes.NewReader(disk())).want(507, "insufficient_storage")
	if l.files() != "" {
		t.Errorf("left %s", l.files())
	}
}

// ticking moves a clock on by more than a minute whenever it is asked.
func ticking() func() time.Time {
	var n atomic.Int64
	begin := time.Now()
	return func() time.Time { return begin.Add(time.Duration(n.Add(1)) * 61 * time.Second) }
}

func TestAFileThatComesTooSlowlyIsGivenUp(t *testing.T) {
	l := newLibraryIn(t, filepath.Join(t.TempDir(), "images"), vpcapi.ImagesConfig{MaxBytes: maxImage, Reserve: 1, Now: ticking()})
	id := l.image()
	l.Config.Now = ticking()
	if said := l.pour(id, io.LimitReader(zeros{}, maxImage/2)).want(400, "bad_request"); !strings.Contains(said, "too slowly") {
		t.Errorf("said: %s", said)
	}
	if l.files() != "" {
		t.Errorf("left %s", l.files())
	}
	l.Config.Now = time.Now

	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(make([]byte, maxImage/2))
	}))
	defer server.Close()
	l.run()
	fetched := text(l.post("/images", object{"file": object{"href": server.URL}}), "id")
	if got := l.become(fetched, "failed"); !strings.Contains(text(got, "status_reasons", 0, "message"), "too slowly") {
		t.Errorf("reasons: %v", got["status_reasons"])
	}
}

func TestAnAccountHasOneImageFetchedAtATime(t *testing.T) {
	l := newLibrary(t)
	var mu sync.Mutex
	asked, going := "", make(chan string, 10)
	release := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		asked += r.URL.Path
		mu.Unlock()
		going <- r.URL.Path
		<-release
		_, _ = w.Write(disk())
	}))
	defer server.Close()
	var ids []string
	for _, name := range []string{"/a", "/b", "/c"} {
		ids = append(ids, text(l.post("/images", object{"file": object{"href": server.URL + name}}), "id"))
	}
	l.run()
	<-going
	// While the first one takes its time, somebody else's turn comes.
	other := l.Do(apitest.Request{Method: "POST", Path: path("/images"), As: l.Other.IAMID, Body: object{
		"file": object{"href": "http://10.0.0.1/", "checksums": object{"sha256": sum(disk())}},
	}}).Want(201)
	for tries := 0; ; tries++ {
		if i, _ := l.d.Images.Get(text(other, "id")); i.Status == "failed" {
			break
		}
		if tries > 6000 {
			t.Fatal("the other account waits for the first one")
		}
		time.Sleep(10 * time.Millisecond)
	}
	mu.Lock()
	if asked != "/a" {
		t.Errorf("asked for %s", asked)
	}
	mu.Unlock()
	close(release)
	for _, id := range ids {
		l.become(id, "available")
	}
	if asked != "/a/b/c" {
		t.Errorf("asked for %s", asked)
	}
}
