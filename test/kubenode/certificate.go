//go:build linux

package kubenode

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"time"
)

// makeCertificates makes the authority that the kubelet believes, and the
// certificate with which the API server calls it.
func (n *Node) makeCertificates() error {
	now := time.Now()
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kubenode"},
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	client := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "kube-apiserver"},
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	authorityKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	clientKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	for _, c := range []struct {
		file string
		cert *x509.Certificate
		key  *ecdsa.PrivateKey
	}{{"ca.crt", authority, authorityKey}, {"client.crt", client, clientKey}} {
		der, err := x509.CreateCertificate(rand.Reader, c.cert, authority, &c.key.PublicKey, authorityKey)
		if err != nil {
			return fmt.Errorf("make %s: %w", c.file, err)
		}
		if err := n.writePEM(c.file, "CERTIFICATE", der); err != nil {
			return err
		}
	}
	der, err := x509.MarshalPKCS8PrivateKey(clientKey)
	if err != nil {
		return err
	}
	return n.writePEM("client.key", "PRIVATE KEY", der)
}

func (n *Node) writePEM(name, kind string, der []byte) error {
	return os.WriteFile(n.file(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}
