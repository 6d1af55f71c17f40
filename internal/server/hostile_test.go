package server

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"

	"tabard.dev/tabard/internal/api"
)

// spoiled is a body that is not what a route wants, or wants just so.
type spoiled struct {
	how  string
	body []byte
}

// slot stands in an encoded body for what a spoiled one has there.
const slot = "\"\u2063slot\u2063\""

// replacements are put in the place of every value, as they stand.
var replacements = map[string]string{
	"null": "null", "zero": "0", "a negative number": "-1", "a fraction": "1.5", "a number that no type holds": "1e999", "a large number": "9223372036854775808",
	"true": "true", "an empty string": `""`, "a word": `"x"`, "an empty array": "[]", "an array of null": "[null]", "an empty object": "{}",
	"an object": `{"id":1,"name":{}}`, "nested arrays": strings.Repeat("[", 500) + strings.Repeat("]", 500),
	"arrays nested too deep": strings.Repeat("[", 20000) + strings.Repeat("]", 20000),
	"a long string":          `"` + strings.Repeat("a", 70_000) + `"`, "control characters": `"\u0000\n\u001b\u007f"`,
	"half a surrogate": `"\ud800"`, "invalid UTF-8": "\"a\xff\xfeb\"", "a format": `"%s%n%!d(MISSING)"`, "a reference": `"$account"`,
	"a path": `"../../etc/passwd"`, "quotes": `"\"'\\` + "`" + `<script>;--"`, "direction marks": `"\u202eabc\u200b"`,
	"many strings": `["` + strings.Repeat(`a","`, 5000) + `a"]`, "many objects": "[" + strings.Repeat("{},", 5000) + "{}]",
}

// spoil returns the spoiled forms of a valid body.
func spoil(t *testing.T, valid []byte) []spoiled {
	t.Helper()
	var root any
	if err := json.Unmarshal(valid, &root); err != nil {
		t.Fatalf("%v: %s", err, valid)
	}
	var out []spoiled
	encode := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	replace := func(where string, with func(raw string) any) {
		marked := encode(with("\u2063slot\u2063"))
		for _, how := range slices.Sorted(maps.Keys(replacements)) {
			out = append(out, spoiled{where + " is " + how, bytes.Replace(marked, []byte(slot), []byte(replacements[how]), 1)})
		}
	}
	var walk func(where string, node any, rebuild func(any) any)
	walk = func(where string, node any, rebuild func(any) any) {
		replace(where, func(s string) any { return rebuild(s) })
		switch node := node.(type) {
		case map[string]any:
			more := maps.Clone(node)
			more["no_such_field"] = map[string]any{"a": []int{1}}
			out = append(out, spoiled{where + " has an unknown field", encode(rebuild(more))})
			for _, key := range slices.Sorted(maps.Keys(node)) {
				less := maps.Clone(node)
				delete(less, key)
				out = append(out, spoiled{where + " lacks " + key, encode(rebuild(less))})
				doubled := maps.Clone(node)
				doubled["\u2063slot\u2063"] = node[key]
				out = append(out, spoiled{where + " has twice " + key, bytes.Replace(encode(rebuild(doubled)), []byte(slot), encode(key), 1)})
				walk(where+"."+key, node[key], func(v any) any {
					changed := maps.Clone(node)
					changed[key] = v
					return rebuild(changed)
				})
			}
		case []any:
			for i := range node {
				walk(fmt.Sprintf("%s[%d]", where, i), node[i], func(v any) any {
					changed := slices.Clone(node)
					changed[i] = v
					return rebuild(changed)
				})
			}
		}
	}
	walk("body", root, func(v any) any { return v })
	for _, n := range []int{0, 1, len(valid) / 2, len(valid) - 1} {
		out = append(out, spoiled{fmt.Sprintf("body ends after %d bytes", n), valid[:n]})
	}
	for how, body := range map[string]string{
		"two bodies": string(valid) + string(valid), "a byte order mark": "\ufeff" + string(valid), "a comment": "/**/" + string(valid),
		"nothing but NUL": "\x00\x00", "not JSON": "name=x&account_id=y", "a comma too many": strings.TrimSuffix(string(valid), "}") + ",}",
	} {
		out = append(out, spoiled{how, []byte(body)})
	}
	return append(out, spoiled{"body of 10 MB", tenMegabytes})
}

var tenMegabytes = []byte(`{"name":"` + strings.Repeat("a", 10<<20) + `"}`)

