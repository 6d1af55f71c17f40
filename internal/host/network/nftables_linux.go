package network

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The words of nft(8) that the rules of this package are made of. All act on
// the namespace of the calling thread.

// bufferBytes bounds one batch. The kernel takes a batch whole, and answers each
// of its messages before the first answer is read.
const bufferBytes = 8 << 20

// batch is a change of the rules that takes effect whole or not at all.
type batch struct {
	*nftables.Conn
	sets uint32
	err  error
}

// commit commits all that f stages, or nothing of it.
func commit(f func(*batch)) error {
	c, err := nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetWriteBuffer(bufferBytes), c.SetReadBuffer(bufferBytes))
	}))
	if err != nil {
		return err
	}
	b := &batch{Conn: c}
	f(b)
	if b.err != nil {
		return b.err
	}
	return b.Flush()
}

func (b *batch) fail(err error) { b.err = errors.Join(b.err, err) }

// replaceTable empties a table that may exist, within the batch.
func (b *batch) replaceTable(t *nftables.Table) {
	b.AddTable(t)
	b.DelTable(t)
	b.AddTable(t)
}

// emptyChain makes a chain that may exist, without rules.
func (b *batch) emptyChain(c *nftables.Chain) *nftables.Chain {
	b.AddChain(c)
	b.FlushChain(c)
	return c
}

func (b *batch) rule(c *nftables.Chain, parts ...[]expr.Any) {
	r := &nftables.Rule{Table: c.Table, Chain: c}
	for _, p := range parts {
		r.Exprs = append(r.Exprs, p...)
	}
	b.AddRule(r)
}

// addMap makes a named map, or leaves one that exists as it is.
func (b *batch) addMap(s *nftables.Set) {
	b.sets++
	s.ID = b.sets
	b.fail(b.AddSet(s, nil))
}

func (b *batch) put(s *nftables.Set, key, value []byte) {
	b.fail(b.SetAddElements(s, []nftables.SetElement{{Key: key, Val: value}}))
}

func (b *batch) putVerdict(s *nftables.Set, key []byte, v *expr.Verdict) {
	b.fail(b.SetAddElements(s, []nftables.SetElement{{Key: key, VerdictData: v}}))
}

// elementsAtOnce bounds the elements of one message, which has less than 64 KiB.
const elementsAtOnce = 500

// change makes a set that has some elements have others.
func (b *batch) change(s *nftables.Set, have, want map[string]bool) {
	missing := func(in, from map[string]bool) []nftables.SetElement {
		var out []nftables.SetElement
		for key := range from {
			if !in[key] {
				out = append(out, nftables.SetElement{Key: []byte(key)})
			}
		}
		return out
	}
	for some := range slices.Chunk(missing(want, have), elementsAtOnce) {
		b.fail(b.SetDeleteElements(s, some))
	}
	for some := range slices.Chunk(missing(have, want), elementsAtOnce) {
		b.fail(b.SetAddElements(s, some))
	}
}

// readSet returns the elements of a set, which are none where its table is not
// there.
func readSet(s *nftables.Set) (map[string]bool, error) {
	there, err := hasTable(s.Table)
	if err != nil || !there {
		return nil, err
	}
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	elements, err := c.GetSetElements(s)
	if err != nil {
		return nil, fmt.Errorf("reading the set %s: %w", s.Name, err)
	}
	out := make(map[string]bool, len(elements))
	for _, e := range elements {
		out[string(e.Key)] = true
	}
	return out, nil
}

func hasTable(t *nftables.Table) (bool, error) {
	c, err := nftables.New()
	if err != nil {
		return false, err
	}
	tables, err := c.ListTablesOfFamily(t.Family)
	if err != nil {
		return false, fmt.Errorf("listing tables: %w", err)
	}
	return slices.ContainsFunc(tables, func(o *nftables.Table) bool { return o.Name == t.Name }), nil
}

// oneOf matches the source or the destination of IPv4 against addresses that
// all differ.
func (b *batch) oneOf(t *nftables.Table, offset uint32, addresses []netip.Addr) []expr.Any {
	b.sets++
	s := &nftables.Set{Table: t, ID: b.sets, Name: "__set%d", Anonymous: true, Constant: true, KeyType: nftables.TypeIPAddr}
	elements := make([]nftables.SetElement, 0, len(addresses))
	for _, a := range addresses {
		elements = append(elements, nftables.SetElement{Key: a.AsSlice()})
	}
	b.fail(b.AddSet(s, elements))
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID},
	}
}

// Offsets in the IPv4 header.
const (
	sourceOffset      = 12
	destinationOffset = 16
)

// field compares bytes of a header.
func field(base expr.PayloadBase, offset uint32, op expr.CmpOp, want []byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: uint32(len(want))},
		&expr.Cmp{Register: 1, Op: op, Data: want},
	}
}

