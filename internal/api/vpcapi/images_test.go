package vpcapi_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/vpcapi"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/store/blob"
	"tabard.dev/tabard/internal/vpc"
)

// library is a world that keeps images.
type library struct {
	*world
	dir    string
	images *vpcapi.Images
}

const maxImage = 1 << 20

func newLibrary(t *testing.T) *library {
	t.Helper()
	return newLibraryIn(t, filepath.Join(t.TempDir(), "images"), vpcapi.ImagesConfig{MaxBytes: maxImage, Reserve: 1})
}

// newLibraryIn keeps its images in a directory.
func newLibraryIn(t *testing.T, dir string, cfg vpcapi.ImagesConfig) *library {
	t.Helper()
	w := &world{Env: apitest.New(t), t: t}
	w.d = w.Config.Directory
	blobs, err := blob.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Directory, cfg.Blobs, cfg.Log, cfg.OperatorAccount = w.d, blobs, slog.New(slog.DiscardHandler), w.Owner.AccountID
	images := vpcapi.NewImages(cfg)
	vpcapi.Register(w.Mux, w.Config, vpcapi.Options{Images: images})
	return &library{w, dir, images}
}

// run fetches and removes until the test ends.
func (l *library) run() {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { l.images.Run(ctx) })
	l.t.Cleanup(func() { cancel(); wg.Wait() })
}

func (l *library) files() string {
	l.t.Helper()
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		l.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

func (l *library) upload(as, id string, body io.Reader, header map[string]string) *apitest.Response {
	l.t.Helper()
	b, err := io.ReadAll(body)
	if err != nil {
		l.t.Fatal(err)
	}
	return l.Do(apitest.Request{Method: "PUT", Path: path("/images/" + id + "/file"), Body: string(b), As: as, Header: header})
}

// become waits until an image has a status, and returns the image.
func (l *library) become(id, status string) object {
	l.t.Helper()
	watch := l.d.Watch(directory.KindImage)
	defer watch.Stop()
	giveUp := time.After(time.Minute)
	for {
		r := l.call("", "GET", "/images/"+id, nil)
		if i := r.Want(200); i["status"] == status {
			return i
		}
		select {
		case <-watch.C:
		case <-giveUp:
			l.t.Fatalf("image %s is not %s after a minute: %s", id, status, r.Raw)
		}
	}
}

// emptied waits until the directory has no file with an id.
func (l *library) emptied(id string) {
	l.t.Helper()
	giveUp := time.After(time.Minute)
	for strings.Contains(l.files(), id) {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-giveUp:
			l.t.Fatalf("the file %s is there after a minute", id)
		}
	}
}

