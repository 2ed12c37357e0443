package guest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"regexp/syntax"
	"strings"
	"time"
	"unicode/utf8"

	"soulbox.dev/soulbox/agent"
)

const (
	searchTime  = 20 * time.Second
	searchLimit = 1000
	searchLine  = 300      // bytes of a line in an answer
	maxLine     = 64 << 10 // bytes of a line that are searched
	maxPattern  = 4 << 10
	maxProgram  = 2000    // instructions of a pattern: the cost for each byte
	sniff       = 8 << 10 // bytes that are checked for NUL, which means a binary file
)

// search searches a tree without following symlinks.
func (s *Server) search(ctx context.Context, r agent.SearchRequest) (agent.SearchResult, error) {
	if err := checkPath("search", r.Path); err != nil {
		return agent.SearchResult{}, err
	}
	if r.Pattern == "" && r.Glob == "" {
		return agent.SearchResult{}, agent.Invalid("search: give a pattern, a glob, or both")
	}
	if len(r.Pattern) > maxPattern || len(r.Glob) > maxPattern {
		return agent.SearchResult{}, agent.Invalid("search: pattern and glob may have at most %d bytes each", maxPattern)
	}
	q := &searcher{ctx: ctx, root: path.Clean(r.Path), limit: r.Limit, room: agent.MaxMessage * 9 / 10,
		result: agent.SearchResult{Matches: []agent.Match{}}}
	if q.limit <= 0 || q.limit > searchLimit {
		q.limit = searchLimit
	}
	var err error
	if r.Pattern != "" {
		if q.pattern, err = compilePattern(r.Pattern); err != nil {
			return agent.SearchResult{}, err
		}
	}
	if r.Glob != "" {
		if q.glob, err = compileGlob(r.Glob); err != nil {
			return agent.SearchResult{}, err
		}
	}
	if _, err := os.Stat(q.root); err != nil {
		return agent.SearchResult{}, err
	}
	var cancel context.CancelFunc
	q.ctx, cancel = context.WithTimeout(ctx, searchTime)
	defer cancel()
	err = filepath.WalkDir(q.root, q.visit)
	if errors.Is(err, fs.SkipAll) || q.ctx.Err() != nil {
		q.result.More, err = true, nil
	}
	return q.result, err
}

// compilePattern compiles a pattern if its cost is within bounds: matching cannot be interrupted.
func compilePattern(pattern string) (*regexp.Regexp, error) {
	parsed, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return nil, agent.Invalid("search: %v", err)
	}
	program, err := syntax.Compile(parsed.Simplify())
	if err != nil {
		return nil, agent.Invalid("search: %v", err)
	}
	if len(program.Inst) > maxProgram {
		return nil, agent.Invalid("search: the pattern is too costly, it has %d states, at most %d are allowed", len(program.Inst),
			maxProgram)
	}
	return regexp.Compile(pattern)
}

type searcher struct {
	ctx     context.Context
	root    string
	pattern *regexp.Regexp
	glob    *regexp.Regexp
	limit   int
	room    int
	result  agent.SearchResult
}

func (q *searcher) visit(name string, entry fs.DirEntry, err error) error {
	if q.ctx.Err() != nil {
		return fs.SkipAll
	}
	if err != nil {
		return nil // removed meanwhile, or unreadable
	}
	if entry.IsDir() {
		if name != q.root && (entry.Name() == ".git" || name == "/proc" || name == "/sys") {
			return fs.SkipDir
		}
		return nil
	}
	if q.glob != nil {
		rel := strings.TrimPrefix(strings.TrimPrefix(name, q.root), "/")
		if rel == "" {
			rel = entry.Name()
		}
		if !q.glob.MatchString(rel) {
			return nil
		}
	}
	q.result.Files++
	if q.pattern == nil {
		return q.add(agent.Match{Path: name})
	}
	if !entry.Type().IsRegular() {
		return nil
	}
	return q.grep(name)
}