// frame compares the EtherType.
func frame(op expr.CmpOp, want uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
		&expr.Cmp{Register: 1, Op: op, Data: binaryutil.BigEndian.PutUint16(want)},
	}
}

// in matches an IPv4 address of the header at offset against a prefix.
func in(offset uint32, p netip.Prefix) []expr.Any {
	if p.Bits() == 0 {
		return nil
	}
	mask := netmask(p.Bits())
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Register: 1, Op: expr.CmpOpEq, Data: p.Masked().Addr().AsSlice()},
	}
}

// netmask returns the four bytes of a netmask.
func netmask(bits int) []byte {
	return binaryutil.BigEndian.PutUint32(uint32(0xffffffff) << (32 - bits))
}

func source(op expr.CmpOp, a netip.Addr) []expr.Any {
	return field(expr.PayloadBaseNetworkHeader, sourceOffset, op, a.AsSlice())
}

func destination(a netip.Addr) []expr.Any {
	return field(expr.PayloadBaseNetworkHeader, destinationOffset, expr.CmpOpEq, a.AsSlice())
}

func protocol(p byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Register: 1, Op: expr.CmpOpEq, Data: []byte{p}},
	}
}

// port matches the destination port, of a first fragment only.
func port(p uint16) []expr.Any {
	return field(expr.PayloadBaseTransportHeader, 2, expr.CmpOpEq, binaryutil.BigEndian.PutUint16(p))
}

// ports matches a range of destination ports.
func ports(first, last uint16) []expr.Any {
	if first == last {
		return port(first)
	}
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Range{
			Op: expr.CmpOpEq, Register: 1,
			FromData: binaryutil.BigEndian.PutUint16(first), ToData: binaryutil.BigEndian.PutUint16(last),
		},
	}
}

// clamp has a TCP connection that opens not use larger segments than fit its
// way, in both directions.
func clamp() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Register: 1, Op: expr.CmpOpEq, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x06}, Xor: []byte{0}},
		&expr.Cmp{Register: 1, Op: expr.CmpOpEq, Data: []byte{0x02}},
		&expr.Rt{Register: 1, Key: expr.RtTCPMSS},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 2, Size: 2},
		&expr.Exthdr{SourceRegister: 1, Type: 2, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt},
	}
}

// notOpening matches TCP segments that do not open a connection: all but those
// whose flags are SYN without ACK.
func notOpening() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x12}, Xor: []byte{0}},
		&expr.Cmp{Register: 1, Op: expr.CmpOpNeq, Data: []byte{0x02}},
	}
}

// arriving and leaving match the device that a packet comes in or goes out by.
func arriving(device string) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Register: 1, Op: expr.CmpOpEq, Data: deviceName(device)},
	}
}

func leaving(device string) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
		&expr.Cmp{Register: 1, Op: expr.CmpOpEq, Data: deviceName(device)},
	}
}

// named matches devices whose names begin with prefix, or those whose do not.
func named(key expr.MetaKey, op expr.CmpOp, prefix string) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Register: 1, Op: op, Data: []byte(prefix)},
	}
}

// deviceName is a name as the kernel compares it whole.
func deviceName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// state matches connections in any of the states.
func state(bits uint32) []expr.Any { return conntrack(expr.CtKeySTATE, expr.CmpOpNeq, bits) }

// conntrack compares bits of a connection's record with none.
func conntrack(key expr.CtKey, op expr.CmpOp, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Register: 1, Op: op, Data: make([]byte, 4)},
	}
}

// byDevice goes where a verdict map has the device of the key.
func byDevice(key expr.MetaKey, verdicts *nftables.Set) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Lookup{SourceRegister: 1, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: verdicts.Name, SetID: verdicts.ID},
	}
}

// translate replaces an address by what a map has for the one at offset; it
// does nothing to others.
func translate(kind expr.NATType, offset uint32, by *nftables.Set) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: by.Name, SetID: by.ID},
		&expr.NAT{Type: kind, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	}
}

func masquerade() []expr.Any { return []expr.Any{&expr.Masq{}} }

func verdict(k expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: k}} }

func goTo(chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}}
}

func counter() []expr.Any { return []expr.Any{&expr.Counter{}} }

func accept() []expr.Any { return verdict(expr.VerdictAccept) }

func drop() []expr.Any { return verdict(expr.VerdictDrop) }

// base is a chain that the kernel runs at a hook.
func base(t *nftables.Table, name string, kind nftables.ChainType, hook *nftables.ChainHook, at *nftables.ChainPriority, policy nftables.ChainPolicy) *nftables.Chain {
	return &nftables.Chain{Table: t, Name: name, Type: kind, Hooknum: hook, Priority: at, Policy: &policy}
}
