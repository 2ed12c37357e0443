package envd

import (
	"context"
	"path"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"soulbox.dev/soulbox/agent"
	pb "soulbox.dev/soulbox/api/envd/spec/filesystem"
)

const (
	watchWait    = 30 * time.Second // of one look at a watch
	maxWatchers  = 4096             // that clients have begun and not ended, of all sandboxes
	watcherQuiet = 10 * time.Minute // without a look, after which another may take its place
)

// request is what the calls that begin a watch have in common.
type request interface {
	GetPath() string
	GetRecursive() bool
	GetIncludeEntry() bool
}

// watcher is a watch of a directory.
type watcher struct {
	id      string // as the agent has it
	dir     string
	entries bool
	next    int64

	mu   sync.Mutex // held by who reads it
	used time.Time  // watchers.mu is held
}

// begin begins a watch.
func begin(ctx context.Context, req connect.AnyRequest, r request) (*place, *watcher, error) {
	p, dir, _, err := asked(ctx, req, r.GetPath())
	if err == nil {
		err = p.isDir(ctx, dir)
	}
	if err != nil {
		return p, nil, err
	}
	first, err := p.client.WatchTree(ctx, agent.TreeRequest{Path: dir, Recursive: r.GetRecursive()})
	return p, &watcher{id: first.Watch, dir: dir, entries: r.GetIncludeEntry(), used: time.Now()}, err
}

// end ends a watch, also when the call is over.
func (w *watcher) end(p *place) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, _ = p.client.WatchTree(ctx, agent.TreeRequest{Watch: w.id, Close: true}) // one that is not there any more is ended
}

// read gives what has happened since the last time, and waits for something if there is nothing.
func (w *watcher) read(ctx context.Context, p *place, wait time.Duration) ([]*pb.FilesystemEvent, error) {
	r, err := p.client.WatchTree(ctx, agent.TreeRequest{Watch: w.id, From: w.next, WaitMS: wait.Milliseconds()})
	if err != nil {
		return nil, err
	}
	if r.Lost {
		return nil, errorf(connect.CodeResourceExhausted, "more has changed below %s than is kept: look at it anew, and watch again", w.dir)
	}
	var events []*pb.FilesystemEvent
	for _, e := range r.Events {
		events = append(events, w.tell(ctx, p, e)...)
	}
	w.next = r.Next
	if r.Gone && len(events) == 0 {
		return nil, errorf(connect.CodeNotFound, "directory not found: %s", w.dir)
	}
	return events, nil
}

// tell is what happened as clients know it: the words are inotify's, where a move is two events.
func (w *watcher) tell(ctx context.Context, p *place, e agent.TreeEvent) []*pb.FilesystemEvent {
	one := func(t pb.EventType, file string) *pb.FilesystemEvent {
		out := &pb.FilesystemEvent{Name: valid(strings.TrimPrefix(strings.TrimPrefix(file, w.dir), "/")), Type: t}
		if w.entries && t != pb.EventType_EVENT_TYPE_REMOVE && t != pb.EventType_EVENT_TYPE_RENAME {
			if entry, err := p.stat(ctx, path.Clean(file)); err == nil { // it may be gone by now
				out.Entry = entry
			}
		}
		return out
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
func (files) WatchDir(ctx context.Context, req *connect.Request[pb.WatchDirRequest], stream *connect.ServerStream[pb.WatchDirResponse]) error {
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
		events, err := w.read(ctx, p, min(watchWait, every))
		if err != nil {
			return err
		}
		for _, e := range events {
			if err := stream.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Filesystem{Filesystem: e}}); err != nil {
				return err
			}
			last = time.Now()
		}
		if time.Since(last) >= every {
			if err := stream.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Keepalive{Keepalive: &pb.WatchDirResponse_KeepAlive{}}}); err != nil {
				return err
			}
			last = time.Now()
		}
	}
}

// watchers are the watches of clients that ask again and again. It is safe for concurrent use.
type watchers struct {
	mu   sync.Mutex
	byID map[string]*watcher // by sandbox and the agent's id
}

// add keeps a watch. One of a client that has not asked for long makes room.
func (s *watchers) add(key string, w *watcher) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byID == nil {
		s.byID = map[string]*watcher{}
	}
	if len(s.byID) >= maxWatchers {
		for k, old := range s.byID {
			if time.Since(old.used) > watcherQuiet {
				delete(s.byID, k) // its agent ends those that nobody reads
			}
		}
	}
	if len(s.byID) >= maxWatchers {
		return errorf(connect.CodeResourceExhausted, "there are %d watchers: remove some", maxWatchers)
	}
	s.byID[key] = w
	return nil
}

func (s *watchers) find(key string) (*watcher, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.byID[key]
	if w == nil {
		return nil, errorf(connect.CodeNotFound, "watcher not found")
	}
	w.used = time.Now()
	return w, nil
}

func (s *watchers) remove(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byID, key)
}

func (p *place) watcherKey(id string) string { return p.Sandbox.ID() + "/" + id }

// CreateWatcher implements filesystemconnect.FilesystemHandler.
func (f files) CreateWatcher(ctx context.Context, req *connect.Request[pb.CreateWatcherRequest]) (*connect.Response[pb.CreateWatcherResponse], error) {
	p, w, err := begin(ctx, req, req.Msg)
	if err != nil {
		return nil, err
	}
	if err := f.watchers.add(p.watcherKey(w.id), w); err != nil {
		w.end(p)
		return nil, err
	}
	return connect.NewResponse(&pb.CreateWatcherResponse{WatcherId: w.id}), nil
}

// GetWatcherEvents implements filesystemconnect.FilesystemHandler.
func (f files) GetWatcherEvents(ctx context.Context, req *connect.Request[pb.GetWatcherEventsRequest]) (*connect.Response[pb.GetWatcherEventsResponse], error) {
	p := placeOf(ctx)
	w, err := f.watchers.find(p.watcherKey(req.Msg.GetWatcherId()))
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	out := &pb.GetWatcherEventsResponse{}
	for {
		events, err := w.read(ctx, p, 0)
		if err != nil {
			return nil, err
		}
		if out.Events = append(out.Events, events...); len(events) == 0 {
			return connect.NewResponse(out), nil
		}
	}
}

// RemoveWatcher implements filesystemconnect.FilesystemHandler.
func (f files) RemoveWatcher(ctx context.Context, req *connect.Request[pb.RemoveWatcherRequest]) (*connect.Response[pb.RemoveWatcherResponse], error) {
	p := placeOf(ctx)
	key := p.watcherKey(req.Msg.GetWatcherId())
	w, err := f.watchers.find(key)
	if err != nil {
		return nil, err
	}
	f.watchers.remove(key)
	w.end(p)
	return connect.NewResponse(&pb.RemoveWatcherResponse{}), nil
}
