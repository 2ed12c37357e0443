package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"soulbox.dev/soulbox/api/client"
)

func (a *app) newClient(o client.Options) (*client.Client, error) {
	o.Agent = "soulbox/" + version
	if a.debug {
		o.Trace = func(method, path string, status int, took time.Duration) {
			fmt.Fprintf(a.stderr, "%s %s -> %d in %s\n", method, path, status, took.Round(time.Millisecond/10)) // debug output may be lost
		}
	}
	return client.New(o)
}

// server is a server that has described itself.
type server struct {
	*client.Client
	client.Server
}

const lookTime = 5 * time.Second // how long a server on this machine may take to answer

// running returns this user's servers on this machine that answer.
func (a *app) running(ctx context.Context) ([]server, error) {
	paths, err := client.Sockets(client.RuntimeDir(a.getenv))
	if err != nil {
		return nil, err
	}
	found := make([]server, len(paths))
	var all sync.WaitGroup
	var mu sync.Mutex
	var old error
	for i, path := range paths {
		c, err := a.newClient(client.Options{Socket: path, Owner: a.owner})
		if err != nil {
			return nil, err
		}
		all.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, lookTime)
			defer cancel()
			s, err := c.Server(ctx)
			if err == nil {
				found[i] = server{c, s}
			} else if !client.Unreachable(err) && ctx.Err() == nil {
				mu.Lock()
				defer mu.Unlock()
				old = err
			}
		})
	}
	all.Wait()
	var live []server
	for _, s := range found {
		if s.Client != nil {
			live = append(live, s)
		}
	}
	if len(live) == 0 && old != nil {
		return nil, old
	}
	return live, nil
}

// servers returns the servers to ask: the one of the chosen login, or all on this machine, of which one is started if there is none.
func (a *app) servers(ctx context.Context) ([]server, error) {
	l, _, remote, err := a.chosen()
	if err != nil {
		return nil, err
	}
	if remote {
		c, err := a.newClient(client.Options{URL: l.URL, Key: l.Key})
		return []server{{Client: c}}, err
	}
	live, err := a.running(ctx)
	if err != nil || len(live) > 0 {
		return live, err
	}
	return a.start(ctx)
}

// lastingServer returns the server that creates new things: one that outlives its client, which an IDE's server does not.
func (a *app) lastingServer(ctx context.Context) (server, error) {
	all, err := a.servers(ctx)
	if err != nil {
		return server{}, err
	}
	for _, s := range all {
		if s.Kind != "stdio" {
			return s, nil
		}
	}
	if all, err = a.start(ctx); err != nil {
		return server{}, err
	}
	for _, s := range all {
		if s.Kind != "stdio" {
			return s, nil
		}
	}
	return server{}, errors.New("the server that was started for this does not answer")
}

const (
	startTime = 20 * time.Second
	startPoll = 20 * time.Millisecond
)

