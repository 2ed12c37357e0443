package api

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Bounds of idle connections to sandboxes.
const (
	proxyIdle    = 60 * time.Second
	maxProxyIdle = 128 // to all sandboxes
)

// transportKey says for which servers in sandboxes a transport is.
type transportKey struct {
	http2 bool // only HTTP/2
	tls   bool
}

// newTransports makes one transport per key.
func (g *Gateway) newTransports() map[transportKey]*http.Transport {
	all := map[transportKey]*http.Transport{}
	for _, key := range []transportKey{{}, {http2: true}, {tls: true}, {http2: true, tls: true}} {
		t := &http.Transport{DialContext: g.dial, IdleConnTimeout: proxyIdle, MaxIdleConns: maxProxyIdle, MaxIdleConnsPerHost: 16,
			DisableCompression: true, MaxResponseHeaderBytes: maxHeader,
			HTTP2: &http.HTTP2Config{MaxReceiveBufferPerStream: 64 << 10, MaxReceiveBufferPerConnection: 2 << 20},
			// The connection always ends in the requested sandbox, whatever name the certificate has.
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
		if key.http2 {
			t.Protocols = new(http.Protocols)
			t.Protocols.SetUnencryptedHTTP2(!key.tls)
			t.Protocols.SetHTTP2(key.tls)
		}
		all[key] = t
	}
	return all
}

// transport speaks HTTP/2 to servers that clients call by gRPC over HTTP/2, because gRPC needs it, and HTTP/1.1 to all others.
type transport struct{ *Gateway }

// RoundTrip implements http.RoundTripper.
func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	http2 := r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc")
	return t.transports[transportKey{http2: http2, tls: r.URL.Scheme == "https"}].RoundTrip(r)
}

// dial connects to a port of a sandbox; the address is the sandbox's id and the port.
func (g *Gateway) dial(ctx context.Context, _, address string) (net.Conn, error) {
	id, text, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	port, err := strconv.Atoi(text)
	if err != nil {
		return nil, err
	}
	sb, err := g.Manager.Any(id)
	if err != nil {
		return nil, err
	}
	// If the sandbox has no free connection, close idle ones after a second to make room.
	defer time.AfterFunc(time.Second, g.closeIdle).Stop()
	return sb.Dial(ctx, port)
}

func (g *Gateway) closeIdle() {
	for _, t := range g.transports {
		t.CloseIdleConnections()
	}
}
