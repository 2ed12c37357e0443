package tools_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mark3labs/mcp-go/server"

	"soulbox.dev/soulbox/mcpserver"
	"soulbox.dev/soulbox/template"
	"soulbox.dev/soulbox/tools"
)

// talk is a script of tool calls, and what was answered so far. Lines are:
//
//	> tool {arguments}   a call. In the arguments {cursor} is the last one of file_watch, and what @ sets
//	@ listen             a program on this machine listens on {port}: the Fake's sandboxes are this machine
//	@ home               {home} is the home directory of the session's sandbox
//	@ template           there is a template "mini", and others can be built, by steps that change no file: those are this machine's
type talk struct {
	*testing.T
	in      io.Writer
	answers *json.Decoder
	out     bytes.Buffer
	known   map[string]string
	last    string // output of exec
}

// conversation runs a script through the stdio loop and records what is answered.
func conversation(t *testing.T, script string) []byte {
	t.Helper()
	s, m := newServer(t)
	if strings.Contains(script, "@ template") {
		store := &template.Store{Dir: filepath.Join(t.TempDir(), "templates"), InUse: m.Images}
		builds := template.NewBuilds(&template.Builder{Store: store, Manager: m, Log: slog.New(slog.DiscardHandler)})
		t.Cleanup(builds.Close)
		service, err := tools.New(tools.Options{Manager: m, Store: store, Builds: builds})
		if err != nil {
			t.Fatal(err)
		}
		s = server.NewMCPServer("test", "1", server.WithOutputSchemaValidation())
		service.Register(s)
		importMini(t, store)
	}
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- mcpserver.Stdio{Server: mcpserver.New(mcpserver.Options{MCP: s})}.Serve(context.Background(), inR, outW)
	}()
	c := &talk{T: t, in: inW, answers: json.NewDecoder(outR), known: map[string]string{}}
	for i, line := range strings.Split(strings.TrimSpace(script), "\n") {
		switch kind, rest, _ := strings.Cut(line, " "); {
		case kind == ">":
			fmt.Fprintln(&c.out, line)
			c.call(i, rest)
		case kind == "@":
			fmt.Fprintln(&c.out, line)
			switch rest {
			case "listen":
				c.known["port"] = listen(t)
			case "home":
				said := c.out.Len()
				c.call(i, `exec {"command":"pwd"}`)
				c.out.Truncate(said) // how long it is differs
				c.known["home"] = c.last
			}
		}
	}
	_ = inW.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return steady(c.out.Bytes(), c.known)
}

// call makes one call.
func (c *talk) call(id int, line string) {
	c.Helper()
	tool, args, _ := strings.Cut(line, " ")
	for name, value := range c.known {
		args = strings.ReplaceAll(args, "{"+name+"}", value)
	}
	if _, err := fmt.Fprintf(c.in, `{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":%q,"arguments":%s}}`+"\n", id, tool,
		args); err != nil {
		c.Fatal(err)
	}
	type reply struct {
		ID     any
		Error  any
		Result struct {
			IsError           bool
			StructuredContent map[string]any
			Content           []struct{ Type, Text, MimeType string }
		}
	}
	var answer reply
	for answer.ID == nil { // notes come before the answer
		answer = reply{}
		if err := c.answers.Decode(&answer); err != nil {
			c.Fatal(err)
		}
	}
	if answer.Error != nil {
		fmt.Fprintf(&c.out, "error: %v\n", answer.Error)
	}
	if answer.Result.IsError {
		c.out.WriteString("isError: ")
	} else if answer.Error == nil && answer.Result.StructuredContent == nil {
		c.Errorf("%s: no structured content", line)
	}
	for _, content := range answer.Result.Content {
		fmt.Fprintln(&c.out, strings.TrimSpace(content.Type+" "+content.MimeType)+":", content.Text)
	}
	if structured, err := json.Marshal(answer.Result.StructuredContent); err == nil && answer.Result.StructuredContent != nil {
		fmt.Fprintf(&c.out, "= %s\n", structured)
	}
	if output, ok := answer.Result.StructuredContent["output"].(string); ok && tool == "exec" {
		c.last = strings.TrimSpace(output)
	}
	if cursor, ok := answer.Result.StructuredContent["cursor"].(string); ok && tool == "file_watch" {
		c.known["cursor"] = cursor
	}
}

// listen has something listen on a port of the loopback.
func listen(t *testing.T) (port string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
}

// importMini makes a template of one file.
func importMini(t *testing.T, store *template.Store) {
	t.Helper()
	var body bytes.Buffer
	w := tar.NewWriter(&body)
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "etc/mini", Mode: 0o644})
	if err = errors.Join(err, w.Close()); err == nil {
		_, err = store.Import(t.Context(), template.Manifest{Name: "mini"}, &body)
	}
	if err != nil {
		t.Fatal(err)
	}
}
