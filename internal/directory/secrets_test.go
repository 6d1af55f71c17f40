package directory

import (
	"encoding/json"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/activity"
)

// vetted are fields that sound like secrets and are none.
var vetted = []string{
	"Settings.AccessTokenLife", "Settings.RefreshTokenLife", "Settings.RestrictCreateAPIKey",
	"Key.APIKeyID", "Key.PublicKey", "Instance.KeyIDs", "Attribute.Key", "Rule.Key", "Instance.Metadata", "AttributeDefinition.Key",
}

// TestNoFieldThatCanHoldASecretIsToldInEvents wants a decision about each field
// of each stored object that sounds like a secret, or can hold anything.
func TestNoFieldThatCanHoldASecretIsToldInEvents(t *testing.T) {
	suspicious := regexp.MustCompile(`(?i)secret|token|passw|priv|hash|seal|cred|key|data|param|any`)
	seen := map[reflect.Type]bool{}
	var walk func(reflect.Type)
	walk = func(typ reflect.Type) {
		switch typ.Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Map, reflect.Array:
			walk(typ.Elem())
			return
		case reflect.Struct:
		default:
			return
		}
		if seen[typ] || !strings.HasPrefix(typ.PkgPath(), "tabard.dev/") {
			return
		}
		seen[typ] = true
		for i := range typ.NumField() {
			f := typ.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			where := typ.Name() + "." + f.Name
			bytes := f.Type == reflect.TypeFor[json.RawMessage]() || f.Type == reflect.TypeFor[[]byte]() // hidden whatever they are called
			hidden := activity.Secret(name) || bytes || name == "-" || !f.IsExported()
			switch {
			case hidden || f.Type.Kind() == reflect.Bool:
			case f.Type.Kind() == reflect.Interface:
				t.Errorf("%s can hold anything and is told in events", where)
			case suspicious.MatchString(f.Name) && !slices.Contains(vetted, where):
				t.Errorf("%s sounds like a secret and is told in events: hide it by its name %q in package activity, or vet it here", where, name)
			}
			if !hidden {
				walk(f.Type)
			}
		}
	}
	directory := reflect.TypeFor[Directory]()
	tables := 0
	for i := range directory.NumField() {
		f := directory.Field(i)
		if !strings.HasPrefix(f.Type.String(), "*directory.Table[") {
			continue
		}
		get, ok := f.Type.MethodByName("Get")
		if !ok {
			t.Fatalf("%s has no Get", f.Name)
		}
		tables++
		walk(get.Type.Out(0))
	}
	if tables < 40 {
		t.Errorf("only %d tables", tables)
	}
}
