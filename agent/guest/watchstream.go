package guest

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/yamux"
	"soulbox.dev/soulbox/agent"
)

// watchBatch is how long a stream gathers changes before it sends them.
const watchBatch = 10 * time.Millisecond

// serveWatch sends the changes in a directory, or of a file, until the stream ends. The watch follows the path: also where its symlinks
// lead, and when what was there is removed and comes back.
func (s *Server) serveWatch(ctx context.Context, stream *yamux.Stream, h agent.Header) {
	w, err := s.watches.begin(ctx, agent.TreeRequest{Path: h.Path}, true)
	if err != nil {
		_ = agent.WriteMessage(stream, agent.Answer{Error: wireError(err)})
		return
	}
	defer s.watches.end(w)
	s.sendWatch(ctx, stream, w)
}

// sendWatch sends what a watch tells, and at last why there is no more.
func (s *Server) sendWatch(ctx context.Context, stream *yamux.Stream, w *dirWatch) {
	if err := agent.WriteMessage(stream, agent.Answer{}); err != nil {
		return
	}
	ctx, cancel := untilClosed(ctx, stream)
	defer cancel()
	for next := int64(0); ; {
		r, err := w.await(ctx, next, agent.MaxWatchEvents/2, watchBatch) // a half, since a rename becomes two events
		if ctx.Err() != nil {
			return
		}
		b := watchBatchOf(r)
		if r.Gone && !r.More && err == nil {
			err = fmt.Errorf("watch %s: its changes cannot be seen any more: %w", quoted(w.path), agent.ErrNoWatch)
		}
		if err != nil {
			b.Error = wireError(err)
		}
		if agent.WriteMessage(stream, b) != nil || err != nil {
			return
		}
		next = r.Next
	}
}

// watchBatchOf translates events for a stream, where a rename is two events.
func watchBatchOf(r agent.TreeResult) agent.WatchBatch {
	b := agent.WatchBatch{Overflow: r.Lost}
	for _, e := range r.Events {
		op := e.Op
		if op == opRename || op == opSave {
			op = opCreate
			if e.From != "" {
				b.Events = append(b.Events, agent.WatchEvent{Op: opRename, Path: e.From})
			}
		}
		b.Events = append(b.Events, agent.WatchEvent{Op: op, Path: e.Path})
	}
	return b
}