func (q *searcher) add(m agent.Match) error {
	size := encodedSize(m.Path, m.Text) + 40
	if len(q.result.Matches) >= q.limit || size > q.room {
		q.result.More = true
		return fs.SkipAll
	}
	q.room -= size
	q.result.Matches = append(q.result.Matches, m)
	return nil
}

// grep searches the lines of a text file for the pattern.
func (q *searcher) grep(name string) error {
	f, err := openRegular(name)
	if err != nil {
		return nil // removed meanwhile, or unreadable
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, 64<<10)
	if start, _ := r.Peek(sniff); bytes.IndexByte(start, 0) >= 0 {
		return nil
	}
	for n := 1; ; n++ {
		line, err := readLine(r)
		if err != nil && len(line) == 0 {
			return nil
		}
		if at := q.pattern.FindIndex(line); at != nil {
			if err := q.add(agent.Match{Path: name, Line: n, Text: around(line, at)}); err != nil {
				return err
			}
		}
		if err != nil || q.ctx.Err() != nil {
			return nil
		}
	}
}

// readLine reads a line and keeps at most maxLine bytes of it.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if room := maxLine - len(line); room > 0 {
			line = append(line, part[:min(room, len(part))]...)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err == io.EOF:
			return line, err
		default:
			return bytes.TrimRight(line, "\r\n"), err
		}
	}
}

// around cuts a long line to the part around its match, at character boundaries. The result is inert: JSON cannot carry bytes that are not
// text.
func around(line []byte, at []int) string {
	if len(line) <= searchLine {
		return agent.Inert(line)
	}
	from := max(0, min(at[0]-searchLine/4, len(line)-searchLine))
	shown := line[from:min(len(line), from+searchLine)]
	if from > 0 {
		shown = agent.AfterCut(shown)
	}
	return "…" + agent.Inert(agent.Whole(shown)) + "…"
}

// compileGlob turns a glob into a regexp: * and ? match within a name, ** spans directories, [a-z] and {a,b} work as in shells. A glob
// without a slash matches names at any depth.
func compileGlob(glob string) (*regexp.Regexp, error) {
	var b strings.Builder
	b.WriteString("^")
	if !strings.Contains(glob, "/") {
		b.WriteString("(?:.*/)?")
	}
	braces := 0
	for i := 0; i < len(glob); i++ {
		switch c := glob[i]; c {
		case '*':
			if strings.HasPrefix(glob[i:], "**/") {
				b.WriteString("(?:.*/)?")
				i += 2
			} else if strings.HasPrefix(glob[i:], "**") {
				b.WriteString(".*")
				i++
			} else {
				b.WriteString("[^/]*")
			}
		case '?':
			b.WriteString("[^/]")
		case '[':
			end := strings.IndexByte(glob[i:], ']')
			if end < 2 {
				return nil, agent.Invalid("search: glob %q has an unclosed [", agent.Clip(glob, 100))
			}
			set := glob[i+1 : i+end]
			if set[0] == '!' {
				set = "^" + set[1:]
			}
			b.WriteString("[" + strings.ReplaceAll(set, `\`, `\\`) + "]")
			i += end
		case '{':
			braces++
			b.WriteString("(?:")
		case '}':
			if braces == 0 {
				b.WriteString(`\}`)
				continue
			}
			braces--
			b.WriteString(")")
		case ',':
			if braces > 0 {
				b.WriteString("|")
			} else {
				b.WriteString(",")
			}
		default:
			_, n := utf8.DecodeRuneInString(glob[i:])
			b.WriteString(regexp.QuoteMeta(glob[i : i+n]))
			i += n - 1
		}
	}
	re, err := regexp.Compile("(?s)" + b.String() + "$")
	if err != nil || braces > 0 {
		return nil, agent.Invalid("search: glob %q is not complete", agent.Clip(glob, 100))
	}
	return re, nil
}
