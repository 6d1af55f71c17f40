package crn_test

import (
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/crn"
)

const account = "4f1e0c00000000000000000000000001"

func TestParseSplitsACRNIntoItsSegments(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       crn.CRN
	}{
		{
			"an instance", "crn:v1:bluemix:public:is:us-south-1:a/" + account + "::instance:0717_1",
			crn.CRN{
				Version: "v1", CName: "bluemix", CType: "public", Service: "is", Location: "us-south-1",
				Scope: "a/" + account, ResourceType: "instance", Resource: "0717_1",
			},
		},
		{
			"a cluster", "crn:v1:bluemix:public:containers-kubernetes:us-south:a/" + account + ":c0ffee::",
			crn.CRN{
				Version: "v1", CName: "bluemix", CType: "public", Service: "containers-kubernetes", Location: "us-south",
				Scope: "a/" + account, Instance: "c0ffee",
			},
		},
		{
			"a role", "crn:v1:bluemix:public:iam::::role:Operator",
			crn.CRN{Version: "v1", CName: "bluemix", CType: "public", Service: "iam", ResourceType: "role", Resource: "Operator"},
		},
		{
			"another cloud's name", "crn:v1:staging:dedicated:is::::key:k",
			crn.CRN{Version: "v1", CName: "staging", CType: "dedicated", Service: "is", ResourceType: "key", Resource: "k"},
		},
		{
			"colons in the resource", "crn:v1:bluemix:public:cloud-object-storage:global::i:bucket:a:b::c:",
			crn.CRN{
				Version: "v1", CName: "bluemix", CType: "public", Service: "cloud-object-storage", Location: "global",
				Instance: "i", ResourceType: "bucket", Resource: "a:b::c:",
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := crn.Parse(tt.text)
			if err != nil {
				t.Fatal(err)
			}
			if got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
			if s := got.String(); s != tt.text {
				t.Errorf("formats as %q", s)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	good := "crn:v1:bluemix:public:is:us-south:a/1::instance:i"
	for _, tt := range []struct{ name, text string }{
		{"nothing", ""},
		{"one word", "crn"},
		{"a segment too few", "crn:v1:bluemix:public:is:us-south:a/1:instance:i"},
		{"another scheme", strings.Replace(good, "crn", "urn", 1)},
		{"the scheme in upper case", strings.Replace(good, "crn", "CRN", 1)},
		{"another version", strings.Replace(good, "v1", "v2", 1)},
		{"no version", strings.Replace(good, "v1", "", 1)},
		{"no cname", strings.Replace(good, "bluemix", "", 1)},
		{"no ctype", strings.Replace(good, "public", "", 1)},
		{"no service", strings.Replace(good, ":is:", "::", 1)},
		{"a leading space", " " + good},
		{"a trailing newline", good + "\n"},
		{"a NUL in the middle", strings.Replace(good, "instance", "inst\x00ance", 1)},
		{"a carriage return", strings.Replace(good, "instance", "inst\rance", 1)},
		{"a tab", strings.Replace(good, "instance", "inst\tance", 1)},
		{"a delete character", good + "\x7f"},
		{"an escape sequence", good + "\x1b[31m"},
		{"the realm of an IAM ID in front", "crn-" + good},
		{"a byte more than the limit", good + strings.Repeat("x", crn.MaxLength+1-len(good))},
		{"a megabyte of colons", "crn:v1:" + strings.Repeat(":", 1<<20)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := crn.Parse(tt.text)
			if !errors.Is(err, crn.ErrInvalid) {
				t.Fatalf("parsed as %+v, error %v", got, err)
			}
			if got != (crn.CRN{}) {
				t.Errorf("a refused CRN gave %+v", got)
			}
			if len(err.Error()) > 300 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

func TestParseTakesACRNOfExactlyTheLimit(t *testing.T) {
	text := "crn:v1:bluemix:public:is:us-south:a/1::instance:"
	text += strings.Repeat("x", crn.MaxLength-len(text))
	if _, err := crn.Parse(text); err != nil {
		t.Error(err)
	}
}

func TestSameLeavesOutOnlyTheNamesOfTheCloud(t *testing.T) {
	text := "crn:v1:bluemix:public:is:us-south:a/1:inst:kind:res"
	base := parse(t, text)
	for _, tt := range []struct {
		old, new string
		want     bool
	}{
		{"", "", true},
		{"bluemix", "staging", true},
		{"public", "dedicated", true},
		{":is:", ":kms:", false},
		{"us-south", "eu-de", false},
		{"us-south", "", false},
		{"a/1", "a/2", false},
		{"a/1", "o/1", false},
		{"inst", "inst2", false},
		{"kind", "Kind", false},
		{"res", "res:", false},
		{"res", "", false},
	} {
		other := parse(t, strings.Replace(text, tt.old, tt.new, 1))
		if got := base.Same(other); got != tt.want {
			t.Errorf("%s and %s: same = %t, want %t", base, other, got, tt.want)
		}
		if base.Same(other) != other.Same(base) {
			t.Errorf("%s and %s: same only one way round", base, other)
		}
	}
}

func TestAccountIDIsTheAccountInTheScope(t *testing.T) {
	for scope, want := range map[string]string{
		"a/" + account: account, "": "", "a/": "", "o/org": "", "s/space": "", "A/" + account: "", "a" + account: "",
	} {
		if got := (crn.CRN{Scope: scope}).AccountID(); got != want {
			t.Errorf("scope %q: account %q, want %q", scope, got, want)
		}
	}
}

func TestNamesBuildCRNsThatParse(t *testing.T) {
	c := crn.DefaultNames.Of("is", "us-south-1", account, "", "instance", "0717_1")
	if want := "crn:v1:bluemix:public:is:us-south-1:a/" + account + "::instance:0717_1"; c.String() != want {
		t.Errorf("got %s, want %s", c, want)
	}
	if parse(t, c.String()) != c || c.AccountID() != account {
		t.Errorf("%s does not survive formatting", c)
	}
	stock := crn.Names{CName: "staging", CType: "local"}.Of("is", "us-south", "", "", "image", "r006-1")
	if want := "crn:v1:staging:local:is:us-south:::image:r006-1"; stock.String() != want {
		t.Errorf("got %s, want %s", stock, want)
	}
}

func TestAnIAMIDIsClassifiedByItsForm(t *testing.T) {
	for _, tt := range []struct {
		id         string
		kind       crn.Kind
		realm      string
		identifier string
		bare       string
	}{
		{"IBMid-50AB", crn.KindUser, "IBMid", "50AB", "IBMid-50AB"},
		{"iam-Profile-0f3b", crn.KindProfile, "iam", "Profile-0f3b", "Profile-0f3b"},
		{"iam-ServiceId-0f3b", crn.KindServiceID, "iam", "ServiceId-0f3b", "ServiceId-0f3b"},
		{"crn-crn:v1:bluemix:public:is::::instance:i", crn.KindCRN, "crn", "crn:v1:bluemix:public:is::::instance:i", "crn-crn:v1:bluemix:public:is::::instance:i"},
		{"Profile-0f3b", crn.KindUnknown, "Profile", "0f3b", "Profile-0f3b"},
		{"iam-profile-0f3b", crn.KindUnknown, "iam", "profile-0f3b", "iam-profile-0f3b"},
		{"IAM-Profile-0f3b", crn.KindUser, "IAM", "Profile-0f3b", "IAM-Profile-0f3b"},
		{"iam-", crn.KindUnknown, "iam", "", "iam-"},
		{"crn-0f3b", crn.KindUnknown, "crn", "0f3b", "crn-0f3b"},
		{"ServiceId-0f3b", crn.KindUnknown, "ServiceId", "0f3b", "ServiceId-0f3b"},
		{"AccessGroupId-0f3b", crn.KindUnknown, "AccessGroupId", "0f3b", "AccessGroupId-0f3b"},
		{"iam-iam-Profile-0f3b", crn.KindUnknown, "iam", "iam-Profile-0f3b", "iam-iam-Profile-0f3b"},
		{"", crn.KindUnknown, "", "", ""},
		{"-", crn.KindUnknown, "", "", "-"},
		{"-Profile-0f3b", crn.KindUnknown, "", "Profile-0f3b", "-Profile-0f3b"},
		{"nobody", crn.KindUnknown, "nobody", "", "nobody"},
	} {
		if got := crn.KindOf(tt.id); got != tt.kind {
			t.Errorf("KindOf(%q) = %q, want %q", tt.id, got, tt.kind)
		}
		if got := crn.Realm(tt.id); got != tt.realm {
			t.Errorf("Realm(%q) = %q, want %q", tt.id, got, tt.realm)
		}
		if got := crn.Identifier(tt.id); got != tt.identifier {
			t.Errorf("Identifier(%q) = %q, want %q", tt.id, got, tt.identifier)
		}
		if got := crn.BareID(tt.id); got != tt.bare {
			t.Errorf("BareID(%q) = %q, want %q", tt.id, got, tt.bare)
		}
	}
}

func TestBareIDTakesBothFormsOfAnID(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		id := rapid.SampledFrom([]string{crn.ProfilePrefix, crn.ServiceIDPrefix}).Draw(t, "prefix") + rapid.String().Draw(t, "rest")
		if got := crn.BareID(crn.IAMID(id)); got != id {
			t.Fatalf("from the IAM ID: %q, want %q", got, id)
		}
		if got := crn.BareID(id); got != id {
			t.Fatalf("from the id: %q, want %q", got, id)
		}
	})
}

func TestTheIAMIDOfACRNIsOfKindCRN(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := drawCRN(t).String()
		id := crn.IAMIDOfCRN(text)
		if crn.KindOf(id) != crn.KindCRN || crn.Realm(id) != "crn" || crn.Identifier(id) != text || crn.BareID(id) != id {
			t.Fatalf("%q is of kind %q, realm %q, identifier %q", id, crn.KindOf(id), crn.Realm(id), crn.Identifier(id))
		}
	})
}

func TestOnlyThirtyTwoLowerCaseHexDigitsAreAnAccountID(t *testing.T) {
	for id, want := range map[string]bool{
		account: true, strings.Repeat("f", 32): true, strings.Repeat("0", 32): true,
		"": false, account[:31]: false, account + "0": false, strings.ToUpper(account): false,
		strings.Repeat("g", 32): false, account[:31] + "\n": false, account[:31] + "\x00": false,
		account[:30] + "é": false, "a/" + account[2:]: false, "../" + account[3:]: false,
	} {
		if got := crn.ValidAccountID(id); got != want {
			t.Errorf("ValidAccountID(%q) = %t, want %t", id, got, want)
		}
	}
}

func parse(t *testing.T, s string) crn.CRN {
	t.Helper()
	c, err := crn.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var genSegment = rapid.StringMatching(`[a-zA-Z0-9_./é-]{0,8}`)

func drawCRN(t *rapid.T) crn.CRN {
	some := rapid.StringMatching(`[a-z0-9-]{1,8}`)
	return crn.CRN{
		Version: "v1", CName: some.Draw(t, "cname"), CType: some.Draw(t, "ctype"), Service: some.Draw(t, "service"),
		Location: genSegment.Draw(t, "location"), Scope: genSegment.Draw(t, "scope"), Instance: genSegment.Draw(t, "instance"),
		ResourceType: genSegment.Draw(t, "type"), Resource: rapid.StringMatching(`[a-zA-Z0-9:_/é-]{0,12}`).Draw(t, "resource"),
	}
}

func TestParseGivesBackWhatWasFormatted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := drawCRN(t)
		got, err := crn.Parse(c.String())
		if err != nil || got != c {
			t.Fatalf("%+v formats as %q, which parses as %+v, %v", c, c, got, err)
		}
	})
}

// FuzzParse demands that whatever parses formats as what it was parsed from,
// is the same resource as itself, and holds no byte that could break a log line.
func FuzzParse(f *testing.F) {
	f.Add("crn:v1:bluemix:public:is:us-south-1:a/" + account + "::instance:0717_1")
	f.Fuzz(func(t *testing.T, s string) {
		c, err := crn.Parse(s)
		if err != nil {
			if !errors.Is(err, crn.ErrInvalid) || c != (crn.CRN{}) {
				t.Fatalf("refused %q with %+v, %v", s, c, err)
			}
			return
		}
		if c.String() != s {
			t.Errorf("%q formats as %q", s, c.String())
		}
		if again, err := crn.Parse(c.String()); err != nil || again != c || !again.Same(c) {
			t.Errorf("%q parses as %+v and then as %+v, %v", s, c, again, err)
		}
		if len(s) > crn.MaxLength || strings.ContainsAny(s, "\n\r\x00\x1b \x7f") {
			t.Errorf("accepted %q", s)
		}
		if id := crn.IAMIDOfCRN(s); crn.KindOf(id) != crn.KindCRN || crn.Identifier(id) != s {
			t.Errorf("the IAM ID %q is of kind %q", id, crn.KindOf(id))
		}
	})
}
