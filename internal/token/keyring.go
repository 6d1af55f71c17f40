// Package token makes and checks the installation's own tokens: the key ring
// with its rotation and sealing, IAM access tokens, refresh tokens and the
// published key set.
package token

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/directory"
)

// KeyRingConfig are a key ring's collaborators and periods.
type KeyRingConfig struct {
	Directory *directory.Directory
	Sealer    *Sealer
	Now       func() time.Time
	Log       *slog.Logger

	Use    string // who signs with it
	Prefix string // of the key ids
	Alg    string // ES256 or RS256, for new keys

	Rotation time.Duration // how long a key signs
	Lead     time.Duration // how long before its use a key is published
	MaxLife  time.Duration // of the longest token: a key stays published so long after its last use

	// Changed, when not nil, runs in the transaction that adds or removes
	// keys, with the key set that is published from then on.
	Changed func(tx *directory.Tx, published jose.JSONWebKeySet)
}

// KeyRing is the keys that one party signs with: the next one, published
// before its use; the active one; and old ones until their last token has
// expired.
type KeyRing struct {
	cfg  KeyRingConfig
	keys atomic.Pointer[[]*ringKey] // by NotBefore, oldest first

	signers sync.Map // key id and typ → jose.Signer; as many as keys ever were
}

type ringKey struct {
	row    *directory.SigningKey
	signer crypto.Signer
	jwk    jose.JSONWebKey // public
}

// rsaBits of new RSA keys.
const rsaBits = 2048

// NewKeyRing opens the ring and makes its first key if there is none.
func NewKeyRing(ctx context.Context, cfg KeyRingConfig) (*KeyRing, error) {
	if cfg.Alg != string(jose.ES256) && cfg.Alg != string(jose.RS256) {
		return nil, fmt.Errorf("signing algorithm %q is not one of ES256, RS256", cfg.Alg)
	}
	if cfg.Rotation <= 2*cfg.Lead {
		return nil, fmt.Errorf("key rotation %s is too short: want more than twice the %s of publication in advance", cfg.Rotation, cfg.Lead)
	}
	k := &KeyRing{cfg: cfg}
	if err := k.reload(); err != nil {
		return nil, err
	}
	if err := k.Rotate(ctx); err != nil {
		return nil, err
	}
	return k, nil
}

func (k *KeyRing) reload() error {
	var keys []*ringKey
	for _, row := range k.cfg.Directory.SigningKeys.All() {
		if row.Use != k.cfg.Use {
			continue
		}
		key, err := k.open(row)
		if err != nil {
			return fmt.Errorf("signing key %s: %w", row.ID, err)
		}
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b *ringKey) int { return a.row.NotBefore.Compare(b.row.NotBefore) })
	k.keys.Store(&keys)
	return nil
}

func (k *KeyRing) open(row *directory.SigningKey) (*ringKey, error) {
	der, err := k.cfg.Sealer.Open(row.Sealed, "signing key "+row.ID)
	if err != nil {
		return nil, err
	}
	priv, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("parse the private key: %w", err)
	}
	signer, ok := priv.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a key of type %T cannot sign", priv)
	}
	return &ringKey{row: row, signer: signer, jwk: publicJWK(row.ID, row.Alg, signer.Public())}, nil
}

func publicJWK(id, alg string, public crypto.PublicKey) jose.JSONWebKey {
	return jose.JSONWebKey{Key: public, KeyID: id, Algorithm: alg, Use: "sig"}
}

