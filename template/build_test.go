package template

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"soulbox.dev/soulbox/gvisor"
	"soulbox.dev/soulbox/internal/sandboxtest"
	"soulbox.dev/soulbox/sandbox"
)

func TestMain(m *testing.M) { sandboxtest.Main(m, "TestBuild", "TestStart", "TestImageUser") }

// workshop is a real builder on a real runtime, with a template "mini" of this machine's programs.
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
	w := &workshop{T: t, store: store, manager: manager,
		builder: &Builder{Store: store, Manager: manager, Log: slog.New(slog.DiscardHandler)}}
	w.mini(sandboxtest.Image(t, dir))
	return w
}

// mini makes a template from an image.
func (w *workshop) mini(image string) {
	w.Helper()
	files, err := openFiles(image)
	if err != nil {
		w.Fatal(err)
	}
	defer files.Close()
	err = files.packed(func(r io.Reader) error {
		_, err := w.store.Import(w.Context(), Manifest{Name: "mini"}, r)
		return err
	})
	if err != nil {
		w.Fatal(err)
	}
}

// build builds a Dockerfile with some files; the build must succeed.
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
		f, err := w.store.ContextFiles(context.Background(), "", files)
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

// in runs a command as a user in a new sandbox of a template.
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
	if got := w.in("first", "",
		"id -un; pwd; cat ~/out /etc/heredoc; stat -c '%U %a' ~/out; echo $A; type expr | head -1"); got != "user\n/work\nhello "+
		"there\none\ntwo\nuser 600\n1\nexpr is /usr/bin/expr\n" {
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

// TestHeredocs checks heredocs, which the conformance cases do not cover.
func TestHeredocs(t *testing.T) {
	w := newWorkshop(t)
	w.build("heredocs", `FROM mini
ARG WHO=world
RUN <<EOF
echo one > /one
echo "two $WHO" > /two
EOF
RUN cat <<'E2' > /quoted
$not expanded
E2
RUN <<EOF
#!/bin/bash -e
echo ${BASH_VERSION:+bash} > /shebang
EOF
COPY --chmod=711 <<EOF /greeting
hello $WHO
EOF
COPY <<'A' <<B /dir/
raw $WHO
A
made for $WHO
B
`, nil)
	got := w.in("heredocs", "root",
		"cat /one /two /quoted /shebang /greeting /dir/A /dir/B; stat -c %a /greeting; ls -A / | grep soulbox-build")
	if want := "one\ntwo world\n$not expanded\nbash\nhello world\nraw $WHO\nmade for world\n711\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestRunMounts: only their RUN sees secrets and caches, and no layer holds them.
func TestRunMounts(t *testing.T) {
	w := newWorkshop(t)
	dockerfile := `FROM mini
RUN --mount=type=secret,id=key,mode=0444 --mount=type=secret,id=tok,env=TOKEN cat /run/secrets/key | sha256sum > /sum; test "$TOKEN" = token
RUN --mount=type=secret,id=missing test ! -e /run/secrets/missing
RUN --mount=type=cache,target=/c,id=%s echo x >> /c/count; wc -l < /c/count > /count
RUN --mount=type=tmpfs,target=/t,size=1m head -c 10000000 /dev/zero > /t/x || echo full > /full
`
	secrets := map[string][]byte{"key": []byte("top secret"), "tok": []byte("token")}
	for n, id := range []string{"a", "a", "b"} {
		_, log, err := w.try(t.Context(), BuildRequest{Name: "mounts", Dockerfile: strings.Replace(dockerfile, "%s", id, 1),
			Secrets: secrets, NoCache: true}, nil)
		if err != nil || strings.Contains(log, "top secret") {
			t.Fatal(err, log)
		}
		want := map[int]string{0: "1\n", 1: "2\n", 2: "1\n"}[n]
		if got := w.in("mounts", "root",
			"cat /count /full; ls -A /t /c /run/secrets 2>&1 | grep -c 'No such'; cat /sum"); !strings.HasPrefix(got, want+"full\n3\n") {
			t.Errorf("%q", got)
		}
	}
	w.build("twice", "FROM mini\nRUN --mount=type=cache,id=one,target=/c1 --mount=type=cache,id=one,target=/c2 "+
		"--mount=type=cache,id=two,target=/c3 echo x > /c1/x; test -e /c2/x && test ! -e /c3/x && echo same > /same\n", nil)
	if got := w.in("twice", "root", "cat /same; ls -d /c1 /c2 /c3 2>&1 | grep -c 'No such'"); got != "same\n3\n" {
		t.Errorf("%q", got)
	}
	for _, kind := range []string{"layers", "images", "steps", "caches"} {
		out, _ := exec.Command("grep", "-rlaF", "top secret", w.store.file(kind, "")).Output()
		if len(out) > 0 {
			t.Errorf("the secret is in %s", out)
		}
	}
	if _, _, err := w.try(t.Context(), BuildRequest{Name: "x", Dockerfile: "FROM mini\nRUN --mount=type=secret,id=no,required true\n"},
		nil); err == nil || !strings.Contains(err.Error(), `no secret "no"`) {
		t.Error(err)
	}
}

// TestDockerfileErrors: an error names the line and says what to do.
func TestDockerfileErrors(t *testing.T) {
	w := newWorkshop(t)
	for dockerfile, want := range map[string]string{
		"":                                    "file with no instructions",
		"RUN x\n":                             "no build stage in current context",
		"FROM mini\nRUM x\n":                  "line 2: unknown instruction: RUM",
		"FROM mini\n\nCOPY a\n":               "line 3: ",
		"FROM mini\nONBUILD RUN x\n":          "line 2: ONBUILD is not supported; put the instruction",
		"FROM mini\nADD http://x/y /\n":       "line 2: ADD of http://x/y is not supported; fetch it by RUN curl",
		"FROM mini\nRUN --network=host x\n":   "line 2: RUN --network is not supported",
		"FROM mini\nRUN --mount=type=ssh x\n": "line 2: RUN --mount=type=ssh is not supported; give the key as a secret",
		"FROM --platform=linux/s390x mini\n":  `line 1: the platform "linux/s390x" cannot be built here`,
		"ARG X\nFROM $X\n":                    "line 2: FROM $X names nothing",
		"FROM mini\nCOPY --from=3 a /\n":      "line 2: COPY --from=3 names the stage itself",
		"FROM nothere\n": "line 1: FROM nothere: there is no template \"nothere\", and this server " +
			"does not pull images",
		"FROM host\n":                              "cannot be built on; build on \"base\"",
		"FROM mini\nCOPY main.g /\n":               `line 2: COPY main.g /: "main.g": file does not exist; / of it has main.go`,
		"FROM mini\nCOPY lib/*.rs /\n":             `"lib/*.rs": file does not exist; /lib of it has`,
		"FROM mini\nCOPY --chown=nouser a.txt /\n": `--chown=nouser: there is no "nouser" in /etc/passwd`,
		"FROM mini\nCOPY --chmod=abc a.txt /\n":    "--chmod=abc is not a mode",
		"FROM mini\nUSER nobodyx\nRUN true\n":      `USER nobodyx: there is no "nobodyx" in /etc/passwd`,
		"FROM mini\nRUN echo why; echo because >&2; exit 7\n": "line 2: RUN echo why; echo because >&2; exit 7: exit code 7\nThe last " +
			"lines of its output:\nwhy\nbecause",
		"FROM mini\nRUN [\"/nothere\"]\n": "line 2: ",
		"FROM mini\nEXPOSE 99999\n":       `"99999" is not a port`,
		"FROM mini\nRUN kill -9 $$\n":     "it was ended by SIGKILL",
	} {
		_, _, err := w.try(t.Context(), BuildRequest{Name: "wrong", Dockerfile: dockerfile},
			map[string]string{"main.go": "x", "lib/a.c": "x", "a.txt": "x"})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", dockerfile, err, want)
		}
	}
	if _, err := w.store.Get("", "wrong"); !errors.Is(err, sandbox.ErrNoTemplate) {
		t.Error("a failed build has a name:", err)
	}
	for _, name := range []string{"", "UPPER", "a b", "../x", "host", "sha256:abc", strings.Repeat("x", 64), "a:b:c"} {
		if _, _, err := w.try(t.Context(), BuildRequest{Name: name, Dockerfile: "FROM mini\n"}, nil); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("the name %q: %v", name, err)
		}
	}
	w.none()
}

