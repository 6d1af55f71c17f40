// Package object holds what every stored object has in common: its revision,
// who made and changed it and when, and the entity tag computed from these.
package object

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"time"
)

// Meta is embedded in every stored object. The directory sets it; nothing else
// does.
type Meta struct {
	Revision   int64     `json:"revision"`
	CreatedAt  time.Time `json:"created_at"`
	CreatedBy  string    `json:"created_by"`
	ModifiedAt time.Time `json:"modified_at"`
	ModifiedBy string    `json:"modified_by"`
}

// Metadata gives the directory access to the embedded Meta.
func (m *Meta) Metadata() *Meta { return m }

// Tag returns the entity tag of the object with this id: its revision and 32
// hexadecimal digits, the form that clients have seen
// (reference/iam-identity.md section 4.1). Two revisions never share a tag.
func (m *Meta) Tag(id string) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%d\x00%d", id, m.Revision, m.ModifiedAt.UnixNano()))
	return fmt.Sprintf("%d-%s", m.Revision, hex.EncodeToString(sum[:16]))
}

// MatchTag reports whether an If-Match header value admits the tag. "*" admits
// any; quotes and a weak prefix are ignored.
func MatchTag(ifMatch, tag string) bool {
	for part := range strings.SplitSeq(ifMatch, ",") {
		part = strings.Trim(strings.TrimPrefix(strings.TrimSpace(part), "W/"), `"`)
		if part == "*" || part == tag {
			return true
		}
	}
	return false
}
