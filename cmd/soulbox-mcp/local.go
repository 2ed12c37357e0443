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

// local serves the HTTP API on a socket for the command line of the server's own user. The kernel says who is at the other end.
type local struct {
	path    string
	web     *http.Server
	control *api.Control
	log     *slog.Logger
	ended   chan struct{}

	serving atomic.Int64
	last    atomic.Int64 // when a request ended, in Unix nanoseconds
}

// serveLocal starts to serve.
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

// listenLocal makes a socket that only its user can open, and removes those of servers that are gone. A lock admits one server at a time,
// because a socket that is made but not listened on yet looks like one of a server that is gone.
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

// alsoLocal is serveLocal for servers that also serve others: without a socket they run all the same.
func (s *service) alsoLocal(kind string, getenv func(string) string) (end func()) {
	l, err := s.serveLocal(kind, getenv)
	if err != nil {
		s.log.Warn("the command line 'soulbox' will not find this server", "error", err)
		return func() {}
	}
	return l.Close
}

// Close removes the socket, so that no new client finds it. Requests being served have localDrain to end and are then broken off.
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

// localDrain is the time for calls in flight when a server ends; calls that follow something do not end by themselves.
const localDrain = 300 * time.Millisecond

// count tracks requests, so that quiet knows when the last one ended.
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

// quiet is the time since the last request ended; 0 while one is served.
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
			_ = c.Close() // the connection was only a test
		} else if errors.Is(derr, syscall.ECONNREFUSED) {
			if rerr := os.Remove(path); !errors.Is(rerr, fs.ErrNotExist) {
				err = errors.Join(err, rerr)
			}
		}
	}
	return err
}

// ownUser accepts only connections of the server's own user, and of root.
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
		_ = c.Close() // a stranger gets no answer
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

// idleLook is how often a server that serves only the socket checks whether it is still needed.
const idleLook = time.Second

// runLocal serves only the socket. The command line starts it if there is no server. It ends when no sandbox runs and no request has come
// for some time.
func runLocal(ctx context.Context, args []string, getenv func(string) string, stderr io.Writer) (err error) {
	c := config{onExit: "keep"}
	var idle time.Duration
	err = c.parse("local", args, getenv, stderr, c.serving, func(f *flag.FlagSet) {
		f.DurationVar(&idle, "idle-exit", time.Minute, "`time` without a request after which the server ends, once no sandbox runs")
	})
	if err != nil {
		return err
	}
	if idle < 0 {
		return usageError{errors.New("--idle-exit must not be negative")}
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
		return nil // another server is running
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
			s.log.Info("this server is no longer needed")
			return nil
		}
	}
}
