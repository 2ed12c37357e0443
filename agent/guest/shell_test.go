package guest

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"soulbox.dev/soulbox/agent"
)

// remembering runs commands in one shell.
type remembering struct {
	t *testing.T
	c *agent.Client
}

func (r remembering) run(command string) string {
	r.t.Helper()
	return r.start(agent.StartRequest{Command: command})
}

func (r remembering) start(req agent.StartRequest) string {
	r.t.Helper()
	req.Shell, req.WaitMS, req.Window = "s", 30_000, agent.Window{Head: agent.MaxWindow}
	s, err := r.c.Start(r.t.Context(), req)
	if err != nil {
		r.t.Fatalf("%s: %v", req.Command, err)
	}
	if s.Process.State != agent.StateExited {
		r.t.Fatalf("%s: %+v", req.Command, s.Process)
	}
	return string(s.Output.Head)
}

func (r remembering) expect(command, want string) {
	r.t.Helper()
	if got := r.run(command); got != want {
		r.t.Errorf("%s: got %q, want %q", command, got, want)
	}
}

// TestShellRemembers: the next command gets what a command leaves.
func TestShellRemembers(t *testing.T) {
	c, dir := pair(t)
	r := remembering{t, c}
	r.run("mkdir -p 'a b/c'; cd 'a b/c'")
	r.expect("pwd", dir+"/a b/c\n")
	r.run("cd ..")
	r.expect("cd - >/dev/null; pwd", dir+"/a b/c\n")
	r.run(`export X=1 Y=$'two\nlines\t"$\\' Z='é \x'; n=5; arr=(1 "2 3"); declare -A m=([k]='v w'); readonly ro=7; ` +
		`f() { echo "f $1 $n"; }; export -f f`)
	r.expect(`echo "$X|$Y|$Z|$n|${arr[1]}|${m[k]}|$ro"`, "1|two\nlines\t\"$\\|é \\x|5|2 3|v w|7\n")
	r.expect("f x; bash -c 'f y'", "f x 5\nf y \n")
	r.run("unset X n; unset -f f; X2=${X-gone}")
	r.expect(`echo "${X-none} ${n-none} $X2"; type f 2>/dev/null || echo no f`, "none none gone\nno f\n")
	r.run("shopt -s extglob expand_aliases; alias greet='echo hello'; set -o pipefail -f; umask 077; set -- p 'q r'\ng() { case $1 in " +
		"+(a)) echo as;; esac; }")
	r.expect("greet; umask; echo $# \"$2\"; g aaa; false | true || echo piped; echo *", "hello\n0077\n2 q r\nas\npiped\n*\n")
	r.run("set +f; unset HOME LANG")
	r.expect(`echo "${HOME-none} ${LANG-none}"; env | grep -c -e ^HOME= -e __soulbox -e ^POSIX`, "none none\n0\n")
	info, err := c.Shell(t.Context(), agent.ShellRequest{Shell: "s"})
	if err != nil || info.Cwd != dir+"/a b/c" || strings.Join(info.Functions, " ") != "g" || strings.Join(info.Aliases, " ") != "greet" ||
		strings.Join(info.Unset, " ") != "HOME LANG" {
		t.Fatalf("%+v %v", info, err)
	}
}

