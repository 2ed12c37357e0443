package sandbox_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// newManager makes a Manager on the Fake. Its state directory can be given to another Manager.
func newManager(t *testing.T, dir string, fake *sandboxtest.Fake, change func(*sandbox.Options)) *sandbox.Manager {
	t.Helper()
	fake.EndAfter(t)
	o := sandbox.Options{Dir: dir, Runtime: fake, Templates: sandboxtest.Templates{}, Version: "test", MemoryBudget: 8 << 30}
	if change != nil {
		change(&o)
	}
	m, err := sandbox.NewManager(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func create(t *testing.T, m *sandbox.Manager, o sandbox.CreateOptions) *sandbox.Sandbox {
	t.Helper()
	sb, err := m.Create(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return sb
}

func TestFake(t *testing.T) {
	fake := &sandboxtest.Fake{}
	fake.EndAfter(t)
	sandboxtest.Suite(t, fake, sandbox.Template{Name: "host"}, sandbox.DefaultLimits())
}

func TestLife(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, nil)
	sb := create(t, m, sandbox.CreateOptions{Metadata: map[string]string{"a": "1"}})
	info := sb.Info()
	if !sandbox.ValidID(info.ID) || info.State != sandbox.Running || info.Metadata["a"] != "1" || info.Limits != sandbox.DefaultLimits() {
		t.Fatalf("%+v", info)
	}
	if left := info.ExpiresAt.Sub(info.Ready); left != sandbox.DefaultLifetime {
		t.Fatalf("it lives %s", left)
	}
	client, err := sb.Agent(t.Context(), "use")
	if err != nil {
		t.Fatal(err)
	}
	sandboxtest.Run(t, client, "true")

	if err := sb.Pause(t.Context(), sandbox.PauseOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := sb.Agent(t.Context(), "use"); !errors.Is(err, sandbox.ErrState) || !strings.Contains(err.Error(), "paused") {
		t.Fatal(err)
	}
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{}); !errors.Is(err, sandbox.ErrState) {
		t.Fatal(err)
	}
	if err := sb.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := sb.Resume(t.Context()); !errors.Is(err, sandbox.ErrState) {
		t.Fatal(err)
	}
	if err := sb.Kill(sandbox.CauseKilled); err != nil {
		t.Fatal(err)
	}
	if err := sb.Kill(sandbox.CauseKilled); !errors.Is(err, sandbox.ErrState) || !strings.Contains(err.Error(), "killed by request") {
		t.Fatal(err)
	}
	if fake.Running() != 0 {
		t.Fatal("a machine is left")
	}
	if _, err := os.Stat(filepath.Join(dir, "sandboxes", sb.ID())); !errors.Is(err, os.ErrNotExist) {
		t.Fatal("its directory is left")
	}
	if got, err := m.Get("", sb.ID()); err != nil || got.Info().Cause != "killed by request" {
		t.Fatal("an ended sandbox is forgotten at once")
	}
	if _, err := m.Get("", "sbnone"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Fatal(err)
	}
}

func TestLifeTimeEnds(t *testing.T) {
	fake := &sandboxtest.Fake{}
	m := newManager(t, t.TempDir(), fake, nil)
	sb := create(t, m, sandbox.CreateOptions{Times: sandbox.Times{Life: 50 * time.Millisecond}})
	sandboxtest.Eventually(t, "its end", func() bool { return sb.Info().State == sandbox.Killed && fake.Running() == 0 })
	if cause := sb.Info().Cause; cause != sandbox.CauseTimeout.Error() {
		t.Fatal(cause)
	}
}

func TestUpdate(t *testing.T) {
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, nil)
	sb := create(t, m, sandbox.CreateOptions{Metadata: map[string]string{"a": "1", "b": "2"}, Times: sandbox.Times{Max: 3 * time.Hour}})
	three, hour, long, negative := "3", time.Hour, 5*time.Hour, -time.Hour
	before := sb.Info().ExpiresAt
	info, err := sb.Update(t.Context(), sandbox.Update{Metadata: map[string]*string{"a": nil, "c": &three}, Extend: &hour})
	if err != nil || len(info.Metadata) != 2 || info.Metadata["c"] != "3" || !info.ExpiresAt.Equal(before.Add(hour)) {
		t.Fatalf("%+v %v", info, err)
	}
	for name, u := range map[string]sandbox.Update{
		"too long": {Extend: &long}, "both": {Extend: &hour, Lifetime: &hour}, "negative": {Extend: &negative},
		"a long key": {Metadata: map[string]*string{strings.Repeat("k", 2000): &three}},
	} {
		if _, err := sb.Update(t.Context(), u); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := sb.Info(); !got.ExpiresAt.Equal(info.ExpiresAt) || len(got.Metadata) != 2 {
		t.Fatal("a refused update changed something")
	}
	short := time.Millisecond
	if _, err := sb.Update(t.Context(), sandbox.Update{Lifetime: &short}); err != nil {
		t.Fatal(err)
	}
	sandboxtest.Eventually(t, "a shortened life ends", func() bool { return sb.Info().State == sandbox.Killed })
	if _, err := sb.Update(t.Context(), sandbox.Update{Extend: &hour}); !errors.Is(err, sandbox.ErrState) {
		t.Fatal(err)
	}
}

func TestRefusals(t *testing.T) {
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, nil)
	for name, test := range map[string]struct {
		o    sandbox.CreateOptions
		want error
	}{
		"template":    {sandbox.CreateOptions{Template: "none"}, sandbox.ErrNoTemplate},
		"negative":    {sandbox.CreateOptions{Limits: sandbox.Limits{CPU: -1}}, sandbox.ErrInvalid},
		"tiny":        {sandbox.CreateOptions{Limits: sandbox.Limits{Memory: 1}}, sandbox.ErrInvalid},
		"metadata":    {sandbox.CreateOptions{Metadata: map[string]string{"": "x"}}, sandbox.ErrInvalid},
		"no room":     {sandbox.CreateOptions{Limits: sandbox.Limits{Memory: 9 << 30}}, sandbox.ErrNoRoom},
		"a long life": {sandbox.CreateOptions{Times: sandbox.Times{Life: -1}}, sandbox.ErrInvalid},
	} {
		if _, err := m.Create(t.Context(), test.o); !errors.Is(err, test.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if list := m.List(sandbox.Filter{}); len(list) != 0 {
		t.Fatal(list)
	}
}

// TestRoom: creations at the same time do not take the same memory, and two servers share one budget.
func TestRoom(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	budget := func(o *sandbox.Options) { o.MemoryBudget = 4 * promised }
	managers := []*sandbox.Manager{newManager(t, dir, fake, budget), newManager(t, dir, fake, budget)}
	first := create(t, managers[0], sandbox.CreateOptions{Limits: sandbox.Limits{Memory: 2 << 30}})
	var made, refused int
	var mu sync.Mutex
	var all sync.WaitGroup
	for range 6 {
		all.Go(func() {
			_, err := managers[1].Create(t.Context(), sandbox.CreateOptions{})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				made++
			case errors.Is(err, sandbox.ErrNoRoom):
				refused++
			default:
				t.Error(err)
			}
		})
	}
	all.Wait()
	if made != 2 || refused != 4 {
		t.Fatalf("made %d, refused %d", made, refused)
	}
	if err := first.Kill(sandbox.CauseKilled); err != nil {
		t.Fatal(err)
	}
	create(t, managers[1], sandbox.CreateOptions{Limits: sandbox.Limits{Memory: 2 << 30}})
}

func TestFailedBoot(t *testing.T) {
	broken := errors.New("no machine today")
	fake, dir := &sandboxtest.Fake{FailBoot: broken}, t.TempDir()
	m := newManager(t, dir, fake, nil)
	if _, err := m.Create(t.Context(), sandbox.CreateOptions{}); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	noDirectories(t, dir)
}

func noDirectories(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, "sandboxes"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			t.Errorf("%s is left", e.Name())
		}
	}
}