// holdsUp checks that a server has answered as it answers mistakes: with a
// status below 500, and where it refuses, with an error in JSON that has the
// transaction's id.
func holdsUp(a answerOf) error {
	if a.status >= http.StatusInternalServerError {
		return fmt.Errorf("status %d: %.500s", a.status, a.body)
	}
	if a.status < http.StatusBadRequest {
		return nil
	}
	var e struct {
		Trace         string `json:"trace"`
		TransactionID string `json:"transaction_id"`
		Errors        []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	if err := json.Unmarshal(a.body, &e); err != nil {
		return fmt.Errorf("status %d without JSON: %w: %.500s", a.status, err, a.body)
	}
	if id := a.header.Get(api.TransactionHeader); id == "" || e.Trace != id && e.TransactionID != id {
		return fmt.Errorf("status %d without the transaction %s: %.500s", a.status, id, a.body)
	}
	if len(e.Errors) == 0 || e.Errors[0].Message == "" || e.Errors[0].Code == "" {
		return fmt.Errorf("status %d without an error entry: %.500s", a.status, a.body)
	}
	if !utf8.Valid(a.body) {
		return fmt.Errorf("status %d that is not UTF-8: %.500q", a.status, a.body)
	}
	return nil
}

// parted runs f on the steps of the walk in a few parallel parts, each with an
// installation of its own. It leaves out all but every nth step of a part.
func parted(t *testing.T, nth int, f func(t *testing.T, r *running, s step)) {
	const parts = 4
	for part := range parts {
		t.Run(fmt.Sprintf("part %d", part), func(t *testing.T) {
			t.Parallel()
			r := start(t)
			for i, s := range r.steps() {
				if i%parts == part && i/parts%nth == 0 {
					f(t, r, s)
					r.quiet()
				}
			}
		})
	}
}

// again reports whether a step differs from another one in the slash at its
// end only.
func again(s step) bool { return strings.HasSuffix(s.Pattern, "/{$}") }

// asOwner returns the names and the token of whoever has all rights.
func (r *running) asOwner() (vars, string) {
	return r.home.with("caller", r.home["owner"]), r.home["owner_token"]
}

// try sends a request that is not a valid one and says what is wrong with the
// answer.
func (r *running) try(s step, how string, q request) answerOf {
	r.t.Helper()
	a := send(r.s, q)
	if err := holdsUp(a); err != nil && q.method != http.MethodHead {
		r.t.Errorf("%s, %s: %v", s, how, err)
	}
	return a
}

func TestHostileBodiesNeverBreakTheServer(t *testing.T) {
	parted(t, share, func(t *testing.T, r *running, s step) {
		if s.body == "" || again(s) {
			return
		}
		v, token := r.asOwner()
		for _, b := range spoil(t, []byte(expand(s.body, v))) {
			q := s.request(s.Route, v, token)
			q.body = b.body
			a := r.try(s, b.how, q)
			if s.Kind == api.KindOpen {
				continue // nobody reads it
			}
			switch {
			case strings.HasSuffix(s.Pattern, "/file"): // a file may be as large
			case b.how == "body of 10 MB" && a.status != http.StatusRequestEntityTooLarge && a.status != http.StatusBadRequest:
				t.Errorf("%s, %s: %d %s", s, b.how, a.status, a.body)
			case strings.Contains(b.how, " has twice ") && a.ok(), strings.HasSuffix(b.how, "nested too deep") && a.ok():
				t.Errorf("%s, %s: %d %s", s, b.how, a.status, a.body)
			}
		}
		r.reset()
	})
}

// texts are names that somebody may want for something, with every printable
// ASCII character in one of them and, if singly, each alone as well.
func texts(singly bool) []string {
	var all strings.Builder
	out := []string{
		" a", "a ", "Größe", "名前", "имя", "اسم", "e\u0301", "\U0001F3F0", "a\u00a0b", "a\u200db", "\u202eevil", "\ufeffbom", "a\u0085b", "a\u2028b",
		"\U000E0041", "NULL", "-", ".", "..", "/", "*", "%", "constructor", "0", "true",
	}
	for c := ' '; c <= '~'; c++ {
		all.WriteRune(c)
		if singly {
			out = append(out, "a"+string(c)+"b")
		}
	}
	return append(out, all.String(), strings.TrimSpace(all.String()), all.String()[:48], all.String()[48:])
}

func TestNamesMayHaveEveryPrintableCharacter(t *testing.T) {
	parted(t, share, func(t *testing.T, r *running, s step) {
		v, token := r.asOwner()
		if s.Kind != api.KindChange || s.body == "" || again(s) {
			return
		}
		var valid map[string]any
		if json.Unmarshal([]byte(expand(s.body, v)), &valid) != nil {
			return
		}
		for _, field := range []string{"name", "display_name", "description", "firstname", "comment", "value_string"} {
			if _, ok := valid[field].(string); !ok {
				continue
			}
			for _, name := range texts(field == "name" && strings.HasPrefix(s.Pattern, "POST ")) {
				body := maps.Clone(valid)
				body[field] = name
				q := s.request(s.Route, v, token)
				var err error
				if q.body, err = json.Marshal(body); err != nil {
					t.Fatal(err)
				}
				a := r.try(s, fmt.Sprintf("%s %q", field, name), q)
				var shown map[string]any
				if !a.ok() || len(a.body) == 0 {
					continue
				}
				if err := json.Unmarshal(a.body, &shown); err != nil {
					t.Errorf("%s, %s %q: %v", s, field, name, err)
				}
				if got, ok := shown[field].(string); ok && got != name {
					t.Errorf("%s, %s %q: the answer has %q", s, field, name, got)
				}
			}
		}
		r.reset()
	})
}

func TestHostileIdsAndParametersNeverBreakTheServer(t *testing.T) {
	junk := []string{
		"%00", "%20", "%2F", "..%2F..", "%FF%FE", "%E2%80%AE", "%25s", strings.Repeat("a", 8000), "-1", "null", "$account", "*", "crn:v1:::::::::", "crn:v1:bluemix:public:kms:us-south:a/x:y::",
		"iam-Profile-", "IBMid-", "iam-", "_allgroups", "AccessGroupId-PublicAccess", "settings", "%F0%9F%8F%B0", "a%0Ab",
	}
	parameters := url.Values{
		"limit": {"-1", "0", "x", "99999999999999999999"}, "offset": {"-1", "x", "2147483648"}, "start": {"x", "e30", "eyJvIjotMX0", "eyJhIjoiXHUwMDAwIiwibCI6MX0"},
		"pagetoken": {"x", "e30", "eyJxIjp7InNvcnQiOlsieCJdfX0"}, "_start": {"x", "e30"}, "pagesize": {"0", "x", "-5"}, "sort": {"x", "-", "--name"}, "order": {"x"},
		"filter": {"((", "name eq", "name eq \"a", strings.Repeat("(", 5000), "name co \"x\" and"}, "search": {":", "id", "name:" + strings.Repeat("x", 3000)},
		"format": {"x"}, "account_id": {"x", "", "\x00"}, "since": {"x", "99999999d", "-1h"}, "include_history": {"x"}, "state": {"x"}, "type": {"x"}, "iam_id": {"\x00", "x"},
		"updated_from": {"x"}, "duration": {"-1", "x"}, "recursive": {"x"}, "force": {"x"}, "version": {"2025-13-01", "x"}, "generation": {"1", "x"}, "show_crn": {"x"},
	}
	parted(t, share, func(_ *testing.T, r *running, s step) {
		v, token := r.asOwner()
		path, query, _ := strings.Cut(s.target, "?")
		if again(s) {
			return
		}
		for _, name := range (call{target: path}).names() {
			for _, id := range junk {
				q := s.request(s.Route, v, token)
				q.target = expandTarget(strings.ReplaceAll(path, "$"+name, "\u2063"), v)
				q.target = strings.ReplaceAll(q.target, "\u2063", id)
				if query != "" {
					q.target += "?" + expandTarget("?"+query, v)[1:]
				}
				r.try(s, "$"+name+" is "+id[:min(len(id), 50)], q)
			}
		}
		if s.Kind == api.KindChange {
			r.reset()
		}
		if !strings.HasPrefix(s.Pattern, "GET ") {
			return
		}
		for _, name := range slices.Sorted(maps.Keys(parameters)) {
			for _, value := range parameters[name] {
				q := s.request(s.Route, v, token)
				given, err := url.ParseQuery(expandTarget("?"+query, v)[1:])
				if err != nil {
					r.t.Fatal(err)
				}
				given.Set(name, value)
				q.target = expandTarget(path, v) + "?" + given.Encode()
				r.try(s, "parameter "+name+" is "+value[:min(len(value), 50)], q)
			}
		}
	})
}

func TestABadEntityTagChangesNothing(t *testing.T) {
	parted(t, share, func(t *testing.T, r *running, s step) {
		if !s.tagged {
			return
		}
		v, token := r.asOwner()
		before := r.records()
		for _, tag := range []string{`"garbage"`, "1-" + strings.Repeat("0", 32), `W/"x"`, `"`, ",", strings.Repeat("a", 8000), "1", "**", "null", "é"} {
			q := s.request(s.Route, v, token)
			q.header["If-Match"] = tag
			if a := r.try(s, "tag "+tag[:min(len(tag), 50)], q); a.status != http.StatusConflict && a.status != http.StatusPreconditionFailed {
				t.Errorf("%s, tag %.50s: %d %s", s, tag, a.status, a.body)
			}
		}
		if diff := changed(before, r.records()); len(diff) > 0 {
			t.Errorf("%s: changed %q", s, diff)
			r.reset()
		}
		if len(s.header) == 0 {
			return // it may be left out
		}
		q := s.request(s.Route, v, token)
		delete(q.header, "If-Match")
		if a := r.try(s, "no tag", q); a.status != http.StatusBadRequest {
			t.Errorf("%s without a tag: %d %s", s, a.status, a.body)
		}
	})
}

// kept are the names of objects that can be read after their deletion: until
// they are purged, or until their host, which there is none of, has ended them.
var kept = []string{"policy", "policy2", "instance", "resource_key", "operated", "server"}

func TestWhatIsDeletedIsGone(t *testing.T) {
	r := start(t)
	v, token := r.asOwner()
	steps := r.steps()
	for i, s := range steps {
		if i%share != 0 || !strings.HasPrefix(s.Pattern, "DELETE ") || s.Kind != api.KindChange || strings.HasSuffix(s.Pattern, "/lock") || strings.HasSuffix(s.Pattern, "/disable") || strings.Contains(s.Pattern, "_allgroups") {
			continue
		}
		path, _, _ := strings.Cut(s.target, "?")
		names := (call{target: path}).names()
		if len(names) == 0 || !strings.HasSuffix(path, "$"+names[len(names)-1]) {
			continue
		}
		gone := names[len(names)-1]
		if gone == "user" && strings.Contains(path, "/groups/") || gone == "user" && strings.Contains(path, "/identities/") ||
			strings.Contains(path, "/network_interfaces/") || strings.Contains(path, "/virtual_network_interfaces/") || strings.Contains(path, "/targets/") ||
			strings.Contains(path, "/cluster_groups/$cluster_group/") {
			continue // what ends is a relation
		}
		if a := send(r.s, s.request(s.Route, v, token)); !s.succeeded(a) {
			t.Errorf("%s: %d %s", s, a.status, a.body)
			continue
		}
		for _, other := range steps {
			if !slices.Contains(other.names(), gone) {
				continue
			}
			a := r.try(other, "after "+s.Pattern, other.request(other.Route, v, token))
			inPath, _, _ := strings.Cut(other.target, "?")
			// Who was a user or a member may be one again; the ids stay good.
			if strings.Contains(inPath, "/$"+gone) && a.ok() && !slices.Contains(kept, gone) && !strings.Contains(inPath, "/groups/") && !strings.Contains(inPath, "/identities/") {
				t.Errorf("%s after %s: %d %s", other, s.Pattern, a.status, a.body)
			}
		}
		r.quiet()
		r.reset()
	}
}

// writers is how many change one object at once.
const writers = 8

// atOnce sends the requests at the same time and returns the answers.
func atOnce(s *Server, requests []request) []answerOf {
	answers := make([]answerOf, len(requests))
	var ready, done sync.WaitGroup
	ready.Add(1)
	for i, q := range requests {
		done.Go(func() {
			ready.Wait()
			answers[i] = send(s, q)
		})
	}
	ready.Done()
	done.Wait()
	return answers
}

func TestOneOfManyWritersWins(t *testing.T) {
	parted(t, 1, func(t *testing.T, r *running, s step) {
		if !s.tagged {
			return
		}
		v, token := r.asOwner()
		tag := send(r.s, request{method: http.MethodGet, target: expandTarget(s.target, v), token: token}).header.Get("ETag")
		if tag == "" {
			t.Errorf("%s: GET %s has no entity tag", s, s.target)
			return
		}
		requests := make([]request, writers)
		for i := range requests {
			requests[i] = s.request(s.Route, v, token)
			requests[i].header["If-Match"] = tag
		}
		won := 0
		for _, a := range atOnce(r.s, requests) {
			switch {
			case s.succeeded(a):
				won++
			case a.status != http.StatusConflict && a.status != http.StatusPreconditionFailed:
				t.Errorf("%s: %d %s", s, a.status, a.body)
			}
		}
		if won != 1 {
			t.Errorf("%s: %d of %d writers with one tag win", s, won, writers)
		}
		r.reset()
	})
}

func TestManyMakersOfOneNameDoNotBreakTheServer(t *testing.T) {
	parted(t, 1, func(t *testing.T, r *running, s step) {
		if s.Kind != api.KindChange || !strings.HasPrefix(s.Pattern, "POST ") || again(s) {
			return
		}
		v, token := r.asOwner()
		requests := make([]request, writers)
		for i := range requests {
			requests[i] = s.request(s.Route, v, token)
		}
		won := 0
		for _, a := range atOnce(r.s, requests) {
			if s.succeeded(a) {
				won++
			} else if err := holdsUp(a); err != nil {
				t.Errorf("%s: %v", s, err)
			}
		}
		if won == 0 {
			t.Errorf("%s: nobody wins", s)
		}
		r.reset()
	})
}
