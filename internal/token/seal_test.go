package token_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"os"
	"path/filepath"
	"testing"

	"tabard.dev/tabard/internal/token"
)

func TestWhatWasSealedIsOpenedOnlyWithItsKeyAndLabel(t *testing.T) {
	s, other := sealer(t, 1), sealer(t, 2)
	secret := []byte("the secret")
	sealed := s.Seal(secret, "label")
	if got, err := s.Open(sealed, "label"); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("opened as %q, %v", got, err)
	}
	if bytes.Contains(sealed, secret) {
		t.Error("the sealed secret holds the secret")
	}
	if bytes.Equal(sealed, s.Seal(secret, "label")) {
		t.Error("sealing twice gives the same")
	}
	for name, open := range map[string]func() ([]byte, error){
		"another master key": func() ([]byte, error) { return other.Open(sealed, "label") },
		"another label":      func() ([]byte, error) { return s.Open(sealed, "label2") },
		"no label":           func() ([]byte, error) { return s.Open(sealed, "") },
		"a truncated box":    func() ([]byte, error) { return s.Open(sealed[:len(sealed)-1], "label") },
		"an empty box":       func() ([]byte, error) { return s.Open(nil, "label") },
	} {
		if got, err := open(); err == nil {
			t.Errorf("%s: opened as %q", name, got)
		}
	}
	for i := range sealed {
		changed := bytes.Clone(sealed)
		changed[i] ^= 1
		if _, err := s.Open(changed, "label"); err == nil {
			t.Errorf("byte %d changed and nobody noticed", i)
		}
	}
}

func TestAHashNeedsTheMasterKey(t *testing.T) {
	s := sealer(t, 1)
	if s.Hash("key") != sealer(t, 1).Hash("key") {
		t.Error("the same master key gives another hash")
	}
	if s.Hash("key") == sealer(t, 2).Hash("key") || s.Hash("key") == s.Hash("key2") {
		t.Error("two things have one hash")
	}
}

func TestAMasterKeyHasThirtyTwoBytes(t *testing.T) {
	for _, n := range []int{0, 16, 31, 33, 64} {
		if _, err := token.NewSealer(make([]byte, n)); err == nil {
			t.Errorf("%d bytes were taken", n)
		}
	}
}

func TestTheMasterKeyComesFromTheFirstPlaceThatIsGiven(t *testing.T) {
	dir := t.TempDir()
	encode := func(b byte) string { return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{b}, 32)) }
	file := filepath.Join(dir, "master.key")
	if err := os.WriteFile(file, []byte(encode(3)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		from token.MasterKey
		want byte
	}{
		{"value", token.MasterKey{Value: encode(1), Command: "echo " + encode(2), File: file}, 1},
		{"command", token.MasterKey{Command: "echo " + encode(2), File: file}, 2},
		{"file", token.MasterKey{File: file}, 3},
	} {
		got, err := tt.from.Load(context.Background(), true)
		if err != nil || !bytes.Equal(got, bytes.Repeat([]byte{tt.want}, 32)) {
			t.Errorf("%s: %x, %v", tt.name, got, err)
		}
	}
}

func TestAMasterKeyFileIsMadeOnceAndForItsOwnerOnly(t *testing.T) {
	from := token.MasterKey{File: filepath.Join(t.TempDir(), "master.key")}
	first, err := from.Load(context.Background(), true)
	if err != nil || len(first) != 32 || bytes.Equal(first, make([]byte, 32)) {
		t.Fatalf("%x, %v", first, err)
	}
	if second, err := from.Load(context.Background(), true); err != nil || !bytes.Equal(first, second) {
		t.Errorf("%x and then %x, %v", first, second, err)
	}
	info, err := os.Stat(from.File)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestABrokenMasterKeyIsAnErrorThatDoesNotShowIt(t *testing.T) {
	file := filepath.Join(t.TempDir(), "master.key")
	if err := os.WriteFile(file, []byte("hunter2hunter2"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, from := range map[string]token.MasterKey{
		"value": {Value: "hunter2hunter2"}, "command's output": {Command: "echo hunter2hunter2"}, "file": {File: file},
		"short value": {Value: "aGVsbG8="}, "failing command": {Command: "exit 3"}, "no file's directory": {File: filepath.Join(file, "x")},
	} {
		_, err := from.Load(context.Background(), true)
		if err == nil {
			t.Errorf("%s: no error", name)
		} else if bytes.Contains([]byte(err.Error()), []byte("hunter2")) {
			t.Errorf("%s: the error shows the key: %v", name, err)
		}
	}
}

func TestAMasterKeyThatOthersCanReadIsRefused(t *testing.T) {
	from := token.MasterKey{File: filepath.Join(t.TempDir(), "master.key")}
	if _, err := from.Load(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o660, 0o666} {
		if err := os.Chmod(from.File, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := from.Load(context.Background(), true); err == nil {
			t.Errorf("mode %o was taken", mode)
		}
	}
	if err := os.Chmod(from.File, 0o400); err != nil {
		t.Fatal(err)
	}
	if _, err := from.Load(context.Background(), true); err != nil {
		t.Errorf("a file that nobody can write: %v", err)
	}
}

// A master key that is gone must not be replaced while something is sealed
// under it.
func TestALostMasterKeyIsNotMadeAnew(t *testing.T) {
	from := token.MasterKey{File: filepath.Join(t.TempDir(), "master.key")}
	if _, err := from.Load(context.Background(), false); err == nil {
		t.Error("no error")
	}
	if _, err := os.Stat(from.File); err == nil {
		t.Error("the file was made")
	}
}
