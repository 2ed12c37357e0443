package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/hashicorp/yamux"
	"github.com/sourcegraph/jsonrpc2"
)

// forged is a client whose agent answers every call with the same JSON.
func forged(t *testing.T, result string) *Client {
	t.Helper()
	host, guest := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		var h Hello
		_ = ReadHello(bufio.NewReader(guest), &h)
		_ = WriteHello(guest, Hello{Protocol: Protocol})
		session, err := yamux.Server(guest, MuxConfig())
		if err != nil {
			return
		}
		stream, err := session.AcceptStream()
		if err != nil {
			return
		}
		var hd Header
		_ = ReadMessage(stream, &hd)
		raw := json.RawMessage(result)
		conn := jsonrpc2.NewConn(context.Background(), MessageStream{Conn: stream},
			HandlerFunc(func(ctx context.Context, c *jsonrpc2.Conn, r *jsonrpc2.Request) {
				_ = c.Reply(ctx, r.ID, &raw)
			}), Quiet)
		<-conn.DisconnectNotify()
	}()
	c, err := NewClient(t.Context(), host, "test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(); _ = guest.Close(); <-done })
	return c
}

// TestForgedAnswers: the host refuses lists and strings of an agent that are larger than allowed.
func TestForgedAnswers(t *testing.T) {
	list := func(entry string, n int) string { return "[" + strings.Repeat(entry+",", n-1) + entry + "]" }
	long := strings.Repeat("x", maxText+1)
	ctx := t.Context()
	for name, f := range map[string]struct {
		answer string
		call   func(*Client) error
	}{
		"processes": {list("{}", MaxEntries+1), func(c *Client) error { _, err := c.List(ctx, ListRequest{}); return err }},
		"many":      {list("{}", 300_000), func(c *Client) error { _, err := c.List(ctx, ListRequest{}); return err }},
		"lists":     {list("[]", 300_000), func(c *Client) error { _, err := c.List(ctx, ListRequest{}); return err }},
		"a command": {`[{"command":"` + long + `"}]`, func(c *Client) error { _, err := c.List(ctx, ListRequest{}); return err }},
		"an id": {`{"process":{"id":"` + long[:200] + `"}}`,
			func(c *Client) error { _, err := c.Start(ctx, StartRequest{}); return err }},
		"output": {`{"output":{"head":"` + strings.Repeat("AAAA", MaxWindow/3+2) + `"}}`,
			func(c *Client) error { _, err := c.Wait(ctx, WaitRequest{}); return err }},
		"files": {`{"entries":` + list("{}", MaxEntries+1) + `}`,
			func(c *Client) error { _, err := c.Dir(ctx, DirRequest{}); return err }},
		"a path": {`{"path":"` + long + `"}`, func(c *Client) error { _, err := c.Stat(ctx, "/"); return err }},
		"a link": {`{"link":{"target":"` + long + `"}}`, func(c *Client) error { _, err := c.Lstat(ctx, "/"); return err }},
		"matches": {`{"matches":` + list("{}", MaxEntries+1) + `}`,
			func(c *Client) error { _, err := c.Search(ctx, SearchRequest{}); return err }},
		"variables": {fmt.Sprintf(`{%q:%q}`, "A", strings.Repeat("x", MaxCommand+1)),
			func(c *Client) error { _, err := c.Environment(ctx); return err }},
		"events": {`{"events":` + list("{}", MaxEvents+1) + `}`, func(c *Client) error { _, err := c.Usage(ctx, nil); return err }},
		"changes": {`{"events":` + list("{}", MaxTreeBatch+1) + `}`,
			func(c *Client) error { _, err := c.WatchTree(ctx, TreeRequest{}); return err }},
		"killed": {`{"killed":` + list("{}", MaxRelieved+1) + `}`,
			func(c *Client) error { _, err := c.Relieve(ctx, RelieveRequest{}); return err }},
		"names": {`{"env":` + list(`"x"`, MaxEntries+1) + `}`,
			func(c *Client) error { _, err := c.Shell(ctx, ShellRequest{}); return err }},
	} {
		t.Run(name, func(t *testing.T) {
			if err := f.call(forged(t, f.answer)); !errors.Is(err, ErrTooLarge) {
				t.Errorf("%v", err)
			}
		})
	}
	c := forged(t, `{"process":{"id":"p1","command":"\"{[\\\"{[","started":"2026-01-02T03:04:05Z"},"output":{"head":"aGk="}}`)
	if s, err := c.Wait(ctx, WaitRequest{}); err != nil || s.Process.ID != "p1" || string(s.Output.Head) != "hi" {
		t.Errorf("%+v, %v", s, err)
	}
}

func FuzzDecodeAnswer(f *testing.F) {
	for _, seed := range []string{``, `{}`, `[{"id":"\\"}]`, `{"entries":[{"attrs":{"a":"b"},"link":{}}]}`, `"\`, `"\"`, `{"a`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		if n := objects(raw); n > len(raw) {
			t.Fatalf("%d objects in %d bytes", n, len(raw))
		}
		var list []Process
		var dir DirResult
		_, _ = decodeAnswer(raw, &list), decodeAnswer(raw, &dir)
	})
}
