package sandbox_test

import (
	"errors"
	"testing"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// TestAdopt: a sandbox that is kept runs on without a server, and the next server finds it unchanged.
func TestAdopt(t *testing.T) {
	fake, dir := &sandboxtest.Fake{}, t.TempDir()
	keep := func(o *sandbox.Options) { o.Keep = true }
	first := newManager(t, dir, fake, keep)
	sb := create(t, first, sandbox.CreateOptions{Owner: "ann", Metadata: map[string]string{"a": "1"}})
	client, err := sb.Agent(t.Context(), "use")
	if err != nil {
		t.Fatal(err)
	}
	sandboxtest.Run(t, client, "echo before")
	before := sb.Info()
	if err := errors.Join(first.Close(), first.Close()); err != nil {
		t.Fatal(err)
	}
	if fake.Running() != 1 {
		t.Fatal("it did not outlive its server")
	}

	// A server that keeps no sandboxes leaves it alone, and so does one that ends before it could adopt it.
	other := newManager(t, dir, fake, nil)
	gone := newManager(t, dir, fake, keep)
	if err := errors.Join(gone.Close(), other.Close()); err != nil || fake.Running() != 1 {
		t.Fatal(err, fake.Running())
	}
	second := newManager(t, dir, fake, keep)
	again := awaitSandbox(t, second, "ann", before.ID)
	after := again.Info()
	if after.State != sandbox.Running || after.Metadata["a"] != "1" || !after.ExpiresAt.Equal(before.ExpiresAt) {
		t.Fatalf("%+v, before %+v", after, before)
	}
	if client, err = again.Agent(t.Context(), "use"); err != nil {
		t.Fatal(err)
	}
	list, err := client.List(t.Context(), agent.ListRequest{})
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	sandboxtest.Run(t, client, "echo after")
	if err := again.Kill(sandbox.CauseKilled); err != nil || fake.Running() != 0 {
		t.Fatal(err, fake.Running())
	}
}

// awaitSandbox waits for a sandbox that is being adopted.
func awaitSandbox(t *testing.T, m *sandbox.Manager, owner, id string) *sandbox.Sandbox {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		sb, err := m.Get(owner, id)
		if err == nil {
			return sb
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestOwners(t *testing.T) {
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, func(o *sandbox.Options) { o.MaxPerOwner = 2 })
	a := create(t, m, sandbox.CreateOptions{Owner: "ann"})
	create(t, m, sandbox.CreateOptions{Owner: "ann"})
	if _, err := m.Create(t.Context(), sandbox.CreateOptions{Owner: "ann"}); !errors.Is(err, sandbox.ErrTooMany) {
		t.Fatal(err)
	}
	create(t, m, sandbox.CreateOptions{Owner: "bob"})
	for _, other := range []string{"bob", "", "Ann"} {
		if _, err := m.Get(other, a.ID()); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("%q finds ann's sandbox: %v", other, err)
		}
	}
	if n := len(m.List(sandbox.Filter{Owner: "bob"})); n != 1 {
		t.Fatalf("bob sees %d", n)
	}
	if n := len(m.List(sandbox.Filter{})); n != 0 {
		t.Fatalf("the user of this machine sees %d", n)
	}
}

func TestChanged(t *testing.T) {
	seen := make(chan sandbox.State, 100)
	m := newManager(t, t.TempDir(), &sandboxtest.Fake{}, func(o *sandbox.Options) { o.Changed = func(i sandbox.Info) { seen <- i.State } })
	sb := create(t, m, sandbox.CreateOptions{})
	changed := sb.Changed()
	if err := sb.Kill(sandbox.CauseKilled); err != nil {
		t.Fatal(err)
	}
	<-changed
	for _, want := range []sandbox.State{sandbox.Creating, sandbox.Running, sandbox.Killed} {
		if got := <-seen; got != want {
			t.Fatalf("%s, want %s", got, want)
		}
	}
	page, err := sb.Logs(sandbox.LogQuery{})
	logs := page.Entries
	if err != nil || page.More || len(logs) != 3 || logs[2].Message != "killed: killed by request" || logs[2].Seq != 3 {
		t.Fatal(logs, err)
	}
}

// TestTransient: a transient sandbox ends with its server, even when the server dies, whatever happens to other sandboxes.
func TestTransient(t *testing.T) {
	for name, change := range map[string]func(*sandbox.Options){
		"pause": func(o *sandbox.Options) { o.Keep, o.PauseOnExit = true, true }, "keep": func(o *sandbox.Options) { o.Keep = true },
		"kill": nil,
	} {
		fake, dir := &sandboxtest.Fake{}, t.TempDir()
		m := newManager(t, dir, fake, change)
		kept, gone := create(t, m, sandbox.CreateOptions{}).ID(), create(t, m, sandbox.CreateOptions{Transient: true}).ID()
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		next := newManager(t, dir, fake, change)
		<-next.Settled()
		if sb, err := next.Get("", gone); err != nil || !sb.Info().State.Ended() {
			t.Errorf("%s: %v", name, err)
		}
		if sb, err := next.Get("", kept); err != nil || sb.Info().State.Ended() != (name == "kill") {
			t.Errorf("%s: %v", name, err)
		}
		if err := next.Close(); err != nil {
			t.Error(err)
		}
	}
}
