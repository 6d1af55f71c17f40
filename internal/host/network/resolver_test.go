package network

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

func queryOf(t testing.TB, id uint16, q dnsmessage.Question, payload int) []byte {
	t.Helper()
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: id, RecursionDesired: true})
	err := errors.Join(b.StartQuestions(), b.Question(q))
	if payload > 0 {
		var opt dnsmessage.ResourceHeader
		err = errors.Join(err, b.StartAdditionals(), opt.SetEDNS0(payload, 0, true), b.OPTResource(opt, dnsmessage.OPTResource{}))
	}
	m, finish := b.Finish()
	if err := errors.Join(err, finish); err != nil {
		t.Fatal(err)
	}
	return m
}

func addressQuestion(name string) dnsmessage.Question {
	return dnsmessage.Question{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}
}

func queryFor(t testing.TB, id uint16, name string, edns bool) []byte {
	payload := 0
	if edns {
		payload = 4096
	}
	return queryOf(t, id, addressQuestion(name), payload)
}

// addressIn returns the one address of an answer.
func addressIn(t testing.TB, answer []byte, id uint16) string {
	t.Helper()
	var m dnsmessage.Message
	if answer == nil {
		return "no answer"
	}
	if err := m.Unpack(answer); err != nil {
		t.Fatalf("%x: %v", answer, err)
	}
	if m.ID != id || !m.Response {
		t.Errorf("the answer is not to query %d: %v", id, m.Header)
	}
	if len(m.Answers) != 1 {
		return m.RCode.String()
	}
	a, ok := m.Answers[0].Body.(*dnsmessage.AResource)
	if !ok {
		return m.GoString()
	}
	return netip.AddrFrom4(a.A).String()
}

// refuses fails the test when it is asked.
func never(t *testing.T) forwarder {
	return func(context.Context, bool, []byte) ([]byte, error) {
		t.Error("the question was passed on")
		return nil, errors.New("not asked for")
	}
}

func TestTheMetadataNameIsNeverAskedForElsewhere(t *testing.T) {
	for _, name := range []string{metadataName, strings.ToUpper(metadataName)} {
		for _, kind := range []dnsmessage.Type{dnsmessage.TypeAAAA, dnsmessage.TypeTXT, dnsmessage.TypeNS, 65} {
			q := addressQuestion(name)
			q.Type = kind
			var m dnsmessage.Message
			if err := m.Unpack(resolve(t.Context(), queryOf(t, 3, q, 0), false, never(t))); err != nil {
				t.Fatal(err)
			}
			if m.RCode != dnsmessage.RCodeSuccess || len(m.Answers) != 0 {
				t.Errorf("%s %s: %v", name, kind, m)
			}
		}
	}
}

func TestWhatIsNoQuestionGetsNoAnswerOrAnError(t *testing.T) {
	good := queryFor(t, 7, "example.com.", false)
	change := func(at int, b byte) []byte {
		q := slices.Clone(good)
		q[at] = b
		return q
	}
	class := addressQuestion("example.com.")
	class.Class = dnsmessage.ClassCHAOS
	for what, each := range map[string]struct {
		query []byte
		want  int // RCODE, or -1 for no answer
	}{
		"nothing":              {nil, -1},
		"half a header":        {good[:7], -1},
		"an answer":            {change(2, 0x81), -1},
		"a status request":     {change(2, 0x11), 4},
		"no question":          {change(5, 0), 1},
		"two questions":        {append(change(5, 2), good[12:]...), 1},
		"a question too few":   {change(5, 2), 1},
		"a cut question":       {good[:20], 1},
		"records that lack":    {change(7, 1), 1},
		"a name that is loops": {append(slices.Clone(good[:12]), 0xc0, 12, 0, 1, 0, 1), 1},
		"another class":        {queryOf(t, 7, class, 0), 5},
	} {
		got := resolve(t.Context(), each.query, false, never(t))
		switch {
		case each.want < 0 && got != nil:
			t.Errorf("%s: %x", what, got)
		case each.want >= 0 && (len(got) < 12 || int(got[3]&15) != each.want || binary.BigEndian.Uint16(got) != 7):
			t.Errorf("%s: %x, want RCODE %d", what, got, each.want)
		}
	}
}