// none checks that no sandbox is left.
func (w *workshop) none() {
	w.Helper()
	if list := w.manager.List(sandbox.Filter{}); len(list) > 0 {
		w.Errorf("%d sandboxes are left", len(list))
	}
}

// TestBuildLimits: a step that floods, forks, fills the disk or never ends is ended, the error names the limit, and nothing is left.
func TestBuildLimits(t *testing.T) {
	w := newWorkshop(t)
	limits := sandbox.Limits{Memory: 256 << 20, Disk: 64 << 20, Processes: 64}
	for command, want := range map[string]string{
		"yes | head -c 50000000":                        "",
		"head -c 200000000 /dev/zero > /big":            "no room: more needed, 0 MB free of the 64 MB of disk of this build's sandbox",
		"a=x; while :; do a=$a$a; done":                 "exceeded its memory limit",
		"for i in $(seq 500); do sleep 60 & done; wait": "exceeded its limit of processes",
		"sleep 1000": "the build took longer than 5s",
	} {
		req := BuildRequest{Name: "limits", Dockerfile: "FROM mini\nRUN " + command + "\n", Limits: limits}
		if command == "sleep 1000" {
			req.Timeout = 5 * time.Second
		}
		_, log, err := w.try(t.Context(), req, nil)
		if want == "" {
			if err != nil || len(log) > 20<<20 {
				t.Errorf("%s: %v, %d bytes of log", command, err, len(log))
			}
		} else if err == nil || !strings.Contains(err.Error()+log, want) {
			t.Errorf("%s: %v", command, err)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	_, err := w.builder.Build(ctx, BuildRequest{Name: "cancelled", Dockerfile: "FROM mini\nRUN echo now; sleep 1000\n"}, func(l Line) {
		if l.Text == "now" {
			cancel(errors.New("the client is gone"))
		}
	})
	if err == nil || !strings.Contains(err.Error(), "the client is gone") {
		t.Error(err)
	}
	w.none()
}

// TestStart: a template's service is ready in every sandbox of the template, with the memory that it had after the build; with other limits
// the service is started anew.
func TestStart(t *testing.T) {
	w := newWorkshop(t)
	dockerfile := "FROM mini\nENV GREETING=hello\nRUN printf 'n=$RANDOM$RANDOM\\nsleep 0.3\\nwhile :; do echo $n > /tmp/value.new; mv " +
		"/tmp/value.new /tmp/value; sleep 0.1; done\\n' > /serve\nUSER user\n"
	built, log, err := w.try(t.Context(), BuildRequest{Name: "service", Dockerfile: dockerfile, StartCmd: "bash /serve",
		ReadyCmd: "test -s /tmp/value"}, nil)
	if err != nil || built.Started == nil || !strings.Contains(log, "ready after") {
		t.Fatal(err, log)
	}
	w.none()
	first, second := w.in("service", "", "cat /tmp/value; echo $GREETING; hostname"),
		w.in("service", "", "cat /tmp/value; echo $GREETING; hostname")
	one, two := strings.Fields(first), strings.Fields(second)
	if len(one) != 3 || len(two) != 3 || one[0] != two[0] || one[1] != "hello" || one[2] == two[2] {
		t.Errorf("%q and %q", first, second)
	}
	sb, err := w.manager.Create(t.Context(), sandbox.CreateOptions{Template: "service", Limits: sandbox.Limits{Memory: 300 << 20}})
	if err != nil {
		t.Fatal(err)
	}
	c, err := sb.Agent(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	if got := string(sandboxtest.Run(t, c, "cat /tmp/value").Output.Head); strings.TrimSpace(got) == one[0] || got == "" {
		t.Errorf("with other limits: %q", got)
	}
	if err := sb.Kill(errors.New("done")); err != nil {
		t.Fatal(err)
	}
	// Without the saved memory the sandbox boots from files, and the service starts again.
	if sb, err = w.manager.Create(t.Context(), sandbox.CreateOptions{Template: "service"}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true, FilesOnly: true}), sb.Resume(t.Context())); err != nil {
		t.Fatal(err)
	}
	sandboxtest.Eventually(t, "the service runs again", func() bool {
		c, err := sb.Agent(t.Context(), "test")
		if err != nil {
			t.Fatal(err)
		}
		got := strings.TrimSpace(string(sandboxtest.Run(t, c, "cat /tmp/value").Output.Head))
		return got != "" && got != one[0]
	})
	if err := sb.Kill(errors.New("done")); err != nil {
		t.Fatal(err)
	}
	// A broken checkpoint does not make the template unusable.
	if err := os.Truncate(filepath.Join(w.store.file("started", built.Started.Name), "pages.img"), 0); err != nil {
		t.Fatal(err)
	}
	if got := w.in("service", "", "cat /tmp/value"); got == "" || strings.TrimSpace(got) == one[0] {
		t.Errorf("with a broken checkpoint: %q", got)
	}
	_, _, err = w.try(t.Context(), BuildRequest{Name: "broken", Dockerfile: "FROM mini\n", StartCmd: "echo no config >&2; exit 3"}, nil)
	if err == nil || !strings.Contains(err.Error(), "has ended before it was ready: exit code 3; its output ends with:\nno config") {
		t.Error(err)
	}
	w.none()
}

// TestImageUser: processes run as the image's user, which is given by name, by number, or with a group.
func TestImageUser(t *testing.T) {
	w := newWorkshop(t)
	for user, want := range map[string]string{"user": "1000:1000", "1000": "1000:1000", "4321": "4321:0", "4321:77": "4321:77",
		"user:nogroup": "1000:65534", "root": "0:0"} {
		w.build("user", "FROM mini\nUSER "+user+"\n", nil)
		if got := w.in("user", "", "echo $(id -u):$(id -g)"); got != want+"\n" {
			t.Errorf("%s: %q, want %q", user, got, want)
		}
	}
}

// TestBuildsAtOnce: builds of the same thing at the same time run each step once; builds of one name leave one complete template.
func TestBuildsAtOnce(t *testing.T) {
	w := newWorkshop(t)
	var mu sync.Mutex
	var all sync.WaitGroup
	cached, images := 0, map[string]bool{}
	for i := range 4 {
		all.Go(func() {
			built, err := w.builder.Build(t.Context(), BuildRequest{Name: "same",
				Dockerfile: fmt.Sprintf("FROM mini\nRUN sleep 1; echo $RANDOM > /r\nRUN echo second > /s\nLABEL n=%d\n", i%2)}, nil)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
			}
			cached += built.Cached
			images[built.Image] = true
		})
	}
	all.Wait()
	if cached != 6 || len(images) != 1 {
		t.Errorf("%d steps cached, %d images", cached, len(images))
	}
	if m, err := w.store.Get("", "same"); err != nil || !images[m.Image] {
		t.Error(m, err)
	}
	w.none()
}

