package wire

import (
	"crypto/hmac"
	"crypto/sha256"
	"io"
)

// ClientMAC is a guest's proof that it has its VM's key: 32 raw bytes that go
// over the wire in hex. caps is the capabilities value as sent, the nonces are
// the hex digits as sent. To compare two, use hmac.Equal.
func ClientMAC(key []byte, name, caps, clientNonce, serverNonce string) []byte {
	return mac(key, "castra1-client", name, caps, clientNonce, serverNonce)
}

// ServerProof is the broker's proof that it has the VM's key too, over the same
// values and the token it grants: 32 raw bytes.
func ServerProof(key []byte, name, caps, clientNonce, serverNonce, token string) []byte {
	return mac(key, "castra1-server", name, caps, clientNonce, serverNonce, token)
}

// mac is the HMAC-SHA256 (RFC 2104) of the parts with a NUL between each two. No
// part can hold a NUL, so no two lists of parts give the same bytes.
func mac(key []byte, parts ...string) []byte {
	h := hmac.New(sha256.New, key)
	for i, part := range parts {
		if i > 0 {
			h.Write([]byte{0}) // a hash never fails to write
		}
		_, _ = io.WriteString(h, part)
	}
	return h.Sum(nil)
}
