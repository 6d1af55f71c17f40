package attest

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
)

// maxCA bounds the certificates that vouch for an issuer's server, in bytes.
const maxCA = 64 << 10

// Certificates returns the certificates of a PEM text and nothing else of it. A
// private key among them is refused: it has no place here, and whoever sent it
// should know.
func Certificates(text string) (string, error) {
	if len(text) > maxCA {
		return "", fmt.Errorf("it is longer than %d bytes", maxCA)
	}
	var out strings.Builder
	for block, rest := pem.Decode([]byte(text)); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return "", fmt.Errorf("it holds a PEM block of type %q; only certificates belong in it", block.Type)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return "", fmt.Errorf("read a certificate: %w", err)
		}
		out.Write(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes}))
	}
	if out.Len() == 0 {
		return "", errors.New("it holds no certificate in PEM")
	}
	return out.String(), nil
}