// disk is a qcow2 image of a disk of 20 GB without anything on it.
func disk() []byte {
	b := make([]byte, 64<<10)
	copy(b, "QFI\xfb")
	binary.BigEndian.PutUint32(b[4:], 3)
	binary.BigEndian.PutUint32(b[20:], 16)
	binary.BigEndian.PutUint64(b[24:], 20<<30)
	return b
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

func TestAnImageIsRegisteredByUploadAndBooted(t *testing.T) {
	l := newLibrary(t)
	made := l.post("/images", object{"name": "my-image", "operating_system": object{"name": "debian-12-amd64"}})
	id := text(made, "id")
	if made["status"] != "pending" || made["visibility"] != "private" || text(made, "operating_system", "name") != "debian-12-amd64" || text(made, "status_reasons", 0, "code") != "image_request_queued" {
		t.Errorf("made: %v", made)
	}
	if want := "crn:v1:bluemix:public:is:us-south:a/" + l.Owner.AccountID + "::image:" + id; made["crn"] != want {
		t.Errorf("CRN %v", made["crn"])
	}
	_, subnetID := l.network(16)
	wantError(t, l.call("", "POST", "/instances", instanceIn(subnetID, object{"image": object{"id": id}})), 409, "invalid_state")

	file := disk()
	got := l.upload("", id, bytes.NewReader(file), map[string]string{"X-Content-SHA256": strings.ToUpper(sum(file))}).Want(200)
	if got["status"] != "available" || text(got, "file", "checksums", "sha256") != sum(file) || at(got, "file", "size") != 1.0 ||
		got["minimum_provisioned_size"] != 20.0 || len(items(got, "status_reasons")) != 0 {
		t.Errorf("uploaded: %v", got)
	}
	if i, _ := l.d.Images.Get(id); i.Format != "qcow2" || i.Disk != 20<<30 || i.Bytes != int64(len(file)) || i.SHA256 != sum(file) {
		t.Errorf("stored: %+v", i)
	}
	if e := l.Events(1)[0]; e.Action != "is.image.file.upload" || e.Target.ID != made["crn"] || !strings.Contains(string(e.ResponseData), sum(file)) {
		t.Errorf("event %s %s %s", e.Action, e.Target.ID, e.ResponseData)
	}
	kept, err := os.ReadFile(filepath.Join(l.dir, id))
	if err != nil || !bytes.Equal(kept, file) || l.files() != id {
		t.Errorf("the directory has %s; %v", l.files(), err)
	}
	wantError(t, l.upload("", id, bytes.NewReader(file), nil), 409, "invalid_state")

	instance := l.post("/instances", instanceIn(subnetID, object{"image": object{"crn": made["crn"]}}))
	if text(instance, "image", "id") != id {
		t.Errorf("image of the instance: %v", instance["image"])
	}
	if v := l.get("/volumes/" + text(instance, "boot_volume_attachment", "volume", "id")); v["capacity"] != 20.0 {
		t.Errorf("boot volume of %v GB", v["capacity"])
	}
	wantError(t, l.call("", "DELETE", "/images/"+id, nil), 409, "image_in_use")
}

func TestADeletedImageGoesWithItsFile(t *testing.T) {
	l := newLibrary(t)
	id := text(l.post("/images", object{"name": "my-image"}), "id")
	l.upload("", id, bytes.NewReader(disk()), nil).Want(200)
	l.call("", "DELETE", "/images/"+id, nil).Want(202)
	wantError(t, l.call("", "DELETE", "/images/"+id, nil), 404, "not_found")
	l.post("/images", object{"name": "my-image"})
	l.run()
	l.emptied(id)
}

func TestAFileThatCannotBeUsedLeavesNothing(t *testing.T) {
	l := newLibrary(t)
	id := text(l.post("/images", object{"file": object{"checksums": object{"sha256": sum(disk())}}}), "id")
	backed := disk()
	backed[15] = 200
	other := append(disk(), 0)
	for name, test := range map[string]struct {
		body   []byte
		header map[string]string
		status int
		code   string
	}{
		"nothing":                  {nil, nil, 400, "bad_request"},
		"another checksum":         {other, nil, 400, "validation_failure"},
		"a header that disagrees":  {disk(), map[string]string{"X-Content-SHA256": sum(other)}, 400, "bad_field"},
		"a header that is no sum":  {disk(), map[string]string{"X-Content-SHA256": "abc"}, 400, "bad_field"},
		"too large":                {make([]byte, maxImage+1), nil, 413, "http_request_size_exceeded"},
		"neither checksum nor raw": {[]byte("hello"), nil, 400, "validation_failure"},
	} {
		t.Run(name, func(t *testing.T) {
			wantError(t, l.upload("", id, bytes.NewReader(test.body), test.header), test.status, test.code)
		})
	}
	free := text(l.post("/images", object{}), "id")
	wantError(t, l.upload("", free, bytes.NewReader(backed), nil), 400, "validation_failure")
	wantError(t, l.upload("", free, strings.NewReader("hello"), nil), 400, "validation_failure")
	wantError(t, l.upload("", stockImage, bytes.NewReader(disk()), nil), 409, "invalid_state")
	wantError(t, l.upload("", "none", bytes.NewReader(disk()), nil), 404, "not_found")
	if l.files() != "" {
		t.Errorf("left %s", l.files())
	}
	if got := l.get("/images/" + id); got["status"] != "pending" {
		t.Errorf("status %v", got["status"])
	}
	l.upload("", id, bytes.NewReader(disk()), nil).Want(200)
}

func TestAnUploadThatBreaksOffLeavesNothing(t *testing.T) {
	l := newLibrary(t)
	id := text(l.post("/images", object{}), "id")
	for name, body := range map[string]io.Reader{
		"broken":         io.MultiReader(bytes.NewReader(disk()), iotest.ErrReader(io.ErrUnexpectedEOF)),
		"without an end": io.LimitReader(zeros{}, 10*maxImage), // its length is not known beforehand
	} {
		req := httptest.NewRequest(http.MethodPut, path("/images/"+id+"/file"), io.NopCloser(body))
		req.ContentLength = -1
		req.Header.Set("Authorization", "Bearer "+l.Owner.AccountID+"/"+l.Owner.IAMID)
		rec := httptest.NewRecorder()
		api.WithTransaction(l.Mux).ServeHTTP(rec, req)
		if rec.Code != 400 && rec.Code != 413 {
			t.Errorf("%s: %d %s", name, rec.Code, rec.Body)
		}
	}
	if l.files() != "" {
		t.Errorf("left %s", l.files())
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestASlowUploadOutlivesTheServersTimeouts uses a real server whose timeouts
// for ordinary requests are shorter than the upload takes.
func TestASlowUploadOutlivesTheServersTimeouts(t *testing.T) {
	l := newLibrary(t)
	id := text(l.post("/images", object{}), "id")
	server := httptest.NewUnstartedServer(api.WithTransaction(l.Mux))
	server.Config.ReadTimeout, server.Config.WriteTimeout = time.Second, time.Second
	server.Start()
	defer server.Close()
	body, feed := io.Pipe()
	go func() {
		file := disk()
		for len(file) > 0 {
			n := min(len(file), 8<<10)
			if _, err := feed.Write(file[:n]); err != nil {
				return
			}
			file = file[n:]
			time.Sleep(200 * time.Millisecond)
		}
		feed.Close()
	}()
	req, err := http.NewRequest(http.MethodPut, server.URL+path("/images/"+id+"/file"), body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+l.Owner.AccountID+"/"+l.Owner.IAMID)
	resp, err := server.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK || err != nil {
		t.Errorf("%s %s %v", resp.Status, answer, err)
	}
}

func TestOfConcurrentUploadsOneWins(t *testing.T) {
	l := newLibrary(t)
	id := text(l.post("/images", object{}), "id")
	var wg sync.WaitGroup
	responses := make([]*apitest.Response, 4)
	for n := range responses {
		wg.Go(func() { responses[n] = l.upload("", id, bytes.NewReader(disk()), nil) })
	}
	wg.Wait()
	won := 0
	for _, r := range responses {
		if r.Status == 200 {
			won++
			continue
		}
		wantError(t, r, 409, "invalid_state")
	}
	if won != 1 || l.files() != id {
		t.Errorf("%d uploads won; the directory has %s", won, l.files())
	}
}

func TestAnImageIsFetchedFromItsURL(t *testing.T) {
	l := newLibrary(t)
	file := disk()
	asked := make(chan struct{}, 10)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/image":
			asked <- struct{}{}
			_, _ = w.Write(file)
		case "/moved":
			http.Redirect(w, r, "/image", http.StatusFound)
		case "/round":
			http.Redirect(w, r, "/round", http.StatusFound)
		case "/away":
			http.Redirect(w, r, "http://192.0.2.1/image", http.StatusFound)
		case "/page":
			_, _ = io.WriteString(w, "<!DOCTYPE html>")
		case "/short":
			w.Header().Set("Content-Length", "100000")
			_, _ = w.Write(file)
		case "/large":
			w.Header().Set("Content-Length", "9999999999")
		case "/endless":
			_, _ = io.Copy(w, io.LimitReader(zeros{}, 10*maxImage))
		default:
			http.NotFound(w, r)
		}
	}))
	defer server.Close()
	from := func(p, checksum string) string {
		made := l.post("/images", object{"file": object{"href": server.URL + p, "checksums": object{"sha256": checksum}}})
		return text(made, "id")
	}
	waiting := from("/image?signature=secret", sum(file))
	if e := l.Events(1)[0]; strings.Contains(string(e.ResponseData), "secret") || !strings.Contains(string(e.ResponseData), "/image") {
		t.Errorf("the event has %s", e.ResponseData)
	}
	if got := l.get("/images/" + waiting); text(got, "status_reasons", 0, "code") != "image_request_in_progress" {
		t.Errorf("waiting: %v", got["status_reasons"])
	}
	wantError(t, l.upload("", waiting, bytes.NewReader(file), nil), 409, "invalid_state")
	l.run()
	for _, id := range []string{waiting, from("/moved", "")} {
		if got := l.become(id, "available"); text(got, "file", "checksums", "sha256") != sum(file) {
			t.Errorf("fetched: %v", got)
		}
	}
	for p, says := range map[string]string{
		"/none": "404", "/round": "redirects", "/page": "HTML", "/short": "ended after", "/large": "larger than", "/endless": "larger than", "/away": "checksum",
	} {
		got := l.become(from(p, ""), "failed")
		if m := text(got, "status_reasons", 0, "message"); !strings.Contains(m, says) {
			t.Errorf("%s failed because %q, want it to say %q", p, m, says)
		}
	}
	got := l.become(from("/image", sum([]byte("other"))), "failed")
	if m := text(got, "status_reasons", 0, "message"); !strings.Contains(m, sum(file)) {
		t.Errorf("another checksum: %s", m)
	}
	_, subnetID := l.network(8)
	wantError(t, l.call("", "POST", "/instances", instanceIn(subnetID, object{"image": object{"id": got["id"]}})), 409, "invalid_state")
	l.call("", "DELETE", "/images/"+text(got, "id"), nil).Want(202)
	if n := len(strings.Fields(l.files())); n != 2 {
		t.Errorf("the directory has %s", l.files())
	}
}

