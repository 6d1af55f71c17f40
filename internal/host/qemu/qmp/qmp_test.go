package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}}, "capabilities": []}}`

// peer plays QEMU: it greets and then answers each command by what answer
// returns.
func peer(t *testing.T, hello string, answer func(id uint64, command string) string) net.Conn {
	t.Helper()
	near, far := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		fmt.Fprint(far, hello)
		lines := bufio.NewScanner(far)
		for lines.Scan() {
			var c struct {
				Execute string
				ID      uint64
			}
			json.Unmarshal(lines.Bytes(), &c)
			fmt.Fprintln(far, answer(c.ID, c.Execute))
		}
	}()
	t.Cleanup(func() { far.Close(); <-done; goleak.VerifyNone(t) })
	return near
}

func agrees(id uint64, command string) string { return fmt.Sprintf(`{"return": {}, "id": %d}`, id) }

func TestACommandReturnsWhatQEMUAnswers(t *testing.T) {
	c, err := New(t.Context(), peer(t, greeting+"\n", func(id uint64, command string) string {
		if command == "query-status" {
			return fmt.Sprintf(`{"return": {"status": "running"}, "id": %d}`, id)
		}
		return agrees(id, command)
	}), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var out struct{ Status string }
	if err := c.Execute(t.Context(), "query-status", nil, &out); err != nil || out.Status != "running" {
		t.Errorf("got %q, %v", out.Status, err)
	}
}

func TestARefusedCommandNamesTheReason(t *testing.T) {
	c, err := New(t.Context(), peer(t, greeting+"\n", func(id uint64, command string) string {
		if command == "cont" {
			return fmt.Sprintf(`{"error": {"class": "GenericError", "desc": "no"}, "id": %d}`, id)
		}
		return agrees(id, command)
	}), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var refused *Error
	if err := c.Execute(t.Context(), "cont", nil, nil); !errors.As(err, &refused) || refused.Description != "no" {
		t.Errorf("got %v", err)
	}
}

func TestEventsComeInTheirOrderBetweenAnswers(t *testing.T) {
	var seen []string
	c, err := New(t.Context(), peer(t, greeting+"\n", func(id uint64, command string) string {
		return fmt.Sprintf(`{"event": "RESET"}`+"\n"+`{"event": "SHUTDOWN", "data": {"guest": true}}`+"\n"+`{"return": {}, "id": %d}`, id)
	}), func(e Event) { seen = append(seen, e.Name) })
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if got := strings.Join(seen, " "); got != "RESET SHUTDOWN" {
		t.Errorf("got %q", got)
	}
}

func TestAnAnswerThatNobodyWaitsForIsDropped(t *testing.T) {
	c, err := New(t.Context(), peer(t, greeting+"\n", func(id uint64, command string) string {
		return `{"return": {"status": "wrong"}, "id": 999}` + "\n" + agrees(id, command)
	}), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	out := map[string]string{}
	if err := c.Execute(t.Context(), "query-status", nil, &out); err != nil || len(out) > 0 {
		t.Errorf("got %v, %v", out, err)
	}
}

func TestAPeerThatIsNotQEMUIsRefused(t *testing.T) {
	for name, hello := range map[string]string{
		"garbage":             "SSH-2.0-OpenSSH\n",
		"no greeting":         `{"return": {}, "id": 1}` + "\n",
		"an event first":      `{"event": "STOP"}` + "\n",
		"two kinds in one":    `{"QMP": {}, "return": {}}` + "\n",
		"a line without end":  strings.Repeat("a", MaxLine+1),
		"a list":              "[]\n",
		"an unfinished value": "{\n",
	} {
		t.Run(name, func(t *testing.T) {
			c, err := New(t.Context(), peer(t, hello, agrees), nil)
			if err == nil {
				c.Close()
				t.Error("it was taken for QEMU")
			}
		})
	}
}

func TestASilentPeerIsLeftWhenTheContextEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := New(ctx, peer(t, "", agrees), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestCommandsFailOnceThePeerIsGone(t *testing.T) {
	near, far := net.Pipe()
	go func() {
		fmt.Fprintln(far, greeting)
		bufio.NewReader(far).ReadString('\n')
		fmt.Fprintln(far, agrees(1, ""))
		bufio.NewReader(far).ReadString('\n')
		far.Close()
	}()
	c, err := New(t.Context(), near, nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := c.Execute(t.Context(), "cont", nil, nil); !errors.Is(err, io.EOF) {
			t.Errorf("got %v", err)
		}
	}
	<-c.Done()
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(greeting))
	f.Add([]byte(`{"return": {}, "id": 1}`))
	f.Add([]byte(`{"error": {"class": "GenericError", "desc": "no"}, "id": 1}`))
	f.Add([]byte(`{"timestamp": {"seconds": 1}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		m, err := decode(line)
		if err != nil {
			return
		}
		switch {
		case m.greeting(), m.Event != "", m.Error != nil:
			return
		case m.Return == nil:
			t.Fatalf("%q is of no kind", line)
		}
		var out any
		_ = m.result("x", &out)
	})
}