// Rotate makes the next key when the active one nears its end and removes keys
// that no living token can name. It does nothing when nothing is due.
func (k *KeyRing) Rotate(ctx context.Context) error {
	now := k.cfg.Now().UTC()
	keys := *k.keys.Load()
	var last time.Time
	for _, key := range keys {
		if key.row.Until.After(last) {
			last = key.row.Until
		}
	}
	var add *directory.SigningKey
	switch {
	case !last.After(now): // the first key ever, or the server slept through the change
		add = &directory.SigningKey{NotBefore: now}
	case !last.After(now.Add(k.cfg.Lead)):
		add = &directory.SigningKey{NotBefore: last}
	}
	var expired []*directory.SigningKey
	for _, key := range keys {
		if now.After(key.row.Until.Add(k.cfg.MaxLife)) {
			expired = append(expired, key.row)
		}
	}
	if add == nil && len(expired) == 0 {
		return nil
	}
	err := k.cfg.Directory.Update(ctx, "", func(tx *directory.Tx) error {
		set := k.published(now)
		if add != nil {
			if err := k.generate(add, now); err != nil {
				return err
			}
			key, err := k.open(add)
			if err != nil {
				return err
			}
			set.Keys = append(set.Keys, key.jwk)
			k.cfg.Directory.SigningKeys.Put(tx, add)
		}
		for _, row := range expired {
			k.cfg.Directory.SigningKeys.Delete(tx, row)
		}
		if k.cfg.Changed != nil {
			k.cfg.Changed(tx, set)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("rotate the keys of %s: %w", k.cfg.Use, err)
	}
	return k.reload()
}

func (k *KeyRing) generate(row *directory.SigningKey, now time.Time) error {
	var priv crypto.Signer
	var err error
	if k.cfg.Alg == string(jose.RS256) {
		priv, err = rsa.GenerateKey(rand.Reader, rsaBits)
	} else {
		priv, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		return fmt.Errorf("generate a key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		return fmt.Errorf("encode the private key: %w", err)
	}
	if row.Public, err = x509.MarshalPKIXPublicKey(priv.Public()); err != nil {
		return fmt.Errorf("encode the public key: %w", err)
	}
	row.ID = k.freeID(now)
	row.Use, row.Alg = k.cfg.Use, k.cfg.Alg
	row.Until = row.NotBefore.Add(k.cfg.Rotation)
	row.Sealed = k.cfg.Sealer.Seal(der, "signing key "+row.ID)
	return nil
}

// freeID names a key after the minute it was made in, as clients know key ids
// (reference/iam-identity.md section 2.1).
func (k *KeyRing) freeID(now time.Time) string {
	base := k.cfg.Prefix + now.Format("200601021504")
	id := base
	for n := 2; ; n++ {
		if _, taken := k.cfg.Directory.SigningKeys.Get(id); !taken {
			return id
		}
		id = fmt.Sprintf("%s-%d", base, n)
	}
}

// active returns the key that signs now.
func (k *KeyRing) active(now time.Time) (*ringKey, error) {
	keys := *k.keys.Load()
	for _, key := range slices.Backward(keys) {
		if !now.Before(key.row.NotBefore) && now.Before(key.row.Until) {
			return key, nil
		}
	}
	return nil, errors.New("no signing key is valid now; is the clock right?")
}

// Sign makes a compact JWS over claims with the key that signs now. typ is the
// header of that name; an empty one leaves it out.
func (k *KeyRing) Sign(claims any, typ string) (string, error) {
	signer, err := k.signer(typ)
	if err != nil {
		return "", err
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", fmt.Errorf("encode the token's claims: %w", err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("sign the token: %w", err)
	}
	return jws.CompactSerialize()
}

func (k *KeyRing) signer(typ string) (jose.Signer, error) {
	key, err := k.active(k.cfg.Now())
	if err != nil {
		return nil, err
	}
	name := key.row.ID + " " + typ
	if s, ok := k.signers.Load(name); ok {
		return s.(jose.Signer), nil
	}
	opts := &jose.SignerOptions{}
	if typ != "" {
		opts = opts.WithType(jose.ContentType(typ))
	}
	s, err := jose.NewSigner(jose.SigningKey{
		Algorithm: jose.SignatureAlgorithm(key.row.Alg),
		Key:       jose.JSONWebKey{Key: key.signer, KeyID: key.row.ID},
	}, opts)
	if err != nil {
		return nil, fmt.Errorf("prepare the signing key: %w", err)
	}
	k.signers.Store(name, s)
	return s, nil
}

// Public returns the public key that verifies tokens with this key id.
func (k *KeyRing) Public(keyID string) (crypto.PublicKey, bool) {
	now := k.cfg.Now()
	for _, key := range *k.keys.Load() {
		if key.row.ID == keyID && !now.After(key.row.Until.Add(k.cfg.MaxLife)) {
			return key.jwk.Key, true
		}
	}
	return nil, false
}

// JWKS returns the published keys.
func (k *KeyRing) JWKS() jose.JSONWebKeySet { return k.published(k.cfg.Now()) }

func (k *KeyRing) published(now time.Time) jose.JSONWebKeySet {
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, key := range *k.keys.Load() {
		if !now.After(key.row.Until.Add(k.cfg.MaxLife)) {
			set.Keys = append(set.Keys, key.jwk)
		}
	}
	return set
}

// Run rotates the keys when it is time, until the context ends. Failures are
// logged and tried again.
func (k *KeyRing) Run(ctx context.Context) {
	ticker := time.NewTicker(min(time.Minute, k.cfg.Lead/4+time.Second))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			if err := k.Rotate(ctx); err != nil && ctx.Err() == nil {
				k.cfg.Log.Error("rotating signing keys; will try again", "use", k.cfg.Use, "error", err)
			}
		}
	}
}
