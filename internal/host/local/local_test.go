package local

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/vpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo answers with what a handler of the metadata service sees.
func echo(id string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s host=%s in-url=%q uri=%s proxy=%q", id, r.Method, r.Host, r.URL.Host, r.RequestURI,
			r.Header.Get("Proxy-Connection")+r.Header.Get("Proxy-Authorization"))
	})
}

func start(t *testing.T, ids ...string) (host.Driver, []host.Access) {
	t.Helper()
	d := New(Config{})
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	var all []host.Access
	for _, id := range ids {
		h := host.Handlers{Metadata: echo(id), ServerAddrs: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.7:8470"), netip.MustParseAddrPort("127.0.0.1:8470"), netip.MustParseAddrPort("0.0.0.0:8471")}}
		if err := d.Start(context.Background(), host.Machine{ID: id, Metadata: vpc.MetadataService{Enabled: true, Protocol: "http"}}, h); err != nil {
			t.Fatal(err)
		}
		a, ok := d.Access(id)
		if !ok {
			t.Fatalf("%s can't be accessed", id)
		}
		all = append(all, a)
	}
	return d, all
}

// raw sends a request as written and returns the answer's status and body.
func raw(t *testing.T, a host.Access, request string) (int, string) {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(a.Environment["TABARD_METADATA_URL"], "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	io.WriteString(c, request)
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("%q: %v", request, err)
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(body)
}

func TestAProgramReachesTheMetadataServiceOfItsOwnMachine(t *testing.T) {
	_, all := start(t, "0717_a", "0717_b")
	for n, id := range []string{"0717_a", "0717_b"} {
		proxy, err := url.Parse(all[n].Environment["http_proxy"])
		if err != nil {
			t.Fatal(err)
		}
		c := http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(proxy), DisableKeepAlives: true}}
		for _, name := range []string{"169.254.169.254", "api.metadata.cloud.ibm.com"} {
			res, err := c.Get("http://" + name + "/metadata/v1/instance?version=2022-03-31")
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(res.Body)
			res.Body.Close()
			want := id + " GET host=" + name + ` in-url="" uri=/metadata/v1/instance?version=2022-03-31 proxy=""`
			if string(body) != want {
				t.Errorf("got  %s\nwant %s", body, want)
			}
		}
	}
}

func TestCurlWithTheMachinesEnvironmentWorksVerbatim(t *testing.T) {
	_, all := start(t, "0717_a")
	curl := exec.Command("curl", "-sS", "--max-time", "5", "-X", "PUT",
		"http://169.254.169.254/instance_identity/v1/token?version=2022-03-31", "-H", "Metadata-Flavor: ibm", "-d", `{"expires_in": 600}`)
	curl.Env = []string{"PATH=" + os.Getenv("PATH")}
	for k, v := range all[0].Environment {
		curl.Env = append(curl.Env, k+"="+v)
	}
	out, err := curl.CombinedOutput()
	want := `0717_a PUT host=169.254.169.254 in-url="" uri=/instance_identity/v1/token?version=2022-03-31 proxy=""`
	if string(out) != want {
		t.Errorf("got  %s, %v\nwant %s", out, err, want)
	}
}

func TestTheEnvironmentSendsRequestsForTheServerPastTheProxy(t *testing.T) {
	_, all := start(t, "0717_a")
	e := all[0].Environment
	if e["no_proxy"] != "127.0.0.1,192.0.2.7,localhost" {
		t.Errorf("no_proxy is %q", e["no_proxy"])
	}
	if e["http_proxy"] != e["TABARD_METADATA_URL"] || !strings.HasPrefix(e["http_proxy"], "http://127.0.0.1:") {
		t.Errorf("the environment is %v", e)
	}
	e["http_proxy"] = "changed"
	d, _ := start(t, "0717_b")
	if b, _ := d.Access("0717_b"); b.Environment["http_proxy"] == "changed" {
		t.Error("the environment is shared with the caller")
	}
}

func TestTheListenerIsNoProxyForOtherHosts(t *testing.T) {
	_, all := start(t, "0717_a")
	own := strings.TrimPrefix(all[0].Environment["http_proxy"], "http://")
	const near = "169.254.169.254"
	for request, want := range map[string]int{
		"GET http://example.com/ HTTP/1.1\r\nHost: " + near + "\r\n\r\n":              403,
		"GET http://" + near + ".example.com/ HTTP/1.1\r\nHost: " + near + "\r\n\r\n": 403,
		"GET http://" + near + ":8080/ HTTP/1.1\r\nHost: " + near + "\r\n\r\n":        403,
		"GET http://" + near + "@example.com/ HTTP/1.1\r\nHost: " + near + "\r\n\r\n": 403,
		"GET http://127.0.0.1:8470/ HTTP/1.1\r\nHost: " + near + "\r\n\r\n":           403,
		"GET http://" + own + "/ HTTP/1.1\r\nHost: " + own + "\r\n\r\n":               403,
		"GET https://" + near + "/ HTTP/1.1\r\nHost: " + near + "\r\n\r\n":            403,
		"GET ftp://" + near + "/ HTTP/1.1\r\nHost: " + near + "\r\n\r\n":              403,
		"CONNECT " + near + ":80 HTTP/1.1\r\nHost: " + near + "\r\n\r\n":              405,
		"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n":           405,
		"GET / HTTP/1.1\r\nHost: rebound.example.com\r\n\r\n":                         403,
		"GET / HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n":                                 403,
		"GET / HTTP/1.0\r\n\r\n": 403,
		"GET http://" + near + ":80/x HTTP/1.1\r\nHost: example.com\r\n\r\n":                         200,
		"GET http://API.Metadata.Cloud.IBM.com HTTP/1.1\r\nHost: x\r\n\r\n":                          200,
		"GET /x HTTP/1.1\r\nHost: " + own + "\r\n\r\n":                                               200,
		"GET /x HTTP/1.1\r\nHost: " + strings.Replace(own, "127.0.0.1", "localhost", 1) + "\r\n\r\n": 200,
	} {
		if got, body := raw(t, all[0], request); got != want {
			t.Errorf("%q: %d %s, want %d", request, got, body, want)
		}
	}
}

