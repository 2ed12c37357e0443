package template

import (
	"errors"
	"fmt"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
)

// SyntaxError says what is wrong with a Dockerfile and what to do.
type SyntaxError struct {
	Line    int // the first is 1; 0 means unknown
	Message string
	Hint    string
}

// Error implements error.
func (e *SyntaxError) Error() string {
	text := "Dockerfile: "
	if e.Line > 0 {
		text = fmt.Sprintf("Dockerfile, line %d: ", e.Line)
	}
	text += strings.TrimSuffix(e.Message, ".")
	if e.Hint != "" {
		text += "; " + e.Hint
	}
	return text
}

// plan is a Dockerfile that can be built.
type plan struct {
	stages []stage
	target int
	lex    *shell.Lex
	global []instructions.KeyValuePairOptional // ARGs before the first FROM, with their values
	args   map[string]string                   // given by the caller
	grown  expansion                           // of the words before the first stage and of all FROMs
}

// stage is the part of a Dockerfile from one FROM to the next.
type stage struct {
	name     string
	base     string // what FROM names, unless it is a stage
	from     int    // the stage that it begins from, or -1
	line     int
	commands []instructions.Command
}

// scratch is the name of the empty image.
const scratch = "scratch"

// maxDockerfile bounds a Dockerfile, in bytes.
const maxDockerfile = 1 << 20

// parse reads a Dockerfile and refuses one that cannot be built.
func parse(text, target string, args map[string]string) (*plan, error) {
	if len(text) > maxDockerfile {
		return nil, &SyntaxError{Message: fmt.Sprintf("it has %d bytes, at most %d are possible", len(text), maxDockerfile)}
	}
	result, err := parser.Parse(strings.NewReader(text))
	if err != nil {
		return nil, located(err)
	}
	stages, meta, err := instructions.Parse(result.AST, nil)
	if err != nil {
		return nil, located(err)
	}
	if err := countable(stages, meta, args); err != nil {
		return nil, err
	}
	p := &plan{lex: shell.NewLex(result.EscapeToken), args: args}
	if err := p.setGlobal(meta); err != nil {
		return nil, err
	}
	for i, s := range stages {
		st, err := p.stage(s, i)
		if err != nil {
			return nil, err
		}
		p.stages = append(p.stages, st)
	}
	if len(p.stages) == 0 {
		return nil, &SyntaxError{Message: "it has no FROM", Hint: "begin with FROM and the name of a template or an image"}
	}
	return p, p.setTarget(target)
}

// countable refuses a Dockerfile with too many instructions or variables: each instruction costs work for each variable.
func countable(stages []instructions.Stage, meta []instructions.ArgCommand, args map[string]string) error {
	n := len(meta)
	for _, s := range stages {
		n += 1 + len(s.Commands)
	}
	if n > maxInstructions {
		message := fmt.Sprintf("it has %d instructions, at most %d are possible", n, maxInstructions)
		return &SyntaxError{Message: message, Hint: "put more into one RUN"}
	}
	variables := len(args)
	for _, m := range meta {
		variables += len(m.Args)
	}
	if variables > maxVariables {
		return tooManyVariables(variables)
	}
	for name, v := range args {
		if len(v) > maxValue {
			return fmt.Errorf("the argument %s has %d bytes, at most %d are possible", clip(name), len(v), maxValue)
		}
	}
	return nil
}

func tooManyVariables(n int) error {
	return fmt.Errorf("there are %d variables, at most %d are possible; put them into a file", n, maxVariables)
}

// located turns a parser's error into a SyntaxError with its line.
func located(err error) error {
	e := &SyntaxError{Message: err.Error()}
	var where *parser.LocationError
	if errors.As(err, &where) {
		for _, ranges := range where.Locations {
			if len(ranges) > 0 && e.Line == 0 {
				e.Line = ranges[0].Start.Line
			}
		}
	}
	return e
}

