package guest

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"soulbox.dev/soulbox/agent"
)

var errShellReport = errors.New("not understood")

// dumpFields is the number of fields before the positional parameters (shell.bash).
const dumpFields = 10

// parseShell parses what bash reported at its end. Any program may have written it: a report that is not understood is refused as a whole.
func parseShell(dump []byte) (*shellState, error) {
	fields := strings.Split(string(dump), "\x00")
	n := len(fields)
	for _, list := range fields[:min(n, 4)] {
		if len(list) > maxOptions {
			return nil, fmt.Errorf("the shell reports options of %d bytes: %w", len(list), errShellReport)
		}
	}
	if n < dumpFields+2 || fields[n-1] != "" || fields[n-2] != "end" {
		return nil, fmt.Errorf("the shell's report is incomplete: %w", errShellReport)
	}
	end := &shellState{}
	end.set = optionChanges(fields[0], fields[1], "-o", "+o")
	// An option that ends or silences a shell holds only for the command that sets it: otherwise the next command would end or be silent
	// for no visible reason.
	end.set = slices.DeleteFunc(end.set, func(o string) bool { return slices.Contains(passing, o) })
	end.shopt = optionChanges(fields[2], fields[3], "-s", "-u")
	end.cwd = strings.Clone(strings.TrimSuffix(fields[4], "\n"))
	if !strings.HasPrefix(end.cwd, "/") {
		return nil, fmt.Errorf("the shell is in %q: %w", agent.Clip(end.cwd, 80), errShellReport)
	}
	if end.umask = strings.Clone(strings.TrimSuffix(fields[5], "\n")); end.umask == defaultUmask {
		end.umask = ""
	}
	end.alias = strings.Clone(fields[6])
	for line := range strings.Lines(fields[7]) {
		flags, name, ok := strings.Cut(strings.TrimPrefix(strings.TrimSuffix(line, "\n"), "declare -"), " ")
		if !ok || strings.HasPrefix(name, ownPrefix) {
			continue
		}
		name = strings.Clone(name) // so that the rest of the report can be freed
		end.names = append(end.names, name)
		if strings.Contains(flags, "x") {
			end.public = append(end.public, name)
		}
	}
	slices.Sort(end.names)
	end.funcs = strings.Clone(fields[8])
	if fields[9] == "" { // it ended in a function, whose own variables and parameters are not the shell's
		return end, nil
	}
	for _, arg := range fields[dumpFields : n-2] {
		end.args = append(end.args, strings.Clone(arg))
	}
	// Every bash begins with an exported OLDPWD without a value. If the shell's is different or missing, a declaration recreates that.
	end.env, end.decls = map[string]string{}, map[string]string{"OLDPWD": "unset -v OLDPWD"}
	for _, decl := range declarations(fields[9]) {
		if err := end.take(decl); err != nil {
			return nil, err
		}
	}
	return end, nil
}

const (
	ownPrefix    = "__soulbox_"
	defaultUmask = "umask 0022"
	maxOptions   = 4 << 10
)

// passing are the options of set that are not remembered.
var passing = []string{"-o errexit", "-o nounset", "-o noexec", "-o onecmd", "-o privileged"}

// optionChanges compares two lists such as "braceexpand:hashall", of a new shell and of this one.
func optionChanges(fresh, now, on, off string) []string {
	was, is := strings.Split(fresh, ":"), strings.Split(now, ":")
	var changes []string
	for _, o := range is {
		if isOption(o) && !slices.Contains(was, o) {
			changes = append(changes, on+" "+o)
		}
	}
	for _, o := range was {
		if isOption(o) && !slices.Contains(is, o) {
			changes = append(changes, off+" "+o)
		}
	}
	return changes
}

func isOption(name string) bool {
	return name != "" && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz_-") == "" && name[0] != '-'
}

// declarations splits the output of "declare -p": a newline within quotes belongs to a value.
func declarations(text string) []string {
	var list []string
	begin := 0
	quote := byte(0) // a double quote, a single quote (of $'…' and '…'), or 0 for none
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c == '\\':
			i++ // skips any character; within '…' bash writes no backslash
		case quote == 0 && (c == '"' || c == '\''):
			quote = c
		case c == quote:
			quote = 0
		case quote == 0 && c == '\n':
			list = append(list, text[begin:i])
			begin = i + 1
		}
	}
	return list
}

// take adds one declaration, such as: declare -x NAME="value".
func (s *shellState) take(decl string) error {
	flags, rest, ok := strings.Cut(strings.TrimPrefix(decl, "declare "), " ")
	if !ok || !strings.HasPrefix(decl, "declare -") {
		return fmt.Errorf("the shell reports %q: %w", agent.Clip(decl, 80), errShellReport)
	}
	name, value, assigned := strings.Cut(rest, "=")
	if !isName(name) {
		return fmt.Errorf("the shell reports %q: %w", agent.Clip(decl, 80), errShellReport)
	}
	if name == "OLDPWD" {
		delete(s.decls, name)
		if flags != "-x" {
			s.decls["OLDPWD"] = "unset -v OLDPWD; " + decl
			return nil
		}
	}
	if shellOwn(name) || flags == "--" && slices.Contains(byDefault, name) || strings.HasPrefix(name, ownPrefix) || !assigned &&
		name == "OLDPWD" || name == "IFS" && value == `$' \t\n'` {
		return nil
	}
	if flags == "-x" && assigned && !slices.Contains(startUp, name) {
		text, err := unquote(value)
		if err != nil {
			return err
		}
		if len(text) < maxExported {
			s.env[strings.Clone(name)] = strings.Clone(text)
			return nil
		}
	}
	s.decls[strings.Clone(name)] = strings.Clone(decl)
	return nil
}

