package template

import (
	"errors"
	"fmt"
	"regexp"

	"github.com/moby/buildkit/frontend/dockerfile/shell"
)

// Bounds of the growth of a Dockerfile by the values of variables.
const (
	maxValue        = 64 << 10 // bytes of a word, and of the values put into one
	maxExpanded     = 1 << 20  // bytes by which the words of a stage, or those before the first, may grow
	maxReplaced     = 16 << 20 // bytes that ${name//pattern/text} may have to write, at worst
	maxVariables    = 1000     // of a stage
	maxInstructions = 2000     // of a Dockerfile
)

// expansion counts the bytes by which the words of a stage have grown.
type expansion struct{ grown int }

// expandWord puts the values of variables into a word. A word that would be too large is never made: the parser gets no more values.
func (e *expansion) expandWord(lex *shell.Lex, word string, vars pairs) (string, error) {
	values := newBounded(word, vars)
	out, _, err := lex.ProcessWord(word, values)
	return out, e.add(word, len(out), values, err)
}

// expandWords is expandWord for a word that may become several.
func (e *expansion) expandWords(lex *shell.Lex, word string, vars pairs) ([]string, error) {
	values := newBounded(word, vars)
	out, err := lex.ProcessWords(word, values)
	size := 0
	for _, w := range out {
		size += len(w)
	}
	return out, e.add(word, size, values, err)
}

func (e *expansion) add(word string, size int, values *bounded, err error) error {
	switch {
	case values.over && values.left > 0:
		return fmt.Errorf("%q replaces too much text; use shorter values, or do it in a RUN", clip(word))
	case values.over || size > max(maxValue, len(word)):
		return fmt.Errorf("%q has more than %d KB with the values of its variables; write it shorter, or keep the text in a file",
			clip(word), maxValue>>10)
	case err != nil && len(err.Error()) > maxLine:
		return errors.New(clip(err.Error()))
	case err != nil:
		return err
	}
	if e.grown += max(0, size-len(word)); e.grown > maxExpanded {
		return fmt.Errorf("variables make the words of this stage more than %d KB longer; use shorter values, or files", maxExpanded>>10)
	}
	return nil
}

// bounded gives the parser the values of variables until their total is too large.
type bounded struct {
	pairs
	text  int // bytes of the word and of the values in it
	left  int // bytes that values may still have
	power int // how many times the text may be multiplied by itself
	over  bool
}

// replacement matches the beginning of ${name//pattern/text}, which replaces every match. Replacements can be nested, so that they
// multiply.
var replacement = regexp.MustCompile(`\$\{[^/}]*//`)

func newBounded(word string, vars pairs) *bounded {
	b := &bounded{pairs: vars, text: len(word), left: maxValue, power: len(replacement.FindAllStringIndex(word, -1))}
	b.over = b.tooMuch()
	return b
}

// Get implements shell.EnvGetter.
func (b *bounded) Get(key string) (string, bool) {
	v, ok := b.pairs.Get(key)
	b.left -= len(v)
	b.text += len(v)
	if b.over = b.over || b.left < 0 || b.tooMuch(); b.over {
		return "", ok
	}
	return v, ok
}

// tooMuch reports whether the replacements could write too much.
func (b *bounded) tooMuch() bool {
	size := b.text
	for range b.power {
		if size > maxReplaced/max(b.text, 1) {
			return true
		}
		size *= b.text
	}
	return false
}
