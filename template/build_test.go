package template

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"soulbox.dev/soulbox/gvisor"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

func TestMain(m *testing.M) { sandboxtest.Main(m) }

// workshop is a real builder with a real runtime, and a template "mini" of this machine's programs.
type workshop struct {
	*testing.T
	store   *Store
	manager *sandbox.Manager
	builder *Builder
}

func newWorkshop(t *testing.T) *workshop {
	t.Helper()
	dir := sandboxtest.Dir(t)
	store := &Store{Dir: filepath.Join(dir, "templates")}
	if os.Geteuid() == 0 {
		store.UID, store.GID = gvisor.Owner()
	}
	runtime := &gvisor.Runtime{Runsc: sandboxtest.Program(t, "runsc"), Agent: sandboxtest.AgentPath(t)}
	manager, err := sandbox.NewManager(sandbox.Options{Dir: dir, Runtime: runtime, Templates: store, Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Error(err)
		}
	})
	store.InUse = manager.Images
	w := &workshop{T: t, store: store, manager: manager, builder: &Builder{Store: store, Manager: manager, Log: slog.New(slog.DiscardHandler)}}
	w.mini(sandboxtest.Image(t, dir))
	return w
}

// mini makes a template of an image.
func (w *workshop) mini(image string) {
	w.Helper()
	files, err := openFiles(image)
	if err != nil {
		w.Fatal(err)
	}
	defer files.Close()
	from, to := io.Pipe()
	go func() { _ = to.CloseWithError(files.pack(to)) }()
	if _, err := w.store.Import(w.Context(), Manifest{Name: "mini"}, from); err != nil {
		w.Fatal(err)
	}
}

// build builds a Dockerfile with some files, and must succeed.
func (w *workshop) build(name, dockerfile string, files map[string]string) Built {
	w.Helper()
	built, log, err := w.try(w.Context(), BuildRequest{Name: name, Dockerfile: dockerfile}, files)
	if err != nil {
		w.Fatalf("%v\n%s", err, log)
	}
	return built
}

func (w *workshop) try(ctx context.Context, req BuildRequest, files map[string]string) (Built, string, error) {
	w.Helper()
	if files != nil {
		f, err := w.store.ContextFiles(files)
		if err != nil {
			w.Fatal(err)
		}
		defer f.Close()
		req.Context = f
	}
	var log strings.Builder
	built, err := w.builder.Build(ctx, req, func(l Line) { log.WriteString(l.Step + ": " + l.Text + "\n") })
	return built, log.String(), err
}

// in runs a command in a new sandbox of a
func (w *workshop) in(name, user, command string) string {
	w.Helper()
	sb, err := w.manager.Create(w.Context(), sandbox.CreateOptions{Template: name})
	if err != nil {
		w.Fatal(err)
	}
	defer sb.Kill(context.Canceled)
	c, err := sb.Agent(w.Context(), "test")
	if err != nil {
		w.Fatal(err)
	}
	snap := sandboxtest.RunAs(w.T, c, user, command)
	return string(snap.Output.Head) + string(snap.Output.Tail)
}

func TestBuild(t *testing.T) {
	w := newWorkshop(t)
	dockerfile := `# a comment
ARG BASE=mini
FROM ${BASE} AS builder
ENV GREETING="hello there"
WORKDIR /src
COPY main.sh lib/ ./
RUN echo "$GREETING" > out && chmod 600 out && rm -f /usr/bin/expr
RUN <<EOF
set -e
echo one > heredoc
echo two >> heredoc
EOF

FROM mini
COPY --from=builder --chown=user:user /src/out /home/user/
COPY --from=builder /src/heredoc /etc/
WORKDIR /work
USER user
ENV A=1 B=$A
CMD ["sh"]
EXPOSE 80 8000-8002/udp
`
	files := map[string]string{"main.sh": "#!/bin/sh\n", "lib/a": "a", "lib/b/c": "c"}
	built := w.build("first", dockerfile, files)
	if built.Cached != 0 || len(built.Layers) < 2 || built.Config.User != "user" || len(built.Config.ExposedPorts) != 4 {
		t.Errorf("%+v", built)
	}
	if got := w.in("first", "", "id -un; pwd; cat ~/out /etc/heredoc; stat -c '%U %a' ~/out; echo $A; type expr | head -1"); got != "user\n/work\nhello there\none\ntwo\nuser 600\n1\nexpr is /usr/bin/expr\n" {
		t.Errorf("%q", got)
	}
	again := w.build("second", dockerfile, files)
	if again.Image != built.Image || again.Cached != 6 {
		t.Errorf("%d of %d steps cached", again.Cached, again.Steps)
	}
	files["lib/a"] = "changed"
	if third := w.build("third", dockerfile, files); third.Cached != 0 && third.Image != built.Image {
		t.Errorf("%d of %d steps cached", third.Cached, third.Steps)
	}
}
