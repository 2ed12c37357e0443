package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
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
	closeLog  func() error
	manager   *sandbox.Manager
	mcp       *mcpserver.Server
	metrics   *metrics
	gateway   *api.Gateway
	templates *template.Store
	builds    *template.Builds

	descriptors *descriptorBudget

	stopCollecting, stopRelieving func()
}

// newService connects all parts. The caller must call Close.
func newService(c config, stderr io.Writer) (_ *service, err error) {
	s := &service{config: c, metrics: newMetrics()}
	if s.log, s.closeLog, err = c.openLog(stderr); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.closeLog())
		}
	}()
	if s.descriptors, err = newDescriptorBudget(s.log); err != nil {
		return nil, err
	}
	s.stopRelieving = s.descriptors.open()
	s.warnDescriptors()
	defer func() {
		if err != nil {
			s.stopRelieving()
		}
	}()
	ready := make(chan struct{}) // sandboxes may be adopted before there are clients to notify
	manager, templates, err := c.newManager(s.log, func(o *sandbox.Options) {
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
		return nil, err
	}
	s.manager = manager
	defer func() {
		if err != nil {
			err = errors.Join(err, manager.Close())
		}
	}()
	templates.InUse = manager.Images
	s.templates, s.builds = templates, template.NewBuilds(c.newBuilder(templates, manager, s.log))
	s.gateway = api.NewGateway(manager, c.gateway, s.log)
	s.gateway.Insecure = c.insecure
	o := tools.Options{Manager: manager, Store: templates, Builds: s.builds, ContextDirs: c.contextDirs, ReadOnly: c.readOnly}
	if s.gateway.Own = c.own; c.own != nil {
		o.FileURL = s.gateway.FileURL
	}
	if c.gateway != nil {
		o.PortURL = s.gateway.URL
	}
	if c.toolsets != "" {
		o.Toolsets = strings.Split(c.toolsets, ",")
	}
	if s.mcp, err = newMCP(o, s.metrics, s.log); err != nil {
		return nil, err
	}
	close(ready)
	collecting, stop := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() {
		defer close(over)
		s.collect(collecting, templates)
	}()
	s.stopCollecting = func() { stop(); <-over }
	return s, nil
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

func (s *service) collect(ctx context.Context, templates *template.Store) {
	for {
		if err := templates.Collect(); err != nil {
			s.log.Error("collect what builds have left", "error", err)
		}
		select {
		case <-time.After(collectEvery):
		case <-ctx.Done():
			return
		}
	}
}

// Close ends the sandboxes, or leaves them to the next server.
func (s *service) Close() error {
	s.stopCollecting()
	s.builds.Close()
	err := s.manager.Close()
	s.stopRelieving()
	return errors.Join(err, s.closeLog())
}

// newMCP makes the MCP server with everything it offers.
func newMCP(o tools.Options, m *metrics, log *slog.Logger) (*mcpserver.Server, error) {
	offered, err := tools.New(o)
	if err != nil {
		return nil, fmt.Errorf("--toolsets: %w", err)
	}
	s := server.NewMCPServer("soulbox", version, server.WithToolCapabilities(true), server.WithResourceCapabilities(true, true),
		server.WithPromptCapabilities(true),
		server.WithLogging(), server.WithCompletions(), server.WithInstructions(tools.Instructions), server.WithTitle("SoulBox"),
		server.WithExtensions(map[string]any{mcpserver.TasksExtension: map[string]any{}}))
	offered.Register(s)
	options := mcpserver.Options{
		MCP: s, Name: "soulbox", Version: version, Log: log,
		Resources: resources.New(resources.Options{Manager: o.Manager, Store: o.Store, NotFound: mcpserver.ErrNoResource}),
		Tasks: map[string]mcpserver.TaskRule{"exec": {After: taskAfter}, "sandbox_snapshot": {After: taskAfter},
			"sandbox_fork": {After: taskAfter}, "template_build": {After: taskAfter}},
	}
	if m != nil {
		options.Observe = func(method, tool, outcome string, took time.Duration) {
			m.observeRequest(s, method, tool, outcome, took)
		}
	}
	return mcpserver.New(options), nil
}

// taskAfter is how long a command runs before a client that supports tasks gets one instead of waiting.
const taskAfter = 2 * time.Second
