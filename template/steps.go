package template

import (
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"

	"soulbox.dev/soulbox/sandbox"
)

// Step is a step of a build that is given as a list, as E2B's clients do.
type Step struct {
	Type string   // RUN, COPY, ENV, WORKDIR or USER
	Args []string // RUN: command, user; COPY: from, to, owner, mode; ENV: names and values; WORKDIR: path; USER: name
	// Files is the name of the entry of BuildRequest.Files that COPY copies from.
	Files string
	// Anew runs this step and all later ones even if they are cached.
	Anew bool
}

// makeUser makes a user if the image does not have it.
const makeUser = `USER root
RUN <<'END_OF_STEP'
set -e
id %[1]s >/dev/null 2>&1 && exit 0
if command -v useradd >/dev/null; then
  useradd --create-home --shell "$(command -v bash || echo /bin/sh)" %[1]s
elif command -v adduser >/dev/null; then
  adduser -D -s "$(command -v bash || echo /bin/sh)" %[1]s
else
  n=1000
  while grep -q "^[^:]*:[^:]*:$n:" /etc/passwd /etc/group; do n=$((n+1)); done
  echo "%[1]s:x:$n:$n::/home/%[1]s:$(command -v bash || echo /bin/sh)" >>/etc/passwd
  echo "%[1]s:x:$n:" >>/etc/group
  mkdir -p /home/%[1]s
  chown "$n:$n" /home/%[1]s
fi
END_OF_STEP
`

// maySudo lets a user become root without a password.
const maySudo = `USER root
RUN <<'END_OF_STEP'
set -e
mkdir -p /etc/sudoers.d
test -e /etc/sudoers.d/90-soulbox%[2]s && exit 0
echo '%[1]s ALL=(ALL) NOPASSWD:ALL' >/etc/sudoers.d/90-soulbox%[2]s
chmod 0440 /etc/sudoers.d/90-soulbox%[2]s
END_OF_STEP
`

// trustCerts makes programs trust the CA certificates that a build has put into /usr/local/share/ca-certificates, as E2B's sandboxes do
// when they boot.
const trustCerts = `USER root
RUN <<'END_OF_STEP'
ls /usr/local/share/ca-certificates/*.crt >/dev/null 2>&1 || exit 0
command -v update-ca-certificates >/dev/null || exit 0
update-ca-certificates || echo 'the certificates in /usr/local/share/ca-certificates could not be installed' >&2
END_OF_STEP
`

// Names of variables for characters that a value cannot contain in a Dockerfile.
const (
	lineFeed       = "SOULBOX_LINE_FEED"
	carriageReturn = "SOULBOX_CARRIAGE_RETURN"
)

// loginVariables are the variables of root's login, which values of other variables may name.
var loginVariables = func() (all pairs) {
	for _, kv := range [][2]string{{"PATH", defaultPath}, {"HOME", "/root"}, {"USER", "root"}, {"LOGNAME", "root"}, {"SHELL", "/bin/bash"},
		{lineFeed, "\n"}, {carriageReturn, "\r"}} {
		all = append(all, instructions.KeyValuePairOptional{Key: kv[0], Value: &kv[1]})
	}
	return all
}()

// userName matches the names of users that makeUser makes.
var userName = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)

// From is what steps begin from. User and Cwd are those of a template; an image's are ignored: its steps begin as "user", in that user's
// home.
type From struct{ Name, User, Cwd string }

// FromSteps turns a list of steps into a Dockerfile for a build with Login, and returns the line at which each step begins. The steps are
// run, cached and logged like any others. As E2B's clients expect, "user" exists, and so does every user that a step changes to.
func FromSteps(from From, steps []Step) (dockerfile string, lines []int, err error) {
	var b strings.Builder
	user := cmp.Or(from.User, "user")
	fmt.Fprintf(&b, "FROM %s\n", from.Name)
	fmt.Fprintf(&b, makeUser, "user")
	fmt.Fprintf(&b, maySudo, "user", "")
	fmt.Fprintf(&b, "USER %s\n", literal(user))
	if cwd := cmp.Or(from.Cwd, "/home/user"); from.Cwd != "" || user == "user" {
		fmt.Fprintf(&b, "WORKDIR %s\n", literal(cwd))
	}
	for i, s := range steps {
		if err := s.check(); err != nil {
			return "", nil, fmt.Errorf("step %d, %s: %w: %w", i+1, clip(s.Type), err, sandbox.ErrInvalid)
		}
		lines = append(lines, strings.Count(b.String(), "\n")+1)
		if s.Anew {
			fmt.Fprintf(&b, "ARG SOULBOX_STEP=%s\n", rand.Text())
		}
		if user, err = s.write(&b, user); err != nil {
			return "", nil, err
		}
	}
	fmt.Fprintf(&b, trustCerts+"USER %s\n", literal(user))
	return b.String(), lines, nil
}

