package token

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"tabard.dev/tabard/internal/store/datadir"
)

// masterKeySize in bytes.
const masterKeySize = 32

// Sealer protects secrets at rest with keys derived from one master key
// (promise 7): what must be read again is encrypted, what must only be
// recognized is hashed with a key.
type Sealer struct {
	aead    cipher.AEAD
	hashKey []byte
}

// NewSealer derives the keys. The master key must have 32 bytes.
func NewSealer(master []byte) (*Sealer, error) {
	if len(master) != masterKeySize {
		return nil, fmt.Errorf("master key has %d bytes, want %d", len(master), masterKeySize)
	}
	sealKey, err := hkdf.Key(sha256.New, master, nil, "tabard seal v1", 32)
	if err != nil {
		return nil, fmt.Errorf("derive the sealing key: %w", err)
	}
	hashKey, err := hkdf.Key(sha256.New, master, nil, "tabard hash v1", 32)
	if err != nil {
		return nil, fmt.Errorf("derive the hashing key: %w", err)
	}
	block, err := aes.NewCipher(sealKey)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	return &Sealer{aead: aead, hashKey: hashKey}, nil
}

// Seal encrypts a secret. The label is bound to it, so that one sealed value
// cannot stand in for another.
func (s *Sealer) Seal(secret []byte, label string) []byte {
	return s.aead.Seal(nil, nil, secret, []byte(label))
}

// Open decrypts what Seal made with the same label.
func (s *Sealer) Open(sealed []byte, label string) ([]byte, error) {
	secret, err := s.aead.Open(nil, nil, sealed, []byte(label))
	if err != nil {
		return nil, fmt.Errorf("open the sealed %s: is this the master key it was sealed under? %w", label, err)
	}
	return secret, nil
}

// Hash returns the keyed hash under which a secret such as an API key is
// looked up. Whoever has only the store can neither invert nor test it.
func (s *Sealer) Hash(secret string) string {
	mac := hmac.New(sha256.New, s.hashKey)
	mac.Write([]byte(secret))
	return hex.EncodeToString(mac.Sum(nil))
}

// MasterKey says where the master key comes from. The first one given counts:
// Value, Command, File.
type MasterKey struct {
	Value   string // base64
	Command string // prints base64 on standard output; run by /bin/sh
	File    string // holds base64; made with mode 0600 if it does not exist
}

const commandTimeout = 30 * time.Second

// Load returns the 32 bytes. A file that does not exist is made only when
// mayMake says so: when nothing is sealed yet.
func (m MasterKey) Load(ctx context.Context, mayMake bool) ([]byte, error) {
	switch {
	case m.Value != "":
		return decodeMaster(m.Value, "the environment")
	case m.Command != "":
		ctx, cancel := context.WithTimeout(ctx, commandTimeout)
		defer cancel()
		cmd := exec.CommandContext(ctx, "/bin/sh", "-c", m.Command)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("run the master key command: %w", err)
		}
		return decodeMaster(string(out), "the master key command")
	}
	return m.loadFile(mayMake)
}

func (m MasterKey) loadFile(mayMake bool) ([]byte, error) {
	b, err := os.ReadFile(m.File)
	if err == nil {
		if info, err := os.Stat(m.File); err == nil && runtime.GOOS != "windows" && info.Mode().Perm()&0o077 != 0 {
			return nil, fmt.Errorf("the master key %s can be read by others (mode %04o): chmod 600 it, and think about who has seen it",
				m.File, info.Mode().Perm())
		}
		return decodeMaster(string(b), m.File)
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("read the master key: %w", err)
	}
	if !mayMake {
		return nil, fmt.Errorf("the master key %s does not exist, and the data were sealed under it: put it back, or name its place with --master-key-file, TABARD_MASTER_KEY or --master-key-command", m.File)
	}
	key := make([]byte, masterKeySize)
	rand.Read(key) // never fails, see crypto/rand
	// What is sealed from now on is lost with it, and half a key would hinder
	// the next start.
	if err := datadir.WriteNew(m.File, []byte(base64.StdEncoding.EncodeToString(key)+"\n")); err != nil {
		return nil, fmt.Errorf("make the master key: %w", err)
	}
	return key, nil
}

func decodeMaster(s, source string) ([]byte, error) {
	key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(s))
	if err != nil || len(key) != masterKeySize {
		return nil, fmt.Errorf("%s does not hold a master key: want %d bytes in base64 (head -c %d /dev/urandom | base64)",
			source, masterKeySize, masterKeySize)
	}
	return key, nil
}
