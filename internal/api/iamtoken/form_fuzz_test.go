package iamtoken

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/fault"
)

// FuzzForm feeds the token endpoint's form parser: it must take each field once
// or refuse with a fault that is the caller's, and what it takes must be what
// the form says.
func FuzzForm(f *testing.F) {
	for _, body := range []string{
		"", "grant_type=apikey&apikey=x", "grant_type=a&grant_type=b", "cr_token=a.b.c%0A&profile_name=my+prof",
		"a=%zz", "a=1;b=2", strings.Repeat("a=1&", 40), "=&=&", "profile_id=%00", "a=\xff\xfe", "a[]=1&a[]=2",
	} {
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body string) {
		r := httptest.NewRequest(http.MethodPost, "/identity/token?grant_type=from-the-url", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		got, err := new(handler).form(httptest.NewRecorder(), r)
		if err != nil {
			if k := fault.Of(err).Kind; k != fault.Invalid && k != fault.TooLarge {
				t.Fatalf("kind %v: %v", k, err)
			}
			return
		}
		want, err := url.ParseQuery(body)
		if err != nil {
			t.Fatalf("took a body that is no form: %q", body)
		}
		if len(got) != len(want) {
			t.Fatalf("%d fields of %d", len(got), len(want))
		}
		for name, values := range want {
			if len(values) != 1 || got[name] != values[0] {
				t.Fatalf("field %q: %q of %q", name, got[name], values)
			}
		}
	})
}
