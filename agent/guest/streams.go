package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
	"soulbox.dev/soulbox/agent"
)

// giveUpOnClose ends writes to a stream when the host closes its half: this is how a host cancels a stream that it only reads.
func giveUpOnClose(stream *yamux.Stream) {
	go func() {
		discard(stream)
		_ = stream.SetWriteDeadline(time.Unix(1, 0))
	}()
}

// untilClosed returns a context that also ends when a host that only reads closes its half; then writes end, too.
func untilClosed(ctx context.Context, stream *yamux.Stream) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		discard(stream)
		cancel()
		_ = stream.SetWriteDeadline(time.Unix(1, 0))
	}()
	return ctx, cancel
}

// discard reads what the host still sends until it closes: if we closed first, that would reset the stream and lose our answer.
func discard(stream *yamux.Stream) { _, _ = io.Copy(io.Discard, stream) }

// serveDial connects the stream to a socket of the guest.
func (s *Server) serveDial(ctx context.Context, stream *yamux.Stream, h agent.Header) {
	if h.Network != "tcp" && h.Network != "unix" {
		_ = agent.WriteMessage(stream, agent.Answer{Error: wireError(agent.Invalid("dial: network %q is neither tcp nor unix",
			agent.Clip(h.Network, 40)))})
		return
	}
	if host, _, err := net.SplitHostPort(h.Address); h.Network == "tcp" &&
		(err != nil || net.ParseIP(host) == nil || !net.ParseIP(host).IsLoopback()) {
		_ = agent.WriteMessage(stream, agent.Answer{Error: wireError(agent.Invalid("dial %q: only the sandbox's own loopback is allowed",
			agent.Clip(h.Address, 80)))})
		return
	}
	dialer := net.Dialer{Timeout: 10 * time.Second, Control: keepLittle}
	conn, err := dialer.DialContext(ctx, h.Network, h.Address)
	if err != nil {
		_ = agent.WriteMessage(stream, agent.Answer{Error: wireError(err)})
		return
	}
	defer conn.Close()
	ctx, hangUp := context.WithCancel(ctx)
	defer hangUp()
	if h.Dial != "" {
		s.dials.Store(h.Dial, hangUp)
		defer s.dials.Delete(h.Dial)
	}
	defer context.AfterFunc(ctx, func() { // the host is gone, or has hung up
		_ = conn.Close()
		_ = stream.SetDeadline(time.Unix(1, 0))
	})()
	if err := agent.WriteMessage(stream, agent.Answer{}); err != nil {
		return
	}
	splice(stream, conn)
}

// splice copies in both directions and passes on half-closes.
func splice(a, b io.ReadWriteCloser) {
	var both sync.WaitGroup
	oneWay := func(dst, src io.ReadWriteCloser) {
		_, err := io.Copy(dst, src)
		if half, ok := dst.(interface{ CloseWrite() error }); ok && err == nil {
			_ = half.CloseWrite()
			return
		}
		_ = dst.Close() // a yamux stream's Close is its half-close
		if err != nil {
			_ = src.Close()
		}
	}
	both.Go(func() { oneWay(a, b) })
	both.Go(func() { oneWay(b, a) })
	both.Wait()
}

// serveStdin writes the host's data to the stdin of a process.
func (s *Server) serveStdin(ctx context.Context, stream *yamux.Stream, h agent.Header) {
	p, err := s.processByName(h.Process)
	if err != nil {
		_ = agent.WriteMessage(stream, agent.Answer{Error: wireError(err)})
		return
	}
	if err := agent.WriteMessage(stream, agent.Answer{}); err != nil {
		return
	}
	if h.Size < 0 || h.Size > agent.MaxStdin {
		_ = agent.WriteMessage(stream, agent.Answer{Error: wireError(agent.Invalid("stdin: %d bytes, at most %d are allowed", h.Size,
			agent.MaxStdin))})
		return
	}
	// Read everything before writing: then a read of the stream returns when the host gives up, even while the process does not read.
	body := make([]byte, h.Size)
	if _, err := io.ReadFull(stream, body); err != nil {
		return // the host is gone
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		discard(stream)
		cancel()
	}()
	a := agent.Answer{}
	a.Written, err = p.writeStdin(ctx, bytes.NewReader(body), h.EOF)
	if err != nil {
		a.Error = wireError(err)
	}
	_ = agent.WriteMessage(stream, a)
}

// serveOutput replays and follows the output of a process.
func (s *Server) serveOutput(ctx context.Context, stream *yamux.Stream, h agent.Header) {
	p, err := s.processByName(h.Process)
	if err != nil {
		_ = agent.WriteMessage(stream, agent.Answer{Error: wireError(err)})
		return
	}
	if err := agent.WriteMessage(stream, agent.Answer{}); err != nil {
		return
	}
	ctx, cancel := untilClosed(ctx, stream)
	defer cancel()
	read := func(int64) {}
	if h.Hold {
		mine := p.output.hold(h.Offset)
		if p.release != nil {
			p.release()
		}
		read = func(at int64) { p.collector.resume(p.output.advance(mine, at, false)...) }
		defer func() { p.collector.resume(p.output.advance(mine, 0, true)...) }()
	}
	buf := make([]byte, 32<<10)
	for at := h.Offset; ; {
		n, found, on, wait, ended, err := p.output.next(buf, at)
		if err != nil {
			return // without an end frame the host sees that the output was cut off
		}
		if n > 0 {
			if writeFrame(stream, agent.FrameStdout+on, found, buf[:n]) != nil {
				return
			}
			at = found + int64(n)
			read(at)
			continue
		}
		if ended || !h.Follow {
			body, _ := json.Marshal(agent.ForWire(p.describe())) // a struct of plain fields
			_ = writeFrame(stream, agent.FrameEnd, found, body)
			return
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return
		}
	}
}