func TestBootEndsEarly(t *testing.T) {
	hang := &sandboxtest.Fake{Hang: make(chan struct{})}
	dir := t.TempDir()
	m := newManager(t, dir, hang, nil)
	why := errors.New("changed my mind")
	for name, stop := range map[string]func(context.CancelCauseFunc){
		"by its caller": func(cancel context.CancelCauseFunc) { cancel(why) },
		"by a kill": func(context.CancelCauseFunc) {
			for _, i := range m.List(sandbox.Filter{State: sandbox.Creating}) {
				sb, err := m.Get("", i.ID)
				if err != nil {
					t.Error(err)
				}
				if err := sb.Kill(why); err != nil {
					t.Error(err)
				}
			}
		},
	} {
		ctx, cancel := context.WithCancelCause(t.Context())
		failed := make(chan error, 1)
		go func() {
			_, err := m.Create(ctx, sandbox.CreateOptions{})
			failed <- err
		}()
		sandboxtest.Eventually(t, "it is being made", func() bool { return len(m.List(sandbox.Filter{State: sandbox.Creating})) == 1 })
		stop(cancel)
		if err := <-failed; !errors.Is(err, why) {
			t.Errorf("%s: %v", name, err)
		}
		cancel(nil)
		noDirectories(t, dir)
	}
}

