package activity

import (
	"bytes"
	"encoding"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"tabard.dev/tabard/internal/object"
)

// Hidden stands in an event where a value must not: it is a secret, or of a form
// that can hold one.
const Hidden = "(hidden)"

// Values are what an event tells of an object, by the names under which the
// server keeps it; those of objects in it have dots between their parts.
type Values map[string]any

// Bounds on what an event tells of objects.
const (
	maxValues = 4 << 10 // bytes of all values of an event
	maxNames  = 1 << 10 // bytes of the names of those that are left out
	maxItems  = 20      // of a list, and objects beside the first
	maxDepth  = 6
)

// secretNames are the fields whose values never stand in an event, wherever they
// are. Fields that hold bytes or JSON of any form need no entry: of those only
// is told that they are there.
var secretNames = map[string]bool{
	"hash": true, "sealed": true, "priv": true, "private_key": true,
	"password": true, "secret": true, "client_secret": true, "token": true, "apikey": true, "api_key": true, "credentials": true,
	"user_data":    true,                                // of instances; holds what its author put there
	"parameters":   true,                                // of resource instances and keys, likewise
	"source":       true,                                // of images: a URL may be a signed one
	"ca":           true,                                // no secret, but long
	"jwks":         true,                                // likewise
	"value_string": true, "value_list_of_strings": true, // of preferences: nobody says what they are for
}

// Secret reports whether a field with this name is kept out of events.
func Secret(name string) bool { return secretNames[strings.ToLower(name)] }

// Describe returns what an event tells of an object that was made or removed.
func Describe(object any) Values {
	out := Values{}
	for name, field := range fieldsOf(reflect.ValueOf(object)) {
		if !empty(field) {
			out[name] = shown(name, field, 0)
		}
	}
	return out
}

// Diff returns the fields in which an object differs from what it was, each with
// its old and its new value. Of lists it tells what was added and removed.
func Diff(old, next any) Values {
	out := Values{}
	diff(out, "", reflect.ValueOf(old), reflect.ValueOf(next), 0)
	return out
}

func diff(out Values, of string, a, b reflect.Value, depth int) {
	before, after := fieldsOf(a), fieldsOf(b)
	names := slices.Collect(maps.Keys(before))
	for name := range after {
		if _, ok := before[name]; !ok {
			names = append(names, name)
		}
	}
	for _, name := range names {
		x, y := indirect(before[name]), indirect(after[name])
		if x.IsValid() && y.IsValid() && reflect.DeepEqual(x.Interface(), y.Interface()) {
			continue
		}
		path := of + clipName(name)
		if lists(x) && lists(y) && !Secret(name) {
			// Not compared as a whole: lists can be long, and their changes short.
			if told := listDiff(name, x, y); told != nil {
				out[path] = told
			}
			continue
		}
		if same(x, y) {
			continue
		}
		switch {
		case Secret(name) || opaque(x) || opaque(y):
			out[path] = Values{"old": shown(name, x, 0), "new": shown(name, y, 0)}
		case nests(x) && nests(y) && depth < maxDepth:
			diff(out, path+".", x, y, depth+1)
		default:
			out[path] = Values{"old": shown(name, x, 0), "new": shown(name, y, 0)}
		}
	}
}

// listDiff tells what is in one list and not in the other; a list that is only
// in another order is told as a whole. nil means that they are the same.
func listDiff(name string, whole, next reflect.Value) Values {
	a, b := whole, next
	for a.Len() > 0 && b.Len() > 0 && reflect.DeepEqual(a.Index(0).Interface(), b.Index(0).Interface()) {
		a, b = a.Slice(1, a.Len()), b.Slice(1, b.Len())
	}
	count := map[string]int{}
	for i := range a.Len() {
		count[encoded(a.Index(i))]++
	}
	var added, removed []reflect.Value
	for i := range b.Len() {
		item := b.Index(i)
		if key := encoded(item); count[key] > 0 {
			count[key]--
		} else {
			added = append(added, item)
		}
	}
	for i := range a.Len() {
		item := a.Index(i)
		if key := encoded(item); count[key] > 0 {
			count[key]--
			removed = append(removed, item)
		}
	}
	out := Values{}
	if len(added) == 0 && len(removed) == 0 {
		if same(whole, next) {
			return nil
		}
		return Values{"old": shown(name, whole, 0), "new": shown(name, next, 0)}
	}
	for key, items := range map[string][]reflect.Value{"added": added, "removed": removed} {
		if len(items) > 0 {
			out[key] = shownList(items, 0)
		}
	}
	return out
}

