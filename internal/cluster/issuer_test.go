package cluster_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/cluster"
)

const goodMapping = `{"claims":{"team":"org.team","sub":"sub"},"pin":[["team"]],"form":{"team":"[a-z]+"}}`

func TestAMappingIsReadStrictly(t *testing.T) {
	m, err := cluster.ParseMapping([]byte(goodMapping))
	if err != nil {
		t.Fatal(err)
	}
	if m.Claims["team"] != "org.team" || len(m.Pin) != 1 || m.Form["team"] != "[a-z]+" {
		t.Errorf("read as %+v", m)
	}
	if _, err := cluster.ParseMapping([]byte(`{"claims":{"a":"a"},"pin":[]}`)); err != nil {
		t.Errorf("a mapping that demands nothing and says so: %v", err)
	}
	many := map[string]string{}
	for i := range 101 {
		many[fmt.Sprint("c", i)] = "c"
	}
	tooMany, err := json.Marshal(many)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ text, want string }{
		"nothing":                        {``, "JSON"},
		"null":                           {`null`, "pin"},
		"a list":                         {`[]`, "JSON"},
		"no claims":                      {`{"claims":{},"pin":[]}`, "claims"},
		"no pin":                         {`{"claims":{"a":"a"}}`, "pin is missing"},
		"pin null":                       {`{"claims":{"a":"a"},"pin":null}`, "pin is missing"},
		"an unknown key":                 {`{"claims":{"a":"a"},"pin":[],"pins":[["a"]]}`, "pins"},
		"something after it":             {goodMapping + `{}`, "follows"},
		"an empty set":                   {`{"claims":{"a":"a"},"pin":[[]]}`, "set of pin"},
		"a pin that is not mapped":       {`{"claims":{"a":"a"},"pin":[["b"]]}`, `"b"`},
		"a pin on the issuer":            {`{"claims":{"a":"a"},"pin":[["issuer"]]}`, `"issuer"`},
		"a claim twice in a set":         {`{"claims":{"a":"a"},"pin":[["a","a"]]}`, "twice"},
		"the issuer from the token":      {`{"claims":{"issuer":"issuer"},"pin":[]}`, "taken"},
		"the CRN from the token":         {`{"claims":{"crn":"crn"},"pin":[]}`, "taken"},
		"the audience from the token":    {`{"claims":{"audience":"aud"},"pin":[]}`, "taken"},
		"the subject from another claim": {`{"claims":{"sub":"name"},"pin":[]}`, "sub"},
		"a claim without a name":         {`{"claims":{"":"a"},"pin":[]}`, "claim name"},
		"a claim of two lines":           {`{"claims":{"a\nb":"a"},"pin":[]}`, "claim name"},
		"a claim with a comma":           {`{"claims":{"a,operator":"a"},"pin":[]}`, "claim name"},
		"a long claim":                   {`{"claims":{"` + strings.Repeat("a", 101) + `":"a"},"pin":[]}`, "claim name"},
		"no place":                       {`{"claims":{"a":""},"pin":[]}`, "place"},
		"an empty member":                {`{"claims":{"a":"b..c"},"pin":[]}`, "place"},
		"a place that begins with a dot": {`{"claims":{"a":".b"},"pin":[]}`, "place"},
		"a deep place":                   {`{"claims":{"a":"1.2.3.4.5.6.7.8.9"},"pin":[]}`, "place"},
		"a long place":                   {`{"claims":{"a":"` + strings.Repeat("a", 201) + `"},"pin":[]}`, "place"},
		"a place with a NUL":             {`{"claims":{"a":"b\u0000"},"pin":[]}`, "place"},
		"too many claims":                {`{"claims":` + string(tooMany) + `,"pin":[]}`, "claims"},
		"too many sets":                  {`{"claims":{"a":"a"},"pin":[` + strings.Repeat(`["a"],`, 50) + `["a"]]}`, "sets"},
		"a form of nothing":              {`{"claims":{"a":"a"},"pin":[],"form":{"b":"x"}}`, "form"},
		"a form that is none":            {`{"claims":{"a":"a"},"pin":[],"form":{"a":"("}}`, "regular"},
		"a form that leaves its anchors": {`{"claims":{"a":"a"},"pin":[],"form":{"a":"a)|(?:.*"}}`, "regular"},
		"a long form":                    {`{"claims":{"a":"a"},"pin":[],"form":{"a":"` + strings.Repeat("a", 201) + `"}}`, "form"},
		"a long text":                    {`{"claims":{"a":"a"},"pin":[]}` + strings.Repeat(" ", cluster.MaxMapping), "longer"},
		"no UTF-8":                       {"{\"claims\":{\"a\":\"\xff\"},\"pin\":[]}", "UTF-8"},
	} {
		t.Run(name, func(t *testing.T) {
			if m, err := cluster.ParseMapping([]byte(tt.text)); err == nil || !strings.Contains(err.Error(), tt.want) || len(err.Error()) > 1000 {
				t.Errorf("%+v, error %v, want one about %q", m, err, tt.want)
			}
		})
	}
}