// start starts a server for this user alone, which ends by itself when it is not needed any more.
func (a *app) start(ctx context.Context) ([]server, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, startTime,
		errors.New("no server could be started in time; its log is local.log in its state directory"))
	defer cancel()
	program, err := a.findServer()
	if err != nil {
		return nil, err
	}
	var said bytes.Buffer
	cmd := exec.Command(program, "local") // it outlives this program
	cmd.Env = slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, guardVar+"=") })
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = time.Second
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start a server: %w", err), r.Close(), w.Close())
	}
	_ = w.Close() // the server has its own copy
	over := make(chan error, 1)
	go func() {
		_, _ = said.ReadFrom(r) // until the server has ended
		over <- cmd.Wait()
	}()
	for {
		live, err := a.running(ctx)
		if err != nil {
			return nil, err
		}
		for _, s := range live {
			if s.Kind == "local" || s.Kind == "http" {
				return live, nil
			}
		}
		select {
		case werr := <-over:
			if werr != nil {
				return nil, fmt.Errorf("no server could be started: %s",
					strings.TrimPrefix(strings.TrimSpace(said.String()), "soulbox-mcp: "))
			}
			if !pause(ctx, 10*startPoll) {
				return nil, context.Cause(ctx)
			}
			return a.start(ctx) // another server was faster, or is about to end
		case <-time.After(startPoll):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// findServer finds soulbox-mcp: by the environment, next to this program, or in PATH.
func (a *app) findServer() (string, error) {
	if path := a.getenv("SOULBOX_MCP"); path != "" {
		return path, nil
	}
	if self, err := os.Executable(); err == nil {
		path := filepath.Join(filepath.Dir(self), "soulbox-mcp")
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path, nil
		}
	}
	if path, err := exec.LookPath("soulbox-mcp"); err == nil {
		return path, nil
	}
	return "", errors.New("no server of yours runs on this machine, and soulbox-mcp is not here to start one: put it next to soulbox or " +
		"into PATH, or log in to a server with 'soulbox auth login'")
}

// box is a sandbox and the client of its server.
type box struct {
	client.Sandbox
	at *client.Client
}

// boxes lists the sandboxes of all servers. If two servers know a sandbox, the one that has it in memory counts.
func (a *app) boxes(ctx context.Context, l client.List) ([]box, error) {
	all, err := a.servers(ctx)
	if err != nil {
		return nil, err
	}
	var out []box
	seen := map[string]int{}
	for _, s := range all {
		list, err := s.Sandboxes(ctx, l)
		if err != nil {
			if len(all) > 1 && client.Unreachable(err) {
				continue // the server has just ended
			}
			return nil, err
		}
		for _, sb := range list {
			if i, known := seen[sb.ID]; known {
				if out[i].State != "running" {
					out[i] = box{sb, s.Client}
				}
				continue
			}
			seen[sb.ID] = len(out)
			out = append(out, box{sb, s.Client})
		}
	}
	return out, nil
}

// liveSandbox finds a sandbox that has not ended.
func (a *app) liveSandbox(ctx context.Context, id string) (box, error) {
	b, err := a.anySandbox(ctx, id)
	if err == nil && (b.State == "killed" || b.State == "failed") {
		return box{}, fmt.Errorf("sandbox %s has ended: %s", b.ID, b.Cause)
	}
	return b, err
}

// shortestID is how much of an id is needed: all of them begin with the same two letters.
const shortestID = 3

// anySandbox finds a sandbox by its id or an unambiguous beginning of it, even one that has ended.
func (a *app) anySandbox(ctx context.Context, id string) (box, error) {
	all, err := a.servers(ctx)
	if err != nil {
		return box{}, err
	}
	if b, err := findAmong(ctx, all, id); err == nil || !client.IsNotFound(err) {
		return b, err
	}
	list, err := a.boxes(ctx, client.List{})
	if err != nil {
		return box{}, err
	}
	var found []box
	for _, b := range list {
		if strings.HasPrefix(b.ID, id) && id != "" {
			found = append(found, b)
		}
	}
	switch {
	case len(found) == 0:
		return box{}, fmt.Errorf("there is no sandbox %q; 'soulbox sandbox list' shows them", id)
	case len(id) < shortestID:
		return box{}, fmt.Errorf("%q is too short for an ID: give %d characters of it or more, such as %s", id, shortestID,
			found[0].ID[:min(len(found[0].ID), shortestID+2)])
	case len(found) == 1:
		return found[0], nil
	}
	return box{}, fmt.Errorf("%q is the beginning of %d ids: %s and others; give more of the id", id, len(found), found[0].ID)
}

// findAmong asks servers for a sandbox. The server that runs it is preferred to those that only remember it.
func findAmong(ctx context.Context, all []server, id string) (found box, err error) {
	err = &client.Error{Status: 404, Message: "there is no sandbox " + id}
	for _, s := range all {
		sb, serr := s.Sandbox(ctx, id)
		if serr == nil && (found.at == nil || sb.State == "running") {
			found = box{sb, s.Client}
		}
		if serr != nil && !client.IsNotFound(serr) && (!client.Unreachable(serr) || len(all) == 1) {
			err = serr
		}
	}
	if found.at != nil {
		return found, nil
	}
	return box{}, err
}

// startAfter is how long a followed process waits for its server to come back before it starts a new one.
const startAfter = 10 * time.Second

// reconnector finds a sandbox's server again for a process whose server is gone: a new server may be about to take the sandbox over.
func (a *app) reconnector(id string) func(context.Context) (*client.Client, error) {
	var gone time.Time
	return func(ctx context.Context) (*client.Client, error) {
		_, _, remote, err := a.chosen()
		if err != nil {
			return nil, err
		}
		ask := a.running
		if gone.IsZero() || time.Since(gone) > time.Minute {
			gone = time.Now()
		}
		if remote || time.Since(gone) > startAfter {
			ask = a.servers
		}
		all, err := ask(ctx)
		if err != nil {
			return nil, err
		}
		if len(all) == 0 {
			return nil, errors.New("no server answers")
		}
		b, err := findAmong(ctx, all, id)
		if client.IsNotFound(err) && !remote {
			return nil, errors.New("no server has it") // not yet
		}
		return b.at, err
	}
}