func TestNothingButNameAndTypeIsPassedOn(t *testing.T) {
	q := queryOf(t, 7, addressQuestion("example.com."), 4096)
	q = append(q, "smuggled"...)
	resolve(t.Context(), q, false, func(_ context.Context, _ bool, out []byte) ([]byte, error) {
		if bytes.Contains(out, []byte("smuggled")) {
			t.Errorf("passed on: %x", out)
		}
		var m dnsmessage.Message
		if err := m.Unpack(out); err != nil {
			t.Error(err)
		}
		if m.Questions[0] != addressQuestion("example.com.") || !m.Additionals[0].Header.DNSSECAllowed() || int(m.Additionals[0].Header.Class) != maxPayload {
			t.Errorf("passed on: %v", m)
		}
		return nil, errors.New("that is all")
	})
}

func TestAnAnswerToAnotherQuestionIsAFailure(t *testing.T) {
	for what, answer := range map[string]func(q []byte) []byte{
		"another id":       func(q []byte) []byte { q[0]++; q[2] |= 0x80; return q },
		"another name":     func(q []byte) []byte { q[2] |= 0x80; q[13] = 'x'; return q },
		"a query":          func(q []byte) []byte { return q },
		"nothing":          func(q []byte) []byte { return nil },
		"no question":      func(q []byte) []byte { q[2] |= 0x80; q[5] = 0; return q[:12] },
		"half an answer":   func(q []byte) []byte { q[2] |= 0x80; return q[:14] },
		"another question": func(q []byte) []byte { q[2] |= 0x80; q[len(q)-3] = 28; return q },
	} {
		got := resolve(t.Context(), queryFor(t, 7, "example.com.", false), false, func(_ context.Context, _ bool, q []byte) ([]byte, error) {
			return answer(slices.Clone(q)), nil
		})
		if len(got) < 12 || got[3]&15 != 2 {
			t.Errorf("%s: %x, want SERVFAIL", what, got)
		}
	}
}

func TestALongAnswerIsCutForADatagramButNotForAStream(t *testing.T) {
	long := func(_ context.Context, _ bool, q []byte) ([]byte, error) {
		a := append(slices.Clone(q), make([]byte, 1000)...)
		a[2] |= 0x80
		return a, nil
	}
	q := queryFor(t, 7, "example.com.", false)
	if got := resolve(t.Context(), q, false, long); len(got) > plainPayload || got[2]&2 == 0 {
		t.Errorf("a datagram of %d bytes: %x", len(got), got[:4])
	}
	if got := resolve(t.Context(), q, true, long); len(got) < 1000 {
		t.Errorf("a stream of %d bytes", len(got))
	}
	if got := resolve(t.Context(), queryFor(t, 7, "example.com.", true), false, long); len(got) < 1000 {
		t.Errorf("a datagram of %d bytes for a machine that takes more", len(got))
	}
}

func TestTheHostsResolversAreReadFromItsFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	text := "# nameserver 192.0.2.9\nsearch example.com\nnameserver 192.0.2.1\nnameserver nonsense\nnameserver\nnameserver ::1\nnameserver 192.0.2.2\nnameserver 192.0.2.3\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := hostResolvers(file)
	want := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53"), netip.MustParseAddrPort("[::1]:53"), netip.MustParseAddrPort("192.0.2.2:53")}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
}

// Whatever comes, what goes back is a response with the same id, and one that
// fits.
func FuzzQueries(f *testing.F) {
	f.Add(queryFor(f, 7, metadataName, true), []byte{}, false)
	f.Add(queryFor(f, 7, "example.com.", false), queryFor(f, 7, "example.com.", true), true)
	f.Fuzz(func(t *testing.T, query, upstream []byte, overTCP bool) {
		answer := resolve(context.Background(), query, overTCP, func(_ context.Context, _ bool, q []byte) ([]byte, error) {
			// An upstream that answers the question, with the rest at will.
			if len(upstream) == 0 {
				return nil, errors.New("none")
			}
			a := append(slices.Clone(q), upstream...)
			a[2] |= 0x80
			return a, nil
		})
		if answer == nil {
			return
		}
		if len(answer) < 12 || !bytes.Equal(answer[:2], query[:2]) || answer[2]&0x80 == 0 {
			t.Errorf("%x is no answer to %x", answer, query)
		}
		if !overTCP && len(answer) > maxPayload {
			t.Errorf("an answer of %d bytes", len(answer))
		}
	})
}