// TestShellUnbroken: whatever a command does to its shell, the next command has a working one.
func TestShellUnbroken(t *testing.T) {
	for name, test := range map[string]struct {
		command string
		kept    bool // earlier changes are remembered
		moved   bool // its new directory is remembered, but no variables
		shows   string
	}{
		"exit":               {command: "cd sub; export V=1; exit 3", kept: true},
		"exit in a function": {command: "q() { exit 0; }; cd sub; export V=1; q; echo never", moved: true},
		"errexit":            {command: "set -e; cd sub; export V=1; false; echo never", kept: true},
		"a trap of its own":  {command: "trap 'echo bye' EXIT; cd sub; export V=1", kept: true, shows: "bye\n"},
		"trap and exit":      {command: "trap 'echo bye' EXIT; cd sub; export V=1; exit", shows: "bye\n"},
		"kill":               {command: "cd sub; export V=1; kill -9 $$"},
		"exec":               {command: "cd sub; export V=1; exec true"},
		"no path":            {command: "cd sub; export V=1; PATH=/nowhere", kept: true},
		"closed descriptors": {command: "cd sub; export V=1; for ((i = 0; i < 256; i++)); do eval \"exec $i>&-\"; done 2>/dev/null",
			kept: true},
		"builtins replaced": {command: "cd sub; export V=1; for b in builtin declare printf umask alias set trap unset eval exit " +
			"shopt pwd return; do eval \"$b() { :; }\"; done", kept: true},
		"aliases": {command: "shopt -s expand_aliases; cd sub; export V=1; alias builtin=false declare=false unset=false " +
			"eval=false", kept: true},
		"noisy":          {command: "cd sub; export V=1; PS4='trace '; set -o noclobber; trap 'echo debug' ERR; set -u", kept: true},
		"IFS":            {command: "cd sub; export V=1; IFS=0123456789/", kept: true},
		"a syntax error": {command: "cd sub; export V=1\nif then", kept: true},
		"an open here-document": {command: "cd sub; export V=1; cat <<E\nbody", kept: true,
			shows: "bash: line 2: warning: here-document at line 1 delimited by end-of-file (wanted `E')\nbody\n"},
		"a comment":     {command: "cd sub; export V=1 # the end", kept: true},
		"a backslash":   {command: "cd sub; export V=1 \\", kept: true},
		"posix":         {command: "cd sub; export V=1; set -o posix", kept: true},
		"allexport":     {command: "cd sub; export V=1; set -a", kept: true},
		"noexec":        {command: "cd sub; export V=1; set -n"},
		"its own words": {command: "cd sub; export V=1; unset -f __soulbox_save; unset ${!__soulbox@}"},
		"too much":      {command: "cd sub; export V=1; big=$(head -c 300000 /dev/zero | tr '\\0' x)"},
		"its report removed": {command: "cd sub; export V=1; chmod 0 /proc/self/cwd/../spool/shell 2>/dev/null; rm -rf ../spool/shell",
			kept: true},
		"ulimit": {command: "cd sub; export V=1; ulimit -f 0"},
	} {
		t.Run(name, func(t *testing.T) {
			c, dir := pair(t)
			r := remembering{t, c}
			r.run("mkdir sub; export V=0 W=w; h() { echo h; }")
			out := r.run(test.command)
			if test.shows != "" && out != test.shows {
				t.Errorf("shows %q", out)
			}
			want := "0 w h " + dir
			if test.moved {
				want = "0 w h " + dir + "/sub"
			}
			if test.kept {
				want = "1 w h " + dir + "/sub"
			}
			got := r.run("PATH=/usr/bin:/bin; IFS=$' \\t\\n'; echo \"$V $W $(h) $(\\builtin pwd)\"")
			if strings.TrimSpace(got) != want && !(name == "its report removed") {
				t.Errorf("then: %q, want %q", got, want)
			}
		})
	}
}

// TestShellParallel: commands that run at the same time keep each other's changes.
func TestShellParallel(t *testing.T) {
	c, dir := pair(t)
	r := remembering{t, c}
	r.run("mkdir sub; export GONE=1")
	slow, err := c.Start(t.Context(), agent.StartRequest{Command: "export SLOW=1; unset GONE; read -r line; cd sub", Shell: "s",
		KeepStdin: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Run("many", func(t *testing.T) {
		for i := range 10 {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				t.Parallel()
				start(t, c, agent.StartRequest{Command: fmt.Sprintf("export V%d=%d; f%d() { :; }", i, i, i), Shell: "s"})
			})
		}
	})
	r.expect(`echo "$V0$V1$V2$V3$V4$V5$V6$V7$V8$V9 ${SLOW-none} $GONE"; pwd`, "0123456789 none 1\n"+dir+"\n")
	if _, err := c.WriteStdin(t.Context(), slow.Process.ID, []byte("go\n"), true); err != nil {
		t.Fatal(err)
	}
	if s, err := c.Wait(t.Context(), agent.WaitRequest{Process: slow.Process.ID, WaitMS: 30_000}); err != nil || s.Process.ShellCwd != dir+
		"/sub" {
		t.Fatal(s, err)
	}
	r.expect(`echo "$V0$V9 $SLOW ${GONE-gone}"; pwd`, "09 1 gone\n"+dir+"/sub\n")
}

