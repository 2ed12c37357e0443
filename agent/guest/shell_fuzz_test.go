package guest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"soulbox.dev/soulbox/agent"
)

// shellValues are values of variables that are hard to quote.
var shellValues = []string{
	"", "1", "a b", "two\nlines", `q"u'o$t\e` + "`", "\t\x01\x7f", "é ☃ 𝄞", bytesThatAreNoText, "  lead", "trail  ", "*", "~", "=", "-n",
	"$(false)", "a:b:c", "declare -x A=\"1\"\n",
	"}\n", "'", `\`, `\'`, `"`, "0",
}

const bytesThatAreNoText = "\x00" // stands for them, because a command itself is text

// shellStep is a random command that changes its shell.
func shellStep(r *rand.Rand, dir string) string {
	name := func() string { return string(rune('A' + r.IntN(6))) }
	value := func() string {
		v := shellValues[r.IntN(len(shellValues))]
		if v == bytesThatAreNoText {
			return `$'\xff\xfe'`
		}
		return quoteShell(v)
	}
	pick := func(from ...string) string { return from[r.IntN(len(from))] }
	simple := []func() string{
		func() string { return "export " + name() + "=" + value() },
		func() string { return name() + "=" + value() },
		func() string { return "unset " + name() },
		func() string { return "export -n " + name() },
		func() string { return "export " + name() },
		func() string { return name() + "+=" + value() },
		func() string { return "arr" + name() + "[" + fmt.Sprint(r.IntN(4)) + "]=" + value() },
		func() string {
			return "declare -A map" + name() + "; map" + name() + "[" + quoteShell(pick("k", "a b", "]", "é")) + "]=" + value()
		},
		func() string {
			return "declare -i int" + name() + "=" + fmt.Sprint(r.IntN(99)) + "; int" + name() + "+=2"
		},
		func() string {
			return "cd " + quoteShell(pick("..", "a", "b c", "link", ".", "-", "/nowhere", "./a/../b c", dir, dir+"/link/a"))
		},
		func() string { return "cd" },
		func() string { return "mkdir -p a 'b c' && cd " + pick("a", "'b c'") },
		func() string { return "mkdir -p new/x; cd new/x" },
		func() string { return "cd -P ." },
		func() string { return "fun" + name() + "() { echo " + value() + "; cat <<E\n}\n$1\nE\n}" },
		func() string { return "unset -f fun" + name() },
		func() string { return "export -f fun" + name() + " 2>/dev/null" },
		func() string { return "alias al" + name() + "=" + value() },
		func() string { return "unalias al" + name() + " 2>/dev/null" },
		func() string {
			return "shopt " + pick("-s", "-u") + " " + pick("nullglob", "dotglob", "nocaseglob", "extglob", "expand_aliases", "globstar")
		},
		func() string {
			return "set " + pick("-o", "+o") + " " + pick("pipefail", "noglob", "noclobber", "hashall", "braceexpand", "allexport", "posix")
		},
		func() string { return "umask " + pick("022", "077", "002", "0") },
		func() string { return "set -- " + value() + " " + value() },
		func() string { return "shift 2>/dev/null" },
		func() string { return "(cd /; export " + name() + "=lost)" },
		func() string { return "echo x | read " + name() },
		func() string { return name() + "=lost true" },
		func() string { return "read -r " + name() + " " + name() + " <<< " + value() },
		func() string { return "printf -v " + name() + " %s " + value() },
		func() string { return "for " + name() + " in " + value() + " " + value() + "; do :; done" },
		func() string { return "PATH=" + pick("/usr/bin:/bin", "/usr/bin:/bin:.", "$PATH") },
		func() string { return "unset " + pick("LANG", "LOGNAME", "OLDPWD", "USER") },
		func() string { return "HOME=" + quoteShell(dir) },
		func() string { return "IFS=" + pick(`:`, `$' \t\n'`, `''`) },
		func() string { return "scope() { local A=lost; B=" + value() + "; }; scope; unset -f scope" },
		func() string { return "false" },
		func() string { return "test -z " + value() + " && " + name() + "=" + value() },
		func() string {
			return "printf 'one\\ntwo\\n' >|f" + name() + "; mapfile -t lines" + name() + " <f" + name()
		},
		func() string { return "export TZ=" + pick("UTC", "Asia/Tokyo") },
		func() string { return "true" },
	}
	step := simple[r.IntN(len(simple))]()
	for r.IntN(3) == 0 {
		step += "\n" + simple[r.IntN(len(simple))]()
	}
	return step
}

