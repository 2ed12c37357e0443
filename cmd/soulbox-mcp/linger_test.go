package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"soulbox.dev/soulbox/api/client"
	"soulbox.dev/soulbox/internal/sandboxtest"
)

// TestLinger: a sandbox that must end with the clients that follow it does so whenever they are gone: at once, while it is started, or on a
// server that has taken it over. Any other sandbox continues.
func TestLinger(t *testing.T) {
	state := sandboxtest.Dir(t)
	w := serve(t, state, "--on-exit=keep")
	var mu sync.Mutex
	here := func() *client.Client {
		mu.Lock()
		defer mu.Unlock()
		c, err := client.New(client.Options{URL: w.url})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	again := func(context.Context) (*client.Client, error) { return here(), nil }
	box, err := here().Create(t.Context(), client.NewSandbox{})
	if err != nil {
		t.Fatal(err)
	}
	running := func() (tags string) {
		list, err := here().Processes(t.Context(), box.ID)
		if err != nil {
			return err.Error()
		}
		for _, p := range list {
			if p.State == "running" {
				tags += p.Tag + " "
			}
		}
		return tags
	}
	begin := func(ctx context.Context, tag string, linger time.Duration) (*client.ProcessHandle, error) {
		return here().Start(ctx, box.ID, client.Command{Args: []string{"sleep", "1000"}, Tag: tag, Linger: linger}, again)
	}
	for tag, linger := range map[string]time.Duration{"kept": 0, "left": 100 * time.Millisecond} {
		ctx, leave := context.WithCancel(t.Context())
		if _, err := begin(ctx, tag, linger); err != nil {
			t.Fatal(err)
		}
		leave()
	}
	sandboxtest.Eventually(t, "what was left is over", func() bool { return running() == "kept " })
	for i := range 10 {
		ctx, leave := context.WithCancel(t.Context())
		time.AfterFunc(time.Duration(i)*3*time.Millisecond, leave)
		if _, err := begin(ctx, fmt.Sprint("hasty", i), 100*time.Millisecond); err == nil {
			leave()
		}
	}
	sandboxtest.Eventually(t, "what was left while it began is over", func() bool { return running() == "kept " })

	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	s, err := begin(ctx, "moved", 100*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	back, over := make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := s.Follow(ctx, io.Discard, io.Discard, func(lost bool) {
			if !lost {
				close(back)
			}
		})
		over <- err
	}()
	_ = w.cmd.Process.Kill()
	_ = w.cmd.Wait() // an error, since it was killed
	next := serve(t, state, "--on-exit=keep")
	mu.Lock()
	w = next
	mu.Unlock()
	select {
	case <-back:
	case err := <-over:
		t.Fatal(err)
	}
	if got := running(); !strings.Contains(got, "moved") {
		t.Error(got)
	}
	leave()
	<-over
	sandboxtest.Eventually(t, "what was left on another server is over", func() bool { return running() == "kept " })
	if err := here().Kill(t.Context(), box.ID); err != nil {
		t.Fatal(err)
	}
}