// TestShellForks: a forked command gets the shell's state and changes none of it.
func TestShellForks(t *testing.T) {
	c, dir := pair(t)
	r := remembering{t, c}
	r.run("mkdir sub; cd sub; export V=1; f() { echo f; }")
	if got := r.start(agent.StartRequest{Command: "pwd; f; echo $V; cd /; export V=2; f() { :; }", Fork: true}); got != dir+"/sub\nf\n1\n" {
		t.Fatalf("%q", got)
	}
	if got := r.start(agent.StartRequest{Command: "pwd; echo $V $W; export W=3", Cwd: "/usr",
		Env: map[string]string{"V": "for this one"}}); got != "/usr\nfor this one\n" {
		t.Fatalf("%q", got)
	}
	r.expect("pwd; f; echo $V $W", dir+"/sub\nf\n1 3\n")
	if got := start(t, c, agent.StartRequest{Command: "pwd; echo ${V-none}"}); string(got.Output.Head) != dir+"\nnone\n" {
		t.Fatalf("alone: %q", got.Output.Head)
	}
	if got := start(t, c, agent.StartRequest{Command: "pwd; echo ${V-none}", Shell: "other"}); string(got.Output.Head) != dir+"\nnone\n" {
		t.Fatalf("another shell: %q", got.Output.Head)
	}
	r.run("rmdir ../sub")
	s := start(t, c, agent.StartRequest{Command: "pwd", Shell: "s"})
	if string(s.Output.Head) != dir+"\n" || s.Process.GoneCwd != dir+"/sub" {
		t.Fatalf("%q %+v", s.Output.Head, s.Process)
	}
	p := openTerminal(t, c, agent.StartRequest{Terminal: &agent.Terminal{}, Shell: "s", Env: map[string]string{"PS1": "$ "}})
	p.typed("echo terminal-$V\nexit\n")
	p.shows("terminal-1")
}

// TestShellsBounded: unused shells are dropped for new ones.
func TestShellsBounded(t *testing.T) {
	c, _ := pair(t)
	for i := range maxShells + 1 {
		start(t, c, agent.StartRequest{Command: "export V=1", Shell: fmt.Sprint(i)})
		start(t, c, agent.StartRequest{Command: "true", Shell: "0"}) // in use
	}
	for name, want := range map[string]string{"0": "1\n", "1": "none\n", fmt.Sprint(maxShells): "1\n"} {
		if got := start(t, c, agent.StartRequest{Command: "echo ${V-none}", Shell: name}); string(got.Output.Head) != want {
			t.Errorf("shell %s: %q", name, got.Output.Head)
		}
	}
	s := start(t, c, agent.StartRequest{Command: "big=$(head -c 300000 /dev/zero | tr '\\0' x)", Shell: "0"})
	if !s.Process.Forgotten {
		t.Errorf("%+v", s.Process)
	}
}

// TestChangesNothing: a command that may change the shell is never classified as one that cannot.
func TestChangesNothing(t *testing.T) {
	for command, want := range map[string]bool{
		"ls -la | head -3": true, "grep -n 'a b' \"$HOME/x\" > out 2>&1": true, "echo hi && git status; make -j4 || echo no": true,
		"npm test &": true, "test -f x": true,
		"[ -f x ] && cat x": true, "ls *.go": true, "echo $?": true, "echo 'cd /'; find . -name \"*.c\"": true, "tar --file=x -x": true,
		"echo a\nls": true, "ls; ": true, "": true,
		"cd /": false, "ls; cd /": false, "ls && cd /": false, "ls | cd /": false, "ls\ncd /": false, "ls &cd /": false, "'cd' /": false,
		"\"cd\" /": false, "c'd' /": false, "c\\d /": false,
		"export X=1": false, "X=1": false, "X=1 ls": false, "X+=1": false, "a[0]=1": false, "echo ${X:=1}": false, "echo $((X++))": false,
		"echo $(cd /)": false, "echo `cd /`": false,
		"> out cd /": false, "2> out cd /": false, "2>out cd /": false, "<x cd /": false, "ls <<E\ncd /\nE": false, "cat <<< x": false,
		"$X": false, "\"$X\" /": false, "c? /": false, "{ cd /; }": false,
		"! cd /": false, "time cd /": false, "if true; then cd /; fi": false, "(cd /)": false, ". x": false, "source x": false,
		"printf -v X a": false, "read X": false, "exit": false, "exec ls": false,
		"set -e": false, "alias a=b": false, "ls # x\ncd /": false, "f() { :; }": false, "ls \"a": false, "ls 'a": false, "[[ x ]]": false,
		"command cd /": false, "builtin cd /": false, "ls ;; cd": false,
		"ls >&2 cd": true, "ls 2>&1|cd /": false, "ls >& out; cd /": false, "ls &> out": false, "ls \r": false,
	} {
		if got := changesNothing(command, nil); got != want {
			t.Errorf("%q: %v", command, got)
		}
	}
	if changesNothing("ls", []string{"BASH_FUNC_ls%%=() { cd /; }"}) {
		t.Error("a function of the environment")
	}
}

