package checkpoint

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/store"
)

// Kept is the part of a store that a signer works on.
type Kept interface {
	tlog.HashReader
	Extent(ctx context.Context) (store.Extent, error)
	Grown() <-chan struct{}
	KeepCheckpoint(ctx context.Context, c store.Checkpoint) error
	Checkpoints(ctx context.Context, atLeast, atMost int64, limit int) ([]store.Checkpoint, error)
	ThinCheckpoints(ctx context.Context, before time.Time, period time.Duration) error
}

// Sealer keeps the private key unreadable at rest.
type Sealer interface {
	Seal(secret []byte, label string) []byte
	Open(sealed []byte, label string) ([]byte, error)
}

// Config are a signer's collaborators.
type Config struct {
	Store     Kept
	Directory *directory.Directory // where the key is kept
	Sealer    Sealer
	Issuer    string // URL; names the log when its key is made
	Now       func() time.Time
	Log       *slog.Logger
}

// Signer signs checkpoints of a growing log. It signs none that does not
// follow from the one before: a log that was changed under a server that was
// stopped gets no new signature when it starts again.
type Signer struct {
	cfg    Config
	key    string // verifier key
	signer note.Signer

	mu      sync.Mutex // held while one is signed
	last    *Checkpoint
	thinned time.Time
	newest  atomic.Pointer[store.Checkpoint]
}

// KeyID is the id of the signing key's row, and KeyKind the kind of object it
// is in the store.
const (
	KeyID   = "activity-log"
	KeyKind = "signing-key"
)

const keyLabel = "activity log key"

const (
	interval = time.Second
	keepAll  = 24 * time.Hour // checkpoints of so long ago are all kept,
	keepOne  = time.Hour      // and of what is older, one for each period
)

// Open makes the key if there is none, and reads the newest checkpoint.
func Open(ctx context.Context, cfg Config) (*Signer, error) {
	s := &Signer{cfg: cfg}
	row, ok := cfg.Directory.SigningKeys.Get(KeyID)
	if !ok {
		extent, err := cfg.Store.Extent(ctx)
		if err != nil {
			return nil, err
		}
		if extent.Size > 0 {
			cfg.Log.Warn("the activity log has events and no key; a new one is made. Unless this is the first start of a version that has one, somebody took the old one away",
				"events", extent.Size)
		}
		secret, public, err := note.GenerateKey(rand.Reader, originOf(cfg.Issuer))
		if err != nil {
			return nil, fmt.Errorf("make the key of the activity log: %w", err)
		}
		row = &directory.SigningKey{
			ID: KeyID, Use: KeyID, Alg: "Ed25519", NotBefore: cfg.Now().UTC(),
			Sealed: cfg.Sealer.Seal([]byte(secret), keyLabel), Public: []byte(public),
		}
		err = cfg.Directory.Update(ctx, "", func(tx *directory.Tx) error { cfg.Directory.SigningKeys.Put(tx, row); return nil })
		if err != nil {
			return nil, fmt.Errorf("keep the key of the activity log: %w", err)
		}
	}
	secret, err := cfg.Sealer.Open(row.Sealed, keyLabel)
	if err != nil {
		return nil, err
	}
	if s.signer, err = note.NewSigner(string(secret)); err != nil {
		return nil, fmt.Errorf("read the key of the activity log: %w", err)
	}
	// The public half stands in the open, where it can be exchanged for another.
	v, err := note.NewVerifier(string(row.Public))
	if err != nil || v.KeyHash() != s.signer.KeyHash() || v.Name() != s.signer.Name() {
		return nil, errors.New("the public half of the activity log's key is not that of its private half: the data were changed by something else")
	}
	s.key = string(row.Public)
	newest, err := cfg.Store.Checkpoints(ctx, 0, math.MaxInt64, 1)
	if err != nil {
		return nil, err
	}
	if len(newest) == 1 {
		s.newest.Store(&newest[0])
	}
	return s, nil
}

// originOf returns an issuer without what a note's name cannot have.
func originOf(issuer string) string {
	_, rest, ok := strings.Cut(issuer, "://")
	if !ok {
		rest = issuer
	}
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r == '+' || r > '~' {
			return '-'
		}
		return r
	}, rest)
}