func lineOf(ranges []parser.Range) int {
	if len(ranges) == 0 {
		return 0
	}
	return ranges[0].Start.Line
}

// setGlobal sets the ARGs before the first FROM.
func (p *plan) setGlobal(meta []instructions.ArgCommand) error {
	for _, cmd := range meta {
		for _, arg := range cmd.Args {
			value, given := p.args[arg.Key]
			if given {
				arg.Value = &value
			} else if arg.Value != nil {
				v, err := p.grown.expandWord(p.lex, *arg.Value, p.global)
				if err != nil {
					return &SyntaxError{Line: lineOf(cmd.Location()), Message: err.Error()}
				}
				arg.Value = &v
			}
			p.global = append(p.global, arg)
		}
	}
	return nil
}

// pairs are the variables for the parser's words; the last value of a name counts.
type pairs []instructions.KeyValuePairOptional

// Get implements shell.EnvGetter.
func (p pairs) Get(key string) (string, bool) {
	for _, kv := range slices.Backward(p) {
		if kv.Key == key && kv.Value != nil {
			return *kv.Value, true
		}
	}
	return platformArgs[key], platformArgs[key] != ""
}

// Keys implements shell.EnvGetter.
func (p pairs) Keys() []string {
	var keys []string
	for _, kv := range p {
		keys = append(keys, kv.Key)
	}
	return keys
}

// platformArgs are the variables that FROM knows without an ARG.
var platformArgs = map[string]string{
	"TARGETPLATFORM": "linux/" + runtime.GOARCH, "TARGETOS": "linux", "TARGETARCH": runtime.GOARCH, "BUILDPLATFORM": "linux/" +
		runtime.GOARCH, "BUILDOS": "linux", "BUILDARCH": runtime.GOARCH,
}

func (p *plan) stage(s instructions.Stage, index int) (stage, error) {
	st := stage{name: s.Name, from: -1, line: lineOf(s.Location), commands: s.Commands}
	expand := func(word string) (string, error) {
		v, err := p.grown.expandWord(p.lex, word, p.global)
		if err != nil {
			return "", &SyntaxError{Line: st.line, Message: err.Error()}
		}
		return v, nil
	}
	var err error
	if st.base, err = expand(s.BaseName); err != nil {
		return st, err
	}
	if st.base == "" {
		return st, &SyntaxError{Line: st.line, Message: fmt.Sprintf("FROM %s names nothing, because its variable is empty", s.BaseName),
			Hint: "give the ARG a default before the first FROM"}
	}
	platform, err := expand(s.Platform)
	if err != nil {
		return st, err
	}
	if platform != "" && platform != "linux/"+runtime.GOARCH {
		return st, &SyntaxError{Line: st.line, Message: fmt.Sprintf("the platform %q cannot be built here", platform),
			Hint: "leave --platform out, or use linux/" + runtime.GOARCH}
	}
	if st.from = p.stageNamed(st.base); st.from >= 0 {
		st.base = ""
	}
	for _, cmd := range s.Commands {
		if err := supported(cmd); err != nil {
			return st, err
		}
		if c, ok := cmd.(*instructions.CopyCommand); ok && p.refers(c.From, index) {
			return st, &SyntaxError{Line: lineOf(c.Location()),
				Message: fmt.Sprintf("COPY --from=%s names the stage itself, or a later one", c.From), Hint: "name a stage above it"}
		}
	}
	return st, nil
}

// refers reports whether from is the number of this stage or a later one.
func (p *plan) refers(from string, index int) bool {
	n, err := strconv.Atoi(from)
	return err == nil && n >= index
}

// stageNamed returns the number of an earlier stage by its name, or -1.
func (p *plan) stageNamed(name string) int {
	for i, s := range slices.Backward(p.stages) {
		if s.name != "" && strings.EqualFold(s.name, name) {
			return i
		}
	}
	return -1
}

