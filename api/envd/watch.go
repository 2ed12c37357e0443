package envd

import (
	"context"
	"errors"
	"path"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"soulbox.dev/soulbox/agent"
	pb "soulbox.dev/soulbox/api/envd/spec/filesystem"
)

const (
	watchWait   = 30 * time.Second // of one read of a watch
	maxWatchers = 64               // of one sandbox that clients have created and not removed; its agent allows no more either
	maxWatchID  = 64               // bytes
	maxPolled   = 8192             // events in one answer; an agent keeps no more
)

// request is what the calls that begin a watch have in common.
type request interface {
	GetPath() string
	GetRecursive() bool
	GetIncludeEntry() bool
}

// watcher is a watch of a directory.
type watcher struct {
	id      string // the agent's id
	dir     string
	entries bool
	next    int64

	turn chan struct{} // holds a token while a call reads the watch
}

// begin begins a watch.
func begin(ctx context.Context, req connect.AnyRequest, r request) (*scope, *watcher, error) {
	p, dir, _, err := asked(ctx, req, r.GetPath())
	if err == nil {
		err = p.isDir(ctx, dir)
	}
	if err != nil {
		return p, nil, err
	}
	first, err := p.client.WatchTree(ctx, agent.TreeRequest{Path: dir, Recursive: r.GetRecursive()})
	if err == nil && (first.Watch == "" || len(first.Watch) > maxWatchID) {
		err = errorf(connect.CodeInternal, "the sandbox returned no id for the watch")
	}
	return p, &watcher{id: first.Watch, dir: dir, entries: r.GetIncludeEntry(), turn: make(chan struct{}, 1)}, err
}

// end ends a watch, even after the call has ended.
func (w *watcher) end(p *scope) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, _ = p.client.WatchTree(ctx, agent.TreeRequest{Watch: w.id, Close: true}) // it may have ended already
}

// read returns what has happened since the last read, and whether there is more. If there is nothing, it waits for something.
func (w *watcher) read(ctx context.Context, p *scope, wait time.Duration) ([]*pb.FilesystemEvent, bool, error) {
	r, err := p.client.WatchTree(ctx, agent.TreeRequest{Watch: w.id, From: w.next, WaitMS: wait.Milliseconds()})
	if err != nil {
		return nil, false, err
	}
	if r.Lost {
		return nil, false, errorf(connect.CodeResourceExhausted, "more changes below %s than are kept: list it and watch again",
			w.dir)
	}
	var events []*pb.FilesystemEvent
	for _, e := range r.Events {
		events = append(events, w.tell(ctx, p, e)...)
	}
	w.next = r.Next
	if r.Gone && len(events) == 0 {
		return nil, false, errorf(connect.CodeNotFound, "directory not found: %s", w.dir)
	}
	return events, r.More, nil
}

// tell translates an event for clients, whose words are inotify's: a move is two events.
func (w *watcher) tell(ctx context.Context, p *scope, e agent.TreeEvent) []*pb.FilesystemEvent {
	one := func(t pb.EventType, file string) *pb.FilesystemEvent {
		out := &pb.FilesystemEvent{Name: p.encodeName(strings.TrimPrefix(strings.TrimPrefix(file, w.dir), "/")), Type: t}
		if w.entries && t != pb.EventType_EVENT_TYPE_REMOVE && t != pb.EventType_EVENT_TYPE_RENAME {
			if entry, err := p.stat(ctx, path.Clean(file)); err == nil { // it may be gone by now
				out.Entry = entry
			}
		}
		return out
	}
	if e.Whole { // clients expect an upload to look like envd's, which writes to the file itself
		written := one(pb.EventType_EVENT_TYPE_WRITE, e.Path)
		if e.Op == "create" {
			return []*pb.FilesystemEvent{one(pb.EventType_EVENT_TYPE_CREATE, e.Path), written}
		}
		return []*pb.FilesystemEvent{written}
	}
	switch e.Op {
	case "create":
		return []*pb.FilesystemEvent{one(pb.EventType_EVENT_TYPE_CREATE, e.Path)}
	case "write":
		return []*pb.FilesystemEvent{one(pb.EventType_EVENT_TYPE_WRITE, e.Path)}
	case "remove":
		return []*pb.FilesystemEvent{one(pb.EventType_EVENT_TYPE_REMOVE, e.Path)}
	case "attrib":
		return []*pb.FilesystemEvent{one(pb.EventType_EVENT_TYPE_CHMOD, e.Path)}
	case "rename", "save":
		var both []*pb.FilesystemEvent
		if e.From != "" {
			both = append(both, one(pb.EventType_EVENT_TYPE_RENAME, e.From))
		}
		return append(both, one(pb.EventType_EVENT_TYPE_CREATE, e.Path))
	}
	return nil
}

