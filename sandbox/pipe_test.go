package sandbox_test

import (
	"context"
	"io"
	"path/filepath"
	"sync/atomic"
	"testing"

	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

// faultyPipes is a Fake whose pipes to agents fail once when a fault is armed.
type faultyPipes struct {
	*sandboxtest.Fake
	read, write atomic.Pointer[error]
}

func (f *faultyPipes) Boot(ctx context.Context, spec sandbox.Spec) (sandbox.Machine, error) {
	m, err := f.Fake.Boot(ctx, spec)
	return faultyMachine{m, f}, err
}

func (f *faultyPipes) Attach(ctx context.Context, dir string) (sandbox.Machine, error) {
	m, err := f.Fake.Attach(ctx, dir)
	return faultyMachine{m, f}, err
}

type faultyMachine struct {
	sandbox.Machine
	f *faultyPipes
}

func (m faultyMachine) Pipe() io.ReadWriteCloser { return faultyPipe{m.Machine.Pipe(), m.f} }

type faultyPipe struct {
	io.ReadWriteCloser
	f *faultyPipes
}

func (p faultyPipe) Read(b []byte) (int, error) {
	n, err := p.ReadWriteCloser.Read(b)
	if fault := p.f.read.Swap(nil); fault != nil {
		return 0, *fault // what was read is lost
	}
	return n, err
}

func (p faultyPipe) Write(b []byte) (int, error) {
	if fault := p.f.write.Swap(nil); fault != nil {
		n, _ := p.ReadWriteCloser.Write(b[:len(b)/2])
		return n, *fault
	}
	return p.ReadWriteCloser.Write(b)
}

// TestPipeFails: when a read or write of the connection to the agent fails on the host, whatever the error, the call may fail, but no
// sandbox ends: its agent is reconnected.
func TestPipeFails(t *testing.T) {
	for _, fault := range hostFaults {
		for _, where := range []string{"read", "write"} {
			t.Run(where+" "+fault.Error(), func(t *testing.T) {
				t.Parallel()
				runtime, dir := &faultyPipes{Fake: &sandboxtest.Fake{}}, t.TempDir()
				m := newManager(t, dir, runtime.Fake, func(o *sandbox.Options) { o.Runtime = runtime })
				sb := create(t, m, sandbox.CreateOptions{})
				client, err := sb.Agent(t.Context(), "use")
				if err != nil {
					t.Fatal(err)
				}
				kept := filepath.Join(t.TempDir(), "kept")
				sandboxtest.Run(t, client, "echo kept > "+kept)
				map[string]*atomic.Pointer[error]{"read": &runtime.read, "write": &runtime.write}[where].Store(&fault)
				_ = client.Ping(t.Context()) // it may fail; only what follows matters
				sandboxtest.Eventually(t, "its agent is reconnected", func() bool {
					again, err := sb.Agent(t.Context(), "use")
					return err == nil && again != client
				})
				if info := sb.Info(); info.State != sandbox.Running || runtime.Running() != 1 {
					t.Fatalf("%+v", info)
				}
				again, err := sb.Agent(t.Context(), "use")
				if err != nil || again.Boot() != client.Boot() {
					t.Fatal("it is another machine:", err)
				}
				sandboxtest.Run(t, again, "grep kept "+kept)
			})
		}
	}
}
