package agent

import (
	"bytes"
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
//	joining.sealed     one that it is joining with
//	placements.sealed  what is placed on it, for when the server is away
//	authority.json     its certificate authority, the keys sealed
//	outbox.jsonl       events that the server does not have yet
type state struct {
	dir    string
	sealer *token.Sealer

	who    identity
	joined bool   // who is known
	token  string // fingerprint of the token to join with; "" where there is nothing to join
}

const (
	identityFile   = "identity.json"
	keyFile        = "key.sealed"
	joiningFile    = "joining.sealed"
	placementsFile = "placements.sealed"
	authorityFile  = "authority.json"
)

// openState opens the directory. A token that the host has joined with already is
// none: the service is started with the same words each time. Where the master
// key is gone, what was sealed under it is gone with it, and the host has to join
// again.
func openState(ctx context.Context, dir string, master token.MasterKey, joinToken string) (*state, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the agent's directory: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("close the agent's directory to others: %w", err)
	}
	s := &state{dir: dir}
	if err := s.identify(); err != nil {
		return nil, err
	}
	if joinToken != "" && (!s.joined || s.who.JoinedWith != link.Fingerprint(joinToken)) {
		s.token = link.Fingerprint(joinToken)
	}
	if master.File != "" {
		if err := os.MkdirAll(filepath.Dir(master.File), 0o700); err != nil {
			return nil, fmt.Errorf("make the directory of the master key: %w", err)
		}
	}
	key, err := master.Load(ctx, !s.has(keyFile) && !s.has(joiningFile) || s.token != "")
	if err != nil {
		return nil, fmt.Errorf("%w. If it is gone, the host joins again with a new key: 'tabard host create-join-token --host NAME', then --join-token-file", err)
	}
	if s.sealer, err = token.NewSealer(key); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *state) has(name string) bool {
	_, err := os.Stat(filepath.Join(s.dir, name))
	return !errors.Is(err, os.ErrNotExist)
}

// identify reads who the host is, if it has joined.
func (s *state) identify() error {
	b, err := os.ReadFile(filepath.Join(s.dir, identityFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(b, &s.who)
	}
	if err != nil {
		return fmt.Errorf("read who this host is: %w", err)
	}
	s.joined = true
	return nil
}

// key returns the host's private key.
func (s *state) key() (*rsa.PrivateKey, error) {
	if err := s.settle(); err != nil {
		return nil, err
	}
	der, err := s.open(keyFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("open the host's key: %w. If the master key is lost, the host joins again: 'tabard host create-join-token --host NAME', then --join-token-file", err)
	}
	return parseKey(der)
}

func parseKey(der []byte) (*rsa.PrivateKey, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("parse the host's key: %w", err)
	}
	key, ok := parsed.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("the host's key is a %T, not an RSA key", parsed)
	}
	return key, nil
}

// joiningKey returns the key to join with: a new one for each join token, and the
// same for the same token, because an attempt may have succeeded without our
// knowing. The key that the host has, if any, stays until the server has taken
// this one.
func (s *state) joiningKey() (*rsa.PrivateKey, error) {
	if der, err := s.open(joiningFile, joiningFile+" "+s.token); err == nil {
		return parseKey(der)
	}
	key, err := rsa.GenerateKey(rand.Reader, keyBits)
	if err != nil {
		return nil, fmt.Errorf("make the host's key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode the host's key: %w", err)
	}
	return key, s.seal(joiningFile, joiningFile+" "+s.token, der)
}

// become notes that the server has taken the key that the host joins with.
func (s *state) become(who identity) error {
	b, err := json.MarshalIndent(who, "", "  ")
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(s.dir, identityFile), bytes.NewReader(append(b, '\n'))); err != nil {
		return fmt.Errorf("keep who this host is: %w", err)
	}
	s.who, s.joined, s.token = who, true, ""
	return s.settle()
}

// settle makes the key that the host has joined with its key, which is left to
// do after joining.
func (s *state) settle() error {
	der, err := s.open(joiningFile, joiningFile+" "+s.who.JoinedWith)
	if err != nil {
		return nil // there is none, or the server has not taken it
	}
	if _, err := s.open(keyFile, keyFile); err != nil {
		// What else was sealed under a master key that is gone cannot be opened
		// either, and is made or sent anew.
		for _, name := range []string{placementsFile, authorityFile} {
			if err := os.Remove(filepath.Join(s.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("remove what cannot be opened any more: %w", err)
			}
		}
	}
	if err := s.seal(keyFile, keyFile, der); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(s.dir, joiningFile)); err != nil {
		return fmt.Errorf("remove the key that the host joined with: %w", err)
	}
	return nil
}

// seal writes a file that only the holder of the master key can read. What it is
// for is bound to it.
func (s *state) seal(name, purpose string, secret []byte) error {
	if err := writeFile(filepath.Join(s.dir, name), bytes.NewReader(s.sealer.Seal(secret, purpose))); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

func (s *state) open(name, purpose string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(s.dir, name))
	if err != nil {
		return nil, err
	}
	return s.sealer.Open(b, purpose)
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
