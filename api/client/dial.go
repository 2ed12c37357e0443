package client

import (
	"crypto/tls"
	"errors"
	"fmt"
)

// untrusted says what to do about a certificate of an authority that this machine does not know.
func untrusted(err error) error {
	if errors.As(err, new(*tls.CertificateVerificationError)) {
		return fmt.Errorf("%w; if the server is yours, name the file of its authority's certificate by SSL_CERT_FILE", err)
	}
	return err
}
