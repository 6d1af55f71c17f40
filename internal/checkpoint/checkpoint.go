// Package checkpoint makes the activity log tamper-evident: it signs what the
// log's Merkle tree is, and finds out whether a log is the one that was signed.
// The tree itself is the store's. Nothing here hinders anybody from changing
// the data; it makes sure that a change shows.
//
// A checkpoint has the form of C2SP tlog-checkpoint: a signed note
// (golang.org/x/mod/sumdb/note, Ed25519) of the log's origin, its size, the
// root hash of the tree (RFC 6962), and a line with the time.
package checkpoint

import (
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Checkpoint is what a signed note says.
type Checkpoint struct {
	Origin string // of the log: the issuer when its key was made, without the scheme
	Size   int64
	Root   tlog.Hash
	Time   time.Time // to the second; when it was signed, by the server's clock
}

// timeMark begins the extension line with the time.
const timeMark = "time "

func (c *Checkpoint) text() string {
	return fmt.Sprintf("%s\n%d\n%s\n%s%s\n", c.Origin, c.Size, base64.StdEncoding.EncodeToString(c.Root[:]), timeMark, c.Time.UTC().Format(time.RFC3339))
}

// Parse checks a signed note and reads it. The key is in the form of a note's
// verifier key, NAME+HASH+BASE64.
func Parse(signed []byte, key string) (*Checkpoint, error) {
	v, err := note.NewVerifier(key)
	if err != nil {
		return nil, fmt.Errorf("%q is not a verifier key: want NAME+HASH+BASE64", key)
	}
	n, err := note.Open(signed, note.VerifierList(v))
	if err != nil {
		return nil, fmt.Errorf("the checkpoint is not signed by %s: %w", v.Name(), err)
	}
	c, err := parseText(n.Text)
	if err != nil {
		return nil, err
	}
	if c.Origin != v.Name() {
		return nil, fmt.Errorf("the checkpoint is of the log %q, and the key of %q", c.Origin, v.Name())
	}
	return c, nil
}

func parseText(text string) (*Checkpoint, error) {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if len(lines) < 3 {
		return nil, errors.New("the checkpoint has fewer than three lines")
	}
	size, err := strconv.ParseUint(lines[1], 10, 63)
	if err != nil || size > math.MaxInt64>>1 {
		return nil, fmt.Errorf("the checkpoint's size %q is not a number of events", lines[1])
	}
	c := &Checkpoint{Origin: lines[0], Size: int64(size)}
	root, err := base64.StdEncoding.DecodeString(lines[2])
	if err != nil || copy(c.Root[:], root) != len(c.Root) || len(root) != len(c.Root) {
		return nil, fmt.Errorf("the checkpoint's root %q is not a hash", lines[2])
	}
	for _, l := range lines[3:] {
		if s, ok := strings.CutPrefix(l, timeMark); ok {
			if c.Time, err = time.Parse(time.RFC3339, s); err != nil {
				return nil, fmt.Errorf("the checkpoint's time %q is not one", s)
			}
		}
	}
	return c, nil
}
