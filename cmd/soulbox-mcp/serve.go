package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"time"

	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/api"
	"soulbox.dev/soulbox/mcpserver"
	"soulbox.dev/soulbox/resources"
	"soulbox.dev/soulbox/sandbox"
	"soulbox.dev/soulbox/template"
	"soulbox.dev/soulbox/tools"
)

// service is what both transports serve.
type service struct {
	config
	log       *slog.Logger
	manager   *sandbox.Manager
	mcp       *mcpserver.Server
	metrics   *metrics
	gateway   *api.Gateway
	templates *template.Store
	builds    *template.Builds

	descriptors *descriptorBudget

	closers []func() error // of what was opened, in that order
}

// newService connects all parts. The caller must call Close.
func newService(c config, stderr io.Writer) (_ *service, err error) {
	s := &service{config: c, metrics: newMetrics()}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	log, closeLog, err := c.openLog(stderr)
	if err != nil {
		return nil, err
	}
	s.log, s.closers = log, []func() error{closeLog}
	if s.descriptors, err = newDescriptorBudget(s.log); err != nil {
		return nil, err
	}
	s.onClose(s.descriptors.open())
	s.warnDescriptors()
	ready := make(chan struct{}) // sandboxes may be adopted before there are clients to notify
	if err = s.openManager(ready); err != nil {
		return nil, err
	}
	s.builds = template.NewBuilds(c.newBuilder(s.templates, s.manager, s.log))
	s.onClose(s.builds.Close)
	s.gateway = api.NewGateway(s.manager, c.gateway, s.log)
	s.gateway.Insecure, s.gateway.Own = c.insecure, c.own
	if s.mcp, err = newMCP(s.toolOptions(), s.metrics, s.log); err != nil {
		return nil, err
	}
	close(ready)
	s.onClose(s.startCollecting())
	return s, nil
}

// onClose has Close call stop, before what was given earlier.
func (s *service) onClose(stop func()) {
	s.closers = append(s.closers, func() error { stop(); return nil })
}

// openManager makes the domain and the store of templates. Once ready is closed, clients are told when their sandboxes change.
func (s *service) openManager(ready <-chan struct{}) (err error) {
	s.manager, s.templates, err = s.newManager(s.log, func(o *sandbox.Options) {
		o.Listen = s.descriptors.Listen
		o.Observe = s.metrics.observeSandbox
		o.Changed = func(i sandbox.Info) {
			select {
			case <-ready:
				s.mcp.Changed(mcpserver.NoteResourcesChanged, &i.Owner)
			default:
			}
		}
	})
	if err != nil {
		return err
	}
	s.closers = append(s.closers, s.manager.Close)
	s.templates.InUse = s.manager.Images
	return nil
}

// toolOptions is what the tools need and may do.
func (s *service) toolOptions() tools.Options {
	o := tools.Options{Manager: s.manager, Store: s.templates, Builds: s.builds, ContextDirs: s.contextDirs, ReadOnly: s.readOnly,
		Toolsets: s.sets()}
	if s.own != nil {
		o.FileURL = s.gateway.FileURL
	}
	if s.config.gateway != nil {
		o.PortURL = s.gateway.URL
	}
	return o
}

// warnDescriptors logs a warning if there are too few descriptors for the sandboxes that may be promised.
func (s *service) warnDescriptors() {
	sandboxes, err := s.promised()
	if err == nil {
		_, err = enoughDescriptors(sandboxes)
	}
	if err != nil {
		s.log.Warn("too few descriptors: raise the limit (ulimit -n, LimitNOFILE=), or promise less (--memory-budget-mb, --max-sandboxes)",
			"error", err)
	}
}

// collectEvery is how often files that no template, sandbox or build needs are removed.
const collectEvery = 10 * time.Minute

// startCollecting removes such files until stop is called.
func (s *service) startCollecting() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() {
		defer close(over)
		for {
			if err := s.templates.Collect(); err != nil {
				s.log.Error("collect what builds have left", "error", err)
			}
			select {
			case <-time.After(collectEvery):
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() { cancel(); <-over }
}

// Close ends the sandboxes, or leaves them to the next server.
func (s *service) Close() (err error) {
	for _, closer := range slices.Backward(s.closers) {
		err = errors.Join(err, closer())
	}
	return err
}

// newMCP makes the MCP server with everything it offers.
func newMCP(o tools.Options, m *metrics, log *slog.Logger) (*mcpserver.Server, error) {
	offered, err := tools.New(o)
	if err != nil {
		return nil, err
	}
	s := server.NewMCPServer("soulbox", version, server.WithToolCapabilities(true), server.WithResourceCapabilities(true, true),
		server.WithPromptCapabilities(true),
		server.WithLogging(), server.WithCompletions(), server.WithInstructions(tools.Instructions), server.WithTitle("SoulBox"),
		server.WithExtensions(map[string]any{mcpserver.TasksExtension: map[string]any{}}))
	offered.Register(s)
	options := mcpserver.Options{
		MCP: s, Name: "soulbox", Version: version, Log: log,
		Resources: resources.New(resources.Options{Manager: o.Manager, Store: o.Store, NotFound: mcpserver.ErrNoResource}),
		Tasks:     map[string]mcpserver.TaskRule{},
	}
	for _, name := range offered.Slow() {
		options.Tasks[name] = mcpserver.TaskRule{After: taskAfter}
	}
	if m != nil {
		options.Observe = func(method, tool, outcome string, took time.Duration) {
			m.observeRequest(s, method, tool, outcome, took)
		}
	}
	return mcpserver.New(options), nil
}

// taskAfter is how long a slow tool runs before a client that supports tasks gets one instead of waiting.
const taskAfter = 2 * time.Second