// maxExported bounds what bash gets in its environment, in bytes: Linux allows 128 KiB. The script sets longer variables, so that bash
// starts and itself reports that programs cannot.
const maxExported = 64 << 10

// startUp are the variables on which bash acts when it starts: it must not act on these, which were set later.
var startUp = []string{"BASH_ENV", "ENV"}

// ownVariables belong to bash, which sets them in every shell (bash(1), "Shell Variables").
var ownVariables = strings.Fields(`BASH BASHOPTS BASHPID BASH_ALIASES BASH_ARGC BASH_ARGV BASH_ARGV0 BASH_CMDS BASH_COMMAND
	BASH_EXECUTION_STRING BASH_LINENO BASH_LOADABLES_PATH BASH_MONOSECONDS BASH_REMATCH BASH_SOURCE BASH_SUBSHELL BASH_TRAPSIG BASH_VERSINFO
	BASH_VERSION COMP_WORDBREAKS COPROC DIRSTACK EPOCHREALTIME EPOCHSECONDS EUID FUNCNAME GROUPS HISTCMD LINENO OPTARG OPTIND PIPESTATUS
	POSIXLY_CORRECT PPID PWD RANDOM SECONDS SHELLOPTS SHLVL SRANDOM UID _`)

// byDefault are the variables that bash itself sets but does not export.
var byDefault = strings.Fields("COLUMNS HOSTNAME HOSTTYPE LINES MACHTYPE OPTERR OSTYPE PS4 TERM")

func shellOwn(name string) bool { return slices.Contains(ownVariables, name) }

// isName reports whether bash can have a variable of that name.
func isName(name string) bool {
	for i, c := range []byte(name) {
		if !(c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || i > 0 && c >= '0' && c <= '9') {
			return false
		}
	}
	return name != ""
}

// unquote returns the value of a word that "declare -p" wrote: "…", $'…' or plain.
func unquote(word string) (string, error) {
	switch {
	case len(word) >= 2 && word[0] == '"' && word[len(word)-1] == '"':
		return unescape(word[1:len(word)-1], `"\$`+"`"), nil
	case len(word) >= 3 && strings.HasPrefix(word, "$'") && word[len(word)-1] == '\'':
		return unquoteANSI(word[2 : len(word)-1])
	case strings.ContainsAny(word, "\"'\\$`"):
		return "", fmt.Errorf("the shell reports a value %q: %w", agent.Clip(word, 80), errShellReport)
	}
	return word, nil
}

// unescape removes the backslash before each of the given characters.
func unescape(text, special string) string {
	if !strings.Contains(text, `\`) {
		return text
	}
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] == '\\' && i+1 < len(text) && strings.IndexByte(special, text[i+1]) >= 0 {
			i++
		}
		b.WriteByte(text[i])
	}
	return b.String()
}

// ansiEscapes are the escapes that stand for one byte (bash(1), "QUOTING").
var ansiEscapes = map[byte]byte{'a': 7, 'b': 8, 'e': 27, 'E': 27, 'f': 12, 'n': 10, 'r': 13, 't': 9, 'v': 11, '\\': '\\', '\'': '\'',
	'"': '"', '?': '?'}

// unquoteANSI returns the value of the text between $' and '.
func unquoteANSI(text string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] != '\\' {
			b.WriteByte(text[i])
			continue
		}
		i++
		if i == len(text) {
			return "", fmt.Errorf("the shell reports a value that ends in a backslash: %w", errShellReport)
		}
		c := text[i]
		if e, ok := ansiEscapes[c]; ok {
			b.WriteByte(e)
			continue
		}
		base, most := 8, 3
		switch {
		case c == 'x':
			base, most, i = 16, 2, i+1
		case c == 'u':
			base, most, i = 16, 4, i+1
		case c == 'U':
			base, most, i = 16, 8, i+1
		case c < '0' || c > '7':
			return "", fmt.Errorf("the shell reports an escape %q: %w", `\`+string(rune(c)), errShellReport)
		}
		stop := i
		for stop < len(text) && stop < i+most && digit(text[stop], base) {
			stop++
		}
		code, err := strconv.ParseUint(text[i:stop], base, 32)
		if err != nil {
			return "", fmt.Errorf("the shell reports an escape that is not a number: %w", errShellReport)
		}
		if c == 'u' || c == 'U' {
			b.Write(utf8.AppendRune(nil, rune(code)))
		} else {
			b.WriteByte(byte(code))
		}
		i = stop - 1
	}
	return b.String(), nil
}

func digit(c byte, base int) bool {
	if base == 8 {
		return c >= '0' && c <= '7'
	}
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}