// Key returns the verifier key.
func (s *Signer) Key() string { return s.key }

// Newest returns the newest checkpoint, if there is one.
func (s *Signer) Newest() (store.Checkpoint, bool) {
	c := s.newest.Load()
	if c == nil {
		return store.Checkpoint{}, false
	}
	return *c, true
}

// Run signs a checkpoint a second while the log grows, until the context ends.
// The last one is for Sign to make, when nothing more is written.
func (s *Signer) Run(ctx context.Context) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	told := ""
	for {
		grown := s.cfg.Store.Grown()
		err := s.Sign(ctx)
		if err != nil && ctx.Err() == nil && err.Error() != told {
			told = err.Error()
			s.cfg.Log.Error("no checkpoint of the activity log was signed; see: tabard activity verify", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if err == nil {
			select {
			case <-ctx.Done():
				return
			case <-grown:
			}
		}
	}
}

// Sign signs and keeps a checkpoint of the log as it is, unless the newest one
// is of the same size.
func (s *Signer) Sign(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last == nil {
		if kept, ok := s.Newest(); ok {
			last, err := Parse(kept.Note, s.key)
			if err != nil {
				return fmt.Errorf("the newest checkpoint that is kept, of %d events: %w", kept.Size, err)
			}
			s.last = last
		}
	}
	extent, err := s.cfg.Store.Extent(ctx)
	if err != nil {
		return err
	}
	next := &Checkpoint{Origin: s.signer.Name(), Size: extent.Size, Time: s.cfg.Now().UTC().Truncate(time.Second)}
	if s.last != nil && s.last.Size == next.Size {
		return nil
	}
	if next.Root, err = tlog.TreeHash(next.Size, s.cfg.Store); err != nil {
		return fmt.Errorf("the root of the log's tree: %w", err)
	}
	if err := s.follows(next); err != nil {
		return err
	}
	signed, err := note.Sign(&note.Note{Text: next.text()}, s.signer)
	if err != nil {
		return fmt.Errorf("sign the checkpoint of %d events: %w", next.Size, err)
	}
	kept := store.Checkpoint{Size: next.Size, Time: next.Time, Note: signed}
	if err := s.cfg.Store.KeepCheckpoint(ctx, kept); err != nil {
		return err
	}
	s.last = next
	s.newest.Store(&kept)
	if next.Time.Sub(s.thinned) >= keepOne {
		if err := s.cfg.Store.ThinCheckpoints(ctx, next.Time.Add(-keepAll), keepOne); err != nil {
			return err
		}
		s.thinned = next.Time
	}
	return nil
}

// follows checks that the log of the last checkpoint is the beginning of the
// next one's.
func (s *Signer) follows(next *Checkpoint) error {
	if s.last == nil || s.last.Size == 0 {
		return nil
	}
	if s.last.Size > next.Size {
		return fmt.Errorf("the log has %d events, and had %d when its last checkpoint was signed", next.Size, s.last.Size)
	}
	proof, err := tlog.ProveTree(next.Size, s.last.Size, s.cfg.Store)
	if err != nil {
		return fmt.Errorf("prove that the log of %d events goes on from that of %d: %w", next.Size, s.last.Size, err)
	}
	if err := tlog.CheckTree(proof, next.Size, next.Root, s.last.Size, s.last.Root); err != nil {
		return fmt.Errorf("the log is not the one that its last checkpoint was signed for, of %d events: %w", s.last.Size, err)
	}
	return nil
}

// KeyOf returns the verifier key that stands in a store. Whoever can change the
// store can change it, too.
func KeyOf(ctx context.Context, s interface {
	Load(ctx context.Context, f func(store.Record) error) error
},
) (string, error) {
	key := ""
	err := s.Load(ctx, func(r store.Record) error {
		if r.Kind != KeyKind || r.ID != KeyID {
			return nil
		}
		var row directory.SigningKey
		if err := json.Unmarshal(r.Doc, &row); err != nil {
			return fmt.Errorf("read the key of the activity log: %w", err)
		}
		key = string(row.Public)
		return nil
	})
	if err == nil && key == "" {
		err = errors.New("no key of the activity log is in the data: no server that signs checkpoints has run on them")
	}
	return key, err
}
