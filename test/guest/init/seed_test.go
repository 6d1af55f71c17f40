//go:build linux

package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/fstest"
)

func volume(files map[string]string) fstest.MapFS {
	v := make(fstest.MapFS)
	for name, text := range files {
		v[name] = &fstest.MapFile{Data: []byte(text)}
	}
	return v
}

func TestTheSeedGivesNameKeysCertificatesAndScripts(t *testing.T) {
	s, err := readSeed(volume(map[string]string{
		"meta-data":      "instance-id: 0737_a\nlocal-hostname: web\npublic-keys:\n- ssh-ed25519 A one\n",
		"network-config": "version: 2\nethernets: {}\n",
		"vendor-data": "#cloud-config\nhostname: vendor\nssh_authorized_keys: [ssh-ed25519 A one, ssh-ed25519 B two]\n" +
			"ca_certs:\n  trusted:\n  - |\n    -----BEGIN CERTIFICATE-----\n    AA\n    -----END CERTIFICATE-----\n",
		"user-data": "#!/bin/sh\necho hello\n",
	}))
	if err != nil {
		t.Fatal(err)
	}
	want := seed{
		InstanceID: "0737_a",
		Hostname:   "vendor",
		Keys:       []string{"ssh-ed25519 A one", "ssh-ed25519 B two"},
		Network:    network{Version: 2, Ethernets: map[string]ethernet{}},
		Trusted:    []string{"-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----\n"},
		Scripts:    [][]byte{[]byte("#!/bin/sh\necho hello\n")},
	}
	if !reflect.DeepEqual(s, want) {
		t.Errorf("got  %+v\nwant %+v", s, want)
	}
}

func TestTheUsersDataGoBeforeTheVendors(t *testing.T) {
	s, err := readSeed(volume(map[string]string{
		"meta-data":   "{\"instance-id\": \"i\", \"local-hostname\": \"meta\"}",
		"vendor-data": "#cloud-config\nhostname: vendor\n",
		"user-data":   "#cloud-config\nhostname: user\nruncmd:\n- echo $HOME\n- [touch, \"it's here\"]\n",
	}))
	if err != nil {
		t.Fatal(err)
	}
	if s.Hostname != "user" {
		t.Errorf("the host name is %s", s.Hostname)
	}
	if want := "#!/bin/sh\necho $HOME\n'touch' 'it'\\''s here'\n"; len(s.Scripts) != 1 || string(s.Scripts[0]) != want {
		t.Errorf("the scripts are %q, not %q", s.Scripts, want)
	}
}

func TestPublicKeysMayBeTextListOrMap(t *testing.T) {
	for _, form := range []string{"|\n  k1\n  k2\n", "[k1, k2]", "{a: k1, b: [k2]}"} {
		var s seed
		if err := s.metadata([]byte("instance-id: i\npublic-keys: " + form)); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(s.Keys, []string{"k1", "k2"}) {
			t.Errorf("%q gives %q", form, s.Keys)
		}
	}
}

func TestWhatIsNotUnderstoodIsNamed(t *testing.T) {
	s, err := readSeed(volume(map[string]string{
		"meta-data":   "instance-id: i",
		"vendor-data": "#cloud-config\npackages: [nginx]\nca_certs: {remove_defaults: true}\n",
		"user-data":   "Content-Type: multipart/mixed\n",
	}))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(s.Ignored, ", "), `packages, remove_defaults, data that begin with "Content-Type: multipart/mixed"`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestASeedWithoutInstanceIDIsRefused(t *testing.T) {
	for _, files := range []map[string]string{{}, {"meta-data": "local-hostname: a"}} {
		if _, err := readSeed(volume(files)); err == nil {
			t.Errorf("%v is taken", files)
		}
	}
}

func TestWriteFilesDecodesAndSetsTheMode(t *testing.T) {
	root := t.TempDir()
	for _, f := range []file{
		{Path: "/opt/a/b", Content: "aGVsbG8=", Encoding: "b64", Permissions: "0700"},
		{Path: "/opt/a/b", Content: " again", Permissions: "0700", Append: true},
	} {
		if err := f.write(root); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(root, "opt/a/b")
	b, err := os.ReadFile(path)
	if err != nil || string(b) != "hello again" {
		t.Errorf("%q, %v", b, err)
	}
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o700 {
		t.Errorf("its mode is %v", info.Mode())
	}
}

func TestLabelsAreReadFromTheVolumes(t *testing.T) {
	iso := make([]byte, 17*2048)
	copy(iso[16*2048:], "\x01CD001\x01")
	copy(iso[16*2048+40:], "cidata                          ")
	ext4 := make([]byte, 4096)
	binary.LittleEndian.PutUint16(ext4[1024+56:], 0xef53)
	copy(ext4[1024+120:], "guest-root")
	for _, v := range []struct {
		disk             []byte
		isoWant, extWant string
	}{{iso, "cidata", ""}, {ext4, "", "guest-root"}, {nil, "", ""}} {
		if got := isoLabel(bytes.NewReader(v.disk)); got != v.isoWant {
			t.Errorf("the label of ISO 9660 is %q, not %q", got, v.isoWant)
		}
		if got := ext4Label(bytes.NewReader(v.disk)); got != v.extWant {
			t.Errorf("the label of ext4 is %q, not %q", got, v.extWant)
		}
	}
}