// write writes the instructions of a step that runs as a user, and returns the user of the next one.
func (s Step) write(b *strings.Builder, user string) (next string, err error) {
	arg := s.arg
	switch s.Type {
	case "RUN":
		if as := arg(1); as != "" && as != user { // for this step only
			fmt.Fprintf(b, "USER %s\n", literal(as))
		}
		end := heredocEnd(arg(0))
		fmt.Fprintf(b, "RUN <<'%s'\n%s\n%s\n", end, arg(0), end)
		if as := arg(1); as != "" && as != user {
			fmt.Fprintf(b, "USER %s\n", literal(user))
		}
	case "COPY":
		flags := "--chown=" + literal(cmp.Or(arg(2), user))
		if arg(3) != "" {
			flags += " --chmod=" + literal(arg(3))
		}
		if s.Files != "" {
			flags += " --from=" + s.Files
		}
		paths, err := json.Marshal([]string{literal(arg(0)), literal(arg(1))})
		if err != nil {
			return "", err
		}
		fmt.Fprintf(b, "COPY %s %s\n", flags, paths)
	case "ENV":
		for n := 0; n < len(s.Args); n += 2 {
			fmt.Fprintf(b, "ENV %s=%s\n", s.Args[n], quoted(s.Args[n+1]))
		}
	case "WORKDIR":
		fmt.Fprintf(b, "WORKDIR %s\n", literal(arg(0)))
	case "USER":
		if user = arg(0); userName.MatchString(user) && user != "root" && user != "user" {
			fmt.Fprintf(b, makeUser, user)
			if arg(1) == "true" {
				fmt.Fprintf(b, maySudo, user, "-"+user)
			}
		}
		fmt.Fprintf(b, "USER %s\n", literal(user))
	}
	return user, nil
}

func (s Step) arg(n int) string {
	if n < len(s.Args) {
		return s.Args[n]
	}
	return ""
}

func (s Step) check() error {
	want := map[string]int{"RUN": 1, "COPY": 2, "ENV": 2, "WORKDIR": 1, "USER": 1}[s.Type]
	switch {
	case want == 0:
		return errors.New("it is none of RUN, COPY, ENV, WORKDIR and USER")
	case len(s.Args) < want || s.arg(0) == "":
		return fmt.Errorf("it has %d arguments, and needs %d", len(s.Args), want)
	case s.Type == "ENV" && len(s.Args)%2 != 0:
		return errors.New("a name has no value")
	}
	for n := 0; s.Type == "ENV" && n < len(s.Args); n += 2 {
		if strings.ContainsAny(s.Args[n], " \t\r\n=\"'\\$#") || s.Args[n] == "" {
			return fmt.Errorf("%q is not the name of a variable", clip(s.Args[n]))
		}
	}
	for _, a := range s.Args {
		if s.Type != "RUN" && s.Type != "ENV" && strings.ContainsAny(a, "\n\r\x00") || strings.Contains(a, "\x00") {
			return errors.New("an argument has a line feed or a NUL byte")
		}
	}
	return nil
}

// heredocEnd returns a word that does not occur in a text.
func heredocEnd(text string) string {
	end := "END_OF_STEP"
	for strings.Contains(text, end) {
		end += "_"
	}
	return end
}

// literal escapes a text so that the Dockerfile's parser expands nothing in it.
func literal(text string) string {
	return strings.NewReplacer(`\`, `\\`, `$`, `\$`, `"`, `\"`, `'`, `\'`).Replace(text)
}

// quoted quotes the value of a variable. $NAME in it still names other variables; commands are not run.
func quoted(text string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `$(`, `\$(`, `"`, `\"`, "\n", "${"+lineFeed+"}", "\r", "${"+carriageReturn+
		"}").Replace(text) + `"`
}
