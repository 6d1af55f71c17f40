package agent

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/token"
)

// identity is who the host is, from joining on. Nothing in it is secret.
type identity struct {
	Server        string `json:"server"`
	TokenEndpoint string `json:"token_endpoint"`
	JoinedWith    string `json:"joined_with"` // fingerprint of the join token, to know it again
	link.JoinAnswer

	// Address is the one by which the host reached the server last: it may start
	// when its network does not know the server yet, with machines that run.
	Address netip.Addr `json:"address,omitzero"`
}

// keyBits of the host's RSA key. RS256 is what the reference has for identity
// tokens (reference/instance-metadata-and-vpc.md section 1.5).
const keyBits = 2048

// state is the agent's directory. What could be used elsewhere is sealed under
// the master key, which is not in it.
//
//	identity.json      who the host is
//	key.sealed         its private key
//	placements.sealed  what is placed on it, for when the server is away
//	authority.json     its certificate authority, the keys sealed
//	outbox.jsonl       events that the server does not have yet
type state struct {
	dir    string
	sealer *token.Sealer
}

const (
	identityFile   = "identity.json"
	keyFile        = "key.sealed"
	placementsFile = "placements.sealed"
	authorityFile  = "authority.json"
)

// openState opens the directory. Where the master key is gone, what was sealed
// under it is gone with it, and the host has to join again.
func openState(ctx context.Context, dir string, master token.MasterKey, joining bool) (*state, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the agent's directory: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("close the agent's directory to others: %w", err)
	}
	_, err := os.Stat(filepath.Join(dir, keyFile))
	fresh := errors.Is(err, os.ErrNotExist)
	if master.File != "" {
		if err := os.MkdirAll(filepath.Dir(master.File), 0o700); err != nil {
			return nil, fmt.Errorf("make the directory of the master key: %w", err)
		}
	}
	key, err := master.Load(ctx, fresh || joining)
	if err != nil {
		return nil, fmt.Errorf("%w. If it is gone, the host joins again with a new key: 'tabard host create-join-token --host NAME', then --join-token-file", err)
	}
	sealer, err := token.NewSealer(key)
	if err != nil {
		return nil, err
	}
	return &state{dir: dir, sealer: sealer}, nil
}

// identity returns who the host is; false means that it has not joined.
func (s *state) identity() (identity, bool, error) {
	var id identity
	b, err := os.ReadFile(filepath.Join(s.dir, identityFile))
	if errors.Is(err, os.ErrNotExist) {
		return id, false, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &id)
	}
	if err != nil {
		return id, false, fmt.Errorf("read who this host is: %w", err)
	}
	return id, true, nil
}

func (s *state) setIdentity(id identity) error {
	b, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(s.dir, identityFile), append(b, '\n'))
}

// key returns the host's key, and makes it when there is none, or when there is
// one that cannot be opened any more and the host joins again.
func (s *state) key(joining bool) (*rsa.PrivateKey, error) {
	der, err := s.open(keyFile)
	switch {
	case err == nil:
		parsed, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			return nil, fmt.Errorf("parse the host's key: %w", err)
		}
		key, ok := parsed.(*rsa.PrivateKey)
		if !ok {
			return nil, fmt.Errorf("the host's key is a %T, not an RSA key", parsed)
		}
		return key, nil
	case !joining && !errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("%w. If the master key is lost, the host joins again: 'tabard host create-join-token --host NAME', then --join-token-file", err)
	}
	// What else was sealed under a master key that is gone cannot be opened
	// either, and is made or sent anew.
	for _, name := range []string{placementsFile, authorityFile} {
		if err := os.Remove(filepath.Join(s.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("remove what cannot be opened any more: %w", err)
		}
	}
	key, err := rsa.GenerateKey(rand.Reader, keyBits)
	if err != nil {
		return nil, fmt.Errorf("make the host's key: %w", err)
	}
	if der, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		return nil, fmt.Errorf("encode the host's key: %w", err)
	}
	return key, s.seal(keyFile, der)
}

// seal writes a file that only the holder of the master key can read. The name
// is bound to it.
func (s *state) seal(name string, secret []byte) error {
	if err := writeFile(filepath.Join(s.dir, name), s.sealer.Seal(secret, name)); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

func (s *state) open(name string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(s.dir, name))
	if err != nil {
		return nil, err
	}
	return s.sealer.Open(b, name)
}

// Signer signs with the host's key: identity tokens, and what the host proves
// itself with.
type Signer struct {
	Key   crypto.Signer
	KeyID string

	signers sync.Map // typ → jose.Signer
}

// Public returns the public half of the key.
func (s *Signer) Public(keyID string) (crypto.PublicKey, bool) {
	return s.Key.Public(), keyID == s.KeyID
}

// Sign returns the claims as a compact JWT. typ is its typ header; "" is none.
func (s *Signer) Sign(claims any, typ string) (string, error) {
	signer, ok := s.signers.Load(typ)
	if !ok {
		options := &jose.SignerOptions{}
		if s.KeyID != "" {
			options = options.WithHeader("kid", s.KeyID)
		}
		if typ != "" {
			options = options.WithType(jose.ContentType(typ))
		}
		made, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: s.Key}, options)
		if err != nil {
			return "", fmt.Errorf("prepare to sign: %w", err)
		}
		signer, _ = s.signers.LoadOrStore(typ, made)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", fmt.Errorf("encode the claims: %w", err)
	}
	signed, err := signer.(jose.Signer).Sign(payload)
	if err != nil {
		return "", fmt.Errorf("sign: %w", err)
	}
	return signed.CompactSerialize()
}