func encoded(v reflect.Value) string {
	if !v.IsValid() {
		return "null"
	}
	b, err := json.Marshal(v.Interface())
	if err != nil {
		return fmt.Sprint(v.Interface())
	}
	return string(b)
}

// same reports whether two values are stored alike: what is absent is as good
// as empty.
func same(a, b reflect.Value) bool {
	if empty(a) || empty(b) {
		return empty(a) == empty(b)
	}
	return encoded(a) == encoded(b)
}

var (
	metaType = reflect.TypeFor[object.Meta]()
	rawType  = reflect.TypeFor[json.RawMessage]()
	byteType = reflect.TypeFor[[]byte]()
)

// fieldsOf returns the stored fields of a struct, or the entries of a map, by
// their names.
func fieldsOf(v reflect.Value) map[string]reflect.Value {
	v = indirect(v)
	out := map[string]reflect.Value{}
	switch {
	case !v.IsValid():
	case v.Kind() == reflect.Map:
		for _, key := range v.MapKeys() {
			out[fmt.Sprint(key.Interface())] = v.MapIndex(key)
		}
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			field := v.Type().Field(i)
			if !field.IsExported() || field.Type == metaType {
				continue
			}
			name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			switch {
			case name == "-":
			case field.Anonymous && name == "":
				maps.Copy(out, fieldsOf(v.Field(i)))
			case name == "":
				out[field.Name] = v.Field(i)
			default:
				out[name] = v.Field(i)
			}
		}
	}
	return out
}

func indirect(v reflect.Value) reflect.Value {
	for v.IsValid() && (v.Kind() == reflect.Pointer || v.Kind() == reflect.Interface) {
		if v.IsNil() {
			return reflect.Value{}
		}
		v = v.Elem()
	}
	return v
}

// encodes reports whether a value has an encoding of its own, such as a time or
// an address.
func encodes(v reflect.Value) bool {
	switch v.Interface().(type) {
	case json.Marshaler, encoding.TextMarshaler:
		return true
	}
	return false
}

func nests(v reflect.Value) bool {
	return v.IsValid() && (v.Kind() == reflect.Struct || v.Kind() == reflect.Map) && !encodes(v)
}

func lists(v reflect.Value) bool {
	return v.IsValid() && v.Kind() == reflect.Slice && !opaque(v) && !encodes(v)
}

// opaque reports whether a value holds bytes or JSON of any form.
func opaque(v reflect.Value) bool {
	return v.IsValid() && (v.Type() == rawType || v.Type() == byteType || v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Uint8)
}

func empty(v reflect.Value) bool {
	v = indirect(v)
	switch {
	case !v.IsValid():
		return true
	case v.Kind() == reflect.Slice || v.Kind() == reflect.Map:
		return v.Len() == 0
	}
	return v.IsZero()
}

// shown returns a value as an event has it.
func shown(name string, v reflect.Value, depth int) any {
	v = indirect(v)
	switch {
	case !v.IsValid():
		return nil
	case Secret(name) || opaque(v) || depth > maxDepth:
		if empty(v) {
			return nil
		}
		return Hidden
	case encodes(v):
		return decoded(v)
	case lists(v):
		items := make([]reflect.Value, v.Len())
		for i := range items {
			items[i] = v.Index(i)
		}
		return shownList(items, depth)
	case nests(v):
		out := Values{}
		for name, field := range fieldsOf(v) {
			if !empty(field) {
				out[clipName(name)] = shown(name, field, depth+1)
			}
		}
		return out
	case v.Kind() == reflect.String:
		return Clip(v.String())
	}
	return v.Interface()
}

// decoded returns a value in the form of its own encoding, with the secrets that
// may be in it left out.
func decoded(v reflect.Value) any {
	if v.IsZero() {
		return nil
	}
	var out any
	if err := json.Unmarshal([]byte(encoded(v)), &out); err != nil {
		return Hidden
	}
	return plainly("", out, 0)
}

