package resources

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/mark3labs/mcp-go/mcp"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/cursor"
	"soulbox.dev/soulbox/internal/names"
	"soulbox.dev/soulbox/sandbox"
)

const (
	pageSize   = 10 // sandboxes per page
	maxOutputs = 50 // processes listed per sandbox, the latest
)

// List lists the caller's sandboxes, newest first, with what can be read of each; templates come last.
func (s *Catalog) List(ctx context.Context, after string) ([]mcp.Resource, string, error) {
	who, known := owner(ctx)
	if !known {
		return nil, "", nil
	}
	s.Manager.AwaitSettled(ctx)
	list := s.Manager.List(sandbox.Filter{Owner: who})
	part, next, err := cursor.Page("resources", after, list, pageSize, true, func(i sandbox.Info) string {
		return cursor.Key(i.Created, i.ID)
	})
	if errors.Is(err, cursor.ErrInvalid) {
		return nil, "", invalidCursor{}
	}
	if err != nil {
		return nil, "", err
	}
	var page []mcp.Resource
	for _, i := range part {
		page = append(page, s.of(ctx, who, i)...)
	}
	if next != "" {
		return page, next, nil
	}
	templates, err := s.templates(who)
	if err != nil {
		return nil, "", err
	}
	for _, name := range templates {
		page = append(page, mcp.NewResource("template://"+name, name, mcp.WithResourceDescription("Template "+name),
			mcp.WithMIMEType("application/json")))
	}
	return page, "", nil
}

type invalidCursor struct{}

// Error implements error.
func (invalidCursor) Error() string { return "the cursor does not come from resources/list" }

// ProtocolError says that the request was wrong.
func (e invalidCursor) ProtocolError() (code int, message string) {
	return mcp.INVALID_PARAMS, e.Error()
}

// of lists what can be read of a sandbox.
func (s *Catalog) of(ctx context.Context, who string, i sandbox.Info) []mcp.Resource {
	add := func(uri, name, description, kind string) mcp.Resource {
		return mcp.NewResource(uri, name, mcp.WithResourceDescription(description), mcp.WithMIMEType(kind))
	}
	uri := sandboxURI(i.ID)
	list := []mcp.Resource{
		add(uri, i.ID, fmt.Sprintf("Sandbox %s, %s", i.ID, i.State), "application/json"),
		add(uri+"/logs", i.ID+" logs", "What has happened to it", "application/jsonl"),
	}
	list = append(list, add(uri+"/metrics", i.ID+" metrics", "What it uses and has used", "application/json"))
	if i.State != sandbox.Running {
		return list
	}
	sb, err := s.Manager.Get(who, i.ID)
	if err != nil {
		return list
	}
	list = append(list, add(fileURI(i.ID, "/home/user"), i.ID+" files", "Its home directory", "text/plain"))
	client, err := sb.Look("list processes of")
	if err != nil {
		return list
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second) // a silent sandbox does not keep the others from being listed
	defer cancel()
	processes, err := client.List(ctx, agent.ListRequest{})
	if err != nil {
		return list
	}
	for _, p := range processes[:min(maxOutputs, len(processes))] { // the newest come first
		what := "Output of a process that has exited"
		if p.State == agent.StateRunning {
			what = "Output of a running process"
		}
		title := i.ID + " " + p.ID
		if p.Tag != "" {
			title += " " + agent.Inert([]byte(p.Tag))
		}
		list = append(list, add(outputURI(i.ID, p.ID), title, what, "text/plain"))
	}
	return list
}

// Complete completes ids of sandboxes and processes, paths, and names of templates.
func (s *Catalog) Complete(ctx context.Context, template, variable, value string, known map[string]string) ([]string, error) {
	var all []string
	who, ok := owner(ctx)
	if !ok {
		return nil, nil
	}
	switch {
	case strings.HasPrefix(template, "template://") && variable == "name":
		names, err := s.templates(who)
		if err != nil {
			return nil, err
		}
		all = names
	case variable == "id":
		for _, i := range s.Manager.List(sandbox.Filter{Owner: who}) {
			all = append(all, i.ID)
		}
	case variable == "process_id" || variable == "path" || variable == "+path":
		sb, err := s.Manager.Get(who, known["id"])
		if err != nil {
			return nil, nil // what does not exist has no completions
		}
		client, err := sb.Look("complete")
		if err != nil {
			return nil, nil
		}
		if variable != "process_id" {
			return paths(ctx, client, value), nil
		}
		processes, err := client.List(ctx, agent.ListRequest{})
		if err != nil {
			return nil, err
		}
		for _, p := range processes {
			all = append(all, p.ID)
		}
	}
	return slices.DeleteFunc(all, func(v string) bool { return !strings.HasPrefix(v, value) }), nil
}

// paths completes a path, which has no leading slash in the URI.
func paths(ctx context.Context, client *agent.Client, value string) []string {
	value = strings.TrimPrefix(value, "/") // models write one
	dir, _ := path.Split("/" + value)
	list, err := client.Dir(ctx, agent.DirRequest{Path: names.Parse(path.Clean(dir)), Depth: 1, Limit: 1000})
	if err != nil {
		return nil // what does not exist has no completions
	}
	var all []string
	for _, e := range list.Entries {
		p := strings.TrimPrefix(names.Show(e.Path), "/")
		if !strings.HasPrefix(e.Path, "/") {
			p = strings.TrimPrefix(path.Join(dir, names.Show(e.Path)), "/")
		}
		if e.Type == agent.TypeDir {
			p += "/"
		}
		if strings.HasPrefix(p, value) {
			all = append(all, p)
		}
	}
	return all
}