func TestWhoseFilesAreFetchedFromWhere(t *testing.T) {
	l := newLibrary(t)
	asked := false
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { asked = true; _, _ = w.Write(disk()) }))
	defer server.Close()
	_, port, err := net.SplitHostPort(strings.TrimPrefix(server.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	l.run()
	foreign := func(method, p string, body any) *apitest.Response {
		t.Helper()
		return l.Do(apitest.Request{Method: method, Path: path(p), Body: body, As: l.Other.IAMID})
	}
	for _, address := range []string{"127.0.0.1:" + port, "localhost:" + port, "[::1]:" + port, "10.0.0.1", "169.254.169.254", "[64:ff9b::7f00:1]", "[::ffff:127.0.0.1]:" + port, "0.0.0.0:" + port, "100.64.0.1"} {
		made := foreign("POST", "/images", object{"file": object{"href": "http://" + address + "/", "checksums": object{"sha256": sum(disk())}}}).Want(201)
		watch := l.d.Watch(directory.KindImage)
		for {
			i, _ := l.d.Images.Get(text(made, "id"))
			if i.Status == vpc.Failed {
				if strings.Contains(i.Reason, "dial") || strings.Contains(i.Reason, "refused") {
					t.Errorf("%s: the tenant is told %q", address, i.Reason)
				}
				break
			}
			<-watch.C
		}
		watch.Stop()
	}
	if asked {
		t.Error("a tenant had the server ask its own machine")
	}
	for _, href := range []string{"ftp://example.com/x", "file:///etc/passwd", "cos://us-south/bucket/x", "/x", "https://u:p@example.com/x", "http://example.com/x", "https://example.com/#x", "https:///x"} {
		wantError(t, l.call("", "POST", "/images", object{"file": object{"href": href}}), 400, "bad_field")
	}
}

func TestAFetchBeginsAgainWhenTheServerWasStopped(t *testing.T) {
	l := newLibrary(t)
	asked, first := make(chan struct{}, 2), true
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hang := first
		first = false
		if hang {
			w.WriteHeader(http.StatusOK)
			_, _ = w.Write(disk()[:100])
			_ = http.NewResponseController(w).Flush()
			asked <- struct{}{}
			<-r.Context().Done()
			return
		}
		_, _ = w.Write(disk())
	}))
	defer server.Close()
	id := text(l.post("/images", object{"file": object{"href": server.URL}}), "id")
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { l.images.Run(ctx) })
	<-asked
	cancel()
	wg.Wait()
	if got := l.get("/images/" + id); got["status"] != "pending" || l.files() != "" {
		t.Errorf("after the stop: %v; the directory has %s", got["status"], l.files())
	}
	l.run()
	l.become(id, "available")
}

