package template

import (
	"context"
	"errors"
	"strings"
	"testing"

	"soulbox.dev/soulbox/sandbox"
)

// TestSteps: a list of steps does the same as a Dockerfile, and nothing in its texts is expanded.
func TestSteps(t *testing.T) {
	w := newWorkshop(t)
	files, err := w.store.ContextFiles(context.Background(), "", map[string]string{"a $x.txt": "a", "d/b": "b"})
	if err != nil {
		t.Fatal(err)
	}
	defer files.Close()
	dockerfile, _, err := FromSteps(From{Name: "mini"}, []Step{
		{Type: "ENV", Args: []string{"A", `two "words" $HOME \ 'q'`, "B", ""}},
		{Type: "ENV", Args: []string{"C", "$A,${B:-none}", "D", "one\ntwo\r", "E", "$(id) `id`"}},
		{Type: "WORKDIR", Args: []string{"/srv/a $b"}},
		{Type: "COPY", Args: []string{"a $x.txt", "/x y/", "user", "0640"}, Files: "files-1"},
		{Type: "COPY", Args: []string{"d", "/d", "", ""}, Files: "files-1"},
		{Type: "RUN", Args: []string{"echo \"$A\" > /env\nprintf '%s|%s|%s\\n' \"$C\" \"$D\" \"$E\" >> /env\nid -un > /who\necho " +
			"END_OF_STEP > /end", "root"}},
		{Type: "USER", Args: []string{"user"}},
		{Type: "RUN", Args: []string{"pwd > /tmp/pwd; id -un >> /tmp/pwd", ""}},
		{Type: "RUN", Args: []string{"id -un > /root-was-here", "root"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, log, err := w.try(t.Context(), BuildRequest{Name: "steps", Dockerfile: dockerfile, Login: true,
		Files: map[string]*Files{"files-1": files}}, nil); err != nil {
		t.Fatal(err, log, dockerfile)
	}
	want := "two \"words\" /root \\ 'q'\ntwo \"words\" /root \\ 'q',none|one\ntwo\r|$(id) `id`\nroot\nEND_OF_STEP\n/srv/a " +
		"$b\nuser\nroot\nb640 user\nuser\n"
	if got := w.in("steps", "", "cat /env /who /end /tmp/pwd /root-was-here /d/b; stat -c '%a %U' '/x y/a $x.txt'; id -un"); got != want {
		t.Errorf("%q, want %q\n%s", got, want, dockerfile)
	}
	for _, bad := range []Step{{Type: "FROM", Args: []string{"x"}}, {Type: "RUN"}, {Type: "COPY", Args: []string{"a"}},
		{Type: "ENV", Args: []string{"A", "b", "C"}}, {Type: "WORKDIR", Args: []string{"/a\nRUN x"}}, {Type: "USER", Args: []string{""}},
		{Type: "ENV", Args: []string{"A=B", "c"}}, {Type: "ENV", Args: []string{"A\nRUN x", "c"}}} {
		if _, _, err := FromSteps(From{Name: "mini"}, []Step{bad}); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%+v is taken", bad)
		}
	}
}

// TestStepsAsE2B checks how E2B's own builder differs from Docker: bash runs RUN as a login shell, users are created, directories belong to
// the user, and steps on a template continue where it ended.
func TestStepsAsE2B(t *testing.T) {
	w := newWorkshop(t)
	build := func(name string, from From, steps ...Step) (string, error) {
		t.Helper()
		dockerfile, _, err := FromSteps(from, steps)
		if err != nil {
			t.Fatal(err)
		}
		_, log, err := w.try(t.Context(), BuildRequest{Name: name, Dockerfile: dockerfile, Login: true,
			StartCmd: "echo it starts; echo and fails >&2; exec sleep 1000", ReadyCmd: "true"}, nil)
		return log, err
	}
	log, err := build("first", From{Name: "mini"},
		Step{Type: "RUN", Args: []string{"#!/nothing\nshopt -q login_shell && [[ a == a* ]] && echo \"a login of $BASH\" > /tmp/shell"}},
		Step{Type: "RUN",
			Args: []string{"mkdir -p /usr/local/share/ca-certificates /usr/local/sbin; echo mine > " +
				"/usr/local/share/ca-certificates/own.crt; printf '#!/bin/sh\\ncat /usr/local/share/ca-certificates/*.crt > /trusted\\n' " +
				"> /usr/local/sbin/update-ca-certificates; chmod +x /usr/local/sbin/update-ca-certificates", "root"}},
		Step{Type: "USER", Args: []string{"carla", "true"}},
		Step{Type: "ENV", Args: []string{"KEPT", "yes"}},
		Step{Type: "WORKDIR", Args: []string{"/app/deep"}},
		Step{Type: "RUN", Args: []string{"touch mine"}})
	if err != nil {
		t.Fatal(err, log)
	}
	for _, want := range []string{"start: it starts\n", "start: and fails\n"} {
		if !strings.Contains(log, want) {
			t.Errorf("no %q in the log:\n%s", want, log)
		}
	}
	of, err := w.store.Get("", "first")
	if err != nil {
		t.Fatal(err)
	}
	if log, err := build("second", From{Name: "first", User: of.Config.User, Cwd: of.Config.WorkingDir},
		Step{Type: "RUN", Args: []string{"touch \"more-$KEPT\""}}); err != nil {
		t.Fatal(err, log)
	}
	want := "a login of /bin/bash\n/app/deep yes carla\ncarla carla carla\nmine\nmore-yes\nmine\n"
	if got := w.in("second", "",
		"cat /tmp/shell; echo $PWD $KEPT $(id -un); echo $(stat -c %U /app /app/deep mine); ls; cat /trusted"); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	var failed *StepError
	_, err = build("third", From{Name: "mini"}, Step{Type: "RUN", Args: []string{"whoami", "root123"}})
	if !errors.As(err, &failed) || failed.Err.Error() != "unauthenticated: invalid username: 'root123'" {
		t.Error(err)
	}
}

// TestBuildID: ids are UUIDs, those of older servers are still valid, and a template that was not built has an id that stays the same.
func TestBuildID(t *testing.T) {
	made := NewBuildID()
	imported := Manifest{Name: "a", Image: "sha256:1"}
	for id, want := range map[string]bool{made: true, imported.BuildID(): true, "bdaaaaaaaaaaaaaaaa": true, strings.ToUpper(made): false,
		"../x": false, made + "/": false, "": false} {
		if ValidBuildID(id) != want {
			t.Errorf("%q: %v", id, !want)
		}
	}
	if again := imported.BuildID(); made == NewBuildID() || made[14] != '4' || imported.BuildID() != again ||
		(Manifest{Name: "b", Image: "sha256:1"}).BuildID() == imported.BuildID() {
		t.Error(made, imported.BuildID())
	}
	if built := (Manifest{Name: "a", Build: made}); built.BuildID() != made {
		t.Error(built.BuildID())
	}
}