func TestAnIssuerIsChecked(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*cluster.Issuer)
		want   string // part of the error; empty for none
	}{
		"as it should be":         {func(*cluster.Issuer) {}, ""},
		"with keys and no URL":    {func(i *cluster.Issuer) { i.Issuer, i.JWKS = "ci", []byte("{}") }, ""},
		"no URL":                  {func(i *cluster.Issuer) { i.Issuer = "ci" }, "jwks"},
		"over plain HTTP":         {func(i *cluster.Issuer) { i.Issuer = "http://ci.example.com" }, "https"},
		"the metadata service":    {func(i *cluster.Issuer) { i.Issuer = "http://169.254.169.254" }, "https"},
		"no name":                 {func(i *cluster.Issuer) { i.Name = "" }, "name"},
		"a long name":             {func(i *cluster.Issuer) { i.Name = strings.Repeat("ä", 101) }, "name"},
		"a name of two lines":     {func(i *cluster.Issuer) { i.Name = "a\nb" }, "name"},
		"a name with a colon":     {func(i *cluster.Issuer) { i.Name = "a:b" }, "name"},
		"no issuer":               {func(i *cluster.Issuer) { i.Issuer = "" }, "issuer"},
		"no audience":             {func(i *cluster.Issuer) { i.Audience = "" }, "audience"},
		"a mapping without claim": {func(i *cluster.Issuer) { i.Mapping.Claims = nil }, "mapping"},
	} {
		i := &cluster.Issuer{Name: "ci", Issuer: "https://ci.example.com", Audience: "tabard", Mapping: cluster.SubjectOnly()}
		tt.change(i)
		switch err := i.Validate(); {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s: error %v, want one about %q", name, err, tt.want)
		}
	}
}

// FuzzParseMapping: whatever is accepted is bounded, can be read back as it was,
// and takes none of the claims that the registration makes.
func FuzzParseMapping(f *testing.F) {
	f.Add([]byte(goodMapping))
	f.Add([]byte(`{"claims":{"issuer":"iss"},"pin":[["issuer"]]}`))
	f.Add([]byte(`{"claims":{"a":"a"},"pin":[],"form":{"a":"(a|b)*"}}`))
	f.Add([]byte(`{"CLAIMS":{"a":"a"},"claims":{"crn":"b"},"pin":[]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := cluster.ParseMapping(b)
		if err != nil {
			return
		}
		for name, path := range m.Claims {
			if name == "issuer" || name == "crn" || name == "audience" || name == "sub" && path != "sub" || name == "" || path == "" {
				t.Errorf("claim %q from %q was accepted", name, path)
			}
		}
		for _, set := range m.Pin {
			for _, name := range set {
				if m.Claims[name] == "" {
					t.Errorf("pin on %q, which is not mapped", name)
				}
			}
		}
		text, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		again, err := cluster.ParseMapping(text)
		if err != nil {
			t.Fatalf("%s is not read back: %v", text, err)
		}
		if fmt.Sprint(again) != fmt.Sprint(m) {
			t.Errorf("%+v is read back as %+v", m, again)
		}
	})
}
