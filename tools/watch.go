package tools

import (
	"context"
	"strings"
	"time"

	"soulbox.dev/soulbox/agent"
	"soulbox.dev/soulbox/internal/cursor"
	"soulbox.dev/soulbox/internal/names"
)

func (s *Toolbox) watchTools() []tool {
	return []tool{
		define(s, "file_watch",
			"Watch files for changes. Start with path; then the cursor gives the changes since, or waits for the first.",
			hints{title: "Watch files", readOnly: true, idempotent: true, longResult: true}, s.fileWatch),
	}
}

type fileWatchInput struct {
	Path    filename `json:"path,omitempty" jsonschema:"directory, with all below, or file"`
	Flat    bool     `json:"flat,omitempty" jsonschema:"the directory only"`
	Ignore  []string `json:"ignore,omitempty" jsonschema:"globs, such as node_modules or *.log"`
	Cursor  string   `json:"cursor,omitempty" jsonschema:"of the last result; can be used again"`
	YieldMS *int64   `json:"yield_ms,omitempty" jsonschema:"0 to 50000; default 30000"`
	Limit   int      `json:"limit,omitempty" jsonschema:"changes; default 200"`
	Close   bool     `json:"close,omitempty" jsonschema:"with cursor: end the watch"`
	target
}

type fileWatchOutput struct {
	Cursor string       `json:"cursor"`
	Events []watchEvent `json:"events"`
	More   bool         `json:"more,omitempty"`
	Lost   bool         `json:"lost,omitempty" jsonschema:"changes are missing"`
	Gone   bool         `json:"gone,omitempty" jsonschema:"the watch has ended"`
}

type watchEvent struct {
	Op   string `json:"op" enum:"create,write,remove,rename,save,attrib"`
	Path string `json:"path"`
	From string `json:"from,omitempty"`
	Dir  bool   `json:"dir,omitempty"`
}

func (o fileWatchOutput) text() string {
	var lines []string
	for _, e := range o.Events {
		line := e.Op + " " + e.Path
		if e.Dir {
			line += "/"
		}
		if e.From != "" {
			line += " from " + e.From
		}
		lines = append(lines, line)
	}
	status := plural(int64(len(o.Events)), "change")
	if len(o.Events) == 0 {
		status = "nothing has changed"
	}
	if o.More {
		status += ", there are more"
	}
	if o.Lost {
		status += ", others are missing: there were too many, so look at the files again with file_list"
	}
	if o.Gone {
		status += "; the watch has ended"
	} else {
		status += "; call file_watch with cursor " + o.Cursor + " for what comes next"
	}
	return strings.Join(append(lines, "["+status+"]"), "\n")
}

// maxWatchEvents bounds how many changes one call returns.
const maxWatchEvents = 1000

func (s *Toolbox) fileWatch(ctx context.Context, in fileWatchInput) (fileWatchOutput, error) {
	yield, _, err := waitArguments(in.YieldMS, nil)
	switch {
	case err != nil:
		return fileWatchOutput{}, err
	case (in.Path == "") == (in.Cursor == ""):
		return fileWatchOutput{}, badArgument("Give either the argument \"path\", to start, or \"cursor\", to continue.")
	case in.Cursor != "" && (in.Flat || len(in.Ignore) > 0):
		return fileWatchOutput{},
			badArgument("The arguments \"flat\" and \"ignore\" go with \"path\", when a watch starts. Leave them out.")
	case in.Path != "" && in.Close:
		return fileWatchOutput{}, badArgument("The argument \"close\" goes with \"cursor\". Leave it out to start.")
	case in.Limit < 0 || in.Limit > maxWatchEvents:
		return fileWatchOutput{}, badArgument("The argument \"limit\" must be from 1 to %d.", maxWatchEvents)
	}
	if in.Limit == 0 {
		in.Limit = 200
	}
	req := agent.TreeRequest{Path: string(in.Path), Recursive: !in.Flat, Ignore: in.Ignore, Close: in.Close, Limit: in.Limit,
		WaitMS: yield.Milliseconds()}
	if in.Cursor != "" {
		if cursor.Decode("watch", in.Cursor, &req.From, &req.Watch) != nil {
			return fileWatchOutput{}, badCursor("file_watch", "give a path to start again")
		}
	} else if in.YieldMS == nil {
		req.WaitMS = 0
	}
	_, client, err := s.agent(ctx, in.target, "watch files in")
	if err != nil {
		return fileWatchOutput{}, err
	}
	return watchTree(ctx, client, req)
}

// watchTree reads a watch. If the client leaves while it waits, it returns what there is.
func watchTree(ctx context.Context, client *agent.Client, req agent.TreeRequest) (fileWatchOutput, error) {
	ctx, cancel := client.Patience(ctx, time.Duration(req.WaitMS)*time.Millisecond, agent.Silence)
	defer cancel()
	r, err := client.WatchTree(ctx, req)
	if err != nil {
		return fileWatchOutput{}, err
	}
	next, err := cursor.Encode("watch", r.Next, r.Watch)
	if err != nil {
		return fileWatchOutput{}, err
	}
	out := fileWatchOutput{Cursor: next, Events: []watchEvent{}, More: r.More, Lost: r.Lost, Gone: r.Gone}
	for _, e := range r.Events {
		out.Events = append(out.Events, watchEvent{renderLine(e.Op), names.Show(e.Path), names.Show(e.From), e.Dir})
	}
	return out, nil
}