func TestAgentLost(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, nil)
	sb := create(t, m, sandbox.CreateOptions{})
	client, err := sb.Agent(t.Context(), "use")
	if err != nil {
		t.Fatal(err)
	}
	fake.Crash(filepath.Join(dir, "sandboxes", sb.ID()))
	if _, err := client.List(t.Context(), agent.ListRequest{}); !errors.Is(err, agent.ErrLost) {
		t.Fatal(err)
	}
	sandboxtest.Eventually(t, "it has failed and is gone", func() bool { return sb.Info().State == sandbox.Failed && fake.Running() == 0 })
	if list := m.List(sandbox.Filter{State: sandbox.Failed}); len(list) != 1 || list[0].Cause != "agent lost" {
		t.Fatal(list)
	}
}

func TestList(t *testing.T) {
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, nil)
	a := create(t, m, sandbox.CreateOptions{Metadata: map[string]string{"team": "x", "job": "1"}})
	b := create(t, m, sandbox.CreateOptions{Metadata: map[string]string{"team": "x"}})
	for name, test := range map[string]struct {
		f    sandbox.Filter
		want []string
	}{
		"all, newest first": {sandbox.Filter{}, []string{b.ID(), a.ID()}},
		"all pairs match":   {sandbox.Filter{Metadata: map[string]string{"team": "x", "job": "1"}}, []string{a.ID()}},
		"an empty value":    {sandbox.Filter{Metadata: map[string]string{"job": ""}}, nil},
		"by state":          {sandbox.Filter{State: sandbox.Paused}, nil},
	} {
		var got []string
		for _, i := range m.List(test.f) {
			got = append(got, i.ID)
		}
		if strings.Join(got, " ") != strings.Join(test.want, " ") {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestReap: what a dead server left is gone after the next start, whatever state it is in; what a living server owns is not touched.
func TestReap(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	living := newManager(t, dir, fake, nil)
	mine := create(t, living, sandbox.CreateOptions{})

	sandboxes := filepath.Join(dir, "sandboxes")
	for id, state := range map[string]string{
		"sbnew": "", "sbrunning": `{"version":1,"id":"sbrunning","state":"running"}`, "sbbroken": `{"version":1,"id":"sbbroken","sta`,
		"sbfuture": `{"version":99}`,
	} {
		if err := os.MkdirAll(filepath.Join(sandboxes, id, "disk", "deep"), 0o700); err != nil {
			t.Fatal(err)
		}
		if state == "" {
			continue
		}
		if err := os.WriteFile(filepath.Join(sandboxes, id, "state.json"), []byte(state), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := fake.Boot(t.Context(), sandbox.Spec{ID: "sbrunning", Dir: filepath.Join(sandboxes, "sbrunning")}); err != nil {
		t.Fatal(err)
	}
	m := newManager(t, dir, fake, nil)
	<-m.Settled()
	left, err := filepath.Glob(filepath.Join(sandboxes, "sb*"))
	// This server must not end a sandbox whose state cannot be read or is of a later version.
	if want := []string{mine.ID(), "sbbroken", "sbfuture"}; err != nil || len(left) != len(want) || fake.Running() != 1 {
		t.Fatal(left, err, fake.Running())
	}
	if tomb, err := m.Get("", "sbrunning"); err != nil || tomb.Info().Cause != string(sandbox.CauseDied) {
		t.Fatal(tomb, err)
	}
	if mine.Info().State != sandbox.Running {
		t.Fatal("a living server's sandbox was reaped")
	}
}

func TestClose(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	m := newManager(t, dir, fake, nil)
	for range 3 {
		create(t, m, sandbox.CreateOptions{})
	}
	for range 2 {
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if fake.Running() != 0 {
		t.Fatal("machines are left")
	}
	if _, err := m.Create(t.Context(), sandbox.CreateOptions{}); !errors.Is(err, sandbox.ErrClosed) {
		t.Fatal(err)
	}
	noDirectories(t, dir)
}

func TestUnwritableState(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := sandbox.NewManager(sandbox.Options{Dir: file, Runtime: &sandboxtest.Fake{},
		Templates: sandboxtest.Templates{}}); !errors.Is(err, syscall.ENOTDIR) {
		t.Fatal(err)
	}
}