func plainly(name string, v any, depth int) any {
	if Secret(name) || depth > maxDepth {
		return Hidden
	}
	switch v := v.(type) {
	case string:
		return Clip(v)
	case []any:
		out := make([]any, 0, min(len(v), maxItems))
		for _, item := range v[:min(len(v), maxItems)] {
			out = append(out, plainly("", item, depth+1))
		}
		return more(out, len(v))
	case map[string]any:
		out := map[string]any{}
		for name, item := range v {
			out[clipName(name)] = plainly(name, item, depth+1)
		}
		return out
	}
	return v
}

func shownList(items []reflect.Value, depth int) []any {
	out := make([]any, 0, min(len(items), maxItems))
	for _, item := range items[:min(len(items), maxItems)] {
		out = append(out, shown("", item, depth+1))
	}
	return more(out, len(items))
}

// more ends a list that was cut.
func more(shown []any, n int) []any {
	if n > len(shown) {
		return append(shown, fmt.Sprintf("… %d more", n-len(shown)))
	}
	return shown
}

func clipName(name string) string {
	const limit = 100
	if len(name) <= limit {
		return name
	}
	return strings.ToValidUTF8(name[:limit], "") + "…"
}

// room is how much an event has left for values and for the names of those that
// it leaves out, in bytes.
type room struct{ values, names int }

// keep returns the values that there is room for, and the names of the others.
func (r *room) keep(v Values) (kept Values, omitted []string) {
	kept = Values{}
	for _, name := range slices.Sorted(maps.Keys(v)) {
		size := len(name) + len(encoded(reflect.ValueOf(v[name]))) + len(`"":,`)
		switch {
		case size <= r.values:
			r.values -= size
			kept[name] = v[name]
		case len(name)+len(`"",`) <= r.names:
			r.names -= len(name) + len(`"",`)
			omitted = append(omitted, name)
		default:
			return kept, append(omitted, "…")
		}
	}
	return kept, omitted
}

// Changed is one object of a change: what it was and what it is, nil for none.
type Changed struct {
	Kind, ID  string
	Old, Next any
}

// part is what an event tells of one object.
type part struct {
	Object  string   `json:"object,omitempty"`
	ID      string   `json:"id,omitempty"`
	Created Values   `json:"created,omitempty"`
	Changed Values   `json:"changed,omitempty"`
	Deleted Values   `json:"deleted,omitempty"`
	Omitted []string `json:"omitted,omitempty"` // values that there is no room for
}

func (r *room) part(c Changed) part {
	p := part{Object: c.Kind, ID: Clip(c.ID)}
	switch {
	case c.Next == nil:
		p.Deleted, p.Omitted = r.keep(Describe(c.Old))
	case c.Old == nil:
		p.Created, p.Omitted = r.keep(Describe(c.Next))
	default:
		p.Changed, p.Omitted = r.keep(Diff(c.Old, c.Next))
	}
	return p
}

// ChangeData encodes the request data of a change: how it was asked for, and the
// objects that it changed, the first one being what it is about. body, which may
// be nil, is told as its request_body.
func ChangeData(method, path string, body map[string]any, changes []Changed) (json.RawMessage, error) {
	r := room{values: maxValues, names: maxNames}
	d := struct {
		Method string `json:"method,omitempty"`
		Path   string `json:"path,omitempty"`
		Body   Values `json:"request_body,omitempty"`
		part
		Also []part `json:"also,omitempty"`
		More int    `json:"also_omitted,omitempty"`
	}{Method: method, Path: Clip(path)}
	if len(body) > 0 {
		said := Values{}
		for name, value := range body {
			said[clipName(name)] = shown(name, reflect.ValueOf(value), 0)
		}
		d.Body, _ = r.keep(said)
	}
	for i, c := range changes {
		switch {
		case i == 0:
			d.part = r.part(c)
		case i <= maxItems && r.values > 0:
			d.Also = append(d.Also, r.part(c))
		default:
			d.More++
		}
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(d); err != nil {
		return nil, fmt.Errorf("encode what changed: %w", err)
	}
	return bytes.TrimSuffix(buf.Bytes(), []byte("\n")), nil
}
