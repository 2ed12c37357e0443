package sandbox_test

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"soulbox.dev/soulbox/agent/guest"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// bubbleVar names the test that a process runs in a synctest bubble.
const bubbleVar = "SOULBOX_TEST_BUBBLE"

// inBubble runs f in a synctest bubble, with a Fake whose agents were made outside of it. Each bubble has its own process, because yamux
// reuses timers across sessions, and a timer of one bubble cannot be used in another.
func inBubble(t *testing.T, agents int, f func(t *testing.T, fake *sandboxtest.Fake)) {
	if os.Getenv(bubbleVar) == "" {
		parts := strings.Split(t.Name(), "/")
		for i, part := range parts {
			parts[i] = "^" + regexp.QuoteMeta(part) + "$"
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run="+strings.Join(parts, "/"), "-test.timeout=60s")
		cmd.Env = append(os.Environ(), bubbleVar+"=1")
		if out, err := cmd.CombinedOutput(); err != nil || strings.Contains(string(out), "no tests to run") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	fake := &sandboxtest.Fake{Agents: make(chan *guest.Server, agents)}
	for range agents {
		server, err := guest.NewServer(guest.Options{Version: "fake", SpoolDir: t.TempDir(), Home: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(server.Close)
		fake.Agents <- server
	}
	synctest.Test(t, func(t *testing.T) { f(t, fake) })
}

// TestTimes: life and idle time, and both actions; they are independent of the time that a command or a request may take.
func TestTimes(t *testing.T) {
	const never = time.Duration(-1)
	for name, test := range map[string]struct {
		times  sandbox.Times
		use    time.Duration // interval at which it is used
		at     time.Duration // when its time is over
		state  sandbox.State
		cause  sandbox.Cause
		onDisk bool
	}{
		"life, kill": {times: sandbox.Times{Life: time.Hour}, use: time.Minute, at: time.Hour, state: sandbox.Killed,
			cause: sandbox.CauseTimeout},
		"life, pause": {times: sandbox.Times{Life: time.Hour, OnTimeout: sandbox.ActionPause}, use: time.Minute, at: time.Hour,
			state: sandbox.Paused, cause: sandbox.CauseTimeout, onDisk: true},
		"life, bounded": {times: sandbox.Times{Life: time.Hour, Max: time.Minute}, use: time.Second, at: time.Minute,
			state: sandbox.Killed, cause: sandbox.CauseTimeout},
		"idle, kill": {times: sandbox.Times{Life: time.Hour, Idle: time.Minute}, use: never, at: time.Minute,
			state: sandbox.Killed, cause: sandbox.CauseIdle},
		"idle, pause": {times: sandbox.Times{Life: time.Hour, Idle: time.Minute, OnTimeout: sandbox.ActionPause}, use: never,
			at: time.Minute, state: sandbox.Paused, cause: sandbox.CauseIdle, onDisk: true},
		"idle, but used": {times: sandbox.Times{Life: time.Hour, Idle: time.Minute}, use: 50 * time.Second, at: time.Hour,
			state: sandbox.Killed, cause: sandbox.CauseTimeout},
		"idle beyond life": {times: sandbox.Times{Life: time.Minute, Idle: time.Hour}, use: never, at: time.Minute,
			state: sandbox.Killed, cause: sandbox.CauseTimeout},
		"grace without work": {times: sandbox.Times{Life: time.Minute, Grace: time.Hour}, use: never, at: time.Minute,
			state: sandbox.Killed, cause: sandbox.CauseTimeout},
		"grace before a save": {times: sandbox.Times{Life: time.Minute, Grace: time.Hour, OnTimeout: sandbox.ActionPause}, use: never,
			at: time.Minute, state: sandbox.Paused, cause: sandbox.CauseTimeout, onDisk: true},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, 1, func(t *testing.T, fake *sandboxtest.Fake) {
				m := newManager(t, t.TempDir(), fake, nil)
				sb := create(t, m, sandbox.CreateOptions{Times: test.times})
				born := time.Now()
				for time.Since(born) < test.at-time.Second {
					if info := sb.Info(); info.State != sandbox.Running {
						t.Fatalf("after %s: %+v", time.Since(born), info)
					}
					rest := test.at - time.Second - time.Since(born)
					if test.use == never {
						time.Sleep(rest)
						continue
					}
					time.Sleep(min(test.use, rest))
					client, err := sb.Agent(t.Context(), "use")
					if err != nil {
						t.Fatal(err)
					}
					if _, err := client.List(t.Context(), agent.ListRequest{}); err != nil {
						t.Fatal(err)
					}
				}
				time.Sleep(3 * time.Second)
				synctest.Wait()
				info := sb.Info()
				if info.State != test.state || info.Cause != string(test.cause) || info.OnDisk != test.onDisk {
					t.Fatalf("%+v", info)
				}
				if late := info.Changed.Sub(born) - test.at; late < 0 || late > time.Second {
					t.Errorf("it was over %s late", late)
				}
			})
		})
	}
}

// TestLifeIsKept: use, resume and adoption never shorten a life, and paused time does not count.
func TestLifeIsKept(t *testing.T) {
	inBubble(t, 1, func(t *testing.T, fake *sandboxtest.Fake) {
		dir := t.TempDir()
		m := newManager(t, dir, fake, keep)
		sb := create(t, m, sandbox.CreateOptions{Times: sandbox.Times{Life: time.Hour, Max: 2 * time.Hour, OnTimeout: sandbox.ActionPause}})
		time.Sleep(20 * time.Minute)
		if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
			t.Fatal(err)
		}
		used := sb.Info().Totals
		time.Sleep(24 * time.Hour)
		if info := sb.Info(); info.State != sandbox.Paused || info.Left != 40*time.Minute || info.Totals != used ||
			used.RunMS != (20*time.Minute).Milliseconds() {
			t.Fatalf("%+v", info)
		}
		if err := sb.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		if left := time.Until(sb.Info().ExpiresAt); left != 40*time.Minute {
			t.Fatal("left", left)
		}
		day := 24 * time.Hour
		if _, err := sb.Update(t.Context(), sandbox.Update{Extend: &day}); !errors.Is(err, sandbox.ErrInvalid) ||
			!strings.Contains(err.Error(), "leaves 1h40m0s from now") {
			t.Fatal(err)
		}
		more := time.Hour
		if _, err := sb.Update(t.Context(), sandbox.Update{Extend: &more}); err != nil {
			t.Fatal(err)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		// Its time ends while no server runs: the next one does what is due.
		time.Sleep(3 * time.Hour)
		m = newManager(t, dir, fake, keep)
		<-m.Settled()
		sb = awaitSandbox(t, m, "", sb.ID())
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if info := sb.Info(); info.State != sandbox.Paused || info.Cause != string(sandbox.CauseTimeout) {
			t.Fatalf("%+v", info)
		}
		if err := sb.Resume(t.Context()); !errors.Is(err, sandbox.ErrInvalid) || !strings.Contains(err.Error(), "maximum life time") {
			t.Fatal(err)
		}
		longer := 10 * time.Hour
		if _, err := sb.Update(t.Context(), sandbox.Update{MaxLifetime: &longer}); err != nil {
			t.Fatal(err)
		}
		if err := sb.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		if left := time.Until(sb.Info().ExpiresAt); left != time.Hour {
			t.Fatal("a new life has", left)
		}
		// It is not used any more.
		time.Sleep(time.Hour + 7*24*time.Hour + time.Minute)
		synctest.Wait()
		if info := sb.Info(); info.State != sandbox.Killed || info.Cause != string(sandbox.CauseForgotten) {
			t.Fatalf("%+v", info)
		}
	})
}

// TestIdleAgain: the idle time starts again after a resume.
func TestIdleAgain(t *testing.T) {
	inBubble(t, 1, func(t *testing.T, fake *sandboxtest.Fake) {
		m := newManager(t, t.TempDir(), fake, nil)
		sb := create(t, m, sandbox.CreateOptions{Times: sandbox.Times{Life: time.Hour, Idle: time.Minute, OnTimeout: sandbox.ActionPause}})
		for i := range 3 {
			time.Sleep(62 * time.Second)
			synctest.Wait()
			if info := sb.Info(); info.State != sandbox.Paused || info.Cause != string(sandbox.CauseIdle) {
				t.Fatalf("%d: %+v", i, info)
			}
			if _, err := sb.Agent(t.Context(), "use"); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := sb.Snapshot(t.Context(), sandbox.SnapshotOptions{Name: "s"}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(62 * time.Second)
		synctest.Wait()
		if info := sb.Info(); info.State != sandbox.Paused {
			t.Fatalf("%+v", info)
		}
	})
}

// TestKillWhileNobodyLooked: a life that ended while no server ran ends with its cause.
func TestKillWhileNobodyLooked(t *testing.T) {
	inBubble(t, 1, func(t *testing.T, fake *sandboxtest.Fake) {
		dir := t.TempDir()
		m := newManager(t, dir, fake, keep)
		sb := create(t, m, sandbox.CreateOptions{Times: sandbox.Times{Life: time.Hour}})
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour)
		m = newManager(t, dir, fake, keep)
		<-m.Settled()
		tomb, err := m.Get("", sb.ID())
		if err != nil {
			t.Fatal(err)
		}
		if info := tomb.Info(); info.State != sandbox.Killed || info.Cause != string(sandbox.CauseTimeout) || fake.Running() != 0 {
			t.Fatalf("%+v", info)
		}
		// Its tombstone is kept for a day.
		time.Sleep(25 * time.Hour)
		if _, err := m.Get("", sb.ID()); !errors.Is(err, sandbox.ErrNotFound) {
			t.Fatal(err)
		}
	})
}

// TestGrace: calls under way get the grace, and an extension during it still counts.
func TestGrace(t *testing.T) {
	inBubble(t, 1, func(t *testing.T, fake *sandboxtest.Fake) {
		m := newManager(t, t.TempDir(), fake, nil)
		sb := create(t, m, sandbox.CreateOptions{Times: sandbox.Times{Life: time.Minute, Grace: time.Minute}})
		client, err := sb.Agent(t.Context(), "use")
		if err != nil {
			t.Fatal(err)
		}
		call, file := make(chan struct{}), t.TempDir()+"/file"
		slow, end := io.Pipe()
		go func() { // a file that takes longer than its life
			defer close(call)
			_, _ = client.WriteFile(t.Context(), file, slow, agent.WriteOptions{})
		}()
		time.Sleep(90 * time.Second)
		if info := sb.Info(); info.State != sandbox.Running {
			t.Fatalf("%+v", info)
		}
		hour := time.Hour
		if _, err := sb.Update(t.Context(), sandbox.Update{Lifetime: &hour}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Minute)
		if info := sb.Info(); info.State != sandbox.Running {
			t.Fatalf("%+v", info)
		}
		time.Sleep(11*time.Minute + 5*time.Second) // its life, and all of the grace
		synctest.Wait()
		if info := sb.Info(); info.State != sandbox.Killed {
			t.Fatalf("%+v", info)
		}
		_ = end.Close()
		<-call
	})
}
