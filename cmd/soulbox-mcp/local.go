package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"soulbox.dev/soulbox/api"
	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/internal/durable"
)

// local serves the HTTP API to the server's own user on a socket, for the command line: whoever is at its other end is asked of the kernel.
type local struct {
	path    string
	web     *http.Server
	control *api.Control
	log     *slog.Logger
	ended   chan struct{}

	serving atomic.Int64
	last    atomic.Int64 // when a request ended, in Unix nanoseconds
}

// serveLocal begins to serve.
func (s *service) serveLocal(kind string, getenv func(string) string) (*local, error) {
	dir := client.RuntimeDir(getenv)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := client.CheckRuntimeDir(dir); err != nil {
		return nil, err
	}
	l := &local{path: client.Socket(dir, os.Getpid()), log: s.log, ended: make(chan struct{})}
	listener, err := listenLocal(dir, l.path)
	if err != nil {
		return nil, err
	}
	l.control = &api.Control{Manager: s.manager, Store: s.templates, Builds: s.builds, Gateway: s.gateway, NoNetwork: s.noNetwork,
		Log: s.log, Local: true,
		Self:  client.Server{Version: version, Kind: kind, PID: os.Getpid(), State: s.stateDir},
		Owner: func(r *http.Request) (string, error) { return r.Header.Get(client.OwnerHeader), nil }}
	mux := http.NewServeMux()
	for pattern, handler := range l.control.Routes() {
		mux.Handle(pattern, handler)
	}
	l.last.Store(time.Now().UnixNano())
	l.web = newWeb(l.count(mux), s.log)
	go func() {
		defer close(l.ended)
		if err := l.web.Serve(s.descriptors.counted(ownUser{listener}, friend)); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("serve the socket", "path", l.path, "error", err)
		}
	}()
	return l, nil
}

// listenLocal makes a socket that only its user can open, and removes those of servers that are gone. One of several servers at a time does
// so: a socket that is made, and not listened at yet, looks like one of those.
func listenLocal(dir, path string) (_ net.Listener, err error) {
	lock, err := durable.Lock(filepath.Join(dir, "sockets.lock"), true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := tidySockets(dir); err != nil {
		return nil, err
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on the socket of this server: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return listener, nil
}

// alsoLocal is serveLocal for servers that serve others, too: where there can be no socket they go on without.
func (s *service) alsoLocal(kind string, getenv func(string) string) (end func()) {
	l, err := s.serveLocal(kind, getenv)
	if err != nil {
		s.log.Warn("the command line 'soulbox' will not find this server", "error", err)
		return func() {}
	}
	return l.Close
}

// Close ends it. Nobody finds it any more; what is being served has a moment, and is broken off then.
func (l *local) Close() {
	over, cancel := context.WithTimeout(context.Background(), localDrain)
	defer cancel()
	if err := os.Remove(l.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		l.log.Warn("remove the socket", "error", err)
	}
	if err := l.web.Shutdown(over); err != nil {
		if err := l.web.Close(); err != nil {
			l.log.Warn("close the socket", "error", err)
		}
	}
	<-l.ended
	l.control.Close()
}

// localDrain is for calls in flight when a server ends; those that follow something have no end of their own.
const localDrain = 300 * time.Millisecond

// count knows when the last request has ended.
func (l *local) count(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		l.serving.Add(1)
		defer func() {
			l.last.Store(time.Now().UnixNano())
			l.serving.Add(-1)
		}()
		next.ServeHTTP(w, r)
	})
}

// quiet is how long nobody has asked for anything.
func (l *local) quiet() time.Duration {
	if l.serving.Load() > 0 {
		return 0
	}
	return time.Since(time.Unix(0, l.last.Load()))
}

// tidySockets removes the sockets of servers that are gone.
func tidySockets(dir string) error {
	paths, err := client.Sockets(dir)
	for _, path := range paths {
		c, derr := net.DialTimeout("unix", path, time.Second)
		if derr == nil {
			_ = c.Close() // it was only tried
		} else if errors.Is(derr, syscall.ECONNREFUSED) {
			if rerr := os.Remove(path); !errors.Is(rerr, fs.ErrNotExist) {
				err = errors.Join(err, rerr)
			}
		}
	}
	return err
}

// ownUser accepts connections of the server's own user, and of root.
type ownUser struct{ net.Listener }

// Accept implements net.Listener.
func (o ownUser) Accept() (net.Conn, error) {
	for {
		c, err := o.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if uid, err := peer(c); err == nil && (uid == 0 || int(uid) == os.Geteuid()) {
			return c, nil
		}
		_ = c.Close() // a stranger is told nothing
	}
}

// peer is the user at the other end (unix(7), SO_PEERCRED).
func peer(c net.Conn) (uid uint32, err error) {
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(cerr, err); err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

// idleLook is how often a server of the socket alone looks whether it is needed.
const idleLook = time.Second

// runLocal serves the socket alone, as the command line starts it where there is no server: until no sandbox runs, and nobody asks for
// anything.
func runLocal(ctx context.Context, args []string, getenv func(string) string, stderr io.Writer) (err error) {
	c := config{onExit: "keep"}
	var idle time.Duration
	err = c.parse("local", args, getenv, stderr, c.serving, func(f *flag.FlagSet) {
		f.DurationVar(&idle, "idle-exit", time.Minute, "`time` without a request after which the server ends, once no sandbox runs")
	})
	if err != nil {
		return err
	}
	if c.logFile == "" {
		if err := os.MkdirAll(c.stateDir, 0o711); err != nil {
			return err
		}
		c.logFile = filepath.Join(c.stateDir, "local.log")
	}
	dir := client.RuntimeDir(getenv)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	lock, err := durable.Lock(filepath.Join(dir, "local.lock"), false)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil // there is one
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	s, err := newService(c, stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	l, err := s.serveLocal("local", getenv)
	if err != nil {
		return err
	}
	defer l.Close()
	s.log.Info("serving", "version", version, "socket", l.path, "state_dir", c.stateDir, "runsc", c.runsc)
	ticker := time.NewTicker(idleLook)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if l.quiet() >= idle && !s.manager.Busy() && !s.builds.UnderWay() {
			s.log.Info("nobody needs this server any more")
			return nil
		}
	}
}
