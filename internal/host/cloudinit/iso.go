package cloudinit

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"
)

// sector is the size of a block of an ISO 9660 image, in bytes.
const sector = 2048

// The image's first blocks. ISO 9660 (ECMA-119) keeps 16 blocks for the
// system, then volume descriptors follow. Each of the two trees has a path
// table in both byte orders and one directory.
const (
	primaryBlock = 16 + iota
	jolietBlock
	endBlock
	primaryPathL
	primaryPathM
	jolietPathL
	jolietPathM
	primaryRoot
	jolietRoot
	firstFile
)

// iso returns an ISO 9660 image with files in its root. Their names stand in
// it as they are twice: as Rock Ridge names, for Linux and the BSDs, and as
// Joliet names, for Windows. Everything in it is fixed by its arguments; it
// carries no time.
func iso(label string, files []Document) ([]byte, error) {
	files = slices.Clone(files)
	slices.SortFunc(files, func(a, b Document) int { return cmp.Compare(a.Name, b.Name) })
	starts := make([]int, len(files))
	blocks := firstFile
	for n, f := range files {
		if len(f.Name) == 0 || len(f.Name) > 31 || strings.ContainsAny(f.Name, "/;\x00") {
			return nil, fmt.Errorf("the file name %q does not fit an ISO 9660 image", f.Name)
		}
		starts[n] = blocks
		blocks += (len(f.Content) + sector - 1) / sector
	}
	image := make([]byte, blocks*sector)
	at := func(block int) []byte { return image[block*sector:][:sector] }

	plain := func(s string) []byte { return []byte(strings.ToUpper(s) + ".;1") }
	if err := directory(at(primaryRoot), primaryRoot, files, starts, plain, true); err != nil {
		return nil, err
	}
	if err := directory(at(jolietRoot), jolietRoot, files, starts, ucs2, false); err != nil {
		return nil, err
	}
	descriptor(at(primaryBlock), 1, blocks, primaryPathL, primaryPathM, primaryRoot)
	pad(at(primaryBlock)[40:72], []byte(strings.ToUpper(label)), []byte(" "))
	descriptor(at(jolietBlock), 2, blocks, jolietPathL, jolietPathM, jolietRoot)
	copy(at(jolietBlock)[88:], "%/E") // UCS-2 level 3
	pad(at(jolietBlock)[40:72], ucs2(label), ucs2(" "))
	end := at(endBlock)
	end[0] = 255
	copy(end[1:], "CD001\x01")
	for _, table := range []struct {
		block, root int
		order       binary.ByteOrder
	}{
		{primaryPathL, primaryRoot, binary.LittleEndian}, {primaryPathM, primaryRoot, binary.BigEndian},
		{jolietPathL, jolietRoot, binary.LittleEndian}, {jolietPathM, jolietRoot, binary.BigEndian},
	} {
		b := at(table.block)
		b[0] = 1 // length of the root's name
		table.order.PutUint32(b[2:], uint32(table.root))
		table.order.PutUint16(b[6:], 1) // its own parent
	}
	for n, f := range files {
		copy(image[starts[n]*sector:], f.Content)
	}
	return image, nil
}

// pathTable is the length in bytes of a path table that has the root alone.
const pathTable = 10

// descriptor fills a volume descriptor: type 1 is the primary one, 2 the
// supplementary one (ECMA-119 sections 8.4 and 8.5).
func descriptor(b []byte, kind byte, blocks, pathL, pathM, root int) {
	for n := range b[8:813] {
		b[8+n] = ' '
	}
	if kind == 2 {
		clear(b[8:813])
	}
	b[0] = kind
	copy(b[1:], "CD001\x01")
	b[7] = 0
	clear(b[72:80])
	both32(b[80:], blocks)
	clear(b[88:120])
	both16(b[120:], 1)
	both16(b[124:], 1)
	both16(b[128:], sector)
	both32(b[132:], pathTable)
	binary.LittleEndian.PutUint32(b[140:], uint32(pathL))
	clear(b[144:148])
	binary.BigEndian.PutUint32(b[148:], uint32(pathM))
	clear(b[152:156])
	copy(b[156:190], record([]byte{0}, root, sector, true, nil))
	for n := range 4 { // times of creation, change, expiry and effect: not said
		stamp := b[813+17*n:][:17]
		copy(stamp, "0000000000000000\x00")
	}
	b[881] = 1
}

// directory fills the root directory.
func directory(b []byte, own int, files []Document, starts []int, name func(string) []byte, rockRidge bool) error {
	var self, extension []byte
	if rockRidge {
		// The root says that SUSP (IEEE P1281) is in use, and of which kind.
		self = append(self, 'S', 'P', 7, 1, 0xbe, 0xef, 0)
		self = append(self, 'E', 'R', 8+10, 1, 10, 0, 0, 1)
		self = append(self, "RRIP_1991A"...)
		self = append(self, mode(0o040555, 2)...)
		extension = mode(0o040555, 2)
	}
	records := [][]byte{
		record([]byte{0}, own, sector, true, self),
		record([]byte{1}, own, sector, true, extension),
	}
	for n, f := range files {
		var extension []byte
		if rockRidge {
			extension = append(mode(0o100444, 1), 'N', 'M', byte(5+len(f.Name)), 1, 0)
			extension = append(extension, f.Name...)
		}
		records = append(records, record(name(f.Name), starts[n], len(f.Content), false, extension))
	}
	used := 0
	for _, r := range records {
		if used+len(r) > len(b) {
			return fmt.Errorf("%d files do not fit one directory", len(files))
		}
		used += copy(b[used:], r)
	}
	return nil
}

// record is a directory record (ECMA-119 section 9.1).
func record(name []byte, start, size int, directory bool, extension []byte) []byte {
	length := 33 + len(name)
	length += length % 2
	extended := length + len(extension)
	extended += extended % 2
	b := make([]byte, extended)
	b[0] = byte(extended)
	both32(b[2:], start)
	both32(b[10:], size)
	copy(b[18:], []byte{80, 1, 1, 0, 0, 0, 0}) // 1980-01-01, as a date must be given
	if directory {
		b[25] = 2
	}
	both16(b[28:], 1)
	b[32] = byte(len(name))
	copy(b[33:], name)
	copy(b[length:], extension)
	return b
}

// mode is the Rock Ridge entry of a file's permissions.
func mode(bits, links int) []byte {
	b := make([]byte, 36)
	copy(b, []byte{'P', 'X', 36, 1})
	both32(b[4:], bits)
	both32(b[12:], links)
	return b
}

// both32 and both16 write a number in both byte orders.
func both32(b []byte, v int) {
	binary.LittleEndian.PutUint32(b, uint32(v))
	binary.BigEndian.PutUint32(b[4:], uint32(v))
}

func both16(b []byte, v int) {
	binary.LittleEndian.PutUint16(b, uint16(v))
	binary.BigEndian.PutUint16(b[2:], uint16(v))
}

func ucs2(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.BigEndian.AppendUint16(b, u)
	}
	return b
}

// pad fills b with s and then with copies of fill.
func pad(b, s, fill []byte) {
	n := copy(b, s)
	for n < len(b) {
		n += copy(b[n:], fill)
	}
}
