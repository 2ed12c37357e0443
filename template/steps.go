package template

import (
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"soulbox.dev/soulbox/sandbox"
)

// Step is a step of a build that is given as a list, as E2B's clients give it.
type Step struct {
	Type string   // RUN, COPY, ENV, WORKDIR or USER
	Args []string // RUN: command, user; COPY: from, to, owner, mode; ENV: names and values; WORKDIR: path; USER: name
	// Files names those of BuildRequest.Files that COPY copies from.
	Files string
	// Anew carries it out, and all behind it, whatever is known of them.
	Anew bool
}

// withUser makes the user as whom steps run that name none, where an image has not got one.
const withUser = `USER root
RUN <<'END_OF_STEP'
set -e
id user >/dev/null 2>&1 && exit 0
if command -v useradd >/dev/null; then
  useradd --create-home --shell "$(command -v bash || echo /bin/sh)" user
else
  adduser -D -s "$(command -v bash || echo /bin/sh)" user
fi
mkdir -p /etc/sudoers.d
echo 'user ALL=(ALL) NOPASSWD:ALL' >/etc/sudoers.d/90-soulbox
chmod 0440 /etc/sudoers.d/90-soulbox
END_OF_STEP
USER user
WORKDIR /home/user
`

// FromSteps is a list of steps as a Dockerfile, and the line at which each begins: they are carried out, cached and told as any other. As those
// clients expect, they begin as "user" in his home, who is made where there is none.
func FromSteps(from string, steps []Step) (dockerfile string, lines []int, err error) {
	var b strings.Builder
	user := "user"
	fmt.Fprintf(&b, "FROM %s\n%s", from, withUser)
	for i, s := range steps {
		if err := s.check(); err != nil {
			return "", nil, fmt.Errorf("step %d, %s: %w: %w", i+1, clip(s.Type), err, sandbox.ErrInvalid)
		}
		lines = append(lines, strings.Count(b.String(), "\n")+1)
		if s.Anew {
			fmt.Fprintf(&b, "ARG SOULBOX_STEP=%s\n", rand.Text())
		}
		arg := s.arg
		switch s.Type {
		case "RUN":
			if as := arg(1); as != "" && as != user { // for this one
				fmt.Fprintf(&b, "USER %s\n", literal(as))
			}
			end := heredocEnd(arg(0))
			fmt.Fprintf(&b, "RUN <<'%s'\n%s\n%s\n", end, arg(0), end)
			if as := arg(1); as != "" && as != user {
				fmt.Fprintf(&b, "USER %s\n", literal(user))
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
				return "", nil, err
			}
			fmt.Fprintf(&b, "COPY %s %s\n", flags, paths)
		case "ENV":
			for n := 0; n < len(s.Args); n += 2 {
				fmt.Fprintf(&b, "ENV %s=%s\n", s.Args[n], quoted(s.Args[n+1]))
			}
		case "WORKDIR":
			fmt.Fprintf(&b, "WORKDIR %s\n", literal(arg(0)))
		case "USER":
			user = arg(0)
			fmt.Fprintf(&b, "USER %s\n", literal(user))
		}
	}
	return b.String(), lines, nil
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
	for _, a := range s.Args {
		if s.Type != "RUN" && strings.ContainsAny(a, "\n\r\x00") || strings.Contains(a, "\x00") {
			return errors.New("an argument has a line feed or a NUL byte")
		}
	}
	return nil
}

// heredocEnd is a word that is no line of a text.
func heredocEnd(text string) string {
	end := "END_OF_STEP"
	for strings.Contains(text, end) {
		end += "_"
	}
	return end
}

// literal keeps the Dockerfile from reading anything into a text.
func literal(text string) string {
	return strings.NewReplacer(`\`, `\\`, `$`, `\$`, `"`, `\"`, `'`, `\'`).Replace(text)
}

func quoted(text string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `$`, `\$`, `"`, `\"`).Replace(text) + `"`
}
