package conformance

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"

	"github.com/google/uuid"
)

// withAliases stands in for resource aliases, which are excluded: it makes
// aliases of its own, and a key for an alias becomes a key of its instance.
// Everything else, and so everything that happens to keys, is next's work.
func withAliases(next http.Handler) http.Handler {
	a := &aliases{next: next, instance: map[string]string{}}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method + " " + strings.TrimSuffix(r.URL.Path, "/") {
		case "POST /v2/resource_aliases":
			a.create(w, r)
		case "POST /v2/resource_keys":
			a.createKey(w, r)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

type aliases struct {
	next http.Handler

	mu       sync.Mutex
	instance map[string]string // by the alias's CRN
}

func (a *aliases) create(w http.ResponseWriter, r *http.Request) {
	var body struct{ Name, Source, Target string }
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	ask := httptest.NewRequest(http.MethodGet, "/v2/resource_instances/"+body.Source, nil)
	ask.Header.Set("Authorization", r.Header.Get("Authorization"))
	answer := httptest.NewRecorder()
	a.next.ServeHTTP(answer, ask)
	var instance map[string]any
	if answer.Code != http.StatusOK || json.Unmarshal(answer.Body.Bytes(), &instance) != nil {
		http.Error(w, "no instance to make an alias of", http.StatusNotFound)
		return
	}
	guid := uuid.NewString()
	// Cloud Foundry's spaces are named by another service in the answer.
	target := strings.Replace(body.Target, ":bluemix:us-south:", ":cf:us-south:", 1)
	crn := strings.Replace(target, "::cf-space:", "::resource-alias:"+guid+"@", 1)
	a.mu.Lock()
	a.instance[crn] = body.Source
	a.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	_ = json.NewEncoder(w).Encode(map[string]any{
		"id": crn, "crn": crn, "guid": guid, "name": body.Name, "state": "active", "target_crn": target,
		"account_id": instance["account_id"], "resource_group_id": instance["resource_group_id"],
		"resource_instance_id": instance["id"],
	})
}

func (a *aliases) createKey(w http.ResponseWriter, r *http.Request) {
	raw, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var body map[string]any
	_ = json.Unmarshal(raw, &body)
	alias, _ := body["source"].(string)
	a.mu.Lock()
	instance := a.instance[alias]
	a.mu.Unlock()
	if instance == "" {
		r.Body = io.NopCloser(bytes.NewReader(raw))
		a.next.ServeHTTP(w, r)
		return
	}
	body["source"] = instance
	raw, _ = json.Marshal(body)
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(raw)), int64(len(raw))
	r.Header.Del("Content-Length")
	r.Header.Del("Accept-Encoding")
	answer := httptest.NewRecorder()
	a.next.ServeHTTP(answer, r)
	reply := answer.Body.Bytes()
	var key map[string]any
	if answer.Code == http.StatusCreated && json.Unmarshal(reply, &key) == nil {
		key["source_crn"] = alias
		reply, _ = json.Marshal(key)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(answer.Code)
	_, _ = w.Write(reply)
}
