package metadata

import (
	"encoding/json"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/fault"
)

// Whatever the body, it is an object with each property once, or it is refused
// with one of the codes that the reference has.
func FuzzBody(f *testing.F) {
	for _, s := range []string{
		``, `{}`, `null`, `{"expires_in":600}`, `{"a":1,"a":2}`, `{"a":{"b":null}}`, `[1]`, `{"a":1}{}`, `{"a":1}]`, `{"\u0061":1,"a":2}`, "\ufeff{}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parse("", b)
		if err != nil {
			if code := fault.Of(err).Code; code != "invalid_request" && code != "invalid_value" {
				t.Errorf("code %s", code)
			}
			return
		}
		var want map[string]json.RawMessage
		if err := json.Unmarshal(b, &want); err != nil {
			t.Fatalf("%q is taken: %v", b, err)
		}
		if len(want) != len(got.values) {
			t.Errorf("%q has the properties %v, read as %v", b, want, got.values)
		}
		for name, v := range got.values {
			if string(want[name]) != string(v) {
				t.Errorf("%q: %s is %s, want %s", b, name, v, want[name])
			}
		}
	})
}

func TestALongNameOfAPropertyDoesNotComeBackInFull(t *testing.T) {
	long := strings.Repeat("x", 5000)
	for _, body := range []string{`{"` + long + `":1}`, `{"` + long + `":1,"` + long + `":2}`} {
		f, err := parse("", []byte(body))
		if err == nil {
			err = f.end()
		}
		if err == nil || len(fault.Of(err).Message) > 1000 || len(fault.Of(err).Target.Name) > 1000 {
			t.Errorf("error %.100v", err)
		}
	}
}