// FuzzShellReport: any program may have written what bash reports.
func FuzzShellReport(f *testing.F) {
	good := strings.Join([]string{"a:b", "a", "", "", "/x\n", "umask 0022\n", "", "declare -f g\n", "g () \n{ \n    :\n}\n",
		"declare -x A=\"1\"\ndeclare -a B=([0]=\"x\ny\")\n", "end", ""}, "\x00")
	f.Add([]byte(good))
	f.Add([]byte(strings.ReplaceAll(good, `"1"`, `$'\x4\u00e9\377\n'`)))
	f.Fuzz(func(t *testing.T, dump []byte) {
		end, err := parseShell(dump)
		if err == nil {
			_ = end.size()
			_ = end.script("/f", nil)
		}
	})
}

// TestShellRepaired: the next command can undo what a model may do by mistake.
func TestShellRepaired(t *testing.T) {
	c, dir := pair(t)
	r := remembering{t, c}
	r.run("export BIG=$(printf %0200000d 0); export SMALL=1")
	r.expect("echo ${#BIG} $SMALL; unset BIG", "200000 1\n")
	r.expect("echo ${BIG-none}; ls / >/dev/null && echo runs", "none\nruns\n")
	r.run("FOO=x; unset LANG")
	if got := r.start(agent.StartRequest{Command: "echo $FOO $LANG $(printenv FOO); cd sub 2>/dev/null",
		Env: map[string]string{"FOO": "b", "LANG": "given"}}); got != "b given b\n" {
		t.Errorf("%q", got)
	}
	r.expect("echo $FOO ${LANG-none} $(printenv FOO)", "x none\n")
	r.run("mkdir gone; cd gone; rmdir ../gone")
	r.expect("cd "+dir+"; pwd", dir+"\n")
	r.expect("pwd", dir+"\n")
	r.run("h() { echo h; }; unset -f $(compgen -A function); V=1; true")
	if s := start(t, c, agent.StartRequest{Command: "unset -f $(compgen -A function); (exit 4)", Shell: "s"}); s.Process.ExitCode != 4 {
		t.Errorf("exit code %d", s.Process.ExitCode)
	}
	r.run("readonly -f __soulbox_save; declare -f > lib.sh; W=1")
	r.run("V=2; . ./lib.sh; mkdir -p here; cd here")
	r.expect("echo $V; pwd; cd ..", "2\n"+dir+"/here\n")
	r.run("f() { local IFS=, A=lost; cd /usr; exit 0; }; set -- p q")
	r.run("f x y z")
	r.expect("x='a,b'; printf '<%s>' $x; echo ${A-none} $# $PWD; cd "+dir, "<a,b>none 2 /usr\n")
	if os.Getuid() != 0 {
		r.run("mkdir -p closed; cd closed && chmod 0 .")
		s := start(t, c, agent.StartRequest{Command: "pwd; cd " + dir, Shell: "s"})
		if string(s.Output.Head) != "/\n" || s.Process.GoneCwd != dir+"/closed" {
			t.Errorf("%q %+v", s.Output.Head, s.Process)
		}
		r.expect("pwd; chmod 700 closed", dir+"\n")
	}
	// A report of the largest size, written by the command itself, costs no other command anything.
	s := start(t, c, agent.StartRequest{Command: "perl -e 'print join \":\", map { \"o$_\" =~ tr/0-9/a-j/r } 1 .. 50000' > /tmp/o " +
		"2>/dev/null; " +
		"(cat /tmp/o; printf '\\0'; cat /tmp/o; printf '\\0\\0\\0/\\0\\0\\0\\0\\0\\0end\\0') > \"$__soulbox_file\"; kill -9 $$",
		Shell: "s"})
	if !s.Process.Forgotten {
		t.Errorf("%+v", s.Process)
	}
	r.expect("pwd", dir+"\n")
}

// TestOlderAgent: the error of a call that the agent does not know says that the versions differ.
func TestOlderAgent(t *testing.T) {
	c, _ := pair(t)
	if _, err := agent.Call[struct{}](t.Context(), c, "of the future", nil); !errors.Is(err, agent.ErrVersion) {
		t.Error(err)
	}
}