// WatchDir implements filesystemconnect.FilesystemHandler.
func (files) WatchDir(ctx context.Context, req *connect.Request[pb.WatchDirRequest],
	stream *connect.ServerStream[pb.WatchDirResponse]) error {
	p, w, err := begin(ctx, req, req.Msg)
	if err != nil {
		return err
	}
	defer w.end(p)
	if err := stream.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Start{Start: &pb.WatchDirResponse_StartEvent{}}}); err != nil {
		return err
	}
	every := interval(req.Header())
	for last := time.Now(); ; {
		events, _, err := w.read(ctx, p, max(0, min(watchWait, time.Until(last.Add(every)))))
		if err != nil {
			return err
		}
		for _, e := range events {
			p.idle.Moves()
			if err := stream.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Filesystem{Filesystem: e}}); err != nil {
				return err
			}
			last = time.Now()
		}
		if time.Since(last) >= every {
			p.idle.Moves()
			alive := &pb.WatchDirResponse_Keepalive{Keepalive: &pb.WatchDirResponse_KeepAlive{}}
			if err := stream.Send(&pb.WatchDirResponse{Event: alive}); err != nil {
				return err
			}
			last = time.Now()
		}
	}
}

// watchers are the watches that clients poll, by sandbox. It is safe for concurrent use.
type watchers struct {
	mu   sync.Mutex
	byID map[string]map[string]*watcher // by sandbox, then by the agent's id
}

// add keeps a watch as long as its sandbox lives.
func (s *watchers) add(p *scope, w *watcher) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byID == nil {
		s.byID = map[string]map[string]*watcher{}
	}
	id := p.Sandbox.ID()
	if s.byID[id] == nil {
		s.byID[id] = map[string]*watcher{}
		life, _ := p.Sandbox.Bind(context.Background()) // ends with the sandbox
		context.AfterFunc(life, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.byID, id)
		})
	}
	if len(s.byID[id]) >= maxWatchers {
		return errorf(connect.CodeResourceExhausted, "there are %d watchers: remove some", maxWatchers)
	}
	s.byID[id][w.id] = w
	return nil
}

func (s *watchers) get(p *scope, id string) (*watcher, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.byID[p.Sandbox.ID()][id]
	if w == nil {
		return nil, errorf(connect.CodeNotFound, "watcher not found")
	}
	return w, nil
}

func (s *watchers) remove(p *scope, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byID[p.Sandbox.ID()], id)
}

// CreateWatcher implements filesystemconnect.FilesystemHandler.
func (f files) CreateWatcher(ctx context.Context,
	req *connect.Request[pb.CreateWatcherRequest]) (*connect.Response[pb.CreateWatcherResponse], error) {
	p, w, err := begin(ctx, req, req.Msg)
	if err != nil {
		return nil, err
	}
	if err := f.watchers.add(p, w); err != nil {
		w.end(p)
		return nil, err
	}
	return connect.NewResponse(&pb.CreateWatcherResponse{WatcherId: w.id}), nil
}

// GetWatcherEvents implements filesystemconnect.FilesystemHandler. It forgets a watch that the agent no longer knows.
func (f files) GetWatcherEvents(ctx context.Context,
	req *connect.Request[pb.GetWatcherEventsRequest]) (*connect.Response[pb.GetWatcherEventsResponse], error) {
	p := scopeOf(ctx)
	w, err := f.watchers.get(p, req.Msg.GetWatcherId())
	if err != nil {
		return nil, err
	}
	select {
	case w.turn <- struct{}{}:
		defer func() { <-w.turn }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	out := &pb.GetWatcherEventsResponse{}
	for {
		events, more, err := w.read(ctx, p, 0)
		if errors.Is(err, agent.ErrNoWatch) {
			f.watchers.remove(p, w.id)
		}
		if err != nil {
			return nil, err
		}
		if out.Events = append(out.Events, events...); !more || len(events) == 0 || len(out.Events) >= maxPolled {
			return connect.NewResponse(out), nil
		}
	}
}

// RemoveWatcher implements filesystemconnect.FilesystemHandler.
func (f files) RemoveWatcher(ctx context.Context,
	req *connect.Request[pb.RemoveWatcherRequest]) (*connect.Response[pb.RemoveWatcherResponse], error) {
	p := scopeOf(ctx)
	w, err := f.watchers.get(p, req.Msg.GetWatcherId())
	if err != nil {
		return nil, err
	}
	f.watchers.remove(p, w.id)
	w.end(p)
	return connect.NewResponse(&pb.RemoveWatcherResponse{}), nil
}