// stageFrom is stageNamed for --from, which may also be a number.
func (p *plan) stageFrom(from string) int {
	if n, err := strconv.Atoi(from); err == nil && n >= 0 && n < len(p.stages) {
		return n
	}
	return p.stageNamed(from)
}

// setTarget finds the stage to build.
func (p *plan) setTarget(target string) error {
	p.target = len(p.stages) - 1
	if target == "" {
		return nil
	}
	if p.target = p.stageFrom(target); p.target >= 0 {
		return nil
	}
	var names []string
	for i, s := range p.stages {
		if s.name == "" {
			s.name = strconv.Itoa(i)
		}
		names = append(names, s.name)
	}
	return &SyntaxError{Message: fmt.Sprintf("it has no stage %q", target), Hint: "its stages are " + strings.Join(names, ", ")}
}

// needed returns the stages that the target needs, in their order.
func (p *plan) needed() []int {
	want := map[int]bool{p.target: true}
	for i := p.target; i >= 0; i-- {
		if !want[i] {
			continue
		}
		if p.stages[i].from >= 0 {
			want[p.stages[i].from] = true
		}
		for _, cmd := range p.stages[i].commands {
			for _, from := range sources(cmd) {
				if n := p.stageFrom(from); n >= 0 && n < i {
					want[n] = true
				}
			}
		}
	}
	var all []int
	for i := range p.stages {
		if want[i] {
			all = append(all, i)
		}
	}
	return all
}

// sources returns the stages and images from which a command takes files.
func sources(cmd instructions.Command) []string {
	switch c := cmd.(type) {
	case *instructions.CopyCommand:
		return []string{c.From}
	case *instructions.RunCommand:
		var all []string
		for _, m := range instructions.GetMounts(c) {
			all = append(all, m.From)
		}
		return all
	}
	return nil
}

// supported refuses a command that cannot be built.
func supported(cmd instructions.Command) error {
	refuse := func(message, hint string) error {
		return &SyntaxError{Line: lineOf(cmd.Location()), Message: message, Hint: hint}
	}
	switch c := cmd.(type) {
	case *instructions.OnbuildCommand:
		return refuse("ONBUILD is not supported", "put the instruction into the Dockerfile that builds on this one")
	case *instructions.RunCommand:
		for _, flag := range c.FlagsUsed {
			if flag != "mount" {
				return refuse("RUN --"+flag+" is not supported",
					"leave it out: the network is set for the whole build, and a build has no privileges")
			}
		}
		// A mount's type may hold variables, whose values are not known yet. Types without variables are checked now.
		if err := c.Expand(func(word string) (string, error) { return word, nil }); err != nil {
			break
		}
		for _, m := range instructions.GetMounts(c) {
			if m.Type == instructions.MountTypeSSH {
				return refuse("RUN --mount=type=ssh is not supported", "give the key as a secret: --mount=type=secret")
			}
		}
	case *instructions.AddCommand:
		for _, src := range c.SourcePaths {
			if strings.Contains(src, "://") || strings.HasPrefix(src, "git@") {
				return refuse("ADD of "+clip(src)+" is not supported", "fetch it by RUN curl -fsSLO or git clone, with network")
			}
		}
		if len(c.ExcludePatterns) > 0 || c.Checksum != "" || c.KeepGitDir != nil {
			return refuse("ADD --exclude, --checksum and --keep-git-dir are not supported", "name the files to leave out in .dockerignore")
		}
	case *instructions.CopyCommand:
		if len(c.ExcludePatterns) > 0 || c.Parents {
			return refuse("COPY --exclude and --parents are not supported",
				"name the files to leave out in .dockerignore, and copy the directories one by one")
		}
	case *instructions.WorkdirCommand:
		if strings.Contains(path.Clean(c.Path), "\x00") {
			return refuse("WORKDIR has a NUL byte", "")
		}
	}
	return nil
}