// shellReport prints everything that must be the same at the end.
const shellReport = `
set +o noclobber
PATH=/usr/bin:/bin
IFS=$' \t\n'
echo; echo =====
{ pwd; umask; set +o; shopt; alias; declare -f; declare -F; printf '<%s>' "$@"; echo
declare -p A B C D E F ${!arr@} ${!map@} ${!int@} ${!lines@} TZ
printf '\n-----\n'; env -0; } 2>/dev/null
`

// sameAsOneShell runs n random sequences of commands, each both in a remembering shell and in one long bash, and compares the final states.
func sameAsOneShell(t *testing.T, c *agent.Client, dir string, n int, seed uint64) {
	for i := range n {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		steps := make([]string, 2+r.IntN(8))
		for j := range steps {
			steps[j] = shellStep(r, "DIR")
		}
		place := func(kind string) (string, []string) {
			at := filepath.Join(dir, fmt.Sprintf("%s%d", kind, i))
			if err := errors.Join(os.MkdirAll(filepath.Join(at, "a", "a"), 0o777), os.Mkdir(filepath.Join(at, "b c"), 0o777),
				os.Symlink("a", filepath.Join(at, "link"))); err != nil {
				t.Fatal(err)
			}
			// Both directories have names of the same length: the reports are compared without them.
			mine := make([]string, len(steps))
			for j, s := range steps {
				mine[j] = strings.ReplaceAll(s, "DIR", at)
			}
			return at, mine
		}
		long, script := place("long")
		var one strings.Builder
		one.WriteString("exec 2>/dev/null\n") // errors must not appear among the lines of the report
		for _, s := range script {
			fmt.Fprintf(&one, "eval %s\n", quoteShell(s))
		}
		want := start(t, c, agent.StartRequest{Args: []string{"/bin/bash"}, Stdin: []byte(one.String() + shellReport), Cwd: long})
		short, script := place("each")
		shell := fmt.Sprintf("fuzz%d", i)
		for j, s := range script {
			cwd := ""
			if j == 0 {
				s = "cd " + quoteShell(short) + "; unset OLDPWD; export OLDPWD\n" + s
			}
			start(t, c, agent.StartRequest{Command: s, Cwd: cwd, Shell: shell})
		}
		got := start(t, c, agent.StartRequest{Command: shellReport, Shell: shell, Fork: true})
		g, w := report(got, short), report(want, long)
		if g != w {
			t.Fatalf("seed %d, sequence %d:\n%s\n%s", seed, i, strings.Join(steps, "\n---\n"), differing(g, w))
		}
	}
}

func start(t *testing.T, c *agent.Client, req agent.StartRequest) agent.Snapshot {
	t.Helper()
	req.WaitMS, req.Window = 30_000, agent.Window{Head: agent.MaxWindow}
	s, err := c.Start(t.Context(), req)
	if err != nil {
		t.Fatalf("%s: %v", req.Command, err)
	}
	return s
}

// differing returns the lines that only one of two texts has.
func differing(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	var b strings.Builder
	for _, l := range g {
		if !slices.Contains(w, l) {
			fmt.Fprintf(&b, "remembered: %q\n", l)
		}
	}
	for _, l := range w {
		if !slices.Contains(g, l) {
			fmt.Fprintf(&b, "one shell:  %q\n", l)
		}
	}
	return b.String()
}

// report returns the report at the end of a command's output, without the directory's name.
func report(s agent.Snapshot, place string) string {
	_, said, _ := strings.Cut(string(s.Output.Head), "\n=====\n")
	said, env, _ := strings.Cut(said, "\n-----\n")
	vars := slices.DeleteFunc(strings.Split(env, "\x00"), func(v string) bool {
		return strings.HasPrefix(v, "SHLVL=") || strings.HasPrefix(v, "_=") || strings.Contains(v, "__soulbox")
	})
	slices.Sort(vars)
	return strings.ReplaceAll(said+"\n"+strings.Join(vars, "\n"), place, "PLACE")
}

// TestShellFuzz: random sequences of commands end as in one long bash session.
func TestShellFuzz(t *testing.T) {
	count := 250
	if testing.Short() {
		count = 80
	}
	for part := range uint64(4) {
		t.Run(fmt.Sprint(part), func(t *testing.T) {
			t.Parallel()
			c, dir := pair(t)
			sameAsOneShell(t, c, dir, count, 1+part)
		})
	}
}
