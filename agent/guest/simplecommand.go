package guest

import (
	"slices"
	"strings"
)

// simpleCommand splits a command that means the same to execve as to the shell; nil if only the shell can tell.
func simpleCommand(command string, env []string) []string {
	for _, r := range command {
		plain := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_@%+:,./=- \t", r)
		if !plain {
			return nil
		}
	}
	words := strings.Fields(command)
	if len(words) == 0 || strings.Contains(words[0], "=") || slices.Contains(shellKeywords, words[0]) {
		return nil
	}
	if startsShellCode(env) {
		return nil
	}
	return words
}

// shellKeywords are the builtins and reserved words of bash 5 (bash(1), "RESERVED WORDS" and "SHELL BUILTIN COMMANDS").
var shellKeywords = strings.Fields(`. : [ alias bg bind break builtin caller case cd command compgen complete compopt continue
	coproc declare dirs disown do done echo elif else enable esac eval exec exit export false fc fg fi for function getopts hash help
	history if in jobs kill let local logout mapfile popd printf pushd pwd read readarray readonly return select set shift shopt
	source suspend test then time times trap true type typeset ulimit umask unalias unset until wait while`)

// harmlessKeywords are those shellKeywords that do not change the shell.
var harmlessKeywords = []string{"[", "echo", "false", "pwd", "test", "times", "true", "type"}

// changesNothing reports whether a command surely cannot change the shell that runs it, if that has no functions and aliases: it only calls
// programs, with arguments that have no side effects. Otherwise the shell must report its state at its end, which takes longer.
func changesNothing(command string, env []string) bool {
	s := commandScanner{text: command, first: true}
	for s.at < len(s.text) {
		if !s.step() {
			return false
		}
	}
	return s.endWord() && !startsShellCode(env)
}

// commandScanner parses a command as far as it understands it.
type commandScanner struct {
	text  string
	at    int
	first bool   // the next word is that of a command, not an argument
	word  string // the part that was read
	begun bool   // there is a word, which may be empty
}

// step reads a character or a quoted text, and reports whether it understands that.
func (s *commandScanner) step() bool {
	c := s.text[s.at]
	s.at++
	switch {
	case c == ' ' || c == '\t':
		return s.endWord()
	case c == '\n' || c == ';' || c == '|':
		ok := s.endWord()
		s.first = true
		return ok
	case c == '&':
		if s.at > 1 && (s.text[s.at-2] == '>' || s.text[s.at-2] == '<') {
			return true // part of a redirection
		}
		ok := s.endWord()
		s.first = true
		return ok
	case c == '<' || c == '>':
		// Before the command word, also as 2>, it would hide which word that is.
		return !s.first && s.endWord() && !strings.HasPrefix(s.text[s.at-1:], "<<")
	case c == '\'':
		end := strings.IndexByte(s.text[s.at:], '\'')
		if end < 0 {
			return false
		}
		s.add(s.text[s.at : s.at+end])
		s.at += end + 1
		return true
	case c == '"':
		return s.quoted()
	case c == '$':
		return s.variable()
	case c == '=' || c == '*' || c == '?' || c == '[' || c == ']':
		if s.first && s.word+string(c) != "[" {
			return false // an assignment, or a pattern that may become any word
		}
	case c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c >= 0x80 || strings.IndexByte("_@%+:,./-~^", c) >= 0:
	default:
		return false
	}
	s.add(string(c))
	return true
}

func (s *commandScanner) add(text string) {
	s.word += text
	s.begun = true
}

// quoted reads to the end of "…".
func (s *commandScanner) quoted() bool {
	s.begun = true
	for s.at < len(s.text) {
		c := s.text[s.at]
		s.at++
		switch c {
		case '"':
			return true
		case '`', '\\':
			return false
		case '$':
			if !s.variable() {
				return false
			}
		default:
			s.word += string(c)
		}
	}
	return false
}

// variable reads what follows a "$": only a plain name has no side effects, and a command word must not contain any.
func (s *commandScanner) variable() bool {
	if s.first || s.at == len(s.text) {
		return false
	}
	c := s.text[s.at]
	s.at++
	s.begun = true
	return c == '_' || c == '?' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// endWord ends a word, and reports whether the word is allowed there.
func (s *commandScanner) endWord() bool {
	if !s.begun {
		return true
	}
	ok := !s.first || !slices.Contains(shellKeywords, s.word) || slices.Contains(harmlessKeywords, s.word)
	s.first, s.word, s.begun = false, "", false
	return ok
}

// startsShellCode reports whether bash finds code to run in an environment.
func startsShellCode(env []string) bool {
	return slices.ContainsFunc(env, func(kv string) bool {
		return strings.HasPrefix(kv, "BASH_ENV=") ||
			strings.HasPrefix(kv, "BASH_FUNC_")
	})
}
