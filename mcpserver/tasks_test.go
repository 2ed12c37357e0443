package mcpserver_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mark3labs/mcp-go/mcp"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/mcpserver"
)

// taskOf is the task in an answer.
type taskOf struct {
	ResultType, TaskID, Status, StatusMessage string
	Result                                    json.RawMessage
}

func (s *site) taskClient(owner string) *sandboxtest.MCP {
	c := s.client(true)
	c.Key, c.Capabilities = owner, map[string]any{"extensions": map[string]any{mcpserver.TasksExtension: map[string]any{}}}
	return c
}

func task(t *testing.T, c *sandboxtest.MCP, method string, params map[string]any) taskOf {
	t.Helper()
	a, err := c.Do(t.Context(), method, params)
	if err != nil || a.Error != nil {
		t.Fatalf("%v %+v", err, a.Error)
	}
	var got taskOf
	if err := json.Unmarshal(a.Result, &got); err != nil {
		t.Fatal(err)
	}
	return got
}

// TestTaskCancel: cancelling a task ends its call as a cancellation does, and the task stays cancelled.
func TestTaskCancel(t *testing.T) {
	s := newSite(t, nil)
	c := s.taskClient("")
	begun := task(t, c, "tools/call", map[string]any{"name": "slow", "arguments": map[string]any{"ms": 60_000}})
	if begun.ResultType != "task" || begun.Status != "working" {
		t.Fatalf("%+v", begun)
	}
	of := map[string]any{"taskId": begun.TaskID}
	task(t, c, "tasks/cancel", of)
	if err := <-s.ended; !errors.Is(err, mcpserver.ErrCancelled) {
		t.Fatal(err)
	}
	for range 2 {
		if got := task(t, c, "tasks/get", of); got.Status != "cancelled" || got.Result != nil {
			t.Fatalf("%+v", got)
		}
		task(t, c, "tasks/cancel", of)
	}
}

// TestTaskSurvivesItsClient: a client that leaves once it knows the task cancels nothing; one that leaves earlier does.
func TestTaskSurvivesItsClient(t *testing.T) {
	s := newSite(t, nil)
	c := s.taskClient("")
	begun := task(t, c, "tools/call", map[string]any{"name": "slow", "arguments": map[string]any{"ms": 100}})
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if got := task(t, c, "tasks/get", map[string]any{"taskId": begun.TaskID}); got.Status == "completed" &&
			strings.Contains(string(got.Result), "done") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it does not end")
		}
	}
	<-s.started
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-s.started; cancel() }()
	_, _ = c.Do(ctx, "tools/call", map[string]any{"name": "slow", "arguments": map[string]any{"ms": 60_000}}) // an error means that it left
	if err := <-s.ended; !errors.Is(err, mcpserver.ErrCancelled) {
		t.Fatal(err)
	}
}

// TestTaskBounds: an owner has at most 64 unfinished tasks, and further calls are answered as ordinary calls. Another owner's tasks are not
// found.
func TestTaskBounds(t *testing.T) {
	s := newSite(t, func(o *mcpserver.HTTPOptions) {
		o.Admission.Authenticate = func(_ context.Context, token string) (string, error) { return token, nil }
	})
	ann, bob := s.taskClient("ann"), s.taskClient("bob")
	var first taskOf
	for i := range 64 {
		got := task(t, ann, "tools/call", map[string]any{"name": "slow", "arguments": map[string]any{"ms": 60_000}})
		if i == 0 {
			first = got
		}
	}
	a, err := ann.Call(t.Context(), "slow", map[string]any{"ms": 100}) // one more is an ordinary call
	if err != nil || a.Text() != "done" {
		t.Fatalf("%v %+v", err, a)
	}
	for _, id := range []string{first.TaskID, "nope"} {
		a, err := bob.Do(t.Context(), "tasks/get", map[string]any{"taskId": id})
		if err != nil || a.Error == nil || a.Error.Message != "there is no such task" || a.Error.Code != -32602 {
			t.Errorf("%v %+v", err, a)
		}
	}
}

// TestToolErrors: a tool's own error stays an error of the tool, and a protocol error stays a protocol error.
func TestToolErrors(t *testing.T) {
	s := newSite(t, nil)
	s.mcp.MCP.AddTool(mcp.NewTool("refuse"), func(context.Context, mcp.CallToolRequest) (*mcp.CallToolResult, error) {
		return nil, fmt.Errorf("wrapped: %w", &mcpserver.Error{Code: -32021, Message: "no", Data: map[string]string{"a": "b"}})
	})
	eras(t, func(t *testing.T, modern bool) {
		a, err := s.client(modern).Open(t).Call(t.Context(), "refuse", nil)
		if err != nil || a.Error == nil || a.Error.Code != -32021 || string(a.Error.Data) != `{"a":"b"}` {
			t.Fatalf("%v %+v", err, a)
		}
	})
}