func TestADirectRequestLooksLikeOneTo169_254_169_254(t *testing.T) {
	_, all := start(t, "0717_a")
	own := strings.TrimPrefix(all[0].Environment["http_proxy"], "http://")
	_, body := raw(t, all[0], "GET /a%2Fb?c HTTP/1.1\r\nHost: "+own+"\r\nProxy-Authorization: Basic eDp5\r\n\r\n")
	if want := `0717_a GET host=169.254.169.254 in-url="" uri=/a%2Fb?c proxy=""`; body != want {
		t.Errorf("got  %s\nwant %s", body, want)
	}
}

// Its requests must not leave for the real link-local address either.
func TestAMachineWithItsMetadataServiceOffReachesNothing(t *testing.T) {
	d := New(Config{})
	defer d.Close()
	if err := d.Start(context.Background(), host.Machine{ID: "0717_a"}, host.Handlers{Metadata: echo("0717_a")}); err != nil {
		t.Fatal(err)
	}
	a, ok := d.Access("0717_a")
	if !ok || a.Driver != "local" || a.Environment["http_proxy"] != nowhere || a.Environment["TABARD_METADATA_URL"] != "" {
		t.Errorf("access: %v %v", a, ok)
	}
	if c, err := net.Dial("tcp", strings.TrimPrefix(nowhere, "http://")); err == nil {
		c.Close()
		t.Error("somebody serves where nobody should")
	}
}

func TestStopClosesTheListenerAndMayBeRepeated(t *testing.T) {
	d, all := start(t, "0717_a")
	for range 2 {
		if err := d.Stop(context.Background(), "0717_a", true); err != nil {
			t.Fatal(err)
		}
	}
	if c, err := net.Dial("tcp", strings.TrimPrefix(all[0].Environment["http_proxy"], "http://")); err == nil {
		c.Close()
		t.Error("the listener is open after Stop")
	}
	if _, ok := d.Access("0717_a"); ok {
		t.Error("a stopped machine can be accessed")
	}
}

func TestOneMachineStartedManyTimesAtOnceRunsOnce(t *testing.T) {
	d := New(Config{})
	defer d.Close()
	m, h := host.Machine{ID: "0717_a", Metadata: vpc.MetadataService{Enabled: true, Protocol: "http"}}, host.Handlers{Metadata: echo("0717_a")}
	var started sync.Map
	var each sync.WaitGroup
	for n := range 8 {
		each.Go(func() {
			if d.Start(context.Background(), m, h) == nil {
				started.Store(n, true)
			}
		})
	}
	each.Wait()
	count := 0
	started.Range(func(any, any) bool { count++; return true })
	if count != 1 {
		t.Errorf("started %d times", count)
	}
}

func TestAClosedDriverStartsNone(t *testing.T) {
	d := New(Config{})
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(context.Background(), host.Machine{ID: "0717_a"}, host.Handlers{}); err == nil {
		t.Error("a closed driver started a machine")
	}
	if err := d.Stop(context.Background(), "0717_a", true); err != nil {
		t.Error(err)
	}
}

func TestTheMetadataServiceFollowsALiveMachine(t *testing.T) {
	d := New(Config{})
	t.Cleanup(func() { _ = d.Close() })
	m := host.Machine{ID: "0717_a", Metadata: vpc.MetadataService{Enabled: true, Protocol: "http"}}
	if err := d.Start(context.Background(), m, host.Handlers{Metadata: echo("0717_a")}); err != nil {
		t.Fatal(err)
	}
	url := func() string {
		a, ok := d.Access("0717_a")
		if !ok {
			t.Fatal("the machine does not run")
		}
		return a.Environment["TABARD_METADATA_URL"]
	}
	before := url()
	for _, off := range []vpc.MetadataService{{Enabled: false, Protocol: "http"}, {Enabled: true, Protocol: "https"}} {
		m.Metadata = off
		if err := d.Update(context.Background(), m); err != nil {
			t.Fatal(err)
		}
		if url() != "" {
			t.Errorf("with %+v there is still %s", off, url())
		}
		if r, err := http.Get(before); err == nil {
			r.Body.Close()
			t.Errorf("with %+v the old listener answers", off)
		}
	}
	m.Metadata = vpc.MetadataService{Enabled: true, Protocol: "http"}
	if err := d.Update(context.Background(), m); err != nil {
		t.Fatal(err)
	}
	r, err := http.Get(url())
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
}
