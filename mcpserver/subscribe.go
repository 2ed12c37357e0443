package mcpserver

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync"

	"github.com/mark3labs/mcp-go/mcp"
)

const (
	methodListen      = "subscriptions/listen"
	methodSubscribe   = "resources/subscribe"
	methodUnsubscribe = "resources/unsubscribe"

	noteAcknowledged = "notifications/subscriptions/acknowledged"
	noteUpdated      = "notifications/resources/updated"
)

// Notifications that tell clients to request a list again.
const (
	NoteToolsChanged     = "notifications/tools/list_changed"
	NotePromptsChanged   = "notifications/prompts/list_changed"
	NoteResourcesChanged = "notifications/resources/list_changed"
)

// maxWatched bounds the resources that one conversation, or one stream of 2026-07-28, may be subscribed to.
const maxWatched = 64

// subject is what a subscriber is notified of: a list that changed, or a resource.
type subject struct{ method, uri string }

// feed holds the notifications that a subscriber has yet to get. A subject that changes often meanwhile is sent once, so that a slow reader
// costs no more than its subjects. A subject that changes while it is being sent is sent again.
type feed struct {
	mu    sync.Mutex
	due   []subject
	ready chan struct{} // holds a token when something is due
}

func newFeed() *feed { return &feed{ready: make(chan struct{}, 1)} }

func (f *feed) add(s subject) {
	f.mu.Lock()
	if !slices.Contains(f.due, s) {
		f.due = append(f.due, s)
	}
	f.mu.Unlock()
	select {
	case f.ready <- struct{}{}:
	default:
	}
}

func (f *feed) take() []subject {
	f.mu.Lock()
	defer f.mu.Unlock()
	due := f.due
	f.due = nil
	return due
}

// tell sends what becomes due until ctx ends or a write fails. What could not be sent is due again.
func (f *feed) tell(ctx context.Context, out sender, meta map[string]any) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.ready:
		}
		due := f.take()
		for i, s := range due {
			params := map[string]any{}
			if meta != nil {
				params["_meta"] = meta
			}
			if s.uri != "" {
				params["uri"] = s.uri
			}
			if err := out.write(newNote(s.method, params)); err != nil {
				for _, s := range due[i:] {
					f.add(s)
				}
				return err
			}
		}
	}
}

// subscription says which list changes a feed gets.
type subscription struct {
	owner string
	lists map[string]bool // by method; nil means all
	by    *client         // nil, or the client that must have finished its handshake
}

// Changed tells all subscribers that a list has changed; owner, if not nil, restricts it to the subscribers of one owner.
func (s *Server) Changed(method string, owner *string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for f, sub := range s.feeds {
		ready := sub.by == nil || sub.by.get().initialized
		if ready && (owner == nil || *owner == sub.owner) && (sub.lists == nil || sub.lists[method]) {
			f.add(subject{method: method})
		}
	}
}

func (s *Server) follow(f *feed, sub subscription) (stop func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.feeds[f] = sub
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.feeds, f)
	}
}

var errTooManyWatched = &Error{Code: codeBusy, Message: "there are 64 subscriptions already; end one of them first"}

// subscribe answers subscription requests of the revisions with sessions.
func (s *Server) subscribe(_ context.Context, session *Session, m message) (mcp.ResultMetadata, error) {
	uri := m.head.URI
	c := session.conversation
	c.mu.Lock()
	if _, again := c.watched[uri]; again {
		c.mu.Unlock()
		return &mcp.Result{}, nil
	}
	if len(c.watched) >= maxWatched {
		c.mu.Unlock()
		return nil, errTooManyWatched
	}
	if c.watched == nil {
		c.watched = map[string]context.CancelCauseFunc{}
	}
	ctx, cancel := context.WithCancelCause(s.MCP.WithContext(c.ctx, c.session(m, nil)))
	c.watched[uri] = cancel
	c.mu.Unlock()
	err := s.Resources.Watch(ctx, uri, func() { c.feed.add(subject{noteUpdated, uri}) })
	if err != nil {
		c.unwatch(uri)
		return nil, noResource(err, uri, m)
	}
	return &mcp.Result{}, nil
}

func (s *Server) unsubscribe(_ context.Context, session *Session, m message) (mcp.ResultMetadata, error) {
	session.unwatch(m.head.URI)
	return &mcp.Result{}, nil
}

func (c *conversation) unwatch(uri string) {
	c.mu.Lock()
	cancel := c.watched[uri]
	delete(c.watched, uri)
	c.mu.Unlock()
	if cancel != nil {
		cancel(nil)
	}
}

// listen is the subscription of 2026-07-28: a long request whose notifications carry its id. What was not asked for is never sent.
func (s *Server) listen(ctx context.Context, session *Session, m message) (mcp.ResultMetadata, error) {
	var params mcp.SubscriptionsListenParams
	if err := json.Unmarshal(m.Params, &params); err != nil {
		return nil, &Error{Code: codeParams, Message: "the parameters of subscriptions/listen are invalid"}
	}
	want := params.Notifications
	if len(want.ResourceSubscriptions) > maxWatched {
		return nil, errTooManyWatched
	}
	meta := map[string]any{mcp.MetaKeySubscriptionID: json.RawMessage(m.ID)}
	f := newFeed()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(session.open, cancel)()
	granted := mcp.SubscriptionFilter{ToolsListChanged: want.ToolsListChanged, PromptsListChanged: want.PromptsListChanged}
	lists := map[string]bool{NoteToolsChanged: want.ToolsListChanged, NotePromptsChanged: want.PromptsListChanged}
	if s.Resources != nil {
		granted.ResourcesListChanged = want.ResourcesListChanged
		lists[NoteResourcesChanged] = want.ResourcesListChanged
		for _, uri := range want.ResourceSubscriptions {
			if slices.Contains(granted.ResourceSubscriptions, uri) {
				continue
			}
			if err := s.Resources.Watch(ctx, uri, func() { f.add(subject{noteUpdated, uri}) }); err != nil {
				if errors.Is(err, ErrNoResource) {
					continue // left out of the acknowledgement, so not watched
				}
				return nil, err
			}
			granted.ResourceSubscriptions = append(granted.ResourceSubscriptions, uri)
		}
	}
	defer s.follow(f, subscription{owner: session.owner, lists: lists})()
	if session.out == nil {
		return nil, errNotAsked
	}
	if err := session.out.write(newNote(noteAcknowledged, map[string]any{"notifications": granted, "_meta": meta})); err != nil {
		return nil, err
	}
	if err := f.tell(ctx, session.out, meta); err != nil {
		return nil, err
	}
	result := &mcp.Result{}
	result.EnsureResultMeta().AdditionalFields = meta
	return result, nil
}
