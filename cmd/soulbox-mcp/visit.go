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
	idleTime   = 2 * time.Minute // of a connection without a request
	maxHeaders = 64 << 10
	maxStreams = 250                    // of one connection in HTTP/2
	quietTime  = time.Minute            // after which the other end of HTTP/2 is asked whether it is there
	cutTime    = 300 * time.Millisecond // from the end of a key to that of the connections of its requests
)

// newWeb makes an HTTP server with the bounds that all of ours have. d may count its connections, if they were accepted by it.
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
	web.Protocols.SetUnencryptedHTTP2(true) // a proxy that speaks TLS, and gRPC, may use it
	return web
}

type (
	connKey  struct{}
	visitKey struct{}
)

// visit is one request, for as long as it is served.
type visit struct {
	conn   *accepted // nil where nobody counts it
	web    *http.ResponseController
	cancel context.CancelCauseFunc

	mu    sync.Mutex
	until context.Context // ends when what let it in is not valid any more; nil: nothing has yet
	token bool            // that was a token of a provider, whose client has others later
	stop  []func()
	ended bool
}

// visited has requests end with what has let them in, and their bodies come in time.
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
		switch { // net/http reads what nobody has read, to use the connection again. A ResponseWriter without deadlines is a test's
		case body.failed.Load():
			_ = v.web.SetReadDeadline(time.Unix(1, 0))
		case !body.whole.Load():
			_ = v.web.SetReadDeadline(time.Now().Add(headTime))
		}
	})
}

// body knows whether it has been read.
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

// admitted notes what has let the request of ctx in: it ends with that.
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

// untilOf is how long what the request of ctx begins may go on beyond it; nil is for good.
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

// cut breaks off a request that hangs on its client.
func (v *visit) cut() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.ended { // a connection that was taken over ends with the context
		_ = errors.Join(v.web.SetReadDeadline(time.Unix(1, 0)), v.web.SetWriteDeadline(time.Unix(1, 0)))
	}
}

func (v *visit) end() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.ended = true
	for _, stop := range v.stop { // in this order: a deadline is cancelled when nobody waits for it any more
		stop()
	}
	v.cancel(nil)
}
