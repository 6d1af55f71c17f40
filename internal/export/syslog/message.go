package syslog

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
	"unicode/utf8"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/store"
)

// severities are those of RFC 5424 section 6.2.1.
var severities = map[string]int{activity.Normal: 6, activity.Warning: 4, activity.Critical: 2}

// unknownSeverity stands for one that is none of ours: notice.
const unknownSeverity = 5

// timeForm is RFC 5424's, which has microseconds at most.
const timeForm = "2006-01-02T15:04:05.000000Z07:00"

// maxParam bounds a value in the structured data, in bytes. The whole of it
// stands in the message.
const maxParam = 256

// append writes an event as one message of RFC 5424. The message part is the
// event in JSON, without a byte order mark: most receivers would take it for
// the first character of the JSON.
func (h *header) append(b *bytes.Buffer, e *store.Entry) {
	severity, ok := severities[e.Severity]
	if !ok {
		severity = unknownSeverity
	}
	b.WriteByte('<')
	b.WriteString(strconv.Itoa(h.facility*8 + severity))
	b.WriteString(">1 ")
	b.WriteString(e.Time.UTC().Format(timeForm))
	b.WriteByte(' ')
	b.WriteString(h.host)
	b.WriteByte(' ')
	b.WriteString(h.app)
	b.WriteString(" - event [")
	b.WriteString(h.dataID)
	param(b, "id", idOf(e.Doc))
	param(b, "position", strconv.FormatInt(e.Index, 10))
	param(b, "action", e.Action)
	param(b, "outcome", e.Outcome)
	param(b, "severity", e.Severity)
	param(b, "account", e.AccountID)
	param(b, "correlation", e.CorrelationID)
	param(b, "initiator", e.Initiator)
	param(b, "target", e.Target)
	b.WriteByte(']')
	doc := e.Doc
	if room := h.most - b.Len() - 1; h.most > 0 && len(doc) > room {
		if doc = shorten(doc); len(doc) > room {
			return // what identifies it is in the structured data
		}
	}
	b.WriteByte(' ')
	for _, c := range doc { // JSON has control characters between its parts only
		if c < ' ' || c == 0x7f {
			c = ' '
		}
		b.WriteByte(c)
	}
}

// param writes a value as section 6.3.3 says. Control characters have no place
// in one line, and receivers cannot be trusted with them.
func param(b *bytes.Buffer, name, value string) {
	if value == "" {
		return
	}
	b.WriteByte(' ')
	b.WriteString(name)
	b.WriteString(`="`)
	n := 0
	for _, r := range value {
		if n += utf8.RuneLen(r); n > maxParam {
			break
		}
		switch {
		case r == '"' || r == '\\' || r == ']':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u2028' || r == '\u2029':
			b.WriteByte('?')
		default: // what is not UTF-8 has become U+FFFD
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
}

// idOf returns an event's id, which its document begins with.
func idOf(doc []byte) string {
	if rest, ok := bytes.CutPrefix(doc, []byte(`{"id":"`)); ok {
		if end := bytes.IndexByte(rest, '"'); end >= 0 && bytes.IndexByte(rest[:end], '\\') < 0 {
			return string(rest[:end])
		}
	}
	var e struct {
		ID string `json:"id"`
	}
	if json.Unmarshal(doc, &e) != nil {
		return ""
	}
	return e.ID
}

// shorten leaves out what can be large, and says so.
func shorten(doc []byte) []byte {
	var fields map[string]json.RawMessage
	if json.Unmarshal(doc, &fields) != nil {
		return doc
	}
	for _, name := range []string{"trace", "requestData", "responseData"} {
		delete(fields, name)
	}
	fields["shortened"] = json.RawMessage("true")
	b, err := json.Marshal(fields)
	if err != nil {
		return doc
	}
	return b
}

// field returns text as a field of the header (section 6.2): printable ASCII,
// of a length at most, "-" if there is nothing left.
func field(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return -1
		}
		return r
	}, s)
	if len(s) > most {
		s = s[:most]
	}
	if s == "" {
		return "-"
	}
	return s
}
