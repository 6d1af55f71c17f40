package binding

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"time"

	"tabard.dev/tabard/internal/kube"
)

// watchTime bounds one watch. A connection that the network has swallowed is
// noticed after it; a healthy one goes on where the last watch ended.
const watchTime = time.Minute

// sayAgain is the time between two lines of the log on one thing that only people
// can put right.
const sayAgain = time.Minute

// mirror holds what the controller needs of each object of a collection, and
// tells when that changes.
type mirror[T comparable] struct {
	kube    *kube.Client
	path    string // of the collection
	read    func(json.RawMessage) (key, T, error)
	changed func(k key, old, now *T) // nil where it was or is not there
	now     func() time.Time
	log     *slog.Logger

	mu     sync.Mutex
	items  map[key]T
	synced chan struct{} // closed once the collection has been listed
	once   sync.Once
}

func newMirror[T comparable](k *kube.Client, now func() time.Time, log *slog.Logger, path string, read func(json.RawMessage) (key, T, error), changed func(k key, old, now *T)) *mirror[T] {
	return &mirror[T]{kube: k, path: path, read: read, changed: changed, now: now, log: log, items: map[key]T{}, synced: make(chan struct{})}
}

func (m *mirror[T]) Get(k key) (T, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok := m.items[k]
	return v, ok
}

// In returns what is there of a namespace.
func (m *mirror[T]) In(namespace string) []key {
	m.mu.Lock()
	defer m.mu.Unlock()
	var keys []key
	for k := range m.items {
		if k.namespace == namespace {
			keys = append(keys, k)
		}
	}
	return keys
}

// Run follows the collection until the context ends.
func (m *mirror[T]) Run(ctx context.Context) {
	version, wait := "", firstRetry
	var missing time.Time // when it was last said that there is no such resource
	for ctx.Err() == nil {
		var err error
		if version == "" {
			version, err = m.list(ctx)
		}
		if err == nil {
			m.once.Do(func() { close(m.synced) })
			version, err = m.watch(ctx, version)
		}
		switch {
		case ctx.Err() != nil:
			return
		case err == nil, errors.Is(err, context.DeadlineExceeded):
			// The next watch begins where this one ended, so a pause misses nothing.
			wait = firstRetry
			pause(ctx, jitter(100*time.Millisecond))
			continue
		case kube.Code(err) == http.StatusGone:
			version = ""
		case kube.Code(err) == http.StatusNotFound:
			if now := m.now(); now.Sub(missing) >= sayAgain {
				missing = now
				m.log.Error("the cluster does not know the resource: apply the custom resource definition that comes with Tabard", "error", err)
			}
			version = ""
		default:
			m.log.Warn("the cluster is not followed just now", "error", err)
		}
		pause(ctx, jitter(wait))
		wait = min(2*wait, 10*time.Second)
	}
}

// list takes over the whole collection and returns the version to watch from.
func (m *mirror[T]) list(ctx context.Context) (string, error) {
	found := map[key]T{}
	for next := ""; ; {
		var page struct {
			Metadata struct {
				ResourceVersion string `json:"resourceVersion"`
				Continue        string `json:"continue"`
			} `json:"metadata"`
			Items []json.RawMessage `json:"items"`
		}
		q := url.Values{"limit": {"500"}}
		if next != "" {
			q.Set("continue", next)
		}
		if err := m.kube.Do(ctx, http.MethodGet, m.path+"?"+q.Encode(), nil, &page); err != nil {
			return "", fmt.Errorf("list: %w", err)
		}
		for _, raw := range page.Items {
			k, v, err := m.read(raw)
			if err != nil {
				return "", fmt.Errorf("list %s: %w", m.path, err)
			}
			found[k] = v
		}
		if next = page.Metadata.Continue; next == "" {
			m.replace(found)
			return page.Metadata.ResourceVersion, nil
		}
	}
}

func (m *mirror[T]) replace(found map[key]T) {
	m.mu.Lock()
	old := m.items
	m.items = found
	m.mu.Unlock()
	for k, v := range found {
		if was, ok := old[k]; !ok {
			m.changed(k, nil, &v)
		} else if was != v {
			m.changed(k, &was, &v)
		}
	}
	for k, was := range old {
		if _, ok := found[k]; !ok {
			m.changed(k, &was, nil)
		}
	}
}

// watch applies changes until the watch ends and returns the last version.
func (m *mirror[T]) watch(ctx context.Context, version string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, watchTime+watchTime/4)
	defer cancel()
	q := url.Values{"resourceVersion": {version}, "timeoutSeconds": {fmt.Sprint(int(watchTime.Seconds()))}}
	err := m.kube.Watch(ctx, m.path+"?"+q.Encode(), func(e kube.Event) error {
		var at struct {
			Metadata struct {
				ResourceVersion string `json:"resourceVersion"`
			} `json:"metadata"`
		}
		if err := json.Unmarshal(e.Object, &at); err != nil {
			return fmt.Errorf("watch %s: %w", m.path, err)
		}
		if e.Type != "BOOKMARK" {
			k, v, err := m.read(e.Object)
			if err != nil {
				return fmt.Errorf("watch %s: %w", m.path, err)
			}
			m.apply(k, v, e.Type == "DELETED")
		}
		version = at.Metadata.ResourceVersion
		return nil
	})
	return version, err
}

func (m *mirror[T]) apply(k key, v T, deleted bool) {
	m.mu.Lock()
	was, had := m.items[k]
	if deleted {
		delete(m.items, k)
	} else {
		m.items[k] = v
	}
	m.mu.Unlock()
	switch {
	case deleted && had:
		m.changed(k, &was, nil)
	case deleted:
	case !had:
		m.changed(k, nil, &v)
	case was != v:
		m.changed(k, &was, &v)
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