func TestDeletingAnImageEndsItsFetch(t *testing.T) {
	l := newLibrary(t)
	ended, asked := make(chan struct{}), make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		_, _ = w.Write(disk()[:100])
		_ = http.NewResponseController(w).Flush()
		close(asked)
		<-r.Context().Done()
		close(ended)
	}))
	defer server.Close()
	l.run()
	id := text(l.post("/images", object{"file": object{"href": server.URL}}), "id")
	<-asked
	l.call("", "DELETE", "/images/"+id, nil).Want(202)
	<-ended
	l.emptied(id)
}

func TestImagesAreTheAccountsOwn(t *testing.T) {
	l := newLibrary(t)
	mine := text(l.post("/images", object{"name": "mine"}), "id")
	l.post("/images", object{"name": "other"})
	foreign := func(method, p string, body any) *apitest.Response {
		t.Helper()
		return l.Do(apitest.Request{Method: method, Path: path(p), Body: body, As: l.Other.IAMID})
	}
	for _, method := range []string{"GET", "PATCH", "DELETE"} {
		wantError(t, foreign(method, "/images/"+mine, object{"name": "taken"}), 404, "not_found")
	}
	wantError(t, foreign("PUT", "/images/"+mine+"/file", string(disk())), 404, "not_found")
	if n := len(items(foreign("GET", "/images", nil).Want(200), "images")); n != 1 {
		t.Errorf("the other account sees %d images; only the stock one is for all", n)
	}
	for query, want := range map[string]int{
		"": 3, "visibility=private": 2, "visibility=public": 1, "status=pending": 2, "name=mine": 1, "resource_group.id=none": 0, "status=failed,available": 1,
	} {
		if n := len(items(l.get("/images?"+query), "images")); n != want {
			t.Errorf("images with %q: %d, want %d", query, n, want)
		}
	}
	l.grantOn(operator, "Editor", map[string]string{access.ServiceName: "is", "imageId": mine})
	listed := l.call(operator, "GET", "/images", nil).Want(200)
	if len(items(listed, "images")) != 1 || text(listed, "images", 0, "id") != mine {
		t.Errorf("an editor of one image sees %v", listed)
	}
	l.upload(operator, mine, bytes.NewReader(disk()), nil).Want(200)
	l.Grant(nobody, "is", "Operator")
	other := text(l.get("/images?name=other"), "images", 0, "id")
	wantError(t, l.upload(nobody, other, bytes.NewReader(disk()), nil), 403, "not_authorized")
	wantError(t, l.call(nobody, "POST", "/images", object{}), 403, "not_authorized")
}

