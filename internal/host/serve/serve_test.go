package serve

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T, from netip.Addr, h http.HandlerFunc, b Bounds) (*Group, string) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &Group{Log: slog.New(slog.DiscardHandler)}
	g.Serve(l.(*net.TCPListener), from, h, b)
	t.Cleanup(func() { g.Stop(context.Background()) })
	return g, l.Addr().String()
}

func ok(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok") }

// ask sends one request from a source address and returns all that comes back.
func ask(t *testing.T, source, addr string) string {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}, Timeout: 5 * time.Second}
	c, err := d.Dial("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
	all, _ := io.ReadAll(c)
	return string(all)
}

func TestAPeerWithAnotherAddressIsClosedWithoutAnAnswer(t *testing.T) {
	_, addr := start(t, netip.MustParseAddr("127.0.0.1"), ok, Metadata())
	if got := ask(t, "127.0.0.2", addr); got != "" {
		t.Errorf("an answer to a foreign address: %q", got)
	}
	if got := ask(t, "127.0.0.1", addr); got == "" {
		t.Error("no answer to the right address afterwards")
	}
}

func TestConnectionsBeyondTheBoundWaitForOneToEnd(t *testing.T) {
	b := Metadata()
	b.Conns = 1
	_, addr := start(t, netip.Addr{}, ok, b)
	idle, err := net.Dial("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan string, 1)
	go func() { got <- ask(t, "127.0.0.1", addr) }()
	select {
	case s := <-got:
		t.Fatalf("the second connection was served beside the first: %q", s)
	case <-time.After(200 * time.Millisecond):
	}
	idle.Close()
	if s := <-got; s == "" {
		t.Error("the second connection was not served after the first had ended")
	}
}

func TestASlowHeaderIsCutOff(t *testing.T) {
	b := Metadata()
	b.Header = 100 * time.Millisecond
	_, addr := start(t, netip.Addr{}, ok, b)
	c, err := net.Dial("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET / HTTP/1.1\r\nHost:")
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadAll(c); err != nil {
		t.Errorf("the connection was not closed: %v", err)
	}
}

func TestStopLetsARequestUnderWayFinish(t *testing.T) {
	entered := make(chan struct{})
	g, addr := start(t, netip.Addr{}, func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		time.Sleep(200 * time.Millisecond)
		ok(w, r)
	}, Metadata())
	got := make(chan string, 1)
	go func() { got <- ask(t, "127.0.0.1", addr) }()
	<-entered
	g.Stop(context.Background())
	if s := <-got; s == "" {
		t.Error("the request under way got no answer")
	}
	if c, err := net.Dial("tcp4", addr); err == nil {
		c.Close()
		t.Error("the listener is still open after Stop")
	}
}

func TestStopCutsOffARequestThatDoesNotEnd(t *testing.T) {
	entered := make(chan struct{})
	g, addr := start(t, netip.Addr{}, func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-r.Context().Done()
	}, Metadata())
	got := make(chan string, 1)
	go func() { got <- ask(t, "127.0.0.1", addr) }()
	<-entered
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	g.Stop(ctx)
	if s := <-got; s != "" {
		t.Errorf("an answer to a request that was cut off: %q", s)
	}
}
