package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"soulbox.dev/soulbox/access"
)

const (
	idleTime   = 2 * time.Minute // idle time of a connection between requests
	maxHeaders = 64 << 10
	maxStreams = 250                    // per HTTP/2 connection
	quietTime  = time.Minute            // of silence, after which HTTP/2 pings the other end
	cutTime    = 300 * time.Millisecond // from the end of a key to the end of its requests' connections
)

// newWeb makes an HTTP server with the bounds that all of our servers have.
func newWeb(handler http.Handler, log *slog.Logger) *http.Server {
	web := &http.Server{
		Handler: visited(handler), ReadHeaderTimeout: headTime, IdleTimeout: idleTime, MaxHeaderBytes: maxHeaders,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug), Protocols: new(http.Protocols),
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: maxStreams, SendPingTimeout: quietTime, PingTimeout: quietTime / 2,
			WriteByteTimeout: quietTime},
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, acceptedOf(c))
		},
	}
	web.Protocols.SetHTTP1(true)
	web.Protocols.SetUnencryptedHTTP2(true) // for a proxy that terminates TLS, and for gRPC
	return web
}

type (
	connKey  struct{}
	visitKey struct{}
)

// visit is one request, while it is served.
type visit struct {
	conn   *accepted // nil if the connection is not counted
	web    *http.ResponseController
	cancel context.CancelCauseFunc

	mu    sync.Mutex
	until context.Context // ends when the request's credential is no longer valid; nil: it has none yet
	token bool            // the credential is a provider's token, which its client replaces with others
	stop  []func()
	ended bool
}

// visited ends requests when their credential is no longer valid, and bounds the time for unread bodies.
func visited(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancelCause(r.Context())
		v := &visit{web: http.NewResponseController(w), cancel: cancel}
		if v.conn, _ = ctx.Value(connKey{}).(*accepted); v.conn != nil {
			v.conn.begin()
			defer v.conn.end()
		}
		defer v.end()
		inner := r.WithContext(context.WithValue(ctx, visitKey{}, v))
		body := &body{ReadCloser: r.Body}
		if r.Body != nil && r.Body != http.NoBody {
			inner.Body = body
		} else {
			body.whole.Store(true)
		}
		next.ServeHTTP(w, inner)
		if errors.Is(context.Cause(ctx), access.ErrKey) {
			panic(http.ErrAbortHandler) // it must not look like a proper end
		}
		switch { // net/http reads what the handler left, to reuse the connection. Only a test's ResponseWriter has no deadlines
		case body.failed.Load():
			_ = v.web.SetReadDeadline(time.Unix(1, 0))
		case !body.whole.Load():
			_ = v.web.SetReadDeadline(time.Now().Add(headTime))
		}
	})
}

// body records whether a request's body has been read to its end.
type body struct {
	io.ReadCloser
	whole, failed atomic.Bool
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if errors.Is(err, io.EOF) {
		b.whole.Store(true)
	} else if err != nil {
		b.failed.Store(true)
	}
	return n, err
}

// admitted records the credential that has admitted the request of ctx; the request ends with it.
func admitted(ctx context.Context, g access.Grant) {
	v, _ := ctx.Value(visitKey{}).(*visit)
	if v == nil {
		return
	}
	if v.conn != nil {
		v.conn.prove()
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	until := g.Valid
	if v.until != nil || v.ended || until == nil && g.Expires.IsZero() {
		return
	}
	if until == nil {
		deadline, cancel := context.WithDeadlineCause(context.Background(), g.Expires, access.ErrKey)
		until, v.token = deadline, true
		v.stop = append(v.stop, cancel)
	}
	v.until = until
	stop := context.AfterFunc(until, func() {
		v.cancel(context.Cause(until))
		time.AfterFunc(cutTime, v.cut)
	})
	v.stop = append(v.stop, func() { stop() })
}

// untilOf is a context that bounds what the request of ctx begins and leaves running; nil means no bound.
func untilOf(ctx context.Context) context.Context {
	v, _ := ctx.Value(visitKey{}).(*visit)
	if v == nil {
		return nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.token {
		return nil
	}
	return v.until
}

// cut breaks off a request that waits for its client.
func (v *visit) cut() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.ended { // a hijacked connection ends with the context
		_ = errors.Join(v.web.SetReadDeadline(time.Unix(1, 0)), v.web.SetWriteDeadline(time.Unix(1, 0)))
	}
}

func (v *visit) end() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.ended = true
	for _, stop := range v.stop { // in this order: a deadline is cancelled once nothing waits for it
		stop()
	}
	v.cancel(nil)
}
