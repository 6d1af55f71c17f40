package network

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/net/dns/dnsmessage"
)

// metadataName is the metadata service's name
// (reference/instance-metadata-and-vpc.md section 1.1).
const metadataName = "api.metadata.cloud.ibm.com."

const (
	domainPort   = 53
	metadataTTL  = 300  // seconds
	plainPayload = 512  // bytes of a datagram for a peer that announces no more (RFC 1035 section 4.2.1)
	maxPayload   = 1232 // bytes of a datagram that passes unfragmented
	maxQuery     = 1024 // bytes of a query: one name, and an option record
	maxResponse  = 65535
)

// forwarder sends a query, by UDP or TCP, and returns the answer.
type forwarder func(ctx context.Context, overTCP bool, query []byte) ([]byte, error)

// question is a query as far as the resolver knows it.
type question struct {
	header   dnsmessage.Header
	question dnsmessage.Question
	edns     bool
	dnssec   bool
	payload  int // bytes of a datagram that its sender takes
}

// resolve answers a query, or returns nil for one that deserves no answer: what
// is not a query, lest two servers answer each other forever. A nil forward
// means that no other names than the metadata service's are known.
func resolve(ctx context.Context, query []byte, overTCP bool, forward forwarder) []byte {
	q, code := parseQuestion(query)
	switch {
	case q == nil:
		return nil
	case code != dnsmessage.RCodeSuccess:
		return q.reply(code, forward != nil)
	case q.question.Class != dnsmessage.ClassINET:
		return q.reply(dnsmessage.RCodeRefused, forward != nil)
	case strings.EqualFold(q.question.Name.String(), metadataName):
		return q.reply(dnsmessage.RCodeSuccess, forward != nil)
	case forward == nil:
		return q.reply(dnsmessage.RCodeRefused, false)
	}
	answer, err := q.forward(ctx, overTCP, forward)
	if err != nil {
		return q.reply(dnsmessage.RCodeServerFailure, true)
	}
	if !overTCP && len(answer) > q.payload {
		q.header.Truncated = true
		return q.reply(dnsmessage.RCodeSuccess, true)
	}
	return answer
}

// parseQuestion reads a query. One that gets no answer is nil; one that can't be
// answered comes with the code to say so.
func parseQuestion(query []byte) (*question, dnsmessage.RCode) {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil || h.Response {
		return nil, 0
	}
	q := &question{header: h, payload: plainPayload}
	if h.OpCode != 0 {
		return q, dnsmessage.RCodeNotImplemented
	}
	if q.question, err = p.Question(); err != nil {
		q.question = dnsmessage.Question{}
		return q, dnsmessage.RCodeFormatError
	}
	if _, err := p.Question(); !errors.Is(err, dnsmessage.ErrSectionDone) {
		return q, dnsmessage.RCodeFormatError
	}
	if errors.Join(p.SkipAllAnswers(), p.SkipAllAuthorities()) != nil {
		return q, dnsmessage.RCodeFormatError
	}
	for {
		r, err := p.AdditionalHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return q, dnsmessage.RCodeSuccess
		}
		if err == nil {
			err = p.SkipAdditional()
		}
		if err != nil || r.Type == dnsmessage.TypeOPT && q.edns {
			return q, dnsmessage.RCodeFormatError
		}
		if r.Type == dnsmessage.TypeOPT {
			q.edns, q.dnssec = true, r.DNSSECAllowed()
			q.payload = min(max(int(r.Class), plainPayload), maxPayload)
		}
	}
}

// reply is an answer of the resolver's own.
func (q *question) reply(code dnsmessage.RCode, recursion bool) []byte {
	known := strings.EqualFold(q.question.Name.String(), metadataName)
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{
		ID: q.header.ID, Response: true, OpCode: q.header.OpCode, RCode: code, Truncated: q.header.Truncated,
		RecursionDesired: q.header.RecursionDesired, RecursionAvailable: recursion, Authoritative: known,
	})
	err := b.StartQuestions()
	if q.question.Name.Length > 0 {
		err = errors.Join(err, b.Question(q.question))
	}
	if known && code == dnsmessage.RCodeSuccess && q.question.Class == dnsmessage.ClassINET &&
		(q.question.Type == dnsmessage.TypeA || q.question.Type == dnsmessage.TypeALL) {
		err = errors.Join(err, b.StartAnswers(), b.AResource(
			dnsmessage.ResourceHeader{Name: q.question.Name, Class: dnsmessage.ClassINET, TTL: metadataTTL},
			dnsmessage.AResource{A: metadataAddress.As4()}))
	}
	if q.edns {
		var opt dnsmessage.ResourceHeader
		err = errors.Join(err, b.StartAdditionals(), opt.SetEDNS0(maxPayload, code, q.dnssec), b.OPTResource(opt, dnsmessage.OPTResource{}))
	}
	out, finish := b.Finish()
	if errors.Join(err, finish) != nil {
		return nil
	}
	return out
}

// forward asks elsewhere. Nothing of what the machine sent goes out but the
// name, the type and its wish for signatures.
func (q *question) forward(ctx context.Context, overTCP bool, ask forwarder) ([]byte, error) {
	var id [2]byte
	rand.Read(id[:])
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: binary.BigEndian.Uint16(id[:]), RecursionDesired: true})
	err := errors.Join(b.StartQuestions(), b.Question(q.question))
	if q.edns {
		var opt dnsmessage.ResourceHeader
		err = errors.Join(err, b.StartAdditionals(), opt.SetEDNS0(q.payload, 0, q.dnssec), b.OPTResource(opt, dnsmessage.OPTResource{}))
	}
	query, finish := b.Finish()
	if err := errors.Join(err, finish); err != nil {
		return nil, fmt.Errorf("writing a query: %w", err)
	}
	answer, err := ask(ctx, overTCP, query)
	if err != nil {
		return nil, err
	}
	if !answers(answer, query) {
		return nil, errors.New("the answer is not to the question")
	}
	binary.BigEndian.PutUint16(answer, q.header.ID)
	return answer, nil
}

// answers tells whether a message is a response to a query.
func answers(answer, query []byte) bool {
	var a, q dnsmessage.Parser
	got, err := a.Start(answer)
	if err != nil {
		return false
	}
	want, err := q.Start(query)
	if err != nil || !got.Response || got.ID != want.ID {
		return false
	}
	asked, err := q.Question()
	if err != nil {
		return false
	}
	// Some servers leave the question out of an error.
	echoed, err := a.Question()
	if errors.Is(err, dnsmessage.ErrSectionDone) {
		return got.RCode != dnsmessage.RCodeSuccess
	}
	return err == nil && echoed.Type == asked.Type && echoed.Class == asked.Class &&
		strings.EqualFold(echoed.Name.String(), asked.Name.String())
}

// hostResolvers returns the resolvers of a resolv.conf(5), no more than the
// three that the C library takes.
func hostResolvers(path string) ([]netip.AddrPort, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []netip.AddrPort
	lines := bufio.NewScanner(io.LimitReader(f, 64<<10))
	for lines.Scan() && len(out) < 3 {
		words := strings.Fields(lines.Text())
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(words[1]); err == nil {
			out = append(out, netip.AddrPortFrom(a, domainPort))
		}
	}
	return out, lines.Err()
}