// TestCollect: what a template, a sandbox or a snapshot needs stays; the rest is removed after it was not used for a while.
func TestCollect(t *testing.T) {
	w := newWorkshop(t)
	built := w.build("kept", "FROM mini\nRUN echo kept > /kept\n", nil)
	gone := w.build("gone", "FROM mini\nRUN echo gone > /gone\n", nil)
	sb, err := w.manager.Create(t.Context(), sandbox.CreateOptions{Template: "gone"})
	if err != nil {
		t.Fatal(err)
	}
	if err := sb.Pause(t.Context(), sandbox.PauseOptions{ToDisk: true}); err != nil {
		t.Fatal(err)
	}
	if err := w.store.Delete("", "gone"); err != nil {
		t.Fatal(err)
	}
	age := func() {
		t.Helper()
		old := time.Now().Add(-30 * 24 * time.Hour)
		for _, kind := range []string{"images", "layers", "steps", "builds"} {
			names, err := filepath.Glob(filepath.Join(w.store.file(kind, ""), "*"))
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range names {
				if err := os.Chtimes(name, old, old); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := w.store.Collect(); err != nil {
			t.Fatal(err)
		}
	}
	image := func(id string) bool {
		return exists(w.store.file("images", strings.TrimPrefix(id, "sha256:")+".erofs"))
	}
	age()
	if !image(built.Image) || !image(gone.Image) {
		t.Fatal("an image that is needed is collected")
	}
	if err := sb.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := sb.Kill(errors.New("done")); err != nil {
		t.Fatal(err)
	}
	age()
	if !image(built.Image) || image(gone.Image) {
		t.Errorf("%v %v", image(built.Image), image(gone.Image))
	}
	if got := w.in("kept", "", "cat /kept"); got != "kept\n" {
		t.Error(got)
	}
	if names, _ := filepath.Glob(w.store.file("layers", "*")); len(names) != 2 {
		t.Errorf("%d layers are kept", len(names))
	}
	broken := w.store.file("names", "broken.json")
	if err := os.WriteFile(broken, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.store.Collect(); err == nil {
		t.Error("what cannot be read is taken for nothing")
	}
}
