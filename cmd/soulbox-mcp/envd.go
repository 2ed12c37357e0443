package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"time"

	"soulbox.dev/soulbox/api/envd"
	"soulbox.dev/soulbox/internal/loopback"
	"soulbox.dev/soulbox/sandbox"
)

// runEnvd serves one sandbox as E2B's SDKs expect it in debug mode (E2B_DEBUG=true): on this machine, without a control plane and without a
// token. The sandbox ends with the server.
func runEnvd(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) (err error) {
	c, listen, name, err := parseEnvd(args, getenv, stderr)
	if err != nil {
		return err
	}
	listener, err := listenTCP(listen)
	if err != nil {
		return err
	}
	defer listener.Close()
	log, closeLog, err := c.openLog(stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeLog()) }()
	d, err := newDescriptorBudget(log)
	if err != nil {
		return err
	}
	defer d.open()()
	manager, _, err := c.newManager(log, func(o *sandbox.Options) { o.Listen = d.Listen })
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, manager.Close()) }()
	network := sandbox.Network{Mode: sandbox.NetworkFull}
	if c.noNetwork {
		network.Mode = sandbox.NetworkNone
	}
	sb, err := manager.Create(ctx, sandbox.CreateOptions{Template: name, Network: network, Transient: true,
		Times: sandbox.Times{Life: maxEnvdLife, OnTimeout: sandbox.ActionKill}})
	if err != nil {
		return err
	}
	return serveEnvd(ctx, sb, d.counted(listener, stranger), log, stdout)
}

// serveEnvd serves a sandbox and its ports until ctx or the sandbox ends.
func serveEnvd(ctx context.Context, sb *sandbox.Sandbox, listener net.Listener, log *slog.Logger, stdout io.Writer) (err error) {
	inside := envd.New(log)
	web := newWeb(onLoopback(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		target := envd.Target{Sandbox: sb, Open: true}
		if inside.Admits(w, r, target) {
			inside.Serve(w, r, target)
		}
	})), log)
	ended := make(chan error, 1)
	go func() { ended <- web.Serve(listener) }()
	if _, err := fmt.Fprintf(stdout, "http://%s serves sandbox %s; run your program with E2B_DEBUG=true\n", listener.Addr(),
		sb.ID()); err != nil {
		log.Warn("tell the address", "error", err)
	}
	gone, stop := sb.Bind(ctx)
	defer stop()
	serving := make(chan struct{})
	go func() {
		defer close(serving)
		servePorts(gone, sb, log)
	}()
	defer func() { stop(); <-serving }()
	select {
	case err = <-ended:
		return err
	case <-gone.Done():
	}
	err = web.Close()
	if ctx.Err() == nil {
		return errors.Join(fmt.Errorf("the sandbox has ended: %s", sb.Info().Cause), err)
	}
	return err
}

const (
	portsEvery  = 200 * time.Millisecond // between two checks which ports are open
	ownPorts    = 1024                   // ports below may belong to this machine's own services
	maxReported = 64                     // taken ports that are logged
	maxServed   = 64                     // ports served at once: as many as a sandbox may expose
)

// servePorts serves the ports of a sandbox at the same numbers of this machine's loopback, where debug mode looks for them, while something
// in the sandbox listens on them. A port that is already in use here is left alone.
func servePorts(ctx context.Context, sb *sandbox.Sandbox, log *slog.Logger) {
	ticker := time.NewTicker(portsEvery)
	defer ticker.Stop()
	told := map[int]bool{}
	for {
		listening, err := sb.Listening(ctx)
		if err == nil {
			for _, p := range sb.Ports() {
				if !slices.Contains(listening, p.Port) {
					err = errors.Join(err, sb.Unexpose(p.Port))
				}
			}
		}
		for _, port := range listening {
			exposed := sb.Ports()
			if port < ownPorts || slices.ContainsFunc(exposed, func(p sandbox.Port) bool { return p.Port == port }) {
				continue
			}
			if len(exposed) >= maxServed {
				if !told[0] {
					told[0] = true
					log.Warn("more ports of the sandbox are open than are served at once", "port", port, "served", maxServed)
				}
				break
			}
			if _, err := sb.ExposeAt(port, false, port); err != nil && !told[port] && len(told) < maxReported {
				told[port] = true
				log.Warn("a port of the sandbox cannot be served at its own number; stop what uses it here, or use another port",
					"port", port, "error", err)
			}
		}
		if err != nil && ctx.Err() == nil {
			log.Debug("look for ports", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func parseEnvd(args []string, getenv func(string) string, stderr io.Writer) (c config, listen, name string, err error) {
	c.onExit = "kill"
	err = c.parse("envd", args, getenv, stderr, func(f *flag.FlagSet) {
		f.StringVar(&listen, "listen", fmt.Sprintf("127.0.0.1:%d", envd.Port), "`address` to listen on, on loopback")
		f.StringVar(&name, "template", "", "`name` of the sandbox's template; default that of all sandboxes")
		f.BoolVar(&c.noNetwork, "no-network", false, "the sandbox has no network")
	})
	if err != nil {
		return c, listen, name, err
	}
	host, err := checkListen(listen)
	if err != nil {
		return c, listen, name, usageError{err}
	}
	if !loopback.IsItself(host) {
		return c, listen, name, usageError{fmt.Errorf("--listen %q is not on loopback: anyone who reaches it controls the sandbox", listen)}
	}
	return c, listen, name, nil
}

// maxEnvdLife is longer than any debugging session.
const maxEnvdLife = 30 * 24 * 3600e9

// onLoopback refuses web pages. Any page could reach a server that needs no token, by the page's own name (DNS rebinding) or from its own
// origin.
func onLoopback(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !loopback.IsItself(loopback.Bare(r.Host)) || r.Header.Get("Origin") != "" || r.Header.Get("Sec-Fetch-Site") == "cross-site" {
			http.Error(w, "only programs on this machine may use this server", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}
