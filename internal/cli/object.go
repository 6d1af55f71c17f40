package cli

import (
	"bytes"
	"encoding/json"
	"strings"
)

// object is an API object as it came: it prints with its own order and
// spelling, and its fields are read by path. The client shows objects and picks
// ids out of them; it has no use for a struct of each.
type object struct {
	raw    json.RawMessage
	fields map[string]any
}

// UnmarshalJSON keeps the text beside the decoded fields.
func (o *object) UnmarshalJSON(b []byte) error {
	o.raw = bytes.Clone(b)
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	return dec.Decode(&o.fields)
}

// MarshalJSON gives back what came.
func (o object) MarshalJSON() ([]byte, error) {
	if o.raw == nil {
		return json.Marshal(o.fields)
	}
	return o.raw, nil
}

// text returns the value at a path such as "vpc.name" in words, and "" when
// there is none. A path may give alternatives ("a|b"); through arrays it goes
// into each element, and the values are joined with commas.
func (o object) text(path string) string {
	for alternative := range strings.SplitSeq(path, "|") {
		if s := words(at(o.fields, strings.Split(alternative, "."))); s != "" {
			return s
		}
	}
	return ""
}

// objects returns the objects of the array at a top-level key.
func (o object) objects(key string) []object {
	// Decoded again from the text, so that each keeps its own.
	var raw map[string]json.RawMessage
	var items []object
	if json.Unmarshal(o.raw, &raw) != nil || json.Unmarshal(raw[key], &items) != nil {
		return nil
	}
	return items
}

func at(v any, path []string) any {
	if len(path) == 0 {
		return v
	}
	switch v := v.(type) {
	case map[string]any:
		return at(v[path[0]], path[1:])
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = at(v[i], path)
		}
		return out
	}
	return nil
}

func words(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case json.Number:
		return v.String()
	case bool:
		if v {
			return "true"
		}
		return "false"
	case []any:
		var out []string
		for _, e := range v {
			if s := words(e); s != "" {
				out = append(out, s)
			}
		}
		return strings.Join(out, ", ")
	}
	return ""
}