func TestRulesOfImages(t *testing.T) {
	l := newLibrary(t)
	l.post("/images", object{"name": "taken"})
	for _, test := range []struct {
		body   object
		status int
		code   string
	}{
		{object{"name": "taken"}, 409, "validation_unique_failed"},
		{object{"name": "tabard-local-1"}, 409, "validation_unique_failed"},
		{object{"name": "Not-Valid"}, 400, "validation_invalid_name"},
		{object{"operating_system": object{"name": "none"}}, 404, "not_found"},
		{object{"operating_system": object{"name": "local-linux"}}, 404, "not_found"},
		{object{"operating_system": object{}}, 400, "validation_required_field"},
		{object{"file": object{"checksums": object{"sha256": "abc"}}}, 400, "bad_field"},
		{object{"source_volume": object{"id": "r006-x"}}, 400, "bad_field"},
		{object{"encryption_key": object{"crn": "crn:v1"}}, 400, "bad_field"},
		{object{"resource_group": object{"id": "none"}}, 404, "not_found"},
	} {
		wantError(t, l.call("", "POST", "/images", test.body), test.status, test.code)
	}
	byHref := l.post("/images", object{"operating_system": object{"href": "https://us-south.iaas.cloud.ibm.com/v1/operating_systems/ubuntu-24-04-amd64"}})
	if text(byHref, "operating_system", "vendor") != "Canonical" || !strings.HasPrefix(text(byHref, "name"), "image-") {
		t.Errorf("by href: %v", byHref)
	}
	id := text(byHref, "id")
	if got := l.call("", "PATCH", "/images/"+id, object{"name": "renamed"}).Want(200); got["name"] != "renamed" {
		t.Errorf("renamed: %v", got["name"])
	}
	wantError(t, l.call("", "PATCH", "/images/"+id, object{"name": "taken"}), 409, "validation_unique_failed")
	wantError(t, l.call("", "PATCH", "/images/"+stockImage, object{"name": "mine"}), 409, "invalid_state")
	wantError(t, l.call("", "DELETE", "/images/"+stockImage, nil), 409, "invalid_state")
	plain := newWorld(t)
	wantError(t, plain.call("", "POST", "/images", object{}), 400, "bad_request")
}
