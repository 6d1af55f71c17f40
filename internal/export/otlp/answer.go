package otlp

import (
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

const (
	protobufType = "application/x-protobuf"
	jsonType     = "application/json"
)

// BusyError means that the receiver takes nothing now and wants to be called
// again after Wait.
type BusyError struct {
	Wait   time.Duration
	status string // of the answer, or "" while waiting
	reason string
}

// RetryAfter is how long the receiver wants to be left alone.
func (e *BusyError) RetryAfter() time.Duration { return e.Wait }

func (e *BusyError) Error() string {
	if e.status == "" {
		return fmt.Sprintf("the receiver asked to be left alone for another %v", e.Wait.Round(time.Second))
	}
	text := "the receiver takes nothing now: it answers " + e.status + e.reason
	if e.Wait > 0 {
		text += fmt.Sprintf(", and asks to be called again after %v", e.Wait)
	}
	return text
}

// RejectedError means that the receiver will never take an event as it is. The
// route stands still at it until the receiver is set up to take it.
type RejectedError struct {
	Index  int64 // of the event in the log
	reason string
}

func (e *RejectedError) Error() string {
	return fmt.Sprintf("the receiver rejects the event with index %d%s: look into its log, and set it up to take the event", e.Index, e.reason)
}

// judge says what an answer means for the events of a request. Who returns no
// error has taken them all.
func judge(target string, resp *http.Response, answer []byte, now time.Time, secrets []string) error {
	kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil {
		kind = ""
	}
	// Numbers come from the peer as well as texts do.
	status := strconv.Itoa(resp.StatusCode)
	if t := http.StatusText(resp.StatusCode); t != "" {
		status += " " + t
	}
	because := func(text string) string {
		if text = hide(text, secrets); text == "" {
			return ""
		}
		return fmt.Sprintf(", saying %q", text)
	}
	switch code := resp.StatusCode; {
	case code >= 200 && code < 300:
		rejected, reason, err := parseTaken(kind, answer)
		if err != nil {
			return fmt.Errorf("%s answers %s, but not as a receiver of OTLP does (%w): is the path of the endpoint right?", target, status, err)
		}
		if rejected > 0 {
			return &RejectedError{reason: because(reason)}
		}
		return nil
	case code >= 300 && code < 400:
		return fmt.Errorf("%s answers %s and refers to %q: redirections are not followed, correct the endpoint",
			target, status, hide(resp.Header.Get("Location"), secrets))
	case code == http.StatusTooManyRequests || code == http.StatusBadGateway || code == http.StatusServiceUnavailable || code == http.StatusGatewayTimeout:
		return &BusyError{Wait: retryAfter(resp.Header.Get("Retry-After"), now), status: status, reason: because(parseStatus(kind, answer))}
	case code == http.StatusBadRequest || code == http.StatusRequestEntityTooLarge || code == http.StatusUnprocessableEntity:
		return &RejectedError{reason: fmt.Sprintf(" with %s%s", status, because(parseStatus(kind, answer)))}
	case code == http.StatusUnauthorized || code == http.StatusForbidden:
		return fmt.Errorf("%s answers %s%s: check bearer_token_file, headers_file and the certificate in tls", target, status, because(parseStatus(kind, answer)))
	case code == http.StatusNotFound || code == http.StatusMethodNotAllowed:
		return fmt.Errorf("%s answers %s: the receiver has another path for logs, or takes none; correct the endpoint", target, status)
	default:
		return fmt.Errorf("%s answers %s%s", target, status, because(parseStatus(kind, answer)))
	}
}

// retryAfter reads the header of that name: seconds or a date (RFC 9110).
func retryAfter(value string, now time.Time) time.Duration {
	var wait time.Duration
	if n, err := strconv.ParseUint(value, 10, 31); err == nil {
		wait = time.Duration(n) * time.Second
	} else if at, err := http.ParseTime(value); err == nil {
		wait = at.Sub(now)
	}
	return min(max(wait, 0), maxWait)
}

// parseTaken reads an ExportLogsServiceResponse: how many records were not
// taken, and why. Receivers exist that answer with nothing, or in JSON.
func parseTaken(kind string, answer []byte) (rejected int64, reason string, err error) {
	switch {
	case len(answer) == 0:
		return 0, "", nil
	case kind == jsonType:
		var r struct {
			Partial struct {
				Rejected json.Number `json:"rejectedLogRecords"` // a text, as JSON of protobuf has 64-bit numbers, or a number
				Message  string      `json:"errorMessage"`
			} `json:"partialSuccess"`
		}
		if err := json.Unmarshal(answer, &r); err != nil {
			return 0, "", fmt.Errorf("read its JSON: %w", err)
		}
		if r.Partial.Rejected != "" {
			if rejected, err = r.Partial.Rejected.Int64(); err != nil {
				return 0, "", fmt.Errorf("read rejectedLogRecords: %w", err)
			}
		}
		return rejected, r.Partial.Message, nil
	case kind != protobufType:
		return 0, "", fmt.Errorf("the answer is of the type %.60q", kind)
	}
	partial, err := field(answer, 1) // partial_success
	if err != nil {
		return 0, "", err
	}
	count, err := field(partial.bytes, 1) // rejected_log_records
	if err != nil {
		return 0, "", err
	}
	text, err := field(partial.bytes, 2) // error_message
	return int64(count.number), string(text.bytes), err
}

// parseStatus reads the message of a google.rpc.Status, or of whatever else
// explains a refusal.
func parseStatus(kind string, answer []byte) string {
	switch kind {
	case protobufType:
		if v, err := field(answer, 2); err == nil {
			return string(v.bytes)
		}
		return ""
	case jsonType:
		var s struct {
			Message string `json:"message"`
		}
		if err := json.Unmarshal(answer, &s); err == nil && s.Message != "" {
			return s.Message
		}
	}
	return string(answer)
}

// value is what a field of a message in protobuf's wire format has.
type value struct {
	number uint64
	bytes  []byte
}

// field returns the last value of a field of a message, as protobuf's rule for
// repeated fields is, and the zero value if there is none.
func field(message []byte, number protowire.Number) (last value, err error) {
	for len(message) > 0 {
		n, t, tag := protowire.ConsumeTag(message)
		if tag < 0 {
			return value{}, fmt.Errorf("read protobuf: %w", protowire.ParseError(tag))
		}
		message = message[tag:]
		size := protowire.ConsumeFieldValue(n, t, message)
		if size < 0 {
			return value{}, fmt.Errorf("read protobuf: %w", protowire.ParseError(size))
		}
		if n == number {
			switch t {
			case protowire.VarintType:
				v, _ := protowire.ConsumeVarint(message)
				last = value{number: v}
			case protowire.BytesType:
				b, _ := protowire.ConsumeBytes(message)
				last = value{bytes: b}
			}
		}
		message = message[size:]
	}
	return last, nil
}

// secrets lists what must not come back in an error: the values of the headers
// that stand in files, as a whole and the words that they consist of.
func secrets(h http.Header) []string {
	var all []string
	for _, values := range h {
		for _, v := range values {
			all = append(all, v)
			for _, word := range strings.Fields(v) {
				if len(word) >= 6 && word != "Bearer" {
					all = append(all, word)
				}
			}
		}
	}
	return all
}

// maxReason bounds what is repeated of a peer's text, in bytes.
const maxReason = 300

// hide cuts a peer's text and takes secrets out of it: a debugging proxy may
// repeat the request.
func hide(text string, secrets []string) string {
	for _, s := range secrets {
		text = strings.ReplaceAll(text, s, "[secret]")
	}
	text = strings.TrimSpace(text)
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason], "") + "…"
	}
	return text
}
