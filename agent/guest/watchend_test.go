package guest

import (
	"bufio"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/yamux"
	"soulbox.dev/soulbox/agent"
)

// TestWatchOver: when the kernel tells a stream's watch no more, the host gets what was told before, and then the reason, which is not that
// the agent is lost.
func TestWatchOver(t *testing.T) {
	s, dir := &Server{watches: newWatches()}, t.TempDir()
	w, err := s.watches.begin(t.Context(), agent.TreeRequest{Path: dir}, true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.watches.end(w)
	host, guest := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- serveOneWatch(s, w, guest) }()
	c, err := agent.NewClient(t.Context(), host, "test")
	if err != nil {
		t.Fatal(err)
	}
	var told []agent.WatchEvent
	err = c.Watch(t.Context(), dir, func() {
		if err := os.WriteFile(filepath.Join(dir, "f"), nil, 0o600); err != nil {
			t.Error(err)
		}
	}, func(b agent.WatchBatch) error {
		if len(told) == 0 {
			if err := w.notify.file.Close(); err != nil {
				t.Error(err)
			}
		}
		told = append(told, b.Events...)
		return nil
	})
	if !errors.Is(err, agent.ErrNoWatch) || errors.Is(err, agent.ErrLost) || !strings.Contains(err.Error(), dir) {
		t.Errorf("the stream ends with %v", err)
	}
	if !slices.Contains(told, agent.WatchEvent{Op: opCreate, Path: filepath.Join(dir, "f")}) {
		t.Errorf("before that it told %+v", told)
	}
	if err := errors.Join(c.Close(), <-served); err != nil {
		t.Error(err)
	}
}

// serveOneWatch greets a host, and serves the second stream that it opens, which is for a watch.
func serveOneWatch(s *Server, w *dirWatch, guest net.Conn) error {
	var h agent.Hello
	if err := errors.Join(agent.ReadHello(bufio.NewReader(guest), &h),
		agent.WriteHello(guest, agent.Hello{Protocol: agent.Protocol})); err != nil {
		return err
	}
	session, err := yamux.Server(guest, agent.MuxConfig())
	if err != nil {
		return err
	}
	if _, err := session.AcceptStream(); err != nil { // the calls
		return err
	}
	stream, err := session.AcceptStream()
	if err != nil {
		return err
	}
	var header agent.Header
	if err := agent.ReadMessage(stream, &header); err != nil {
		return err
	}
	s.sendWatch(context.Background(), stream, w)
	return stream.Close()
}

// TestWatchOverLate: what happened before the end is told, however much it was, and in parts.
func TestWatchOverLate(t *testing.T) {
	r := newEventRing()
	r.once = true
	for range 2 * agent.MaxWatchEvents {
		r.emit(agent.TreeEvent{Op: opAttrib, Path: "/f"})
	}
	r.end()
	told := 0
	for next, more := int64(0), true; more; {
		result, _, err := r.read(next, agent.MaxWatchEvents/2)
		if err != nil || !result.Gone || result.Lost {
			t.Fatalf("%+v, %v", result, err)
		}
		told, next, more = told+len(result.Events), result.Next, result.More
		if r.first != next || len(r.kept) != 2*agent.MaxWatchEvents-told {
			t.Fatalf("%d events are kept from %d on, after %d were told", len(r.kept), r.first, told)
		}
	}
	if told != 2*agent.MaxWatchEvents || r.bytes != 0 {
		t.Errorf("%d were told, %d bytes are kept", told, r.bytes)
	}
}

// TestWatchKeepsNothing: the watch of a stream remembers no names, and no events that were sent.
func TestWatchKeepsNothing(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var known, all atomic.Int64
	w, err := newDirWatch(t.Context(), agent.TreeRequest{Path: dir}, true, &known, &all)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	if err := os.WriteFile(filepath.Join(dir, "c"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "c"), filepath.Join(dir, "a")); err != nil {
		t.Fatal(err)
	}
	var told []agent.WatchEvent
	for next := int64(0); !slices.Contains(told, agent.WatchEvent{Op: opCreate, Path: filepath.Join(dir, "a")}); {
		r, err := w.await(t.Context(), next, agent.MaxWatchEvents/2, watchBatch)
		if err != nil || r.Gone {
			t.Fatalf("%+v %v, after %+v", r, err, told)
		}
		told, next = append(told, watchBatchOf(r).Events...), r.Next
	}
	if !slices.Contains(told, agent.WatchEvent{Op: opRename, Path: filepath.Join(dir, "c")}) {
		t.Errorf("told %+v", told)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if known.Load() != 0 || w.bytes != 0 || len(w.kept) != 0 || len(w.written) != 0 {
		t.Errorf("%d bytes of names are known; %d events with %d bytes are kept", known.Load(), len(w.kept), w.bytes)
	}
}

// TestWatchRemoved: the end of the watched directory is told as an overflow, never as its removal.
func TestWatchRemoved(t *testing.T) {
	c, dir := pair(t)
	here := filepath.Join(dir, "here")
	if err := os.MkdirAll(filepath.Join(here, "below"), 0o755); err != nil {
		t.Fatal(err)
	}
	batches := watch(t, c, here)
	if err := os.RemoveAll(here); err != nil {
		t.Fatal(err)
	}
	below, over := false, false
	eventually(t, "the removal of what is in it, and that it must be looked at again", func() bool {
		select {
		case b := <-batches:
			over = over || b.Overflow
			below = below || slices.Contains(b.Events, agent.WatchEvent{Op: opRemove, Path: filepath.Join(here, "below")})
			if slices.Contains(b.Events, agent.WatchEvent{Op: opRemove, Path: here}) {
				t.Errorf("told %+v", b)
			}
		default:
		}
		return below && over
	})
}
